"""What a sampler is told: whom the strategy has a plan for and what it would cost, and what came of a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dfed.data import Partition
from dfed.fleet import Fleet
from dfed.plan import Plan
from dfed.planner import ClientPlanner, Costs, Limits
from dfed.server import StatefulSampler, View
from dfed.state import ServerState, as_saved
from dfed.strategies import Candidate, Strategy

__all__ = ["Asked", "advance", "begin", "note_evaluation"]


class Asked:
    """The plans that the strategy has for clients in one round. The strategy is asked once for each, when it is wanted.

    Args:
        plain, deadline_s: See :meth:`dfed.planner.Limits.of`.
    """

    def __init__(self, *, strategy: Strategy, fleet: Fleet, partition: Partition, costs: Costs, state: ServerState,
                 plain: Costs, deadline_s: float | None):
        self._strategy, self._fleet, self._partition, self._costs, self._state = strategy, fleet, partition, costs, state
        self._plain, self._deadline_s = plain, deadline_s
        self._found: dict[int, tuple[ClientPlanner, Plan | None]] = {}

    def plan(self, client: int) -> Plan | None:
        """The plan of ``client``; None if it has none, has no samples, or its plan ran out of memory on such a budget."""
        return self._ask(client)[1]

    def cost(self, client: int) -> float | None:
        """Predicted simulated seconds of the client's round, if nothing slows it down; None without a plan."""
        planner, plan = self._ask(client)
        return None if plan is None else planner.cost(plan).total_s

    def costs(self) -> np.ndarray:
        """As :meth:`cost`, of all clients, float64 (num_clients,), NaN without a plan.

        Of the clients with equal devices and equally many samples only the first is asked for, unless what they can send is
        drawn.
        """
        _, first, case_of = np.unique(self.cases(), return_index=True, return_inverse=True)
        found = [self.cost(client) for client in first.tolist()]
        return np.array([np.nan if cost is None else cost for cost in found])[case_of]

    def cases(self) -> np.ndarray:
        """A number for each client, int64 (num_clients,): equal for those with equal devices and equally many samples, unless
        what they can send is drawn."""
        kinds, sizes = self._fleet.kinds(), self._partition.sizes()
        cases = kinds * (int(sizes.max()) + 1) + sizes
        for kind in np.unique(kinds):
            alike = np.flatnonzero(kinds == kind)
            if self._fleet.profile(int(alike[0])).draws_upload:
                cases[alike] = cases.max() + 1 + np.arange(len(alike))
        return cases

    def view(self, *, seed: int, rounds: int) -> View:
        """What a sampler that remembers may ask."""
        return View(
            seed=seed, rounds=rounds, round_index=self._state.round_index, num_clients=self._fleet.num_clients,
            cost=self.cost, costs=self.costs, label_counts=self._partition.label_counts,
        )

    def _ask(self, client: int) -> tuple[ClientPlanner, Plan | None]:
        if client not in self._found:
            num_samples, profile = self._partition.num_samples(client), self._fleet.profile(client)
            share = self._fleet.upload_share(client, self._state.round_index)
            limits = Limits.of(self._plain, profile, client, num_samples, deadline_s=self._deadline_s, upload_share=share)
            planner = ClientPlanner(self._costs, profile, num_samples, self._state.infeasible, limits)
            candidate = Candidate(client, self._state.round_index, num_samples, profile, planner,
                                  lambda: self._partition.label_counts([client]))
            plan = self._strategy.plan(self._state, candidate) if num_samples else None
            if plan is not None and planner.failed_before(plan):
                plan = None  # no plan is tried twice on a budget that was too small for it
            self._found[client] = planner, plan
        return self._found[client]


def begin(sampler: Any, state: ServerState, view: Callable[[], View]) -> ServerState:
    """The state before a round's drawing, with what the sampler remembers from the start if it remembers nothing yet."""
    if not isinstance(sampler, StatefulSampler) or state.sampler:
        return state
    return replace(state, sampler=as_saved("what a sampler remembers", sampler.init(view())))


def advance(
    sampler: Any, state: ServerState, view: Callable[[], View], row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """What the sampler remembers after the round that was drawn with ``state``."""
    if not isinstance(sampler, StatefulSampler):
        return state.sampler
    return as_saved("what a sampler remembers", sampler.advance(state.sampler, view(), row=row, clients=clients))


def note_evaluation(
    sampler: Any, state: ServerState, accuracy_on: Callable[[np.ndarray | None], float]
) -> ServerState:
    """The state after the global model was evaluated.

    Args:
        accuracy_on: ``Evaluation.accuracy_on``.
    """
    if not isinstance(sampler, StatefulSampler):
        return state
    return replace(state, sampler=as_saved("what a sampler remembers", sampler.evaluated(state.sampler, accuracy_on)))
