"""TiFL: clients of a round are about equally fast, and slow tiers have their turns.

Chai et al., "TiFL: A Tier-based Federated Learning System" (HPDC 2020), algorithm 2. With n tiers and R rounds, a tier has
⌈R/n⌉ credits, one of which each of its rounds costs. A round draws a tier among those with credits, by probabilities that are
1/n at first, then clients of that tier uniformly. Every I rounds the probabilities become (m − rank)/D over the m tiers with
credits left, sorted by accuracy from the worst (rank 0) up, D = m(m + 1)/2.

Clients without a plan when the tiers are made are in none. Every I rounds those that have one by then join the tier whose
median time, now, is nearest to theirs.

Where we deviate: see docs/deviations.md.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from dfed import rng
from dfed.server.samplers import StatefulSampler, View, keyed_walk

__all__ = ["TiFL"]

_NO_TIER = 255


class TiFL(StatefulSampler):
    """Tiers of about equally fast clients; tiers with a low accuracy are drawn more often (TiFL).

    State: ``tier_of`` (each client's tier, packed), ``mix`` (samples of each class by tier; None: as the whole set),
    ``turns`` (rounds by tier), ``chances`` (probabilities by tier) and ``accuracy`` (by tier, as last evaluated, or None).
    Empty while no client has a plan.

    Args:
        tiers: Number of tiers n; fewer if there are fewer clients.
        interval: Rounds I between changes of the probabilities.
    """

    def __init__(
        self, *, tiers: Annotated[int, Field(ge=1, le=100)] = 5, interval: Annotated[int, Field(ge=1)] = 10
    ):
        self._num_tiers, self._interval = tiers, interval

    def init(self, view: View) -> Mapping[str, Any]:
        """Sort all clients that have a plan by predicted time, then number, and cut the row into equal tiers."""
        costs = view.costs()
        order = np.argsort(costs, kind="stable")[: np.count_nonzero(~np.isnan(costs))]  # NaN sorts last
        if not len(order):
            return {}
        tier_of = np.full(view.num_clients, _NO_TIER, dtype=np.uint8)
        mixes = []
        for tier, members in enumerate(np.array_split(order, min(self._num_tiers, len(order)))):
            tier_of[members] = tier
            mix = view.label_counts(members.tolist())
            mixes.append(None if mix is None else mix.tolist())
        return {
            "tier_of": _packed(tier_of),
            "mix": mixes,
            "turns": [0] * len(mixes),
            "chances": [1 / len(mixes)] * len(mixes),
            "accuracy": [None] * len(mixes),
        }

    def cohort(self, state: Mapping[str, Any], view: View, *, size: int, admit: Callable[[int], bool]) -> list[int]:
        """Up to ``size`` clients of the tier that is drawn; if it has too few, of the next slower, then of the fastest on."""
        if not state:
            return []
        tier_of = _unpacked(state)
        num_tiers, first = len(state["turns"]), self._draw(state, view)
        chosen: list[int] = []
        for tier in (step % num_tiers for step in range(first, first + num_tiers)):
            members = np.flatnonzero(tier_of == tier)
            for place in keyed_walk(len(members), view.seed, "tifl clients", view.round_index, tier):
                if len(chosen) == size:
                    return chosen
                if admit(client := int(members[place])):
                    chosen.append(client)
        return chosen

    def advance(
        self, state: Mapping[str, Any], view: View, *, row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """One credit less for the tier that was drawn; the probabilities with which it was; and who joins a tier."""
        if not state:
            return state
        drawn = self._draw(state, view)
        turns = [count + (tier == drawn) for tier, count in enumerate(state["turns"])]
        new = {**state, "turns": turns, "chances": self._chances(state, view)}
        return new if view.round_index == 0 or view.round_index % self._interval else _joined(new, view)

    def evaluated(
        self, state: Mapping[str, Any], accuracy_on: Callable[[np.ndarray | None], float]
    ) -> Mapping[str, Any]:
        """Each tier's accuracy: that of the global model on held-out samples, weighted to the tier's class mix."""
        if not state:
            return state
        found = [accuracy_on(None if mix is None else np.asarray(mix)) for mix in state["mix"]]
        return {**state, "accuracy": [None if math.isnan(value) else value for value in found]}

    def _draw(self, state: Mapping[str, Any], view: View) -> int:
        """The tier of the view's round."""
        with_credits = _with_credits(state, view)
        weights = np.asarray(self._chances(state, view)) * with_credits
        if not weights.any():  # a run that was extended, or cut short, since the probabilities were worked out
            weights = with_credits if with_credits.any() else np.ones(len(with_credits))
        share = rng.uniform(view.seed, "tifl tier", view.round_index) * weights.sum()
        tier = int(np.searchsorted(np.cumsum(weights), share, side="right"))
        return min(tier, int(np.flatnonzero(weights)[-1]))  # rounding may leave the sum a little below the share

    def _chances(self, state: Mapping[str, Any], view: View) -> list[float]:
        """The probabilities in the view's round: new ones every I rounds, if an accuracy is known.

        A tier whose accuracy is not known has no rank: it gets 1/m, and the others share what is left by theirs.
        """
        open_tiers = np.flatnonzero(_with_credits(state, view)).tolist()
        known = {tier: state["accuracy"][tier] for tier in open_tiers if state["accuracy"][tier] is not None}
        if view.round_index == 0 or view.round_index % self._interval or not known:
            return state["chances"]
        count, share, total = len(known), len(known) / len(open_tiers), len(known) * (len(known) + 1) / 2
        in_order = sorted(known.values())
        chances = [0.0] * len(state["turns"])
        for tier in open_tiers:
            if tier in known:
                ranks = [rank for rank, other in enumerate(in_order) if other == known[tier]]  # equally good tiers share theirs
                chances[tier] = share * (count - sum(ranks) / len(ranks)) / total
            else:
                chances[tier] = 1 / len(open_tiers)
        return chances


def _packed(tier_of: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(tier_of.tobytes())).decode()


def _unpacked(state: Mapping[str, Any]) -> np.ndarray:
    """Each client's tier, uint8 (num_clients,), not to be written to."""
    return np.frombuffer(zlib.decompress(base64.b64decode(state["tier_of"])), dtype=np.uint8)


def _joined(state: Mapping[str, Any], view: View) -> Mapping[str, Any]:
    """The state with every client in a tier that has a plan in the view's round."""
    tier_of = _unpacked(state).copy()
    if not (tier_of == _NO_TIER).any():
        return state
    costs = view.costs()
    with_plan = ~np.isnan(costs)
    joining = np.flatnonzero(with_plan & (tier_of == _NO_TIER))
    members = [costs[with_plan & (tier_of == tier)] for tier in range(len(state["turns"]))]
    medians = np.array([np.median(times) if len(times) else np.inf for times in members])
    if not len(joining) or not np.isfinite(medians).any():
        return state
    order = np.argsort(medians, kind="stable")
    halfway = (medians[order][1:] + medians[order][:-1]) / 2
    tier_of[joining] = order[np.searchsorted(halfway, costs[joining])]
    mixes = list(state["mix"])
    for tier in np.unique(tier_of[joining]).tolist():
        mix = view.label_counts(joining[tier_of[joining] == tier].tolist())
        mixes[tier] = None if mix is None else (np.asarray(mixes[tier]) + mix).tolist()
    return {**state, "tier_of": _packed(tier_of), "mix": mixes}


def _with_credits(state: Mapping[str, Any], view: View) -> np.ndarray:
    """Whether each tier has credits left, bool (tiers,)."""
    turns = np.asarray(state["turns"])
    return turns < math.ceil(view.rounds / len(turns))
