"""ProFL: progressive training after progressive shrinking, with blocks that are frozen for good when they have settled.

Source: Wu, Li, Xu, "Breaking the Memory Wall for Heterogeneous Federated Learning via Progressive Training", KDD 2025 (arXiv
2404.13349).

Symbols: blocks 1 … T of the model, each with an output module. *Shrinking*: stages T, T − 1, … 2 train their block and output
module on a front that is still random. *Growing*: stages 1 … T, from the values that shrinking left; the next block's turn
comes when the slope of effective movement has stayed small (:mod:`dfed.strategies.movement`). What both are made of is in
:mod:`dfed.strategies.progressive`.

Deviations: the layer that stands in for block t in the output module of block t − 1 is not distilled from block t: the layers
behind it are handed down, and it learns with its stage. How long shrinking takes is ours to say (``shrink_rounds``).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfed.models.layers import Count
from dfed.strategies.base import Problem
from dfed.strategies.movement import Pace
from dfed.strategies.progressive import Progressive, Schedule, blocks_of

__all__ = ["ProFL"]


class ProFL(Progressive):
    """Shrink from the last block to the first, then grow block by block (Wu et al. 2024).

    Args:
        split, blocks: As of :class:`dfed.strategies.neulite.NeuLite`.
        shrink_rounds: Rounds of each stage of shrinking.
        window, threshold, patience: When a block has settled; see :class:`dfed.strategies.movement.Pace`. The paper's values.
        rollback: As of :class:`dfed.strategies.neulite.NeuLite`.
    """

    def __init__(
        self, problem: Problem, *, shrink_rounds: Annotated[int, Field(ge=0)],
        split: Literal["paper", "auto"] | list[str] = "paper", blocks: Count | None = 4,
        window: Annotated[int, Field(ge=2)] = 20, threshold: Annotated[float, Field(gt=0)] = 0.2, patience: Count = 15,
        rollback: Count | None = None,
    ):
        pace = Pace(window=window, threshold=threshold, patience=patience)
        schedule = Schedule(order="elastic", pace=pace, shrink_rounds=shrink_rounds, rollback=rollback)
        super().__init__(problem, blocks=blocks_of(problem, split, blocks), schedule=schedule, objective="cross_entropy",
                         tail=False)
