"""The densely connected network that Huang et al. (2017) made for CIFAR."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from dfed.models.chain import Chain
from dfed.models.layers import Norm, image_shape, norm_layer

__all__ = ["DenseLayer", "densenet40"]

_GROWTH = 12
_STEM = 16
_BLOCKS = 3
_LAYERS = 12  # in each dense block; depth is 3 · 12 + 4 = 40


class DenseLayer(nn.Module):
    """Norm, ReLU, 3 × 3 convolution: (batch, c, h, w) to (batch, c + growth, h, w), the input first."""

    def __init__(self, num_inputs: int, growth: int, norm: Norm):
        super().__init__()
        self.norm = norm_layer(norm)(num_inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], dim=1)


def densenet40(*, input_shape: tuple[int, ...], num_classes: int, norm: Norm = "batch") -> Chain:
    """DenseNet-40 for CIFAR: growth 12, three blocks of 12 layers, no bottleneck (Huang et al. 2017).

    Units: ``stem``, ``block1_0`` … ``block3_11`` (one per dense layer, which passes its input on beside its output),
    ``transition1`` and ``transition2`` (1 × 1 convolution and 2 × 2 average pooling, no compression), ``head``.

    Args:
        input_shape: (channels, height, width).
        num_classes: Number of classes.
        norm: For ``group`` see :func:`dfed.models.layers.num_groups`.
    """
    make_norm = norm_layer(norm)
    stem = nn.Conv2d(image_shape(input_shape)[0], _STEM, 3, padding=1, bias=False)
    units: list[tuple[str, nn.Module]] = [("stem", nn.Sequential(OrderedDict(conv=stem)))]
    channels = _STEM
    for block in range(1, _BLOCKS + 1):
        for index in range(_LAYERS):
            units.append((f"block{block}_{index}", DenseLayer(channels, _GROWTH, norm)))
            channels += _GROWTH
        tail: OrderedDict[str, nn.Module] = OrderedDict(norm=make_norm(channels), relu=nn.ReLU(inplace=True))
        if block < _BLOCKS:
            tail.update(conv=nn.Conv2d(channels, channels, 1, bias=False), pool=nn.AvgPool2d(2))
            units.append((f"transition{block}", nn.Sequential(tail)))
        else:
            tail.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, num_classes))
            units.append(("head", nn.Sequential(tail)))
    return Chain(units, input_shape=input_shape, num_classes=num_classes, name="densenet40", init="densenet")
