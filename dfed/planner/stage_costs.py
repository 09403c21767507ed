"""Peaks of all stages of a chain, added up from records of its units; see :mod:`dfed.planner.unit_courses`.

Bytes are those of the last step that a prediction of a stage takes (:class:`dfed.planner.costs.Costs`); the one before, without
the optimiser's state, needs no more. A stage's peak is the largest of a few sums, each of one part from the units up to the
block's end and one from what lies behind it, the *rest*: the layers that stand in for later blocks, the last unit, the loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from dfed.blocks.stages import tail_parameters
from dfed.client import ClientSettings
from dfed.models import Chain
from dfed.planner.bare import chain_costs
from dfed.planner.stage_parts import Block, Layer, Rest, clipping, optimizer_state, step_between
from dfed.planner.unit_courses import LossCourse, NoSum, Recorder
from dfed.planner.unit_watch import Value

__all__ = ["StageCosts"]

_CPU = torch.device("cpu")
_SUMS, _LOSS = 8, 4  # the sums of the losses and of their squares; the loss of the step before; all float32


class StageCosts:
    """The stages of one chain.

    Args:
        settings, tail: As for :func:`dfed.planner.split_chain`.

    Attributes:
        body: Units before the last one.

    Raises:
        NoSum: If a unit's memory does not add up with that of its neighbours.
    """

    def __init__(self, chain: Chain, settings: ClientSettings, *, tail: bool):
        costs, plan = chain_costs(chain, settings, _CPU)
        phase, strategy = plan.phases[0], costs.strategy
        self._chain, self._settings, self._tail = chain, settings, tail
        self._steps = min(2, phase.steps or 2)
        self._batch = settings.batch_size
        self._recorder = Recorder(
            recompute=settings.activation_checkpointing, half=settings.precision == "bf16",
            loss=lambda model, x, y: strategy.loss(model, x, y, phase),  # type: ignore[arg-type]
        )
        self._state = optimizer_state(settings, self._steps)
        self._shapes = [chain.input_shape, *chain.output_shapes().values()]
        self.body = len(chain) - 1
        self._clips: dict[int, int] = {}
        self._layers: dict[tuple[object, ...], Layer] = {}
        self._loaded: dict[tuple[tuple[int, ...], ...], Chain | None] = {}
        self._model = self._recorder.load(chain)
        self._places: list[list[tuple[Value, int, int, bool]]] = []  # value, kept before, its bytes and whether they are kept
        self._backwards: dict[tuple[int, int, Value | None], float] = {}
        self._blocks = [self._blocks_from(start) for start in range(self.body)]
        self._values = self._boundaries()
        self._last = [self._loss(value) for value in self._values[self.body]]

    def block(self, start: int, stop: int) -> Block:
        """The units of a stage whose block is ``start`` … ``stop - 1``."""
        return self._blocks[start][stop - start - 1]

    def rests_at_end(self) -> tuple[Rest, ...]:
        """What lies behind the last block, for each kind of tensor that may come out of one."""
        return tuple(self._last)

    def rests_before(self, start: int, stop: int, rests: Sequence[Rest]) -> tuple[Rest, ...] | None:
        """What lies behind a block that ends at ``start``, if the next one ends at ``stop`` and ``rests`` lie behind that.

        Returns:
            For each kind of tensor; None if no layer can stand in for the units between.
        """
        before = []
        for value in self._values[start]:
            layer = self._standing_in(start, stop, value)
            if layer is None:
                return None
            rest = rests[self._values[stop].index(layer.course.output)]
            layer = self._standing_in(start, stop, value, rest.input_gradient)
            assert layer is not None
            before.append(layer.before(rest))
        return tuple(before)

    def peak(self, start: int, stop: int, rests: Sequence[Rest]) -> float:
        """Peak of the stage whose block is ``start`` … ``stop - 1``."""
        block = self.block(start, stop)
        rest = rests[self._values[stop].index(block.output)]
        size, always = block.output_bytes, block.output_bytes if block.saves_output else 0
        permanent = block.permanent + rest.permanent + _SUMS
        batch = self._batch * (4 * math.prod(self._chain.input_shape) + 8)
        old_loss = _LOSS if self._steps > 1 else 0
        forward = max(
            block.forward, block.kept + size + max(rest.forward_held, rest.forward_free),
            block.kept + max(rest.loss_held + size, rest.loss_free + always),
        )
        backward = max(
            block.kept_after_autocast + max(rest.backward_held + size, rest.backward_free + always),
            rest.after + self._backward(start, stop, rest.input_gradient),
        )
        new_state = block.new_state + rest.new_state
        left = rest.end + block.gradients
        step = max(self._clip(int(block.tensors + rest.tensors)), new_state)
        begin = batch if self._steps > 1 else 0  # the next batch comes while the one before is there
        return permanent - new_state + batch + max(forward + old_loss, backward, left + max(step, begin))

    def peaks(self, cuts: Sequence[int]) -> tuple[float, ...]:
        """Peaks of the stages of the blocks that begin at the units ``cuts[:-1]``; the body ends at the last of ``cuts``."""
        rests: tuple[Rest, ...] | None = self.rests_at_end()
        peaks = []
        for start, stop in reversed(list(itertools.pairwise(cuts))):
            assert rests is not None, "layers stand in for all blocks but the first"
            peaks.append(self.peak(start, stop, rests))
            rests = self.rests_before(start, stop, rests) if start else None
        return tuple(reversed(peaks))

    def _clip(self, tensors: int) -> int:
        if self._settings.clip_norm is None:
            return 0
        if tensors not in self._clips:
            self._clips[tensors] = clipping(tensors)
        return self._clips[tensors]

    def _blocks_from(self, start: int) -> list[Block]:
        """The blocks that begin at ``start``, shortest first; where each unit begins is noted down for :meth:`_backward`."""
        value = Value.of(torch.empty(self._batch, *self._chain.input_shape, device="meta"))
        size, saved, kept, kept_after = value.num_bytes, True, -value.num_bytes, -value.num_bytes
        forward = -math.inf
        gradients = permanent = new_state = tensors = 0
        blocks, places = [], []
        for number in range(self.body):
            layer = self._unit(number, start, value, None)
            c = layer.course
            forward = max(forward, kept + size + c.forward)
            places.append((value, kept_after, size, saved))
            saved = saved or c.saves_input
            if not c.is_view:
                kept, kept_after = (part + (size if saved else 0) for part in (kept, kept_after))
                size, saved = c.output_bytes, c.saves_output
            kept, kept_after = kept + c.kept, kept_after + c.kept_after_autocast
            gradients, permanent = gradients + c.after, permanent + layer.permanent
            new_state, tensors, value = new_state + layer.new_state, tensors + layer.tensors, c.output
            if number >= start:
                blocks.append(Block(forward, kept, kept_after, size, saved, gradients, permanent, new_state, tensors, value))
        self._places.append(places)
        return blocks

    def _backward(self, start: int, stop: int, gradient: Value | None) -> float:
        """Most that the units of a stage hold in their backward pass, if ``gradient`` comes back from the rest."""
        key = (start, stop, gradient)
        if key not in self._backwards:
            most, later = -math.inf, 0
            for number in range(stop - 1, -1, -1):
                if gradient is None:
                    break
                value, kept, size, saved = self._places[start][number]
                c = self._unit(number, start, value, gradient).course
                most = max(most, later + kept + max(c.backward_held + size, c.backward_free + (size if saved else 0)))
                later, gradient = later + c.after, c.input_gradient
            self._backwards[key] = most
        return self._backwards[key]

    def _unit(self, number: int, start: int, value: Value, gradient: Value | None) -> Layer:
        name = self._chain.unit_names[number]
        unit = self._model.unit(name)
        trained: tuple[str, ...] = ()
        if number >= start:
            trained = tuple(own for own, _ in unit.named_parameters())
        elif number == start - 1 and self._tail:
            trained = tuple(full.partition(".")[2] for full in tail_parameters(self._model, name))
        return self._layer(unit, trained, value, gradient, name)

    def _layer(self, unit: nn.Module, trained: tuple[str, ...], value: Value, gradient: Value | None, *key: object,
               in_chain: bool = True) -> Layer:
        known = (*key, trained, value, gradient)
        if known not in self._layers:
            course = self._recorder.unit(unit, trained, value, gradient, in_chain=in_chain)
            usual = (*key, trained, value, gradient or course.output.gradient())
            self._layers[known] = self._layers[usual] = Layer(course, *self._held(unit, trained))
        return self._layers[known]

    def _held(self, unit: nn.Module, trained: Sequence[str]) -> tuple[int, int, int]:
        """Permanent bytes, the state that a step makes, and parameters trained, where that counts."""
        sizes = [parameter.numel() for name, parameter in unit.named_parameters() if name in trained]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in [*unit.parameters(), *unit.buffers()])
        state = self._state[0] * sum(sizes) + self._state[1] * len(sizes)
        return weights + state, state if self._steps == 1 else 0, len(sizes) if self._settings.clip_norm is not None else 0

    def _boundaries(self) -> list[list[Value]]:
        """What may come out of a block, or of a layer that stands in for one, by where it ends."""
        values: list[list[Value]] = [[] for _ in range(self.body + 1)]
        for start, blocks in enumerate(self._blocks):
            for stop, block in enumerate(blocks, start + 1):
                if block.output not in values[stop]:
                    values[stop].append(block.output)
        for start in range(1, self.body):
            for stop in range(start + 1, self.body + 1):
                for value in values[start]:
                    layer = self._standing_in(start, stop, value)
                    if layer is not None and layer.course.output not in values[stop]:
                        values[stop].append(layer.course.output)
        return values

    def _standing_in(self, start: int, stop: int, value: Value, gradient: Value | None = None) -> Layer | None:
        """The layer that stands in for these units, on this input; None if there is none."""
        key = (self._shapes[start], self._shapes[stop])
        if key not in self._loaded:
            step = step_between(*key)
            self._loaded[key] = None if step is None else self._recorder.load(step)
        model = self._loaded[key]
        if model is None:
            return None
        module = model.unit("step")
        layer = self._layer(module, tuple(name for name, _ in module.named_parameters()), value, gradient, *key, in_chain=False)
        if layer.course.is_view:
            raise NoSum("A layer that stands in for a block returns its input.")
        return layer

    def _loss(self, value: Value) -> Rest:
        unit = self._model.unit(self._chain.unit_names[-1])
        trained = [name for name, _ in unit.named_parameters()]
        c: LossCourse = self._recorder.last(unit, trained, value)
        return Rest(c.forward, -math.inf, c.loss_held, c.loss_free, c.backward_held, c.backward_free, c.after, c.end,
                    *self._held(unit, trained), c.input_gradient)
