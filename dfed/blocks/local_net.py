"""A chain cut into layers that are trained each by a loss of its own, and the models that this makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfed.blocks.depth import check_names
from dfed.blocks.local_heads import local_head
from dfed.errors import ConfigError, Fault
from dfed.models import Chain, materialise

__all__ = ["LocalBlock", "LocalLayer", "LocalNet", "exit_name"]


@dataclass(frozen=True)
class LocalLayer:
    """What one loss trains.

    Attributes:
        start, stop: The chain's units from ``start`` up to and not including ``stop``; as a rule one.
        head: Name of the head behind them.
        filters: Of the head's convolution; None if it has none of these, as the last layer's, which is the chain's last unit.
    """

    start: int
    stop: int
    head: str
    filters: int | None


def exit_name(layer: int) -> str:
    """What the model that ends with a layer (from 0) is called among the variants, and the layer's steps among the steps."""
    return f"exit {layer + 1}"


class LocalNet:
    """A chain whose body is cut into layers with a head behind each; nothing has storage.

    A layer is a unit. Units without parameters belong to the one before (at the start of the chain: the one behind), and a
    first unit that makes tokens to the second: the class token, at which a head looks, has met no image before.

    Args:
        filters_of: From a layer's first unit and the end of its last one to the filters of its head.

    Attributes:
        chain: As given.
        layers: Front to back.

    Raises:
        ConfigError: If the chain has one unit in all, or an output that no head can take.
    """

    def __init__(self, chain: Chain, filters_of: Callable[[int, int], int | None]):
        self.chain = chain
        bounds = list(_bounds(chain))
        check_names(chain, [f"local{number + 1}" for number in range(len(bounds) - 1)])
        layers, self._heads = [], list[nn.Module]()
        for number, (start, stop) in enumerate(bounds[:-1]):
            filters = filters_of(start, stop)
            layers.append(LocalLayer(start, stop, f"local{number + 1}", filters))
            self._heads.append(local_head(chain, stop, filters or 0))
        layers.append(LocalLayer(*bounds[-1], chain.unit_names[-1], None))
        self.layers = tuple(layers)

    def shape_before(self, unit: int) -> tuple[int, ...]:
        """Of a sample that the unit at this place takes."""
        return self.chain.output_shapes()[self.chain.unit_names[unit - 1]] if unit else self.chain.input_shape

    def head(self, layer: int) -> nn.Module:
        """The head of a layer, a module of its own."""
        if layer == len(self.layers) - 1:
            return self.chain.skeleton().unit(self.chain.unit_names[-1])
        return copy.deepcopy(self._heads[layer])

    def layer_model(self, layer: int) -> Chain:
        """A layer and its head: what one local step trains."""
        return self._chain(self.layers[layer].start, layer)

    def exit_model(self, layer: int) -> Chain:
        """All up to a layer, and its head. That of the last layer computes the chain."""
        return self._chain(0, layer)

    def block_model(self, first: int, stop: int) -> LocalBlock:
        """The layers from ``first`` up to and not including ``stop`` with all their heads."""
        return LocalBlock(self, first, stop)

    def frozen(self, start: int, stop: int) -> Chain:
        """The units from ``start`` up to and not including ``stop``, by themselves."""
        whole = self.chain.skeleton()
        return self._made([(name, whole.unit(name)) for name in self.chain.unit_names[start:stop]], start)

    def first_heads(self, generator_of: Callable[[str], torch.Generator]) -> dict[str, Tensor]:
        """First values of all heads' tensors but the last one's, by name; each head has a generator of its own."""
        found: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers[:-1]):
            single = self._made([(layer.head, self.head(number))], layer.stop)
            drawn = materialise(single, generator_of(layer.head))
            found |= {name: value.detach() for name, value in drawn.state_dict().items()}
        return found

    def _chain(self, start: int, layer: int) -> Chain:
        whole, end = self.chain.skeleton(), self.layers[layer]
        units = [(name, whole.unit(name)) for name in self.chain.unit_names[start:end.stop]]
        return self._made([*units, (end.head, self.head(layer))], start)

    def _made(self, units: Sequence[tuple[str, nn.Module]], start: int) -> Chain:
        chain = self.chain
        return Chain(units, input_shape=self.shape_before(start), num_classes=chain.num_classes, name=chain.name,
                     init=chain.init_scheme)


class LocalBlock(Chain):
    """Neighbouring layers of a net, each with its head; on the meta device. As a module it computes the last one's scores.

    Args:
        first, stop: The layers from ``first`` up to and not including ``stop``.

    Attributes:
        num_layers: How many these are.
    """

    def __init__(self, net: LocalNet, first: int, stop: int):
        chain, layers = net.chain.skeleton(), net.layers[first:stop]
        start = layers[0].start
        units = [(name, chain.unit(name)) for name in chain.unit_names[start:layers[-1].stop]]
        super().__init__(units, input_shape=net.shape_before(start), num_classes=chain.num_classes, name=chain.name,
                         init=chain.init_scheme)
        self.num_layers = len(layers)
        self._bounds = [(layer.start - start, layer.stop - start) for layer in layers]
        self._heads = [layer.head for layer in layers]
        for number, layer in enumerate(layers, start=first):
            self.add_module(layer.head, net.head(number))

    def run_layer(self, x: Tensor, number: int) -> Tensor:
        """What layer ``number``, from 0, makes of what the one before puts out."""
        return self.run(x, *self._bounds[number])

    def run_head(self, x: Tensor, number: int) -> Tensor:
        """Scores (batch, num_classes) from what layer ``number`` puts out."""
        return self.get_submodule(self._heads[number])(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_head(self.run(x), -1)


def _bounds(chain: Chain) -> list[tuple[int, int]]:
    """First unit and end of each layer."""
    body = len(chain) - 1
    if not body:
        raise ConfigError([Fault("model", f"must have a unit before its last one, but '{chain.name}' has one unit in all.")])
    shapes, names = list(chain.output_shapes().values()), chain.unit_names
    starts = [0]
    for unit in range(1, body):
        opened = any(True for name in names[starts[-1]:unit] for _ in chain.unit(name).parameters())
        own = any(True for _ in chain.unit(names[unit]).parameters())
        tokens = unit == 1 and len(shapes[0]) == 2 and len(chain.input_shape) == 3
        if opened and own and not tokens:
            starts.append(unit)
    return list(zip(starts, [*starts[1:], body], strict=True))
