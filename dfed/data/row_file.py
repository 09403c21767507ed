"""Samples of one shape in a file, row by row: what frozen units make of data that are to be passed again and again.

Beside the rows lies a marker, JSON, which is written last: what the rows depend on, their length and their CRC-32. Without a
marker of the right key there are no rows. Rows are read, not mapped: pages of a mapped file would count as memory of the
process wherever peaks are measured, though no cap counts them.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["RowFile", "room_for"]


def room_for(folder: Path, pattern: str = "*") -> int:
    """Bytes that files in ``folder``, which need not exist, may come to: free ones of its disk, and those of files there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    held = sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file()) if folder.is_dir() else 0
    return shutil.disk_usage(there).free + held


class RowFile:
    """Rows in the file ``data``, and their marker in the file of the same name that ends with ``.json``.

    Args:
        data: Its folder is made when the rows are written.
        dtype: Floating-point, of the values as they are kept.
    """

    def __init__(self, data: Path, dtype: np.dtype):
        self.data, self.marker, self.dtype = data, data.with_suffix(".json"), dtype

    def write(self, key: str, num_rows: int, pieces: Iterable[np.ndarray]) -> bool:
        """Write rows (b, …) of this type, in order, piece by piece, and bring them to the disk itself.

        Args:
            key: What they depend on.

        Returns:
            Whether they were all there. If the pieces ended early, or raise, nothing is left of them.

        Raises:
            OSError: If the disk refuses it.
        """
        partial, count, shape, crc = self.data.with_suffix(f".{os.getpid()}.partial"), 0, (), 0
        try:
            self.data.parent.mkdir(parents=True, exist_ok=True)
            self.marker.unlink(missing_ok=True)
            with partial.open("wb") as file:
                for piece in pieces:
                    values = np.ascontiguousarray(piece, dtype=self.dtype)
                    file.write(values.data)
                    crc = zlib.crc32(values.data, crc)
                    count, shape = count + len(values), values.shape[1:]
                    del piece, values  # not beside the next ones
                file.flush()
                os.fsync(file.fileno())
            if count != num_rows:
                return False
            partial.rename(self.data)
            self._mark({"key": key, "bytes": self.data.stat().st_size, "crc32": crc, "shape": list(shape),
                        "dtype": self.dtype.name})
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _mark(self, facts: dict[str, object]) -> None:
        unfinished = self.marker.with_suffix(".partial-marker")
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self.marker)

    def fault(self, key: str, *, bytes_too: bool) -> str | None:
        """Why these are no rows that are whole and depend on ``key``; None: they are.

        Args:
            bytes_too: Whether every byte is looked at, not only how many there are.
        """
        try:
            facts = json.loads(self.marker.read_text(encoding="utf-8"))
            if facts["key"] != key:
                return f"{self.marker} is another's"
            size = self.data.stat().st_size
            if size != facts["bytes"]:
                return f"{self.data} has {size} bytes instead of {facts['bytes']}"
            if bytes_too and _checksum(self.data) != facts["crc32"]:
                return f"the checksum of {self.data} differs"
        except OSError as error:
            return f"{error.filename} cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError):
            return f"{self.marker} is damaged"
        return None

    def read(self, file: io.FileIO, places: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        """The rows at the places (b,), float32 (b, *shape), on the CPU.

        Args:
            file: The rows, open without a buffer.

        Raises:
            OSError: If the disk fails, or the file is too short.
        """
        values = np.empty((len(places), *shape), self.dtype)
        rows, row_bytes = values.reshape(len(places), -1).view(np.uint8), self.dtype.itemsize * math.prod(shape)
        for row, place in zip(rows, places.tolist(), strict=True):
            file.seek(place * row_bytes)
            view = memoryview(row)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(0, "the file is cut short")
                view = view[count:]
        return torch.from_numpy(values).float()


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            crc = zlib.crc32(piece, crc)
    return crc
