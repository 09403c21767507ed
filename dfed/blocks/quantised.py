"""Frozen units in 8 bits: layers that hold int8 codes, compute with them, and carry the batch norm that follows.

CoCoFL (Pfeiffer et al., TMLR 2023) quantises what a client does not train. A convolution and the batch norm right behind it
are one affine map once the norm's statistics stand still: w' = w·γ/√(σ²+ε), b' = (b − μ)·γ/√(σ²+ε) + β. Weights are quantised
for each output channel, so the codes of w' are those of w times the sign of γ.

On a CPU the kernels of :mod:`dfed.blocks.int8_kernels` compute where they are right and faster. Elsewhere, and on CUDA, a layer
holds plain codes, which are made float32 while it computes: that saves memory, and no arithmetic. We deviate from the paper in
two ways: weights have a scale for each channel, and the scales of inputs and gradients are those of the batch at hand.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfed.blocks.folding import Uses
from dfed.blocks.int8 import dequantise, quantise
from dfed.blocks.int8_choice import choose
from dfed.blocks.int8_kernels import ConvGradient, Int8Conv, Int8Linear, LinearGradient, turned
from dfed.blocks.int8_table import Choice, ConvShape, LinearShape

__all__ = ["Frozen", "FrozenConv2d", "FrozenLinear", "freeze_int8"]

_NO_KERNELS = Choice(forward=False, gradient=False)
_PIECE_ENTRIES = 2**18  # of a weight, quantised at once: its float32 copies are temporary, and count against the budget


@dataclass(frozen=True)
class _Held:
    """What a layer computes with while it is loaded."""

    forward: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, torch.Size], Tensor] | None


@dataclass(frozen=True)
class _DequantisedConv:
    """A convolution whose codes are made float32 for as long as it computes."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    shape: ConvShape

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        weight = dequantise(self.codes, self.scale)
        return F.conv2d(x, weight, self.bias, shape.stride, shape.padding, shape.dilation, shape.groups)

    def gradient(self, grad: Tensor, input_shape: torch.Size) -> Tensor:
        shape, weight = self.shape, dequantise(self.codes, self.scale).to(grad.dtype)
        if shape.groups > 1 and shape.stride == (1, 1) and ConvGradient.can(shape):
            # torch's gradient of a depthwise convolution takes about four times as long as the convolution that it is
            return F.conv2d(grad, turned(weight, shape.groups), None, 1, shape.back_padding, shape.dilation, shape.groups)
        return torch.nn.grad.conv2d_input(input_shape, weight, grad, shape.stride, shape.padding, shape.dilation, shape.groups)


@dataclass(frozen=True)
class _DequantisedLinear:
    """A linear map, likewise."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantise(self.codes, self.scale), self.bias)

    def gradient(self, grad: Tensor, _: torch.Size) -> Tensor:
        return grad @ dequantise(self.codes, self.scale).to(grad.dtype)


class _Apply(torch.autograd.Function):
    """A frozen layer: nothing is kept for the backward pass, which needs the layer's codes only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: _Held) -> Tensor:
        ctx.held, ctx.input_shape, ctx.dtype, ctx.dense = held, x.shape, x.dtype, x.is_contiguous()
        return held.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = ctx.held.gradient(grads[0], ctx.input_shape).to(ctx.dtype)
        return grad.contiguous() if ctx.dense else grad, None  # layers in front compute in the layout that they chose


