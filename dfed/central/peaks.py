"""Predicted peaks as functions of the batch size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dfed.planner import Store
from dfed.planner.line import PeakLine
from dfed.planner.ways import too_few_values

__all__ = ["Peaks", "smallest_batch"]

_BATCHES = (8, 16, 24)


class Peaks:
    """The predicted peak of some work at each batch size.

    By a line, where the work makes the same allocations at each size, in proportion to it; else each size is predicted by
    itself.

    Args:
        depends: JSON values on which the prediction depends.
        course: From a batch size to the bytes held at each allocation; see :func:`dfed.memory.predict_course`.
    """

    def __init__(self, store: Store, depends: list[Any], course: Callable[[int], list[int]]):
        self._store, self._depends, self._course = store, depends, course

    def at(self, batch: int) -> int:
        """Peak bytes at this batch size."""
        return self.alone(batch) if self._line is None else self._line.at(batch)

    def alone(self, batch: int) -> int:
        """The same from a prediction of its own.

        Raises:
            ValueError: If torch refuses to train at this size; see :func:`dfed.planner.ways.too_few_values`.
        """
        return self._store.get([*self._depends, batch], lambda: max(self._course(batch), default=0))

    @functools.cached_property
    def _line(self) -> PeakLine | None:
        lines = self._store.get([*self._depends, "line"], self._work_out)
        return PeakLine.from_json(lines)

    def _work_out(self) -> list[list[float]]:
        line = PeakLine.through(*(part for size in _BATCHES for part in (self._course(size), size)))
        return [] if line is None else line.to_json()


def smallest_batch(peaks: Peaks) -> int:
    """The smallest mini-batch on which the work runs: 1, or 2 where a batch norm would see one value a channel."""
    try:
        peaks.alone(1)
    except ValueError as error:
        if too_few_values(error) is None:
            raise
        return 2
    return 1
