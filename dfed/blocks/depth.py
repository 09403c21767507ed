"""Depth: prefixes of a chain, classifiers on the way, shortcuts past what is left out. What methods on depth are made of."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfed.errors import ConfigError, Fault
from dfed.models import Chain
from dfed.models.vit import VitHead

__all__ = ["ExitChain", "check_names", "classifier", "cut_points", "pad_to", "paddable"]


def cut_points(chain: Chain, num_depths: int, cuts: Sequence[str] | None = None) -> tuple[int, ...]:
    """How many units each depth has, ascending; the last depth is the whole chain.

    Only the body is cut, which is all units but the last, the classifier. Where the body has as many stretches of units
    with outputs of one shape, or else of one height and width, as there are depths, depths end with these; otherwise their
    numbers of units are as equal as can be. A body of fewer units has as many depths as units, and at least one. A first unit
    that makes tokens counts as one with the second, for its class token has not met the image yet.

    Args:
        num_depths: How many depths, at least 1.
        cuts: The last unit of each depth but the last, in order; then ``num_depths`` counts for nothing.

    Raises:
        ConfigError: If ``cuts`` names other than units before the last two, in the chain's order.
    """
    names, body = chain.unit_names, len(chain) - 1
    if cuts is not None:
        allowed = names[: max(0, body - 1)]
        if list(cuts) != [name for name in allowed if name in cuts]:
            known = ", ".join(allowed) or "it has none"
            message = f"must name units of '{chain.name}' that a depth before the last ends with, each once and in their order"
            raise ConfigError([Fault("cuts", f"{message}: {known}; but is {list(cuts)}.")])
        return (*(names.index(name) + 1 for name in cuts), len(chain))
    shapes = list(chain.output_shapes().values())[:body]
    joined = 1 if body > 1 and len(shapes[0]) == 2 else 0
    num_depths = max(1, min(num_depths, body - joined))
    for kinds in (shapes, [shape[1:] for shape in shapes]):
        lengths = [len(list(stretch)) for _, stretch in itertools.groupby(kinds)]
        if len(lengths) == num_depths:
            return (*itertools.accumulate(lengths[:-1]), len(chain))
    return (*(joined + number * (body - joined) // num_depths for number in range(1, num_depths)), len(chain))


def classifier(chain: Chain, stop: int) -> nn.Module:
    """A classifier behind the first ``stop`` units, on the meta device: (batch, …) to (batch, num_classes).

    Feature maps are averaged over the image, then come to a linear layer; of tokens the first, the class token, is
    normalised and comes to one; vectors come to one as they are.

    Raises:
        ConfigError: If the output of the last of these units is none of the three; names it.
    """
    unit = chain.unit_names[stop - 1]
    shape = chain.output_shapes()[unit]
    with torch.device("meta"):
        if len(shape) == 2:
            return VitHead(shape[1], chain.num_classes)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if len(shape) == 3:
            layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
        elif len(shape) != 1:
            message = f"must have feature maps, tokens or a vector as output for a classifier, but has {shape}."
            raise ConfigError([Fault(unit, message)])
        layers["fc"] = nn.Linear(shape[0], chain.num_classes)
    return nn.Sequential(layers)


def check_names(chain: Chain, names: Collection[str]) -> None:
    """Make sure that a method's own modules have names that the chain has no use for.

    Raises:
        ConfigError: If one is a unit's, or an attribute's.
    """
    taken = [name for name in names if name in chain.unit_names or hasattr(chain, name)]
    if taken:
        message = f"must have no unit called {' or '.join(taken)}, which this method's own modules are called."
        raise ConfigError([Fault("model", message)])


class ExitChain(Chain):
    """The first units of a chain with exits on the way, each a classifier behind some unit; on the meta device.

    In training mode it returns the scores (batch, num_classes) of all exits as a list, the first exit first; in evaluation
    mode their mean. The chain's own classifier, where it is among the units, is the last exit.

    Args:
        chain: The full model; left as it is.
        stop: How many of its units.
        exits: Name, number of units before it, and module, in that order; copied.
    """

    def __init__(self, chain: Chain, stop: int, exits: Sequence[tuple[str, int, nn.Module]]):
        whole = chain.skeleton()
        units = [(name, whole.unit(name)) for name in chain.unit_names[:stop]]
        super().__init__(units, input_shape=chain.input_shape, num_classes=chain.num_classes, name=chain.name,
                         init=chain.init_scheme)
        self._has_head = stop == len(chain)
        self._exits = tuple((name, place) for name, place, _ in exits)
        for name, _, module in exits:
            self.add_module(name, copy.deepcopy(module))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:  # type: ignore[override]
        scores, start = [], 0
        for name, place in self._exits:
            x, start = self.run(x, start, place), place
            scores.append(self.get_submodule(name)(x))
        if self._has_head:
            scores.append(self.run(x, start))
        return scores if self.training else torch.stack(scores).mean(dim=0)


def paddable(here: tuple[int, ...], there: tuple[int, ...]) -> bool:
    """Whether :func:`pad_to` knows a way from samples of the one shape to samples of the other."""
    if here == there:
        return True
    if len(here) == len(there) == 2:
        return here[0] == there[0]
    return (len(here), len(there)) in {(3, 3), (3, 1), (1, 1)}


def pad_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A shortcut without parameters: (batch, …) to (batch, *shape).

    Feature maps are averaged over neighbouring pixels to the new height and width, or over the image where a vector is
    wanted. Channels that are missing are zero, and come last; channels that are too many are averaged over neighbours. So
    for vectors, and for each token.

    Args:
        x: With samples that are :func:`paddable` to ``shape``.
    """
    here = tuple(x.shape[1:])
    if here == tuple(shape):
        return x
    assert paddable(here, tuple(shape)), f"{here} cannot be padded to {shape}"
    if len(here) == 3 and len(shape) == 1:
        return _fit(x.mean(dim=(2, 3)), 1, shape[0])
    if len(here) == 3:
        x = _resized(x, tuple(shape[1:]))
    return _fit(x, 1 if len(here) == 3 else len(here), shape[0] if len(here) == 3 else shape[-1])


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Feature maps of this height and width."""
    before = tuple(x.shape[2:])
    if before == size:
        return x
    if all(old % new == 0 for old, new in zip(before, size, strict=True)):  # its gradient is deterministic on CUDA, too
        return F.avg_pool2d(x, [old // new for old, new in zip(before, size, strict=True)])
    return F.adaptive_avg_pool2d(x, size)


def _fit(x: Tensor, dim: int, size: int) -> Tensor:
    """``x`` with ``size`` entries along ``dim``: zeros behind, or means of neighbours."""
    if x.shape[dim] <= size:
        behind = x.new_zeros(*x.shape[:dim], size - x.shape[dim], *x.shape[dim + 1 :])
        return torch.cat([x, behind], dim) if behind.numel() else x
    moved = x.movedim(dim, -1)
    return F.adaptive_avg_pool1d(moved.reshape(1, -1, moved.shape[-1]), size).reshape(*moved.shape[:-1], size).movedim(-1, dim)
