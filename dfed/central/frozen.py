"""Units that are trained already, passed in evaluation mode, so that a sample's bits do not depend on its mini-batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfed.blocks.local_net import LocalNet
from dfed.client import Skeleton

__all__ = ["Frozen"]


class Frozen:
    """Some units of a net, frozen. Between :meth:`load` and :meth:`unload` they have storage.

    Kernels are chosen by the size of a mini-batch, and their last bits differ. So mini-batches are passed in pieces of one
    size, the last of which is filled up.

    Args:
        bounds: Units from ``bounds[0]`` up to ``bounds[-1]``; at each bound in between values become float32, as those of a
            cache would.
        precision: As in the settings of training.
        piece: Samples that pass at a time.
    """

    def __init__(self, net: LocalNet, bounds: Sequence[int], device: torch.device, precision: str, piece: int):
        self._model = net.frozen(bounds[0], bounds[-1])
        self._skeleton = Skeleton(self._model)
        self._bounds = [bound - bounds[0] for bound in bounds]
        self._device, self._precision, self._piece = device, precision, piece

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the units copies of ``tensors``."""
        self._skeleton.load(tensors, self._device)
        self._model.eval()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """What the units make of a mini-batch (b, …) on their device: float32."""
        out: Tensor | None = None
        for start in range(0, len(x), self._piece):
            part = x[start:start + self._piece]
            missing = self._piece - len(part)
            made = self._run(torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part.clone())
            if out is None:
                out = made.new_empty(len(x), *made.shape[1:])
            out[start:start + len(part)] = made[:len(part)]
        assert out is not None, "a mini-batch has samples"
        return out

    def _run(self, x: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            for start, stop in itertools.pairwise(self._bounds):
                x = self._model.run(x, start, stop).float()
        return x

    def unload(self) -> None:
        """Let go of all storage."""
        self._skeleton.unload()
