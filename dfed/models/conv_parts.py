"""Convolutions that take a mini-batch in parts, so that the scratch space of the libraries beneath stays small.

On a CPU a convolution copies what it is given, and the gradient of what it returns, into a layout of its own: at large feature
maps these copies are what lifts a training step above the sum of its tensors. They are of one part at a time here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

__all__ = ["convolutions_in_parts"]

_WORTH = 8


@contextmanager
def convolutions_in_parts(parts: int) -> Iterator[None]:
    """Inside, convolutions of images take a mini-batch in at most ``parts`` parts of one size where that pays.

    It does where the weight, which every part reads anew, is no larger than eight parts of the input. Meant are those of
    ``torch.nn.Conv2d`` with padding in numbers, not under autocast. The output is contiguous, and the same, to the bit if the
    library's is for a smaller batch; the weight's gradient is a sum over parts, so that it is rounded otherwise. It has no
    second derivative.

    Args:
        parts: At least 1, which changes nothing.
    """
    assert parts >= 1, f"at least 1 part, not {parts}"
    if parts == 1:
        yield
        return
    with _InParts(parts):
        yield


class _InParts(TorchFunctionMode):
    def __init__(self, parts: int):
        super().__init__()
        self._parts = parts

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and self._pays(args):
            return _Convolution.apply(math.ceil(len(args[0]) / self._parts), *args)
        return func(*args, **(kwargs or {}))

    def _pays(self, args: tuple[Any, ...]) -> bool:
        """Of the arguments as ``torch.nn.Conv2d`` passes them: with ``padding="same"`` they are of other kinds."""
        if len(args) != 7 or not all(isinstance(values, tuple) for values in args[3:6]):
            return False
        x, weight = args[:2]
        return x.dim() == 4 and len(x) > 1 and self._parts * weight.numel() <= _WORTH * x.numel()


class _Convolution(torch.autograd.Function):
    """Of (batch, channels, height, width), ``size`` samples at a time."""

    @staticmethod
    def forward(ctx: Any, size: int, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
                padding: tuple[int, int], dilation: tuple[int, int], groups: int) -> Tensor:
        """As ``torch.conv2d``."""
        ctx.save_for_backward(x, weight)
        ctx.size, ctx.bias_sizes = size, None if bias is None else list(bias.shape)
        ctx.options = (stride, padding, dilation, False, (0, 0), groups)
        out = None
        for start in range(0, len(x), size):
            part = torch.conv2d(x[start:start + size], weight, bias, stride, padding, dilation, groups)
            if out is None:
                out = part.new_empty((len(x), *part.shape[1:]))
            out[start:start + size] = part
            del part  # not beside the next one
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are asked for."""
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        found: list[Tensor | None] = [torch.empty_like(x) if wanted[0] else None, None, None]
        for start in range(0, len(x), ctx.size):
            part = slice(start, start + ctx.size)
            own = torch.ops.aten.convolution_backward(gradient[part], x[part], weight, ctx.bias_sizes, *ctx.options, wanted)
            if found[0] is not None:
                found[0][part] = own[0]
            for place in (1, 2):
                if wanted[place]:
                    so_far = found[place]
                    found[place] = own[place] if so_far is None else so_far.add_(own[place])
            del own
        return (None, *found, None, None, None, None)
