"""Width sub-models: a chain that keeps some channels of every layer, and where they lie in the full model.

The channels that a layer puts out are a *group*. One choice of kept channels holds for a whole group: for all layers that
add to one residual stream, for a depthwise convolution and what feeds it, for the norm behind a convolution. Concatenated
channels keep the choice of each part. Flattened feature maps keep the pixels of the channels that are kept. Attention keeps
all heads and some dimensions of each, the same ones of queries, keys and values. The input and the class scores stay whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from dfed.blocks.narrowing import Kept, Narrowing, Picker, all_of
from dfed.blocks.width_rules import RULES
from dfed.models import Chain
from dfed.region import Region, region_of

__all__ = ["SubModel", "inside", "narrow", "prefix", "random_channels", "scale_activations", "window"]


@dataclass(frozen=True)
class SubModel:
    """A narrower copy of a chain.

    Attributes:
        chain: On the meta device; its tensors bear the names that they have in the full chain.
        regions: The part of each of the full chain's tensors that it holds, by name; floating-point tensors only.
        axes: What is kept along each leading dimension (ascending; None: all) of the tensors that it holds a part of.
    """

    chain: Chain
    regions: dict[str, Region]
    axes: Mapping[str, Sequence[np.ndarray | None]]


def prefix(name: str, size: int, count: int) -> np.ndarray:
    """The first channels of every group, as in HeteroFL: narrower models lie inside wider ones."""
    return np.arange(count)


def window(start: int) -> Picker:
    """``count`` channels from ``start`` (modulo the group's size) on, wrapping around, as in FedRolex."""
    def pick(name: str, size: int, count: int) -> np.ndarray:
        return np.sort((start + np.arange(count)) % size)

    return pick


def random_channels(draw: Callable[[str], np.random.Generator]) -> Picker:
    """Channels drawn at random, as in Federated Dropout. ``draw`` gives the generator of the group of this name."""
    def pick(name: str, size: int, count: int) -> np.ndarray:
        return np.sort(draw(name).choice(size, count, replace=False))

    return pick


def narrow(chain: Chain, rate: float, pick: Picker = prefix, *, classes: np.ndarray | None = None) -> SubModel:
    """The sub-model of ``chain`` that keeps ⌈rate · n⌉ of the n channels of every group.

    Args:
        chain: The full model; left as it is.
        rate: In (0, 1]. At 1 the sub-model is the full model.
        pick: Which channels of a group: from its name (the path of the layer that puts it out), its size and the number to
            keep to that many indices, ascending, distinct, ``int64``.
        classes: Classes that the sub-model has scores for, ascending; None: all.

    Raises:
        ConfigError: If a layer is not one of those whose channels are known; names it, and says why.
    """
    assert 0 < rate <= 1, f"rate must be above 0 and at most 1, not {rate}"
    whole, copy = chain.state_dict(), chain.skeleton()
    copy._shapes = None
    narrowing = Narrowing(rate, pick, RULES, heads=_heads(copy))
    kept = all_of(chain.input_shape[0])
    scores = all_of(chain.num_classes) if classes is None else Kept(classes, chain.num_classes)
    copy.num_classes = len(scores)
    for name in copy.unit_names:
        target = scores if name == copy.unit_names[-1] else None
        kept = narrowing.layer(copy.unit(name), name, kept, target)
    regions = {
        name: region_of(narrowing.axes.get(name, ()), tensor.shape)
        for name, tensor in whole.items() if tensor.is_floating_point()
    }
    return SubModel(copy, regions, narrowing.axes)


def inside(inner: SubModel, outer: SubModel) -> dict[str, Region]:
    """Where the tensors of ``inner`` lie in those of ``outer``, a sub-model of the same chain that holds all of them."""
    whole = {name: tensor.shape for name, tensor in outer.chain.state_dict().items()}
    found = {}
    for name in inner.regions:
        axes = [
            small if small is None or large is None else np.searchsorted(large, small)
            for small, large in itertools.zip_longest(inner.axes.get(name, ()), outer.axes.get(name, ()))
        ]
        found[name] = region_of(axes, whole[name])
    return found


def _heads(chain: Chain) -> int:
    """How many attention heads share the residual stream of a chain; 1 without attention."""
    return math.lcm(*(module.num_heads for module in chain.modules() if isinstance(module, nn.MultiheadAttention)), 1)


def scale_activations(chain: Chain, rate: float) -> None:
    """HeteroFL's Scaler, in place: in training, what a convolution or linear layer puts out is divided by ``rate``.

    So that channels trained in narrow models have the size that they have in wide ones. The last layer, whose outputs are
    the class scores, and attention are left alone. No memory is taken: the division is done in place.
    """
    if rate == 1:
        return
    layers = [module for module in chain.modules() if isinstance(module, (nn.Conv2d, nn.Linear)) and _is_called(module)]
    for layer in layers[:-1]:
        layer.register_forward_hook(_Scaler(rate))


def _is_called(module: nn.Module) -> bool:
    return type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear  # attention uses its weight only


class _Scaler:
    """A forward hook that divides by ``rate`` in training."""

    def __init__(self, rate: float):
        self._rate = rate

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return output.div_(self._rate) if module.training else None
