"""A round's cohort: who takes part, with which plan, on which rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dfed.client import Forms, Worker
from dfed.comm import Message, Transport, wire
from dfed.comm.partial_sums import SumsBuffer, value_range, weight_scale
from dfed.data import Partition
from dfed.drawing import Asked
from dfed.errors import DfedError
from dfed.fleet import Cost, Fleet, client_cost
from dfed.plan import Plan
from dfed.planner import Costs
from dfed.server import ServerOptimizer, StatefulSampler, View
from dfed.state import ServerState
from dfed.strategies import Strategy

__all__ = ["Cohort", "Job", "Sampler", "choose_cohort", "cost_of", "encode_order"]


class Sampler(Protocol):
    """Draws cohorts; see :mod:`dfed.server.samplers`. Those that remember are :class:`dfed.server.StatefulSampler`."""

    def cohort(
        self, *, size: int, num_clients: int, seed: int, round_index: int, admit: Callable[[int], bool],
        sizes: Callable[[], np.ndarray],
    ) -> list[int]:
        """Up to ``size`` distinct clients that ``admit`` accepts."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank knows of a run: the same objects, made from the same config, on every rank.

    Attributes:
        clients_folder: On the server: where clients keep their states; None if they have none.
        plain: Costs of plainly training the full model, whatever the strategy.
        body: On the server: holds what is broadcast, from round to round.
        cohort: How many clients' updates a round takes at most.
        drawn: How many the sampler is asked for; more than ``cohort`` where some are expected to fail.
        deadline_s: How many simulated seconds the server waits for its clients at most; None: for as long as it takes.
        units: The unit of each parameter, by name, if it is to be measured how far they move; else empty.
    """

    seed: int
    rounds: int
    cohort: int
    drawn: int
    exchange: str
    max_failed_fraction: float
    deadline_s: float | None
    strategy: Strategy
    strategy_name: str
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]
    fleet: Fleet
    partition: Partition
    sampler: Sampler | StatefulSampler
    optimizer: ServerOptimizer
    costs: Costs
    plain: Costs
    refuses_over_budget: bool
    forms: Forms
    error_feedback: bool
    clients_folder: str | None
    rate_factor: Callable[[int], float]
    transport: Transport
    worker: Worker | None
    sums: SumsBuffer = field(default_factory=SumsBuffer)
    body: wire.Buffer = field(default_factory=wire.Buffer)
    stop_requested: Callable[[], bool]
    units: Mapping[str, str] = field(default_factory=dict)

    def asked(self, state: ServerState) -> Asked:
        """The plans that the strategy has for clients in the round after ``state``; none is asked for yet."""
        return Asked(strategy=self.strategy, fleet=self.fleet, partition=self.partition, costs=self.costs, state=state,
                     plain=self.plain, deadline_s=self.deadline_s)

    def view(self, state: ServerState) -> View:
        """What a sampler that remembers may ask in the round after ``state``."""
        return self.asked(state).view(seed=self.seed, rounds=self.rounds)


@dataclass(frozen=True)
class Cohort:
    """The clients of a round with their plans and ranks, and how many were asked in vain.

    Attributes:
        dropped: Clients that vanish during the round.
        refused: Clients whose predicted peak exceeds their budget, where ``memory.enforce`` is ``predicted``.
        late: Clients that no rank plays, as the server does not take what they would send: they would be done after the
            deadline, or more were drawn than wanted, and these are the slowest of the others. One that fails while it trains
            is not known beforehand, and is not replaced.
        wanted: How many clients' updates the round takes at most.
        is_missing: Whether somebody dropped out, or would be done after the deadline: where fewer than wanted complete the
            round, the server waits for these until then.
    """

    plans: Mapping[int, Plan]
    ranks: Mapping[int, int]
    dropped: frozenset[int]
    refused: frozenset[int]
    late: frozenset[int]
    wanted: int
    is_missing: bool
    ineligible: int
    unavailable: int


def choose_cohort(job: Job, state: ServerState) -> Cohort:
    """Draw the cohort among the clients that are available and have a plan, and give each a rank (keyed; server only)."""
    round_index, asked, plans, in_vain = state.round_index, job.asked(state), {}, {"ineligible": 0, "unavailable": 0}

    def admit(client: int) -> bool:
        if not job.fleet.available(client, round_index):
            in_vain["unavailable"] += 1
            return False
        plan = asked.plan(client)
        if plan is None:
            in_vain["ineligible"] += 1
            return False
        plans[client] = plan
        return True

    if isinstance(job.sampler, StatefulSampler):
        view = asked.view(seed=job.seed, rounds=job.rounds)
        chosen = job.sampler.cohort(state.sampler, view, size=job.drawn, admit=admit)
    else:
        chosen = job.sampler.cohort(
            size=job.drawn, num_clients=job.fleet.num_clients, seed=job.seed, round_index=round_index, admit=admit,
            sizes=job.partition.sizes,
        )
    if len(set(chosen)) < len(chosen) or not plans.keys() >= set(chosen):
        raise DfedError(f"a sampler must draw different clients, each of which `admit` accepted, but draws {list(chosen)}.")
    dropped = frozenset(client for client in chosen if job.fleet.drops_out(client, round_index))
    refused = frozenset(c for c in chosen if c not in dropped and _is_over_budget(job, c, plans[c]))
    present = [c for c in chosen if c not in dropped | refused]
    some_go = job.deadline_s is not None or len(present) > job.cohort
    times = {c: _time(job, c, plans[c], round_index) for c in present} if some_go else {}
    too_slow = frozenset(c for c in present if job.deadline_s is not None and times[c] > job.deadline_s)
    present = [c for c in present if c not in too_slow]
    if len(present) > job.cohort:
        present.sort(key=lambda client: (times[client], client))
    late = too_slow.union(present[job.cohort :])
    costs = {c: sum(_work(job, c, plans[c])) for c in present if c not in late}
    ranks = _assign(costs, job.transport.client_ranks)
    return Cohort({c: plans[c] for c in chosen}, ranks, dropped, refused, late, job.cohort,
                  bool(dropped | too_slow), **in_vain)


def _is_over_budget(job: Job, client: int, plan: Plan) -> bool:
    budget = job.fleet.profile(client).budget_bytes
    return job.refuses_over_budget and budget is not None and job.costs.peak_bytes(plan) > budget


def cost_of(job: Job, client: int, plan: Plan, round_index: int, *, down: int, up: int, trains: bool = True) -> Cost:
    """What the round costs the client in virtual time and energy, with whatever slows it down.

    Args:
        down, up: Bytes that it receives and sends.
        trains: Whether it comes to that.
    """
    flops, int8_flops = _work(job, client, plan) if trains else (0.0, 0.0)
    return client_cost(job.fleet.profile(client), flops=flops, int8_flops=int8_flops, bytes_down=down, bytes_up=up,
                       slowed=job.fleet.straggles(client, round_index))


def _time(job: Job, client: int, plan: Plan, round_index: int) -> float:
    """Simulated seconds after which the client's update would be there."""
    form = job.forms.of(plan)
    down, up = (sum(parts(round_index, client).values()) for parts in (form.down_bytes, form.up_bytes))
    return cost_of(job, client, plan, round_index, down=down, up=up).total_s


