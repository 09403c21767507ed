"""From a config to a run: every rank builds the same objects from the same settings."""

from __future__ import annotations

import gc
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfed.client import Evaluator, Trial, Worker, sample_of
from dfed.cohort import Job
from dfed.comm import Link, Transport
from dfed.config import Choice, Config
from dfed.data import Dataset, DataSplits, Partition, load, make_partition
from dfed.errors import ConfigError, Fault
from dfed.fleet import Fleet
from dfed.memory import check_cap, make_cap
from dfed.models import Chain, build_chain
from dfed.planning import Planning
from dfed.registry import SAMPLERS, SERVER_OPTIMIZERS, calling
from dfed.settings import format_bytes

__all__ = ["Prepared", "Run", "StopFlag", "assemble", "build_model", "check_host", "prepare"]

_SERVER_COPIES = 3  # the model, the round's message, and the new model; sums of twice that size come on top


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
class Prepared:
    """What a rank makes from the config alone, before it meets the others: whatever is wrong with it shows here.

    Attributes:
        plain: Plainly training the full model, of which the fleet's shares are shares.
    """

    config: Config
    device: torch.device
    data: DataSplits
    chain: Chain
    fleet: Fleet
    partition: Partition
    planning: Planning
    plain: Planning


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a rank holds during a run.

    Attributes:
        evaluator: On ``metrics.split``.
        test_evaluator: On the test set, with ``metrics.test_at_end``; else None.
        sample_evaluator: On the samples of ``metrics.effectiveness``; None without.
    """

    config: Config
    job: Job
    link: Link
    planning: Planning
    evaluator: Evaluator
    test_evaluator: Evaluator | None = None
    sample_evaluator: Evaluator | None = None

    @property
    def transport(self) -> Transport:
        """This rank's transport."""
        return self.link.transport


def prepare(config: Config, device: torch.device, *, to_run: bool = True) -> Prepared:
    """Load the data and build model, fleet and partition. The same on every rank; no rank talks to another.

    Args:
        to_run: Whether this machine must be able to run it: hold the model, and enforce the caps.

    Raises:
        ConfigError, DataError: If the config asks for what cannot be had.
    """
    torch.set_num_threads(config.backend.threads)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    data = load(config.data.dataset, dict(config.dataset_options), root=config.data.root, download=config.data.download,
                cache=config.data.cache, seed=config.seed, validation_fraction=config.data.validation_fraction)
    chain = build_model(config.model, config.data.dataset, data)
    if to_run:
        check_host(chain, _SERVER_COPIES, "the server", _evaluated_on(config, data), config.metrics.batch_size)
    plain = Planning(config, chain, Choice("fedavg", {}), num_clients=1, device=device)
    fleet = Fleet.from_settings(config.fleet, seed=config.seed, full_peak_bytes=plain.full_budget_bytes)
    if config.cohort > fleet.num_clients:
        message = f"must be at most the number of clients ({fleet.num_clients}), but is {config.cohort}."
        raise ConfigError([Fault("cohort", message)])
    partition = make_partition(
        config.partition.name, dict(config.partition.options), num_samples=data.train.num_samples,
        labels=lambda: _labels(config, data), num_classes=data.train.num_classes,
        num_clients=fleet.num_clients, tier_of=fleet.tier_of, seed=config.seed,
    )
    if to_run:
        check_cap(config.memory, device, has_budgets=fleet.has_budgets)
    planning = Planning(config, chain, config.strategy, num_clients=fleet.num_clients, device=device,
                        budgets=fleet.budgets(), tiers=fleet.tier_names, wraps=config.wrap)
    if planning.strategy.statistics_samples is not None and config.metrics.batch_size < 2:
        message = (f"must be at least 2 with strategy '{config.strategy.name}', which works the statistics of norms out of "
                   f"mini-batches of this size, but is {config.metrics.batch_size}.")
        raise ConfigError([Fault("metrics.batch_size", message)])
    _check_heeded(config, planning)
    return Prepared(config=config, device=device, data=data, chain=chain, fleet=fleet, partition=partition, planning=planning,
                    plain=plain)


