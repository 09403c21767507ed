"""Weighted sums of updates that are exact, so that no order and no number of ranks changes a bit.

Each product ``weight · value`` is rounded to a grid that all clients of a round share, and added in float64. Multiples of
one grid that stay below 2⁵² grid steps add without rounding, hence in any order: in a client's turn, within a rank, and
through the reduction over ranks.

The grid of a tensor is ``range · 2⁻⁵²``. ``range`` is a power of two: at least :data:`MIN_RANGE`, and at least 64 times the
tensor's largest entry. Weights are scaled by a power of two so that they sum to at most 1 over the cohort. With the
smallest range the grid is 2⁻³⁸ ≈ 4·10⁻¹². An entry of half the range or more is refused
(:class:`~dfed.errors.UpdateRejected`), never clipped.

The fast way needs one pass over an update. A sum starts at 1.5 · range, where neighbouring float64 numbers are one grid
step apart; a fused multiply-add of ``weight · value`` then rounds the product to the grid by itself. Rounding to nearest is
the same wherever the sum stands, save for ties, which go to the even neighbour *of the sum*; so there must be no ties: the
last bit of the weight's mantissa is set, which puts the lowest bit of every product below half a grid step. Whether torch's
kernel really fuses is tried once. Where it does not, and for odd ends and strided regions, products are rounded apart, which
needs no such care: the result depends on the product alone. It is the same result, as long as a weight is a whole
number times a power of two and has at most 29 bits: times a float32 it is then exact in float64, and what the set bit
adds is at least a unit in the last place of the product, so that rounding the product first moves none to a tie.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from dfed.comm.processor import piece_length
from dfed.errors import DfedError, SumsLost, UpdateRejected
from dfed.region import WHOLE, Region

__all__ = ["MIN_RANGE", "PartialSums", "SumsBuffer", "value_range", "weight_scale"]

MIN_RANGE = 2.0**14
_HEADROOM = 64.0
_SMALL_NORM = 0.99 * MIN_RANGE / _HEADROOM  # the rest is for the rounding of the norm
_CHUNK = piece_length(65_536)  # float64 chunks of 512 KiB stay in a large second-level cache
_AT_ONCE, _WAITING_BYTES = 4, 2**28
_UNDIVIDED = 32_768  # torch never divides so few entries among threads, at places that are no whole vectors
_LANES = 64  # a multiple of what any processor's vectors hold


def value_range(tensor: Tensor) -> float:
    """The range (a power of two) for values of this global tensor (float32, any shape).

    Raises:
        DfedError: If the tensor is not finite.
    """
    if tensor.numel() == 0:
        return MIN_RANGE
    flat = tensor.reshape(-1)
    if float(torch.dot(flat, flat)) < _SMALL_NORM**2:
        return MIN_RANGE  # the cheap way: no entry is larger than the norm; false also for NaN
    low, high = torch.aminmax(tensor)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise DfedError("the global model must be finite, but has entries that are not: the run has diverged.")
    return max(MIN_RANGE, _HEADROOM * 2.0 ** math.ceil(math.log2(largest))) if largest > 0 else MIN_RANGE


def weight_scale(total_weight: int) -> float:
    """The power of two by which weights that sum to ``total_weight`` are scaled, to sum to at most 1."""
    return 2.0 ** -(max(1, total_weight) - 1).bit_length()


def check_update(values: Mapping[str, Tensor], ranges: Mapping[str, float]) -> None:
    """As :func:`check_values`, for all tensors of an update (on one device), each with its range; names the first."""
    filled = [value for value in values.values() if value.numel()]
    if filled and float(get_total_norm(filled, foreach=True)) < min(ranges[name] for name in values) / 4:
        return  # the cheap way: no entry is larger than the norm of all, with room for its rounding; false also for NaN
    for name, value in values.items():
        check_values(name, value, ranges[name])


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


def _odd(weight: float) -> float:
    """``weight`` with the last bit of its mantissa set."""
    (bits,) = struct.unpack("<q", struct.pack("<d", weight))
    return float(struct.unpack("<d", struct.pack("<q", bits | 1))[0])


@functools.cache
def _fuses() -> bool:
    """Whether ``add_(x, alpha=w)`` in float64 rounds once, on whole vectors of this processor."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(8 * _LANES, generator=generator).to(torch.float64)
    weight, start = _odd(1 / 3), 1.5 * MIN_RANGE
    fused = torch.full_like(values, start).add_(values, alpha=weight)
    exact = [Fraction(weight) * Fraction(float(value)) * Fraction(2) ** 52 / Fraction(MIN_RANGE) for value in values]
    return all(
        (Fraction(float(total)) - Fraction(start)) * 2**52 / Fraction(MIN_RANGE) == round(product)
        for total, product in zip(fused, exact, strict=True)
    )


