"""Evaluation of a run's model, and of its sub-models, on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from dfed.client import DEFAULT_CODEC, Evaluation, combine
from dfed.comm import Message, wire
from dfed.comm.partial_sums import PartialSums, weight_scale
from dfed.drawing import note_evaluation
from dfed.errors import UpdateRejected
from dfed.plan import Plan
from dfed.run import Run
from dfed.state import ServerState

__all__ = ["evaluate", "evaluate_variants", "follow_evaluation"]

logger = logging.getLogger(__name__)


def evaluate(run: Run, state: ServerState) -> tuple[ServerState, Evaluation]:
    """Evaluate the global model on all ranks (collective: the others call :func:`follow_evaluation`).

    Returns:
        The state, with the norm statistics that were worked out for it if the strategy's clients keep none, and with what the
        sampler makes of the figures; and the figures.
    """
    plan = run.job.strategy.evaluated(state)
    statistics = _statistics(run, plan, state.params, state.round_index)
    regions = run.job.forms.of(plan).regions
    params = dict(state.params)
    for name, value in statistics.items():
        params[name] = params[name].clone()
        regions[name].put_(params[name], value)
    if statistics:
        state = replace(state, params=params)
    found = _evaluate(run, plan, state.params, state.round_index)
    if state.round_index % run.config.metrics.every == 0:  # where a run was only cut short, an undisturbed one knows nothing
        state = note_evaluation(run.job.sampler, state, found.accuracy_on)
    return state, found


def evaluate_variants(run: Run, state: ServerState) -> dict[str, Evaluation]:
    """Evaluate the sub-models that the strategy names, likewise (collective)."""
    found = {}
    for name, plan in run.job.strategy.variants(state).items():
        params = dict(state.params)
        for tensor, value in _statistics(run, plan, params, state.round_index).items():
            params[tensor] = params[tensor].clone()
            run.job.forms.of(plan).regions[tensor].put_(params[tensor], value)
        found[name] = _evaluate(run, plan, params, state.round_index)
    return found


def follow_evaluation(run: Run, order: Message) -> None:
    """What a client rank does when the server evaluates (collective)."""
    if order.kind == "evaluate":
        _shard(run, order)
    else:
        _sums(run, order)


def _evaluate(run: Run, plan: Plan, params: Mapping[str, Tensor], round_index: int) -> Evaluation:
    shards = _shard(run, run.transport.broadcast(_order(run, "evaluate", plan, params, round_index)))
    assert shards is not None, "the server gathers"
    return combine(shards)


def _shard(run: Run, order: Message) -> list[Any] | None:
    """This rank's share of an evaluation; on the server everybody's."""
    transport, plan = run.transport, Plan.from_json(order.meta["plan"])
    batches = run.evaluator.run(plan, wire.decode(order), transport.rank, transport.size)
    parts = transport.gather({"batches": batches})
    return None if parts is None else [part["batches"] for part in parts]


def _statistics(run: Run, plan: Plan, params: Mapping[str, Tensor], round_index: int) -> dict[str, Tensor]:
    """Norm statistics of the plan's sub-model, worked out anew; nothing if its clients send theirs, or if it has none."""
    if run.job.strategy.statistics_samples is None or not run.evaluator.statistics_shapes(plan):
        return {}
    sums, refused = _sums(run, run.transport.broadcast(_order(run, "statistics", plan, params, round_index)))
    if refused:
        logger.warning("round %d: the norms' statistics stay as they were: %s", round_index, refused[0])
        return {}
    num_batches = run.evaluator.num_statistics_batches()
    return {name: (sums[name] / (num_batches * weight_scale(num_batches))).float() for name in sums.shapes}


def _sums(run: Run, order: Message) -> tuple[PartialSums, list[str]]:
    """The statistics' sums over all ranks on the server, and why some rank has none."""
    transport, plan = run.transport, Plan.from_json(order.meta["plan"])
    sums, refused = PartialSums(run.evaluator.statistics_shapes(plan)), None
    try:
        run.evaluator.add_statistics(plan, wire.decode(order), transport.rank, transport.size, sums)
    except UpdateRejected as error:
        refused = str(error)
    parts = transport.gather({"refused": refused})
    transport.reduce(sums.flat)
    return sums, [part["refused"] for part in parts or () if part["refused"]]


def _order(run: Run, kind: str, plan: Plan, params: Mapping[str, Tensor], round_index: int) -> Message:
    """A broadcast of the tensors that the plan's sub-model holds."""
    job = run.job
    block_of, held = job.strategy.splitting.block_of, job.forms.of(plan).regions
    entries, body_bytes = wire.layout((name, block_of(name), DEFAULT_CODEC, job.shapes[name]) for name in held)
    meta = {"round": round_index, "plan": plan.to_json()}
    return wire.encode(kind, meta, entries, params, job.body.of(body_bytes))
