"""The small residual networks that He et al. (2016, section 4.2) made for CIFAR-10.

Depth 6n + 2: a 3 × 3 convolution, three stages of n blocks at full, half and quarter resolution with w, 2w and 4w
channels, and a linear layer. Shortcuts have no parameters (option A): where a stage begins, every second pixel is taken
and the new channels are zero. The zeros come last, so channel i stays channel i, also in a narrower copy of the model.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from dfed.models.chain import Chain
from dfed.models.layers import Count, Norm, image_shape, norm_layer, torchvision_module

__all__ = ["PadShortcut", "resnet8", "resnet20", "resnet56"]


class PadShortcut(nn.Module):
    """Option A of He et al.: (batch, c, h, w) to (batch, c + ``num_new``, ⌈h/2⌉, ⌈w/2⌉), without parameters."""

    def __init__(self, num_new: int):
        super().__init__()
        self.num_new = num_new

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.num_new))

    def extra_repr(self) -> str:
        return f"num_new={self.num_new}"


def resnet8(*, input_shape: tuple[int, ...], num_classes: int, width: Count = 16, norm: Norm = "batch") -> Chain:
    """ResNet-8 for CIFAR: 3 blocks of two convolutions (He et al. 2016, n = 1).

    Units: ``stem``, ``layer1_0``, ``layer2_0``, ``layer3_0``, ``head``.

    Args:
        input_shape: (channels, height, width).
        num_classes: Number of classes.
        width: Channels of the first stage; the others have twice and four times as many.
        norm: For ``group`` see :func:`dfed.models.layers.num_groups`.
    """
    return _cifar_resnet("resnet8", 1, input_shape, num_classes, width, norm)


def resnet20(*, input_shape: tuple[int, ...], num_classes: int, width: Count = 16, norm: Norm = "batch") -> Chain:
    """ResNet-20 for CIFAR: 9 blocks of two convolutions (He et al. 2016, n = 3).

    Units and arguments as for :func:`resnet8`, with three blocks a stage.
    """
    return _cifar_resnet("resnet20", 3, input_shape, num_classes, width, norm)


def resnet56(*, input_shape: tuple[int, ...], num_classes: int, width: Count = 16, norm: Norm = "batch") -> Chain:
    """ResNet-56 for CIFAR: 27 blocks of two convolutions (He et al. 2016, n = 9).

    Units and arguments as for :func:`resnet8`, with nine blocks a stage.
    """
    return _cifar_resnet("resnet56", 9, input_shape, num_classes, width, norm)


def _cifar_resnet(
    name: str, blocks_per_stage: int, input_shape: tuple[int, ...], num_classes: int, width: int, norm: Norm
) -> Chain:
    basic_block = torchvision_module("models.resnet").BasicBlock
    make_norm = norm_layer(norm)
    stem = OrderedDict(
        conv=nn.Conv2d(image_shape(input_shape)[0], width, 3, padding=1, bias=False),
        norm=make_norm(width),
        relu=nn.ReLU(inplace=True),
    )
    units: list[tuple[str, nn.Module]] = [("stem", nn.Sequential(stem))]
    num_inputs = width
    for stage in range(3):
        planes = width * 2**stage
        for index in range(blocks_per_stage):
            reduces = stage > 0 and index == 0
            shortcut = PadShortcut(planes - num_inputs) if reduces else None
            block = basic_block(num_inputs, planes, 2 if reduces else 1, shortcut, norm_layer=make_norm)
            units.append((f"layer{stage + 1}_{index}", block))
            num_inputs = planes
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(num_inputs, num_classes))
    units.append(("head", nn.Sequential(head)))
    return Chain(units, input_shape=input_shape, num_classes=num_classes, name=name, init="resnet")
