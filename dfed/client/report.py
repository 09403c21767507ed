"""What a rank tells the server of one client's round."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field

from dfed.memory import is_out_of_memory
from dfed.settings import format_bytes

__all__ = ["FEATURES_LOST", "ClientReport"]

FEATURES_LOST = "features_lost"

_TRACEBACK_CHARACTERS = 4000
_ERROR_CHARACTERS = 120
_ONE_VALUE = "Expected more than 1 value per channel when training"


@dataclass(kw_only=True)
class ClientReport:
    """What a rank tells the server of one client's round; JSON values only.

    Attributes:
        status: ``completed``, ``oom`` or ``failed``.
        reason: Why it did not complete: ``oom``, or of the failed: ``exception``, ``non_finite``, ``out_of_range``,
            ``dropout``, ``features_lost``: what it kept in the place of its samples is gone, and the server forgets that it had
            any; and ``host_memory``: the machine ran out while no cap was in force.
        detail: The error's text, for the log.
        loss: Mean training loss over all visits.
        loss_rms: Root of the mean, over all visits, of the square of their mini-batch's mean loss.
        num_visits, num_steps: Samples seen, repetitions counted, and optimiser steps.
        peak_bytes: Measured peak of the memory that training added; None where it was not measured.
        bytes_down, bytes_up: By part of the message (header, values).
        keeps_state: Whether the client left a state for its next turn.
        time_s: Wall time on this rank, without what the client's own model was tried for.
        change_squares: By unit, the sum of the squares of what the client changed, where that is measured; see
            :func:`dfed.inertia.change_squares`.
        own_correct: Right answers of the client's own model by class, where it was tried (:class:`dfed.client.Trial`); None
            where it was not, or could not be.
    """

    client: int
    status: str = "completed"
    reason: str | None = None
    detail: str | None = None
    loss: float | None = None
    loss_rms: float | None = None
    num_visits: int = 0
    num_steps: int = 0
    peak_bytes: int | None = None
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]
    keeps_state: bool = False
    time_s: float = 0.0
    change_squares: dict[str, float] = field(default_factory=dict)
    own_correct: list[int] | None = None

    def note(self, error: Exception, cap_bytes: int | None) -> None:
        """Put down an exception of the client's training, and let go of the tensors that its frames hold.

        Args:
            cap_bytes: The budget that was enforced; None: none was.
        """
        if is_out_of_memory(error, capped=cap_bytes is not None):
            said = str(error).partition("\n")[0]
            if len(said) > _ERROR_CHARACTERS:
                said = said[-_ERROR_CHARACTERS:].partition(" ")[2]  # from the next whole word on
            self.status, self.reason = ("failed", "host_memory") if cap_bytes is None else ("oom", "oom")
            whose = "without a cap, which is this machine's lack"
            whose = whose if cap_bytes is None else f"on a budget of {format_bytes(cap_bytes)}"
            self.detail = f"out of memory {whose}: {said}"
        else:
            self.status, self.reason = "failed", "exception"
            self.detail = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
            if _ONE_VALUE in self.detail:
                self.detail += (
                    "A mini-batch of one sample reached a batch norm over a single pixel. `client.drop_last: true` leaves out "
                    "a last mini-batch that is too small; `model.norm: group`, larger images or more samples help too."
                )
        self.loss = self.loss_rms = None
        traceback.clear_frames(error.__traceback__)
