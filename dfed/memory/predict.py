"""Predicted peaks: what a stretch of work would allocate, found by running it on tensors without storage.

The work runs under ``FakeTensorMode``: every operator computes shapes, nothing is allocated. A dispatch mode watches the
storages that come and go; their largest sum is the peak. What libraries take beside tensors (generated kernels, packed
weights, pages of code touched for the first time) is not seen: on the CPU :data:`CPU_OVERHEAD_BYTES` stands for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CPU_OVERHEAD_BYTES", "predict_peak"]

Prepared = TypeVar("Prepared")

CPU_OVERHEAD_BYTES = 12 * 2**20
"""Memory that a client's training may take on a CPU beside its tensors. Measured: under 1 MiB as a rule, up to 10 MiB the first
time that a rank meets a kernel."""


class _StorageWatch(TorchDispatchMode):
    """Adds up the bytes of all storages that came to life since :meth:`start`; remembers the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.current_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}
        self._given: set[int] = set()

    def start(self) -> None:
        """Count from here: storages that are there already count for nothing, whatever views of them are made."""
        self._given = set(self._alive)
        self._alive = dict.fromkeys(self._alive, 0)
        self.current_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _drop(self, handle: int) -> None:
        self.current_bytes -= self._alive.pop(handle)
        self._given.discard(handle)


def predict_peak(prepare: Callable[[], Prepared], work: Callable[[Prepared], object]) -> int:
    """Largest number of bytes that ``work`` would hold at once in tensors that it allocates itself.

    Args:
        prepare: Makes what is there before; its tensors are not counted. Runs under the same ``FakeTensorMode``.
        work: Gets what ``prepare`` returned. It must not look at the values of tensors. What it returns is dropped.
    """
    watch = _StorageWatch()
    with FakeTensorMode(allow_non_fake_inputs=False), watch:
        prepared = prepare()
        watch.start()
        work(prepared)
    return watch.peak_bytes
