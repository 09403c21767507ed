"""Samplers: which clients make up the cohort of a round.

The same arguments give the same cohort, on any rank and after any interruption. A plain sampler, such as those below, has
one method ``cohort`` and no state; one that remembers derives from :class:`StatefulSampler`: state in, state out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfed.rng import Permutation, numpy_generator

__all__ = ["StatefulSampler", "Uniform", "View", "Weighted", "keyed_walk", "weighted_order"]

_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class View:
    """What a sampler that remembers may ask about the run. Nothing of it walks the fleet but ``costs`` and ``label_counts``.

    Attributes:
        seed, rounds: Of the run.
        round_index: The round that is drawn, or was just completed.
        num_clients: Clients in the fleet, at least 1.
        cost: Predicted simulated seconds of a client's round, with the plan that the strategy has for it now; None: it has
            none. Whether the client is available does not matter.
        costs: As ``cost``, of all clients, float64 (num_clients,), NaN without a plan; clients with equal devices and equally
            many samples count as equal.
        label_counts: Samples of each class, summed over clients, int64 (num_classes,); None if the data were dealt out
            without regard to labels. Takes time for each client.
    """

    seed: int
    rounds: int
    round_index: int
    num_clients: int
    cost: Callable[[int], float | None]
    costs: Callable[[], np.ndarray]
    label_counts: Callable[[Iterable[int]], np.ndarray | None]


class StatefulSampler(ABC):
    """A sampler that remembers. Its state is JSON values only, kept in ``ServerState.sampler``, and part of checkpoints.

    No attribute changes after ``__init__``; no method changes a state that it is given.
    """

    def init(self, view: View) -> Mapping[str, Any]:
        """The state before the first round; asked for again before the next round as long as it is empty."""
        return {}

    @abstractmethod
    def cohort(self, state: Mapping[str, Any], view: View, *, size: int, admit: Callable[[int], bool]) -> list[int]:
        """Distinct clients that ``admit`` accepts, ``size`` or more if there are so many.

        If more are drawn than the cohort's size, besides those that vanish during the round, the server waits for as many as
        that, those that finish first; the others train in vain.

        Args:
            size: Clients to draw, at least 1: the cohort's size times ``server.over_selection``.
            admit: Whether a client is available and has a plan; to be asked once for each client at most. Does not depend on
                the order of asking.
        """

    def advance(
        self, state: Mapping[str, Any], view: View, *, row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """The state after a round.

        Args:
            state, view: Those with which the cohort was drawn.
            row, clients: The round's line of metrics and its clients' lines (docs/run_folder.md), without evaluation.
        """
        return state

    def evaluated(
        self, state: Mapping[str, Any], accuracy_on: Callable[[np.ndarray | None], float]
    ) -> Mapping[str, Any]:
        """The state after the global model was evaluated, which comes after ``advance``.

        Args:
            accuracy_on: Gives the model's held-out accuracy weighted to a class mix, a histogram (num_classes,) of any scale;
                None: as the held-out set is. NaN if no held-out sample is of these classes.
        """
        return state


def keyed_walk(num_items: int, seed: int, purpose: str, *keys: int) -> Iterator[int]:
    """The numbers below ``num_items`` in an order keyed by the other arguments, found as they are asked for."""
    order = Permutation(num_items, seed, purpose, *keys)
    for start in range(0, num_items, _CHUNK):
        yield from order.take(np.arange(start, min(start + _CHUNK, num_items))).tolist()


def weighted_order(weights: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Indices in the order in which they are drawn without replacement, the next one always in proportion to its weight.

    By the keys of Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (Information Processing Letters, 2006):
    item i gets the key u_i^(1/w_i), the largest first. Items of weight 0 come last, in uniform order.

    Args:
        weights: At least 0, shape (n,).
        draws: Uniform in [0, 1), shape (n,).
    """
    # The largest u^(1/w) is the smallest -log(u)/w, which does not underflow; 1 - draw avoids the log of 0.
    times = np.full(len(weights), np.inf)
    np.divide(-np.log1p(-draws), weights, out=times, where=weights > 0)
    return np.lexsort((draws, times))


class Uniform:
    """Every admitted client is equally likely to be drawn."""

    def cohort(
        self,
        *,
        size: int,
        num_clients: int,
        seed: int,
        round_index: int,
        admit: Callable[[int], bool],
        sizes: Callable[[], np.ndarray],
    ) -> list[int]:
        """Draw up to ``size`` distinct clients among those that ``admit`` accepts.

        Walks a permutation keyed by ``(seed, "cohort", round_index)``, asks each client at most once and stops as soon
        as enough are admitted, so that the cost depends on the cohort and on the share admitted, not on the fleet.

        Args:
            size: Clients wanted, at least 0.
            num_clients: Clients in the fleet, at least 1.
            seed: The run's seed.
            round_index: The round.
            admit: Whether a client may take part; must not depend on the order of asking.
            sizes: Not called.

        Returns:
            The clients in keyed order; fewer than ``size`` if the whole fleet has fewer that are admitted.
        """
        assert size >= 0, f"size must be at least 0, not {size}"
        chosen: list[int] = []
        for client in keyed_walk(num_clients, seed, "cohort", round_index):
            if len(chosen) == size:
                break
            if admit(client):
                chosen.append(client)
        return chosen


class Weighted:
    """A client's chance of being drawn next is proportional to its number of samples."""

    def cohort(
        self,
        *,
        size: int,
        num_clients: int,
        seed: int,
        round_index: int,
        admit: Callable[[int], bool],
        sizes: Callable[[], np.ndarray],
    ) -> list[int]:
        """Draw up to ``size`` distinct clients among those that ``admit`` accepts and that have samples.

        See :func:`weighted_order`. Costs O(num_clients) a round; asks clients in that order and stops as soon as enough are
        admitted.

        Args:
            size: Clients wanted, at least 0.
            num_clients: Clients in the fleet, at least 1.
            seed: The run's seed.
            round_index: The round.
            admit: Whether a client may take part; must not depend on the order of asking.
            sizes: Gives every client's number of samples, shape (num_clients,), none negative; called once.

        Returns:
            The clients in keyed order; fewer than ``size`` if the whole fleet has fewer to draw.
        """
        assert size >= 0, f"size must be at least 0, not {size}"
        weights = np.asarray(sizes(), dtype=np.float64)
        assert weights.shape == (num_clients,), f"sizes must have shape ({num_clients},), not {weights.shape}"
        assert (weights >= 0).all(), "sizes must not be negative"
        draws = numpy_generator(seed, "cohort", round_index).random(num_clients)
        candidates = np.flatnonzero(weights)
        chosen: list[int] = []
        for client in candidates[weighted_order(weights[candidates], draws[candidates])].tolist():
            if len(chosen) == size:
                break
            if admit(client):
                chosen.append(client)
        return chosen
