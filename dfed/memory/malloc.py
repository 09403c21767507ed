"""The C library's allocator: what makes a limit on the data segment exact, and fast where there is no limit.

glibc serves large requests from holes in its heap when it has them. Such memory belongs to the data segment already, so
``RLIMIT_DATA`` does not see it being used again, and a cap would leak by the size of the holes. ``tight()`` therefore
makes every block of 16 KiB or more a mapping of its own, returned to the kernel when it is freed, and keeps one arena.
Holes that are there already, or that many small blocks leave when they are freed, are filled for as long as a cap lasts, and
so is the room that a heap keeps when it shrinks: ``fill_holes()``.
``roomy()`` is the opposite, for ranks that cap nobody: freed memory stays in the heap, which saves the page faults.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MMAP_THRESHOLD_BYTES", "SmallReserve", "fill_holes", "is_glibc", "roomy", "tight", "trim"]

MMAP_THRESHOLD_BYTES = 16 * 1024
_ROOMY_BYTES = 1 << 30
_LARGEST_FILLING_BYTES = 1 << 25  # the largest threshold that every version takes
_IS_MAPPING, _IS_OF_A_THREAD = 2, 4  # bits of the size that glibc keeps in the word before each block
_HEAP_BYTES = 1 << 26  # that glibc sets aside for a thread's heap, from a multiple of it on (64-bit systems)
_RESERVED_BLOCKS = 40
_RESERVED_BLOCK_BYTES = 24 * 1024  # oneDNN's largest descriptors of convolutions take 20 KB
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def is_glibc() -> bool:
    """Whether this process runs on the GNU C library, whose allocator these functions steer."""
    return platform.libc_ver()[0] == "glibc"


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _allocating() -> ctypes.CDLL:
    libc = _libc()
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc


def tight() -> bool:
    """Make every block of at least 16 KiB a mapping of its own. Returns whether the allocator took the settings."""
    if not is_glibc():
        return False
    libc = _libc()
    taken = libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) == 1 and libc.mallopt(_M_ARENA_MAX, 1) == 1
    return taken and libc.mallopt(_M_TRIM_THRESHOLD, 8 * MMAP_THRESHOLD_BYTES) == 1


def roomy() -> bool:
    """Keep freed memory in the process, to spare page faults. Returns whether the allocator took the settings."""
    if not is_glibc():
        return False
    libc = _libc()
    # Older versions take no threshold above 32 MiB. A fixed one also stops glibc from adapting it by itself.
    large = libc.mallopt(_M_MMAP_THRESHOLD, _ROOMY_BYTES) == 1 or libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20) == 1
    return large and libc.mallopt(_M_TRIM_THRESHOLD, _ROOMY_BYTES) == 1


def trim() -> None:
    """Give all free heap pages back to the kernel (glibc only; elsewhere nothing happens)."""
    if is_glibc():
        _libc().malloc_trim(0)


class SmallReserve:
    """1 MiB of the heap for blocks of up to 24 KiB, so that they are there when a cap has no byte left for tensors.

    oneDNN does not look whether it got such a block, and the process ends with a null pointer. Made before the cap is set
    (after :func:`tight`); :meth:`release` makes holes of it, too small for any large block, each between two blocks that stay.
    glibc looks for a hole before it makes a mapping of its own for a block.
    """

    def __init__(self) -> None:
        self._libc = _allocating()
        self._libc.mallopt(_M_MMAP_THRESHOLD, 2 * _RESERVED_BLOCK_BYTES)  # from the heap
        blocks = sorted(filter(None, (self._libc.malloc(_RESERVED_BLOCK_BYTES) for _ in range(2 * _RESERVED_BLOCKS))))
        self._libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        self._blocks, self._partitions = blocks[0::2], blocks[1::2]  # every other one stays: holes side by side become one

    def release(self) -> None:
        """Make holes of every other block."""
        self._free(self._blocks)

    def close(self) -> None:
        """Give everything back."""
        self._free(self._blocks)
        self._free(self._partitions)

    def _free(self, blocks: list[int]) -> None:
        while blocks:
            self._libc.free(blocks.pop())


@contextmanager
def fill_holes() -> Iterator[None]:
    """Keep the heap's holes of 16 KiB or more occupied while the body runs, and the room at its end. Of each filling a page is
    touched.

    To be called after :func:`tight`, in the thread whose memory is to be counted.
    """
    libc, fillings, size = _allocating(), list[int](), _LARGEST_FILLING_BYTES
    try:
        while size >= MMAP_THRESHOLD_BYTES:
            block = libc.malloc(size)
            if block and not _bits(block) & _IS_MAPPING:
                fillings.append(block)
                continue
            libc.free(block)  # no hole of this size is left: it is a mapping, or nothing
            size //= 2
        _fill_end(libc, fillings)
        yield
    finally:
        for block in fillings:
            libc.free(block)


def _fill_end(libc: ctypes.CDLL, fillings: list[int]) -> None:
    """Occupy what glibc keeps writable at the end of this thread's heap when the heap shrinks; there are no holes.

    Large blocks are mappings, but where the kernel refuses one, glibc turns to that room, which the kernel counts already.
    """
    block = libc.malloc(MMAP_THRESHOLD_BYTES // 2)
    if block:
        fillings.append(block)
    if not block or not _bits(block) & _IS_OF_A_THREAD or ctypes.sizeof(ctypes.c_void_p) != 8:
        return  # the main heap gives back what it does not use
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_FILLING_BYTES)
    try:
        end = libc.malloc(MMAP_THRESHOLD_BYTES)
        if not end:
            return
        fillings.append(end)
        if _bits(end) & _IS_MAPPING:
            return
        heap = end - end % _HEAP_BYTES
        while (room := _room_at_end(heap, end)) >= MMAP_THRESHOLD_BYTES:
            block = libc.malloc(min(room, _LARGEST_FILLING_BYTES // 2))
            if not block:
                return
            fillings.append(block)
            if _bits(block) & _IS_MAPPING or block - block % _HEAP_BYTES != heap:  # not as thought
                return
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def _room_at_end(heap: int, block: int) -> int:
    """Bytes that this heap, in which ``block`` lies, can grow by without asking the kernel, but for two pages."""
    # A heap begins with where its arena is, the heap before it, its size and how much of it is writable.
    used, writable = ((ctypes.c_size_t * 4).from_address(heap)[field] for field in (2, 3))
    in_pages = used % mmap.PAGESIZE == writable % mmap.PAGESIZE == 0
    is_heap = in_pages and block < heap + used <= heap + writable <= heap + _HEAP_BYTES
    return writable - used - 2 * mmap.PAGESIZE if is_heap else 0


def _bits(block: int) -> int:
    return ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
