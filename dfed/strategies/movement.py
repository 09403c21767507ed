"""Effective movement: whether a block still gets anywhere, or only trembles. When progressive training may go on.

Source: Wu, Li, Tian, Xu, "ProFL: Performant Federated Learning through Progressive Training", 2024 (arXiv 2404.13349),
section on block freezing. With Δ_q the change of the block in round q, over a window of H rounds:
EM = ‖Σ_q Δ_q‖₁ / Σ_q ‖Δ_q‖₁, which is 1 where all rounds go the same way and falls towards 0 as they cancel out.

The block is settled when the slope of a least-squares line through its last values of EM stays small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dfed import rng

__all__ = ["MOST_ENTRIES", "effective_movement", "is_settled", "sample_of"]

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


def is_settled(series: Sequence[float], *, threshold: float, patience: int, length: int) -> bool:
    """Whether the line through the last ``length`` values was as flat as ``threshold`` (change a round), ``patience`` times.

    Args:
        series: EM after each round, from the first full window on.
        length: At least 2.
    """
    if len(series) < length + patience - 1:
        return False
    slopes = (_slope(series[len(series) - back - length:len(series) - back]) for back in range(patience))
    return all(math.fabs(slope) < threshold for slope in slopes)


def _slope(values: Sequence[float]) -> float:
    """Of the least-squares line through ``values`` at 0, 1, 2, …"""
    places = np.arange(len(values)) - (len(values) - 1) / 2
    return float((places * np.asarray(values)).sum() / (places**2).sum())
