"""The best plan for one client: the first of a strategy's candidates that its memory, time and bytes allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dfed.fleet import Cost, DeviceProfile, client_cost
from dfed.plan import Plan
from dfed.planner.costs import Costs, with_batch

__all__ = ["ClientPlanner", "Limits", "learn"]


@dataclass(frozen=True)
class Limits:
    """What a round may take one client beside memory; None: as much as it takes.

    Attributes:
        time_s: Simulated seconds.
        upload_bytes: Bytes that it can send.
    """

    time_s: float | None = None
    upload_bytes: float | None = None

    @classmethod
    def of(cls, plain: Costs, profile: DeviceProfile, client: int, num_samples: int, *, deadline_s: float | None,
           upload_share: float | None) -> Limits:
        """The limits of ``client`` in one round.

        Args:
            plain: Costs of plainly training the full model, of which ``profile.time_share`` and ``upload_share`` are shares:
                the same under every strategy.
            deadline_s: How many simulated seconds the server waits for an answer at most.
            upload_share: See :meth:`dfed.fleet.Fleet.upload_share`.
        """
        times = [] if deadline_s is None else [deadline_s]
        plan = plain.strategy.full_plan(client)
        if profile.time_share is not None:
            times.append(profile.time_share * ClientPlanner(plain, profile, num_samples, {}).cost(plan).total_s)
        upload_bytes = None if upload_share is None else upload_share * plain.message_bytes(plan)[1]
        return cls(min(times, default=None), upload_bytes)


@dataclass(frozen=True)
class ClientPlanner:
    """What plans cost one client, and which of them it can carry out. What strategies ask; see ``Candidate.planner``.

    Attributes:
        costs: Predicted costs of the strategy's plans.
        profile: The client's device.
        num_samples: The client's training samples.
        infeasible: ``ServerState.infeasible``: what ran out of memory before.
        limits: A plan beyond them does not fit. That a client may be slowed down is not part of the prediction.
    """

    costs: Costs
    profile: DeviceProfile
    num_samples: int
    infeasible: Mapping[str, int]
    limits: Limits = Limits()

    def cost(self, plan: Plan) -> Cost:
        """Simulated seconds and joules of a round with this plan."""
        down, up = self.costs.message_bytes(plan)
        flops, int8_flops = self.costs.flops(plan, self.num_samples), self.costs.int8_flops(plan, self.num_samples)
        return client_cost(self.profile, flops=flops, int8_flops=int8_flops, bytes_down=down, bytes_up=up)

    def failed_before(self, plan: Plan) -> bool:
        """Whether this plan ran out of memory on this client's budget, or on a larger one."""
        budget = self.profile.budget_bytes
        return budget is not None and budget <= self.infeasible.get(plan.cost_key(), -1)

    def fits(self, plan: Plan, *, time_s: float | None = None, upload_bytes: float | None = None) -> bool:
        """Whether the client can carry the plan out: in its memory, within its limits, and in so many simulated seconds and
        bytes up, if given."""
        if self.failed_before(plan) or not self.costs.fits(plan, self.profile.budget_bytes):
            return False
        most_bytes = [limit for limit in (upload_bytes, self.limits.upload_bytes) if limit is not None]
        if most_bytes and self.costs.message_bytes(plan)[1] > min(most_bytes):
            return False
        limits = [limit for limit in (time_s, self.limits.time_s) if limit is not None]
        return not limits or self.cost(plan).total_s <= min(limits)

    def best(self, plans: Iterable[Plan], *, time_s: float | None = None, upload_bytes: float | None = None) -> Plan | None:
        """The first of ``plans`` that fits; None if none does.

        Args:
            plans: In order of preference, e.g. widest, deepest, or longest trained range first; looked at one by one.
            time_s, upload_bytes: As for :meth:`fits`.
        """
        return next((plan for plan in plans if self.fits(plan, time_s=time_s, upload_bytes=upload_bytes)), None)

    def largest_batch(self, plan: Plan, at_most: int, *, time_s: float | None = None) -> Plan | None:
        """The plan with the largest batch size, up to ``at_most``, that fits; None if none does.

        Batches of a size that ran out of memory before, or larger, are left out, and the next try is half that size. Where the
        largest takes too long, smaller ones are tried: with a fixed number of steps they take less.
        """
        size = self.costs.largest_batch(plan, self.profile.budget_bytes, at_most)
        if self.infeasible:
            failed = (small for small in range(1, size + 1) if self.failed_before(with_batch(plan, small)))
            size = min(size, next(failed, 2 * size + 1) // 2)
        low, high = 0, size + 1  # low is in time, high is not, or was not looked for
        middle = size
        while high - low > 1:
            low, high = (middle, high) if self.fits(with_batch(plan, middle), time_s=time_s) else (low, middle)
            middle = (low + high) // 2
        return with_batch(plan, low) if low else None


def learn(infeasible: Mapping[str, int], plan: Plan, budget_bytes: int) -> dict[str, int]:
    """``infeasible`` with one more entry: this plan ran out of memory on this budget, so it would on any smaller one."""
    key = plan.cost_key()
    return {**infeasible, key: max(budget_bytes, infeasible.get(key, 0))}
