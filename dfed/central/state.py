"""All that training on one device knows between two steps, which is what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dfed.checkpoint import Saved, latest_saved, save_tensors

__all__ = ["Tally", "TrainState", "empty_totals", "latest_state", "save_state"]

_EPOCH = "epoch"  # what checkpoints are called after


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a training stands. Tensors lie on the CPU, and nobody changes them.

    Attributes:
        epoch: Epochs that are completed.
        step: Steps taken of the next one.
        tensors: Parameters and buffers of the model, by name.
        slots: The optimiser's tensors, by parameter and slot.
        totals: What the summary is made of; JSON values.
        facts: What else the method must know to go on; JSON values.
    """

    epoch: int = 0
    step: int = 0
    tensors: Mapping[str, Tensor]
    slots: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    totals: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Tally:
    """What some steps come to.

    Attributes:
        loss_sum: Sum over all visits of their mini-batch's mean loss.
        steps, visits, seconds: By kind of step, of which the name says which sub-model it trains: how many, the samples that
            passed through the model, and the wall time, from a mini-batch on the device to the end of the optimiser's step.
        other_flops: Floating-point operations of what is no step.
    """

    loss_sum: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    visits: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    other_flops: float = 0.0

    def add(self, kind: str, num_samples: int) -> None:
        """One step."""
        self.steps[kind] = self.steps.get(kind, 0) + 1
        self.visits[kind] = self.visits.get(kind, 0) + num_samples

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.loss_sum + other.loss_sum, *(
            {kind: mine.get(kind, 0) + theirs.get(kind, 0) for kind in sorted({*mine, *theirs})}
            for mine, theirs in ((self.steps, other.steps), (self.visits, other.visits), (self.seconds, other.seconds))
        ), self.other_flops + other.other_flops)


def empty_totals() -> dict[str, Any]:
    """Totals before the first step: of all, and of the epoch in progress."""
    return {"time_s": 0.0, "peak_bytes": None, "joules": 0.0, "tally": vars(Tally()),
            "epoch": {"time_s": 0.0, "peak_bytes": None, "tally": vars(Tally())}}


def save_state(folder: Path, state: TrainState, fingerprint: str, keep: int) -> None:
    """Write a checkpoint; see :func:`dfed.checkpoint.save_tensors`.

    Raises:
        CheckpointError: If the disk refuses it.
    """
    tensors = {f"params/{name}": value for name, value in state.tensors.items()}
    for name, slots in state.slots.items():
        tensors |= {f"slots/{slot}/{name}": value for slot, value in slots.items()}
    header = {"epoch": state.epoch, "step": state.step, "totals": state.totals, "facts": state.facts,
              "params": list(state.tensors)}
    save_tensors(folder, _EPOCH, state.epoch, Saved(header, tensors), fingerprint, keep)


def latest_state(folder: Path, fingerprint: str) -> TrainState | None:
    """The newest checkpoint in ``folder`` that is whole; None if there is none at all.

    Raises:
        CheckpointError: If there are checkpoints and none is whole, or the newest whole one is of another configuration.
    """
    return latest_saved(folder, _EPOCH, fingerprint, _state_of)


def _state_of(saved: Saved) -> TrainState:
    header, slots = saved.header, dict[str, dict[str, Tensor]]()
    for key, value in saved.tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "slots":
            slot, _, name = rest.partition("/")
            slots.setdefault(name, {})[slot] = value
    params = {name: saved.tensors[f"params/{name}"] for name in header["params"]}  # the file has an order of its own
    return TrainState(epoch=header["epoch"], step=header["step"], tensors=params, slots=slots, totals=header["totals"],
                      facts=header["facts"])
