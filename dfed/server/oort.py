"""Oort: clients whose training promises most for the time that it takes, with some that were never asked.

Lai et al., "Oort: Efficient Federated Learning via Guided Participant Selection" (OSDI 2021), algorithm 1. In round r (from 1),
with K' = ⌈1.1 K⌉ clients to draw for K to finish:

- The statistical utility of a client that took part is |B| √(mean squared loss), over the samples B that it trained when it
  last did. Utilities are clipped at the 98th percentile of all such clients and normalised to [0, 1] by their least and
  largest; then √(0.1 ln r / L) is added, L the round in which the client last took part; then, if the client's time t is above
  the preferred duration T, the whole is multiplied by (T/t)².
- A share ε = 0.9 · 0.95^(r − 1), at least 0.2, of K' is drawn among clients that never took part, fast ones more likely.
- The others are drawn in proportion to their utility among the clients with at least 0.95 of the (1 − ε)K'-th best one's.
- Pacer: every W rounds, T grows by its first value if the sum of the utilities of the last W rounds' clients is below that of
  the W rounds before.

Where we deviate: see docs/deviations.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from dfed.rng import numpy_generator
from dfed.server.samplers import StatefulSampler, View, keyed_walk, weighted_order

__all__ = ["Oort", "exploration", "scores"]

_OVER_COMMIT = Fraction(11, 10)
_CLIP_PERCENTILE = 98
_CUTOFF = 0.95
_SPEED_POOL = 10  # unexplored clients that are compared for each one drawn
_PROFILED = 1000  # clients from whose times the preferred duration starts


class Oort(StatefulSampler):
    """Clients with a high training loss for the time they take, and some never asked before (Oort).

    State: ``clients``, of each that took part ``[utility, round, seconds]`` (rounds from 1) under its number as text;
    ``preferred_s``, T, and ``step_s``, by which it grows; ``window`` and ``before``, sums of the utilities in this window and
    the one before. Empty while no time is known.

    Args:
        window: Rounds W of the pacer.
        percentile: T starts at this percentile of predicted times, of up to 1,000 clients with a plan; if none of them has one,
            of the first clients that complete a round.
    """

    def __init__(
        self, *, window: Annotated[int, Field(ge=1)] = 20, percentile: Annotated[float, Field(gt=0, le=100)] = 50.0
    ):
        self._window, self._percentile = window, percentile

    def init(self, view: View) -> Mapping[str, Any]:
        """The preferred duration, from the predicted times of a keyed sample of the fleet."""
        sample = islice(keyed_walk(view.num_clients, view.seed, "oort profile"), _PROFILED)
        return self._first([cost for cost in map(view.cost, sample) if cost is not None])

    def _first(self, times: Sequence[float]) -> Mapping[str, Any]:
        if not times:
            return {}
        preferred = float(np.percentile(times, self._percentile))
        return {"clients": {}, "preferred_s": preferred, "step_s": preferred, "window": 0.0, "before": None}

    def cohort(self, state: Mapping[str, Any], view: View, *, size: int, admit: Callable[[int], bool]) -> list[int]:
        """⌈1.1 size⌉ clients; if there are too few of one sort, explored or not, the other makes up for them."""
        wanted = math.ceil(size * _OVER_COMMIT)
        ranked = _ranked(state, view)
        num_exploited = wanted - math.floor(exploration(view.round_index) * wanted + 0.5)
        pool, next_place = _best(ranked, num_exploited, admit)
        draws = numpy_generator(view.seed, "oort exploit", view.round_index).random(len(pool))
        order = weighted_order(np.array([score for _, score in pool]), draws)
        exploited = [pool[index][0] for index in order.tolist()]
        chosen = exploited[:num_exploited]
        chosen += self._explore(state, view, wanted - len(chosen), admit)
        chosen += exploited[num_exploited : num_exploited + wanted - len(chosen)]
        for client, _ in ranked[next_place:]:
            if len(chosen) >= wanted:
                break
            if admit(client):
                chosen.append(client)
        return chosen

    def advance(
        self, state: Mapping[str, Any], view: View, *, row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """Note utility, round and time of the clients that completed; move T at the end of a window."""
        seen = {
            str(client["client"]): [_utility(client), view.round_index + 1, client["sim_time_s"]]
            for client in clients if client["status"] == "completed" and math.isfinite(client["loss_rms"])
        }
        state = state or self._first([seconds for _, _, seconds in seen.values()])
        if not state:
            return {}
        new = {**state, "clients": {**state["clients"], **seen}}
        new["window"] = state["window"] + math.fsum(utility for utility, _, _ in seen.values())
        if (view.round_index + 1) % self._window == 0:
            if state["before"] is not None and new["window"] < state["before"]:
                new["preferred_s"] = state["preferred_s"] + state["step_s"]
            new["before"], new["window"] = new["window"], 0.0
        return new

    def _explore(self, state: Mapping[str, Any], view: View, count: int, admit: Callable[[int], bool]) -> list[int]:
        """Up to ``count`` clients that never took part, the next one in proportion to its speed, out of ten times as many."""
        explored = state.get("clients", {})
        if count <= 0 or len(explored) >= view.num_clients:
            return []
        unexplored = (client for client in keyed_walk(view.num_clients, view.seed, "oort explore", view.round_index)
                      if str(client) not in explored)
        pool = list(islice(filter(admit, unexplored), _SPEED_POOL * count))
        times = np.array([view.cost(client) for client in pool], dtype=np.float64)
        draws = numpy_generator(view.seed, "oort speed", view.round_index).random(len(pool))
        return [pool[index] for index in weighted_order(1 / times, draws)[:count].tolist()]


def exploration(round_index: int) -> float:
    """The share ε of a cohort that goes to clients that never took part."""
    return max(0.2, 0.9 * 0.95**round_index)


def scores(
    utilities: np.ndarray, last_rounds: np.ndarray, times: np.ndarray, *, round_number: int, preferred_s: float
) -> np.ndarray:
    """What explored clients promise.

    Args:
        utilities, last_rounds, times: Statistical utility, round (from 1) and seconds of each when it last took part, (n,).
        round_number: The round that is drawn, from 1.
        preferred_s: The preferred duration T.

    Returns:
        float64 (n,), none negative.
    """
    clipped = np.minimum(utilities, np.percentile(utilities, _CLIP_PERCENTILE))
    low, high = clipped.min(), clipped.max()
    normalised = (clipped - low) / (high - low) if high > low else np.ones(len(clipped))
    found = normalised + np.sqrt(0.1 * math.log(round_number) / last_rounds)
    return np.where(times > preferred_s, found * (preferred_s / times) ** 2, found)


def _ranked(state: Mapping[str, Any], view: View) -> list[tuple[int, float]]:
    """Explored clients with their scores, the best first, then by number."""
    if not state.get("clients"):
        return []
    numbers = np.array([int(client) for client in state["clients"]])
    utilities, last_rounds, times = np.array(list(state["clients"].values()), dtype=np.float64).T
    found = scores(utilities, last_rounds, times, round_number=view.round_index + 1, preferred_s=state["preferred_s"])
    order = np.lexsort((numbers, -found))
    return list(zip(numbers[order].tolist(), found[order].tolist(), strict=True))


def _best(
    ranked: Sequence[tuple[int, float]], count: int, admit: Callable[[int], bool]
) -> tuple[list[tuple[int, float]], int]:
    """The ``count`` best clients that are admitted, and all others that come near the last of them.

    Returns:
        The clients with their scores, and the place in ``ranked`` of the first that was not asked.
    """
    pool: list[tuple[int, float]] = []
    for place, (client, score) in enumerate(ranked):
        if len(pool) >= count and (count == 0 or score < _CUTOFF * pool[count - 1][1]):
            return pool, place
        if admit(client):
            pool.append((client, score))
    return pool, len(ranked)


def _utility(client: Mapping[str, Any]) -> float:
    """Statistical utility, from a client's line of metrics."""
    return min(client["num_samples"], client["num_visits"]) * client["loss_rms"]