def _check_heeded(config: Config, planning: Planning) -> None:
    """Where a strategy goes by evaluations they must come in time, and not from the test set."""
    within, said = planning.strategy.heeds_evaluation, f"with these options of strategy '{config.strategy.name}'"
    if within is None:
        return
    if config.metrics.split == "test":
        message = (f"must be 'validation' (and `data.validation_fraction` above 0) {said}, which goes by what evaluations say, "
                   "but is 'test'.")
        raise ConfigError([Fault("metrics.split", message)])
    if config.metrics.every > within:
        message = f"must be at most {within} {said}, which counts rounds between evaluations, but is {config.metrics.every}."
        raise ConfigError([Fault("metrics.every", message)])


def _labels(config: Config, data: DataSplits) -> np.ndarray:
    with calling("data.dataset", config.data.dataset):
        return data.train.labels(np.arange(data.train.num_samples))


def build_model(model: Choice, dataset: str, data: DataSplits) -> Chain:
    """The model that a config names, without storage; what does not suit it is said of the config's own fields.

    Args:
        dataset: The name of the data set that ``data`` are.

    Raises:
        ConfigError: If it cannot be built, or is not for images like these.
    """
    name, options = model.name, dict(model.options)
    try:
        with calling("model", name):
            return build_chain(name, options, input_shape=data.train.shape, num_classes=data.train.num_classes)
    except ConfigError as error:
        raise ConfigError([_of_the_model(fault, model, dataset) for fault in error.faults]) from error


def _of_the_model(fault: Fault, model: Choice, dataset: str) -> Fault:
    if fault.field in model.options:
        return Fault(f"model.{fault.field}", fault.message)
    if fault.field == "input_shape":
        return Fault("model", f"must suit the images of data set '{dataset}', but '{model.name}' does not: their shape "
                              f"{fault.message}")
    if fault.field.startswith("model"):
        return Fault("model", fault.message)
    return Fault("model", f"must name a model that can be used, but '{model.name}' cannot: {fault}")


def check_host(chain: Chain, num_copies: int, holder: str, evaluated_on: Sequence[Dataset], batch_size: int) -> None:
    """Refuse what this machine's memory can never hold, before anything of that size is asked for.

    Args:
        num_copies: How often ``holder``, as a message calls it, has the model's tensors.
        evaluated_on: Data sets, in mini-batches of ``batch_size`` samples.

    Raises:
        ConfigError: Of ``model`` or ``metrics.batch_size``.
    """
    if not hasattr(os, "sysconf"):  # not on Windows
        return
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    model = num_copies * sum(tensor.numel() * tensor.element_size() for tensor in chain.state_dict().values())
    if model >= physical:
        message = (f"must be small enough for {holder}, which holds its parameters {num_copies} times, in less than this "
                   f"machine's {format_bytes(physical)}, but takes {format_bytes(model)}.")
        raise ConfigError([Fault("model", message)])
    num_samples = max(dataset.num_samples for dataset in evaluated_on)
    batch = min(batch_size, num_samples) * 4 * math.prod(chain.input_shape)
    if batch >= physical:
        message = (f"must be small enough for a mini-batch to take less than this machine's {format_bytes(physical)}, but is "
                   f"{batch_size}, which takes {format_bytes(batch)}.")
        raise ConfigError([Fault("metrics.batch_size", message)])


def _evaluated_on(config: Config, data: DataSplits) -> list[Dataset]:
    """The data of ``metrics.split``, and with ``metrics.test_at_end`` the test set."""
    held_out = data.test if config.metrics.split == "test" else data.validation
    assert held_out is not None, "checked with the config"
    return [held_out, data.test] if config.metrics.test_at_end else [held_out]


