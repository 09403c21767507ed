"""Operators on tensors without storage, faster than ``FakeTensorMode`` by itself: what it found once is remembered.

A training step on fake tensors runs hundreds of operators, few of which have not been seen before on tensors of these shapes.
``FakeTensorMode`` remembers them, too, but to look one up takes it ten times as long.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

__all__ = ["ASKS_DEVICE", "MOST_KNOWN", "StoragelessMode", "run", "warm_up"]

_LOGGER = logging.getLogger(__name__)
_META = torch.device("meta")
ASKS_DEVICE = torch.ops.prim.device.default
_COPIES = torch.ops.aten.copy_.default
MOST_KNOWN = 100_000
_A = torch.ops.aten
# Operators for which torch's mode comes to the kernel for the meta device as well, by a way ten times as long.
_BY_SHAPE = frozenset({
    _A.view.default, _A._unsafe_view.default, _A.t.default, _A.transpose.int, _A.permute.default, _A.slice.Tensor,
    _A.select.int, _A.unsqueeze.default, _A.expand.default, _A.detach.default, _A.empty.memory_format,
    _A.slice_backward.default, _A.addmm.default, _A.mm.default, _A.bmm.default, _A.relu.default, _A.relu_.default,
    _A.threshold_backward.default, _A.sum.default, _A.sum.dim_IntList, _A.mean.default, _A.mean.dim, _A._log_softmax.default,
    _A._log_softmax_backward_data.default, _A.nll_loss_forward.default, _A.nll_loss_backward.default, _A.clone.default,
    _A.round.default, _A.round_.default, _A.add.Tensor, _A.add_.Tensor, _A.sub.Tensor, _A.sub_.Tensor, _A.mul.Tensor,
    _A.mul_.Tensor, _A.div.Tensor, _A.div_.Tensor, _A.add.Scalar, _A.sub.Scalar, _A.mul.Scalar, _A.div.Scalar,
    _A.pow.Tensor_Scalar, _A.neg.default, _A.abs.default, _A.exp.default, _A.sqrt.default, _A.clamp.default,
    _A.clamp_.default, _A.lerp_.Scalar, _A.addcmul_.default, _A.gt.Scalar, _A.lt.Scalar, _A.where.self, _A.cat.default,
    _A.squeeze.dim, _A.amax.default,
})
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
_UNLIKE = {torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_NOT_BY_SHAPE = ("lift", "resize", "set_", "mkldnn", "as_strided")  # parts of operators' names


class StoragelessMode(FakeTensorMode):
    """Under it tensors have no storage. Modes on top of it run their operators by :func:`run`."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=False)
        self.cache_enabled = False  # it would look for what is not known here either
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def fake(self, bare: Tensor, device: torch.device) -> FakeTensor:
        """A tensor on ``device`` from one on the meta device; as ``FakeTensor`` makes it, which takes five times as long."""
        if device not in self._attributes:
            made = FakeTensor(self, bare, device)
            self._attributes[device] = dict(vars(made))
            return made
        made = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(self._attributes[device])
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, types, args, kwargs or {})


class _Unlike(Exception):
    """A call that cannot be known again by what it was given, or what it returned cannot be made again."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the things that an operator returns.

    Attributes:
        argument: Which of the tensors that it was given this is, or lies in the storage of; None: of none.
        is_same: Whether it is that tensor itself.
        layout: Shape, stride, offset, element type and device of any other tensor.
        value: What it is if it is no tensor.
    """

    argument: int | None = None
    is_same: bool = False
    layout: tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, torch.device] | None = None
    value: Any = None

    def make(self, given: Sequence[Tensor], fakes: StoragelessMode) -> Any:
        """The same from the tensors given now."""
        if self.is_same:
            return given[self.argument]  # type: ignore[index]
        if self.layout is None:
            return self.value
        shape, stride, offset, dtype, device = self.layout
        with torch._C._DisableTorchDispatch():
            if self.argument is None:
                bare = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
            else:
                bare = torch.empty((), dtype=dtype, device=_META)
                bare.set_(given[self.argument].untyped_storage(), offset, shape, stride)
            return fakes.fake(bare, device)


def warm_up() -> None:
    """Have torch load here what it loads for the first operator, for children to find it loaded. Nothing goes backward, which
    would keep forked children from going backward."""
    with StoragelessMode():
        torch.empty(2, 2) @ torch.empty(2, 2)


_Parts = tuple[type | None, list[_Part]]
_known: dict[Hashable, _Parts | None] = {}
_aliases: dict[Any, bool | None] = {}


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], fakes: StoragelessMode) -> tuple[Any, Hashable]:
    """``func(*args, **kwargs)``, by what it returned for arguments like these before.

    Args:
        fakes: The mode whose tensors they are, active and the next to be asked.

    Returns:
        What it returns, and by what the call can be known again; None if it cannot.
    """
    if func is _COPIES and _fits(*args[:2]):
        return args[0], None
    if func.namespace == "profiler":  # marks in a trace, no tensors
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs), None
    given: list[Tensor] = []
    try:
        key = _key(func, args, kwargs, given)
    except _Unlike:
        return func(*args, **kwargs), None
    known = _known.get(key)
    if known is not None:
        return _made(*known, given, fakes), key
    if key in _known:  # and cannot be made again
        return func(*args, **kwargs), None
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    found = _tried(func, args, kwargs, given) if func in _BY_SHAPE else None
    if found is not None:
        _known[key] = found
        return _made(*found, given, fakes), key
    out = func(*args, **kwargs)
    try:
        _known[key] = _parts(out, given) if key == _key(func, args, kwargs, []) else None
    except _Unlike:
        _known[key] = None
    return out, key


