"""A model as an ordered list of named units, and how one is built by name and given its first values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dfed.errors import ConfigError, Fault
from dfed.models.init import Scheme, initialise
from dfed.models.layers import KeyedRandom, keyed
from dfed.models.recompute import recomputed
from dfed.registry import UnknownName, nearest

__all__ = ["Chain", "materialise", "shapes_looked_up"]

Shapes = dict[str, tuple[int, ...]]
LookUp = Callable[["Chain", Callable[[], Shapes]], Shapes]
_look_up: ContextVar[LookUp] = ContextVar("look_up", default=lambda _, trace: trace())


@contextmanager
def shapes_looked_up(look_up: LookUp) -> Iterator[None]:
    """Inside, what :meth:`Chain.output_shapes` finds for the first time comes from ``look_up``.

    Args:
        look_up: Is given the chain, and what finds out its shapes: that loads some seconds' worth of torch's modules.
    """
    token = _look_up.set(look_up)
    try:
        yield
    finally:
        _look_up.reset(token)


class Chain(nn.Module):
    """A model as an ordered list of named units: each takes the output of the one before.

    Units are direct submodules, so a tensor is called ``<unit>.<rest>``. Layers inside that draw from torch's global
    generator are replaced, in place, by layers that draw from the one of :meth:`set_generator`.

    Args:
        units: Names and modules, in order. A module takes one tensor and returns one tensor, batch first.
        input_shape: Shape of one sample, without the batch dimension, e.g. (channels, height, width).
        num_classes: Number of outputs of the last unit.
        name: The model's name, for messages.
        init: The scheme by which :func:`materialise` fills the weights.

    Attributes:
        recompute: Whether units drop their activations in training and compute them again in the backward pass; see
            :func:`dfed.models.recompute.recomputed`.

    Raises:
        ConfigError: If a unit's name is empty, reserved, repeated or has a dot; if two units are one module, or two
            names stand for one tensor; or if a layer draws from the global generator and cannot be replaced.
    """

    def __init__(
        self,
        units: Sequence[tuple[str, nn.Module]],
        *,
        input_shape: tuple[int, ...],
        num_classes: int,
        name: str,
        init: Scheme = "torch",
    ):
        super().__init__()
        self.name = name
        self.input_shape = tuple(input_shape)
        self.num_classes = num_classes
        self.init_scheme = init
        self._unit_names = tuple(unit_name for unit_name, _ in units)
        self._shapes: Shapes | None = None
        self.recompute = False
        if not units:
            raise ConfigError([Fault("units", "must hold at least one unit, but is empty.")])
        for unit_name, module in units:
            self._check_unit(unit_name, module)
            self.add_module(unit_name, keyed(module, unit_name))
        self._check_tied()

    def _check_unit(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise ConfigError([Fault(name, f"must be an nn.Module, but is a {type(module).__name__}.")])
        if not name or "." in name:
            raise ConfigError([Fault("units", f"must have names that are not empty and have no dot, but is '{name}'.")])
        if name in self._modules:
            raise ConfigError([Fault("units", f"must have distinct names, but '{name}' is there twice.")])
        if hasattr(self, name):
            raise ConfigError([Fault("units", f"must not be called '{name}', which is an attribute of a Chain.")])
        for other, existing in self._modules.items():
            if existing is module:
                message = f"must be a module of its own, but is the one of unit '{other}'."
                raise ConfigError([Fault(name, message)])

    def _check_tied(self) -> None:
        """Units are frozen, encoded and sent one by one, which a tensor with two names would not survive."""
        seen: dict[int, str] = {}
        tensors = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            other = seen.setdefault(id(tensor), name)
            if other != name:
                raise ConfigError([Fault(name, f"must be a tensor of its own, but is the same as `{other}`.")])

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of the units, in order."""
        return self._unit_names

    def __len__(self) -> int:
        return len(self._unit_names)

    def unit(self, name: str) -> nn.Module:
        """The unit called ``name``.

        Raises:
            UnknownName: If there is none.
        """
        self.index_of(name)
        return self._modules[name]  # type: ignore[return-value]

    def unit_of(self, tensor_name: str) -> str:
        """The name of the unit that the parameter or buffer ``tensor_name`` (``<unit>.<rest>``) lies in.

        Raises:
            UnknownName: If the name does not start with that of a unit.
        """
        name = tensor_name.partition(".")[0]
        self.index_of(name)
        return name

    def index_of(self, unit: str | int) -> int:
        """The place of a unit, given by name; a place in ``0 … len(self)``, given as such, is returned.

        Raises:
            UnknownName: If there is none.
        """
        if isinstance(unit, int):
            if not 0 <= unit <= len(self):
                raise UnknownName(f"unit index must be at least 0 and at most {len(self)}, but is {unit}.")
            return unit
        if unit not in self._unit_names:
            known = list(self._unit_names)
            raise UnknownName(f"unit must be one of {', '.join(known)}, but is '{unit}'.{nearest(unit, known)}")
        return self._unit_names.index(unit)

    def forward(self, x: Tensor) -> Tensor:
        """All units in order: (batch, *input_shape) to (batch, num_classes)."""
        return self.run(x)

    def run(self, x: Tensor, start: str | int | None = None, stop: str | int | None = None) -> Tensor:
        """The units from ``start`` up to and not including ``stop``, each by name or index.

        None stands for the first unit, and for the end.

        Args:
            x: What unit ``start`` takes, (batch, …).

        Raises:
            UnknownName: If a unit does not exist.
            ValueError: If ``start`` comes after ``stop``.
        """
        first = 0 if start is None else self.index_of(start)
        last = len(self) if stop is None else self.index_of(stop)
        if first > last:
            raise ValueError(f"`start` must not come after `stop` ({stop!r}), but is {start!r}.")
        for name in self._unit_names[first:last]:
            unit: nn.Module = self._modules[name]  # type: ignore[assignment]
            x = recomputed(unit, x) if self._pays_to_recompute(unit, x) else unit(x)
        return x

    def _pays_to_recompute(self, unit: nn.Module, x: Tensor) -> bool:
        """Whether the unit would keep activations, and is not the last, whose backward pass follows at once."""
        if not (self.recompute and self.training and torch.is_grad_enabled()) or unit is self._modules[self._unit_names[-1]]:
            return False
        return x.requires_grad or any(parameter.requires_grad for parameter in unit.parameters())

    def output_shapes(self) -> Shapes:
        """The shape of one sample (no batch dimension) after each unit.

        Found once, on the meta device: nothing is allocated, drawn or changed, wherever the chain itself lies.

        Raises:
            ConfigError: If a unit cannot take what it is given; names the unit.
        """
        if self._shapes is None:
            self._shapes = _look_up.get()(self, lambda: self.skeleton()._trace_shapes())
        return dict(self._shapes)

    @torch.no_grad()
    def _trace_shapes(self) -> Shapes:
        """Run every unit in evaluation mode; for a chain on the meta device that is thrown away afterwards."""
        floats = (tensor.dtype for tensor in self.parameters() if tensor.is_floating_point())
        x = torch.empty((2, *self.input_shape), dtype=next(floats, None), device="meta")
        shapes: Shapes = {}
        self.eval()
        for name in self._unit_names:
            before = tuple(x.shape[1:])
            try:
                x = self.run(x, name, self.index_of(name) + 1)
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                message = f"must suit model '{self.name}', but is {self.input_shape}: "
                message += f"unit '{name}' cannot take an input of shape {before}: {error}"
                raise ConfigError([Fault("input_shape", message)]) from error
            if not isinstance(x, Tensor):
                raise ConfigError([Fault(name, f"must return one tensor, but returns a {type(x).__name__}.")])
            shapes[name] = tuple(x.shape[1:])
        return shapes

    def skeleton(self) -> Chain:
        """A copy on the meta device: modules of its own, no storage, no generator. ``self`` may lie anywhere."""
        memo: dict[int, Any] = {}
        for tensor in self.parameters():
            memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
        for tensor in self.buffers():
            memo[id(tensor)] = tensor.detach().to("meta")
        return copy.deepcopy(self, memo)

    def set_generator(self, generator: torch.Generator | None) -> None:
        """Hand ``generator`` to every layer that draws random numbers; None takes it away.

        It must be on the device of the chain's inputs, and is advanced by every training forward.
        """
        for module in self.modules():
            if isinstance(module, KeyedRandom):
                module.generator = generator


def materialise(chain: Chain, generator: torch.Generator, device: torch.device | str = "cpu") -> Chain:
    """Give ``chain`` real storage and fill every parameter and buffer from ``generator``.

    Drawn on the CPU and then moved, so the values do not depend on the device. Values it had before are lost.

    Args:
        chain: A chain on any device; changed.
        generator: A CPU generator; advanced.
        device: Where the chain goes.

    Returns:
        ``chain`` itself.

    Raises:
        ConfigError: If a parameter or buffer is covered by no rule of :mod:`dfed.models.init`; names it.
    """
    assert generator.device.type == "cpu", f"first values are drawn on the CPU, not on {generator.device}"
    chain.to_empty(device="cpu")
    initialise(chain, generator, chain.init_scheme)
    return chain.to(device)
