"""Which kernels serve a frozen layer: 8-bit ones where a trial shows them right and the measured table calls them faster."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dfed.blocks.int8_kernels import ConvGradient, Int8Conv, Int8Linear, LinearGradient, has_full_range
from dfed.blocks.int8_table import Choice, ConvShape, LinearShape, measured

__all__ = ["choose", "works"]

logger = logging.getLogger(__name__)


def choose(shape: ConvShape | LinearShape) -> Choice:
    """Which kernels serve a layer on the CPU: the faster ones as measured, of those that are right on this processor.

    A function of the shape and the processor only: it is never found out by timing, so every rank answers alike.
    """
    choice = measured(shape)
    if not (choice.forward or choice.gradient) or not works(shape.kind):
        return Choice(forward=False, gradient=False)
    can = isinstance(shape, LinearShape) or ConvGradient.can(shape)
    return Choice(choice.forward, choice.gradient and can)


@functools.cache
def works(kind: str) -> bool:
    """Whether a kind of kernel (``conv``, ``grouped conv``, ``linear``) exists here and is right, by trial on small cases.

    The trials hold random codes, and codes and inputs that are all at their largest, with and without negative inputs. An error
    of 1 % of the result is a failure, which is logged; rounding inputs costs nothing, they are whole numbers.
    """
    try:
        with _disable_current_modes(), torch.no_grad():
            right = all(_error(kind, case) < 0.01 for case in _cases())
        problem = "is wrong"
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        right, problem = False, f"fails: {error}"
    if not right:
        logger.warning("the 8-bit kernel '%s' of this torch on this processor %s; float32 takes its place", kind, problem)
    return right


def _cases() -> Iterator[tuple[Tensor, Tensor]]:
    """Codes (8, 256) and inputs (4, 4096) of whole numbers that the smaller range holds."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (8, 256), generator=generator, dtype=torch.int8)
    largest = 127 if not has_full_range() else 255
    x = torch.randint(0, largest + 1, (4, 4096), generator=generator).float()
    for weight in (codes, torch.full_like(codes, 127)):
        for inputs in (x, torch.full_like(x, largest)):
            yield weight, inputs.index_fill(1, torch.tensor([0]), largest)
            signed = (inputs - (largest + 1) / 2).clamp_(-(largest // 2), largest // 2)
            yield weight, signed.index_fill(1, torch.tensor([0]), -(largest // 2))


def _error(kind: str, case: tuple[Tensor, Tensor]) -> float:
    """The norm of a kernel's error, forwards or backwards (whichever is larger), relative to that of the right result."""
    codes, x = case
    scale, bias = 2.0 ** (torch.arange(8) - 3), torch.arange(8.0)
    weight = codes.double() * scale.double()[:, None]
    if kind == "linear":
        x = x.view(-1, 256)
        right = F.linear(x.double(), weight, bias.double())
        grad = x.flatten()[:right.numel()].view_as(right) / scale
        return max(_relative(Int8Linear(codes, scale, bias)(x), right),
                   _relative(LinearGradient(codes, scale)(grad, x.shape), grad.double() @ weight))
    groups = 1 if kind == "conv" else 2
    shape = ConvShape(28 * groups, 8, (3, 3), (2, 1), (1, 1), (1, 1), groups, (8, 9))
    codes, weight = codes[:, :252].view(8, 28, 3, 3), weight[:, :252].view(8, 28, 3, 3)
    x = x.flatten()[:2 * 28 * groups * 72].view(2, -1, 8, 9)
    got = Int8Conv(codes, scale, bias, shape)(x)
    right = F.conv2d(x.double(), weight, bias.double(), shape.stride, shape.padding, 1, groups)
    grad = x.flatten()[:right.numel()].view_as(right) / scale.view(-1, 1, 1)
    back = ConvGradient(codes, scale, shape)(grad, x.shape)
    right_back = torch.nn.grad.conv2d_input(x.shape, weight, grad.double(), shape.stride, shape.padding, 1, groups)
    return max(_relative(got, right), _relative(back, right_back))


def _relative(got: Tensor, right: Tensor) -> float:
    return float((got.double() - right).norm() / right.norm())
