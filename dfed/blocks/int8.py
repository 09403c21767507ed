"""Frozen layers whose weights are held as int8: one byte an entry, and one scale per output channel.

The weight is made float32 for as long as a layer computes with it, in the forward pass and again in the backward pass;
between the two only the bytes are held. The layer has no parameters: it is frozen for good. This is the form that works on
every device; arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Int8Conv2d", "Int8Linear", "dequantise", "hold_int8", "quantise"]

_LARGEST = 127


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: ``weight`` (out, …) float32 to int8 of the same shape and scales (out,) float32.

    The error of an entry is at most half its channel's scale, max|w| / 127. A channel of zeros, or of numbers too small for
    a scale of full precision, has the scale 1. A channel with a NaN or an infinity stands for NaNs.
    """
    scale = weight.detach().abs().flatten(1).amax(dim=1) / _LARGEST
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
    return (weight.detach() / _along(scale, weight)).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scale


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """The float32 tensor that int8 ``weight`` (out, …) and ``scale`` (out,) stand for."""
    return weight.to(torch.float32).mul_(_along(scale, weight))


def _along(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *(1,) * (weight.ndim - 1))


class _Conv2d(torch.autograd.Function):
    """conv2d with an int8 weight; the gradient goes to the input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.geometry, ctx.input_shape = geometry, x.shape
        return F.conv2d(x, dequantise(weight, scale), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, scale = ctx.saved_tensors
        weight = dequantise(weight, scale).to(grads[0].dtype)
        grad = torch.nn.grad.conv2d_input(ctx.input_shape, weight, grads[0], *ctx.geometry)
        return grad, None, None, None, None


class _Linear(torch.autograd.Function):
    """A linear map with an int8 weight; the gradient goes to the input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantise(weight, scale), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, scale = ctx.saved_tensors
        return grads[0] @ dequantise(weight, scale).to(grads[0].dtype), None, None, None


class _Int8(nn.Module):
    """Buffers: ``weight`` int8 (out, …), ``scale`` float32 (out,), ``bias`` float32 (out,) or None."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        super().__init__()
        weight, scale = quantise(layer.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())


class Int8Conv2d(_Int8):
    """A frozen ``nn.Conv2d`` (zero padding) that holds its weight as int8.

    Args:
        layer: The convolution; its values are copied. May lie on the meta device.
    """

    def __init__(self, layer: nn.Conv2d):
        assert layer.padding_mode == "zeros", f"only zero padding, not '{layer.padding_mode}'"
        assert not isinstance(layer.padding, str), f"only padding in numbers, not '{layer.padding}'"
        super().__init__(layer)
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        return _Conv2d.apply(x, self.weight, self.scale, self.bias, self.geometry)


class Int8Linear(_Int8):
    """A frozen ``nn.Linear`` that holds its weight as int8.

    Args:
        layer: The linear layer; its values are copied. May lie on the meta device.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.scale, self.bias)


def hold_int8(module: nn.Module) -> None:
    """Replace, in place, every ``Conv2d`` and ``Linear`` inside ``module`` whose parameters ask for no gradient.

    Exactly these classes: a subclass may use its weight otherwise. A convolution whose padding is a word, or is not of zeros,
    stays as it is.
    """
    for name, child in list(module.named_children()):
        trained = any(parameter.requires_grad for parameter in child.parameters())
        if type(child) is nn.Conv2d and not trained and child.padding_mode == "zeros" and not isinstance(child.padding, str):
            setattr(module, name, Int8Conv2d(child))
        elif type(child) is nn.Linear and not trained:
            setattr(module, name, Int8Linear(child))
        else:
            hold_int8(child)
