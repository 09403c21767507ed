"""The server's side of measuring inertia: the reference model, which survives an interruption, and each round's figures."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dfed.inertia import movement
from dfed.state import ServerState, save_file

__all__ = ["REFERENCE", "InertiaRecord"]

logger = logging.getLogger(__name__)

REFERENCE = "inertia_reference.safetensors"
"""Name of the file, in a run folder, that holds the parameters of the reference model."""

_ROUNDS = "rounds_completed"


class InertiaRecord:
    """Measures the global model round by round, against the round before and a reference model.

    Args:
        folder: The run folder. The reference model is written there; where that fails it is logged, and the run goes on.
        units: The unit of each parameter, by name.
        reference: The number of completed rounds after which the global model is the reference.
        state: Where the run begins or goes on. If it is past the reference and the file is not there, or is another model's,
            that is logged, and there are no values against the reference.
    """

    def __init__(self, folder: Path, *, units: Mapping[str, str], reference: int, state: ServerState):
        self._path, self._units, self._rounds = folder / REFERENCE, units, reference
        self._reference: dict[str, Tensor] | None = None
        if state.round_index == reference:
            self._take(state)
        elif state.round_index > reference:
            self._reference = self._read(state)

    def measure(self, old: ServerState, new: ServerState, diversity: Mapping[str, float | None]) -> dict[str, dict[str, Any]]:
        """The figures of the round between two states, by unit and name; what is not known is left out.

        Args:
            diversity: Of each unit that some client sent in the round, or None where it is not known; other units have no
                figures.
        """
        found = movement(new.params, old.params, self._reference, self._units, diversity.keys())
        for unit, values in found.items():
            if (known := diversity[unit]) is not None:
                values["diversity"] = known
        if new.round_index == self._rounds:
            self._take(new)
        return found

    def _take(self, state: ServerState) -> None:
        """Make this state's model the reference, here and on disk."""
        self._reference = {name: state.params[name].clone() for name in self._units}
        partial = self._path.with_name(f".{REFERENCE}.partial")
        try:
            save_file(self._reference, partial, metadata={_ROUNDS: str(state.round_index)})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self._path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            logger.warning("the reference model of the inertia cannot be written to %s (%s): values against it would not "
                           "survive an interruption", self._path, error)

    def _read(self, state: ServerState) -> dict[str, Tensor] | None:
        try:
            with safe_open(self._path, framework="pt") as file:
                rounds, found = (file.metadata() or {}).get(_ROUNDS), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            why = f"it cannot be read: {error}"
        else:
            expected = {name: state.params[name] for name in self._units}
            if rounds == str(self._rounds) and _kinds(found) == _kinds(expected):
                return found
            why = f"it holds another model, or that after {rounds} rounds instead of {self._rounds}"
        logger.warning("the inertia of this run has no values against the reference round from here on, as %s should hold its "
                       "model, but %s (said once)", self._path, why)
        return None


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