def _work(job: Job, client: int, plan: Plan) -> tuple[float, float]:
    """Floating-point and int8 operations of the client's training."""
    num_samples = job.partition.num_samples(client)
    return job.costs.flops(plan, num_samples), job.costs.int8_flops(plan, num_samples)


def _assign(costs: Mapping[int, float], ranks: Sequence[int]) -> dict[int, int]:
    """Clients to ranks: the costliest first, each to the rank with the least work so far."""
    load = dict.fromkeys(ranks, 0.0)
    assigned = {}
    for client in sorted(costs, key=lambda client: (-costs[client], client)):
        rank = min(ranks, key=lambda rank: (load[rank], rank))
        load[rank] += costs[client]
        assigned[client] = rank
    return assigned


def encode_order(job: Job, state: ServerState, cohort: Cohort) -> Message:
    """The round's broadcast: every rank's tasks, and each block that someone in the cohort needs, encoded once."""
    gone = cohort.dropped | cohort.late
    weights = {client: job.partition.num_samples(client) for client in cohort.plans if client not in gone}
    tasks: dict[str, list[dict[str, Any]]] = {str(rank): [] for rank in job.transport.client_ranks}
    plans: dict[str, tuple[int, Plan]] = {}  # each different one crosses once
    for client, rank in cohort.ranks.items():
        plan = cohort.plans[client]
        number, _ = plans.setdefault(plan.shape_key(), (len(plans), plan))
        task = {"client": client, "plan": number, "weight": weights[client]}
        budget = job.fleet.profile(client).budget_bytes
        if budget is not None:
            task |= {"budget_bytes": budget, "peak_bytes": job.costs.peak_bytes(plan)}
        if client in state.clients:
            task["state"] = state.clients[client]
        tasks[str(rank)].append(task)
    forms = [job.forms.of(plan) for _, plan in plans.values()]
    held: dict[str, set[str]] = {}
    for entry in (entry for form in forms for entry in form.down):
        held.setdefault(entry.name, set()).add(entry.codec)
    sent_up = {entry.name for form in forms for entry in form.up}
    block_of = job.strategy.splitting.block_of
    entries, body_bytes = wire.layout(
        (name, block_of(name), codec, shape) for name, shape in job.shapes.items() for codec in sorted(held.get(name, ()))
    )
    meta = {
        "round": state.round_index,
        "plans": [plan.to_json() for _, plan in plans.values()],
        "tasks": tasks,
        "clients_folder": job.clients_folder,
        "exchange": job.exchange,
        "scale": weight_scale(sum(weights.values())),  # refused clients count, as those that fail for real do
        "ranges": {name: value_range(state.params[name]) for name in job.shapes if name in sent_up},
        "rate_factor": job.rate_factor(state.round_index),
        "up_names": [name for name in job.shapes if name in sent_up],
    }
    return wire.encode("round", meta, entries, lambda entry: job.strategy.sent(state, entry.name, entry.codec),
                       job.body.of(body_bytes), seed=job.seed)
