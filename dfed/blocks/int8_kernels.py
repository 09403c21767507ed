"""Frozen convolutions and linear maps in 8-bit arithmetic on the CPU: float32 in, float32 out, and the gradient of the input.

Weights are int8 codes with a scale for each output channel (:func:`dfed.blocks.int8.quantise`). Inputs are quantised per
tensor to uint8 as they come, with the scale of their own range; sums are exact int32 numbers, scaled to float32 at the end.
The gradient of the input goes the same way: it is multiplied by the channels' scales, quantised, and convolved with the same
codes, turned round. The kernels are oneDNN's, reached through operators that torch keeps to itself; nothing else in dfed calls
them. Whether they are there, right and worth while is for :mod:`dfed.blocks.int8_choice` to say.

On tensors without storage (fake, or on the meta device) the same outputs and temporaries are made, and nothing is computed.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from dfed.blocks.int8_table import ConvShape
from dfed.memory import at_most

__all__ = ["ConvGradient", "Int8Conv", "Int8Linear", "LinearGradient", "has_full_range", "quantise_input", "turned"]

_ROUNDS = float(2**23)  # float32 numbers from here on are whole, and their lowest byte counts up
_PIECE = 2**17  # entries quantised at once: their float32 copy stays in the second-level cache
_TYPICAL_BATCH = 32  # the form in which a weight is packed may depend on the batch; any form is right for all


@functools.cache
def has_full_range() -> bool:
    """Whether products of 8 bits add without saturating on this processor."""
    return bool(torch.cpu._is_vnni_supported())


def quantise_input(x: Tensor, scale: float | None = None) -> tuple[Tensor, float, int]:
    """A tensor as 8-bit numbers, per tensor: ``x ≈ (codes − zero point) · scale``.

    Numbers of which none is negative take the codes 0 … 255 and the zero point 0, others 1 … 255 and 128. Where the processor
    has no dot product of bytes (VNNI), two products are added in 16 bits, which saturate beyond 32,767: there the codes are
    0 … 127, and 1 … 127 with the zero point 64, so that the sum is at most 2 · 127 · 127 = 32,258.

    The error of an entry is at most half the scale: max|x| over 255 where no number is negative, over 127 otherwise; in the
    smaller range over 127 and 63. A NaN or an infinity in ``x`` makes the scale NaN.

    Args:
        x: Float32 of any shape.
        scale: To be used instead of that of the tensor's own range; numbers beyond the codes are clipped.

    Returns:
        The codes, uint8, in the layout in which a convolution wants them (four dimensions: channels last, others: dense); the
        scale; and the zero point.
    """
    by_pixel = x.ndim == 4 and not x.is_contiguous()
    dense = (x.detach().permute(0, 2, 3, 1) if by_pixel else x.detach()).contiguous()
    codes = torch.empty(dense.shape, dtype=torch.uint8, device=x.device)
    piece = at_most(x.numel(), _PIECE, lambda size: torch.empty(size, dtype=torch.float32, device=x.device))
    own, zero = 1.0, 128
    if x.numel() and not _is_hollow(x):
        own, zero = _range(dense)
        _fill(codes.view(-1), dense.view(-1), piece, own if scale is None else scale, zero, clip=scale is not None)
    if by_pixel:
        codes = codes.permute(0, 3, 1, 2)
    elif x.ndim == 4:
        codes = codes.contiguous(memory_format=torch.channels_last)
    return codes, own if scale is None else scale, zero


def _range(x: Tensor) -> tuple[float, int]:
    """The scale and the zero point by which the tensor's own numbers just fit."""
    low, high = (float(bound) for bound in torch.aminmax(x))
    zero = (128 if has_full_range() else 64) * (low < 0)
    largest = max(-low, high)
    if not math.isfinite(largest):
        return math.nan, zero
    scale = largest / ((zero or (256 if has_full_range() else 128)) - 1)
    return (scale if scale >= torch.finfo(torch.float32).tiny else 1.0), zero


def _fill(codes: Tensor, x: Tensor, piece: Tensor, scale: float, zero: int, *, clip: bool) -> None:
    """Write the codes, rounded to the nearest whole number (a half: to the even one). All are dense and have one dimension."""
    if math.isnan(scale):
        codes.fill_(zero)
        return
    offset = torch.tensor(_ROUNDS + zero)
    last = (256 if has_full_range() else 128) - 1
    for start in range(0, x.numel(), _PIECE):
        part = x[start:start + _PIECE]
        rounded = torch.add(offset, part, alpha=1 / scale, out=piece[:part.numel()])
        if clip:
            rounded.clamp_(_ROUNDS + (zero > 0), _ROUNDS + last)
        codes[start:start + _PIECE].copy_(rounded.view(torch.int32))


def _is_hollow(x: Tensor) -> bool:
    """Whether a tensor has no numbers: fake, or on the meta device."""
    return isinstance(x, FakeTensor) or x.is_meta


def _operator(*names: str) -> Any:
    """The first of oneDNN's operators that this torch has; None if it has none of them."""
    return next((found for name in names if (found := getattr(torch.ops.onednn, name, None)) is not None), None)


_conv, _linear = _operator("qconv_pointwise", "qconv2d_pointwise"), _operator("qlinear_pointwise")


