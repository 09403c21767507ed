"""A sub-model that is given storage, used, and emptied again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["Skeleton"]


@runtime_checkable
class _Taker(Protocol):
    """A module that makes what it holds from the values that came down."""

    def take(self, values: Mapping[str, Tensor], prefix: str, device: torch.device) -> None: ...

    def release(self) -> None: ...


class Skeleton:
    """A sub-model without storage that can be given storage, trained, and emptied again, client after client.

    A module that has the methods ``take(values, prefix, device)`` and ``release()`` (see :class:`dfed.blocks.quantised.Frozen`)
    makes what it holds from the values by itself, and is asked to let go of it again.

    Args:
        model: On the meta device, as :meth:`Strategy.build` made it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._takers = {prefix: module for prefix, module in model.named_modules() if isinstance(module, _Taker)}
        self._slots = [
            (table, name, f"{prefix}.{name}" if prefix else name, tensor, name not in module._non_persistent_buffers_set)
            for prefix, module in model.named_modules() if prefix not in self._takers
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self._attributes = set(vars(model))
        self._structure = _structure(model)

    def load(self, values: Mapping[str, Tensor], device: torch.device) -> None:
        """Give every parameter and buffer storage of its own on ``device``.

        Floating-point tensors take a copy of ``values[name]``; counters, which never travel, start at zero. Each tensor is
        allocated by itself, so that kernels see the same alignment whatever it was copied from.

        Raises:
            KeyError: If a floating-point tensor, or one that a module asks for, has no value.
        """
        for prefix, module in self._takers.items():  # first: what they need for a while is not on top of everything else
            module.take(values, prefix, device)
        for table, name, full_name, empty, persistent in self._slots:
            if not (persistent and empty.is_floating_point()):
                table[name] = torch.zeros(empty.shape, dtype=empty.dtype, device=device)
                continue
            value = values[full_name]
            assert value.shape == empty.shape, f"{full_name}: {tuple(value.shape)} is not {tuple(empty.shape)}"
            placed = torch.empty(empty.shape, dtype=empty.dtype, device=device).copy_(value, non_blocking=True)
            is_parameter = isinstance(empty, nn.Parameter)
            table[name] = nn.Parameter(placed, requires_grad=empty.requires_grad) if is_parameter else placed

    def unload(self) -> bool:
        """Let go of all storage, and of attributes that a strategy set on the model.

        Returns:
            Whether the model is as it was. If not (a strategy added modules, hooks, or attributes deeper down), the skeleton
            must not serve another client.
        """
        for module in self._takers.values():
            module.release()
        for table, name, _, empty, _ in self._slots:
            table[name] = empty
        for attribute in set(vars(self.model)) - self._attributes:
            delattr(self.model, attribute)
        return _structure(self.model) == self._structure


def _structure(model: nn.Module) -> list[Any]:
    """What a strategy could have changed about the modules, storage apart."""
    return [
        (id(module), {name: len(value) if isinstance(value, dict) else None for name, value in vars(module).items()})
        for module in model.modules()
    ]
