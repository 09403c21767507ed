"""Codecs: tensor ↔ bytes.

Every codec states the exact size before encoding, and the largest error that it makes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dfed.errors import WireError

__all__ = ["BF16", "FP16", "FP32", "Codec"]


class Codec(ABC):
    """Turns float32 tensors into flat uint8 tensors and back."""

    name: str

    @abstractmethod
    def num_bytes(self, shape: Sequence[int]) -> int:
        """Exact length of the encoding of a tensor of this shape."""

    @abstractmethod
    def encode_into(self, value: Tensor, out: Tensor) -> None:
        """Write the encoding of ``value`` (float32, any shape) into ``out`` (uint8, ``num_bytes`` long)."""

    @abstractmethod
    def decode(self, data: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of shape ``shape``, float32. It may share memory with ``data`` (uint8, flat).

        Raises:
            WireError: If ``data`` has another length than :meth:`num_bytes` says.
        """

    @abstractmethod
    def max_error(self, value: Tensor) -> float:
        """Bound on ``|decode(encode(value)) - value|``, per entry."""

    def _check(self, data: Tensor, shape: Sequence[int]) -> None:
        expected = self.num_bytes(shape)
        if data.numel() != expected:
            raise WireError(f"{self.name} data of shape {tuple(shape)} must be {expected} bytes, but are {data.numel()}.")


class _Cast(Codec):
    """A codec that is a cast to another floating-point type."""

    dtype: torch.dtype

    def num_bytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def encode_into(self, value: Tensor, out: Tensor) -> None:
        self._check(out, value.shape)
        out.view(self.dtype).view(value.shape).copy_(value)

    def decode(self, data: Tensor, shape: Sequence[int]) -> Tensor:
        self._check(data, shape)
        return data.view(self.dtype).view(tuple(shape)).to(torch.float32)

    def max_error(self, value: Tensor) -> float:
        if self.dtype == torch.float32 or value.numel() == 0:
            return 0.0
        info = torch.finfo(self.dtype)
        largest = float(value.abs().max())
        return math.inf if largest > info.max else max(largest * info.eps / 2, info.smallest_normal * info.eps)


class FP32(_Cast):
    """float32 as it is: 4 bytes an entry, exact."""

    name = "fp32"
    dtype = torch.float32


class FP16(_Cast):
    """IEEE half precision: 2 bytes an entry, relative error at most 2⁻¹¹, entries beyond 65504 overflow."""

    name = "fp16"
    dtype = torch.float16


class BF16(_Cast):
    """bfloat16: 2 bytes an entry, relative error at most 2⁻⁸, the range of float32."""

    name = "bf16"
    dtype = torch.bfloat16
