"""Evaluation of the global model and its sub-models, sharded over the ranks.

The set is cut into the same mini-batches whatever the number of ranks; a mini-batch's figures do not depend on where it
is computed; and they are added in the order of the mini-batches. So the result is the same to the bit.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfed import rng
from dfed.client.forms import Forms
from dfed.client.skeleton import Skeleton
from dfed.client.statistics import STATISTICS_RANGE, norm_statistics, statistics_names
from dfed.comm.partial_sums import PartialSums, weight_scale
from dfed.data import Dataset, Subset
from dfed.plan import Plan
from dfed.region import WHOLE
from dfed.strategies import Strategy

__all__ = ["Evaluation", "Evaluator", "Trial", "combine", "evaluate_batch", "sample_of"]

logger = logging.getLogger(__name__)

_MOST_SKELETONS = 8


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one set of samples.

    Attributes:
        loss: Mean cross-entropy.
        accuracy: Share of samples whose largest logit is their class.
        correct, count: Right answers and samples, by class, int64.
        refused: Why norm statistics, where they are to be worked out for the model, could not be; None if they were.
        sampled: Figures of the same model on the samples of ``metrics.effectiveness_samples``; None: it was not tried on them.
    """

    loss: float
    accuracy: float
    correct: np.ndarray
    count: np.ndarray
    refused: str | None = None
    sampled: Evaluation | None = None

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
    """Evaluates sub-models on this rank's share of a data set.

    Args:
        dataset: Held-out samples.
        train: The training samples, from which statistics are worked out anew.
        batch_size: Of mini-batches, in evaluation and for statistics.
        seed: The run's.
    """

    def __init__(self, strategy: Strategy, forms: Forms, dataset: Dataset, train: Dataset, *, batch_size: int,
                 device: torch.device, seed: int):
        self._strategy, self._forms, self._dataset, self._train = strategy, forms, dataset, train
        self._batch_size, self._device, self._seed = batch_size, device, seed
        self._skeletons: OrderedDict[str, Skeleton] = OrderedDict()

    def run(self, plan: Plan, values: Mapping[str, Tensor], rank: int, size: int) -> list[list[Any]]:
        """This rank's mini-batches as JSON values: ``[number, loss sum, right answers by class, samples by class]``.

        Args:
            plan: Whose sub-model is evaluated.
            values: The global model's tensors that it holds, float32, by name.
        """
        num_batches = -(-self._dataset.num_samples // self._batch_size)
        with self._loaded(plan, values) as model, torch.inference_mode():
            return [evaluate_batch(model, self._dataset, number, batch_size=self._batch_size, device=self._device)
                    for number in range(rank, num_batches, size)]

    def statistics_shapes(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """Of the running statistics of this plan's sub-model, by name."""
        return statistics_names(self._skeleton(plan).model)

    def num_statistics_batches(self) -> int:
        """Mini-batches from which statistics are worked out: whole ones only, unless there is no whole one."""
        return max(1, self._num_statistics_samples() // self._batch_size)

    def add_statistics(self, plan: Plan, values: Mapping[str, Tensor], rank: int, size: int, sums: PartialSums) -> None:
        """Add this rank's mini-batches' statistics to ``sums``, each with the weight that makes all sum to at most 1.

        Raises:
            UpdateRejected: If they are not finite, or too large.
        """
        num_batches = self.num_statistics_batches()
        order = rng.Permutation(self._train.num_samples, self._seed, "statistics")
        ranges = dict.fromkeys(sums.shapes, STATISTICS_RANGE)
        whole = dict.fromkeys(sums.shapes, WHOLE)

        def batches() -> Iterator[Tensor]:
            for number in range(rank, num_batches, size):
                start = number * self._batch_size
                stop = min(start + self._batch_size, self._num_statistics_samples())
                yield self._train.batch(order.take(np.arange(start, stop)))[0].to(self._device)

        with self._loaded(plan, values) as model:
            for found in norm_statistics(model, batches()):
                sums.add(found, whole, weight_scale(num_batches), ranges)

    def _num_statistics_samples(self) -> int:
        wanted = self._strategy.statistics_samples or self._train.num_samples
        return min(wanted, self._train.num_samples)

    def _skeleton(self, plan: Plan) -> Skeleton:
        key = plan.shape_key()
        if key not in self._skeletons:
            self._skeletons[key] = Skeleton(self._strategy.build(plan))
            while len(self._skeletons) > _MOST_SKELETONS:
                self._skeletons.popitem(last=False)
        self._skeletons.move_to_end(key)
        return self._skeletons[key]

    @contextmanager
    def _loaded(self, plan: Plan, values: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The sub-model with its values, in evaluation mode."""
        skeleton, regions = self._skeleton(plan), self._forms.of(plan).regions
        try:
            skeleton.load({name: region.view(values[name]) for name, region in regions.items()}, self._device)
            skeleton.model.eval()
            yield skeleton.model
        finally:
            skeleton.unload()


class _NoScores(Exception):
    """A model gives something else than a score for each class."""


@functools.lru_cache(maxsize=64)
def _say_left_out(why: str) -> None:
    """Once for each reason."""
    logger.warning("clients' own models are left out of the effectiveness where they cannot be tried: %s (said once)", why)


@dataclass(frozen=True)
class Trial:
    """Tries clients' own models, right after their training, on the same few held-out samples.

    Attributes:
        dataset: These samples; see :func:`sample_of`.
        batch_size: Of mini-batches.
        device: Where the models are.
        is_due: Whether models of the round of this index are tried.
    """

    dataset: Dataset
    batch_size: int
    device: torch.device
    is_due: Callable[[int], bool]

    def correct(self, model: nn.Module) -> list[int] | None:
        """Right answers by class of a model that has its values, which is left in evaluation mode.

        None where it does not give one score for each class, or raises: it is no model that can be used as it is.
        """
        def scores(x: Tensor) -> Tensor:
            found = model(x)
            if found.shape != (len(x), self.dataset.num_classes):
                raise _NoScores
            return found

        model.eval()
        try:
            with torch.inference_mode():
                num_batches = -(-self.dataset.num_samples // self.batch_size)
                batches = [evaluate_batch(scores, self.dataset, number, batch_size=self.batch_size, device=self.device)
                           for number in range(num_batches)]
            return [int(number) for number in combine([batches]).correct]
        except _NoScores:
            return None
        except Exception as error:
            _say_left_out(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            return None


def sample_of(dataset: Dataset, num_samples: int, seed: int) -> Dataset:
    """So many samples of ``dataset`` (all, if it has fewer), drawn by the run's seed; the same on every rank."""
    order = rng.Permutation(dataset.num_samples, seed, "effectiveness")
    return Subset(dataset, np.sort(order.take(np.arange(min(num_samples, dataset.num_samples)))))


def evaluate_batch(model: Callable[[Tensor], Tensor], dataset: Dataset, number: int, *, batch_size: int,
                   device: torch.device) -> list[Any]:
    """Figures of ``model``, in evaluation mode on ``device``, on the mini-batch ``number`` of ``dataset``.

    Returns:
        JSON values: ``[number, loss sum, right answers by class, samples by class]``; for :func:`combine`.
    """
    start = number * batch_size
    x, y = dataset.batch(np.arange(start, min(start + batch_size, dataset.num_samples)))
    logits = model(x.to(device)).cpu()
    loss = float(F.cross_entropy(logits, y, reduction="sum"))
    correct = torch.bincount(y[logits.argmax(dim=1) == y], minlength=dataset.num_classes)
    return [number, loss, correct.tolist(), torch.bincount(y, minlength=dataset.num_classes).tolist()]


def combine(shards: Iterable[list[list[Any]]]) -> Evaluation:
    """All ranks' mini-batches as one evaluation."""
    batches = sorted((batch for shard in shards for batch in shard), key=lambda batch: batch[0])
    assert [batch[0] for batch in batches] == list(range(len(batches))), "a mini-batch is missing or was done twice"
    correct = np.sum([batch[2] for batch in batches], axis=0)
    count = np.sum([batch[3] for batch in batches], axis=0)
    total = int(count.sum())
    return Evaluation(sum(batch[1] for batch in batches) / total, int(correct.sum()) / total, correct, count)