class Frozen(nn.Module, abc.ABC):
    """A layer without parameters, whose values come from the tensors of the layers that it stands for.

    Until :meth:`take` it has none, and only tells the shape of its output on the meta device.

    Args:
        layer: What it stands for, for its sizes.
        name: The layer's name inside its unit.
        norm: The batch norm that is folded in, and its name inside the unit.
        passes_gradient: Whether the gradient of the input will be asked for.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, name: str, norm: tuple[nn.BatchNorm2d, str] | None, passes_gradient: bool):
        super().__init__()
        self._weight_shape, self._has_bias = tuple(layer.weight.shape), layer.bias is not None
        self._name, self._passes_gradient = name, passes_gradient
        self._norm = None if norm is None else (norm[1], norm[0].eps, norm[0].affine)
        self._held: _Held | None = None

    def take(self, values: Mapping[str, Tensor], prefix: str, device: torch.device) -> None:
        """Quantise, fold and pack the layer's values: afterwards it holds codes, scales and biases, none of them in ``values``.

        Args:
            values: Float32 tensors by their names in the whole model.
            prefix: This module's name there.

        Raises:
            KeyError: If a value is missing.
        """
        weight = values[f"{prefix}.weight"]
        assert tuple(weight.shape) == self._weight_shape, f"{prefix}: {tuple(weight.shape)} is not {self._weight_shape}"
        bias = values[f"{prefix}.bias"].to(device, copy=True) if self._has_bias else None
        codes, scale = _quantised(weight, device)
        if self._norm is not None:
            name, eps, affine = self._norm
            norm = prefix.removesuffix(self._name) + name
            mean, variance = (values[f"{norm}.{statistic}"].to(device) for statistic in ("running_mean", "running_var"))
            factor = (variance + eps).rsqrt_()
            if affine:
                factor.mul_(values[f"{norm}.weight"].to(device))
            bias = (-mean if bias is None else bias - mean).mul_(factor)
            if affine:
                bias.add_(values[f"{norm}.bias"].to(device))
            codes.mul_(factor.sign().to(torch.int8).view(-1, 1, 1, 1))
            scale.mul_(factor.abs_())
        self._held = self._hold(codes, scale, bias)

    def release(self) -> None:
        """Let go of all values."""
        self._held = None

    def forward(self, x: Tensor) -> Tensor:
        if self._held is None:
            assert x.is_meta, "a frozen layer must have taken its values before it computes"
            return self._plain(x, torch.empty(self._weight_shape, dtype=x.dtype, device=x.device))
        return _Apply.apply(x, self._held)  # type: ignore[no-any-return]

    @abc.abstractmethod
    def _hold(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> _Held:
        """What computes with these codes, int8 and of the weight's shape, on the device where they lie."""

    @abc.abstractmethod
    def _plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer, without bias, with a weight of the type of ``x``."""


def _quantised(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """As :func:`quantise`, on ``device``, a few channels at a time."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=device)
    step = max(1, _PIECE_ENTRIES // max(1, weight[0].numel()))
    for start in range(0, len(weight), step):
        codes[start:start + step], scale[start:start + step] = quantise(weight[start:start + step].to(device))
    return codes, scale


class FrozenConv2d(Frozen):
    """A frozen ``nn.Conv2d`` (zero padding), with the batch norm behind it if it is given one: (n, c, h, w) to (n, c', h', w').

    Args:
        size: Height and width of the input.
        layer, name, norm, passes_gradient: As for :class:`Frozen`.
    """

    def __init__(self, layer: nn.Conv2d, name: str, norm: tuple[nn.BatchNorm2d, str] | None, passes_gradient: bool,
                 size: tuple[int, int]):
        super().__init__(layer, name, norm, passes_gradient)
        self._shape = ConvShape(layer.in_channels, layer.out_channels, _pair(layer.kernel_size), _pair(layer.stride),
                                _pair(layer.padding), _pair(layer.dilation), layer.groups, size)
        self._choice = choose(self._shape)

    def _hold(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> _Held:
        plain = _DequantisedConv(codes, scale, bias, self._shape)
        choice = self._choice if codes.device.type == "cpu" else _NO_KERNELS
        forward = Int8Conv(codes, scale, bias, self._shape) if choice.forward else plain.forward
        if not self._passes_gradient:
            return _Held(forward, None)
        return _Held(forward, ConvGradient(codes, scale, self._shape) if choice.gradient else plain.gradient)

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self._shape.stride, self._shape.padding, self._shape.dilation, self._shape.groups)


class FrozenLinear(Frozen):
    """A frozen ``nn.Linear``: (…, inputs) to (…, outputs).

    Args:
        layer, name, passes_gradient: As for :class:`Frozen`.
    """

    def __init__(self, layer: nn.Linear, name: str, passes_gradient: bool):
        super().__init__(layer, name, None, passes_gradient)
        self._choice = choose(LinearShape(layer.in_features, layer.out_features))

    def _hold(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> _Held:
        plain = _DequantisedLinear(codes, scale, bias)
        choice = self._choice if codes.device.type == "cpu" else _NO_KERNELS
        forward = Int8Linear(codes, scale, bias) if choice.forward else plain.forward
        if not self._passes_gradient:
            return _Held(forward, None)
        return _Held(forward, LinearGradient(codes, scale) if choice.gradient else plain.gradient)

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


def freeze_int8(unit: nn.Module, input_shape: tuple[int, ...], *, passes_gradient: bool = False, dense: bool = True) -> None:
    """Replace, in place, every frozen ``Conv2d`` and ``Linear`` inside ``unit`` by a layer in 8 bits.

    Frozen: its parameters ask for no gradient. A frozen ``BatchNorm2d`` with running statistics that is alone in using a
    convolution's output is folded into it, and an ``nn.Identity`` is left in its place. Exactly these classes: a subclass may
    use its weight otherwise. What the unit does not call, or calls more than once, stays as it is, as do convolutions whose
    padding is a word, or not of zeros. The unit itself must not be such a layer.

    Args:
        unit: On the meta device.
        input_shape: Of one sample of the unit's input.
        passes_gradient: Whether the gradient of the unit's input will be asked for: layers then hold what that takes.
        dense: Whether the unit returns contiguous tensors, which trained convolutions want (they take up to 1.7 times as long
            on others). Where another unit in 8 bits follows, False saves a copy.
    """
    seen = Uses(unit, input_shape)
    for name, layer in seen.layers.items():
        if not isinstance(layer, nn.Conv2d):
            _replace(unit, name, FrozenLinear(layer, name, passes_gradient))
            continue
        norm = seen.norm_behind(name)
        _replace(unit, name, FrozenConv2d(layer, name, norm, passes_gradient, _pair(seen.inputs[name].shape[2:])))
        if norm is not None:
            _replace(unit, norm[1], nn.Identity())
    if dense:
        unit.register_forward_hook(_contiguous)


def _contiguous(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.contiguous()


def _replace(unit: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(unit.get_submodule(parent), own, module)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)
