"""Ascending places in ``0 … total − 1`` as bytes: a bitmap, or the Elias–Fano code, whichever is smaller.

Elias–Fano (Elias 1974, Fano 1971): the low bits of each place as they are; the high bits as the distances between one and the
next, in unary. Its length follows from the number of places alone.
"""

from __future__ import annotations

import numpy as np

from dfed.errors import WireError

__all__ = ["decode", "encode", "num_bytes"]


def _low_bits(total: int, kept: int) -> int:
    return max(0, (total // kept).bit_length() - 1) if kept else 0


def _code_bytes(total: int, kept: int) -> tuple[int, int]:
    """Bytes of the low and of the high part."""
    low = _low_bits(total, kept)
    return (kept * low + 7) // 8, (kept + (total >> low) + 8) // 8


def num_bytes(total: int, kept: int) -> int:
    """Length in bytes for ``kept`` of ``total`` places."""
    if kept in (0, total):
        return 0
    return min((total + 7) // 8, sum(_code_bytes(total, kept)))


def _is_bitmap(total: int, kept: int) -> bool:
    return (total + 7) // 8 <= sum(_code_bytes(total, kept))


def encode(chosen: np.ndarray, total: int) -> np.ndarray:
    """uint8 (num_bytes,) for distinct ascending places, int64 (kept,)."""
    kept = len(chosen)
    if kept in (0, total):
        return np.empty(0, dtype=np.uint8)
    if _is_bitmap(total, kept):
        mask = np.zeros(total, dtype=bool)
        mask[chosen] = True
        return np.packbits(mask, bitorder="little")
    low = _low_bits(total, kept)
    low_bytes, high_bytes = _code_bytes(total, kept)
    result = np.zeros(low_bytes + high_bytes, dtype=np.uint8)
    if low:
        bits = (chosen[:, None] >> np.arange(low)) & 1
        result[:low_bytes] = np.packbits(bits.astype(bool).reshape(-1), bitorder="little")
    marks = np.zeros(8 * high_bytes, dtype=bool)
    marks[(chosen >> low) + np.arange(kept)] = True
    result[low_bytes:] = np.packbits(marks, bitorder="little")
    return result


def decode(data: np.ndarray, total: int, kept: int) -> np.ndarray:
    """The places, int64 (kept,).

    Args:
        data: uint8, of :func:`num_bytes`.

    Raises:
        WireError: If ``data`` does not stand for ``kept`` distinct places below ``total``.
    """
    if kept in (0, total):
        return np.arange(kept)
    if _is_bitmap(total, kept):
        chosen = np.flatnonzero(np.unpackbits(data, bitorder="little", count=total))
    else:
        low = _low_bits(total, kept)
        low_bytes, _ = _code_bytes(total, kept)
        marks = np.flatnonzero(np.unpackbits(data[low_bytes:], bitorder="little"))
        chosen = (marks - np.arange(len(marks))) << low
        if low and len(marks) == kept:
            bits = np.unpackbits(data[:low_bytes], bitorder="little", count=kept * low).reshape(kept, low)
            chosen |= bits.astype(np.int64) @ (1 << np.arange(low))
    if len(chosen) != kept or chosen[-1] >= total or not (np.diff(chosen) > 0).all():
        raise WireError(f"the places of {kept} of {total} entries must be distinct and below {total}, but are not.")
    return chosen
