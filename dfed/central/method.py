"""What a method of training one model on one device is: one class, whose work is cut into epochs.

State goes in, state comes out: an epoch is a function of the state that it starts from, so it can be done again after it ran
out of memory over what libraries keep, stopped between two of its steps, and gone on with from a checkpoint, to the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dfed.central.settings import EpochSettings
from dfed.central.state import Tally, TrainState
from dfed.data import Dataset
from dfed.errors import ConfigError, Fault
from dfed.fleet import Fleet
from dfed.models import Chain
from dfed.planner import Store
from dfed.planner.costs import margins
from dfed.settings import format_bytes

__all__ = ["Method", "Outcome", "Problem", "VariantCosts"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a method works on.

    Attributes:
        chain: The full model, without storage (meta device).
        data: The training samples.
        settings: How is trained.
        seed: Keys every draw.
        device: What is trained on.
        store: Where predictions are kept.
        budget_bytes: What training may add to the process; None: no limit.
        by_prediction: Whether budgets are kept by prediction (``memory.enforce: predicted``).
        fleet: Devices for which the model is; None: none are given.
    """

    chain: Chain
    data: Dataset
    settings: EpochSettings
    seed: int
    device: torch.device
    store: Store
    budget_bytes: int | None = None
    by_prediction: bool = False
    fleet: Fleet | None = None

    def needed_bytes(self, peak_bytes: int) -> int:
        """The smallest budget that is sure to do for a predicted peak."""
        share, overhead_bytes = margins(self.device, self.by_prediction)
        return math.ceil(peak_bytes * (1 + share)) + overhead_bytes

    def fits(self, peak_bytes: int) -> bool:
        """Whether the budget is sure to do for a predicted peak."""
        return self.budget_bytes is None or self.needed_bytes(peak_bytes) <= self.budget_bytes

    def too_small(self, peak_bytes: int, what: str) -> ConfigError:
        """The error that says that the budget does not do, even for the smallest peak that there can be.

        Args:
            what: What it is that needs most.
        """
        needed = self.needed_bytes(peak_bytes)
        message = (f"must be at least {format_bytes(needed)} ({needed} bytes), the smallest budget on which this method can "
                   f"train this model, but is {format_bytes(self.budget_bytes)}: {what} needs most.")
        return ConfigError([Fault("memory.budget", message)])


@dataclass(frozen=True, kw_only=True)
class VariantCosts:
    """What a sub-model costs.

    Attributes:
        num_params: Parameters.
        num_bytes: Parameters and floating-point buffers as float32.
        forward_flops: Floating-point operations of a forward pass, per sample (a product and a sum are two).
        training_flops, int8_flops: Operations of a training step of this sub-model, per sample, in floating point and in int8.
        peak_bytes: Predicted peak of the tensors of such a step, all that training keeps between steps included.
        share: Of the training steps, the share that is expected to train it; 0: it is none of its own, but part of others.
    """

    num_params: int
    num_bytes: int
    forward_flops: float
    training_flops: float
    int8_flops: float
    peak_bytes: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an epoch, or the part of it that was done, leaves behind.

    Attributes:
        state: Its tensors lie where they were trained; ``totals`` are those that it started with.
        tally: Of the steps done, which bear the names of variants.
    """

    state: TrainState
    tally: Tally


class Method(ABC):
    """One way of training.

    Subclasses take their settings as keyword-only parameters of ``__init__``, after ``problem``.

    Attributes:
        problem: As given.
        heeds_fleet: Whether the problem's fleet, if there is one, makes a difference.
        needs_validation: Whether it chooses by what is found on ``metrics.split``, which then must not be the test set.
    """

    heeds_fleet = False
    needs_validation = False

    def __init__(self, problem: Problem):
        self.problem = problem

    @classmethod
    def keyed_by(cls, options: Mapping[str, object]) -> frozenset[str]:
        """Of ``memory`` (the budget and how it is kept) and ``epochs``, what decides the trained bits with these options.

        For most methods neither: a larger budget changes nothing, and more epochs come behind those that are done.
        """
        return frozenset()

    def work_in(self, folder: Path, epoch: int) -> None:  # noqa: B027 - most keep nothing
        """Called once before the training: files may be kept in ``folder``, which need not exist.

        What an earlier attempt has left there is to be removed, unless it helps in going on with ``epoch``.

        Raises:
            TrainingFailed: If there is too little room.
        """

    def close(self, finished: bool) -> None:  # noqa: B027 - as above
        """Called once, after the training. With ``finished`` nothing may be left in the folder of :meth:`work_in`."""

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate of an epoch."""
        settings = self.problem.settings
        return settings.learning_rate * settings.schedule.at(epoch, settings.epochs)

    @property
    def num_epochs(self) -> int:
        """How many epochs the whole training has; by default as configured."""
        return self.problem.settings.epochs

    @abstractmethod
    def first_tensors(self) -> dict[str, Tensor]:
        """All tensors of a new model, by name, on the CPU."""

    @abstractmethod
    def epoch(self, state: TrainState, stopped: Callable[[], bool]) -> Outcome:
        """Go on with the epoch ``state.epoch``, after ``state.step`` of its steps, to its end.

        Called under the cap: all that it allocates counts against the budget. Draws are keyed by seed, epoch and step.

        Args:
            stopped: Asked after every step; true ends the work there.

        Raises:
            TrainingFailed: If the loss is not finite; names epoch and step.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of all storage: what an epoch that failed has left, and what one that is done needs no more."""

    @abstractmethod
    def rehearse(self, num_samples: int) -> None:
        """One step of each kind on ``num_samples`` zeros, without a cap, that leaves nothing but what libraries keep.

        What fails is left to the real training.
        """

    @abstractmethod
    def variants(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Models to evaluate, by name, the trained one last: makers of modules without storage.

        Their tensors have names that a state's have.
        """

    def variant_after(self, epoch: int) -> str:
        """Name of the variant that is evaluated after an epoch."""
        return list(self.variants())[-1]

    def choose(self, accuracies: Mapping[str, float]) -> str | None:
        """Of variants with these accuracies on held-out samples, the one to be used; None: the method does not choose."""
        return None

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]] | None:
        """Headings and rows of a table of what is done in which order, to be shown before; None: there is none."""
        return None

    @abstractmethod
    def costs(self) -> Mapping[str, VariantCosts]:
        """Of each variant. Nothing is run or allocated."""

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the whole training."""
        return max(cost.peak_bytes for cost in self.costs().values() if cost.share)
