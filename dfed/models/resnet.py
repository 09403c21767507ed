"""The residual networks of He et al. (2016) for ImageNet, made of torchvision's own blocks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from dfed.models.chain import Chain
from dfed.models.layers import Norm, Stem, image_shape, norm_layer, torchvision_module, use_cifar_stem

__all__ = ["resnet18", "resnet34", "resnet50"]


def resnet18(*, input_shape: tuple[int, ...], num_classes: int, stem: Stem = "auto", norm: Norm = "batch") -> Chain:
    """ResNet-18 of torchvision, with a stem for small images.

    Units: ``stem``, one per residual block (``layer1_0`` …), ``head`` (pooling and linear layer). With ``stem`` =
    ``imagenet`` and ``norm`` = ``batch`` it computes what ``torchvision.models.resnet18`` computes, to the bit.

    Args:
        input_shape: (channels, height, width).
        num_classes: Number of classes.
        stem: ``imagenet``: 7 × 7 convolution of stride 2 and max-pooling. ``cifar``: 3 × 3 convolution of stride 1, no
            pooling. ``auto``: ``cifar`` for images below 64 pixels.
        norm: For ``group`` see :func:`dfed.models.layers.num_groups`.
    """
    return _resnet("resnet18", "BasicBlock", (2, 2, 2, 2), input_shape, num_classes, stem, norm)


def resnet34(*, input_shape: tuple[int, ...], num_classes: int, stem: Stem = "auto", norm: Norm = "batch") -> Chain:
    """ResNet-34 of torchvision, with a stem for small images.

    Units and arguments as for :func:`resnet18`.
    """
    return _resnet("resnet34", "BasicBlock", (3, 4, 6, 3), input_shape, num_classes, stem, norm)


def resnet50(*, input_shape: tuple[int, ...], num_classes: int, stem: Stem = "auto", norm: Norm = "batch") -> Chain:
    """ResNet-50 of torchvision (stride in the 3 × 3 convolution), with a stem for small images.

    Units and arguments as for :func:`resnet18`.
    """
    return _resnet("resnet50", "Bottleneck", (3, 4, 6, 3), input_shape, num_classes, stem, norm)


def _resnet(
    name: str,
    block_name: str,
    blocks_per_stage: tuple[int, ...],
    input_shape: tuple[int, ...],
    num_classes: int,
    stem: Stem,
    norm: Norm,
) -> Chain:
    block = getattr(torchvision_module("models.resnet"), block_name)
    make_norm = norm_layer(norm)
    units: list[tuple[str, nn.Module]] = [("stem", _stem(input_shape, stem, norm))]
    num_inputs = 64
    for stage, num_blocks in enumerate(blocks_per_stage):
        planes = 64 * 2**stage
        num_outputs = planes * block.expansion
        for index in range(num_blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            shortcut = None
            if stride != 1 or num_inputs != num_outputs:
                shortcut = nn.Sequential(
                    nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False), make_norm(num_outputs)
                )
            units.append(
                (f"layer{stage + 1}_{index}", block(num_inputs, planes, stride, shortcut, norm_layer=make_norm))
            )
            num_inputs = num_outputs
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(num_inputs, num_classes))
    units.append(("head", nn.Sequential(head)))
    return Chain(units, input_shape=input_shape, num_classes=num_classes, name=name, init="resnet")


def _stem(input_shape: tuple[int, ...], stem: Stem, norm: Norm) -> nn.Sequential:
    num_inputs = image_shape(input_shape)[0]
    small = use_cifar_stem(stem, input_shape)
    kernel, stride = (3, 1) if small else (7, 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(num_inputs, 64, kernel, stride, padding=kernel // 2, bias=False),
        norm=norm_layer(norm)(64),
        relu=nn.ReLU(inplace=True),
    )
    if not small:
        layers["pool"] = nn.MaxPool2d(3, 2, padding=1)
    return nn.Sequential(layers)
