"""Measured memory of this process on Linux: its data segment, and the high-water mark of its resident memory."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["data_segment_bytes", "generated_code_bytes", "peak_resident_bytes", "reset_peak_resident", "resident_bytes"]

_STATUS = Path("/proc/self/status")
_MAPS = Path("/proc/self/maps")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None, f"{_STATUS} has no line {field}"
    return int(match.group(1)) * 1024


def data_segment_bytes() -> int:
    """Bytes that the kernel holds against ``RLIMIT_DATA``: heap and private writable mappings, touched or not."""
    return _status_bytes("VmData")


def generated_code_bytes() -> int:
    """Bytes of private mappings that are both writable and executable: kernels that libraries generated, room included.

    They are part of :func:`data_segment_bytes`, though most of their pages are never touched.
    """
    total = 0
    for line in _MAPS.read_text().splitlines():
        where, permissions, _ = line.split(" ", 2)
        if permissions == "rwxp":
            start, end = where.split("-")
            total += int(end, 16) - int(start, 16)
    return total


def resident_bytes() -> int:
    """Bytes of this process in physical memory."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Highest resident memory since :func:`reset_peak_resident`."""
    return _status_bytes("VmHWM")


def reset_peak_resident() -> bool:
    """Start the high-water mark anew. Returns False where the kernel does not offer this."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True
