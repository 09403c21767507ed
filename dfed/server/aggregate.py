"""Aggregation: from the sums of all ranks to the next global model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfed.comm.partial_sums import PartialSums
from dfed.region import WHOLE, Region
from dfed.server.optimizers import ServerOptimizer
from dfed.state import ServerState

__all__ = ["Contribution", "aggregate"]


@dataclass(frozen=True)
class Contribution:
    """What one completed client contributed: its weight, and the region of each tensor that it sent."""

    weight: int
    regions: Mapping[str, Region]


def aggregate(
    state: ServerState,
    sums: PartialSums,
    contributions: Sequence[Contribution],
    scale: float,
    optimizer: ServerOptimizer,
    buffers: Collection[str],
    watch: Callable[[str, Tensor, Tensor | float], None] | None = None,
) -> ServerState:
    """The state after the round: covered entries become the weighted mean over their holders, the others stay.

    Parameters then pass through the server optimiser; buffers (norm statistics) take the mean itself.

    Args:
        sums: Exact sums of weight · ``scale`` · value over all ranks; used up.
        contributions: Of the completed clients.
        buffers: Names of the tensors that are no parameters.
        watch: Told of each tensor that somebody sent: its name, the mean (float32; what it was where nobody holds the entry),
            and the weight behind it times ``scale``, one number or float64 for each entry. Must change neither.
    """
    params, slots = dict(state.params), dict(state.slots)
    for name in sums.shapes:
        held = _weights_by_region(name, contributions)
        if not held:
            continue
        mean, covered, weights = _mean(sums[name], held, scale, state.params[name])
        if watch is not None:
            watch(name, mean, weights)
        if name in buffers:
            params[name] = mean
        else:
            before = slots.get(name)
            before = optimizer.init(name, state.params[name]) if before is None else before
            params[name], slots[name] = optimizer.step(name, state.params[name], mean, dict(before), covered)
    return replace(state, round_index=state.round_index + 1, params=params, slots=slots)


def _weights_by_region(name: str, contributions: Sequence[Contribution]) -> dict[Region, int]:
    """Total weight behind each distinct region, so that a region's entries are visited once, whoever holds them."""
    held: dict[Region, int] = {}
    for contribution in contributions:
        region = contribution.regions.get(name)
        if region is not None and contribution.weight:
            held[region] = held.get(region, 0) + contribution.weight
    return held


def _mean(total: Tensor, held: Mapping[Region, int], scale: float, old: Tensor
          ) -> tuple[Tensor, Tensor | None, Tensor | float]:
    """The mean (float32; ``old`` where nobody holds the entry), which entries are covered (None: all), and the weights."""
    if set(held) == {WHOLE}:
        weight = held[WHOLE] * scale
        return total.div_(weight).to(torch.float32), None, weight
    weights = _weights(total.shape, {region: weight * scale for region, weight in held.items()})
    covered = None if WHOLE in held else weights > 0
    mean = total.div_(weights).to(torch.float32)
    weights = weights.expand(total.shape)
    if covered is None or bool(covered.all()):
        return mean, None, weights
    return torch.where(covered, mean, old), covered.expand(total.shape), weights


def _weights(shape: Sequence[int], held: Mapping[Region, float]) -> Tensor:
    """The weight behind each entry of a tensor of this shape (float64, of a shape that can be expanded to it).

    Exact: weights are whole numbers times a power of two, in any order.
    """
    axes = {region: region.axes() for region in held}
    if any(axis is not None for own in axes.values() for axis in own[2:]):
        weights = torch.zeros(tuple(shape), dtype=torch.float64)
        for region, weight in held.items():
            region.add_(weights, weight)
        return weights
    # Along two dimensions a region is an outer product, and all of them are one product of matrices.
    marks = torch.zeros(2, len(held), max([1, *shape[:2]]), dtype=torch.float64)
    for number, (region, weight) in enumerate(held.items()):
        for dim in range(2):
            own = axes[region][dim] if dim < len(axes[region]) else None
            for places in [slice(None)] if own is None else own if isinstance(own, list) else [own]:
                marks[dim, number, places] = weight if dim == 0 else 1.0
    sizes = [*shape[:2], 1, 1][:2]
    product = marks[0, :, :sizes[0]].T @ marks[1, :, :sizes[1]]
    return product.view(tuple(sizes[:len(shape)]) + (1,) * (len(shape) - 2))
