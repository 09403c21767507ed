"""Evaluation of a run's model, and of its sub-models, on all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from dfed.client import DEFAULT_CODEC, Evaluation, combine
from dfed.comm import Message, wire
from dfed.comm.partial_sums import PartialSums, weight_scale
from dfed.drawing import note_evaluation
from dfed.errors import UpdateRejected
from dfed.plan import Plan
from dfed.round import no_answer
from dfed.run import Run
from dfed.state import ServerState, as_saved

__all__ = ["evaluate", "evaluate_test", "evaluate_variants", "evaluated_params", "follow_evaluation"]

# The data of `metrics.split`, the test set at the end of a run, and the samples of `metrics.effectiveness_samples`.
_HELD_OUT, _TEST, _SAMPLE = "held_out", "test", "sample"


def evaluate(run: Run, state: ServerState) -> tuple[ServerState, Evaluation]:
    """Evaluate the global model on all ranks (collective: the others call :func:`follow_evaluation`).

    If the strategy's clients keep no norm statistics, the figures are of the model with statistics that are worked out for it.

    Returns:
        The state, with what sampler and strategy make of the figures, and after the run's last round with those statistics:
        between rounds they are nobody's business, and a run that was stopped there must go on like any other. And the figures.

    Raises:
        ExchangeFailed: If the server failed while the others were at work; they cannot be told.
    """
    strategy, samples = run.job.strategy, run.config.metrics.is_due(state.round_index, run.config.rounds)
    params, found = _evaluate(run, strategy.evaluated(state), state, samples=samples)
    if state.round_index % run.config.metrics.every == 0:  # where a run was only cut short, an undisturbed one knows nothing
        state = note_evaluation(run.job.sampler, state, found.accuracy_on)
        if strategy.heeds_evaluation is not None:
            judged = strategy.judged(state, found.loss)
            if judged.params is not state.params:  # the figures are to be those of the model that goes on
                params, found = _evaluate(run, strategy.evaluated(judged), judged, samples=samples)
            state = replace(judged, facts=as_saved("the facts of a strategy", judged.facts))
    if state.round_index == run.config.rounds:
        state = replace(state, params=params)
    return state, found


def evaluate_variants(run: Run, state: ServerState) -> dict[str, Evaluation]:
    """Evaluate the sub-models that the strategy names, likewise (collective)."""
    return {name: _evaluate(run, plan, state)[1] for name, plan in run.job.strategy.variants(state).items()}


def evaluate_test(run: Run, state: ServerState, variants: Collection[str] = ()) -> tuple[Evaluation, dict[str, Evaluation]]:
    """Evaluate the global model on the test set, likewise (collective); with ``metrics.test_at_end``, after the last round.

    Args:
        variants: Names of sub-models to evaluate there, too.
    """
    strategy = run.job.strategy
    found = {name: _evaluate(run, plan, state, data=_TEST)[1] for name, plan in strategy.variants(state).items()
             if name in variants}
    return _evaluate(run, strategy.evaluated(state), state, data=_TEST)[1], found


def evaluated_params(run: Run, plan: Plan, state: ServerState) -> tuple[dict[str, Tensor], str | None]:
    """The global model as the plan's sub-model is evaluated with it (collective: the others call :func:`follow_evaluation`).

    If the strategy's clients keep no norm statistics, those of the sub-model are worked out from training data.

    Returns:
        All tensors of the global model, by name; and why no statistics could be worked out, where they should have been: then
        those of ``state`` are left. Else None.
    """
    statistics, refused = _statistics(run, plan, state)
    params, regions = dict(state.params), run.job.forms.of(plan).regions
    for name, value in statistics.items():
        params[name] = params[name].clone()
        regions[name].put_(params[name], value)
    return params, refused


def follow_evaluation(run: Run, order: Message) -> None:
    """What a client rank does when the server evaluates (collective)."""
    if order.kind == "evaluate":
        _shard(run, order)
    else:
        _sums(run, order)


def _evaluate(run: Run, plan: Plan, state: ServerState, *, data: str = _HELD_OUT, samples: bool = False
              ) -> tuple[Mapping[str, Tensor], Evaluation]:
    """The global model with the norm statistics that the plan's sub-model was evaluated with, and the figures on ``data``.

    Args:
        samples: Whether it is also tried on the samples of ``metrics.effectiveness_samples``, if that is asked for at all.
    """
    params, refused = evaluated_params(run, plan, state)
    found = replace(_figures(run, plan, params, state.round_index, data), refused=refused)
    if samples and run.sample_evaluator is not None:
        found = replace(found, sampled=_figures(run, plan, params, state.round_index, _SAMPLE))
    return params, found


def _figures(run: Run, plan: Plan, params: Mapping[str, Tensor], round_index: int, data: str) -> Evaluation:
    order = run.transport.broadcast(_order(run, "evaluate", plan, params, round_index, data=data))
    with no_answer(run.transport):
        shards = _shard(run, order)
    assert shards is not None, "the server gathers"
    return combine(shards)


def _shard(run: Run, order: Message) -> list[Any] | None:
    """This rank's share of an evaluation; on the server everybody's."""
    transport, plan = run.transport, Plan.from_json(order.meta["plan"])
    evaluator = {_HELD_OUT: run.evaluator, _TEST: run.test_evaluator, _SAMPLE: run.sample_evaluator}[order.meta["data"]]
    assert evaluator is not None, "asked for by the config, which is every rank's"
    batches = evaluator.run(plan, wire.decode(order), transport.rank, transport.size)
    parts = transport.gather({"batches": batches})
    return None if parts is None else [part["batches"] for part in parts]


def _statistics(run: Run, plan: Plan, state: ServerState) -> tuple[dict[str, Tensor], str | None]:
    """Norm statistics of the plan's sub-model, worked out anew; nothing if its clients send theirs, or if it has none.

    Nor if they cannot be used: then also why.
    """
    if run.job.strategy.statistics_samples is None or not run.evaluator.statistics_shapes(plan):
        return {}, None
    order = run.transport.broadcast(_order(run, "statistics", plan, state.params, state.round_index))
    with no_answer(run.transport):
        sums, refused = _sums(run, order)
    if refused:
        return {}, refused[0]
    num_batches = run.evaluator.num_statistics_batches()
    return {name: (sums[name] / (num_batches * weight_scale(num_batches))).float() for name in sums.shapes}, None


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


def _order(run: Run, kind: str, plan: Plan, params: Mapping[str, Tensor], round_index: int, **meta: Any) -> Message:
    """A broadcast of the tensors that the plan's sub-model holds."""
    job = run.job
    block_of, held = job.strategy.splitting.block_of, job.forms.of(plan).regions
    entries, body_bytes = wire.layout((name, block_of(name), DEFAULT_CODEC, job.shapes[name]) for name in held)
    return wire.encode(kind, {"round": round_index, "plan": plan.to_json(), **meta}, entries, params, job.body.of(body_bytes))
