"""What work on long tensors must know of the processor: how much of one to take at a time."""

from __future__ import annotations

import functools
import re
from pathlib import Path

__all__ = ["piece_length"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 2**10, "M": 2**20}
_LARGE = 2**20  # bytes of a second-level cache that holds the pieces which were found best with one


def piece_length(cached: int) -> int:
    """Entries of a long tensor to work on at a time: ``cached``, which a large second-level cache holds.

    Four times as many where this processor's is smaller (known on Linux only): then pieces stay in the third level whatever
    their length, and calling an operator for each of them is what costs. No result depends on it.
    """
    size = _second_level_bytes(_CACHES)
    return cached if size is None or size >= _LARGE else 4 * cached


@functools.cache
def _second_level_bytes(caches: Path) -> int | None:
    """Size of a core's second-level cache; None if it cannot be found out."""
    try:
        for folder in caches.glob("index*"):
            size = re.fullmatch(r"(\d+)([KM]?)\s*", (folder / "size").read_text(encoding="ascii"))
            if size and (folder / "level").read_text(encoding="ascii").strip() == "2":
                return int(size[1]) * _UNITS[size[2]]
    except (OSError, UnicodeDecodeError):  # e.g. a system that shows nothing of its caches
        return None
    return None
