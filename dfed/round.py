"""One round, on one page: what the server does, and what every rank does."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from dfed.client import FEATURES_LOST
from dfed.cohort import Cohort, Job, choose_cohort, encode_order
from dfed.comm import Message, Transport, wire
from dfed.comm.partial_sums import PartialSums
from dfed.drawing import advance, begin
from dfed.errors import ExchangeFailed, RankLost, SumsLost, TooManyFailures, UpdateRejected, WireError
from dfed.inertia import MeanChange
from dfed.plan import Plan
from dfed.planner import learn
from dfed.registry import calling
from dfed.round_rows import client_rows, round_row
from dfed.server import Contribution, aggregate
from dfed.state import ServerState, as_saved

__all__ = ["RoundResult", "lead_round", "no_answer", "take_part"]


@dataclass(frozen=True)
class RoundResult:
    """What the server knows after a round.

    Attributes:
        row, clients: The round's line of metrics, and its clients' lines.
        stop_requested: Whether some rank was asked to stop.
        completed: Of each client that completed, its plan and its report.
        diversity: Of each unit that some of them sent, if that is measured: see :class:`dfed.inertia.MeanChange`.
    """

    state: ServerState
    row: dict[str, Any]
    clients: list[dict[str, Any]]
    stop_requested: bool
    completed: Mapping[int, tuple[Plan, Mapping[str, Any]]]
    diversity: Mapping[str, float | None]


def lead_round(job: Job, state: ServerState) -> RoundResult:
    """The server's round (collective: the other ranks call :func:`take_part` with what they receive).

    Raises:
        TooManyFailures: If more clients failed than the settings allow.
        RankLost: If a rank died.
    """
    start, fabric = time.perf_counter(), job.transport.fabric_bytes

    # 1. Plan for the candidates and draw the cohort among those who have a plan; assign clients to ranks.
    with calling("strategy", job.strategy_name):  # which plans, and whose training is predicted
        state = begin(job.sampler, state, lambda: job.view(state))
        cohort = choose_cohort(job, state)

    # 2. Down: every block that someone needs, encoded once, to all ranks.
    order = job.transport.broadcast(encode_order(job, state, cohort))

    # 3. to 5. The ranks train their clients; sums and reports come up.
    with no_answer(job.transport):
        sums, parts = take_part(job, order)
    assert parts is not None, "the server gathers"
    reports = sorted((report for part in parts for report in part["reports"]), key=lambda report: report["client"])
    _check_failures(job, reports, state.round_index)

    # 6. Aggregate: covered entries become the weighted mean, the others stay; then the server optimiser.
    done = {report["client"]: (cohort.plans[report["client"]], report) for report in reports if report["status"] == "completed"}
    completed = [plan for plan, _ in done.values()]
    changes = MeanChange(job.units, _received(job, order, completed)) if job.units else None
    new = aggregate(
        state, sums, [_contribution(job, plan) for plan in completed], order.meta["scale"], job.optimizer, job.buffers, changes
    )

    # 7. Metrics, virtual clock, and the strategy's own state.
    clients = client_rows(job, cohort, reports, state.round_index)
    row = round_row(cohort, clients, state.round_index, job.deadline_s)
    row["bytes"]["fabric"] = job.transport.fabric_bytes - fabric
    row["time_s"] = time.perf_counter() - start
    senders, weights = Counter(block for plan in completed for block in plan.train), Counter[str]()
    for plan in completed:
        weights.update(dict.fromkeys(plan.train, job.partition.num_samples(plan.client)))
    new = job.strategy.advance(state, new, {**row, "senders": senders, "sender_weights": weights})
    if note := job.strategy.note(new):
        row["strategy"] = as_saved("what a strategy notes of a round", note)
    new = replace(new, sampler=advance(job.sampler, state, lambda: job.view(state), row, clients))
    new = replace(new, infeasible=_infeasible(job, cohort, clients, state), clients=_remembering(reports, state))
    new = replace(new, facts=as_saved("the facts of a strategy", new.facts))
    weights = {client: job.partition.num_samples(client) * order.meta["scale"] for client in done}
    diversity = {} if changes is None else changes.diversity((weights[c], done[c][1]["change_squares"]) for c in done)
    return RoundResult(new, row, clients, any(part["stop"] for part in parts), done, diversity)


@contextmanager
def no_answer(transport: Transport) -> Iterator[None]:
    """Between an order and its answers the other ranks listen to nothing else: an error of the server's must not wait for them.

    Raises:
        ExchangeFailed: In place of any error that does not say itself that the ranks cannot be reached.
    """
    try:
        yield
    except (RankLost, WireError, SumsLost, ExchangeFailed):
        raise
    except Exception as error:
        if transport.size == 1:
            raise
        raise ExchangeFailed(f"the server could not take what the ranks sent: {type(error).__name__}: {error}") from error


def take_part(job: Job, order: Message) -> tuple[PartialSums, list[dict[str, Any]] | None]:
    """Every rank's round, from the order that came down (collective).

    Returns:
        The sums (over all ranks on the server, undefined elsewhere), and on the server what each rank reported.
    """
    meta, transport = order.meta, job.transport
    sums = job.sums.of({name: job.shapes[name] for name in meta["up_names"]})

    # 3. Take the clients assigned to this rank, 4. train them one after another, each under its cap, and 5. send what they
    # learned up: one sum over the ranks at the end, or each client's update by itself. Both give the same bits.
    tasks = meta["tasks"].get(str(transport.rank), [])
    inbox = _Inbox(job, order, sums) if meta["exchange"] == "per_client" and transport.is_server else None
    deliver = partial(inbox.take, transport.rank) if inbox is not None else transport.send
    reports = job.worker.work(order, tasks, sums, deliver) if job.worker else []
    if inbox is not None and not job.worker:
        inbox.take_all()
    if not job.worker:
        _ = sums.flat  # zeroed while the clients are at work
    parts = transport.gather({"reports": reports, "stop": job.stop_requested()})
    if meta["exchange"] == "fused":
        transport.reduce(sums.flat)
    elif parts is not None and inbox is not None:
        inbox.mark(report for part in parts for report in part["reports"])
    return sums, parts


class _Inbox:
    """Where the server takes each client's own update and folds it; any order gives the same bits."""

    def __init__(self, job: Job, order: Message, sums: PartialSums):
        self._job, self._meta, self._sums = job, order.meta, sums
        self._sent = wire.decode_all(order, seed=job.seed)
        self._forms = [job.forms.of(Plan.from_json(plan)) for plan in order.meta["plans"]]
        self._tasks = {task["client"]: task for tasks in order.meta["tasks"].values() for task in tasks}
        self._due = {int(rank): deque(task["client"] for task in tasks) for rank, tasks in order.meta["tasks"].items()}
        self._refused: dict[int, tuple[str, str]] = {}

    def take_all(self) -> None:
        """Receive every rank's updates, in turn, as they come."""
        while any(self._due.values()):
            for rank in [rank for rank, due in self._due.items() if due]:
                self.take(rank, self._job.transport.receive(rank))

    def take(self, rank: int, update: Message) -> None:
        """Fold the next update of this rank."""
        client = self._due[rank].popleft()
        if update.kind == "nothing" and dict(update.meta) == {"round": self._meta["round"], "client": client}:
            return
        task = self._tasks[client]
        form = self._forms[task["plan"]]
        form.check_update(update, self._meta["round"], client, rank)
        try:
            values = form.decode_update(update, form.received(self._sent))
            self._sums.add(values, form.regions, task["weight"] * self._meta["scale"], self._meta["ranges"])
        except (SumsLost, WireError):
            raise
        except UpdateRejected as error:
            self._refused[client] = error.reason, str(error)
        except Exception as error:  # as where a rank folds: one client's update is no reason to end the run
            self._refused[client] = "exception", f"{type(error).__name__}: {error}"

    def mark(self, reports: Iterable[dict[str, Any]]) -> None:
        """Write down in the reports which updates were refused."""
        for report in reports:
            if (refused := self._refused.get(report["client"])) is not None:
                report.update(status="failed", reason=refused[0], detail=refused[1], loss=None, loss_rms=None)


