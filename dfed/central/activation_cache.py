"""Outputs of frozen units on all training samples, in a file: what the units behind them train on.

A cache is two files: the samples, row by row, and a marker, which is written last and holds a hash of what the samples depend
on. Without a marker of the right hash there is no cache. Rows are read, not mapped: pages of a mapped file would count as
memory of the process wherever peaks are measured, though no cap counts them.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

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
        there = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
        held = sum(path.stat().st_size for path in self._folder.iterdir()) if self._folder.is_dir() else 0
        free = shutil.disk_usage(there).free + held
        if free < num_bytes:
            raise TrainingFailed(
                f"the disk of {there} must have {format_bytes(num_bytes)} free ({num_bytes} bytes) for cached activations, but "
                f"has {format_bytes(free)}: `method.cache` 'fp16' takes half of what 'fp32' does, and 'none' keeps nothing.")

    def holds(self, number: int, key: str) -> bool:
        """Whether cache ``number`` is there, whole, and made of what ``key`` stands for.

        Its bytes are looked at once in a process.
        """
        try:
            marker = json.loads(self._marker(number).read_text(encoding="utf-8"))
            if marker["key"] != key or marker["bytes"] != self._data(number).stat().st_size:
                return False
            if (number, key) not in self._known:
                if marker["crc32"] != _checksum(self._data(number)):
                    return False
                self._known.add((number, key))
            return True
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Remove all other caches, and what was left half written."""
        kept = {path for number in numbers for path in (self._marker(number), self._data(number))}
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
        data, marker = self._data(number), self._marker(number)
        partial, count, shape, crc = data.with_suffix(".partial"), 0, (), 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            marker.unlink(missing_ok=True)
            with partial.open("wb") as file:
                for piece in pieces:
                    values = self._converted(piece.cpu().numpy())
                    file.write(values.data)
                    crc = zlib.crc32(values.data, crc)
                    count, shape = count + len(values), values.shape[1:]
                file.flush()
                os.fsync(file.fileno())
            if count != num_samples:
                return False
            partial.rename(data)
            text = json.dumps({"key": key, "bytes": data.stat().st_size, "crc32": crc, "shape": list(shape),
                               "dtype": self._dtype.name})
            unfinished = marker.with_suffix(".partial-marker")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.rename(marker)
            self._known.add((number, key))
        except OSError as error:
            raise TrainingFailed(f"the activations of a block cannot be cached in {self._folder}: {error.strerror}; "
                                 "`method.cache` 'none' keeps nothing.") from error
        finally:
            partial.unlink(missing_ok=True)
        return True

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
        with self._data(number).open("rb", buffering=0) as file:
            waiting: list[Future[Tensor]] = []
            try:
                for wanted in places:
                    waiting.append(self._reader.submit(self._read, file, wanted, shape))
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

    def _read(self, file: io.FileIO, places: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        values = np.empty((len(places), *shape), self._dtype)
        rows, row_bytes = values.reshape(len(places), -1).view(np.uint8), self.sample_bytes(shape)
        for row, place in zip(rows, places.tolist(), strict=True):
            file.seek(place * row_bytes)
            view = memoryview(row)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(0, "the file is cut short")
                view = view[count:]
        return torch.from_numpy(values).float()

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._reader is not None:
            self._reader.shutdown(wait=True)
            self._reader = None

    def _data(self, number: int) -> Path:
        return self._folder / f"block_{number:03d}.data"

    def _marker(self, number: int) -> Path:
        return self._folder / f"block_{number:03d}.json"


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            crc = zlib.crc32(piece, crc)
    return crc


def _result(future: Future[Tensor]) -> Tensor:
    try:
        return future.result()
    except OSError as error:
        raise TrainingFailed(f"a cache of activations cannot be read: {error.strerror}.") from error
