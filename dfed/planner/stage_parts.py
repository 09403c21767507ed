"""Parts of which the memory of a stage is put together; see :mod:`dfed.planner.stage_costs`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfed.blocks.stages import output_module
from dfed.client import ClientSettings
from dfed.client.settings import make_optimizer
from dfed.errors import ConfigError
from dfed.memory import predict_course, predict_levels
from dfed.models import Chain
from dfed.planner.unit_courses import NoSum, UnitCourse
from dfed.planner.unit_watch import Value

__all__ = ["Block", "Layer", "Rest", "clipping", "optimizer_state", "step_between"]


@dataclass(frozen=True)
class Rest:
    """What lies behind a block, up to the loss; in bytes, its input apart. A stage needs no less where any of them is more.

    Attributes:
        forward_held, loss_held, backward_held: Most during its forward pass, the computation of the loss, and its backward
            pass while it holds its input; ``-inf`` if it never does.
        forward_free, loss_free, backward_free: The same while it does not hold its input.
        after, end: Left when the gradient of the input is passed on, and when the whole backward pass is over.
        permanent: Weights, buffers, and the optimiser's state.
        new_state: What of that state the step itself makes.
        tensors: How many parameters it trains, where that matters.
        input_gradient: The gradient that it passes on.
    """

    forward_held: float
    forward_free: float
    loss_held: float
    loss_free: float
    backward_held: float
    backward_free: float
    after: float
    end: float
    permanent: float
    new_state: float
    tensors: float
    input_gradient: Value | None

    def figures(self) -> tuple[float, ...]:
        """All but the last, in order."""
        return tuple(self.__dict__.values())[:-1]

    @classmethod
    def least(cls, rests: Sequence[Rest]) -> Rest:
        """The smallest of each figure, of rests that pass the same gradient on."""
        figures = (min(column) for column in zip(*(rest.figures() for rest in rests), strict=True))
        return cls(*figures, rests[0].input_gradient)


@dataclass(frozen=True)
class Layer:
    """A unit or layer that is trained: its course and what it holds by itself."""

    course: UnitCourse
    permanent: int
    new_state: int
    tensors: int

    def before(self, rest: Rest) -> Rest:
        """The rest that begins with this layer."""
        c = self.course
        size, always = c.output_bytes, c.output_bytes if c.saves_output else 0

        def inner(held: float, free: float, kept: int) -> tuple[float, float]:
            most = kept + max(held + size, free + always)
            return (most, -math.inf) if c.saves_input else (-math.inf, most)

        forward = inner(rest.forward_held, rest.forward_free, c.kept)
        backward = inner(rest.backward_held, rest.backward_free, c.kept_after_autocast)
        return Rest(
            max(c.forward, forward[0]), forward[1], *inner(rest.loss_held, rest.loss_free, c.kept),
            max(backward[0], rest.after + c.backward_held), max(backward[1], rest.after + c.backward_free),
            rest.after + c.after, rest.end + c.after, rest.permanent + self.permanent, rest.new_state + self.new_state,
            rest.tensors + self.tensors, c.input_gradient,
        )


@dataclass(frozen=True)
class Block:
    """The units of a stage up to the end of its block; in bytes.

    Attributes:
        forward: Most during the forward pass.
        kept, kept_after_autocast: After the forward pass, the output apart; less the batch where the output lies in it.
        output_bytes: Of the output's storage.
        saves_output: Whether it is kept in any case.
        gradients, permanent, new_state, tensors: As for a :class:`Rest`; gradients are of its parameters.
        output: What comes out.
    """

    forward: float
    kept: int
    kept_after_autocast: int
    output_bytes: int
    saves_output: bool
    gradients: int
    permanent: int
    new_state: int
    tensors: int
    output: Value


class _Reshaped(nn.Module):
    """Any values, of this shape."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self._shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """(batch, …) to (batch, *shape)."""
        return x.new_empty((len(x), *self._shape))


def step_between(here: tuple[int, ...], there: tuple[int, ...]) -> Chain | None:
    """The layer that stands in, in an output module, for a block between samples of these shapes, as the unit ``step``.

    Returns:
        None if there is none.
    """
    units = [("here", nn.Identity()), ("there", _Reshaped(there)), ("head", nn.Identity())]
    try:
        module = output_module(Chain(units, input_shape=here, num_classes=1, name="step"), [["here"], ["there"]])
    except ConfigError:
        return None
    return Chain([("step", module.get_submodule("step0"))], input_shape=here, num_classes=1, name="step")


def _gradients(sizes: Sequence[int]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.empty(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return parameters


def optimizer_state(settings: ClientSettings, steps: int) -> tuple[int, int]:
    """Bytes of the optimiser's state for each entry and for each parameter.

    Raises:
        NoSum: If a step holds more than that state.
    """
    def first(sizes: Sequence[int]) -> tuple[int, int]:
        course = predict_course(lambda: optimizer(sizes), lambda ready: ready.step())
        level, = predict_levels(lambda: optimizer(sizes), lambda ready: [ready.step()])  # type: ignore[list-item]
        return max(course, default=0), level

    def optimizer(sizes: Sequence[int]) -> torch.optim.Optimizer:
        return make_optimizer(settings, _gradients(sizes), 1.0)

    def later() -> torch.optim.Optimizer:
        ready = optimizer((64, 192))
        ready.step()
        return ready

    (_, one), (_, two), (most, both) = first((64,)), first((192,)), first((64, 192))
    an_entry = (two - one) // 128
    a_parameter = one - 64 * an_entry
    more = max(predict_course(later, lambda ready: ready.step()), default=0) if steps > 1 else most - both
    if both != 256 * an_entry + 2 * a_parameter or more > 0:
        raise NoSum("The optimiser holds more than a state for each parameter.")
    return an_entry, a_parameter


def clipping(tensors: int) -> int:
    """Most bytes that it takes to clip the gradients of so many parameters.

    Raises:
        NoSum: If it depends on how large they are.
    """
    most = {
        max(predict_course(lambda size=size: _gradients([size] * tensors),  # type: ignore[misc]
                           lambda parameters: nn.utils.clip_grad_norm_(parameters, 1.0)), default=0) for size in (4, 64)
    }
    if len(most) > 1:
        raise NoSum("Clipping holds more the larger the gradients are.")
    return most.pop()
