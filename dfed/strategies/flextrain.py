"""FlexTrain: one model that is trained at every depth, with one stem and one classifier for all.

Source: Unsal, Maatouk, De Domenico, Piovesan, Ayed, "FlexTrain: A Dynamic Training Framework for Heterogeneous Devices
Environments", 2023 (arXiv 2310.20457). This is its federated form; for one device see :mod:`dfed.central.flextrain`.

Symbols: N_k, the first k of K residual blocks, after which the others are the identity, with a shortcut without parameters
where the shape changes, up to the one classifier. Device j holds the depth k_j, trains it from end to end, and teaches the
next smaller one: its loss is CE(N_{k_j}) + β ‖f_{k_j − 1} − f_{k_j}‖², where f are the pooled features that the classifier
takes, f_{k_j} as given, and the prefix is passed once. The smallest depth teaches none.

Server, as the text says (``aggregation: padded``): what a device does not hold counts as the server's own value, so a tensor
moves by the share of the round's clients that hold it: w ← ρ · mean_U(w_j) + (1 − ρ) · w_old, where U are its holders and ρ
their share of the samples. ``counted``: w ← mean_U(w_j).

Deviations: f is the input of the last linear layer, and ‖·‖² the mean over mini-batch and features (neither is said). The sum
over features diverged: a depth is the one below and what its blocks add, so what pulls the lower one up moves the upper one on.
Depths are those of :func:`dfed.blocks.cut_points`. Stochastic depth, which the authors' federated experiments use, is left out.
Means are weighted by samples. With a server optimiser other than plain ``sgd``, its result stands for the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dfed.models.layers import Count
from dfed.plan import Phase, Plan
from dfed.state import ServerState
from dfed.strategies.base import Problem
from dfed.strategies.prefixes import PrefixStrategy

__all__ = ["FlexTrain", "feature_distance"]


class FlexTrain(PrefixStrategy):
    """Each client trains as deep a prefix as fits, all with one classifier, and teaches the next smaller (Unsal et al. 2023).

    Args:
        depths: How many depths there are, the full model included.
        cuts: The last unit of each depth but the last, instead; null: see :func:`dfed.blocks.cut_points`.
        tier_depths: The depth of the clients of a tier, by its name; those of other tiers get the deepest that fits.
        beta: β, the weight of what the next smaller depth learns from the client's own; 0: nothing.
        aggregation: Whether clients that do not hold a tensor vote for its old value (``padded``), or not (``counted``).
    """

    def __init__(self, problem: Problem, *, depths: Count = 4, cuts: list[str] | None = None,
                 tier_depths: dict[str, Count] | None = None, beta: Annotated[float, Field(ge=0)] = 0.2,
                 aggregation: Literal["padded", "counted"] = "padded"):
        super().__init__(problem, depths=depths, cuts=cuts, tier_depths=tier_depths)
        self.beta, self.aggregation = beta, aggregation

    def training_key(self) -> list[Any]:
        return ["flextrain", list(self.stops), self.beta > 0]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        depth = len(model.prefix_stops)  # type: ignore[arg-type]
        if depth == 1 or not self.beta:
            return super().loss(model, x, y, phase)
        shared = model.run_body(x, 0, depth - 1)  # type: ignore[operator]
        scores, teacher = model.run_head_with_features(model.run_body(shared, depth - 1, depth))  # type: ignore[operator]
        student = model.run_head_with_features(shared)[1]  # type: ignore[operator]
        return F.cross_entropy(_float(scores), y) + self.beta * feature_distance(student, teacher)

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        weights = metrics["sender_weights"]
        reached = [depth for depth in range(1, self.num_depths + 1) if weights.get(self._last_block(depth))]
        new = replace(new, facts={**new.facts, "deepest": max([*reached, old.facts.get("deepest", 0)])})
        everybody = weights.get(self.problem.chain.unit_names[-1], 0)  # all hold the classifier
        if self.aggregation == "counted" or not everybody:
            return new
        return self.with_old_votes(old, new, weights, everybody)

    def _last_block(self, depth: int) -> str:
        """The unit that clients of this depth and deeper ones train, and no others."""
        return self.problem.chain.unit_names[self.stops[depth - 1] - 1]

    def evaluated(self, state: ServerState) -> Plan:
        return self.plan_at(state.facts.get("deepest") or self.num_depths)


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over mini-batch and features of (student − teacher)² (scalar); ``teacher`` is taken as given.

    Both (batch, …), of the same shape.
    """
    return (_float(student) - _float(teacher).detach()).square().mean()


def _float(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
