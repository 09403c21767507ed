"""Weighted sums of updates that are exact, so that no order and no number of ranks changes a bit.

Each product ``weight · value`` is snapped to a grid that all clients of a round share, and added in float64. Multiples of
one grid that stay below 2⁵² grid steps add without rounding, hence in any order: in a client's turn, within a rank, and
through the reduction over ranks.

The grid of a tensor is ``range · 2⁻⁵²``. ``range`` is a power of two: at least :data:`MIN_RANGE`, and at least 64 times the
tensor's largest entry. Weights are scaled by a power of two so that they sum to at most 1 over the cohort. With the
smallest range the grid is 2⁻³⁸ ≈ 4·10⁻¹²: below half a unit in the last place of float32 for every mean above 6·10⁻⁵ in
magnitude. An entry outside the range is refused (:class:`~dfed.errors.UpdateRejected`), never clipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dfed.errors import UpdateRejected
from dfed.region import Region

__all__ = ["MIN_RANGE", "PartialSums", "value_range", "weight_scale"]

MIN_RANGE = 2.0**14
_HEADROOM = 64.0
_CHUNK = 65_536  # float64 chunks of 512 KiB stay in a core's second-level cache


def value_range(tensor: Tensor) -> float:
    """The range (a power of two) for values of this global tensor (float32, any shape)."""
    if tensor.numel() == 0:
        return MIN_RANGE
    low, high = torch.aminmax(tensor)
    largest = max(-float(low), float(high))
    return max(MIN_RANGE, _HEADROOM * 2.0 ** math.ceil(math.log2(largest))) if largest > 0 else MIN_RANGE


def weight_scale(total_weight: int) -> float:
    """The power of two by which weights that sum to ``total_weight`` are scaled, to sum to at most 1."""
    return 2.0 ** -(max(1, total_weight) - 1).bit_length()


def check_values(name: str, value: Tensor, limit: float) -> None:
    """Refuse a tensor with an entry that is not finite, or not below half the range ``limit`` in magnitude.

    Raises:
        UpdateRejected: With reason ``non_finite`` or ``out_of_range``.
    """
    if value.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(value))
    largest = max(-low, high)
    if not math.isfinite(low) or not math.isfinite(high):
        raise UpdateRejected("non_finite", f"tensor '{name}' must be finite, but has entries that are not.")
    if largest >= limit / 2:
        raise UpdateRejected("out_of_range", f"tensor '{name}' must stay below {limit / 2:g}, but reaches {largest:g}.")


class PartialSums:
    """The weighted sums of one round on one rank: float64, one flat buffer, in the global tensors' layout.

    Args:
        shapes: Of the tensors that come up this round, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.flat = torch.zeros(sum(math.prod(shape) for shape in self.shapes.values()), dtype=torch.float64)
        self._views: dict[str, Tensor] = {}
        offset = 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            self._views[name] = self.flat[offset:offset + size].view(shape)
            offset += size
        self._scratch = torch.empty(_CHUNK, dtype=torch.float64)

    def __getitem__(self, name: str) -> Tensor:
        """The sum of one tensor (float64, a view of the buffer)."""
        return self._views[name]

    def clear(self) -> None:
        """Set all sums to zero."""
        self.flat.zero_()

    def add(
        self,
        update: Mapping[str, Tensor],
        regions: Mapping[str, Region],
        weight: float,
        ranges: Mapping[str, float],
    ) -> None:
        """Add one client's update; all of it or, if it is refused, nothing.

        Args:
            update: float32 values by tensor name, each of its region's shape, on the CPU.
            regions: The part of the global tensor that each value covers.
            weight: The client's weight times :func:`weight_scale`.
            ranges: :func:`value_range` of each global tensor.

        Raises:
            UpdateRejected: If an entry is not finite or out of range.
        """
        for name, value in update.items():
            check_values(name, value, ranges[name])
        for name, value in update.items():
            self._add_one(regions[name].view(self._views[name]), regions[name], name, value, weight, ranges[name])

    def _add_one(self, target: Tensor, region: Region, name: str, value: Tensor, weight: float, limit: float) -> None:
        magic = 1.5 * limit  # adding it leaves no bits below limit · 2⁻⁵²: rounds to the grid
        if value.is_contiguous() and target.is_contiguous() and target._is_view():
            source, sums = value.view(-1), target.view(-1)
            for start in range(0, source.numel(), _CHUNK):
                part = source[start:start + _CHUNK]
                scratch = self._scratch[:part.numel()]
                scratch.copy_(part)
                sums[start:start + _CHUNK].add_(scratch.mul_(weight).add_(magic).sub_(magic))
            return
        snapped = value.to(torch.float64).mul_(weight).add_(magic).sub_(magic)
        region.add_(self._views[name], snapped)
