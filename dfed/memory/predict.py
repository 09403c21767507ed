"""Predicted peaks: what a stretch of work would allocate, found by running it on tensors without storage.

The work runs under ``FakeTensorMode``: every operator computes shapes, nothing is allocated. A dispatch mode watches the
storages that come and go; their largest sum is the peak. What libraries take beside tensors (generated kernels, packed
weights, pages of code touched for the first time) is not seen: on the CPU :data:`CPU_OVERHEAD_BYTES` stands for it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dfed.memory.storageless import ASKS_DEVICE, OperatorMode, StoragelessMode, run

__all__ = [
    "CPU_OVERHEAD_BYTES", "PROBE_BATCH", "Counter", "Level", "NotProportional", "at_most", "predict_course", "predict_levels",
    "predict_lines", "predict_peak",
]

Prepared = TypeVar("Prepared")

CPU_OVERHEAD_BYTES = 12 * 2**20
"""Memory that a client's training may take on a CPU beside its tensors, in any precision, over the tenth of their peak that
is left free besides. Measured: under 3 MiB for two plans in three; see docs/planner.md."""

PROBE_BATCH = 2**24 + 43
"""Batch size for :func:`predict_lines`: a prime, so that what is a multiple of it comes from the batch."""

_CONVOLUTION_BACKWARD, _OUTPUT_MASK = torch.ops.aten.convolution_backward.default, 10
_OF_WEIGHTS = 2.5
_LEAST_SHARE = 256  # a length between a 256th of the batch and the batch may be a part of it, or the most that is taken of it
_MOST_OPERATORS = 30_000  # more than any step has, unless it goes through the samples one by one


class NotProportional(Exception):
    """Work of which one prediction cannot tell how its memory grows with the batch size."""


# They change what they are given, and allocate nothing. Fake tensors do not know them: they would run on real ones.
_FUSED = {torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adam_, torch.ops.aten._fused_adamw_}


_whole: set[Any] = set()  # operators known not to consist of others


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


class Counter(Protocol):
    """Adds up something over operators."""

    def count(self, func: Any, args: Any, kwargs: Any, out: Any, key: Hashable) -> None:
        """One operator, what it was given and returned; calls of the same ``key`` are alike, unless it is None."""


def library_bytes(func: Any, args: Any) -> int:
    """Bytes that a library takes beside tensors while this operator runs, as far as they are many and known.

    Where a map is smaller than the kernel, oneDNN's gradient of a convolution's weights takes four times their bytes, of which
    it touches two (measured with AVX2, whatever the batch). Two and a half are counted: near what is measured of a peak, and
    with the tenth and the constant that a budget has above it, enough.
    """
    if func is not _CONVOLUTION_BACKWARD or len(args) < _OUTPUT_MASK + 1:
        return 0
    x, weight, dilation, is_transposed, wanted = args[1], args[2], args[6], args[7], args[_OUTPUT_MASK]
    if is_transposed or not wanted[1]:
        return 0
    reach = [step * (extent - 1) + 1 for step, extent in zip(dilation, weight.shape[2:], strict=True)]
    is_smaller = any(extent < kernel for extent, kernel in zip(x.shape[2:], reach, strict=True))
    return int(_OF_WEIGHTS * weight.numel() * weight.element_size()) if is_smaller else 0


class _StorageWatch(OperatorMode):
    """Adds up the bytes of all storages that came to life since :meth:`start`; writes the sum down as each comes.

    Args:
        fakes: The mode whose tensors it watches.
        counter: Is told of every operator.
    """

    def __init__(self, fakes: StoragelessMode, counter: Counter | None = None) -> None:
        super().__init__()
        self._fakes, self._counter, self._started = fakes, counter, False
        self.current_bytes = 0
        self.course: list[int] = []
        self._alive: dict[int, int] = {}
        self._ends: dict[int, weakref.ref[Any]] = {}
        self._given: set[int] = set()

    def start(self) -> None:
        """Count from here: storages that are there already count for nothing, whatever views of them are made."""
        self._given = set(self._alive)
        self._alive = dict.fromkeys(self._alive, 0)
        self.current_bytes, self.course, self._started = 0, [], True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASKS_DEVICE:
            return args[0].device
        if func.overloadpacket in _FUSED:
            return None
        kwargs = kwargs or {}
        if func not in _whole:
            with self:
                out = func.decompose(*args, **kwargs)  # what consists of others is looked at as these
            if out is not NotImplemented:
                return out
            _whole.add(func)
        out, key = run(func, args, kwargs, self._fakes)
        if self._started and self._counter is not None:
            self._counter.count(func, args, kwargs, out, key)
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, leaf.untyped_storage())
        beside = library_bytes(func, args)
        if beside:
            self.course.append(self.current_bytes + beside)
        return out

    def _size(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> int:
        """What counts of a storage, of which ``tensor`` is the first view seen."""
        return storage.nbytes()

    def _add(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
        handle = storage._cdata
        if handle in self._given:
            return
        known, size = self._alive.get(handle), self._size(tensor, storage)
        if known == size:
            return
        if known is None:
            self._ends[handle] = weakref.ref(storage, lambda _: self._drop(handle))
        self._alive[handle] = size
        self.current_bytes += size - (known or 0)
        self.course.append(self.current_bytes)

    def _drop(self, handle: int) -> None:
        self.current_bytes -= self._alive.pop(handle)
        del self._ends[handle]
        self._given.discard(handle)


_DIGIT = 64
"""Bits for each but the last of the numbers that :class:`_ProbeWatch` keeps in one."""


class _ProbeWatch(_StorageWatch):
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

    def _size(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> int:
        size, power = storage.nbytes(), 0
        if self._share is not None:
            return self._capped(size, self._share)
        while size and size % PROBE_BATCH == 0:
            size, power = size // PROBE_BATCH, power + 1
        least = PROBE_BATCH // _LEAST_SHARE
        in_parts = storage.nbytes() >= least and any(_without_batch(extent) >= least for extent in tensor.shape)
        if in_parts or power > 2:
            raise NotProportional(f"{storage.nbytes()} bytes of shape {tuple(tensor.shape)} for {PROBE_BATCH} samples")
        return size << _DIGIT * power


    def _capped(self, size: int, share: Fraction) -> int:
        per_sample = size * share / PROBE_BATCH
        alone = not self.current_bytes >> 3 * _DIGIT and self.most in (0, size)
        if per_sample.denominator > 1 or not alone:
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


_probe: _ProbeWatch | None = None


def at_most(size: int, most: int, make: Callable[[int], Tensor]) -> Tensor:
    """``make`` of the smaller of two sizes, where one depends on the batch and the other does not: :func:`predict_lines` then
    knows what it comes to for other batches. No second one may be made as long as the first is there."""
    if _probe is None or size <= most:
        return make(min(size, most))
    with _probe.capping(Fraction(size, most)):
        return make(most)


def predict_course(prepare: Callable[[], Prepared], work: Callable[[Prepared], object],
                   counter: Counter | None = None) -> list[int]:
    """Bytes that ``work`` would hold in tensors that it allocates itself, at each of its allocations, in order.

    The same work on batches of another size makes the same allocations in the same order, of other sizes.

    Args:
        prepare: Makes what is there before; its tensors are not counted. Runs under the same ``FakeTensorMode``.
        work: Gets what ``prepare`` returned. It must not look at the values of tensors. What it returns is dropped.
        counter: Is told of every operator of ``work``.
    """
    with _watched(_StorageWatch, counter) as watch:
        prepared = prepare()
        watch.start()
        work(prepared)
    return watch.course


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
    global _probe
    with _watched(_ProbeWatch, counter) as watch:
        assert isinstance(watch, _ProbeWatch)
        prepared = prepare()
        watch.start()
        before, _probe = _probe, watch
        try:
            work(prepared)
        finally:
            _probe = before
    return watch.levels()


def predict_peak(prepare: Callable[[], Prepared], work: Callable[[Prepared], object]) -> int:
    """Largest number of bytes that ``work`` would hold at once in tensors that it allocates itself.

    Arguments as for :func:`predict_course`.
    """
    return max(predict_course(prepare, work), default=0)


def predict_levels(prepare: Callable[[], Prepared], work: Callable[[Prepared], Iterable[None]]) -> list[int]:
    """Bytes that ``work`` would hold in tensors of its own each time that it yields.

    Arguments as for :func:`predict_course`.
    """
    with _watched(_StorageWatch) as watch:
        prepared = prepare()
        watch.start()
        return [watch.current_bytes for _ in work(prepared)]


@contextmanager
def _watched(kind: type[_StorageWatch], counter: Counter | None = None) -> Iterator[_StorageWatch]:
    collects = gc.isenabled()
    gc.disable()  # tensors go when nothing refers to them, not when a collection happens to run
    try:
        with StoragelessMode() as fakes, kind(fakes, counter) as watch:
            yield watch
    finally:
        if collects:
            gc.enable()
