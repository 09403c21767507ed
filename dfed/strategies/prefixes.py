"""What methods share whose clients train prefixes of the model that end in the model's own last unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfed.blocks import check_names, cut_points
from dfed.blocks.prefix import RESERVED, PrefixChain, body_stops
from dfed.errors import ConfigError, Fault
from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["PrefixStrategy"]


class PrefixStrategy(Strategy):
    """A strategy whose plans are depths: the first units of the model and its last one.

    Args:
        depths: How many depths there are, the full model included.
        cuts: The last unit of each depth but the last, instead; null: see :func:`dfed.blocks.cut_points`.
        tier_depths: The depth of each client of a tier, by the tier's name; others get the deepest that fits.

    Attributes:
        stops: Units of the body at each depth, ascending.
        num_depths: How many depths there are.
    """

    def __init__(self, problem: Problem, *, depths: int, cuts: list[str] | None, tier_depths: Mapping[str, int] | None = None,
                 extras: Mapping[str, Any] | None = None):
        check_names(problem.chain, [*RESERVED, *(extras or {})])
        super().__init__(problem, extras)
        self.stops = body_stops(problem.chain, cut_points(problem.chain, depths, cuts))
        self.num_depths = len(self.stops)
        self.tier_depths = dict(tier_depths or {})
        self._check_tiers()

    def _check_tiers(self) -> None:
        faults = []
        for tier, depth in self.tier_depths.items():
            if tier not in self.problem.tiers:
                known = ", ".join(self.problem.tiers)
                faults.append(Fault("tier_depths", f"must name tiers of the fleet ({known}), but names {tier!r}."))
            elif not 1 <= depth <= self.num_depths:
                message = f"must be at least 1 and at most {self.num_depths}, the last depth, but is {depth} for {tier!r}."
                faults.append(Fault("tier_depths", message))
        if faults:
            raise ConfigError(faults)

    def depths_of(self, candidate: Candidate) -> range:
        """The depths that this client may have, deepest first."""
        fixed = self.tier_depths.get(candidate.profile.tier)
        return range(self.num_depths, 0, -1) if fixed is None else range(fixed, fixed - 1, -1)

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        return candidate.planner.best(self.plan_at(depth, candidate.client) for depth in self.depths_of(candidate))

    def plan_at(self, depth: int, client: int = 0) -> Plan:
        """Training of the first ``depth`` depths."""
        names = self.problem.chain.unit_names
        hold = (*names[: self.stops[depth - 1]], names[-1])
        return Plan(client=client, hold=hold, train=hold, phases=self.problem.phases, options={"depth": depth})

    def build(self, plan: Plan) -> PrefixChain:
        return PrefixChain(self.problem.chain, self.stops[: plan.options.get("depth", self.num_depths)])

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return {f"depth {depth}": self.plan_at(depth) for depth in range(1, self.num_depths + 1)}

    def variant_of(self, plan: Plan) -> str | None:
        return f"depth {plan.options.get('depth', self.num_depths)}"
