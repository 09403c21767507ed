"""Stages: a chain up to some block, ending in layers of its own. What a client of progressive training holds and trains.

The pieces are those of NeuLite (Wu et al. 2024, arXiv:2408.10826): the frozen blocks before, a tail of the block just
before that is trained along, the block itself, and an *output module* that stands in for the blocks that are not there
yet: one light layer for each, then a classifier. Unfrozen tensors keep the names that they have in the full chain.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from dfed.blocks.splitting import Splitting
from dfed.errors import ConfigError, Fault
from dfed.models import Chain
from dfed.models.layers import torchvision_module

__all__ = ["cut", "output_module", "stage", "tail_parameters", "train_only"]

_SHORTCUTS = ("downsample", "shortcut")
_HEAD_WIDTH = 64  # of an attention head in an output module's encoder layer, as in ViT


def cut(chain: Chain, start: str | int | None = None, stop: str | int | None = None,
        end: Sequence[tuple[str, nn.Module]] = ()) -> Chain:
    """The units from ``start`` up to and not including ``stop`` as a chain by itself, on the meta device.

    Args:
        chain: The full model; left as it is.
        start, stop: Units by name or index, as for :meth:`Chain.run`.
        end: Units that follow, name and module.

    Raises:
        UnknownName: If a unit does not exist.
        ConfigError: If nothing is left, or a unit of ``end`` has the name of another.
    """
    names, whole = chain.unit_names, chain.skeleton()
    first = 0 if start is None else chain.index_of(start)
    last = len(names) if stop is None else chain.index_of(stop)
    shape = chain.input_shape if first == 0 else chain.output_shapes()[names[first - 1]]
    units = [(name, whole.unit(name)) for name in names[first:last]]
    return Chain([*units, *end], input_shape=shape, num_classes=chain.num_classes, name=chain.name, init=chain.init_scheme)


def stage(chain: Chain, splitting: Splitting, index: int, *, tail: bool = True) -> Chain:
    """Stage ``index`` of progressive training over the blocks of ``splitting``, on the meta device.

    It holds the blocks up to and including block ``index``, and an output module (one unit ``output_<block>``) unless it is
    the last. Trained are block ``index``, the output module and, with ``tail``, the :func:`tail_parameters` of the unit
    before the block; all else asks for no gradient.

    Args:
        chain: The full model; left as it is.
        splitting: Blocks that cover the chain; the last one holds the chain's last unit, the classifier.
        index: The block, from 0.
        tail: Whether the tail of the block before is trained too.
    """
    blocks = list(splitting.blocks.items())
    name, units = blocks[index]
    stop = chain.index_of(units[-1]) + 1
    end = []
    if index + 1 < len(blocks):
        end.append((f"output_{name}", output_module(chain, [later for _, later in blocks[index:]])))
    model = cut(chain, stop=stop, end=end)
    trained = [*units, *(unit for unit, _ in end)]
    start = chain.index_of(units[0])
    also = tail_parameters(model, chain.unit_names[start - 1]) if tail and start else ()
    train_only(model, trained, also)
    return model


def train_only(model: Chain, units: Sequence[str], also: Sequence[str] = ()) -> None:
    """Let the parameters of ``units`` and the parameters called ``also`` ask for gradients, and no others."""
    for name in units:
        model.unit(name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in units or name in also)


def tail_parameters(chain: Chain, unit: str) -> tuple[str, ...]:
    """Names of the parameters of a unit's last convolution or linear layer on the main path, and of the norms after it."""
    layers = [
        (name, module) for name, module in chain.unit(unit).named_modules()
        if not any(part in _SHORTCUTS for part in name.split(".")) and list(module.parameters(recurse=False))
    ]
    weighted = [number for number, (_, module) in enumerate(layers) if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))]
    if not weighted:
        return ()
    return tuple(
        ".".join(filter(None, (unit, name, own)))
        for name, module in layers[weighted[-1]:] for own, _ in module.named_parameters(recurse=False)
    )


def output_module(chain: Chain, blocks: Sequence[Sequence[str]]) -> nn.Sequential:
    """What stands in for the blocks ``blocks[1:]`` behind block ``blocks[0]``, on the meta device: it ends in class scores.

    For each block, one layer from the shape of its input to that of its output: for feature maps a 3 × 3 convolution
    (stride as the block's, no bias, no norm, no activation), for tokens an encoder layer whose MLP is as narrow as a
    token, for vectors a linear layer. Then a copy of the chain's last unit.

    Args:
        blocks: The units of the block that the module follows, and those of the blocks that come after it. The last block
            ends with the chain's last unit, which is no part of what is stood in for.

    Raises:
        ConfigError: If a block changes the width of tokens.
    """
    shapes, head = chain.output_shapes(), chain.unit_names[-1]
    here = shapes[blocks[0][-1]]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.device("meta"):
        for number, units in enumerate(blocks[1:]):
            body = [unit for unit in units if unit != head]
            if body:
                layers[f"step{number}"] = _step(body[-1], here, shapes[body[-1]])
                here = shapes[body[-1]]
    layers["head"] = copy.deepcopy(chain.skeleton().unit(head))
    for parameter in layers["head"].parameters():
        parameter.requires_grad_(True)
    return nn.Sequential(layers)


def _step(unit: str, here: tuple[int, ...], there: tuple[int, ...]) -> nn.Module:
    """One light layer from samples of shape ``here`` to samples of shape ``there``."""
    if len(here) == len(there) == 3:
        strides = [math.ceil(before / after) for before, after in zip(here[1:], there[1:], strict=True)]
        conv = nn.Conv2d(here[0], there[0], 3, tuple(strides), padding=1, bias=False)
        reached = tuple(math.ceil(size / stride) for size, stride in zip(here[1:], strides, strict=True))
        return conv if reached == there[1:] else nn.Sequential(conv, nn.AdaptiveAvgPool2d(there[1:]))
    if len(here) == 3 and len(there) == 1:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(here[0], there[0], bias=False))
    if len(here) == len(there) == 1:
        return nn.Linear(here[0], there[0], bias=False)
    if len(here) == 2 and here == there:
        heads = max(1, here[1] // _HEAD_WIDTH)
        heads = heads if here[1] % heads == 0 else 1
        return torchvision_module("models.vision_transformer").EncoderBlock(heads, here[1], here[1], 0.0, 0.0)
    message = f"must keep the shape of its tokens, so that a layer can stand in for it, but turns {here} into {there}."
    raise ConfigError([Fault(unit, message)])
