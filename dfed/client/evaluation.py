"""Evaluation of the global model, sharded over the ranks.

The set is cut into the same mini-batches whatever the number of ranks; a mini-batch's figures do not depend on where it
is computed; and they are added in the order of the mini-batches. So the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfed.client.training import Skeleton
from dfed.data import Dataset

__all__ = ["Evaluation", "Evaluator", "combine"]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one set of samples.

    Attributes:
        loss: Mean cross-entropy.
        accuracy: Share of samples whose largest logit is their class.
        correct, count: Right answers and samples, by class, int64.
    """

    loss: float
    accuracy: float
    correct: np.ndarray
    count: np.ndarray

    def accuracy_on(self, mix: np.ndarray | None) -> float:
        """Accuracy on held-out samples weighted to the class mix ``mix`` (a histogram, any scale; None: as they are).

        Classes without held-out samples are left out of the mix.
        """
        if mix is None:
            return self.accuracy
        weights = np.where(self.count > 0, mix, 0).astype(np.float64)
        if weights.sum() == 0:
            return float("nan")
        per_class = self.correct / np.maximum(self.count, 1)
        return float((weights * per_class).sum() / weights.sum())


class Evaluator:
    """Evaluates models on this rank's share of a data set.

    Args:
        model: The full model on the meta device.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, *, batch_size: int, device: torch.device):
        self._skeleton, self._dataset = Skeleton(model), dataset
        self._batch_size, self._device = batch_size, device

    def run(self, values: Mapping[str, Tensor], rank: int, size: int) -> list[list[Any]]:
        """This rank's mini-batches as JSON values: ``[number, loss sum, right answers by class, samples by class]``."""
        num_batches = -(-self._dataset.num_samples // self._batch_size)
        model = self._skeleton.model
        try:
            self._skeleton.load(values, self._device)
            model.eval()
            with torch.inference_mode():
                return [self._batch(model, number) for number in range(rank, num_batches, size)]
        finally:
            self._skeleton.unload()

    def _batch(self, model: nn.Module, number: int) -> list[Any]:
        start = number * self._batch_size
        indices = np.arange(start, min(start + self._batch_size, self._dataset.num_samples))
        x, y = self._dataset.batch(indices)
        logits = model(x.to(self._device)).cpu()
        loss = float(F.cross_entropy(logits, y, reduction="sum"))
        classes = self._dataset.num_classes
        correct = torch.bincount(y[logits.argmax(dim=1) == y], minlength=classes)
        return [number, loss, correct.tolist(), torch.bincount(y, minlength=classes).tolist()]


def combine(shards: Iterable[list[list[Any]]]) -> Evaluation:
    """All ranks' mini-batches as one evaluation."""
    batches = sorted((batch for shard in shards for batch in shard), key=lambda batch: batch[0])
    assert [batch[0] for batch in batches] == list(range(len(batches))), "a mini-batch is missing or was done twice"
    correct = np.sum([batch[2] for batch in batches], axis=0)
    count = np.sum([batch[3] for batch in batches], axis=0)
    total = int(count.sum())
    return Evaluation(sum(batch[1] for batch in batches) / total, int(correct.sum()) / total, correct, count)
