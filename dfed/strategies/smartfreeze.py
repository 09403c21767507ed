"""SmartFreeze: front blocks are trained with an output module, and frozen for good when their rounds cancel out each other.

Source: Wu, Li, Tian, Chang, Lin, Wang, Xu, "Heterogeneity-Aware Memory Efficient Federated Learning via Progressive Layer
Freezing", 2024 (arXiv 2408.09101).

Symbols: block t in training with its output module; its *perturbation*, how far it got over a window of rounds in comparison
with the way that it went: 1 where all rounds go the same way, near 0 where they tremble. When that stays small, the block is
frozen and the next one's turn comes.

Deviations: we measure by effective movement (:mod:`dfed.strategies.movement`), with absolute values instead of Euclidean norms.
The paper's choice of clients by data similarity is a sampler's business and not built. Threshold and patience are ours.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfed.models.layers import Count
from dfed.strategies.base import Problem
from dfed.strategies.movement import Pace
from dfed.strategies.progressive import Progressive, Schedule, blocks_of

__all__ = ["SmartFreeze"]


class SmartFreeze(Progressive):
    """Train the first block that is not frozen, freeze it when it has settled (Wu et al. 2024).

    Args:
        split, blocks: As of :class:`dfed.strategies.neulite.NeuLite`.
        window, threshold, patience: When a block has settled; see :class:`dfed.strategies.movement.Pace`.
        rollback: As of :class:`dfed.strategies.neulite.NeuLite`.
    """

    def __init__(
        self, problem: Problem, *, split: Literal["paper", "auto"] | list[str] = "paper", blocks: Count | None = 4,
        window: Annotated[int, Field(ge=2)] = 5, threshold: Annotated[float, Field(gt=0)] = 0.3, patience: Count = 3,
        rollback: Count | None = None,
    ):
        pace = Pace(window=window, threshold=threshold, patience=patience, criterion="level")
        super().__init__(problem, blocks=blocks_of(problem, split, blocks), objective="cross_entropy", tail=False,
                         schedule=Schedule(order="elastic", pace=pace, rollback=rollback))
