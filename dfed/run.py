"""A run from its config to its summary: every rank builds the same job; rank 0 leads, the others follow."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dfed import checkpoint, rng
from dfed.blocks import Splitting
from dfed.client import Evaluation, Evaluator, Forms, Worker, combine
from dfed.cohort import Job
from dfed.comm import Link, Message, Transport, join, wire
from dfed.config import Choice, Config
from dfed.data import DataSplits, Partition, load, make_partition
from dfed.errors import ConfigError, DfedError, Fault, RankLost
from dfed.fleet import Fleet
from dfed.memory import make_cap
from dfed.metrics import MetricsWriter, add_totals, empty_totals
from dfed.models import Chain, build_chain, materialise
from dfed.plan import Plan
from dfed.planner import Costs
from dfed.registry import SAMPLERS, SERVER_OPTIMIZERS, STRATEGIES
from dfed.report.console import Console
from dfed.report.folder import RunFolder
from dfed.round import lead_round, take_part
from dfed.state import ServerState
from dfed.strategies import Problem, Strategy

__all__ = ["EXIT_STOPPED", "Run", "StopFlag", "run"]

logger = logging.getLogger(__name__)

EXIT_STOPPED = 128 + signal.SIGTERM


class StopFlag:
    """Set by SIGTERM; the round in progress is finished, a checkpoint written, and the run ends with status 143."""

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Take over SIGTERM (main thread only)."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.is_set = True


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a rank holds during a run."""

    config: Config
    job: Job
    link: Link
    data: DataSplits
    chain: Chain
    evaluator: Evaluator
    stop: StopFlag

    @property
    def transport(self) -> Transport:
        """This rank's transport."""
        return self.link.transport


def run(config: Config, *, folder: RunFolder | None, resume: bool, stop: StopFlag) -> int:
    """Carry out a run (collective over the launcher's processes). Returns the exit status: 0, or 143 after SIGTERM.

    Args:
        folder: Where the server writes; None on other ranks.
        resume: Whether to go on from the folder's newest checkpoint.
    """
    start = time.perf_counter()
    link = join(config.backend)
    try:
        built = build(config, link, stop)
        if link.transport.is_server:
            assert folder is not None, "the server needs a run folder"
            return _lead(built, folder, resume, start)
        return _follow(built)
    finally:
        link.transport.close()


def build(config: Config, link: Link, stop: StopFlag) -> Run:
    """Make this rank's part of the run from the config; the same on every rank."""
    torch.set_num_threads(config.backend.threads)
    if link.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    data = load(config.data.dataset, dict(config.dataset_options), root=config.data.root, download=config.data.download,
                cache=config.data.cache, seed=config.seed, validation_fraction=config.data.validation_fraction)
    chain = build_chain(config.model.name, dict(config.model.options), input_shape=data.train.shape,
                        num_classes=data.train.num_classes)
    shapes = {name: tuple(t.shape) for name, t in chain.state_dict().items() if t.is_floating_point()}
    full = _Planning(config, chain, shapes, Choice("fedavg", {}), num_clients=1)
    fleet = Fleet.from_settings(config.fleet, seed=config.seed, full_peak_bytes=full.full_peak_bytes)
    planning = _Planning(config, chain, shapes, config.strategy, num_clients=fleet.num_clients)
    if config.cohort > fleet.num_clients:
        raise ConfigError([Fault("cohort", f"must be at most the number of clients ({fleet.num_clients}), but is "
                                           f"{config.cohort}.")])
    partition = make_partition(
        config.partition.name, dict(config.partition.options), num_samples=data.train.num_samples,
        labels=lambda: data.train.labels(np.arange(data.train.num_samples)), num_classes=data.train.num_classes,
        num_clients=fleet.num_clients, tier_of=fleet.tier_of, seed=config.seed,
    )
    job = _job(config, planning, fleet, partition, data, link, stop)
    held_out = data.test if config.metrics.split == "test" else data.validation
    assert held_out is not None, "checked with the config"
    evaluator = Evaluator(chain.skeleton(), held_out, batch_size=config.metrics.batch_size, device=link.device)
    return Run(config=config, job=job, link=link, data=data, chain=chain, evaluator=evaluator, stop=stop)


class _Planning:
    """A strategy with the forms and costs of its plans, which it asks in turn whether a plan fits."""

    def __init__(self, config: Config, chain: Chain, shapes: Mapping[str, tuple[int, ...]], choice: Choice, num_clients: int):
        self.shapes, self.splitting = shapes, Splitting.by_unit(chain.unit_names)
        problem = Problem(
            chain=chain, splitting=self.splitting, phases=config.client.phases, num_clients=num_clients,
            rounds=config.rounds, seed=config.seed, fits=lambda plan, budget: self.costs.fits(plan, budget),
        )
        self.strategy: Strategy = STRATEGIES.get(choice.name)(problem, **choice.options)
        self.forms = Forms(self.strategy, self.splitting, shapes)
        self.costs = Costs(self.strategy, config.client, self.forms, chain.input_shape)

    def full_peak_bytes(self) -> int:
        """Predicted peak of training the full model as configured."""
        names = self.splitting.names
        return self.costs.peak_bytes(Plan(client=0, hold=names, train=names, phases=self.strategy.problem.phases))


