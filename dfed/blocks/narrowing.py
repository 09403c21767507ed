"""How a chain is walked to make it narrower; what each kind of layer does is in :mod:`dfed.blocks.width_rules`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dfed.errors import ConfigError, Fault

__all__ = ["Kept", "Narrowing", "Picker", "Rule", "all_of", "refused"]

Picker = Callable[[str, int, int], np.ndarray]
"""Which channels of a group to keep: (name, size, count) to ``count`` ascending indices below ``size``."""

_TINY = 1e-9  # so that 0.1 · 30 asks for 3 channels, not for 4


class Kept(NamedTuple):
    """Channels that are there, of ``size`` that the full model has: ascending indices."""

    indices: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.indices)

    def repeated(self, times: int) -> Kept:
        """The features of these channels when ``times`` features of each lie side by side."""
        places = self.indices[:, None] * times + np.arange(times)
        return Kept(places.reshape(-1), self.size * times)


def all_of(size: int) -> Kept:
    """All of ``size`` channels."""
    return Kept(np.arange(size), size)


Rule = Callable[["Narrowing", Any, str, Kept, "Kept | None"], Kept]
"""(narrowing, layer, its path, what comes in, what must come out or None) to what comes out; the layer is changed in place."""


class Narrowing:
    """One walk through a chain that makes every layer narrower, in place.

    Layers of one's own may take part: a module with a method ``narrowed(narrowing, path, kept, target) -> Kept`` calls
    :meth:`layer` for its children, in the order in which they run, and returns the channels that it puts out.

    Args:
        rate: Share of channels that a group keeps.
        pick: Which ones.
        rules: By the class of a layer (its full name): how channels pass through it.
        heads: Heads that share the residual stream; it keeps a multiple of so many channels.

    Attributes:
        axes: By the tensor's name: for each leading dimension what is kept; None: all.
    """

    def __init__(self, rate: float, pick: Picker, rules: Mapping[str, Rule], *, heads: int = 1):
        self.axes: dict[str, list[np.ndarray | None]] = {}
        self._rate, self._pick, self._rules, self._heads = rate, pick, rules, heads

    def group(self, name: str, size: int, multiple: int = 1) -> Kept:
        """The kept channels of a new group; their number is a multiple of ``multiple``, of which ``size`` is one."""
        count = multiple * max(1, math.ceil(self._rate * (size // multiple) - _TINY))
        return all_of(size) if count == size else Kept(self._pick(name, size, count), size)

    def layer(self, module: nn.Module, path: str, kept: Kept, target: Kept | None = None) -> Kept:
        """Make ``module`` narrower, whose inputs are ``kept``; returns what it puts out.

        Args:
            target: What it must put out; None: it chooses.

        Raises:
            ConfigError: If nothing is known of this kind of layer, or it cannot be narrowed so; names it.
        """
        own = getattr(module, "narrowed", None)
        rule = self._rules.get(f"{type(module).__module__}.{type(module).__qualname__}")  # a subclass may do otherwise
        if own is None and rule is None:
            raise refused(path, f"dfed does not know how channels pass through a layer of class {type(module).__name__}; a "
                                "class of your own can say so in a method `narrowed` (docs/own_parts.md)")
        out: Kept = own(self, path, kept, target) if own is not None else rule(self, module, path, kept, target)  # type: ignore[misc]
        if target is not None and not np.array_equal(out.indices, target.indices):
            raise refused(path, "what it puts out is tied both to its inputs and to what it is added to")
        return out

    def cut(self, module: nn.Module, path: str, name: str, *axes: np.ndarray | None) -> None:
        """Keep of the tensor ``name`` of ``module`` these indices along each leading dimension; None: all."""
        tensor = getattr(module, name)
        if tensor is None:
            return
        sizes = [size if axis is None else len(axis) for axis, size in zip(axes, tensor.shape, strict=False)]
        empty = torch.empty((*sizes, *tensor.shape[len(axes):]), dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(module, name, nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty)
        self.axes[f"{path}.{name}"] = list(axes)

    @property
    def heads(self) -> int:
        """Attention heads that share the residual stream."""
        return self._heads


def refused(path: str, why: str) -> ConfigError:
    """The error that says of a layer why it cannot be narrowed."""
    return ConfigError([Fault(path, f"must be a layer of which a part of the channels can be trained, but {why}.")])