class Int8Conv:
    """A convolution: float32 or bfloat16 (n, in_channels, h, w) to the same type (n, out_channels, …), channels last.

    Args:
        codes: Int8 (out_channels, in_channels / groups, kernel height, kernel width); packed, not kept.
        scale: Float32 (out_channels,).
        bias: Float32 (out_channels,) or None.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, shape: ConvShape):
        self.scale, self.bias, self.shape = scale, bias, shape
        self._step = (1, 1) if shape.is_subsampled else shape.stride
        self._zeros = torch.zeros(len(scale), dtype=torch.int32, device=codes.device)
        size = [-(-length // step) for length, step in zip(shape.size, shape.stride, strict=True)]
        if _is_hollow(codes):
            self._packed = torch.empty_like(codes)
        else:
            example = [_TYPICAL_BATCH, shape.in_channels, *(size if shape.is_subsampled else shape.size)]
            self._packed = torch.ops.onednn.qconv_prepack(
                codes.contiguous(), scale, 1.0, 128, self._step, shape.padding, shape.dilation, shape.groups, example)

    def __call__(self, x: Tensor) -> Tensor:
        if self.shape.is_subsampled:
            x = x[:, :, ::self.shape.stride[0], ::self.shape.stride[1]]
        return self.of_codes(*quantise_input(x.float()), x.dtype)

    def of_codes(self, codes: Tensor, scale: float, zero: int, dtype: torch.dtype) -> Tensor:
        """The convolution of what :func:`quantise_input` returned."""
        return _conv(codes, scale, zero, self._packed, self.scale, self._zeros, self.bias, self._step, self.shape.padding,
                     self.shape.dilation, self.shape.groups, 1.0, 0, dtype, "none", [], "")


def turned(weight: Tensor, groups: int) -> Tensor:
    """The weight of the convolution that takes a gradient back: (out, in / groups, …) to (in, out / groups, …)."""
    return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1).flip(2, 3)


class ConvGradient:
    """The gradient of a convolution's input from that of its output, of the same type, channels last.

    With a stride, zeros are put between the entries of the gradient, for the same kernel to run over.

    Args:
        codes, scale, shape: Of the convolution. Its padding must not be larger than its reach: see :meth:`can`.
    """

    def __init__(self, codes: Tensor, scale: Tensor, shape: ConvShape):
        self._scale, self._shape = scale, shape
        back = ConvShape(shape.out_channels, shape.in_channels, shape.kernel, (1, 1), shape.back_padding, shape.dilation,
                         shape.groups, self._spread(shape.size))
        self._conv = Int8Conv(turned(codes, shape.groups), torch.ones(shape.in_channels, device=codes.device), None, back)

    @staticmethod
    def can(shape: ConvShape) -> bool:
        """Whether there is such a kernel: outputs that see nothing but padding are no part of it."""
        return min(shape.back_padding) >= 0

    def _spread(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the gradient with zeros between its entries, for an input of this height and width."""
        shape = self._shape
        if shape.is_subsampled:
            return -(-size[0] // shape.stride[0]), -(-size[1] // shape.stride[1])
        return size[0] + 2 * shape.padding[0] - shape.reach[0], size[1] + 2 * shape.padding[1] - shape.reach[1]

    def __call__(self, grad: Tensor, input_shape: torch.Size) -> Tensor:
        shape, dtype = self._shape, grad.dtype
        codes, scale, zero = quantise_input(grad.float() * self._scale.view(-1, 1, 1))
        step_y, step_x = shape.stride
        if shape.is_subsampled:
            back = grad.new_empty(input_shape).contiguous(memory_format=torch.channels_last).zero_()
            back[:, :, ::step_y, ::step_x] = self._conv.of_codes(codes, scale, zero, dtype)
            return back
        if shape.stride != (1, 1) or codes.shape[2:] != self._spread(input_shape[2:]):
            spread = torch.empty((*codes.shape[:2], *self._spread(input_shape[2:])), dtype=torch.uint8, device=codes.device,
                                 memory_format=torch.channels_last).fill_(zero)
            spread[:, :, :codes.shape[2] * step_y:step_y, :codes.shape[3] * step_x:step_x] = codes
            codes = spread
        return self._conv.of_codes(codes, scale, zero, dtype)


class Int8Linear:
    """A linear map: float32 or bfloat16 (…, in_features) to the same type (…, out_features).

    Args:
        codes: Int8 (out_features, in_features); packed, not kept.
        scale: Float32 (out_features,).
        bias: Float32 (out_features,) or None.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None):
        self.scale, self.bias = scale, bias
        self._zeros = torch.zeros(len(scale), dtype=torch.int32, device=codes.device)
        if _is_hollow(codes):
            self._packed = codes.new_empty(codes.shape[1], codes.shape[0])
        else:
            self._packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale, zero = quantise_input(x.float().flatten(0, -2) if x.ndim != 2 else x.float())
        out = _linear(codes, scale, zero, self._packed, self.scale, self._zeros, self.bias, 1.0, 0, x.dtype, "none", [], "")
        # Whoever takes it may change it in place, which a view that was made inside an autograd function does not allow.
        return out if x.ndim == 2 else torch.ops.aten._unsafe_view(out, [*x.shape[:-1], len(self.scale)])


class LinearGradient:
    """The gradient of a linear map's input from that of its output, of the same type.

    Args:
        codes, scale: Of the linear map.
    """

    def __init__(self, codes: Tensor, scale: Tensor):
        self._scale = scale
        self._linear = Int8Linear(codes.t(), torch.ones(codes.shape[1], device=codes.device), None)

    def __call__(self, grad: Tensor, input_shape: torch.Size) -> Tensor:
        return self._linear(grad.float() * self._scale).to(grad.dtype)


if _conv is not None and _linear is not None:
    @register_flop_formula(_conv)
    def _conv_flops(x: Any, _scale: Any, _zero: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return conv_flop_count([*x], [*weight], [*out_shape])

    @register_flop_formula(_linear)
    def _linear_flops(x: Any, _scale: Any, _zero: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * x[0] * weight[0] * weight[1]
