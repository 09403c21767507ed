"""Decoded data on disk, written once per node and shared by all its ranks.

An entry is a folder of ``.npy`` files, opened as read-only memory maps: every rank sees the same pages of the kernel's
cache, so a data set costs its size once per node, not once per rank, and does not count against a client's budget.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dfed.errors import DataError

__all__ = ["Create", "cache_folder", "cached", "fingerprint", "lock"]

FORMAT_VERSION = 1
_INDEX = "entry.json"
_log = logging.getLogger(__name__)


class Create(Protocol):
    """Makes one array of a cache entry, to be filled in: it lives on disk, so it may be larger than memory."""

    def __call__(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray: ...


def cache_folder(cache: str | None) -> Path:
    """``cache`` if given, else ``$DFED_CACHE``, else ``~/.cache/dfed``; it need not exist."""
    return Path(cache or os.environ.get("DFED_CACHE") or "~/.cache/dfed").expanduser()


def fingerprint(paths: Iterable[Path]) -> list[list[str | int]]:
    """Path, size in bytes and time of change of each file: what a cache entry made of them depends on.

    Raises:
        DataError: If a file cannot be read.
    """
    try:
        return [[str(p.resolve()), (stat := p.stat()).st_size, stat.st_mtime_ns] for p in paths]
    except OSError as error:
        raise DataError(f"'{error.filename}' must be a file that can be read, but: {error.strerror}.") from error


def cached(
    name: str, depends: dict[str, Any], build: Callable[[Create], None], *, cache: str | None
) -> dict[str, np.ndarray]:
    """The arrays that ``build`` makes, from the cache if they are there, as read-only memory maps.

    Processes that ask at the same time build once; the others wait. An entry is never seen half written. One whose
    files have the wrong size is rebuilt, with a warning.

    Args:
        name: What it is, for the entry's name.
        depends: Plain data (JSON) on which the arrays depend: options, :func:`fingerprint` of the source files.
        build: Called with a :class:`Create`, at most once; creates and fills every array.
        cache: The folder, see :func:`cache_folder`.

    Raises:
        DataError: If the folder cannot be written, and whatever ``build`` raises.
    """
    folder = cache_folder(cache)
    text = json.dumps([FORMAT_VERSION, name, depends], sort_keys=True)
    entry = folder / f"{name}-{hashlib.blake2b(text.encode(), digest_size=10).hexdigest()}"
    arrays = _open(entry)
    if arrays is not None:
        return arrays
    with lock(cache, entry.name):
        arrays = _open(entry)  # another process may have written it while this one waited
        if arrays is None:
            _write(folder, entry, build)
            arrays = _open(entry)
    if arrays is None:
        raise DataError(f"cache entry '{entry}' was written but cannot be read back; is the disk of `data.cache` well?")
    return arrays


@contextlib.contextmanager
def lock(cache: str | None, name: str) -> Iterator[None]:
    """Hold the file lock ``name`` in the cache folder, which is made if need be.

    Raises:
        DataError: If the folder cannot be written.
    """
    folder = cache_folder(cache)
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"`data.cache` must be a folder that can be written and has room, but is '{folder}': {error.strerror}."
        ) from error


def _open(entry: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an entry; None if it is absent or damaged."""
    try:
        sizes = json.loads((entry / _INDEX).read_text())
        if any((entry / file).stat().st_size != size for file, size in sizes.items()):
            return None
        return {Path(file).stem: np.load(entry / file, mmap_mode="r", allow_pickle=False) for file in sizes}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _write(folder: Path, entry: Path, build: Callable[[Create], None]) -> None:
    """Build in a temporary folder beside the entry, then rename; the caller holds the lock."""
    if entry.exists():
        _log.warning("cache entry '%s' is damaged: it is built again.", entry)
        with _cache_errors(folder):
            shutil.rmtree(entry)
    with _cache_errors(folder):
        temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=folder))
    arrays: list[np.memmap] = []

    def create(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        file = temporary / f"{name}.npy"
        with _cache_errors(folder):
            arrays.append(np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape))
            # A memory map on a full disk ends in SIGBUS; claiming the room first ends in an error that can be read.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                with open(file, "r+b") as handle:
                    os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)
        return arrays[-1]

    try:
        build(create)
        with _cache_errors(folder):
            for array in arrays:
                array.flush()
            sizes = {file.name: file.stat().st_size for file in sorted(temporary.glob("*.npy"))}
            (temporary / _INDEX).write_text(json.dumps(sizes))
            temporary.chmod(0o755)  # mkdtemp's 0700 would keep other users of a shared cache out
            temporary.rename(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
