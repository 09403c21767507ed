"""Codecs that round to small integers: int8, int4, and stochastic rounding.

A tensor is seen as rows, each with a scale of its own: a channel (the first dimension), the whole tensor, or a bucket. Work is
done in pieces that stay in a core's cache, so that a tensor is read once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dfed.comm.codecs.base import Codec
from dfed.comm.processor import piece_length
from dfed.errors import WireError
from dfed.rng import torch_generator

__all__ = ["AffineInt8", "Int4", "Int8", "Stochastic"]

_PIECE = piece_length(1 << 17)  # entries; a float32 piece of 512 KiB stays in a large second-level cache
_SMALLEST_STEP = 1e-37

Axis = Literal["channel", "tensor"]


def _layout(shape: Sequence[int], axis: Axis) -> tuple[int, int]:
    """Rows, and entries a row. A tensor of one dimension or none is one row."""
    total = math.prod(shape)
    if axis == "tensor" or len(shape) < 2 or total == 0:
        return (1, total) if total else (0, 0)
    return shape[0], total // shape[0]


def _groups(rows: int, length: int) -> Iterator[slice]:
    """The rows in groups of about :data:`_PIECE` entries, or one by one where a row has more."""
    step = max(1, _PIECE // max(1, length))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _columns(length: int) -> Iterator[slice]:
    for start in range(0, length, _PIECE):
        yield slice(start, min(start + _PIECE, length))


class _Rounded(Codec):
    """Rounds each row to multiples of a step of its own: ``max|x| / levels``.

    The bytes are the steps (float32), then the codes.
    """

    of_change = takes_feedback = for_matrices = True
    levels: int
    bits: int

    @abstractmethod
    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows, and entries a row (the last may have fewer)."""

    def num_bytes(self, shape: Sequence[int]) -> int:
        return 4 * self.layout(shape)[0] + (math.prod(shape) * self.bits + 7) // 8

    def parts(self, shape: Sequence[int]) -> dict[str, int]:
        scales = 4 * self.layout(shape)[0]
        return {"values": self.num_bytes(shape) - scales, "scales": scales}

    def encode_into(self, value: Tensor, out: Tensor, key: int = 0) -> None:
        self._check(out, value.shape)
        rows, length = self.layout(value.shape)
        if rows == 0:
            return
        flat, steps = value.reshape(-1), torch.empty(rows)
        codes = out[4 * rows:].view(torch.int8) if self.bits == 8 else torch.empty(flat.numel(), dtype=torch.int8)
        scratch = torch.empty(min(_PIECE, flat.numel()))
        generator = self.generator(key)
        whole = flat.numel() // length  # rows that are full
        for part, size, begin in ((flat[:whole * length], length, 0), (flat[whole * length:], flat.numel() % length, whole)):
            if part.numel():
                target = codes[begin * length:begin * length + part.numel()].view(-1, size)
                self._encode_rows(part.view(-1, size), target, steps[begin:], scratch, generator)
        out[:4 * rows].copy_(steps.view(torch.uint8))
        if self.bits == 4:
            _pack_nibbles(codes.add_(8).view(torch.uint8), out[4 * rows:])

    def _encode_rows(
        self, matrix: Tensor, codes: Tensor, steps: Tensor, scratch: Tensor, generator: torch.Generator | None
    ) -> None:
        for rows in _groups(*matrix.shape):
            group, target = matrix[rows], codes[rows]
            # As a rule the group is one piece, in which every operator that is called costs as much as a few thousand entries.
            pieces = [(group, target)]
            if group.shape[1] > _PIECE:
                pieces = [(group[:, columns], target[:, columns]) for columns in _columns(group.shape[1])]
            largest = [torch.abs(piece, out=_like(piece, scratch)).amax(dim=1) for piece, _ in pieces]
            step = largest[0] if len(largest) == 1 else torch.stack(largest).amax(dim=0)
            step.div_(self.levels).clamp_(min=_SMALLEST_STEP)  # for rows of zeros
            steps[rows] = step
            inverse = step.reciprocal_()[:, None]
            for piece, code in pieces:
                work = torch.mul(piece, inverse, out=_like(piece, scratch))
                if generator is None:
                    work.round_()
                else:
                    work.add_(torch.rand(work.shape, generator=generator)).floor_().clamp_(-self.levels, self.levels)
                code.copy_(work)

    def decode(self, data: Tensor, shape: Sequence[int], key: int = 0) -> Tensor:
        self._check(data, shape)
        rows, length = self.layout(shape)
        result = torch.empty(tuple(shape), dtype=torch.float32)
        if rows == 0:
            return result
        flat, steps = result.view(-1), _numbers(data[:4 * rows])
        codes = data[4 * rows:].view(torch.int8) if self.bits == 8 else _unpack_nibbles(data[4 * rows:], flat.numel())
        whole = flat.numel() // length
        for part, size, begin in ((flat[:whole * length], length, 0), (flat[whole * length:], flat.numel() % length, whole)):
            if part.numel():
                source = codes[begin * length:begin * length + part.numel()].view(-1, size)
                _decode_rows(source, part.view(-1, size), steps[begin:])
        return result

    def generator(self, key: int) -> torch.Generator | None:
        """What rounding draws from; None: to the nearest."""
        return None

    def max_error(self, value: Tensor) -> float:
        if value.numel() == 0:
            return 0.0
        share = 1.0 if self.generator(0) is not None else 0.5
        return float(value.abs().max()) * (share / self.levels * (1 + 1e-5)) + _SMALLEST_STEP * self.levels


