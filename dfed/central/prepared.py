"""From a config to the objects that train: data, model, budget, method."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dfed import rng
from dfed.central.config import TrainConfig
from dfed.central.method import Method, Problem
from dfed.choices import Choice
from dfed.comm import launched_size
from dfed.data import Dataset, DataSplits, Subset, load
from dfed.errors import ConfigError, Fault
from dfed.fleet import Fleet
from dfed.fleet.budget import TooSmall, resolve_memory
from dfed.memory import check_cap
from dfed.models import Chain
from dfed.planner import Store, chain_costs
from dfed.planner.ways import too_few_values
from dfed.registry import METHODS, calling
from dfed.run import build_model, check_host

__all__ = ["Prepared", "prepare"]

_COPIES = 3  # the state, the model that trains, and the one that is evaluated


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is made from the config alone.

    Attributes:
        data: With the training samples that are trained on.
        budget_bytes: None: no limit.
    """

    config: TrainConfig
    device: torch.device
    data: DataSplits
    method: Method
    budget_bytes: int | None

    def needed_bytes(self, peak_bytes: int) -> int:
        """The smallest budget that is sure to do for a predicted peak."""
        return self.method.problem.needed_bytes(peak_bytes)

    @property
    def held_out(self) -> Dataset:
        """The data of ``metrics.split``."""
        found = self.data.test if self.config.metrics.split == "test" else self.data.validation
        assert found is not None, "checked with the config"
        return found


def prepare(config: TrainConfig, device: torch.device) -> Prepared:
    """Load the data and build model and method. Nothing is trained.

    Raises:
        ConfigError, DataError: If the config asks for what cannot be had.
    """
    if launched_size() > 1:
        message = (f"must be 1 process, as `dfed train` trains one model on one device, but are {launched_size()}: start it "
                   "without torchrun.")
        raise ConfigError([Fault("ranks", message)])
    torch.set_num_threads(config.backend.threads)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
        torch.use_deterministic_algorithms(True, warn_only=True)
    data = load(config.data.dataset, dict(config.dataset_options), root=config.data.root, download=config.data.download,
                cache=config.data.cache, seed=config.seed, validation_fraction=config.data.validation_fraction)
    data = replace(data, train=_chosen(config, data.train))
    chain = build_model(config.model, config.data.dataset, data)
    evaluated_on = [data.test if data.validation is None else data.validation, data.test]
    check_host(chain, _COPIES, "training", evaluated_on, config.metrics.batch_size)
    if not any(True for _ in chain.parameters()):
        message = f"must name a model with parameters to train, but '{config.model.name}' has none."
        raise ConfigError([Fault("model", message)])
    by_prediction, store = config.memory.enforce == "predicted", Store.of_user(config.data.cache)
    full_bytes = _full_bytes(config, chain, device, store)
    try:
        budget = resolve_memory(config.memory.budget, full_bytes)
    except TooSmall as error:
        raise ConfigError([Fault("memory.budget", str(error))]) from error
    fleet = None
    if config.fleet is not None:
        fleet = Fleet.from_settings(config.fleet, seed=config.seed, full_peak_bytes=full_bytes)
    check_cap(config.memory, device, has_budgets=budget is not None)
    problem = Problem(chain=chain, data=data.train, settings=config.training, seed=config.seed, device=device, store=store,
                      budget_bytes=budget, by_prediction=by_prediction, fleet=fleet)
    method = _method(config, problem)
    if method.needs_validation and config.metrics.split != "validation":
        message = (f"must be 'validation' for the method '{config.method.name}' with these options, which chooses a model by "
                   f"its accuracy, but is '{config.metrics.split}'.")
        raise ConfigError([Fault("metrics.split", message)])
    _check_costs(config, method)
    return Prepared(config=config, device=device, data=data, method=method, budget_bytes=budget)


def _chosen(config: TrainConfig, train: Dataset) -> Dataset:
    """The samples that are trained on."""
    wanted = config.data.train_samples
    if wanted is None:
        return train
    if wanted > train.num_samples:
        message = f"must be at most the number of training samples ({train.num_samples}), but is {wanted}."
        raise ConfigError([Fault("data.train_samples", message)])
    return Subset(train, np.sort(rng.Permutation(train.num_samples, config.seed, "samples").take(np.arange(wanted))))


def _full_bytes(config: TrainConfig, chain: Chain, device: torch.device, store: Store) -> Callable[[], int]:
    """Gives what plainly training the full model needs, of which shares of memory are shares."""

    @functools.cache
    def full_bytes() -> int:
        with calling("model", config.model.name):
            costs, plan = chain_costs(chain, config.training.as_client(), device, store,
                                      by_prediction=config.memory.enforce == "predicted")
            return costs.budget_bytes(plan)

    return full_bytes


def _check_costs(config: TrainConfig, method: Method) -> None:
    """Work out what steps cost: a model that cannot be trained, or not at this batch size, shows here."""
    try:
        with calling("model", config.model.name):
            method.costs()
    except ValueError as error:  # a ConfigError is one, with the model's own behind it
        reason = next((too_few_values(each) for each in (error, error.__cause__)
                       if isinstance(each, ValueError) and too_few_values(each) is not None), None)
        if reason is None:
            raise
        batch_size, num_samples = config.training.batch_size, method.problem.data.num_samples
        field, count = ("training.batch_size", batch_size) if batch_size <= num_samples else ("data.train_samples", num_samples)
        message = f"must be one at which '{config.model.name}' can be trained, but is {count}: {reason}."
        raise ConfigError([Fault(field, message)]) from error


def _method(config: TrainConfig, problem: Problem) -> Method:
    """The method; what it finds wrong with its options is said of the config's fields."""
    choice: Choice = config.method
    make: Callable[..., Any] = METHODS.get(choice.name)
    try:
        with calling("method", choice.name):
            return make(problem, **choice.options)
    except ConfigError as error:
        raise ConfigError([Fault(f"method.{fault.field}" if fault.field in choice.options else fault.field, fault.message)
                           for fault in error.faults]) from error
