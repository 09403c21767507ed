"""The auxiliary networks of local learning: small classifiers behind the units of a chain.

Of feature maps: a 3 × 3 convolution to f filters, a batch norm where the chain has one, ReLU, an average over 2 × 2 fields of
the image, a linear layer. Of tokens and vectors: the exit classifiers of :func:`dfed.blocks.depth.classifier`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from dfed.blocks.depth import classifier
from dfed.errors import ConfigError, Fault
from dfed.memory import predict_levels
from dfed.models import Chain

__all__ = ["Filters", "Heads", "filters_by", "has_filters", "head_filters", "local_head"]

Filters = Annotated[int, Field(ge=1, le=65536)]
"""How many filters the convolution of a head may have."""

Heads = Literal["scaled", "memory_matched", "classic"]
"""How the filters of a head follow from what it stands behind."""

_SAMPLES = 2
_FIELDS = 2  # of the image, in each direction


def has_filters(shape: tuple[int, ...]) -> bool:
    """Whether a head behind an output of this shape (without the batch) has a convolution."""
    return len(shape) == 3


def local_head(chain: Chain, stop: int, filters: int) -> nn.Module:
    """A classifier behind the first ``stop`` units, on the meta device: (batch, …) to (batch, num_classes).

    Args:
        filters: Of the convolution; no use for tokens and vectors.

    Raises:
        ConfigError: If the output of the last of these units is neither feature maps, nor tokens, nor a vector; names it.
    """
    shape = chain.output_shapes()[chain.unit_names[stop - 1]]
    if not has_filters(shape):
        return classifier(chain, stop)
    channels, height, width = shape
    normed = any(isinstance(module, nn.BatchNorm2d) for module in chain.modules())
    fields = (min(_FIELDS, height), min(_FIELDS, width))
    with torch.device("meta"):
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=nn.Conv2d(channels, filters, 3, padding=1, bias=not normed))
        if normed:
            layers["norm"] = nn.BatchNorm2d(filters)
        layers.update(relu=nn.ReLU(inplace=True), pool=_pool(height, width, fields), flatten=nn.Flatten(),
                      fc=nn.Linear(filters * fields[0] * fields[1], chain.num_classes))
    return nn.Sequential(layers)


def _pool(height: int, width: int, fields: tuple[int, int]) -> nn.Module:
    if height % fields[0] == 0 and width % fields[1] == 0:  # the same, and its gradient is deterministic on CUDA, too
        return nn.AvgPool2d((height // fields[0], width // fields[1]))
    return nn.AdaptiveAvgPool2d(fields)


def head_filters(chain: Chain, start: int, stop: int, heads: Heads, gamma: float, smallest: int, largest: int) -> int | None:
    """Filters of the head behind the units ``start`` to ``stop - 1``; None where it has no convolution.

    ``scaled``: γ · channels of the output, rounded down; ``memory_matched``: as many as keep no more activations for the
    backward pass than the units do; both within ``smallest`` and ``largest``. ``classic``: ``largest``.
    """
    shape = chain.output_shapes()[chain.unit_names[stop - 1]]
    if not has_filters(shape):
        return None
    if heads == "classic":
        return largest
    if heads == "scaled":
        wanted = int(gamma * shape[0])
    else:
        names = chain.unit_names[start:stop]
        before = chain.input_shape if start == 0 else chain.output_shapes()[chain.unit_names[start - 1]]
        whole = chain.skeleton()
        own = _kept(nn.Sequential(*(whole.unit(name) for name in names)), before)
        few, more = (_kept(local_head(chain, stop, count), shape) for count in (16, 32))
        slope = (more - few) / 16
        wanted = int((own - (few - 16 * slope)) / slope)
    return max(smallest, min(largest, wanted))


def filters_by(chain: Chain, heads: Heads, gamma: float, smallest_filters: int, largest_filters: int,
               ) -> Callable[[int, int], int | None]:
    """:func:`head_filters` as a function of the units ``start`` to ``stop`` alone.

    Raises:
        ConfigError: If ``smallest_filters`` is above ``largest_filters``.
    """
    if smallest_filters > largest_filters:
        message = f"must be at most `largest_filters` ({largest_filters}), but is {smallest_filters}."
        raise ConfigError([Fault("smallest_filters", message)])
    return functools.partial(head_filters, chain, heads=heads, gamma=gamma, smallest=smallest_filters, largest=largest_filters)


def _kept(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass, its output included, its input not."""
    def prepare() -> tuple[dict[str, Tensor], Tensor]:
        state = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in module.named_buffers()}
        state |= {name: torch.zeros(value.shape, requires_grad=True) for name, value in module.named_parameters()}
        return state, torch.empty(_SAMPLES, *shape)

    def work(prepared: tuple[dict[str, Tensor], Tensor]) -> Iterator[None]:
        state, x = prepared
        out = functional_call(module.train(), state, (x,))
        yield
        del out

    return max(predict_levels(prepare, work))
