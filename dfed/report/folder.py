"""The run folder: everything that a run leaves behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dfed.checkpoint import params_sha256
from dfed.client import Evaluation
from dfed.client.home import CLIENTS
from dfed.cohort import Job
from dfed.comm import choose_device
from dfed.config import Choice, Config
from dfed.device_models import DeviceModels
from dfed.personalised import PersonalisedAccuracy
from dfed.planner.flops import forward_flops
from dfed.planning import Planning
from dfed.report.base_folder import CHECKPOINTS, Folder
from dfed.report.inertia_map import draw_inertia, inertia_rows, inertia_summary
from dfed.state import ServerState

__all__ = ["CHECKPOINTS", "Folder", "RunFolder"]

logger = logging.getLogger(__name__)


class RunFolder(Folder):
    """A folder that also has ``metrics.jsonl``, ``tensorboard/``, ``summary.json``, and ``clients/`` if clients remember
    anything."""

    command = "run"

    @property
    def clients(self) -> Path:
        """Where clients that keep a state have it."""
        return self.path / CLIENTS

    def write_summary(self, config: Config, job: Job, state: ServerState, evaluation: Evaluation | None,
                      variants: Mapping[str, Evaluation], test: tuple[Evaluation, Mapping[str, Evaluation]] | None,
                      models: DeviceModels | None, stopped: bool, personalised: PersonalisedAccuracy) -> dict[str, Any]:
        """Write and return the run's summary.

        Args:
            evaluation: Of the global model.
            variants: Of the strategy's sub-models, by name.
            test: Of the global model on the test set, and of the variants that devices use; None: it was not asked for, or the
                run was stopped.
            models: Who uses what; None: the run was stopped.
            personalised: Of the run's clients.
        """
        totals = state.totals
        peak_bytes, needed_bytes = _full_training(config, job)
        summary = {
            "strategy": config.strategy.name,
            "model": config.model.name,
            "dataset": config.data.dataset,
            "seed": config.seed,
            "rounds": state.round_index,
            "finished": not stopped,
            "split": config.metrics.split,
            "accuracy": evaluation.accuracy if evaluation else None,
            "loss": evaluation.loss if evaluation else None,
            "personalised_accuracy": None if evaluation is None else personalised.of(evaluation),
            "test": None if test is None else {**_figures(test[0]), "device_accuracy": _of_devices(models, *test),
                                               "personalised_accuracy": personalised.of(test[0])},
            "variants": _variants(job, state, variants),
            "devices": None if models is None else models.to_json(),
            "device_accuracy": None if evaluation is None else _of_devices(models, evaluation, variants),
            "params_sha256": params_sha256(state.params),
            "num_params": sum(value.numel() for name, value in state.params.items() if name not in job.buffers),
            "num_samples": int(job.partition.sizes().sum()),
            "full_peak_bytes": peak_bytes,
            "full_needed_bytes": needed_bytes,
            "memory_enforce": config.memory.enforce,
            "clients": totals["clients"],
            "reasons": totals["reasons"],
            "tiers": [_tier(job, name, totals["tiers"][name], evaluation) for name in job.fleet.tier_names],
            "bytes": totals["bytes"],
            "time_s": totals["time_s"],
            "sim_time_s": totals["sim_time_s"],
            "energy_j": totals["energy_j"],
            "stale_statistics": totals["stale_statistics"],
            "inertia": self._inertia(job, stopped),
        }
        self.write("summary.json", summary)
        return summary

    def _inertia(self, job: Job, stopped: bool) -> dict[str, Any] | None:
        """What the summary says of the inertia, which is drawn unless the run was stopped; None: it was not measured."""
        if not job.units:
            return None
        rows, with_parameters, chain = inertia_rows(self.path), set(job.units.values()), job.strategy.problem.splitting.names
        units = [unit for unit in job.strategy.splitting.names if unit in with_parameters]
        if not stopped:
            draw_inertia(rows, units, self.path / "inertia.png")
        return inertia_summary(rows, units, [unit for unit in units if unit in chain])


def _full_training(config: Config, job: Job) -> tuple[int | None, int | None]:
    """Of training the full model plainly, as configured: the predicted peak, and the smallest budget that is sure to do.

    None where no prediction can be made, as for a model that only a strategy's own parts of it can train: whatever such a model
    raises, the run is done, and has its summary.
    """
    try:
        full = Planning(config, job.strategy.problem.chain, Choice("fedavg", {}), num_clients=1,
                        device=choose_device(config.backend))
        return full.costs.peak_bytes(full.full_plan()), full.full_budget_bytes()
    except Exception as error:
        logger.warning("what plain training of the full model needs cannot be predicted: %s: %s", type(error).__name__, error)
        return None, None


def _variants(job: Job, state: ServerState, variants: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Of each sub-model its figures, and what it costs to have it and to use it."""
    found = {}
    for name, plan in job.strategy.variants(state).items() if variants else ():
        model = job.strategy.build(plan)
        found[name] = {
            **_figures(variants[name]),
            "num_params": sum(parameter.numel() for parameter in model.parameters()),
            "num_bytes": sum(4 * tensor.numel() for tensor in model.state_dict().values() if tensor.is_floating_point()),
            "forward_flops": _forward_flops(name, model, job),
        }
    return found


def _forward_flops(name: str, model: nn.Module, job: Job) -> int | None:
    try:
        return forward_flops(model, job.strategy.problem.chain.input_shape)
    except Exception as error:  # of a model that computes on real tensors only: the run is done, and has its summary
        logger.warning("the operations of %s cannot be counted: %s: %s", name, type(error).__name__, error)
        return None


def _figures(found: Evaluation) -> dict[str, Any]:
    """Of a model other than the global one on ``metrics.split``."""
    figures: dict[str, Any] = {"accuracy": found.accuracy, "loss": found.loss}
    return figures if found.refused is None else {**figures, "statistics": "stale"}


def _of_devices(models: DeviceModels | None, whole: Evaluation,
                variants: Mapping[str, Evaluation]) -> float | None:
    return None if models is None else models.accuracy(whole, variants)


def _tier(job: Job, name: str, totals: Mapping[str, Any], evaluation: Evaluation | None) -> dict[str, Any]:
    members = job.fleet.tier_clients(name, None)
    first_of_kinds = members[np.unique(job.fleet.kinds()[members], return_index=True)[1]]
    budgets = {job.fleet.profile(client).budget_bytes for client in first_of_kinds.tolist()}
    accuracy = None
    if evaluation is not None:
        # Lazy partitions give every client the mix of the whole set, and are not asked client by client.
        lazy = job.partition.label_counts([]) is None
        clients = [] if lazy else job.fleet.tier_clients(name, None).tolist()
        accuracy = evaluation.accuracy_on(job.partition.label_counts(clients))
    finite = [budget for budget in budgets if budget is not None]
    return {
        "name": name,
        "clients": job.fleet.tier_size(name),
        **totals,
        "budget_bytes": min(finite) if finite else None,
        "most_budget_bytes": None if None in budgets else max(finite),
        "accuracy": accuracy,
    }