class Int8(_Rounded):
    """int8: 1 byte an entry and a scale for each channel or tensor; steps of max|x| / 127, error at most half a step.

    Args:
        axis: One scale for each ``channel`` (first dimension) or for the ``tensor``.
    """

    levels, bits = 127, 8

    def __init__(self, *, axis: Axis = "channel"):
        self._axis: Axis = axis

    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        return _layout(shape, self._axis)


class Int4(Int8):
    """int4: half a byte an entry and a scale for each channel or tensor; steps of max|x| / 7, error at most half a step.

    Args:
        axis: One scale for each ``channel`` (first dimension) or for the ``tensor``.
    """

    levels, bits = 7, 4


class Stochastic(_Rounded):
    """Stochastic rounding (QSGD): unbiased, 8 or 4 bits an entry, error below one step; keyed.

    Alistarh et al., "QSGD" (2017, arXiv:1610.02132, section 3), with the largest entry of each bucket as its norm.

    Args:
        bits: 8 or 4 an entry: steps of max|x| / 127 or / 7.
        bucket: Entries that share a scale.
    """

    is_keyed = True

    def __init__(self, *, bits: Literal[4, 8] = 8, bucket: Annotated[int, Field(ge=16, le=1 << 20)] = 512):
        self.bits, self.levels, self._bucket = bits, 2 ** (bits - 1) - 1, bucket

    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        total = math.prod(shape)
        return -(-total // self._bucket), min(self._bucket, total)

    def generator(self, key: int) -> torch.Generator:
        return torch_generator(key, "stochastic rounding")


class AffineInt8(Codec):
    """int8 between the smallest and the largest entry: 255 steps, error at most half a step; for values of one sign.

    Args:
        axis: One range for each ``channel`` (first dimension) or for the ``tensor``.
    """

    of_change = takes_feedback = for_matrices = True

    def __init__(self, *, axis: Axis = "channel"):
        self._axis: Axis = axis

    def num_bytes(self, shape: Sequence[int]) -> int:
        rows, length = _layout(shape, self._axis)
        return 8 * rows + rows * length

    def parts(self, shape: Sequence[int]) -> dict[str, int]:
        rows, length = _layout(shape, self._axis)
        return {"values": rows * length, "scales": 8 * rows}

    def encode_into(self, value: Tensor, out: Tensor, key: int = 0) -> None:
        self._check(out, value.shape)
        rows, length = _layout(value.shape, self._axis)
        if rows == 0:
            return
        matrix, codes = value.reshape(rows, length), out[8 * rows:].view(rows, length)
        steps, starts = torch.empty(rows), torch.empty(rows)
        scratch = torch.empty(min(_PIECE, matrix.numel()))
        for group in _groups(rows, length):
            part = matrix[group]
            low, high = part.amin(dim=1), part.amax(dim=1)
            step = high / 255 - low / 255
            step = torch.where(step > _SMALLEST_STEP, step, torch.ones_like(step))
            steps[group], starts[group] = step, low
            for columns in _columns(length):
                work = torch.sub(part[:, columns], low[:, None], out=_like(part[:, columns], scratch))
                codes[group, columns] = work.mul_((1 / step)[:, None]).round_().clamp_(0, 255)
        out[:4 * rows].copy_(steps.view(torch.uint8))
        out[4 * rows:8 * rows].copy_(starts.view(torch.uint8))

    def decode(self, data: Tensor, shape: Sequence[int], key: int = 0) -> Tensor:
        self._check(data, shape)
        rows, length = _layout(shape, self._axis)
        result = torch.empty(tuple(shape), dtype=torch.float32)
        if rows:
            steps, starts = _numbers(data[:4 * rows]), _numbers(data[4 * rows:8 * rows])
            _decode_rows(data[8 * rows:].view(rows, length), result.view(rows, length), steps, starts)
        return result

    def max_error(self, value: Tensor) -> float:
        rows, length = _layout(value.shape, self._axis)
        if rows == 0:
            return 0.0
        matrix = value.reshape(rows, length).double()
        span, largest = float((matrix.amax(dim=1) - matrix.amin(dim=1)).max()), float(matrix.abs().max())
        return span / 510 * (1 + 1e-5) + largest * 2**-22 + _SMALLEST_STEP * 255


def _decode_rows(codes: Tensor, matrix: Tensor, steps: Tensor, starts: Tensor | None = None) -> None:
    for rows in _groups(*matrix.shape):
        step = steps[rows, None]
        for columns in _columns(matrix.shape[1]):
            piece = matrix[rows, columns]
            piece.copy_(codes[rows, columns]).mul_(step)
            if starts is not None:
                piece.add_(starts[rows, None])


def _like(piece: Tensor, scratch: Tensor) -> Tensor:
    return scratch[:piece.numel()].view(piece.shape)


def _numbers(data: Tensor) -> Tensor:
    """float32 numbers in bytes that may stand anywhere.

    Raises:
        WireError: If one is not finite.
    """
    numbers = data.clone().view(torch.float32)
    if not bool(torch.isfinite(numbers).all()):
        raise WireError("the scales of quantised data must be finite, but are not.")
    return numbers


def _pack_nibbles(codes: Tensor, out: Tensor) -> None:
    """Two codes (uint8 below 16) a byte, the first in the lower half."""
    upper = codes[1::2]
    out[:upper.numel()] = upper << 4
    out[upper.numel():] = 0
    out |= codes[::2]


def _unpack_nibbles(data: Tensor, total: int) -> Tensor:
    """int8 codes, from −8 to 7."""
    codes = torch.empty(2 * data.numel(), dtype=torch.int8)
    codes[::2] = data & 15
    codes[1::2] = data >> 4
    return codes.sub_(8)[:total]
