"""Codecs that are casts to another floating-point type."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dfed.comm.codecs.base import Codec

__all__ = ["BF16", "FP16", "FP32"]


class _Cast(Codec):
    """A cast to ``dtype``."""

    dtype: torch.dtype

    def num_bytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def encode_into(self, value: Tensor, out: Tensor, key: int = 0) -> None:
        self._check(out, value.shape)
        entries = out.view(self.dtype)
        (entries if value.ndim == 1 else entries.view(value.shape)).copy_(value)  # a view takes as long as a short copy

    def decode(self, data: Tensor, shape: Sequence[int], key: int = 0) -> Tensor:
        self._check(data, shape)
        entries = data.view(self.dtype).float()
        return entries if len(shape) == 1 else entries.view(tuple(shape))

    def max_error(self, value: Tensor) -> float:
        if self.dtype == torch.float32 or value.numel() == 0:
            return 0.0
        info = torch.finfo(self.dtype)
        largest = float(value.abs().max())
        return math.inf if largest > info.max else max(largest * info.eps / 2, info.smallest_normal * info.eps)


class FP32(_Cast):
    """float32 as it is: 4 bytes an entry, exact."""

    dtype = torch.float32


class FP16(_Cast):
    """IEEE half precision: 2 bytes an entry, relative error at most 2⁻¹¹, entries beyond 65504 overflow."""

    dtype = torch.float16


class BF16(_Cast):
    """bfloat16: 2 bytes an entry, relative error at most 2⁻⁸, the range of float32."""

    dtype = torch.bfloat16
