"""Samplers: which clients make up the cohort of a round.

A sampler has no state. The same arguments give the same cohort, on any rank and after any interruption.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dfed.rng import Permutation, numpy_generator

__all__ = ["Uniform", "Weighted"]

_CHUNK = 1024


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
        order = Permutation(num_clients, seed, "cohort", round_index)
        chosen: list[int] = []
        for start in range(0, num_clients, _CHUNK):
            for client in order.take(np.arange(start, min(start + _CHUNK, num_clients))).tolist():
                if len(chosen) == size:
                    return chosen
                if admit(client):
                    chosen.append(client)
        return chosen


class Weighted:
    """A client's chance of being drawn next is proportional to its number of samples.

    Weighted sampling without replacement by the keys of Efraimidis and Spirakis, "Weighted random sampling with a
    reservoir" (Information Processing Letters, 2006).
    """

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

        Client i with w_i samples gets the key u_i^(1/w_i), u_i uniform in (0, 1]; the largest keys are drawn. Costs
        O(num_clients) a round; asks clients in order of their keys and stops as soon as enough are admitted.

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
        # The largest u^(1/w) is the smallest -log(u)/w, which does not underflow; 1 - draw avoids the log of 0.
        times = -np.log1p(-draws[candidates]) / weights[candidates]
        chosen: list[int] = []
        for client in candidates[np.argsort(times, kind="stable")].tolist():
            if len(chosen) == size:
                break
            if admit(client):
                chosen.append(client)
        return chosen