def _infeasible(job: Job, cohort: Cohort, clients: Sequence[Mapping[str, Any]], state: ServerState) -> Mapping[str, int]:
    """What is known to run out of memory, with this round's cases."""
    known = state.infeasible
    for row in clients:
        if row["status"] == "oom":
            known = learn(known, cohort.plans[row["client"]], row["budget_bytes"])
    return known


def _remembering(reports: Sequence[Mapping[str, Any]], state: ServerState) -> Mapping[str, int]:
    """Who remembers something now, and as of which round; who has lost it begins anew."""
    keepers = [report["client"] for report in reports if report["keeps_state"] and report["status"] == "completed"]
    lost = {report["client"] for report in reports if report["reason"] == FEATURES_LOST}
    known = {client: version for client, version in state.clients.items() if client not in lost} if lost else state.clients
    return {**known, **dict.fromkeys(keepers, state.round_index)}


def _contribution(job: Job, plan: Plan) -> Contribution:
    form = job.forms.of(plan)
    sent = {entry.name: form.regions[entry.name] for entry in form.up}
    return Contribution(job.partition.num_samples(plan.client), sent)


def _received(job: Job, order: Message, completed: Iterable[Plan]) -> dict[str, Tensor]:
    """Of each tensor that one of these plans sends up, what their clients had received; not where codecs differed."""
    codecs: dict[str, set[str]] = {}
    for form in {id(form): form for form in map(job.forms.of, completed)}.values():
        down = {entry.name: entry.codec for entry in form.down}
        for entry in form.up:
            codecs.setdefault(entry.name, set()).add(down.get(entry.name, ""))
    sent = wire.decode_all(order, seed=job.seed)
    return {name: sent[name, codec] for name, (codec, *others) in codecs.items() if not others and codec}


def _check_failures(job: Job, reports: Sequence[Mapping[str, Any]], round_index: int) -> None:
    failed = [report for report in reports if report["status"] == "failed" and report["reason"] != FEATURES_LOST]
    if reports and len(failed) > job.max_failed_fraction * len(reports):
        raise TooManyFailures(
            f"round {round_index}: {len(failed)} of {len(reports)} clients failed, more than "
            f"`server.max_failed_fraction` ({job.max_failed_fraction:g}) allows. The last one, client "
            f"{failed[-1]['client']}, said: {failed[-1]['detail']}"
        )
