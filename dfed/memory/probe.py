"""Predictions for batches of every size at once, from work on one batch of millions of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dfed.memory.predict import Counter, Prepared, StorageWatch, watched
from dfed.memory.storageless import StoragelessMode

__all__ = ["PROBE_BATCH", "Level", "NotProportional", "at_most", "predict_lines"]

PROBE_BATCH = 2**24 + 43
"""Batch size for :func:`predict_lines`: a prime, so that what is a multiple of it comes from the batch."""

_LEAST_SHARE = 256  # a length between a 256th of the batch and the batch may be a part of it, or the most that is taken of it
_MOST_OPERATORS = 30_000  # more than any step has, unless it goes through the samples one by one
_DIGIT = 64
"""Bits for each but the last of the numbers that :class:`_ProbeWatch` keeps in one."""


class NotProportional(Exception):
    """Work of which one prediction cannot tell how its memory grows with the batch size."""


class Level(NamedTuple):
    """Bytes at one allocation, for batches of every size.

    Attributes:
        fixed: Those that do not depend on the batch.
        per_sample, per_pair: For each sample, and for each pair of samples, such as those of a matrix of all products.
        capped, most: For each sample, but no more than ``most`` in all; see :func:`at_most`.
    """

    fixed: int
    per_sample: int
    per_pair: int
    capped: int = 0
    most: int = 0

    def at(self, batch_size: int) -> int:
        """Bytes at this batch size."""
        bent = (self.per_sample + self.per_pair * batch_size) * batch_size
        return self.fixed + bent + min(self.capped * batch_size, self.most)


class _ProbeWatch(StorageWatch):
    """Adds up bytes of work on a batch of :data:`PROBE_BATCH`, those that do not depend on the batch apart from those that do.

    A sum is one integer: the bytes that do not, 2 ** 64 times the bytes per sample of those that do, 2 ** 128 times the bytes
    per pair of samples, and 2 ** 192 times the bytes per sample of a storage that :func:`at_most` made.

    Attributes:
        most: Bytes of such a storage at its largest.

    Raises:
        NotProportional: Where a storage is none of these, and before what would go through the samples one by one.
    """

    def __init__(self, fakes: StoragelessMode, counter: Counter | None = None) -> None:
        super().__init__(fakes, counter)
        self._num_operators = 0
        self._share: Fraction | None = None
        self._capped: set[int] = set()  # handles of storages
        self.most = 0

    @contextmanager
    def capping(self, share: Fraction) -> Iterator[None]:
        """Inside, storages are made of which a batch of this size would have ``share`` as many bytes if nothing capped them."""
        self._share = share
        try:
            yield
        finally:
            self._share = None

    def levels(self) -> list[Level]:
        """The course, taken apart."""
        mask, found = (1 << _DIGIT) - 1, []
        for total in self.course:
            fixed, per_sample, per_pair, capped = (total >> digit * _DIGIT & mask for digit in range(4))
            found.append(Level(fixed, per_sample, per_pair, capped, self.most if capped else 0))
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a question; torch ends the process if it is answered with an exception
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._num_operators += 1
        if self._num_operators > _MOST_OPERATORS:
            raise NotProportional(f"more than {_MOST_OPERATORS} operators")
        returns = func._schema.returns
        if len(returns) == 1 and returns[0].type.kind() == "ListType" and _largest_extent(args) >= PROBE_BATCH // _LEAST_SHARE:
            raise NotProportional(f"{func} may go through the samples one by one")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._capped:
            super()._add(tensor, storage)
        elif storage.nbytes() != self.most:
            raise NotProportional(f"{self.most} bytes at most became {storage.nbytes()}")

    def _drop(self, handle: int) -> None:
        self._capped.discard(handle)
        super()._drop(handle)

    def _size(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> int:
        size, power = storage.nbytes(), 0
        if self._share is not None:
            self._capped.add(storage._cdata)
            return self._per_sample(size, self._share)
        while size and size % PROBE_BATCH == 0:
            size, power = size // PROBE_BATCH, power + 1
        least = PROBE_BATCH // _LEAST_SHARE
        in_parts = storage.nbytes() >= least and any(_without_batch(extent) >= least for extent in tensor.shape)
        if in_parts or power > 2:
            raise NotProportional(f"{storage.nbytes()} bytes of shape {tuple(tensor.shape)} for {PROBE_BATCH} samples")
        return size << _DIGIT * power

    def _per_sample(self, size: int, share: Fraction) -> int:
        per_sample = size * share / PROBE_BATCH
        alone = not self.current_bytes >> 3 * _DIGIT and self.most in (0, size)
        if per_sample.denominator > 1 or per_sample.numerator % PROBE_BATCH == 0 or not alone:
            raise NotProportional(f"{size} bytes at most, of {float(size * share):g} for {PROBE_BATCH} samples")
        self.most = size
        return per_sample.numerator << 3 * _DIGIT


def _without_batch(extent: int) -> int:
    """What is left of an extent when the batch size is divided out."""
    while extent and extent % PROBE_BATCH == 0:
        extent //= PROBE_BATCH
    return extent


def _largest_extent(args: Iterable[Any]) -> int:
    return max((extent for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) for extent in leaf.shape), default=0)


_probe: ContextVar[_ProbeWatch | None] = ContextVar("_probe", default=None)


def at_most(size: int, most: int, make: Callable[[int], Tensor]) -> Tensor:
    """``make`` of the smaller of two sizes, where one depends on the batch and the other does not: :func:`predict_lines` then
    knows what it comes to for other batches. No second one may be made as long as the first is there."""
    probe = _probe.get()
    if probe is None or size <= most:
        return make(min(size, most))
    with probe.capping(Fraction(size, most)):
        return make(most)


def predict_lines(prepare: Callable[[], Prepared], work: Callable[[Prepared], object],
                  counter: Counter | None = None) -> list[Level]:
    """As :func:`predict_course`, for batches of every size at once.

    Found from one prediction, at a batch size that is a large prime: a storage whose bytes are a multiple of it comes from the
    batch, any other does not. That holds for work that does the same at every batch size. Where fewer than 65,536 samples are
    worked off at once, or large batches in another way than small ones, the result is not about small ones, and nothing tells.

    Args:
        prepare: As for :func:`predict_course`.
        work: Likewise, with a batch of :data:`PROBE_BATCH` samples.
        counter: Likewise.

    Raises:
        NotProportional: If an allocation cannot be told by a :class:`Level`, or may be a part of one.
        RuntimeError: If torch cannot count the bytes of something so large.
    """
    with watched(_ProbeWatch, counter) as watch:
        prepared = prepare()
        watch.start()
        token = _probe.set(watch)
        try:
            work(prepared)
        finally:
            _probe.reset(token)
    return watch.levels()
