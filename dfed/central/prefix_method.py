"""What methods share that train one chain, and prefixes of it, with one optimiser from end to end."""

from __future__ import annotations

import contextlib
import functools
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfed import rng
from dfed.blocks import check_names, cut_points
from dfed.blocks.prefix import RESERVED, PrefixChain, body_stops
from dfed.central.clock import StepClock
from dfed.central.costs import prefix_costs
from dfed.central.method import Method, Outcome, Problem, VariantCosts
from dfed.central.session import Session
from dfed.central.state import Tally, TrainState
from dfed.central.watch import LossWatch
from dfed.data import AUGMENTATIONS, client_batches
from dfed.models import materialise

__all__ = ["PrefixMethod", "variant_name"]


def variant_name(depth: int) -> str:
    """What a depth is called among the variants, and among kinds of steps."""
    return f"depth {depth}"


class PrefixMethod(Method):
    """Each step trains the first ``depth_of(step)`` depths of the model, and the one classifier.

    Subclasses set :attr:`deepest` and write :meth:`depth_of`, :meth:`loss` and :meth:`share_of`.

    Args:
        depths: How many depths there are, the full model included.
        cuts: The last unit of each depth but the last, instead; None: see :func:`dfed.blocks.cut_points`.

    Attributes:
        stops: Units of the body at each depth, ascending.
        deepest: The largest depth that is trained; what lies beyond it is no part of the training.
        micro_batch: Samples that pass at a time; None: a whole mini-batch.
        rate_share: Factor on the learning rate, beside the schedule's.
    """

    deepest: int
    micro_batch: int | None = None
    rate_share = 1.0

    def __init__(self, problem: Problem, *, depths: int, cuts: list[str] | None):
        super().__init__(problem)
        check_names(problem.chain, RESERVED)
        self.stops = body_stops(problem.chain, cut_points(problem.chain, depths, cuts))

    @abstractmethod
    def depth_of(self, step: int) -> int:
        """The depth that a step trains; steps count from the beginning of the training."""

    @abstractmethod
    def loss(self, model: PrefixChain, x: Tensor, y: Tensor, depth: int) -> Tensor:
        """Loss (a scalar) of a mini-batch at this depth: ``x`` float32 (b, …), ``y`` int64 (b,).

        What it gives a gradient is trained, and nothing else may move.
        """

    @abstractmethod
    def share_of(self, depth: int) -> float:
        """The share of steps that is expected to train this depth."""

    @abstractmethod
    def training_key(self) -> list[Any]:
        """JSON values on which, beside model and depths, the memory and arithmetic of a step depend."""

    def loss_at(self, depth: int) -> Callable[[PrefixChain, Tensor, Tensor], Tensor]:
        """:meth:`loss` at a depth."""
        return functools.partial(self.loss, depth=depth)

    def build(self, depth: int | None = None) -> PrefixChain:
        """The model up to a depth (None: all that is trained), without storage; called, it computes this depth."""
        return PrefixChain(self.problem.chain, self.stops[: depth or self.deepest])

    def new_session(self, device: torch.device) -> Session:
        """What trains the model."""
        model = self.build()
        first = {name: number for number, name in enumerate(model.unit_names)}
        ends = model.prefix_stops
        band = {name: next((depth for depth, stop in enumerate(ends) if place < stop), 0) for name, place in first.items()}
        return Session(model, self.problem.settings, device, lambda name: band[model.unit_of(name)])

    @functools.cached_property
    def _session(self) -> Session:
        return self.new_session(self.problem.device)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.problem.settings.epoch.num_steps(self.problem.data.num_samples)

    def first_tensors(self) -> dict[str, Tensor]:
        model = self.build()
        # Those of the full model, whatever is trained of it: independent models start alike.
        full = materialise(self.problem.chain.skeleton(), rng.torch_generator(self.problem.seed, "init")).state_dict()
        return {name: full[name].detach() for name in model.state_dict()}

    def epoch(self, state: TrainState, stopped: Callable[[], bool]) -> Outcome:
        settings, session, device = self.problem.settings, self._session, self.problem.device
        session.load(state.tensors, state.slots, settings.schedule.at(state.epoch, settings.epochs) * self.rate_share)
        tally, clock, watch, step = Tally(), StepClock(device), LossWatch(device), state.step
        for x, y in itertools.islice(self._batches(state.epoch), state.step, None):
            number = state.epoch * self.steps_per_epoch + step
            depth = self.depth_of(number)
            if session.draws:
                session.model.set_generator(rng.device_generator(device, self.problem.seed, "layers", number))
            x, y = x.to(device), y.to(device)
            with clock.step(variant_name(depth)):
                loss = session.step(x, y, self.loss_at(depth), self.micro_batch)  # type: ignore[arg-type]
            tally.add(variant_name(depth), len(y))
            watch.add(loss, len(y), state.epoch, step)
            step += 1
            if stopped():
                break
        tally.loss_sum, tally.seconds = watch.sum(state.epoch), clock.seconds()
        tensors, slots = session.take()
        done, rest = divmod(step, self.steps_per_epoch)
        after = TrainState(epoch=state.epoch + done, step=rest, tensors=tensors, slots=slots, totals=state.totals)
        return Outcome(state=after, tally=tally)

    def learning_rate_at(self, epoch: int) -> float:
        return super().learning_rate_at(epoch) * self.rate_share

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        settings, data = self.problem.settings, self.problem.data
        return client_batches(
            data, np.arange(data.num_samples), batch_size=settings.batch_size, epochs=1, drop_last=settings.drop_last,
            generator=rng.torch_generator(self.problem.seed, "batches", epoch), augment=AUGMENTATIONS[settings.augment],
        )

    def release(self) -> None:
        self._session.unload()

    def rehearse(self, num_samples: int) -> None:
        device, session, num_samples = self.problem.device, self._session, min(num_samples, self.problem.settings.batch_size)
        empty = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in self.build().state_dict().items()}
        with contextlib.suppress(Exception):
            session.load(empty, {}, 1.0)
            session.model.set_generator(torch.Generator(device=device))
            for depth in range(1, self.deepest + 1):
                if self.share_of(depth):
                    x = torch.zeros(num_samples, *self.problem.chain.input_shape, device=device)
                    y = torch.zeros(num_samples, dtype=torch.int64, device=device)
                    session.step(x, y, self.loss_at(depth), self.micro_batch)  # type: ignore[arg-type]
        session.unload()

    def variants(self) -> Mapping[str, Callable[[], nn.Module]]:
        return {variant_name(depth): functools.partial(self.build, depth) for depth in range(1, self.deepest + 1)}

    def costs(self) -> Mapping[str, VariantCosts]:
        return self._costs

    @functools.cached_property
    def _costs(self) -> Mapping[str, VariantCosts]:
        return {variant_name(depth): prefix_costs(self, depth) for depth in range(1, self.deepest + 1)}
