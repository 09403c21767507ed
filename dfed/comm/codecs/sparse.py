"""Codecs that send some of the entries: the largest, drawn ones, or those that are not zero.

How many is a share of the tensor's entries, so the size follows from the shape. Places travel as a bitmap or by the Elias–Fano
code, whichever is smaller, or not at all.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dfed.comm.codecs import places
from dfed.comm.codecs.base import Codec
from dfed.comm.codecs.casts import BF16, FP16, FP32
from dfed.comm.codecs.integers import Int8
from dfed.errors import WireError
from dfed.rng import Permutation

__all__ = ["Bitmask", "RandomK", "TopK"]

Density = Annotated[float, Field(gt=0, le=1)]
Values = Literal["fp32", "fp16", "bf16", "int8"]

_VALUES = {"fp32": FP32, "fp16": FP16, "bf16": BF16, "int8": lambda: Int8(axis="tensor")}
_SAMPLE = 1 << 14


def _count(density: float, total: int) -> int:
    """``⌈density · total⌉``, not misled by the rounding of the product."""
    return min(total, math.ceil(density * total - 1e-9))


class _Chosen(Codec):
    """Sends ``⌈density · n⌉`` of n entries; the others are 0.

    Args:
        density: Share of the entries.
        values: The codec of the entries sent.
    """

    has_places = True

    def __init__(self, *, density: Density = 0.01, values: Values = "fp32"):
        self._density, self._values = density, _VALUES[values]()

    def count(self, total: int) -> int:
        """How many of ``total`` entries are sent."""
        return _count(self._density, total)

    def num_bytes(self, shape: Sequence[int]) -> int:
        total = math.prod(shape)
        kept = self.count(total)
        return self._values.num_bytes((kept,)) + (places.num_bytes(total, kept) if self.has_places else 0)

    def parts(self, shape: Sequence[int]) -> dict[str, int]:
        total = math.prod(shape)
        own = self._values.parts((self.count(total),))
        return own | {"indices": self.num_bytes(shape) - sum(own.values())} if self.has_places else own

    def encode_into(self, value: Tensor, out: Tensor, key: int = 0) -> None:
        self._check(out, value.shape)
        flat = value.reshape(-1)
        chosen = self._choose(flat, key)
        split = self._values.num_bytes((len(chosen),))
        _encode_values(self._values, flat[chosen], out[:split], key)
        if self.has_places:
            out[split:] = torch.from_numpy(places.encode(chosen.numpy(), flat.numel()))

    def decode(self, data: Tensor, shape: Sequence[int], key: int = 0) -> Tensor:
        self._check(data, shape)
        total = math.prod(shape)
        kept = self.count(total)
        split = self._values.num_bytes((kept,))
        if self.has_places:
            chosen = torch.from_numpy(places.decode(data[split:].numpy(), total, kept))
        else:
            chosen = self._drawn(total, key)
        result = torch.zeros(total, dtype=torch.float32)
        result[chosen] = _decode_values(self._values, data[:split], kept, key)
        return result.view(tuple(shape))

    def max_error(self, value: Tensor) -> float:
        if value.numel() == 0:
            return 0.0
        return max(float(value.abs().max()), self._values.max_error(value))  # of an entry that is not sent, or is

    @abstractmethod
    def _choose(self, flat: Tensor, key: int) -> Tensor:
        """Places of the entries to send, int64, ascending if places travel."""

    def _drawn(self, total: int, key: int) -> Tensor:
        """Places that follow from the key."""
        if total == 0:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(Permutation(total, key, "random-k").take(np.arange(self.count(total))))


class TopK(_Chosen):
    """The largest entries in magnitude, by default 1 %, with their places; of equal ones the first."""

    of_change = takes_feedback = for_matrices = True

    def _choose(self, flat: Tensor, key: int) -> Tensor:
        total, size = self.count(flat.numel()), flat.abs()
        if total == flat.numel():
            return torch.arange(total)
        candidates = _candidates(size, total)
        among = size[candidates]
        threshold = torch.from_numpy(np.partition(among.numpy(), len(among) - total)[len(among) - total:len(among) - total + 1])
        above, equal = candidates[among > threshold], candidates[among == threshold]
        return torch.cat([above, equal[:total - len(above)]]).sort().values

    def max_error(self, value: Tensor) -> float:
        if value.numel() == 0:
            return 0.0
        flat = value.reshape(-1)
        chosen = self._choose(flat, 0)
        rest = flat.abs()
        rest[chosen] = 0
        return max(float(rest.max()), self._values.max_error(flat[chosen]))


def _candidates(size: Tensor, total: int) -> Tensor:
    """Places, ascending, of at least ``total`` entries that hold the ``total`` largest; few more as a rule."""
    stride = max(1, size.numel() // _SAMPLE)
    sample = size[::stride]
    rank = min(len(sample) - 1, math.ceil(1.25 * total / size.numel() * len(sample)) + 16)
    guess = np.partition(sample.numpy(), len(sample) - 1 - rank)[len(sample) - 1 - rank]
    found = torch.from_numpy(np.flatnonzero(size.numpy() >= guess))
    return found if len(found) >= total else torch.arange(size.numel())


def _encode_values(codec: Codec, values: Tensor, out: Tensor, key: int) -> None:
    """Into bytes that may stand anywhere, which a view of another type may not."""
    if _stands_well(out):
        codec.encode_into(values, out, key)
        return
    aligned = torch.empty_like(out)
    codec.encode_into(values, aligned, key)
    out.copy_(aligned)


def _decode_values(codec: Codec, data: Tensor, count: int, key: int) -> Tensor:
    """From bytes that may stand anywhere."""
    return codec.decode(data if _stands_well(data) else data.clone(), (count,), key)


def _stands_well(data: Tensor) -> bool:
    """Whether these bytes may be seen as numbers of four: as a rule, as tensors on the wire begin at multiples of 64."""
    return data.storage_offset() % 4 == 0 and data.data_ptr() % 4 == 0


class RandomK(_Chosen):
    """Entries drawn by a key that both sides know, by default 1 %; no places on the wire.

    Args:
        density: Share of the entries.
        values: The codec of the entries sent.
        unbiased: Whether what is sent is divided by the density, so that the mean over keys is the value.
    """

    of_change = takes_feedback = for_matrices = is_keyed = True
    has_places = False

    def __init__(self, *, density: Density = 0.01, values: Values = "fp32", unbiased: bool = False):
        super().__init__(density=density, values=values)
        self._unbiased = unbiased
        self.takes_feedback = not unbiased  # what is sent too large would be taken back too large

    def _choose(self, flat: Tensor, key: int) -> Tensor:
        return self._drawn(flat.numel(), key)

    def decode(self, data: Tensor, shape: Sequence[int], key: int = 0) -> Tensor:
        result = super().decode(data, shape, key)
        total = math.prod(shape)
        return result.mul_(total / self.count(total)) if self._unbiased and total else result

    def max_error(self, value: Tensor) -> float:
        factor = value.numel() / self.count(value.numel()) if self._unbiased and value.numel() else 1.0
        return super().max_error(value) * max(1.0, factor)


class Bitmask(Codec):
    """The entries of a sparse tensor that are not zero, by default up to 50 %, and a bit for each entry to say which.

    Exact up to the values' codec. Where fewer are not zero, some zeros travel as values.

    Args:
        density: Largest share of entries that are not zero.
        values: The codec of the entries sent.
    """

    for_matrices = True

    def __init__(self, *, density: Density = 0.5, values: Values = "fp32"):
        self._density, self._values = density, _VALUES[values]()

    def num_bytes(self, shape: Sequence[int]) -> int:
        total = math.prod(shape)
        return self._values.num_bytes((_count(self._density, total),)) + (total + 7) // 8

    def parts(self, shape: Sequence[int]) -> dict[str, int]:
        own = self._values.parts((_count(self._density, math.prod(shape)),))
        return own | {"mask": self.num_bytes(shape) - sum(own.values())}

    def encode_into(self, value: Tensor, out: Tensor, key: int = 0) -> None:
        self._check(out, value.shape)
        flat = value.detach().reshape(-1).numpy()  # NumPy's selections are several times faster than torch's
        kept, mask = _count(self._density, flat.size), flat != 0
        missing = kept - int(np.count_nonzero(mask))
        if missing < 0:
            raise WireError(f"a tensor of density {self._density:g} must have at most {kept} entries that are not zero, but "
                            f"has {kept - missing} of {flat.size}.")
        if missing:
            mask[np.flatnonzero(~mask)[:missing]] = True
        split = self._values.num_bytes((kept,))
        _encode_values(self._values, torch.from_numpy(np.compress(mask, flat)), out[:split], key)
        out[split:] = torch.from_numpy(np.packbits(mask, bitorder="little"))

    def decode(self, data: Tensor, shape: Sequence[int], key: int = 0) -> Tensor:
        self._check(data, shape)
        total = math.prod(shape)
        kept = _count(self._density, total)
        split = self._values.num_bytes((kept,))
        bits = np.unpackbits(data[split:].numpy(), count=total, bitorder="little").view(bool)
        chosen = torch.from_numpy(np.flatnonzero(bits))
        if len(chosen) != kept:
            raise WireError(f"a bitmask of {total} entries must have {kept} bits set, but has {len(chosen)}.")
        values = _decode_values(self._values, data[:split], kept, key)
        return torch.zeros(total, dtype=torch.float32).scatter_(0, chosen, values).view(tuple(shape))

    def max_error(self, value: Tensor) -> float:
        return self._values.max_error(value.reshape(-1))
