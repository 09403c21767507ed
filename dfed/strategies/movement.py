"""Effective movement: whether a block still gets anywhere, or only trembles. When progressive training may go on.

Source: Wu, Li, Xu, "Breaking the Memory Wall for Heterogeneous Federated Learning via Progressive Training", KDD 2025 (arXiv
2404.13349), on when a block is frozen. With Δ_q the change of the block in round q, over a window of H rounds:
EM = ‖Σ_q Δ_q‖₁ / Σ_q ‖Δ_q‖₁, which is 1 where all rounds go the same way and falls towards 0 as they cancel out.

The block is settled when the slope of a least-squares line through its last values of EM stays small, or EM itself does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dfed import rng

__all__ = ["MOST_ENTRIES", "Pace", "effective_movement", "sample_of"]

MOST_ENTRIES = 10_000
"""Entries of a block by which its movement is judged."""


def sample_of(params: Mapping[str, Tensor], names: Sequence[str], seed: int, block: str) -> Tensor:
    """The values of at most :data:`MOST_ENTRIES` entries of these tensors, float32 (n,): always the same ones of a block."""
    sizes = [params[name].numel() for name in names]
    total = sum(sizes)
    if total <= MOST_ENTRIES:
        return torch.cat([params[name].reshape(-1) for name in names])
    places = np.sort(rng.Permutation(total, seed, "movement", block).take(np.arange(MOST_ENTRIES)))
    ends = np.cumsum(sizes)
    parts = np.split(places, np.searchsorted(places, ends[:-1]))
    starts = ends - np.array(sizes)
    return torch.cat([
        params[name].reshape(-1)[torch.from_numpy(part - start)] for name, part, start in zip(names, parts, starts, strict=True)
    ])


def effective_movement(changes: Tensor) -> float:
    """EM of the changes of a window, (rounds, entries); 0 where nothing moved."""
    way = float(changes.double().abs().sum())
    return float(changes.double().sum(dim=0).abs().sum()) / way if way > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When a block in training counts as settled, by its series of EM.

    Attributes:
        window: Rounds over which movement is measured; at least 2, as a line goes through so many values.
        threshold: What the figure has to stay below: the slope in size (change a round), or EM itself.
        patience: For so many rounds.
        criterion: ``slope``: of the least-squares line through the last ``window`` values of EM (ProFL); ``level``: EM, as
            small movement means that rounds cancel out each other (SmartFreeze).
    """

    window: int
    threshold: float
    patience: int
    criterion: Literal["slope", "level"] = "slope"

    @property
    def length(self) -> int:
        """Values of EM on which the verdict depends."""
        return self.patience + (self.window - 1 if self.criterion == "slope" else 0)

    def is_settled(self, series: Sequence[float]) -> bool:
        """Whether the block has settled.

        Args:
            series: EM after each round, from the first full window on.
        """
        if len(series) < self.length:
            return False
        stops = range(len(series) - self.patience + 1, len(series) + 1)
        figures = (series[stop - 1] if self.criterion == "level" else self.slope(series[:stop]) for stop in stops)
        return all(figure is not None and math.fabs(figure) < self.threshold for figure in figures)

    def slope(self, series: Sequence[float]) -> float | None:
        """Of the least-squares line through the last ``window`` values, a round; None if there are fewer."""
        values = np.asarray(series[-self.window:])
        if len(values) < self.window:
            return None
        places = np.arange(self.window) - (self.window - 1) / 2
        return float((places * values).sum() / (places**2).sum())
