"""The multi-layer perceptron."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from dfed.models.chain import Chain
from dfed.models.layers import Count

__all__ = ["mlp"]


def mlp(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    hidden: list[Count] = [200, 200],  # noqa: B006 - read only; a list is what a config can say
) -> Chain:
    """Multi-layer perceptron with ReLU; the default is the 2NN of McMahan et al. (2017).

    Units: ``hidden0`` … one per hidden layer, ``head``. The first flattens its input.

    Args:
        input_shape: Shape of one sample, any.
        num_classes: Number of classes.
        hidden: Widths of the hidden layers; empty for softmax regression.
    """
    size = math.prod(input_shape)
    units: list[tuple[str, nn.Module]] = []
    for index, width in enumerate(hidden):
        layers = OrderedDict(flatten=nn.Flatten()) if index == 0 else OrderedDict()
        layers.update(fc=nn.Linear(size, width), relu=nn.ReLU(inplace=True))
        units.append((f"hidden{index}", nn.Sequential(layers)))
        size = width
    units.append(("head", nn.Sequential(OrderedDict(flatten=nn.Flatten(), fc=nn.Linear(size, num_classes)))))
    return Chain(units, input_shape=input_shape, num_classes=num_classes, name="mlp")