def _samples(config: Config, data: DataSplits) -> list[Dataset]:
    """The few samples of ``metrics.split`` of ``metrics.effectiveness``; none without."""
    if not config.metrics.effectiveness:
        return []
    return [sample_of(_evaluated_on(config, data)[0], config.metrics.effectiveness_samples, config.seed)]


def assemble(prepared: Prepared, link: Link, stop: StopFlag, *, clients_folder: Path | None = None) -> Run:
    """This rank's part of the run, now that it knows its place among the others.

    Args:
        clients_folder: On the server: where clients that keep a state have it.
    """
    config, data = prepared.config, prepared.data
    if link.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    job = _job(prepared, link, stop, clients_folder)
    held_outs = [*_evaluated_on(config, data), *_samples(config, data)]
    evaluators = [Evaluator(job.strategy, job.forms, held_out, data.train, batch_size=config.metrics.batch_size,
                            device=link.device, seed=config.seed) for held_out in held_outs]
    # What is there now stays: a collection after each client, which gives its memory back, need not look at it.
    gc.collect()
    gc.freeze()
    return Run(config=config, job=job, link=link, planning=prepared.planning, evaluator=evaluators[0],
               test_evaluator=evaluators[1] if config.metrics.test_at_end else None,
               sample_evaluator=evaluators[-1] if config.metrics.effectiveness else None)


def _num_drawn(config: Config, fleet: Fleet) -> int:
    """Clients that the sampler is asked for; in exact decimals: 100 × 1.1 as floats is more than 110."""
    return min(math.ceil(config.cohort * Fraction(str(config.server.over_selection))), fleet.num_clients)


def _job(prepared: Prepared, link: Link, stop: StopFlag, clients_folder: Path | None) -> Job:
    config, planning, fleet, transport = prepared.config, prepared.planning, prepared.fleet, link.transport
    units = {name: planning.strategy.splitting.block_of(name) for name in planning.shapes
             if config.metrics.inertia and name not in planning.buffers}
    metrics = config.metrics
    trials = [Trial(dataset, metrics.batch_size, link.device, is_due=lambda index: metrics.is_due(index + 1, config.rounds))
              for dataset in _samples(config, prepared.data)]
    worker = None
    if transport.is_client:
        cap = make_cap(config.memory, link.device, has_budgets=fleet.has_budgets)
        worker = Worker(
            planning.strategy, prepared.data.train, prepared.partition, config.client, shapes=planning.shapes, cap=cap,
            forms=planning.forms, device=link.device, seed=config.seed, error_feedback=config.error_feedback,
            abandoned=lambda: stop.is_set and transport.abandoned(), units=units, trial=next(iter(trials), None),
        )
    keeps_state = config.error_feedback or planning.strategy.keeps_state
    return Job(
        seed=config.seed, rounds=config.rounds, cohort=config.cohort, drawn=_num_drawn(config, fleet),
        exchange=config.exchange,
        max_failed_fraction=config.server.max_failed_fraction, deadline_s=config.server.deadline_s,
        strategy=planning.strategy, strategy_name=config.strategy.name, shapes=planning.shapes,
        buffers=planning.buffers, fleet=fleet,
        partition=prepared.partition,
        sampler=SAMPLERS.get(config.sampler.name)(**config.sampler.options),
        optimizer=SERVER_OPTIMIZERS.get(config.server_optimizer.name)(**config.server_optimizer.options),
        costs=planning.costs, plain=prepared.plain.costs, forms=planning.forms, error_feedback=config.error_feedback,
        clients_folder=str(clients_folder.resolve()) if clients_folder is not None and keeps_state else None,
        refuses_over_budget=config.memory.enforce == "predicted",
        rate_factor=lambda round_index: config.client.schedule.at(round_index, config.rounds),
        transport=transport, worker=worker, stop_requested=lambda: stop.is_set, units=units,
    )