class _Update(NamedTuple):
    """One client's update, its weight with the last bit set."""

    values: Mapping[str, Tensor]
    regions: Mapping[str, Region]
    weight: float
    ranges: Mapping[str, float]


class PartialSums:
    """The weighted sums of one round on one rank: float64, one flat buffer, in the global tensors' layout.

    Updates wait until there are four, or two or more that take 256 MiB, and are then folded in one pass over the sums, which is
    what costs. So the tensors of an update are kept a while, and must not be changed.

    Args:
        shapes: Of the tensors that come up this round, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._flat = torch.empty(sum(math.prod(shape) for shape in self.shapes.values()), dtype=torch.float64)
        self._views: dict[str, Tensor] = {}
        offset = 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            self._views[name] = self._flat[offset:offset + size].view(shape)
            offset += size
        self._offsets: dict[str, float] = {}  # what each tensor's sums stand above their values at present
        self._waiting: list[_Update] = []
        self._unset = set(self.shapes)  # tensors whose sums are zero, though the buffer holds anything
        self._chunk = _CHUNK if torch.get_num_threads() == 1 else _UNDIVIDED
        self._scratch = torch.empty(self._chunk, dtype=torch.float64)

    @property
    def flat(self) -> Tensor:
        """All sums (float64, one dimension); the buffer itself, which a reduction may change in place."""
        self._settle()
        return self._flat

    def __getitem__(self, name: str) -> Tensor:
        """The sum of one tensor (float64, a view of the buffer)."""
        self._settle()
        return self._views[name]

    def _settle(self) -> None:
        """Fold what waits, and bring every sum from where it was kept to its value; exact."""
        if self._waiting:
            self._fold(settles=True)
        for name in self._unset:
            self._views[name].zero_()
        self._unset.clear()
        for name, offset in self._offsets.items():
            self._views[name].sub_(offset)
        self._offsets.clear()

    def clear(self) -> None:
        """Set all sums to zero."""
        self._waiting.clear()
        self._offsets.clear()
        self._unset = set(self.shapes)

    def add(
        self,
        update: Mapping[str, Tensor],
        regions: Mapping[str, Region],
        weight: float,
        ranges: Mapping[str, float],
        *,
        last: bool = False,
    ) -> None:
        """Add one client's update; all of it or, if it is refused, nothing.

        Args:
            update: float32 values by tensor name, each of its region's shape, on the CPU.
            regions: The part of the global tensor that each value covers.
            weight: The client's weight times :func:`weight_scale`.
            ranges: :func:`value_range` of each global tensor; the same for all updates of a round.
            last: No other is expected: the sums need not be gone through once more before they are read.

        Raises:
            UpdateRejected: If an entry is not finite or out of range.
            SumsLost: If the addition itself failed; the sums are good for nothing then.
        """
        for name, value in update.items():
            assert tuple(value.shape) == regions[name].shape(self.shapes[name]), f"{name}: {tuple(value.shape)}"
        check_update(update, ranges)
        self._waiting.append(_Update(update, regions, _odd(weight), ranges))
        num_bytes = 4 * sum(value.numel() for waiting in self._waiting for value in waiting.values.values())
        if last or len(self._waiting) == _AT_ONCE or (len(self._waiting) > 1 and num_bytes >= _WAITING_BYTES):
            self._fold(settles=last)

    def _fold(self, *, settles: bool) -> None:
        """Fold what waits."""
        updates, self._waiting = self._waiting, []
        try:
            self._fold_all(updates, settles)
        except Exception as error:  # e.g. this machine has no memory left for a copy
            raise SumsLost(f"partial sums could not be completed: {type(error).__name__}: {error}") from error

    def _fold_all(self, updates: Sequence[_Update], settles: bool) -> None:
        for name in dict.fromkeys(name for update in updates for name in update.values):
            parts = [(update.values[name], update.regions[name], update.weight) for update in updates if name in update.values]
            self._begin(name, next(update.ranges[name] for update in updates if name in update.values))
            region = parts[0][1]
            target, offset = region.view(self._views[name]), self._offsets[name]
            in_place = region is WHOLE or target.untyped_storage().data_ptr() == self._flat.untyped_storage().data_ptr()
            if (in_place and target.is_contiguous() and all(part[1] == region for part in parts)
                    and all(value.is_contiguous() for value, _, _ in parts)):
                whole = settles and target.numel() == self._views[name].numel()
                self._add_flat(target.view(-1), [(value.view(-1), weight) for value, _, weight in parts], offset, whole)
                if whole:
                    del self._offsets[name]
                continue
            for value, region, weight in parts:
                self._add_part(self._views[name], value, region, weight, offset)

    def _begin(self, name: str, limit: float) -> None:
        """Bring the sums of a tensor to where additions are exact."""
        if name in self._offsets:
            return
        offset = self._offsets[name] = 1.5 * limit
        if name in self._unset:
            self._unset.remove(name)
            self._views[name].fill_(offset)
        else:
            self._views[name].add_(offset)

    def _add_part(self, sums: Tensor, value: Tensor, region: Region, weight: float, offset: float) -> None:
        """Add the values of a part of a tensor, as many at a time as stay in the cache."""
        for entries, add in region.steps(sums, self._chunk):
            some = value[entries]
            fits = some.numel() <= self._chunk
            scratch = self._scratch[:some.numel()] if fits else torch.empty(some.numel(), dtype=torch.float64)
            add(_rounded(scratch.view(some.shape).copy_(some), weight, offset))

    def _add_flat(self, sums: Tensor, parts: Sequence[tuple[Tensor, float]], offset: float, settles: bool) -> None:
        """Add flat values with their weights, chunk by chunk, so that the sums come into the cache once for all of them.

        Args:
            settles: Whether the offset is taken away, too.
        """
        fused = sums.numel() // _LANES * _LANES if _fuses() else 0
        weights = [weight for _, weight in parts]
        tensors = [tensor[:fused] for tensor in (sums, *(value for value, _ in parts))]
        pieces = zip(*(tensor.split(self._chunk) for tensor in tensors), strict=True) if fused > self._chunk else [tensors]
        for target, *values in pieces:
            scratch = self._scratch[:target.numel()]
            for value, weight in zip(values, weights, strict=True):
                target.add_(scratch.copy_(value), alpha=weight)
            if settles:
                target.sub_(offset)
        for start in range(fused, sums.numel(), self._chunk):
            rest = slice(start, min(start + self._chunk, sums.numel()))
            for value, weight in parts:
                scratch = self._scratch[:rest.stop - start].copy_(value[rest])
                sums[rest].add_(_rounded(scratch, weight, offset))
            if settles:
                sums[rest].sub_(offset)


class SumsBuffer:
    """Keeps the memory of a rank's partial sums from round to round."""

    def __init__(self) -> None:
        self._sums: PartialSums | None = None

    def of(self, shapes: Mapping[str, tuple[int, ...]]) -> PartialSums:
        """Zeroed sums of tensors of these shapes; those that were given before are overwritten."""
        if self._sums is None or self._sums.shapes != shapes:
            self._sums = PartialSums(shapes)
        else:
            self._sums.clear()
        return self._sums


def _rounded(value: Tensor, weight: float, offset: float) -> Tensor:
    """``weight · value`` rounded to the grid (float64; ``value`` is overwritten)."""
    return value.mul_(weight).add_(offset).sub_(offset)
