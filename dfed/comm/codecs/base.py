"""What a codec is: tensor ↔ bytes, with the size known from the shape alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dfed.errors import WireError

__all__ = ["Codec"]


class Codec(ABC):
    """Turns float32 tensors into flat uint8 tensors and back. Has no state: the same arguments give the same bytes.

    Attributes:
        name: The text that names it and its options; see :func:`dfed.comm.codecs.codec_of`.
        is_keyed: Whether it draws by a key, which both sides must know.
        of_change: Whether, on the way up, the codec is for what training changed, and the receiver adds it to what it had
            sent down; else for the value itself.
        takes_feedback: Whether error feedback works with it: what it leaves out of a tensor is less than the tensor, so that
            what is left out stays small when it is given again and again.
        for_matrices: Whether tensors of one dimension or none (biases, parameters and statistics of norms), which weigh next
            to nothing, are better sent as fp32.
    """

    name = "codec"
    is_keyed = False
    of_change = False
    takes_feedback = False
    for_matrices = False

    @abstractmethod
    def num_bytes(self, shape: Sequence[int]) -> int:
        """Exact length of the encoding of a tensor of this shape."""

    def parts(self, shape: Sequence[int]) -> dict[str, int]:
        """:meth:`num_bytes` by what the bytes are: ``values``, and where they are there ``scales``, ``indices`` or ``mask``."""
        return {"values": self.num_bytes(shape)}

    @abstractmethod
    def encode_into(self, value: Tensor, out: Tensor, key: int = 0) -> None:
        """Write the encoding of ``value`` into ``out``.

        Args:
            value: float32, any shape, finite.
            out: uint8, flat, :meth:`num_bytes` long; every byte is written.
            key: Decides what is drawn, where something is; :meth:`decode` must get the same.

        Raises:
            WireError: If ``out`` has another length.
        """

    @abstractmethod
    def decode(self, data: Tensor, shape: Sequence[int], key: int = 0) -> Tensor:
        """The tensor of shape ``shape``, float32. It may share memory with ``data`` (uint8, flat).

        Raises:
            WireError: If ``data`` has another length than :meth:`num_bytes` says, or is no encoding.
        """

    @abstractmethod
    def max_error(self, value: Tensor) -> float:
        """Bound on ``|decode(encode(value)) - value|``, per entry."""

    def _check(self, data: Tensor, shape: Sequence[int]) -> None:
        expected = self.num_bytes(shape)
        if data.dtype != torch.uint8 or data.ndim != 1 or data.numel() != expected:
            raise WireError(f"{self.name} data of shape {tuple(shape)} must be {expected} bytes, but are {data.numel()}.")
