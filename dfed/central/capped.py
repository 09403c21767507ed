"""Epochs under the hard cap, in a thread that can be thrown away (see :mod:`dfed.client.thread`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from dfed.central.method import Outcome
from dfed.central.prepared import Prepared
from dfed.central.state import TrainState
from dfed.client.thread import TrainingThread
from dfed.errors import DfedError, TrainingFailed
from dfed.memory import is_out_of_memory, make_cap
from dfed.plan import Plan
from dfed.planner.ways import too_few_values
from dfed.settings import format_bytes

__all__ = ["Capped", "Stretch"]


@dataclass(frozen=True)
class Stretch:
    """What was done under the cap.

    Attributes:
        outcome: Its tensors lie on the CPU.
        peak_bytes: Measured; None where it cannot be.
        time_s: Wall time, rehearsals and other tries included.
    """

    outcome: Outcome
    peak_bytes: int | None
    time_s: float


class Capped:
    """Carries out the epochs of a prepared training under its budget."""

    def __init__(self, prepared: Prepared):
        self._prepared, self._method, self._budget = prepared, prepared.method, prepared.budget_bytes
        self._cap = make_cap(prepared.config.memory, prepared.device, has_budgets=self._budget is not None)
        self._thread = TrainingThread(prepared.device, lambda: self._method.rehearse(2))
        # What the thread remembers of plans, it remembers of this one: there is no other.
        self._plan = Plan(client=0, hold=("model",), train=("model",), phases=(prepared.config.training.epoch,))

    def epoch(self, state: TrainState, stopped: Callable[[], bool]) -> Stretch:
        """Go on with the epoch in progress; see :meth:`Method.epoch`.

        Raises:
            TrainingFailed: If memory runs out, or the loss is not finite.
        """
        begun = time.perf_counter()
        if self._prepared.config.memory.enforce == "predicted" and self._budget is not None and \
                self._method.peak_bytes > self._budget:
            raise TrainingFailed(self._too_small("predicted to take more than"))
        try:
            outcome, peak_bytes = self._thread.run_under(self._cap, lambda: self._work(state, stopped))
        except DfedError:
            raise
        except Exception as error:
            reason = too_few_values(error) if isinstance(error, ValueError) else None
            if reason is not None:
                raise TrainingFailed(f"the last mini-batch of an epoch, or a part of one, cannot be trained on: {reason}; "
                                     "`training.drop_last` leaves a last one out, a larger `method.micro_batch` makes larger "
                                     "parts; a training begun without has to begin anew.") from error
            capped = self._cap.enforces and self._budget is not None
            if not is_out_of_memory(error, capped=capped):
                raise
            if not capped:
                raise TrainingFailed(f"training must find enough memory, but this machine ran out of it: {error}") from error
            raise TrainingFailed(self._too_small("out of memory under")) from error
        return Stretch(outcome, peak_bytes, time.perf_counter() - begun)

    def _work(self, state: TrainState, stopped: Callable[[], bool]) -> tuple[Outcome, int | None]:
        method, budget = self._method, self._budget
        num_samples, meter = self._prepared.data.train.num_samples, None
        method.release()
        if self._cap.enforces and budget is not None and self._thread.must_rehearse(
            self._plan, num_samples, peak_bytes=method.peak_bytes, budget_bytes=budget
        ):
            method.rehearse(min(self._prepared.config.training.batch_size, num_samples))
        try:
            with self._cap.guard(budget, measure_peak=True) as meter:
                outcome = method.epoch(state, stopped)
            tensors = {name: value.cpu() for name, value in outcome.state.tensors.items()}
            slots = {name: {slot: value.cpu() for slot, value in own.items()} for name, own in outcome.state.slots.items()}
        finally:
            method.release()
        return replace(outcome, state=replace(outcome.state, tensors=tensors, slots=slots)), meter.peak_bytes

    def _too_small(self, what: str) -> str:
        """What is wrong with the budget, and which would do."""
        enough = self._prepared.needed_bytes(self._method.peak_bytes)
        parts = [f"a budget of {format_bytes(enough)} would do for this config ({enough} bytes)"]
        fitting = [name for name, cost in self._method.costs().items()
                   if self._prepared.needed_bytes(cost.peak_bytes) <= (self._budget or 0)]
        if fitting and len(self._method.costs()) > 1:
            parts.append(f"steps of these fit: {', '.join(fitting)}")
        return (f"`memory.budget` must be large enough for training, which is {what} {format_bytes(self._budget)}: "
                f"by the planner's prediction {'; '.join(parts)}; a smaller `training.batch_size` or "
                "`training.activation_checkpointing` lowers it.")

    def close(self) -> None:
        """End the thread."""
        self._thread.close()
