"""Settings of local training, and what they stand for: optimisers, learning-rate schedules, phases."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from dfed.plan import Phase
from dfed.settings import Settings

__all__ = ["ClientSettings", "ScheduleSettings", "TrainingSettings", "client_conflicts", "make_optimizer"]

_OPTIONS = {
    "sgd": ("momentum", "nesterov"),
    "adam": ("betas", "epsilon"),
    "adamw": ("betas", "epsilon"),
}
_SCHEDULE_OPTIONS = {
    "constant": (),
    "step": ("milestones", "factor"),
    "exponential": ("factor",),
    "cosine": ("final",),
}


class ScheduleSettings(Settings):
    """How the learning rate changes over the rounds; a factor on ``client.learning_rate``.

    Attributes:
        name: ``constant``; ``step``: times ``factor`` at each of ``milestones`` (rounds); ``exponential``: ``factor`` to
            the power of the round; ``cosine``: from 1 to ``final`` over all rounds. Settings that the name has no use for
            may not be given.
    """

    name: Literal["constant", "step", "exponential", "cosine"] = "constant"
    milestones: list[Annotated[int, Field(ge=0)]] = []
    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    final: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleSettings:
        conflicts = [
            f"must leave out `{name}` with the name '{self.name}', but sets it."
            for name in _useless(_SCHEDULE_OPTIONS, self.name, self.model_fields_set)
        ]
        if self.name == "step" and not self.milestones:
            conflicts.append("must have at least one of `milestones` with the name 'step', but has none.")
        if conflicts:
            raise ValueError(" ".join(conflicts))
        return self

    def to_dict(self) -> dict[str, Any]:
        """As a config writes it: all that may be given with this name."""
        useless = _useless(_SCHEDULE_OPTIONS, self.name, type(self).model_fields)
        return self.model_dump(exclude=set(useless))

    def at(self, round_index: int, rounds: int) -> float:
        """The factor in round ``round_index`` (from 0) of ``rounds``; at most the largest float."""
        if self.name == "step":
            return _power(self.factor, sum(round_index >= milestone for milestone in self.milestones))
        if self.name == "exponential":
            return _power(self.factor, round_index)
        if self.name == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * round_index / rounds)) / 2
        return 1.0


def _power(factor: float, exponent: int) -> float:
    try:
        return factor**exponent
    except OverflowError:
        return sys.float_info.max


def _useless(options: Mapping[str, Sequence[str]], name: str, given: Collection[str]) -> list[str]:
    """What of ``given`` is an option of other names than this one."""
    return sorted({option for names in options.values() for option in names}.intersection(given) - {*options[name]})


def client_conflicts(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with settings of local training taken together, whether or not each is valid by itself."""
    optimizer = given.get("optimizer", "sgd")
    conflicts = []
    if given.get("epochs") is not None and given.get("steps") is not None:
        conflicts.append("must give either `epochs` or `steps`, but gives both.")
    if given.get("nesterov") is True and not given.get("momentum"):
        conflicts.append("must have a `momentum` above 0 with `nesterov`, but has none.")
    if optimizer in _OPTIONS:
        useless = _useless(_OPTIONS, optimizer, given)
        conflicts += [f"must leave out `{name}` with the optimiser '{optimizer}', but sets it." for name in useless]
    return conflicts


class TrainingSettings(Settings):
    """How a model is trained on data, apart from how long.

    Attributes:
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        batch_size: Samples in a mini-batch, less than 2³¹: more than anyone has, and the sizes of tensors fit 64 bits.
        drop_last: Whether a last mini-batch that is not full is left out.
        clip_norm: Gradients are scaled down to this Euclidean norm; null: never.
        augment: ``none``, ``flip``, ``crop`` or ``crop_flip``.
        activation_checkpointing: Whether a unit's activations are dropped after the forward pass and computed again in the
            backward pass: less memory, the same bits, about a third more arithmetic.
        precision: ``fp32``, or ``bf16`` for autocast: weights, gradients and the optimiser stay float32.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    batch_size: Annotated[int, Field(ge=1, lt=2**31)] = 32
    drop_last: bool = False
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    schedule: ScheduleSettings = ScheduleSettings()
    augment: Literal["none", "flip", "crop", "crop_flip"] = "none"
    activation_checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSettings:
        given = {name: getattr(self, name) for name in self.model_fields_set}
        conflicts = client_conflicts(given)
        if conflicts:
            raise ValueError(" ".join(conflicts))
        return self

    def to_dict(self) -> dict[str, Any]:
        """As a config writes it: all that may be given with this optimiser."""
        useless = _useless(_OPTIONS, self.optimizer, type(self).model_fields)
        return {**self.model_dump(exclude=set(useless)), "schedule": self.schedule.to_dict()}


class ClientSettings(TrainingSettings):
    """Local training of every client; its optimiser is made anew for each client and round.

    Attributes:
        epochs, steps: Passes over the client's data, or optimiser steps; exactly one (default: 1 epoch).
        conv_parts: Convolutions take a mini-batch in so many parts; see :func:`dfed.models.convolutions_in_parts`.
    """

    epochs: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    conv_parts: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _whole_under_autocast(self) -> ClientSettings:
        if self.conv_parts > 1 and self.precision != "fp32":
            raise ValueError(f"must leave `conv_parts` at 1 with the precision '{self.precision}', but sets {self.conv_parts}.")
        return self

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The configured local training as one phase."""
        epochs = self.epochs if self.epochs is not None or self.steps is not None else 1
        return (Phase(batch_size=self.batch_size, epochs=epochs, steps=self.steps, drop_last=self.drop_last),)


def make_optimizer(settings: TrainingSettings, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
                   factor: float) -> torch.optim.Optimizer:
    """A new optimiser of ``parameters``, or of groups of them as torch has them; ``factor`` multiplies the learning rate."""
    common: dict[str, Any] = {
        "lr": settings.learning_rate * factor, "weight_decay": settings.weight_decay, "fused": True,
    }
    parameters = list(parameters)  # type: ignore[assignment]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=settings.nesterov, **common)
    family = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return family(parameters, betas=(settings.betas[0], settings.betas[1]), eps=settings.epsilon, **common)