def _made(kind: type | None, parts: Sequence[_Part], given: Sequence[Tensor], fakes: StoragelessMode) -> Any:
    return parts[0].make(given, fakes) if kind is None else kind([part.make(given, fakes) for part in parts])


def _tried(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Tensor]) -> _Parts | None:
    """As :func:`_by_shape`; None if nothing comes of it. Then torch's mode is asked, which says what is wrong."""
    try:
        return _by_shape(func, args, kwargs, given)
    except Exception:  # of whatever kind the kernels raise
        _LOGGER.debug("%s cannot be worked out from shapes", func, exc_info=True)
        return None


def _by_shape(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Tensor]) -> _Parts:
    """What one of :data:`_BY_SHAPE` returns, from its own kernel for the meta device."""
    device = given[0].device if given else torch.device(kwargs.get("device") or "cpu")
    if any(tensor.device != device for tensor in given):
        raise _Unlike
    with torch._C._DisableTorchDispatch():
        bare = [torch.empty((), dtype=tensor.dtype, device=_META) for tensor in given]
        for twin, tensor in zip(bare, given, strict=True):
            twin.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        twins = iter(bare)
        args, kwargs = tree_map_only(FakeTensor, lambda _: next(twins), (tuple(args), dict(kwargs)))
        if not given or kwargs.get("device") is not None:
            kwargs["device"] = _META
        return _parts(func(*args, **kwargs), bare, device)


def _fits(into: Any, value: Any) -> bool:
    """Whether one tensor without storage can be copied into the other, and that is all there is to it: torch's mode knows the
    value of some."""
    if not type(into) is type(value) is FakeTensor or into.constant is not None or value.constant is not None:
        return False
    if into._is_zerotensor():
        return False
    return torch.broadcast_shapes(into.shape, value.shape) == into.shape


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: list[Tensor]) -> Hashable:
    """All on which shapes of results depend; appends the tensors among the arguments to ``given``."""
    if func not in _aliases:
        _aliases[func] = _aliasing(func)
    aliases = _aliases[func]
    if aliases is None:
        raise _Unlike
    key: list[Any] = [func, torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    _describe(args, key, given)
    for name, value in kwargs.items():
        key.append(name)
        _describe((value,), key, given)
    if aliases and len(given) > 1:
        storages = [tensor.untyped_storage()._cdata for tensor in given]
        key += map(storages.index, storages)
    return tuple(key)


def _aliasing(func: Any) -> bool | None:
    """Whether results of this operator may lie in its arguments; None if shapes do not tell all about it."""
    if func.namespace != "aten" or not _UNLIKE.isdisjoint(func.tags):
        return None
    if any(part in func.name() for part in _NOT_BY_SHAPE):
        return None
    return any(value.alias_info is not None for value in (*func._schema.arguments, *func._schema.returns))


def _describe(values: Iterable[Any], key: list[Any], given: list[Tensor]) -> None:
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or _is_unusual(value):
                raise _Unlike
            given.append(value)
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device)
        elif kind in _PLAIN:
            key += (kind, value)
        elif isinstance(value, (list, tuple)):
            key += (list, len(value))
            _describe(value, key, given)
        elif kind is torch.Generator:
            key.append(kind)
        else:
            raise _Unlike


def _is_unusual(tensor: Tensor) -> bool:
    """Whether more belongs to a tensor than its layout tells."""
    return tensor.layout is not torch.strided or tensor.dtype.is_complex or tensor.is_neg() or tensor._is_zerotensor()


def _parts(out: Any, given: Sequence[Tensor], device: torch.device | None = None) -> _Parts:
    """What was returned, one by one, and whether that was a tuple or a list; None: it is one thing.

    Args:
        device: That of the results, if it is not their own.
    """
    kind = type(out) if type(out) in (tuple, list) else None
    storages = [tensor.untyped_storage()._cdata for tensor in given]
    fresh: set[int] = set()
    return kind, [_part(one, given, storages, fresh, device) for one in (out if kind else (out,))]


def _part(one: Any, given: Sequence[Tensor], storages: Sequence[int], fresh: set[int], device: torch.device | None) -> _Part:
    if type(one) in _PLAIN:
        return _Part(value=one)
    for number, tensor in enumerate(given):
        if one is tensor:
            return _Part(number, is_same=True)
    is_known = isinstance(one, Tensor) and (type(one) is FakeTensor or device is not None)
    if not is_known or one.requires_grad or _is_unusual(one):
        raise _Unlike
    if getattr(one, "constant", None) is not None:
        raise _Unlike
    shape, stride, storage = tuple(one.shape), one.stride(), one.untyped_storage()
    layout = (shape, stride, one.storage_offset(), one.dtype, device or one.device)
    if storage._cdata in storages:
        return _Part(storages.index(storage._cdata), layout=layout)
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    num_bytes = extent * one.dtype.itemsize if math.prod(shape) else 0
    if storage.nbytes() != num_bytes or layout[2] or storage._cdata in fresh:
        raise _Unlike
    fresh.add(storage._cdata)
    return _Part(layout=layout)
