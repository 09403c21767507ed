"""Readers of the raw files of known data sets: plain bytes in, arrays out; nothing is unpickled or extracted."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dfed.errors import DataError

__all__ = ["parse_cifar", "read_idx", "read_members"]

_DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read a file in MNIST's idx format (bytes, big-endian sizes), plain or with ``.gz`` compressed.

    Args:
        path: The file.
        ndim: Number of dimensions that it must have: 3 for images, 1 for labels.

    Returns:
        uint8 array, read-only.

    Raises:
        DataError: If the file cannot be read, is cut short, or is of another format.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except _DAMAGED as error:
        raise _damaged(path, f"an idx file that can be read, but: {error}") from error
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes([0, 0, 8, ndim]):
        start = data[:4].hex() or "nothing"
        raise _damaged(path, f"an idx file of bytes in {ndim} dimensions, but starts with {start}")
    shape = tuple(np.frombuffer(data, dtype=">u4", count=ndim, offset=4).tolist())
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise _damaged(path, f"{expected} bytes long (decompressed) for its shape {shape}, but is {len(data)}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def read_members(source: Path, folder: str, names: Sequence[str]) -> dict[str, bytes]:
    """Contents of the files ``folder/name``, from the folder itself or from a ``.tar.gz`` that holds it.

    An archive is read in memory; nothing but the expected regular files is looked at.

    Args:
        source: The folder, or the archive.
        folder: Name of the folder in the archive.
        names: The files' names.

    Raises:
        DataError: If the source is damaged, or a file is missing.
    """
    path = source
    try:
        if source.is_dir():
            found = {}
            for name in names:
                path = source / name
                found[name] = path.read_bytes()
            return found
        wanted = {f"{folder}/{name}": name for name in names}
        with tarfile.open(source, "r:gz") as archive:
            found = {
                wanted[member.name]: archive.extractfile(member).read()
                for member in archive
                if member.name in wanted and member.isreg()
            }
    except _DAMAGED as error:
        raise _damaged(path, f"a file that can be read, but: {error}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise _damaged(source, f"an archive with {folder}/{missing[0]}, but has no such file")
    return found


def parse_cifar(data: bytes, *, label_bytes: int, num_classes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Take apart a file of CIFAR's binary version: records of labels and 3 × 32 × 32 pixels.

    Args:
        data: The file's contents.
        label_bytes: Labels per record: 1 in CIFAR-10; 2 in CIFAR-100, of which the last, the fine one, is used.
        num_classes: Labels must be below this.
        where: The file's name, for errors.

    Returns:
        Images, uint8 (n, 3, 32, 32), and labels, uint8 (n,); views of ``data``.

    Raises:
        DataError: If the length is not a whole number of records, or a label is too large.
    """
    record = label_bytes + 3 * 32 * 32
    if not data or len(data) % record:
        raise _damaged(where, f"a whole number of records of {record} bytes, but has {len(data)} bytes")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    labels = records[:, label_bytes - 1]
    if labels.max() >= num_classes:
        raise _damaged(where, f"a file of labels less than {num_classes}, but has a label {labels.max()}")
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def _damaged(where: Path | str, text: str) -> DataError:
    return DataError(f"'{where}' must be {text}.")
