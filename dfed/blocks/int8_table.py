"""Where 8-bit kernels are faster than float32: layers' shapes, and rules read off a measured table."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Choice", "ConvShape", "LinearShape", "measured"]


@dataclass(frozen=True)
class ConvShape:
    """What a convolution's kernels depend on, the batch apart.

    Attributes:
        kernel, stride, padding, dilation: For height and width.
        size: Height and width of the input.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    size: tuple[int, int]

    @property
    def reach(self) -> tuple[int, int]:
        """How many pixels lie between the first and the last that an output pixel sees."""
        return self.dilation[0] * (self.kernel[0] - 1), self.dilation[1] * (self.kernel[1] - 1)

    @property
    def back_padding(self) -> tuple[int, int]:
        """The padding of the convolution that takes a gradient back; below 0 where an output may see nothing but padding."""
        return self.reach[0] - self.padding[0], self.reach[1] - self.padding[1]

    @property
    def is_subsampled(self) -> bool:
        """Whether it is a 1 × 1 convolution of every so many pixels: then the others are left out first."""
        return self.kernel == (1, 1) and self.padding == (0, 0) and self.stride != (1, 1)

    @property
    def kind(self) -> str:
        """What :func:`works` checks for it."""
        return "conv" if self.groups == 1 else "grouped conv"


@dataclass(frozen=True)
class LinearShape:
    """What a linear map's kernels depend on, the batch apart."""

    in_features: int
    out_features: int
    kind = "linear"


@dataclass(frozen=True)
class Choice:
    """Whether 8-bit kernels serve a layer's forward pass, and the gradient of its input."""

    forward: bool
    gradient: bool


@dataclass(frozen=True)
class Timed:
    """A layer on a mini-batch of 32: time of the 8-bit kernel over that of float32, forwards and for the gradient."""

    shape: ConvShape | LinearShape
    forward: float
    gradient: float


def _conv(kernel: int, channels: tuple[int, int], stride: int, side: int, padding: int | None = None) -> ConvShape:
    around = kernel // 2 if padding is None else padding
    return ConvShape(*channels, (kernel, kernel), (stride, stride), (around, around), (1, 1), 1, (side, side))


MEASURED = (
    Timed(_conv(3, (3, 64), 1, 32), 0.78, 0.56),
    Timed(_conv(3, (64, 64), 1, 32), 0.30, 0.30),
    Timed(_conv(3, (64, 128), 2, 32), 0.37, 0.41),
    Timed(_conv(3, (128, 128), 1, 16), 0.23, 0.21),
    Timed(_conv(3, (256, 256), 1, 8), 0.21, 0.22),
    Timed(_conv(3, (256, 512), 2, 8), 0.40, 0.20),
    Timed(_conv(3, (512, 512), 1, 4), 0.25, 0.26),
    Timed(_conv(3, (512, 512), 1, 2), 0.45, 0.44),
    Timed(_conv(3, (3, 32), 1, 32), 0.92, 0.93),
    Timed(_conv(3, (16, 32), 2, 32), 0.88, 0.51),
    Timed(_conv(3, (16, 16), 1, 32), 0.20, 0.67),
    Timed(_conv(4, (3, 192), 4, 32, 0), 1.04, 0.87),
    Timed(_conv(1, (128, 256), 2, 16), 0.13, 0.57),
    Timed(_conv(1, (256, 512), 2, 8), 0.10, 0.19),
    Timed(_conv(1, (32, 16), 1, 32), 0.22, 0.22),
    Timed(_conv(1, (144, 24), 1, 32), 0.89, 0.16),
    Timed(_conv(1, (32, 192), 1, 16), 0.54, 2.74),
    Timed(_conv(1, (384, 64), 1, 8), 0.86, 0.46),
    Timed(_conv(1, (64, 384), 1, 8), 0.51, 0.98),
    Timed(_conv(1, (96, 576), 1, 8), 0.37, 0.77),
    Timed(_conv(1, (960, 160), 1, 4), 0.61, 0.39),
    Timed(_conv(1, (320, 1280), 1, 4), 0.25, 0.37),
    Timed(LinearShape(192, 768), 0.41, 0.67),
    Timed(LinearShape(768, 192), 0.50, 0.47),
    Timed(LinearShape(512, 10), 6.25, 12.26),
)
"""Some of the table of `benchmarks/int8_kernels.py`: 22 November 2026, Intel Xeon (model 207: AVX-512 VNNI and AMX), torch
2.15, one thread of a busy machine. Depthwise convolutions took 0.25 to 1.28 times as long forwards, and 0.24 to 1.09 times for
the gradient as torch computes it; they are served by the convolution that this gradient is, in float32, which is as fast."""

_LEAST_FORWARD, _LEAST_GRADIENT, _LEAST_LINEAR = 20, 96, 96
_LEAST_OF_AN_IMAGE, _IMAGE_CHANNELS = 500, 8


def measured(shape: ConvShape | LinearShape) -> Choice:
    """Which 8-bit kernels are faster than float32, by rules that fit :data:`MEASURED`.

    What costs is to quantise the input; what is gained grows with the number of products that each of its entries goes into,
    for a gradient with those that each of its own goes into. So there is a least number of products, and a larger one for
    inputs of few channels, of which the kernels use a part of each register only. Grouped and depthwise convolutions stay in
    float32. The least number forwards was the best for whole models (MobileNetV2's first half took 0.48 of float32's time, and
    0.68 with a least number of 100). Linear maps are served where both sides are large: behind a pooling there are few rows.
    """
    if isinstance(shape, LinearShape):
        large = min(shape.in_features, shape.out_features) >= _LEAST_LINEAR
        return Choice(large, large)
    if shape.groups > 1:
        return Choice(forward=False, gradient=False)
    area, skipped = shape.kernel[0] * shape.kernel[1], shape.stride[0] * shape.stride[1]
    least = _LEAST_FORWARD if shape.in_channels >= _IMAGE_CHANNELS else _LEAST_OF_AN_IMAGE
    return Choice(shape.out_channels * area >= least * skipped, shape.in_channels * area >= _LEAST_GRADIENT)
