"""The small convolutional network of the first papers on federated learning."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from dfed.errors import ConfigError, Fault
from dfed.models.chain import Chain
from dfed.models.layers import Count, Dropout, Probability, image_shape, norm_layer

__all__ = ["cnn"]


def cnn(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    channels: Annotated[list[Count], Field(min_length=1)] = [32, 64],  # noqa: B006 - read only
    kernel: Count = 5,
    hidden: Count = 512,
    padding: Literal["same", "valid"] = "same",
    pool: Literal["each", "last"] = "each",
    dropout: Annotated[list[Probability], Field(min_length=2, max_length=2)] = [0.0, 0.0],  # noqa: B006 - read only
    norm: Literal["none", "batch", "group"] = "none",
) -> Chain:
    """Convolutions, one hidden layer, one linear layer; the default is the CNN of McMahan et al. (2017).

    The CIFAR-10 CNN of pfl-research is ``kernel: 3, hidden: 128, padding: valid, pool: last, dropout: [0.25, 0.5]``.
    Units: ``conv0`` … one per convolution with its norm, ReLU and pooling; ``hidden``; ``head``.

    Args:
        input_shape: (channels, height, width).
        num_classes: Number of classes.
        channels: Output channels of each convolution (stride 1).
        kernel: Height and width of the kernels in pixels; odd where ``padding`` is ``"same"``.
        hidden: Width of the hidden layer.
        padding: Zeros around the image so that it keeps its size, or none.
        pool: 2 × 2 max-pooling after each convolution, or after the last only.
        dropout: Probabilities after the last pooling, and after the hidden layer.
        norm: Before each ReLU of a convolution, which then has no bias; for ``group`` see
            :func:`dfed.models.layers.num_groups`.
    """
    num_inputs, height, width = image_shape(input_shape)
    if padding == "same" and kernel % 2 == 0:
        raise ConfigError([Fault("kernel", f"must be odd where `padding` is 'same', but is {kernel}.")])
    margin = kernel // 2 if padding == "same" else 0
    units: list[tuple[str, nn.Module]] = []
    for index, num_outputs in enumerate(channels):
        is_last = index == len(channels) - 1
        conv = nn.Conv2d(num_inputs, num_outputs, kernel, padding=margin, bias=norm == "none")
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
        if norm != "none":
            layers["norm"] = norm_layer(norm)(num_outputs)
        layers["relu"] = nn.ReLU(inplace=True)
        height, width = (size + 2 * margin - kernel + 1 for size in (height, width))
        if pool == "each" or is_last:
            layers["pool"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
        if is_last and dropout[0] > 0:
            layers["dropout"] = Dropout(dropout[0])
        units.append((f"conv{index}", nn.Sequential(layers)))
        num_inputs = num_outputs
        if height < 1 or width < 1:
            message = f"must be large enough for {len(channels)} convolutions of {kernel} × {kernel} pixels "
            message += f"(`padding` '{padding}', `pool` '{pool}'), but is {input_shape}: conv{index} leaves nothing."
            raise ConfigError([Fault("input_shape", message)])
    fc = nn.Linear(num_inputs * height * width, hidden)
    layers = OrderedDict(flatten=nn.Flatten(), fc=fc, relu=nn.ReLU(inplace=True))
    if dropout[1] > 0:
        layers["dropout"] = Dropout(dropout[1])
    units.append(("hidden", nn.Sequential(layers)))
    units.append(("head", nn.Sequential(OrderedDict(fc=nn.Linear(hidden, num_classes)))))
    return Chain(units, input_shape=input_shape, num_classes=num_classes, name="cnn")
