"""Keyed randomness: every draw is a pure function of ``(seed, purpose, *keys)``.

No draw depends on the rank, on the order of execution, or on a global generator, so a run gives the same bits on any
number of ranks, and after any interruption.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

__all__ = ["Permutation", "device_generator", "key", "numpy_generator", "torch_generator", "uniform"]


def key(seed: int, purpose: str, *keys: int | str) -> int:
    """A 128-bit integer that depends on every argument and on nothing else.

    Args:
        seed: The run's seed.
        purpose: What the draw is for, e.g. ``"cohort"``; distinct purposes are independent.
        keys: Further integers or strings, e.g. the round and the client.
    """
    text = "\x1f".join([str(int(seed)), purpose, *(f"{type(k).__name__}:{k}" for k in _plain(keys))])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _plain(keys: tuple[int | str, ...]) -> list[int | str]:
    return [k if isinstance(k, str) else int(k) for k in keys]


def torch_generator(seed: int, purpose: str, *keys: int | str) -> torch.Generator:
    """A CPU ``torch.Generator`` for this key (torch's CPU engine takes 32 bits of the seed)."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(key(seed, purpose, *keys) & 0xFFFFFFFF)
    return generator


def device_generator(device: torch.device, seed: int, purpose: str, *keys: int | str) -> torch.Generator:
    """As :func:`torch_generator`, on ``device``; other devices draw other numbers."""
    if device.type == "cpu":
        return torch_generator(seed, purpose, *keys)
    generator = torch.Generator(device=device)
    generator.manual_seed(key(seed, purpose, *keys) & 0xFFFFFFFF)
    return generator


def numpy_generator(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """A NumPy generator (Philox, counter based) for this key."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *keys)))


def uniform(seed: int, purpose: str, *keys: int | str) -> float:
    """One number in [0, 1) for this key; needs no generator object."""
    return (key(seed, purpose, *keys) >> 75) / float(1 << 53)


class Permutation:
    """A keyed permutation of ``range(size)`` that, if it is long, is never written down.

    A four-round Feistel network over the next even power of two, walked until the value falls inside the range. One
    look-up costs O(1) time and memory, whatever the size, which is what keeps a fleet of a million clients as cheap as
    one of a thousand. Up to ``TABLE_SIZE`` elements, where so few rounds would favour some orders, it is a shuffled table.

    Args:
        size: Number of elements, at least 1.
        seed, purpose, keys: As for :func:`key`.
    """

    ROUNDS = 4
    TABLE_SIZE = 4096

    def __init__(self, size: int, seed: int, purpose: str, *keys: int | str):
        assert size >= 1, f"a permutation needs at least 1 element, not {size}"
        self.size = size
        self._table: np.ndarray | None = None
        if size <= self.TABLE_SIZE:
            self._table = numpy_generator(seed, purpose, *keys).permutation(size)
            return
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        self._round_keys = [np.uint64(key(seed, purpose, *keys, i) & (2**64 - 1)) for i in range(self.ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index must be at least 0 and less than {self.size}, but is {index}.")
        return int(self.take(np.asarray([index]))[0])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Images of ``indices`` (any shape, integers in ``[0, size)``) as int64 of the same shape."""
        flat = np.asarray(indices).astype(np.uint64).reshape(-1)
        assert flat.size == 0 or int(flat.max()) < self.size, "index outside the permutation"
        if self._table is not None:
            return self._table[flat].astype(np.int64).reshape(np.shape(indices))
        out = self._feistel(flat)
        outside = out >= self.size
        while outside.any():
            out[outside] = self._feistel(out[outside])
            outside = out >= self.size
        return out.astype(np.int64).reshape(np.shape(indices))

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for round_key in self._round_keys:
            left, right = right, left ^ (_mix(right + round_key) & self._mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every input bit reaches every output bit. Overflow wraps by design."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
