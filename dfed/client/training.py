"""One client's local training: give the sub-model storage, run the phases, hand back what is to go up.

The same function trains for real and, under fake tensors, predicts its own peak: there is no second description of the
memory that a client needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dfed.client.features import Blank, Features, pass_through, units_of
from dfed.client.settings import ClientSettings, make_optimizer
from dfed.client.skeleton import Skeleton
from dfed.models import Chain, convolutions_in_parts
from dfed.plan import Phase, Plan
from dfed.region import Region
from dfed.strategies import PASS, Strategy

__all__ = ["Batches", "LocalResult", "on_cpu", "rehearse", "run_plan"]

Batches = Callable[[Phase], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class LocalResult:
    """What local training leaves behind.

    Attributes:
        update: Tensors to send up, by name, where they were trained.
        client_state: What the strategy has the client remember, likewise.
        loss_sum: Sum over all visits of the samples' loss, float32 scalar tensor.
        loss_square_sum: Sum over all visits of the square of their mini-batch's mean loss, likewise.
        num_visits: Samples that passed through the model, repetitions counted.
        num_steps: Optimiser steps taken.
    """

    update: dict[str, Tensor]
    client_state: Mapping[str, Tensor]
    loss_sum: Tensor
    loss_square_sum: Tensor
    num_visits: int
    num_steps: int


def run_plan(
    strategy: Strategy,
    plan: Plan,
    skeleton: Skeleton,
    values: Mapping[str, Tensor],
    regions: Mapping[str, Region],
    batches: Batches,
    settings: ClientSettings,
    *,
    rate_factor: float,
    device: torch.device,
    generator: torch.Generator | None,
    after_batch: Callable[[], None] = lambda: None,
    client_state: MutableMapping[str, Tensor] | None = None,
    draw: Callable[[int], int] = lambda n: n - 1,
    features: Features | None = None,
) -> LocalResult:
    """Train one client. Everything it allocates counts against the client's budget.

    Args:
        skeleton: Of this plan's sub-model; the caller unloads it when it has taken the update.
        values: What came down: float32, by name, each of its region's shape.
        regions: The part of each global tensor that the client holds.
        batches: Mini-batches of a phase: float32 ``(b, …)`` and int64 ``(b,)``, on the CPU.
        rate_factor: The round's factor on the learning rate.
        generator: For the layers that draw numbers, on ``device``.
        after_batch: Called after each step; may raise to abandon the training.
        client_state: What the client remembers, on the CPU; the strategy may take things out of it.
        draw: ``model.draw``; see :meth:`Strategy.num_draws`.
        features: Where those of :meth:`Strategy.feed` come from and go to; the mini-batches are the caller's business.
    """
    passes, phases = _parted(plan)
    with convolutions_in_parts(settings.conv_parts):
        for phase in passes:
            assert features is not None, "a phase that passes samples on needs a feed"
            pass_through(features, values, phase.batch_size, settings.precision, device, after_batch)
    skeleton.load(values, device)
    model = _ready(skeleton.model, settings, generator, draw)
    client_state = {} if client_state is None else client_state
    strategy.receive(model, client_state, plan)
    wanted, count, optimizer, rate = _Wanted(strategy, plan, model), _Count(device), None, 1.0
    for phase in phases:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)  # a phase may train less than the one before
        if wanted.change_to(phase) or optimizer is None or phase.rate != rate:
            optimizer, rate = None, phase.rate  # its state goes before the next one's comes
            optimizer = make_optimizer(settings, wanted.parameters, rate_factor * rate)
        for x, y in _on(device, batches(phase)):
            optimizer.zero_grad(set_to_none=True)
            with convolutions_in_parts(settings.conv_parts):  # in the backward pass, too, where units may be computed again
                loss = _loss(strategy, model, x, y, phase, settings)
                loss.backward()
            _clip(wanted.parameters, settings.clip_norm)
            optimizer.step()
            count.add(loss.detach(), len(y))
            after_batch()
    wanted.change_to(None)
    kept = _checked(strategy.remember(model, client_state, plan)) if strategy.keeps_state else client_state
    update = _update(strategy, plan, model, regions)
    return LocalResult(update, kept, count.loss_sum, count.loss_square_sum, count.num_visits, count.num_steps)


def _loss(strategy: Strategy, model: nn.Module, x: Tensor, y: Tensor, phase: Phase, settings: ClientSettings) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        return strategy.loss(model, x, y, phase)


def _clip(parameters: Iterable[nn.Parameter], norm: float | None) -> None:
    """Scale the gradients down to this norm; None: leave them."""
    if norm is not None:
        nn.utils.clip_grad_norm_(parameters, norm)


def _parted(plan: Plan) -> tuple[list[Phase], list[Phase]]:
    """Phases that make features, and those that train."""
    passes = [phase for phase in plan.phases if phase.objective == PASS]
    return passes, [phase for phase in plan.phases if phase.objective != PASS]


def _ready(model: nn.Module, settings: ClientSettings, generator: torch.Generator | None, draw: Callable[[int], int],
           ) -> nn.Module:
    """Put a model that has its values into the state in which it is trained."""
    if generator is not None and hasattr(model, "set_generator"):
        model.set_generator(generator)
    model.train()
    if settings.activation_checkpointing:
        assert isinstance(model, Chain), "activation checkpointing works on chains: a strategy must build one"
        model.recompute = True
    model.draw = draw  # type: ignore[assignment]
    return model


class _Count:
    """What local training adds up."""

    def __init__(self, device: torch.device):
        self.loss_sum, self.loss_square_sum = torch.zeros((), device=device), torch.zeros((), device=device)
        self.num_visits = self.num_steps = 0

    def add(self, loss: Tensor, num_samples: int) -> None:
        """One step on so many samples, with this mean loss."""
        self.loss_sum.add_(loss, alpha=num_samples)
        self.loss_square_sum.addcmul_(loss, loss, value=num_samples)
        self.num_visits += num_samples
        self.num_steps += 1


class _Wanted:
    """Which parameters of the model ask for gradients, phase by phase."""

    def __init__(self, strategy: Strategy, plan: Plan, model: nn.Module):
        self._block_of, self._model = strategy.splitting.block_of, model
        self._all = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._now: tuple[str, ...] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained now."""
        return [parameter for _, parameter in self._all if parameter.requires_grad]

    def change_to(self, phase: Phase | None) -> bool:
        """Freeze what ``phase`` (None: no phase) does not train, and thaw what it does; whether that changed anything.

        Where the phase names what it trains, norms without a trained parameter of their own are frozen with the rest, also
        inside a unit of which another layer is trained.
        """
        before, self._now = self._now, None if phase is None else phase.train
        if self._now == before:
            return False
        for name, parameter in self._all:
            parameter.requires_grad_(self._now is None or self._block_of(name) in self._now)
        for name, child in self._model.named_children():
            child.train(self._now is None or self._block_of(name) in self._now)
        if self._now is not None:
            for norm in self._model.modules():
                if isinstance(norm, _NormBase) and norm.affine and not any(own.requires_grad for own in norm.parameters()):
                    norm.eval()
        return True


