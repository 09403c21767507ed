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
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfed.memory.storageless import ASKS_DEVICE, StoragelessMode, run

__all__ = [
    "CPU_OVERHEAD_BYTES", "Counter", "Prepared", "StorageWatch", "library_bytes", "predict_course", "predict_levels",
    "predict_peak", "watched",
]

Prepared = TypeVar("Prepared")

CPU_OVERHEAD_BYTES = 12 * 2**20
"""Memory that a client's training may take on a CPU beside its tensors, in any precision, over the tenth of their peak that
is left free besides. Measured: under 3 MiB for two plans in three; see docs/planner.md."""

_CONVOLUTION_BACKWARD, _OUTPUT_MASK = torch.ops.aten.convolution_backward.default, 10
_OF_WEIGHTS = 2.5

# They change what they are given, and allocate nothing. Fake tensors do not know them: they would run on real ones.
_FUSED = {torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adam_, torch.ops.aten._fused_adamw_}

_whole: set[Any] = set()  # operators known not to consist of others


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


class StorageWatch(TorchDispatchMode):
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


def predict_course(prepare: Callable[[], Prepared], work: Callable[[Prepared], object],
                   counter: Counter | None = None) -> list[int]:
    """Bytes that ``work`` would hold in tensors that it allocates itself, at each of its allocations, in order.

    The same work on batches of another size makes the same allocations in the same order, of other sizes.

    Args:
        prepare: Makes what is there before; its tensors are not counted. Runs under the same ``FakeTensorMode``.
        work: Gets what ``prepare`` returned. It must not look at the values of tensors. What it returns is dropped.
        counter: Is told of every operator of ``work``.
    """
    with watched(StorageWatch, counter) as watch:
        prepared = prepare()
        watch.start()
        work(prepared)
    return watch.course


def predict_peak(prepare: Callable[[], Prepared], work: Callable[[Prepared], object]) -> int:
    """Largest number of bytes that ``work`` would hold at once in tensors that it allocates itself.

    Arguments as for :func:`predict_course`.
    """
    return max(predict_course(prepare, work), default=0)


def predict_levels(prepare: Callable[[], Prepared], work: Callable[[Prepared], Iterable[None]]) -> list[int]:
    """Bytes that ``work`` would hold in tensors of its own each time that it yields.

    Arguments as for :func:`predict_course`.
    """
    with watched(StorageWatch) as watch:
        prepared = prepare()
        watch.start()
        return [watch.current_bytes for _ in work(prepared)]


Watch = TypeVar("Watch", bound=StorageWatch)


@contextmanager
def watched(kind: type[Watch], counter: Counter | None = None) -> Iterator[Watch]:
    """A watch of this kind over tensors without storage."""
    collects = gc.isenabled()
    gc.disable()  # tensors go when nothing refers to them, not when a collection happens to run
    try:
        with StoragelessMode() as fakes, kind(fakes, counter) as watch:
            yield watch
    finally:
        if collects:
            gc.enable()
