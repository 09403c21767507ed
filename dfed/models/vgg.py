"""The networks of Simonyan and Zisserman (2015) with normalisation, as in torchvision."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from dfed.errors import ConfigError, Fault
from dfed.models.chain import Chain
from dfed.models.layers import Dropout, Norm, image_shape, norm_layer

__all__ = ["vgg11_bn", "vgg16_bn", "vgg19_bn"]

Classifier = Literal["small", "torchvision"]

_WIDTHS = (64, 128, 256, 512, 512)
_SMALLEST = 2 ** len(_WIDTHS)  # pixels: each stage ends in a pooling that halves the image


def vgg11_bn(
    *, input_shape: tuple[int, ...], num_classes: int, classifier: Classifier = "small", norm: Norm = "batch"
) -> Chain:
    """VGG-11 of torchvision with normalisation, and a small classifier.

    Units: ``conv1_0`` … one per convolution with its norm, ReLU and pooling (named by stage and place), ``head``. With
    ``classifier`` = ``torchvision`` and ``norm`` = ``batch`` it computes what torchvision's model computes, to the bit.

    Args:
        input_shape: (channels, height, width), at least 32 × 32 pixels.
        num_classes: Number of classes.
        classifier: ``small``: average over the image and one linear layer, as is usual on CIFAR. ``torchvision``: three
            linear layers with dropout 0.5 behind a 7 × 7 pooling (120 million parameters; torch has no deterministic
            CUDA kernel for the gradient of that pooling).
        norm: For ``group`` see :func:`dfed.models.layers.num_groups`.
    """
    return _vgg("vgg11_bn", (1, 1, 2, 2, 2), input_shape, num_classes, classifier, norm)


def vgg16_bn(
    *, input_shape: tuple[int, ...], num_classes: int, classifier: Classifier = "small", norm: Norm = "batch"
) -> Chain:
    """VGG-16 of torchvision with normalisation, and a small classifier.

    Units and arguments as for :func:`vgg11_bn`.
    """
    return _vgg("vgg16_bn", (2, 2, 3, 3, 3), input_shape, num_classes, classifier, norm)


def vgg19_bn(
    *, input_shape: tuple[int, ...], num_classes: int, classifier: Classifier = "small", norm: Norm = "batch"
) -> Chain:
    """VGG-19 of torchvision with normalisation, and a small classifier.

    Units and arguments as for :func:`vgg11_bn`.
    """
    return _vgg("vgg19_bn", (2, 2, 4, 4, 4), input_shape, num_classes, classifier, norm)


def _vgg(
    name: str,
    convs_per_stage: tuple[int, ...],
    input_shape: tuple[int, ...],
    num_classes: int,
    classifier: Classifier,
    norm: Norm,
) -> Chain:
    num_inputs, height, width = image_shape(input_shape)
    if min(height, width) < _SMALLEST:
        message = f"must be at least {_SMALLEST} pixels high and wide (five poolings halve it), but is {input_shape}."
        raise ConfigError([Fault("input_shape", message)])
    units: list[tuple[str, nn.Module]] = []
    for stage, (num_convs, num_outputs) in enumerate(zip(convs_per_stage, _WIDTHS, strict=True), start=1):
        for index in range(num_convs):
            layers: OrderedDict[str, nn.Module] = OrderedDict(
                conv=nn.Conv2d(num_inputs, num_outputs, 3, padding=1),
                norm=norm_layer(norm)(num_outputs),
                relu=nn.ReLU(inplace=True),
            )
            if index == num_convs - 1:
                layers["pool"] = nn.MaxPool2d(2)
            units.append((f"conv{stage}_{index}", nn.Sequential(layers)))
            num_inputs = num_outputs
    units.append(("head", _head(classifier, num_inputs, num_classes)))
    return Chain(units, input_shape=input_shape, num_classes=num_classes, name=name, init="vgg")


def _head(classifier: Classifier, num_inputs: int, num_classes: int) -> nn.Sequential:
    if classifier == "small":
        head = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(num_inputs, num_classes))
        return nn.Sequential(head)
    return nn.Sequential(
        OrderedDict(
            pool=nn.AdaptiveAvgPool2d(7),
            flatten=nn.Flatten(),
            fc0=nn.Linear(num_inputs * 49, 4096),
            relu0=nn.ReLU(inplace=True),
            dropout0=Dropout(0.5),
            fc1=nn.Linear(4096, 4096),
            relu1=nn.ReLU(inplace=True),
            dropout1=Dropout(0.5),
            fc=nn.Linear(4096, num_classes),
        )
    )
