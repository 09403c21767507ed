"""Plans: one client's assignment for one round, as plain data."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

__all__ = ["Phase", "Plan"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of local training inside a round.

    Exactly one of ``epochs`` and ``steps`` is given.

    Attributes:
        batch_size: Samples in a mini-batch.
        epochs: Passes over the client's data.
        steps: Optimiser steps, cycling over the client's data.
        drop_last: Whether an epoch leaves out a last mini-batch that is not full, unless it is the only one.
        objective: The name under which a strategy's ``loss`` knows this phase.
        train: Blocks trained in this phase, of those that the plan trains; None: all of them. The others are frozen meanwhile:
            without gradient, and their norms use the running statistics and leave them as they are.
        rate: Factor on the learning rate, as for a mini-batch of another size than configured.
    """

    batch_size: int
    epochs: int | None = None
    steps: int | None = None
    drop_last: bool = False
    objective: str = "cross_entropy"
    train: tuple[str, ...] | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        assert (self.epochs is None) != (self.steps is None), "a phase has either epochs or steps"

    def num_steps(self, num_samples: int) -> int:
        """Optimiser steps that this phase takes on ``num_samples`` samples."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * self._epoch(num_samples)[0]

    def num_visits(self, num_samples: int) -> int:
        """Samples that pass through the model in this phase, repetitions counted."""
        steps, visits = self._epoch(num_samples)
        if self.epochs is not None:
            return self.epochs * visits
        assert self.steps is not None
        whole, rest = divmod(self.steps, steps)
        return whole * visits + rest * min(self.batch_size, num_samples)

    def _epoch(self, num_samples: int) -> tuple[int, int]:
        """Steps and visits of one epoch."""
        full, rest = divmod(num_samples, self.batch_size)
        if rest and (not self.drop_last or full == 0):
            return full + 1, num_samples
        return full, full * self.batch_size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one client holds, trains and returns in one round. Holds no tensors; survives JSON.

    Attributes:
        client: The client it is for.
        hold: Blocks sent down, in the order of the chain.
        train: Blocks trained and sent up; a subset of ``hold``.
        phases: Local training, in order.
        down: Codec of each block that is not sent down as fp32.
        up: Codec of each block that is not sent up as fp32.
        options: What else a strategy wants to tell its own ``build`` and ``loss``; JSON values only.
        details: Likewise, where it matters neither for memory nor for arithmetic, such as where a window stands in this round:
            plans that differ in these only count as one for the planner, which predicts the plan without them.
    """

    client: int
    hold: tuple[str, ...]
    train: tuple[str, ...]
    phases: tuple[Phase, ...]
    down: Mapping[str, str] = field(default_factory=dict)
    up: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = set(self.train) - set(self.hold)
        assert not missing, f"a plan trains blocks that it does not hold: {sorted(missing)}"
        missing = {block for phase in self.phases for block in phase.train or ()} - set(self.train)
        assert not missing, f"a phase trains blocks that its plan does not train: {sorted(missing)}"

    def to_json(self) -> dict[str, Any]:
        """The plan as a dictionary of JSON values."""
        return dataclasses.asdict(self)

    def for_client(self, client: int) -> Plan:
        """The same plan for another client."""
        self.shape_key()  # what is known of this one holds for that one
        plan = copy.copy(self)
        plan.__dict__["client"] = client
        return plan

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_json` wrote, also after a trip through JSON text."""
        rest = dict(value)
        phases = tuple(
            Phase(**{**phase, "train": None if phase.get("train") is None else tuple(phase["train"])})
            for phase in rest.pop("phases")
        )
        return cls(hold=tuple(rest.pop("hold")), train=tuple(rest.pop("train")), phases=phases, **rest)

    def without_details(self) -> Plan:
        """The plan by which the planner predicts this one."""
        return dataclasses.replace(self, details={}) if self.details else self

    def shape_key(self) -> str:
        """Text that is equal for plans that build the same sub-model and train it the same way, whoever the client."""
        return self._shape_key

    def cost_key(self) -> str:
        """32 hexadecimal digits that are equal for plans whose training needs the same memory: whoever the client, however
        the tensors travel, whatever the details, and however long it trains (one step, before which the optimiser has no state,
        or more).
        """
        options = json.dumps(self.options, sort_keys=True) if self.options else "{}"
        phases = tuple((phase.objective, phase.batch_size, phase.steps == 1, phase.train) for phase in self.phases)
        return _cost_key(tuple(self.hold), tuple(self.train), options, phases)

    @cached_property
    def _shape_key(self) -> str:
        if self.options or self.details or self.down or self.up:
            value = self.to_json()
            del value["client"]
            return json.dumps(value, sort_keys=True)
        return _plain_shape_key(tuple(self.hold), tuple(self.train), tuple(self.phases))


@functools.lru_cache(maxsize=4096)
def _plain_shape_key(hold: tuple[str, ...], train: tuple[str, ...], phases: tuple[Phase, ...]) -> str:
    return json.dumps(["plain", hold, train, [dataclasses.astuple(phase) for phase in phases]])


@functools.lru_cache(maxsize=4096)
def _cost_key(hold: tuple[str, ...], train: tuple[str, ...], options: str, phases: tuple[Any, ...]) -> str:
    return hashlib.blake2b(json.dumps([hold, train, options, phases]).encode(), digest_size=16).hexdigest()