def _job(config: Config, planning: _Planning, fleet: Fleet, partition: Partition, data: DataSplits, link: Link,
         stop: StopFlag) -> Job:
    transport = link.transport
    worker = None
    if transport.is_client:
        cap = make_cap(config.memory, link.device, has_budgets=fleet.has_budgets)
        worker = Worker(
            planning.strategy, data.train, partition, config.client, shapes=planning.shapes, cap=cap,
            forms=planning.forms, device=link.device, seed=config.seed,
            abandoned=lambda: stop.is_set and transport.abandoned(),
        )
        worker.warm_up(planning.strategy.problem.chain)
    parameters = dict(planning.strategy.problem.chain.named_parameters())
    return Job(
        seed=config.seed, rounds=config.rounds, cohort=config.cohort, exchange=config.exchange,
        max_failed_fraction=config.server.max_failed_fraction, strategy=planning.strategy, shapes=planning.shapes,
        buffers=frozenset(name for name in planning.shapes if name not in parameters), fleet=fleet, partition=partition,
        sampler=SAMPLERS.get(config.sampler.name)(**config.sampler.options),
        optimizer=SERVER_OPTIMIZERS.get(config.server_optimizer.name)(**config.server_optimizer.options),
        costs=planning.costs, forms=planning.forms,
        rate_factor=lambda round_index: config.client.schedule.at(round_index, config.rounds),
        transport=transport, worker=worker, stop_requested=lambda: stop.is_set,
    )


def _follow(run: Run) -> int:
    """A client rank: do what the server's messages say until it says stop."""
    while True:
        order = run.transport.broadcast(None)
        if order.kind == "round":
            take_part(run.job, order)
        elif order.kind == "evaluate":
            _evaluate_shard(run, order)
        else:
            return EXIT_STOPPED if order.meta["stopped"] else 0


def _evaluate_shard(run: Run, order: Message) -> list[Any] | None:
    parts = run.transport.gather({"batches": run.evaluator.run(wire.decode(order), run.transport.rank, run.transport.size)})
    return None if parts is None else [part["batches"] for part in parts]


def _evaluate(run: Run, state: ServerState) -> Evaluation:
    """Evaluate the global model on all ranks (collective; the server's side)."""
    entries, body_bytes = wire.layout(run.job.shapes, run.job.strategy.problem.splitting.block_of, lambda block: "fp32")
    body = torch.zeros(body_bytes, dtype=torch.uint8)
    message = wire.encode("evaluate", {"round": state.round_index}, entries, state.params, body)
    shards = _evaluate_shard(run, run.transport.broadcast(message))
    assert shards is not None, "the server gathers"
    return combine(shards)


def _lead(run: Run, folder: RunFolder, resume: bool, start: float) -> int:
    """The server: all rounds, evaluation, metrics and checkpoints."""
    config, job = run.config, run.job
    state = _first_state(run, folder, resume)
    console = Console(config, job, run.link)
    console.started(folder.path, state.round_index, time.perf_counter() - start)
    folder.write_environment(run.link, config)
    writer = MetricsWriter(folder.path, next_round=state.round_index, tensorboard=config.metrics.tensorboard)
    saved, stopped = state.round_index, False
    evaluation: Evaluation | None = None
    try:
        while state.round_index < config.rounds and not stopped:
            result = lead_round(job, state)
            state, stopped = result.state, result.stop_requested
            last = stopped or state.round_index == config.rounds
            if state.round_index % config.metrics.every == 0 or last:
                begun = time.perf_counter()
                evaluation = _evaluate(run, state)
                result.row.update(accuracy=evaluation.accuracy, loss=evaluation.loss, evaluation_s=time.perf_counter() - begun)
            state = replace(state, totals=add_totals(state.totals, result.row, result.clients))
            writer.write(result.row, result.clients)
            console.round_done(result.row)
            if state.round_index % config.checkpoint.every == 0 or last:
                checkpoint.save(folder.checkpoints, state, config.fingerprint(), config.checkpoint.keep)
                saved = state.round_index
        evaluation = evaluation or _evaluate(run, state)
        run.transport.broadcast(_stop_message(stopped))
    except DfedError as error:
        # Whatever ended the run, the rounds that were completed are kept.
        if state.round_index > saved:
            checkpoint.save(folder.checkpoints, state, config.fingerprint(), config.checkpoint.keep)
        if not isinstance(error, RankLost):
            run.transport.broadcast(_stop_message(False))
        raise
    finally:
        writer.close()
        console.close()
    summary = folder.write_summary(config, job, state, evaluation, stopped)
    console.finished(summary, folder.path)
    return EXIT_STOPPED if stopped else 0


def _stop_message(stopped: bool) -> Message:
    return Message("stop", {"stopped": stopped}, (), torch.empty(0, dtype=torch.uint8))


def _first_state(run: Run, folder: RunFolder, resume: bool) -> ServerState:
    if resume:
        state = checkpoint.latest(folder.checkpoints, run.config.fingerprint())
        if state is not None:
            return state
        logger.warning("%s holds no checkpoint yet: starting from round 0", folder.path)
    chain = materialise(run.chain.skeleton(), rng.torch_generator(run.config.seed, "init"))
    params = {name: value.detach() for name, value in chain.state_dict().items() if name in run.job.shapes}
    return replace(run.job.strategy.init(params), totals=empty_totals(run.job.fleet.tier_names))
