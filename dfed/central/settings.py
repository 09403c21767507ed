"""The settings of training on one device, section by section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dfed.checkpoint import CheckpointSettings
from dfed.choices import DataSettings
from dfed.client import ClientSettings, TrainingSettings
from dfed.fleet.budget import Memory
from dfed.memory import MemorySettings
from dfed.plan import Phase

__all__ = ["BudgetSettings", "EpochSettings", "SampleSettings", "SaveSettings"]


class SampleSettings(DataSettings):
    """The data, apart from the options of the data set.

    Attributes:
        train_samples: How many of the training samples are trained on, a choice keyed by the seed; None: all.
    """

    train_samples: Annotated[int, Field(ge=1)] | None = None


class BudgetSettings(MemorySettings):
    """What training may add to the memory of the process, and how it is held to that.

    Attributes:
        budget: Bytes, or a share of what plainly training the full model needs, as a fleet's; None: no limit.
    """

    budget: Memory = None


class EpochSettings(TrainingSettings):
    """Training of the whole length, with one optimiser; the learning rate follows the epochs.

    Attributes:
        epochs: Passes over the training samples.
    """

    epochs: Annotated[int, Field(ge=1)] = 1

    @property
    def epoch(self) -> Phase:
        """One epoch."""
        return Phase(batch_size=self.batch_size, epochs=1, drop_last=self.drop_last)

    def as_client(self) -> ClientSettings:
        """The settings of a client that trains for one epoch in this way; its learning rate is constant."""
        plain = {name: value for name, value in self.to_dict().items() if name != "schedule"}
        return ClientSettings.model_validate({**plain, "epochs": 1})


class SaveSettings(CheckpointSettings):
    """When checkpoints are written.

    Attributes:
        every: Epochs between checkpoints; one is also written at the end and on SIGTERM.
    """

    every: Annotated[int, Field(ge=1)] = 1
