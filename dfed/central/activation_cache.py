"""Outputs of frozen units on all training samples, in a file: what the units behind them train on.

A cache is a :class:`dfed.data.row_file.RowFile`, whose key is a hash of what the samples depend on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from dfed.data.row_file import RowFile, room_for
from dfed.errors import TrainingFailed
from dfed.settings import format_bytes

__all__ = ["ActivationCache", "CacheType"]

CacheType = Literal["fp32", "fp16"]

_DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


class ActivationCache:
    """The caches of one training, by number, in a folder of their own.

    Args:
        kind: In which precision samples are kept.
    """

    def __init__(self, kind: CacheType):
        self._dtype = _DTYPES[kind]
        self._kept_in: Path | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._known: set[tuple[int, str]] = set()  # numbers and keys of caches whose bytes are what they should be

    def sample_bytes(self, shape: tuple[int, ...]) -> int:
        """What one sample takes on disk."""
        return self._dtype.itemsize * math.prod(shape)

    def work_in(self, folder: Path) -> None:
        """Keep caches in ``folder``, which is made when the first is written, and removed by :meth:`clear`."""
        self._kept_in = folder

    @property
    def _folder(self) -> Path:
        assert self._kept_in is not None, "say where to work first"
        return self._kept_in

    def start(self) -> None:
        """Start the thread that reads ahead, so that its stack does not count against a budget."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dfed-prefetch")
            self._reader.submit(int).result()

    def check_free(self, num_bytes: int) -> None:
        """Make sure that the disk has room for so much beside what the folder holds already.

        Raises:
            TrainingFailed: If it has not; says what is needed.
        """
        free = room_for(self._folder)
        if free < num_bytes:
            raise TrainingFailed(f"the disk of {self._folder} must have {format_bytes(num_bytes)} free ({num_bytes} bytes) for "
                                 f"cached activations, but has {format_bytes(free)}: `method.cache` 'fp16' takes half of what "
                                 "'fp32' does, and 'none' keeps nothing.")

    def holds(self, number: int, key: str) -> bool:
        """Whether cache ``number`` is there, whole, and made of what ``key`` stands for.

        Its bytes are looked at once in a process.
        """
        if self._rows(number).fault(key, bytes_too=(number, key) not in self._known) is not None:
            return False
        self._known.add((number, key))
        return True

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Remove all other caches, and what was left half written."""
        kept = {path for rows in map(self._rows, numbers) for path in (rows.marker, rows.data)}
        for path in sorted(self._folder.glob("block_*")) if self._folder.is_dir() else []:
            if path not in kept:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all caches, and the folder, unless it holds something else, or is a link."""
        self.keep_only([])
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def write(self, number: int, key: str, num_samples: int, pieces: Iterable[Tensor]) -> bool:
        """Write cache ``number``: samples (b, …), in order, piece by piece, on any device.

        Returns:
            Whether they were all there. If the pieces ended early, nothing is left of them.

        Raises:
            TrainingFailed: If the disk refuses it.
        """
        values = (self._converted(piece.cpu().numpy()) for piece in pieces)
        try:
            whole = self._rows(number).write(key, num_samples, values)
        except OSError as error:
            raise TrainingFailed(f"the activations of a block cannot be cached in {self._folder}: {error.strerror}; "
                                 "`method.cache` 'none' keeps nothing.") from error
        if whole:
            self._known.add((number, key))
        return whole

    def _converted(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(values, dtype=self._dtype)
        if self._dtype == np.float16 and np.isinf(converted).any() and np.isfinite(values).all():
            raise TrainingFailed(f"the activations of a block must be at most 65504 for `method.cache` 'fp16', but reach "
                                 f"{float(np.abs(values).max()):g}: keep them as 'fp32'.")
        return converted

    def batches(self, number: int, places: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The samples of cache ``number`` at the places (b,), one array after another: float32 (b, *shape), on the CPU.

        While one is worked on, the next is read in a thread.

        Raises:
            TrainingFailed: If the disk fails.
        """
        self.start()
        assert self._reader is not None
        rows = self._rows(number)
        with rows.data.open("rb", buffering=0) as file:
            waiting: list[Future[Tensor]] = []
            try:
                for wanted in places:
                    waiting.append(self._reader.submit(rows.read, file, wanted, shape))
                    if len(waiting) > 1:
                        yield _result(waiting.pop(0))  # of which nothing is kept here
                if waiting:
                    yield _result(waiting.pop())
            finally:
                for future in waiting:
                    future.exception()  # it reads from the file that is closed next

    def in_order(self, number: int, num_samples: int, size: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """All samples in order, ``size`` at a time."""
        return self.batches(number, (np.arange(start, min(start + size, num_samples))
                                     for start in range(0, num_samples, size)), shape)

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._reader is not None:
            self._reader.shutdown(wait=True)
            self._reader = None

    def _rows(self, number: int) -> RowFile:
        return RowFile(self._folder / f"block_{number:03d}.data", self._dtype)


def _result(future: Future[Tensor]) -> Tensor:
    try:
        return future.result()
    except OSError as error:
        raise TrainingFailed(f"a cache of activations cannot be read: {error.strerror}.") from error
