"""What a recording of one unit needs: who holds which storage, and stand-ins for the units before and behind."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfed.memory.predict import library_bytes
from dfed.memory.storageless import ASKS_DEVICE, StoragelessMode, run

__all__ = ["Before", "Behind", "Value", "Watch"]


@dataclass(frozen=True)
class Value:
    """A tensor between two units: all of it on which their memory depends."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Value:
        """That of a tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad)

    @property
    def num_bytes(self) -> int:
        """What its entries take, without gaps between them."""
        return math.prod(self.shape) * self.dtype.itemsize

    def gradient(self) -> Value:
        """A gradient for it, as most layers make it: the last axis first."""
        stride = tuple(math.prod(self.shape[axis + 1:]) for axis in range(len(self.shape)))
        return Value(self.shape, stride, self.dtype, False)

    def make(self) -> Tensor:
        """A tensor like it, which asks for no gradient."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


class Watch(TorchDispatchMode):
    """The bytes in storages that came to life since :meth:`start`, but for those that are told apart by name.

    Args:
        given: Tensors that are there before and stay.
        fakes: The mode whose tensors it watches.
    """

    def __init__(self, given: Iterable[Tensor], fakes: StoragelessMode):
        super().__init__()
        self._fakes = fakes
        self._alive: dict[int, int] = {}
        self._named: dict[int, str] = {}
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self.own = 0
        self.course: list[tuple[int, frozenset[str]]] = []

    def start(self) -> None:
        """Count from here; what is there already counts for nothing."""
        self._given, self.own, self.course = {*self._given, *self._alive}, 0, []

    def mark(self) -> None:
        """Begin the course anew; what is there goes on counting."""
        self.course = [(self.own, frozenset(self._named.values()))]

    def tell_apart(self, tensor: Tensor, name: str) -> None:
        """Follow the storage of ``tensor`` under this name, and do not count it."""
        handle = tensor.untyped_storage()._cdata
        if handle not in self._given:
            self.own -= self._alive[handle]
        self._named[handle] = name

    def holds(self, name: str) -> bool:
        """Whether the storage of this name is alive."""
        return name in self._named.values()

    def is_same(self, tensor: Tensor, name: str) -> bool:
        """Whether ``tensor`` lies in the storage of this name."""
        return self._named.get(tensor.untyped_storage()._cdata) == name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASKS_DEVICE:
            return args[0].device
        out, _ = run(func, args, kwargs or {}, self._fakes)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        beside = library_bytes(func, args)
        if beside:
            self.course.append((self.own + beside, frozenset(self._named.values())))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        handle, size = storage._cdata, storage.nbytes()
        known = self._alive.get(handle)
        if handle in self._given or known == size:
            return
        if known is None:
            weakref.finalize(storage, self._drop, handle)
        self._alive[handle] = size
        if handle not in self._named:
            self.own += size - (known or 0)
            self.course.append((self.own, frozenset(self._named.values())))

    def _drop(self, handle: int) -> None:
        size = self._alive.pop(handle)
        if handle not in self._given and handle not in self._named:
            self.own -= size
        self._given.discard(handle)
        self._named.pop(handle, None)


class Before(torch.autograd.Function):
    """Stands for the unit before: hands on a tensor, and looks at the gradient that comes back for it."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Value, look: Callable[[Tensor], None]) -> Tensor:
        ctx.look = look
        return value.make()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.look(gradient)
        return None, None, None


class Behind(torch.autograd.Function):
    """Stands for the unit behind: keeps nothing, and passes a fresh gradient back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Value, look: Callable[[Tensor], None]) -> Tensor:
        ctx.value, ctx.look = gradient, look
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, scalar: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient = ctx.value.make()
        ctx.look(gradient)
        return gradient, None, None
