"""The first round under one strategy, as far as it can be told before anything is run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from dfed.errors import ConfigError, DataError, DfedError, Fault
from dfed.fleet import DeviceProfile
from dfed.plan import Plan
from dfed.planner import ClientPlanner, Costs, Limits
from dfed.planner.ways import Verdict, largest_batch, verdict_of, why_not
from dfed.planning import Planning
from dfed.registry import calling
from dfed.strategies import Candidate

__all__ = ["FirstPlan", "Forecast", "TierRow", "asking", "device_order"]

_MOST_BYTES = 2**50
_NO_PLAN = "the strategy has no plan for such a client, whatever its budget"
_NOT_IN_TIME = "the plan takes {:g} simulated s, and `server.deadline_s` is {:g}"
_TOO_MUCH = "the plan needs more than 1 PiB"


@dataclass(frozen=True, kw_only=True)
class TierRow:
    """One tier under one strategy, in the first round. Figures are those of the client with the smallest budget.

    Attributes:
        clients, able, unsure: Clients of the tier, those whose plan is sure to fit, and those for whom that is not promised
            either way.
        budget_bytes, most_budget_bytes: Smallest and largest budget of the tier; None: no limit.
        verdict: Whether the plan runs on the smallest budget; see :func:`dfed.planner.ways.verdict_of`.
        fits: Whether it is sure to.
        batch_size: As configured.
        largest_batch: The largest that fits, up to :data:`dfed.planner.MOST_SAMPLES`; 0: none.
        smallest_bytes: The smallest budget with which such a client is sure to take part as configured; None if with none.
        reason: Why with none.
        peak_bytes: Predicted peak of the tensors; None, like all that follows, where the strategy has no plan, or one that
            cannot be trained on any budget.
        needed_bytes: The smallest budget that is sure to do for this plan.
        trained_share: Parameters trained, of the model's.
        bytes_down, bytes_up: Of the messages, headers included.
        flops, sim_time_s, energy_j: Of a round, for a client with the tier's mean number of samples.
    """

    tier: str
    clients: int
    able: int
    unsure: int
    budget_bytes: int | None
    most_budget_bytes: int | None
    verdict: Verdict
    fits: bool
    batch_size: int
    largest_batch: int
    smallest_bytes: int | None
    reason: str | None = None
    peak_bytes: int | None = None
    needed_bytes: int | None = None
    trained_share: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    flops: float | None = None
    sim_time_s: float | None = None
    energy_j: float | None = None


class FirstPlan(NamedTuple):
    """A plan of the first round, what becomes of it, and, if it cannot run or be done in time on any budget, why.

    ``trains`` is whether it can be trained, in time or not.
    """

    plan: Plan
    verdict: Verdict
    reason: str | None
    trains: bool = True


@contextmanager
def asking(strategy: str, model: str) -> Iterator[None]:
    """Around all that the strategy and the model of these names are asked.

    Raises:
        ConfigError: If one of the user's own raises, whatever it is, or plans what cannot be carried out.
    """
    with calling("model", model), calling("strategy", strategy) if ":" in strategy else nullcontext():
        try:
            yield
        except DataDependentOutputException as error:
            message = "it asks for the value of a tensor, as `.item()` and `if` do, which has none while memory is predicted"
            raise RuntimeError(message).with_traceback(error.__traceback__) from error
        except (ConfigError, DataError):
            raise
        except DfedError as error:  # e.g. a codec that does not exist
            raise _fault(f"must plan what can be carried out, but '{strategy}' does not: {error}") from error


def _fault(message: str) -> ConfigError:
    return ConfigError([Fault("strategy", message)])


class Forecast:
    """The first round under one strategy.

    Args:
        name: What the config calls the strategy.
        plain, deadline_s: See :meth:`dfed.planner.Limits.of`. Of what a client can send, if that is drawn, the least counts.

    Raises:
        ConfigError: Like all methods, if the strategy returns what is no plan for this model.
    """

    def __init__(self, planning: Planning, name: str, plain: Costs, deadline_s: float | None = None):
        self._planning, self._costs, self._name = planning, planning.costs, name
        self._plain, self._deadline_s = plain, deadline_s
        params = {name: torch.empty(shape, device="meta") for name, shape in planning.shapes.items()}
        self._state = planning.strategy.init(params)
        self._needs: dict[str, tuple[int, int] | str] = {}  # by cost key: peak and needed bytes, or why it cannot run

    def first(self, profile: DeviceProfile, num_samples: int) -> FirstPlan | None:
        """The plan of the first round, and whether it runs, by the run's own rules (``memory.enforce``, ``server.deadline_s``);
        None: there is none."""
        planner = self._planner(profile, num_samples)
        plan = self._planning.strategy.plan(self._state, Candidate(0, 0, num_samples, profile, planner))
        if plan is None:
            return None
        if not isinstance(plan, Plan):
            raise _fault(f"must return a dfed.plan.Plan or None from `plan`, but '{self._name}' returns a "
                         f"{type(plan).__name__}.")
        key = plan.cost_key()
        if key not in self._needs:
            self._check(plan)
            reason = why_not(self._costs, plan)
            self._needs[key] = reason or (self._costs.peak_bytes(plan), self._costs.budget_bytes(plan))
        needs = self._needs[key]
        if isinstance(needs, str):
            return FirstPlan(plan, "no", needs, trains=False)
        time_s = planner.cost(plan).total_s
        if self._deadline_s is not None and time_s > self._deadline_s:
            return FirstPlan(plan, "no", _NOT_IN_TIME.format(time_s, self._deadline_s))
        return FirstPlan(plan, verdict_of(*needs, profile.budget_bytes, self._planning.enforce), None)

    def _planner(self, profile: DeviceProfile, num_samples: int) -> ClientPlanner:
        limits = Limits.of(self._plain, profile, 0, num_samples, deadline_s=self._deadline_s,
                           upload_share=profile.upload_least or profile.upload_most)
        return ClientPlanner(self._costs, profile, num_samples, {}, limits)

    def first_of_all(self, profiles: Sequence[DeviceProfile], num_samples: int) -> list[FirstPlan | None]:
        """As :meth:`first` for each of ``profiles``, which are of one tier and sorted by :func:`device_order`.

        Between two budgets with the same plan and verdict, the same is taken for granted of all.
        """
        found: list[FirstPlan | None] = [None] * len(profiles)

        def fill(start: int, stop: int) -> None:
            """What lies between two places that are known."""
            if found[start] == found[stop]:
                found[start + 1:stop] = [found[start]] * (stop - start - 1)
            elif stop - start > 1:
                middle = (start + stop) // 2
                found[middle] = self.first(profiles[middle], num_samples)
                fill(start, middle)
                fill(middle, stop)

        places = range(len(profiles))
        for _, alike in itertools.groupby(places, key=lambda place: device_order(profiles[place])[:-1]):
            start, *rest = alike
            found[start] = self.first(profiles[start], num_samples)
            if rest:
                found[rest[-1]] = self.first(profiles[rest[-1]], num_samples)
                fill(start, rest[-1])
        return found

    def _check(self, plan: Plan) -> None:
        known = self._planning.splitting.names
        unknown = [block for block in plan.hold if block not in known]
        if unknown:
            raise _fault(f"must plan with blocks out of {', '.join(known)}, but '{self._name}' names {unknown[0]!r}.")
        if not plan.phases:
            raise _fault(f"must plan at least one phase, but '{self._name}' plans none.")

    def row(self, profiles: Sequence[DeviceProfile], owners: np.ndarray, found: Sequence[FirstPlan | None],
            num_samples: int) -> TierRow:
        """A tier of these devices.

        Args:
            owners: How many clients own each device.
            found: What :meth:`first_of_all` says of them.
            num_samples: A client's.
        """
        costs, ordered = self._costs, sorted(range(len(profiles)), key=lambda place: device_order(profiles[place])[-1])
        weakest, first = profiles[ordered[0]], found[ordered[0]]
        most = first or self.first(replace(weakest, budget_bytes=None), num_samples)
        smallest = self._smallest_budget(weakest, num_samples, does=first is not None and first.verdict == "yes")
        counts = dict.fromkeys(("yes", "maybe", "no"), 0)
        for plan, count in zip(found, owners.tolist(), strict=True):
            counts[plan.verdict if plan else "no"] += count
        common: dict[str, Any] = {
            "tier": weakest.tier, "clients": int(owners.sum()), "able": counts["yes"], "unsure": counts["maybe"],
            "budget_bytes": weakest.budget_bytes, "most_budget_bytes": profiles[ordered[-1]].budget_bytes,
            "verdict": first.verdict if first else "no", "fits": first is not None and first.verdict == "yes",
            "batch_size": self._planning.strategy.problem.phases[0].batch_size,
            "largest_batch": largest_batch(costs, most.plan, weakest.budget_bytes) if most else 0,
            "smallest_bytes": smallest,
            "reason": None if smallest is not None else most.reason or _TOO_MUCH if most else self._no_plan(weakest),
        }
        if first is None or not first.trains:
            return TierRow(**common)
        plan = first.plan
        cost, (down, up) = self._planner(weakest, num_samples).cost(plan), costs.message_bytes(plan)
        return TierRow(**common, peak_bytes=costs.peak_bytes(plan), needed_bytes=costs.budget_bytes(plan),
                       trained_share=self._trained_share(plan), bytes_down=down, bytes_up=up,
                       flops=costs.flops(plan, num_samples), sim_time_s=cost.total_s, energy_j=cost.energy_j)

    def _no_plan(self, profile: DeviceProfile) -> str:
        limits = {"server.deadline_s": self._deadline_s, "time_share": profile.time_share, "upload_least": profile.upload_least,
                  "upload_most": profile.upload_most}
        given = [f"`{name}` ({limit:g}{' s' * (name == 'server.deadline_s')})" for name, limit in limits.items()
                 if limit is not None]
        return _NO_PLAN + (f", within {' and '.join(given)}" if given else "")

    def _smallest_budget(self, profile: DeviceProfile, num_samples: int, *, does: bool) -> int | None:
        """The smallest budget with which the strategy has a plan for such a client, and one that fits; None if with none.

        Args:
            does: Whether the profile's own does, so that no larger one is looked at.
        """
        def needed(budget_bytes: int) -> int | None:
            """What the plan for this budget needs; None if there is none that fits."""
            first = self.first(replace(profile, budget_bytes=budget_bytes), num_samples)
            return self._costs.budget_bytes(first.plan) if first is not None and first.verdict == "yes" else None

        high = profile.budget_bytes if does and profile.budget_bytes is not None else _MOST_BYTES
        low, need = 0, needed(high)  # low does not do, high does
        if need is None:
            return None
        turns = itertools.cycle(("need", "middle", "less"))
        while high - low > 1:
            # As a rule a plan is chosen down to what it needs, and no further.
            budget = {"need": need, "middle": (low + high) // 2, "less": high - 1}[next(turns)]
            if not low < budget < high:
                continue
            found = needed(budget)
            if found is not None:
                high, need = budget, found
            else:
                low = budget
        return high

    def _trained_share(self, plan: Plan) -> float:
        params = dict(self._planning.strategy.problem.chain.named_parameters())
        sent = sum(math.prod(entry.shape) for entry in self._planning.forms.of(plan).up if entry.name in params)
        return sent / sum(parameter.numel() for parameter in params.values())


def device_order(profile: DeviceProfile) -> tuple[float, ...]:
    """Order of a tier's devices in which those that differ in their budget only, which comes last, stand together."""
    budget = math.inf if profile.budget_bytes is None else profile.budget_bytes
    return (profile.flops, profile.up, profile.down, profile.watts, profile.radio_watts, profile.availability,
            profile.dropout, profile.straggle, profile.slowdown, profile.int8_speedup, profile.time_share or math.inf,
            profile.upload_least or math.inf, profile.upload_most or math.inf, budget)
