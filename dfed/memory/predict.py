"""Predicted peaks: what a stretch of work would allocate, found by running it on tensors without storage.

The work runs under ``FakeTensorMode``: every operator computes shapes, nothing is allocated. A dispatch mode watches the
storages that come and go; their largest sum is the peak. What libraries take beside tensors (generated kernels, packed
weights, pages of code touched for the first time) is not seen: on the CPU :data:`CPU_OVERHEAD_BYTES` stands for it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CPU_OVERHEAD_BYTES", "predict_course", "predict_levels", "predict_peak"]

Prepared = TypeVar("Prepared")

CPU_OVERHEAD_BYTES = 12 * 2**20
"""Memory that a client's training may take on a CPU beside its tensors, in any precision, over the tenth of their peak that
is left free besides. Measured: under 3 MiB for two plans in three; see docs/planner.md."""


# They change what they are given, and allocate nothing. Fake tensors do not know them: they would run on real ones.
_FUSED = {torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adam_, torch.ops.aten._fused_adamw_}


class _StorageWatch(TorchDispatchMode):
    """Adds up the bytes of all storages that came to life since :meth:`start`; writes the sum down as each comes."""

    def __init__(self) -> None:
        super().__init__()
        self.current_bytes = 0
        self.course: list[int] = []
        self._alive: dict[int, int] = {}
        self._given: set[int] = set()

    def start(self) -> None:
        """Count from here: storages that are there already count for nothing, whatever views of them are made."""
        self._given = set(self._alive)
        self._alive = dict.fromkeys(self._alive, 0)
        self.current_bytes, self.course = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _FUSED:
            return None
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        handle = storage._cdata
        size = storage.nbytes()
        known = self._alive.get(handle)
        if known == size or handle in self._given:
            return
        if known is None:
            weakref.finalize(storage, self._drop, handle)
        self._alive[handle] = size
        self.current_bytes += size - (known or 0)
        self.course.append(self.current_bytes)

    def _drop(self, handle: int) -> None:
        self.current_bytes -= self._alive.pop(handle)
        self._given.discard(handle)


def predict_course(prepare: Callable[[], Prepared], work: Callable[[Prepared], object]) -> list[int]:
    """Bytes that ``work`` would hold in tensors that it allocates itself, at each of its allocations, in order.

    The same work on batches of another size makes the same allocations in the same order, of other sizes.

    Args:
        prepare: Makes what is there before; its tensors are not counted. Runs under the same ``FakeTensorMode``.
        work: Gets what ``prepare`` returned. It must not look at the values of tensors. What it returns is dropped.
    """
    watch = _StorageWatch()
    with _watched(watch):
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
    watch = _StorageWatch()
    with _watched(watch):
        prepared = prepare()
        watch.start()
        return [watch.current_bytes for _ in work(prepared)]


@contextmanager
def _watched(watch: _StorageWatch) -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()  # tensors go when nothing refers to them, not when a collection happens to run
    try:
        with FakeTensorMode(allow_non_fake_inputs=False), watch:
            yield
    finally:
        if collects:
            gc.enable()
