"""Small trainings by local losses that several tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from central_problem import problem

from dfed.blocks.local_blocks import Block
from dfed.blocks.local_heads import head_filters
from dfed.central.local_method import LocalMethod
from dfed.central.method import Problem
from dfed.central.neuroflux import NeuroFlux
from dfed.central.state import TrainState, empty_totals
from dfed.planner import Store

CNN = {"channels": [4, 6], "kernel": 3, "hidden": 8, "norm": "batch", "dropout": [0.2, 0.0]}
TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01}
BLOCKS = ((0, 1, 7), (1, 3, 5))  # layers, and mini-batch; of 24 samples the last mini-batches are not full
STORE = Store(None)
"""Predictions, which most tests share."""


class Given(LocalMethod):
    """NeuroFlux with given blocks (first layer, end, mini-batch), whatever a budget says; nothing is predicted."""

    def __init__(self, posed: Problem, blocks: Sequence[tuple[int, int, int]], cache: str = "fp32"):
        super().__init__(posed, cache=cache, exit_tolerance=None, filters_of=lambda start, stop: head_filters(
            posed.chain, start, stop, "scaled", 0.5, 3, 256))
        self.blocks = [Block(index, *block, 1) for index, block in enumerate(blocks)]


class NoPredictions(Store):
    """Says that everything costs 1."""

    def get(self, depends: Any, work_out: Callable[[], Any]) -> Any:
        return [1.0] * 5


def neuroflux(model: str = "cnn", options: dict[str, Any] | None = None, training: dict[str, Any] | None = None,
              blocks: Sequence[tuple[int, int, int]] | None = BLOCKS, problem_of: dict[str, Any] | None = None,
              **settings: Any) -> LocalMethod:
    """The method on random images; ``blocks`` None: those that follow from the budget."""
    store = STORE if blocks is None else NoPredictions(None)
    posed = problem(model, CNN if options is None else options, {**TRAINING, **(training or {})}, store=store,
                    **(problem_of or {}))
    return NeuroFlux(posed, **{"smallest_filters": 3, **settings}) if blocks is None else Given(posed, blocks, **settings)


def first_state(method: LocalMethod) -> TrainState:
    """Where its training starts."""
    return TrainState(tensors=method.first_tensors(), totals=empty_totals())


class Looks:
    """Says stop at the looks of these numbers, from 1."""

    def __init__(self, *stops: int):
        self._stops, self.count = stops, 0

    def __call__(self) -> bool:
        self.count += 1
        return self.count in self._stops


def train(method: LocalMethod, folder: Path, state: TrainState | None = None, *, until: int | None = None,
          stopped=lambda: False) -> TrainState:
    """From a state to the end of the training, or to an epoch; a stop is followed by going on."""
    state = state or first_state(method)
    method.work_in(folder, state.epoch)
    while state.epoch < (method.num_epochs if until is None else until):
        state = method.epoch(state, stopped).state
        method.release()
    return state


def bits(state: TrainState) -> dict[Any, bytes]:
    """All tensors of a state, to the bit."""
    slots = {(name, slot): value for name, kept in state.slots.items() for slot, value in kept.items()}
    return {key: value.numpy().tobytes() for key, value in {**state.tensors, **slots}.items()}
