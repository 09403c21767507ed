"""What one unit of a chain holds in memory while it is trained, recorded by itself on tensors without storage.

A stage trains its units one after another, forwards and then backwards, so the bytes that it holds at any moment are sums of
what its units hold. A record is made so that the sums can be: the tensor that the unit takes, the one that it returns and the
gradient that comes back for that one are told apart from the unit's own, because two units share them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfed.client import Skeleton
from dfed.memory.storageless import StoragelessMode
from dfed.models import Chain
from dfed.models.recompute import recomputed
from dfed.planner.unit_watch import Before, Behind, Value, Watch

__all__ = ["LossCourse", "NoSum", "Recorder", "UnitCourse"]

Loss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


class NoSum(Exception):
    """A unit holds memory in a way that does not add up with that of its neighbours; says why."""


@dataclass(frozen=True)
class UnitCourse:
    """Bytes that a unit holds, its input apart.

    Attributes:
        forward: Most during the forward pass, the output included.
        kept, kept_after_autocast: After the forward pass, the output apart; the same once autocast has let go of its copies.
        saves_input, saves_output: Whether these are kept for the backward pass.
        is_view: Whether the output lies in the input's storage.
        backward_held, backward_free: Most during the backward pass while the unit holds its input, and while it does not; the
            gradient of the output included. ``-inf`` if there is no such moment.
        after: Left by the backward pass: the gradients of its parameters.
        output: What it returns.
        output_bytes: Of the output's storage.
        input_gradient: The gradient that it passes on; None if its input asks for none.
    """

    forward: float
    kept: int
    kept_after_autocast: int
    saves_input: bool
    saves_output: bool
    is_view: bool
    backward_held: float
    backward_free: float
    after: int
    output: Value
    output_bytes: int
    input_gradient: Value | None


@dataclass(frozen=True)
class LossCourse:
    """Bytes that the last unit and the loss hold, the unit's input apart.

    Attributes:
        forward: Most during the unit's forward pass.
        loss_held, loss_free: Most while the loss is computed, where the unit keeps its input, and where it does not.
        backward_held, backward_free: As for a :class:`UnitCourse`.
        after, end: Left when the gradient of the input is passed on, and when the whole backward pass is over.
        input_gradient: As for a :class:`UnitCourse`.
    """

    forward: float
    loss_held: float
    loss_free: float
    backward_held: float
    backward_free: float
    after: int
    end: int
    input_gradient: Value | None


class Recorder:
    """Records units of one chain.

    Args:
        recompute, half: Whether activations are computed again in the backward pass, and whether it is under autocast.
        loss: Takes the model, its input and the targets.
    """

    def __init__(self, *, recompute: bool, half: bool, loss: Loss):
        self._recompute, self._half, self._loss = recompute, half, loss
        self._fake = StoragelessMode()

    @contextmanager
    def _session(self) -> Iterator[None]:
        collects = gc.isenabled()
        gc.disable()  # tensors go when nothing refers to them, not when a collection happens to run
        try:
            with self._fake:
                yield
        finally:
            if collects:
                gc.enable()

    def load(self, chain: Chain) -> Chain:
        """A copy of ``chain`` with parameters that can be recorded, in training mode."""
        skeleton = Skeleton(chain.skeleton().requires_grad_(True))
        model = skeleton.model
        with self._session():
            skeleton.load({name: torch.empty(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()},
                          torch.device("cpu"))
        assert isinstance(model, Chain)
        model.set_generator(torch.Generator())
        return model.train()

    def unit(self, unit: nn.Module, trained: Sequence[str], value: Value, gradient: Value | None = None, *,
             in_chain: bool = True) -> UnitCourse:
        """One turn of ``unit`` on ``value``, forwards and backwards.

        Args:
            trained: Names of the parameters that ask for gradients.
            gradient: What comes back for the output; None: its :meth:`Value.gradient`.
            in_chain: Whether it is a unit of a chain, whose activations may be computed again.

        Raises:
            NoSum: If what it holds does not add up.
        """
        with self._session():
            return _Turn(unit, trained, value, self._half, self._fake).unit(gradient, self._recompute and in_chain)

    def last(self, unit: nn.Module, trained: Sequence[str], value: Value) -> LossCourse:
        """One turn of the last unit and the loss; arguments and errors as for :meth:`unit`."""
        with self._session():
            return _Turn(unit, trained, value, self._half, self._fake).last(self._loss)


class _Turn:
    """One recording."""

    def __init__(self, unit: nn.Module, trained: Sequence[str], value: Value, half: bool, fakes: StoragelessMode):
        self._unit, self._value, self._half = unit, value, half
        self._seed, self._targets = torch.ones(()), torch.zeros(value.shape[0], dtype=torch.int64)
        self._watch = Watch([*unit.parameters(), *unit.buffers(), self._seed, self._targets], fakes)
        self._passed_on: int | None = None
        self._input_gradient: Value | None = None
        self._trains = bool(trained)
        for name, parameter in unit.named_parameters():
            parameter.requires_grad_(name in trained)
        self._gradients = sum(4 * math.prod(p.shape) for p in unit.parameters() if p.requires_grad)

    def _input(self) -> Tensor:
        if self._value.requires_grad:
            x = Before.apply(torch.empty((), requires_grad=True), self._value, self._handed_back)
        else:
            x = self._value.make()
        self._watch.start()
        self._watch.tell_apart(x, "input")
        return x

    def _handed_back(self, gradient: Tensor) -> None:
        self._check(gradient.untyped_storage().nbytes() == self._value.num_bytes,
                    "the gradient of its input is not as large as the input")
        if not self._watch.is_same(gradient, "gradient"):
            self._watch.tell_apart(gradient, "own gradient")
        self._check(not self._watch.holds("input"), "it holds its input longer than its backward pass takes")
        self._passed_on, self._input_gradient = self._watch.own, Value.of(gradient)

    def _check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise NoSum(f"{type(self._unit).__name__}: {otherwise}.")

    def unit(self, gradient: Value | None, recompute: bool) -> UnitCourse:
        """See :meth:`Recorder.unit`."""
        watch, unit, sizes = self._watch, self._unit, {}

        def backward_begins(passed: Tensor) -> None:
            watch.tell_apart(passed, "gradient")
            sizes["gradient"] = passed.untyped_storage().nbytes()
            watch.mark()

        with watch:
            x = self._input()
            with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
                y = recomputed(unit, x) if recompute and (x.requires_grad or self._trains) else unit(x)
                forward = max((own for own, _ in watch.course), default=-math.inf)
                is_view = watch.is_same(y, "input")
                output, output_bytes = Value.of(y), y.untyped_storage().nbytes()
                if not is_view:
                    watch.tell_apart(y, "output")
                sizes["output"] = output_bytes
                behind = Behind.apply(y, gradient or output.gradient(), backward_begins)
                watch.tell_apart(behind, "behind")
                del x, y
                kept, saves = watch.own, (watch.holds("input"), watch.holds("output"))
            kept_after = watch.own
            held = free = -math.inf
            if output.requires_grad:
                behind.backward(self._seed)
                held, free = self._largest(sizes)
            else:
                self._check(not any(saves) and kept_after == 0, "it keeps something that no backward pass is for")
                self._check(not self._trains, "nothing that it trains reaches its output")
            after = watch.own if self._passed_on is None else self._passed_on
            del behind
            self._check(not watch.holds("input") and not watch.holds("output"), "it holds on to what it took or gave")
            for parameter in unit.parameters():
                parameter.grad = None
        if output.requires_grad:
            self._check(after == self._gradients, "its backward pass leaves other than the gradients of its parameters")
            self._check(self._passed_on is not None or not self._value.requires_grad, "it passes no gradient on")
        return UnitCourse(forward, kept, kept_after, *saves, is_view, held, free, after, output, output_bytes,
                          self._input_gradient)

    def _largest(self, sizes: dict[str, int]) -> tuple[float, float]:
        """Most bytes in the course while the input is held, and while it is not."""
        held = free = -math.inf
        for own, named in self._watch.course:
            total = own + sum(sizes.get(name, 0) for name in named)
            held, free = (max(held, total), free) if "input" in named else (held, max(free, total))
        return held, free

    def last(self, loss_of: Loss) -> LossCourse:
        """See :meth:`Recorder.last`."""
        watch, most = self._watch, []
        with watch:
            inputs = [self._input()]

            def run(_: Tensor) -> Tensor:
                x = inputs.pop()
                x = self._unit(x)
                most.append(max((own for own, _ in watch.course), default=-math.inf))
                watch.mark()
                return x

            with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
                loss = loss_of(run, self._targets, self._targets)
            loss_held, loss_free = self._largest({})
            watch.mark()
            loss.backward()
            held, free = self._largest({})
            end = watch.own
            after = end if self._passed_on is None else self._passed_on
            del loss
            for parameter in self._unit.parameters():
                parameter.grad = None
        return LossCourse(most[0], loss_held, loss_free, held, free, after, end, self._input_gradient)
