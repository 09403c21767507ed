"""Sums of losses, and whether they are finite."""

from __future__ import annotations

import torch
from torch import Tensor

from dfed.errors import TrainingFailed

__all__ = ["LossWatch"]

_LOOK = 50  # on a GPU, steps between looks at the loss, each of which waits for the device


class LossWatch:
    """Adds up losses, and looks whether they are finite without waiting for a GPU at every step."""

    def __init__(self, device: torch.device):
        self._every = _LOOK if device.type == "cuda" else 1
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._lost = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, num_samples: int, epoch: int, step: int) -> None:
        """The mean loss of a mini-batch."""
        self._sum.add_(loss.double(), alpha=num_samples)
        if self._every == 1:
            self._lost.fill_(-1 if torch.isfinite(loss) else step)
        else:
            self._lost = torch.where((self._lost < 0) & ~torch.isfinite(loss), step, self._lost)
        if (step + 1) % self._every == 0:
            self._look(epoch)

    def sum(self, epoch: int) -> float:
        """Of all that was added."""
        self._look(epoch)
        return float(self._sum)

    def _look(self, epoch: int) -> None:
        step = int(self._lost)
        if step >= 0:
            raise TrainingFailed(f"the loss must be a finite number, but is not in epoch {epoch + 1}, step {step + 1}: check "
                                 "the data and the learning rate (`training.learning_rate`, `training.clip_norm`).")
