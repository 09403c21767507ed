"""What training the layers of a :class:`LocalNet` costs, found by taking steps on tensors without storage."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfed.blocks.local_net import LocalNet
from dfed.central.frozen import Frozen
from dfed.central.local_step import layer_session, local_step
from dfed.central.peaks import Peaks, smallest_batch
from dfed.central.session import Session
from dfed.central.settings import EpochSettings
from dfed.memory import predict_course
from dfed.models import Chain
from dfed.planner import Store
from dfed.planner.costs import what_counts
from dfed.planner.flops import flop_counter, flops_of
from dfed.planner.store import describe

__all__ = ["LayerCosts", "LocalCosts"]

_CPU = torch.device("cpu")
_FLOP_BATCH = 2  # batch norm in training wants more than one value a channel
_HELD = 2  # mini-batches that are waiting beside the one that is trained on: one being read, one before augmentation

Loaded = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


@dataclass(frozen=True)
class LayerCosts:
    """Of one layer with its head.

    Attributes:
        state_bytes: Tensors of layer, head and optimiser.
        training_flops, int8_flops: Of a local step, per sample.
        forward_flops, head_flops: Of a forward pass of the layer, and of its head, per sample.
    """

    state_bytes: int
    training_flops: float
    int8_flops: float
    forward_flops: float
    head_flops: float


class LocalCosts:
    """Predictions for a net; each is worked out once.

    Args:
        recomputes: Whether what lies before a block is passed again for every mini-batch.
        samples: How many there are: no mini-batch has more.
    """

    def __init__(self, net: LocalNet, settings: EpochSettings, store: Store, *, recomputes: bool, samples: int):
        self._net, self._settings, self._store = net, settings, store
        self._recomputes, self._samples = recomputes, samples

    def peak_bytes(self, first: int, stop: int, batch: int) -> int:
        """Predicted peak of training the layers from ``first`` up to ``stop`` in mini-batches of ``batch``.

        Their tensors are all there; activations and gradients are those of one layer at a time.
        """
        layers, batch = self._net.layers, min(batch, self._samples)
        state = sum(self.layer(number).state_bytes for number in range(first, stop))
        peak = max(self._peaks(number).at(batch) - self.layer(number).state_bytes for number in range(first, stop)) + state
        start = layers[first].start
        held = _HELD * batch * 4 * math.prod(self._net.chain.input_shape if self._recomputes else self._net.shape_before(start))
        if not (self._recomputes and start):
            return peak + held
        taken = batch * 4 * math.prod(self._net.shape_before(start))
        return max(peak + self._frozen_bytes(start), self._frozen_peaks(start).at(batch) + state) + held + taken

    def smallest(self, layer: int) -> int:
        """The smallest mini-batch on which a layer can be trained."""
        return min(self._samples, smallest_batch(self._peaks(layer)))

    def layer(self, layer: int) -> LayerCosts:
        """Of a layer and its head."""
        return self._layers[layer]

    @functools.cached_property
    def _layers(self) -> list[LayerCosts]:
        return [LayerCosts(*self._store.get([*self._depends(number), "figures"], functools.partial(self._figures, number)))
                for number in range(len(self._net.layers))]

    def _depends(self, layer: int) -> list[object]:
        end = self._net.layers[layer]
        return ["local", describe(self._net.layer_model(layer)), end.stop - end.start, what_counts(self._settings)]

    @functools.cache  # noqa: B019 - lives as long as the method
    def _peaks(self, layer: int) -> Peaks:
        return Peaks(self._store, [*self._depends(layer), "peak"], functools.partial(self._course, layer))

    def _course(self, layer: int, batch: int) -> list[int]:
        before, session = (layer_session(self._net, layer, self._settings, _CPU) for _ in range(2))

        def work(loaded: Loaded) -> None:
            session.load(*loaded, 1.0)
            for _ in range(2):  # the second finds what the first one leaves
                self._step(session, layer, batch)

        return predict_course(lambda: self._trained(before, layer), work)

    def _figures(self, layer: int) -> list[float]:
        before, session = (layer_session(self._net, layer, self._settings, _CPU) for _ in range(2))
        counter, passes, state = flop_counter(), [0, 0], [0]
        units = self._net.layers[layer].stop - self._net.layers[layer].start

        def work(loaded: Loaded) -> None:
            tensors, slots = loaded
            state[0] = sum(value.nbytes for kept in (tensors, *slots.values()) for value in kept.values())
            session.load(*loaded, 1.0)
            with counter:
                self._step(session, layer, _FLOP_BATCH)
            x = torch.empty(_FLOP_BATCH, *session.model.input_shape)
            for place, (start, stop) in enumerate(((0, units), (units, units + 1))):
                # In training mode: in evaluation mode attention runs as one operator, whose arithmetic is not counted.
                with flop_counter() as seen, torch.no_grad():
                    x = session.model.run(x, start, stop)
                passes[place] = seen.get_total_flops()

        predict_course(lambda: self._trained(before, layer), work)
        return [state[0], *(count / _FLOP_BATCH for count in (*flops_of(counter), *passes))]

    def _trained(self, session: Session, layer: int) -> Loaded:
        """What there is after a step, the optimiser's tensors included."""
        session.load(_empty(session.model), {}, 1.0)
        self._step(session, layer, _FLOP_BATCH)
        loaded = session.take()
        session.unload()
        return loaded

    def _step(self, session: Session, layer: int, batch: int) -> None:
        session.model.set_generator(torch.Generator())
        x = torch.empty(batch, *session.model.input_shape)
        local_step(session, x, torch.zeros(batch, dtype=torch.int64))

    def _frozen_bytes(self, stop: int) -> int:
        return sum(value.nbytes for value in self._net.frozen(0, stop).state_dict().values())

    @functools.cache  # noqa: B019 - as above
    def _frozen_peaks(self, stop: int) -> Peaks:
        depends = ["frozen", describe(self._net.frozen(0, stop)), self._settings.precision]
        return Peaks(self._store, depends, functools.partial(self._frozen_course, stop))

    def _frozen_course(self, stop: int, batch: int) -> list[int]:
        frozen, tensors = Frozen(self._net, [0, stop], _CPU, self._settings.precision, batch), self._net.frozen(0, stop)

        def work(loaded: dict[str, Tensor]) -> None:
            frozen.load(loaded)
            frozen(torch.empty(batch, *self._net.chain.input_shape))

        return predict_course(lambda: _empty(tensors), work)


def _empty(model: Chain) -> dict[str, Tensor]:
    tensors = model.state_dict(keep_vars=True)  # as they are: nothing may touch what is no fake tensor
    return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in tensors.items()}
