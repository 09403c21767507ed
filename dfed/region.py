"""Regions: the part of one global tensor that a plan refers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WHOLE", "Index", "Region", "Slices", "Whole"]


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


@dataclass(frozen=True)
class Index(Region):
    """Chosen entries along each of the leading dimensions (their outer product); None keeps a dimension whole.

    No entry may be named twice.
    """

    indices: tuple[tuple[int, ...] | None, ...]

    def _grid(self, tensor: Tensor) -> tuple[Tensor, ...]:
        axes = [
            torch.arange(size) if chosen is None else torch.tensor(chosen)
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
        grid = self._grid(target)
        target[grid] = target[grid] + value

    def put_(self, target: Tensor, value: Tensor) -> None:
        target[self._grid(target)] = value
