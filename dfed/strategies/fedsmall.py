"""FedSmall: everybody trains the depth that the client with the least memory can hold.

A lower bound that FlexTrain (Unsal et al. 2023, arXiv 2310.20457, section on federated learning) is compared with; the
counterpart in depth of ``allsmall``. The depth is the deepest that fits the smallest budget of the fleet, or that of
``tier_depths`` which is smaller, and which counts alone where it names every tier; if none fits, the smallest. Whoever cannot
hold it is left out. It is a small model, with the full model's classifier behind a shortcut without parameters, trained by
FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfed.models.layers import Count
from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem
from dfed.strategies.prefixes import PrefixStrategy

__all__ = ["FedSmall"]


class FedSmall(PrefixStrategy):
    """FedAvg with the deepest prefix that the client with the least memory can train (Unsal et al. 2023).

    Args:
        depths: How many depths there are, the full model included.
        cuts: The last unit of each depth but the last, instead; null: see :func:`dfed.blocks.cut_points`.
        tier_depths: The depth of the clients of a tier, by its name: the depth of all is at most the smallest of these, and
            that one where all tiers are named.
    """

    def __init__(self, problem: Problem, *, depths: Count = 4, cuts: list[str] | None = None,
                 tier_depths: dict[str, Count] | None = None):
        super().__init__(problem, depths=depths, cuts=cuts, tier_depths=tier_depths)

    def training_key(self) -> list[Any]:
        return ["prefixes", list(self.stops)]

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        return candidate.planner.best([self.plan_at(self._depth(), candidate.client)])

    def evaluated(self, state: ServerState) -> Plan:
        return self.plan_at(self._depth())

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return {}

    def variant_of(self, plan: Plan) -> str | None:
        return None

    def _depth(self) -> int:
        if self.tier_depths and self.tier_depths.keys() == set(self.problem.tiers):
            return min(self.tier_depths.values())
        smallest = self.problem.budgets[0][0] if self.problem.budgets else None
        fitting = (depth for depth in range(self.num_depths, 0, -1) if self.problem.fits(self.plan_at(depth), smallest))
        return min([next(fitting, 1), *self.tier_depths.values()])
