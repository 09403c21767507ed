"""One client's local training: give the sub-model storage, run the phases, hand back what is to go up.

The same function trains for real and, under fake tensors, predicts its own peak: there is no second description of the
memory that a client needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dfed.client.settings import ClientSettings, make_optimizer
from dfed.models import Chain
from dfed.plan import Phase, Plan
from dfed.region import Region
from dfed.strategies import Strategy

__all__ = ["Batches", "LocalResult", "Skeleton", "rehearse", "run_plan"]

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


@runtime_checkable
class _Taker(Protocol):
    """A module that makes what it holds from the values that came down."""

    def take(self, values: Mapping[str, Tensor], prefix: str, device: torch.device) -> None: ...

    def release(self) -> None: ...


class Skeleton:
    """A sub-model without storage that can be given storage, trained, and emptied again, client after client.

    A module that has the methods ``take(values, prefix, device)`` and ``release()`` (see :class:`dfed.blocks.quantised.Frozen`)
    makes what it holds from the values by itself, and is asked to let go of it again.

    Args:
        model: On the meta device, as :meth:`Strategy.build` made it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._takers = {prefix: module for prefix, module in model.named_modules() if isinstance(module, _Taker)}
        self._slots = [
            (table, name, f"{prefix}.{name}" if prefix else name, tensor, name not in module._non_persistent_buffers_set)
            for prefix, module in model.named_modules() if prefix not in self._takers
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self._attributes = set(vars(model))
        self._structure = _structure(model)

    def load(self, values: Mapping[str, Tensor], device: torch.device) -> None:
        """Give every parameter and buffer storage of its own on ``device``.

        Floating-point tensors take a copy of ``values[name]``; counters, which never travel, start at zero. Each tensor is
        allocated by itself, so that kernels see the same alignment whatever it was copied from.

        Raises:
            KeyError: If a floating-point tensor, or one that a module asks for, has no value.
        """
        for prefix, module in self._takers.items():  # first: what they need for a while is not on top of everything else
            module.take(values, prefix, device)
        for table, name, full_name, empty, persistent in self._slots:
            if not (persistent and empty.is_floating_point()):
                table[name] = torch.zeros(empty.shape, dtype=empty.dtype, device=device)
                continue
            value = values[full_name]
            assert value.shape == empty.shape, f"{full_name}: {tuple(value.shape)} is not {tuple(empty.shape)}"
            placed = torch.empty(empty.shape, dtype=empty.dtype, device=device).copy_(value, non_blocking=True)
            is_parameter = isinstance(empty, nn.Parameter)
            table[name] = nn.Parameter(placed, requires_grad=empty.requires_grad) if is_parameter else placed

    def unload(self) -> bool:
        """Let go of all storage, and of attributes that a strategy set on the model.

        Returns:
            Whether the model is as it was. If not (a strategy added modules, hooks, or attributes deeper down), the skeleton
            must not serve another client.
        """
        for module in self._takers.values():
            module.release()
        for table, name, _, empty, _ in self._slots:
            table[name] = empty
        for attribute in set(vars(self.model)) - self._attributes:
            delattr(self.model, attribute)
        return _structure(self.model) == self._structure


def _structure(model: nn.Module) -> list[Any]:
    """What a strategy could have changed about the modules, storage apart."""
    return [
        (id(module), {name: len(value) if isinstance(value, dict) else None for name, value in vars(module).items()})
        for module in model.modules()
    ]


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
    """
    model = skeleton.model
    skeleton.load(values, device)
    if generator is not None and hasattr(model, "set_generator"):
        model.set_generator(generator)
    model.train()
    if settings.activation_checkpointing:
        assert isinstance(model, Chain), "activation checkpointing works on chains: a strategy must build one"
        model.recompute = True
    model.draw = draw  # type: ignore[assignment]
    client_state = {} if client_state is None else client_state
    strategy.receive(model, client_state, plan)
    wanted, count = _Wanted(strategy, plan, model), _Count(device)
    optimizer: torch.optim.Optimizer | None = None
    for phase in plan.phases:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)  # a phase may train less than the one before
        if wanted.change_to(phase) or optimizer is None:
            optimizer = None  # its state goes before the next one's comes
            optimizer = make_optimizer(settings, wanted.parameters, rate_factor)
        for x, y in _on(device, batches(phase)):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = strategy.loss(model, x, y, phase)
            loss.backward()
            if settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(wanted.parameters, settings.clip_norm)
            optimizer.step()
            count.add(loss.detach(), len(y))
            after_batch()
    wanted.change_to(None)
    kept = _checked(strategy.remember(model, client_state, plan)) if strategy.keeps_state else client_state
    update = _update(strategy, plan, model, regions)
    return LocalResult(update, kept, count.loss_sum, count.loss_square_sum, count.num_visits, count.num_steps)


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
    def batches(phase: Phase) -> Iterable[tuple[Tensor, Tensor]]:
        size = min(phase.batch_size, num_samples)
        yield torch.zeros(size, *input_shape), torch.zeros(size, dtype=torch.int64)

    with contextlib.suppress(Exception):
        run_plan(strategy, plan, skeleton, values, regions, batches, settings, rate_factor=1.0, device=device,
                 generator=torch.Generator(device=device))


def _on(device: torch.device, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches:
        yield x.to(device), y.to(device)
