"""FedClass: one FedAvg for each class of devices, each with a model of its own.

What FlexTrain (Unsal et al. 2023, arXiv 2310.20457, section on federated learning) is compared with: devices that can hold
the same depth make up a class, train a model of that depth together, and share nothing with other classes. A model is a prefix
of the full one and a classifier behind a shortcut without parameters, each its own; the class of the full depth has the full
model.

First values are drawn for each class. What is evaluated is the deepest class that anybody has trained; the summary of a run
has the others under ``variants``, and the mean over devices as ``device_accuracy``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from dfed.blocks import cut_points
from dfed.blocks.prefix import PrefixChain, body_stops
from dfed.models.layers import Count
from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Problem
from dfed.strategies.prefixes import PrefixStrategy

__all__ = ["FedClass"]


class FedClass(PrefixStrategy):
    """FedAvg within each class of devices that can hold the same depth, a model for each (Unsal et al. 2023).

    Args:
        depths: How many depths there are, the full model included.
        cuts: The last unit of each depth but the last, instead; null: see :func:`dfed.blocks.cut_points`.
        tier_depths: The depth of the clients of a tier, by its name; those of other tiers get the deepest that fits.
    """

    def __init__(self, problem: Problem, *, depths: Count = 4, cuts: list[str] | None = None,
                 tier_depths: dict[str, Count] | None = None):
        chain = problem.chain
        stops = body_stops(chain, cut_points(chain, depths, cuts))
        extras: dict[str, nn.Module] = {
            _own(depth, unit): copy.deepcopy(chain.skeleton().unit(unit))
            for depth, stop in enumerate(stops[:-1], start=1) for unit in (*chain.unit_names[:stop], chain.unit_names[-1])
        }
        super().__init__(problem, depths=depths, cuts=cuts, tier_depths=tier_depths, extras=extras)

    def training_key(self) -> list[Any]:
        return ["fedclass", list(self.stops)]

    def plan_at(self, depth: int, client: int = 0) -> Plan:
        plan = super().plan_at(depth, client)
        if depth == self.num_depths:
            return plan
        hold = tuple(_own(depth, unit) for unit in plan.hold)
        return replace(plan, hold=hold, train=hold)

    def build(self, plan: Plan) -> PrefixChain:
        depth = plan.options.get("depth", self.num_depths)
        stop = self.stops[depth - 1]
        if depth == self.num_depths:
            return PrefixChain(self.problem.chain, [stop])
        return PrefixChain(self.problem.chain, [stop], lambda unit: _own(depth, unit))

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        reached = [depth for depth in range(1, self.num_depths + 1) if metrics["senders"].get(self.plan_at(depth).hold[0])]
        return replace(new, facts={**new.facts, "deepest": max([*reached, old.facts.get("deepest", 0)])})

    def evaluated(self, state: ServerState) -> Plan:
        return self.plan_at(state.facts.get("deepest") or self.num_depths)


def _own(depth: int, unit: str) -> str:
    return f"class{depth}_{unit}"
