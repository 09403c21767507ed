"""Regions: the part of one global tensor that a plan refers to."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["WHOLE", "Index", "Region", "Segments", "Slices", "Whole", "region_of"]

_FEW_BOXES, _MOST_BOXES = 9, 64  # nine: three segments of queries, keys and values by as many heads
_SMALL_BOX = 4096  # entries; many smaller ones take longer than an index
_CACHED = 32_768  # places and values of so many entries stay in a core's second-level cache


Step = tuple[tuple[slice, ...], Callable[[Tensor], object]]


class Region:
    """Part of a global tensor. Subclasses are hashable values: equal regions of one tensor name the same entries."""

    def view(self, tensor: Tensor) -> Tensor:
        """The entries of ``tensor`` in this region; a view wherever the region is a slice, else a copy."""
        raise AssertionError("abstract")

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        """Shape of the region inside a tensor of shape ``full``; raises ValueError where it does not fit."""
        raise AssertionError("abstract")

    def add_(self, target: Tensor, value: Tensor | float) -> None:
        """Add ``value`` (of the region's shape, or a scalar) to these entries of ``target``, in place."""
        raise AssertionError("abstract")

    def put_(self, target: Tensor, value: Tensor) -> None:
        """Set these entries of ``target`` to ``value`` (of the region's shape), in place."""
        raise AssertionError("abstract")

    def axes(self) -> list[list[slice] | Tensor | None]:
        """Which places it takes along each leading dimension: slices, or int64; None: all. It is their outer product."""
        raise AssertionError("abstract")

    def steps(self, target: Tensor, most: int) -> Iterator[Step]:
        """The additions that make up :meth:`add_`, each of at most ``most`` entries (or one row).

        Yields:
            Which entries of the region's value, and a function that adds them to ``target``.
        """
        raise AssertionError("abstract")


def _row_steps(onto: Tensor, inner: tuple[slice, ...], most: int) -> Iterator[Step]:
    """Some rows at a time of ``onto``, a view of the target that belongs to the entries ``inner`` of the value."""
    if onto.ndim == 0 or onto.numel() <= most:
        yield inner, onto.add_
        return
    count = max(1, most * len(onto) // onto.numel())
    first = inner[0].start if inner else 0
    for start in range(0, len(onto), count):
        stop = min(start + count, len(onto))
        yield (slice(first + start, first + stop), *inner[1:]), onto[start:stop].add_


@dataclass(frozen=True)
class Whole(Region):
    """All of the tensor."""

    def view(self, tensor: Tensor) -> Tensor:
        return tensor

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        return tuple(full)

    def add_(self, target: Tensor, value: Tensor | float) -> None:
        target.add_(value)

    def put_(self, target: Tensor, value: Tensor) -> None:
        target.copy_(value)

    def axes(self) -> list[list[slice] | Tensor | None]:
        return []

    def steps(self, target: Tensor, most: int) -> Iterator[Step]:
        yield from _row_steps(target, (), most)


WHOLE = Whole()


@dataclass(frozen=True)
class Slices(Region):
    """A box: ``bounds[d] = (start, stop)`` along each of the leading dimensions, the others whole."""

    bounds: tuple[tuple[int, int], ...]

    def view(self, tensor: Tensor) -> Tensor:
        return tensor[tuple(slice(start, stop) for start, stop in self.bounds)]

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        if len(self.bounds) > len(full):
            raise ValueError(f"a region of {len(self.bounds)} dimensions does not fit a tensor of shape {tuple(full)}.")
        for (start, stop), size in zip(self.bounds, full, strict=False):
            if not 0 <= start < stop <= size:
                raise ValueError(f"region bounds must lie in 0 … {size}, but are {start} … {stop}.")
        return (*(stop - start for start, stop in self.bounds), *full[len(self.bounds):])

    def add_(self, target: Tensor, value: Tensor | float) -> None:
        self.view(target).add_(value)

    def put_(self, target: Tensor, value: Tensor) -> None:
        self.view(target).copy_(value)

    def axes(self) -> list[list[slice] | Tensor | None]:
        return [[slice(start, stop)] for start, stop in self.bounds]

    def steps(self, target: Tensor, most: int) -> Iterator[Step]:
        yield from _row_steps(self.view(target), (), most)


@dataclass(frozen=True)
class Segments(Region):
    """Runs of entries along each of the leading dimensions (their outer product), the others whole.

    ``runs[d]`` are ``(start, stop)`` in ascending order, apart from one another: what is left of channels that were
    concatenated, or of a window that wraps around.
    """

    runs: tuple[tuple[tuple[int, int], ...], ...]

    def view(self, tensor: Tensor) -> Tensor:
        for d, runs in enumerate(self.runs):
            parts = [tensor.narrow(d, start, stop - start) for start, stop in runs]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=d)
        return tensor

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        if len(self.runs) > len(full):
            raise ValueError(f"a region of {len(self.runs)} dimensions does not fit a tensor of shape {tuple(full)}.")
        sizes = []
        for runs, size in zip(self.runs, full, strict=False):
            edges = [edge for run in runs for edge in run]
            apart = all(a < b for a, b in itertools.pairwise(edges))
            if not runs or not apart or edges[0] < 0 or edges[-1] > size:
                raise ValueError(f"region runs must be ascending, apart, and lie in 0 … {size}, but are {runs}.")
            sizes.append(sum(stop - start for start, stop in runs))
        return (*sizes, *full[len(self.runs):])

    def axes(self) -> list[list[slice] | Tensor | None]:
        return [[slice(start, stop) for start, stop in runs] for runs in self.runs]

    def steps(self, target: Tensor, most: int) -> Iterator[Step]:
        for outer, inner in self._boxes():
            yield from _row_steps(target[outer], inner, most)

    def _boxes(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Each box: where it lies in the tensor, and where in the region."""
        axes = []
        for runs in self.runs:
            ends = list(itertools.accumulate(stop - start for start, stop in runs))
            axes.append([
                (slice(start, stop), slice(end - (stop - start), end))
                for (start, stop), end in zip(runs, ends, strict=True)
            ])
        for box in itertools.product(*axes):
            yield tuple(outer for outer, _ in box), tuple(inner for _, inner in box)

    def add_(self, target: Tensor, value: Tensor | float) -> None:
        for outer, inner in self._boxes():
            target[outer].add_(value[inner] if isinstance(value, Tensor) else value)

    def put_(self, target: Tensor, value: Tensor) -> None:
        for outer, inner in self._boxes():
            target[outer].copy_(value[inner])


@dataclass(frozen=True)
class Index(Region):
    """Chosen entries along each of the leading dimensions (their outer product); None keeps a dimension whole.

    No entry may be named twice.
    """

    indices: tuple[tuple[int, ...] | None, ...]

    def _grid(self, tensor: Tensor) -> tuple[Tensor, ...]:
        axes = [
            torch.arange(size) if chosen is None else _places(chosen)
            for chosen, size in zip(self.indices, tensor.shape, strict=False)
        ]
        return tuple(
            axis.to(tensor.device).reshape([-1 if i == d else 1 for i in range(len(axes))]) for d, axis in enumerate(axes)
        )

    def view(self, tensor: Tensor) -> Tensor:
        return tensor[self._grid(tensor)]

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        if len(self.indices) > len(full):
            raise ValueError(f"a region of {len(self.indices)} dimensions does not fit a tensor of shape {tuple(full)}.")
        sizes = []
        for chosen, size in zip(self.indices, full, strict=False):
            if chosen is None:
                sizes.append(size)
                continue
            if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= size:
                raise ValueError(f"region indices must be distinct, 0 … {size - 1}, and at least one, but are {chosen}.")
            sizes.append(len(chosen))
        return (*sizes, *full[len(self.indices):])

    def add_(self, target: Tensor, value: Tensor | float) -> None:
        for entries, add in self.steps(target, _CACHED):
            add(value[entries] if isinstance(value, Tensor) else target.new_tensor(value))

    def steps(self, target: Tensor, most: int) -> Iterator[Step]:
        if not self.indices:
            yield (), target.add_
            return
        if not target.is_contiguous():
            grid = self._grid(target)
            yield (), lambda value: target.index_put_(grid, target[grid] + value)
            return
        axes = [axis.reshape(-1) for axis in self._grid(target)]
        trailing = math.prod(target.shape[len(axes):])
        rows, inner = target.view(-1, trailing), torch.zeros(1, dtype=torch.int64, device=target.device)
        strides = [stride // trailing for stride in target.stride()[:len(axes)]]
        for axis, stride in zip(axes[1:], strides[1:], strict=True):
            inner = (inner[:, None] + axis * stride).reshape(-1)
        count = max(1, most // (len(inner) * trailing))
        for start in range(0, len(axes[0]), count):
            places = (axes[0][start:start + count, None] * strides[0] + inner).reshape(-1)
            yield (slice(start, start + count),), functools.partial(_add_rows, rows, places)

    def axes(self) -> list[list[slice] | Tensor | None]:
        return [None if chosen is None else _places(chosen) for chosen in self.indices]

    def put_(self, target: Tensor, value: Tensor) -> None:
        target[self._grid(target)] = value


@functools.lru_cache(maxsize=4096)
def _places(chosen: tuple[int, ...]) -> Tensor:
    """int64, on the CPU; not to be changed. A model's tensors share the few that there are."""
    return torch.tensor(chosen)


def _add_rows(rows: Tensor, places: Tensor, value: Tensor) -> None:
    """Add ``value`` (as many entries as these rows have, or one) to distinct rows."""
    shape = (len(places), rows.shape[1])
    value = value.reshape(shape) if value.numel() == math.prod(shape) else value.expand(shape)
    if rows.shape[1] == 1:
        rows.view(-1).scatter_add_(0, places, value.reshape(-1))  # three times as fast as index_add_
    else:
        rows.index_put_((places,), value, accumulate=True)


def region_of(axes: Sequence[np.ndarray | None], shape: Sequence[int]) -> Region:
    """The cheapest region that holds ``axes[d]`` (ascending, distinct; None: all) along each leading dimension.

    Whole where it can be, else a box, else boxes if they are few or large, else an index.
    """
    runs = [((0, size),) if axis is None else _runs(axis) for axis, size in zip(axes, shape, strict=False)]
    while runs and runs[-1] == ((0, shape[len(runs) - 1]),):
        runs.pop()
    if not runs:
        return WHOLE
    num_boxes = math.prod(len(parts) for parts in runs)
    if num_boxes == 1:
        return Slices(tuple(parts[0] for parts in runs))
    some = Segments(tuple(runs))
    num_entries = math.prod(some.shape(shape))
    if num_boxes <= max(_FEW_BOXES, min(_MOST_BOXES, num_entries // _SMALL_BOX)):
        return some
    return Index(tuple(None if axis is None else tuple(axis.tolist()) for axis in axes[:len(runs)]))


def _runs(axis: np.ndarray) -> tuple[tuple[int, int], ...]:
    """``axis`` as runs of consecutive numbers, ``(start, stop)`` each."""
    breaks = np.flatnonzero(np.diff(axis) != 1) + 1
    starts, stops = axis[[0, *breaks]], axis[[*(breaks - 1), -1]] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))
