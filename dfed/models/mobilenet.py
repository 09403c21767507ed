"""MobileNetV2 (Sandler et al. 2018), made of torchvision's own blocks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from dfed.models.chain import Chain
from dfed.models.layers import (
    Dropout,
    Norm,
    Probability,
    Stem,
    image_shape,
    norm_layer,
    torchvision_module,
    use_cifar_stem,
)

__all__ = ["mobilenet_v2"]

_STAGES = (  # expansion, channels, blocks, stride: table 2 of the paper
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST = 1280


def mobilenet_v2(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    stem: Stem = "auto",
    dropout: Probability = 0.2,
    norm: Norm = "batch",
) -> Chain:
    """MobileNetV2 of torchvision, with a stem for small images.

    Units: ``stem``, ``block0`` … ``block16`` (one per inverted residual), ``last`` (1 × 1 convolution), ``head``. With
    ``stem`` = ``imagenet`` and ``norm`` = ``batch`` it computes what ``torchvision.models.mobilenet_v2`` computes, to
    the bit (dropout apart, whose numbers come from another generator).

    Args:
        input_shape: (channels, height, width).
        num_classes: Number of classes.
        stem: ``imagenet``: the image is halved by the first convolution and by the stage of 24 channels. ``cifar``:
            both have stride 1, so the image is reduced by 8 in all, not by 32. ``auto``: ``cifar`` for images below 64
            pixels.
        dropout: Probability before the linear layer.
        norm: For ``group`` see :func:`dfed.models.layers.num_groups`.
    """
    small = use_cifar_stem(stem, input_shape)
    make_norm = norm_layer(norm)
    conv = torchvision_module("ops").Conv2dNormActivation
    inverted_residual = torchvision_module("models.mobilenetv2").InvertedResidual

    def conv_norm_relu6(num_inputs: int, num_outputs: int, kernel: int, stride: int) -> nn.Module:
        return conv(num_inputs, num_outputs, kernel, stride, norm_layer=make_norm, activation_layer=nn.ReLU6)

    units = [("stem", conv_norm_relu6(image_shape(input_shape)[0], 32, 3, 1 if small else 2))]
    num_inputs = 32
    for stage, (expansion, num_outputs, num_blocks, stage_stride) in enumerate(_STAGES):
        for index in range(num_blocks):
            stride = stage_stride if index == 0 and not (small and stage == 1) else 1
            block = inverted_residual(num_inputs, num_outputs, stride, expansion, norm_layer=make_norm)
            units.append((f"block{len(units) - 1}", block))
            num_inputs = num_outputs
    units.append(("last", conv_norm_relu6(num_inputs, _LAST, 1, 1)))
    head = OrderedDict(
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        dropout=Dropout(dropout),
        fc=nn.Linear(_LAST, num_classes),
    )
    units.append(("head", nn.Sequential(head)))
    return Chain(units, input_shape=input_shape, num_classes=num_classes, name="mobilenet_v2", init="vgg")
