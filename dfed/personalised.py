"""What a model is worth to the clients themselves: accuracy on each client's own class mix, and what aggregation does to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dfed.client import Evaluation
from dfed.cohort import Job
from dfed.data import Partition
from dfed.plan import Plan

__all__ = ["PersonalisedAccuracy", "effectiveness"]

_MOST_CLIENTS = 100_000


class PersonalisedAccuracy:
    """The mean over all clients of the fleet of Σ_c m_ic · a_c: client i's class mix m_i, and the accuracy a_c on class c.

    Classes without held-out samples are left out of every client's mix, which then sums to 1 over the others; clients that have
    no others are left out of the mean. It is a weighting of the classes, worked out the first time that it is asked for.

    Args:
        partition: Who has what. Where it deals samples out without regard to labels, or to more than 100,000 clients, there is
            no figure.
    """

    def __init__(self, partition: Partition):
        self._partition = partition
        self._weights: dict[bytes, np.ndarray | None] = {}

    def of(self, found: Evaluation) -> float | None:
        """Of a model of which these are the figures; None where there is none."""
        there = found.count > 0
        key = there.tobytes()  # another set of samples may have other classes
        if key not in self._weights:
            self._weights[key] = self._mean_mix(there)
        weights = self._weights[key]
        if weights is None:
            return None
        return min(1.0, float(weights @ (found.correct / np.maximum(found.count, 1))))  # rounding may pass 1

    def _mean_mix(self, there: np.ndarray) -> np.ndarray | None:
        """The mean over clients of their mixes of these classes (bool), float64 (num_classes,)."""
        num_clients = self._partition.num_clients
        if num_clients > _MOST_CLIENTS or self._partition.label_counts([]) is None:
            return None
        total, num_mixes = np.zeros(len(there)), 0
        for client in range(num_clients):
            counts = np.where(there, self._partition.label_counts([client]), 0)
            if (size := counts.sum()) > 0:
                total += counts / size
                num_mixes += 1
        return total / num_mixes if num_mixes else None


def effectiveness(job: Job, evaluated: Plan, completed: Mapping[int, tuple[Plan, Mapping[str, Any]]],
                  after: Evaluation) -> dict[str, Any]:
    """What aggregation does to the clients of a round: the mean of accuracy after it less accuracy before it.

    Before: the client's own model as its training left it, in evaluation mode; after: the new global model. Both on the same
    samples, weighted to the client's class mix (:meth:`Evaluation.accuracy_on`). Clients whose own model is none that can be
    used by itself are left out: it could not be tried, or it is neither one of the strategy's variants nor all of the global
    model, as the stages of progressive training.

    Args:
        evaluated: The plan whose sub-model is the global model.
        completed: Of each client that completed the round, its plan and its report.
        after: Of the global model on these samples.

    Returns:
        JSON values: ``mean``, and the means ``before`` and ``after`` of which it is the difference (None if no client counts);
        ``clients`` that count, and how many are ``left_out``.
    """
    pairs = []
    for client, (plan, report) in completed.items():
        usable = job.strategy.variant_of(plan) is not None or set(evaluated.hold) <= set(plan.hold)
        mix, correct = job.partition.label_counts([client]), report["own_correct"]
        if correct is None or not usable:
            continue
        own = np.array(correct)
        before = Evaluation(loss=float("nan"), accuracy=int(own.sum()) / int(after.count.sum()), correct=own, count=after.count)
        pair = before.accuracy_on(mix), after.accuracy_on(mix)
        if not np.isnan(pair).any():  # of none of its classes there is a sample
            pairs.append(pair)
    means = np.mean(pairs, axis=0) if pairs else None
    return {
        "mean": None if means is None else float(means[1] - means[0]),
        "clients": len(pairs),
        "left_out": len(completed) - len(pairs),
        "before": None if means is None else float(means[0]),
        "after": None if means is None else float(means[1]),
    }
