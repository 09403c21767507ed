"""Which layers of a unit can be frozen into 8 bits, and which batch norm lies right behind which convolution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Uses"]


class Uses(TorchDispatchMode):
    """One pass through a unit on the meta device: what goes into its layers and norms, and what uses what comes out.

    Attributes:
        layers: The layers to be replaced, by name.
        inputs: What goes into a layer or norm, by name.
    """

    def __init__(self, unit: nn.Module, input_shape: tuple[int, ...]):
        super().__init__()
        self._uses: Counter[int] = Counter()
        self._alive: list[Any] = []  # an identity is a tensor's own for as long as the tensor lives
        self._outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        calls: Counter[str] = Counter()

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                calls[name] += 1
                self.inputs[name], self._outputs[name] = args[0], output

            return hook

        watched = {name: module for name, module in unit.named_modules() if name and (_is_layer(module) or _is_norm(module))}
        handles = [module.register_forward_hook(note(name)) for name, module in watched.items()]
        modes = {module: module.training for module in unit.modules()}
        unit.eval()
        try:
            with torch.no_grad(), self:
                out = unit(torch.empty(2, *input_shape, device="meta"))
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes.items():
                module.training = training
        self._uses[id(out)] += 1
        self.layers = {name: module for name, module in watched.items() if calls[name] == 1 and _is_layer(module)}
        self._norms = {name: module for name, module in watched.items() if calls[name] == 1 and _is_norm(module)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for arg in args for leaf in (arg if isinstance(arg, (list, tuple)) else [arg])]
        self._uses.update({id(leaf) for leaf in leaves if isinstance(leaf, Tensor)})
        self._alive += [*leaves, out]
        return out

    def norm_behind(self, name: str) -> tuple[Any, str] | None:
        """The norm that alone uses what this layer returns, and its name."""
        output = self._outputs[name]
        for norm_name, norm in self._norms.items():
            if self.inputs[norm_name] is output and self._uses[id(output)] == 1:
                return norm, norm_name
        return None


def _is_layer(module: nn.Module) -> bool:
    if any(parameter.requires_grad for parameter in module.parameters()):
        return False
    if type(module) is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _is_norm(module: nn.Module) -> bool:
    frozen = not any(parameter.requires_grad for parameter in module.parameters())
    return type(module) is nn.BatchNorm2d and frozen and module.running_mean is not None
