"""Every error that dfed raises on purpose.

    DfedError
    ├── ConfigError (ValueError)        the user's settings; carries all faults at once
    ├── DataError (ValueError)          data that is missing, or cannot be dealt out as asked
    ├── CheckpointError                 a checkpoint that is absent, cut short, or of another run
    ├── FeaturesLost                    what a client keeps in the place of its samples is not there, or damaged
    ├── WireError                       a message that is malformed; names round, client and rank
    ├── SumsLost                        a rank's partial sums that were spoiled half-way through an addition
    ├── ExchangeFailed                  an error of the server's while updates were on their way to it
    ├── UpdateRejected                  a client's update that must not enter the mean
    ├── TrainingFailed                  training on one device that cannot go on: out of memory, or a loss that is not finite
    ├── TooManyFailures                 more of a cohort failed than ``server.max_failed_fraction`` allows
    └── RankLost                        a rank that died, or stopped answering

Faults read: "`field` must be …, but is …."
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DfedError",
    "ExchangeFailed",
    "Fault",
    "FeaturesLost",
    "RankLost",
    "SumsLost",
    "TooManyFailures",
    "TrainingFailed",
    "UpdateRejected",
    "WireError",
]


class DfedError(Exception):
    """Base of all errors that dfed raises on purpose."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a config: the dotted ``field`` and what to do about it."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"`{self.field}` {self.message}"


class ConfigError(DfedError, ValueError):
    """One or more faults in the settings, all reported together."""

    def __init__(self, faults: Sequence[Fault]):
        assert faults, "a ConfigError needs at least one fault"
        self.faults = tuple(faults)
        count = len(self.faults)
        head = "1 fault" if count == 1 else f"{count} faults"
        super().__init__("\n".join([f"{head} in the config:", *(f"  {fault}" for fault in self.faults)]))


class DataError(DfedError, ValueError):
    """Data that is not there, cannot be read, or cannot be dealt out as asked."""


class CheckpointError(DfedError):
    """A checkpoint that is absent, damaged, or of another configuration."""


class FeaturesLost(DfedError):
    """A client's features are not there, or damaged; it can make them again."""


class WireError(DfedError):
    """A message between ranks that is malformed."""


class ExchangeFailed(DfedError):
    """An error of the server's while the other ranks were sending; they cannot be told."""


class SumsLost(DfedError):
    """A rank's partial sums were spoiled half-way through an addition; the round cannot be completed."""


class UpdateRejected(DfedError):
    """A client's update that must not be aggregated; ``reason`` is what the metrics count it under."""

    def __init__(self, reason: str, message: str):
        self.reason = reason
        super().__init__(message)


class TooManyFailures(DfedError):
    """More clients of one round failed than the settings allow."""


class TrainingFailed(DfedError):
    """Training on one device cannot go on: out of memory, or with a loss that is not finite."""


class RankLost(DfedError):
    """A rank died or stopped answering; ``ranks`` names them as far as is known."""

    def __init__(self, message: str, ranks: Sequence[int] = ()):
        self.ranks = tuple(ranks)
        super().__init__(message)