def _update(strategy: Strategy, plan: Plan, model: nn.Module, regions: Mapping[str, Region]) -> dict[str, Tensor]:
    update = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in regions:
            sent = strategy.upload(name, tensor.detach(), regions[name], plan)
            if sent is not None:
                update[name] = sent
    return update


def _checked(remembered: Any) -> dict[str, Tensor]:
    """What a strategy has a client remember, if it can be kept."""
    if not isinstance(remembered, Mapping):
        raise TypeError(f"`remember` must return tensors by name, but returns a {type(remembered).__name__}.")
    for name, value in remembered.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and value.dtype == torch.float32
                and value.layout == torch.strided):
            what = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`remember` must return dense float32 tensors by name, but returns {name!r}: {what}.")
    return {name: value.detach() for name, value in remembered.items()}


def rehearse(strategy: Strategy, plan: Plan, skeleton: Skeleton, values: Mapping[str, Tensor], regions: Mapping[str, Region],
             settings: ClientSettings, *, input_shape: tuple[int, ...], num_samples: int, device: torch.device) -> None:
    """One step of each phase, on zeros, that leaves nothing but what libraries keep. An error is left to the real training.

    Args:
        values, regions: As for :func:`run_plan`.
        input_shape: Of one sample.
        num_samples: The client's; a mini-batch has no more.
    """
    feed = strategy.feed(plan)
    shape, features = input_shape, None
    if feed is not None:
        shape, units = feed.shape, units_of(strategy.problem.chain, feed)
        features = Blank(units, feed.source_shape, lambda size, *shape: torch.zeros(min(size, num_samples), *shape))

    def batches(phase: Phase) -> Iterable[tuple[Tensor, Tensor]]:
        size = min(phase.batch_size, num_samples)
        yield torch.zeros(size, *shape), torch.zeros(size, dtype=torch.int64)

    with contextlib.suppress(Exception):
        run_plan(strategy, plan, skeleton, values, regions, batches, settings, rate_factor=1.0, device=device,
                 generator=torch.Generator(device=device), features=features)


def on_cpu(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on the CPU; from a GPU through page-locked memory, all at once."""
    if device.type != "cuda":
        return {name: value.cpu() for name, value in tensors.items()}
    staged = {name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
              for name, value in tensors.items()}
    torch.cuda.synchronize(device)
    return staged


def _on(device: torch.device, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches:
        yield x.to(device), y.to(device)
