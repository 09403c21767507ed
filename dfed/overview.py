"""What ``dfed plan`` says before anything is run: who can train what, at which batch, and what a round would cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError

from dfed.config import Choice, Config
from dfed.errors import ConfigError
from dfed.faults import faults_of
from dfed.fleet import DeviceProfile
from dfed.plan import Plan
from dfed.planner import MOST_SAMPLES, ClientPlanner
from dfed.planning import Planning
from dfed.registry import STRATEGIES
from dfed.run import Prepared, prepare
from dfed.settings import settings_of
from dfed.strategies import Candidate

__all__ = ["Participation", "TierRow", "choices", "fleet_rows", "participation", "prepare_to_plan"]

_MOST_BYTES = 2**50


@dataclass(frozen=True, kw_only=True)
class TierRow:
    """One tier under one strategy, in the first round. Figures are those of the client with the smallest budget.

    Attributes:
        clients, able: Clients of the tier, and those whose plan is sure to fit.
        budget_bytes: Smallest budget of the tier; None: no limit.
        fits: Whether the plan is sure to run on that budget.
        batch_size: As configured.
        largest_batch: The largest that fits, up to :data:`dfed.planner.MOST_SAMPLES`; 0: none.
        smallest_bytes: The smallest budget with which such a client could take part as configured; None if with none.
        peak_bytes: Predicted peak of the tensors; None, like all that follows, where the strategy has no plan.
        needed_bytes: The smallest budget that is sure to do for this plan.
        trained_share: Parameters trained, of the model's.
        bytes_down, bytes_up: Of the messages, headers included.
        flops, sim_time_s, energy_j: Of a round, for a client with the tier's mean number of samples.
    """

    tier: str
    clients: int
    able: int
    budget_bytes: int | None
    fits: bool
    batch_size: int
    largest_batch: int
    smallest_bytes: int | None
    peak_bytes: int | None = None
    needed_bytes: int | None = None
    trained_share: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    flops: float | None = None
    sim_time_s: float | None = None
    energy_j: float | None = None


@dataclass(frozen=True, kw_only=True)
class Participation:
    """What can take part under one strategy: shares of the clients and of the training samples, and classes.

    Attributes:
        data: Of a tier in which some clients can take part, as large a share of its samples as of its clients.
        classes: Classes of which some client has samples in the tiers in which somebody can take part.
        num_classes: Classes of the data set.
    """

    clients: float
    data: float
    classes: int
    num_classes: int


def prepare_to_plan(config: Config) -> Prepared:
    """Data, model, fleet and partition of a config, whatever caps this system has to offer.

    Raises:
        ConfigError, DataError: If the config asks for what cannot be had.
    """
    wanted = config.backend.device
    on_gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return prepare(config, torch.device("cuda" if on_gpu else "cpu"), to_run=False)


def choices(config: Config, names: Sequence[str] | None) -> list[Choice]:
    """The strategies to look at: the config's own with its options, others with their defaults.

    Args:
        names: None: the config's own, then all others that need no options.

    Raises:
        ConfigError: If one is unknown, or has options without defaults.
    """
    own = config.strategy
    wanted = [own.name, *(name for name in STRATEGIES if name != own.name)] if names is None else list(names)
    found = []
    for name in wanted:
        if name == own.name:
            found.append(own)
            continue
        model = settings_of(STRATEGIES.get(name), ("problem",))
        try:
            found.append(Choice(name, model().model_dump()))
        except ValidationError as error:
            if names is not None:
                raise ConfigError(faults_of(error, f"strategy {name}", model)) from error
    return found


def fleet_rows(prepared: Prepared, choice: Choice) -> list[TierRow]:
    """A row for each tier under one strategy."""
    config, fleet = prepared.config, prepared.fleet
    planning = Planning(config, prepared.chain, choice, num_clients=fleet.num_clients, device=prepared.device)
    rows = []
    for name in fleet.tier_names:
        groups = _groups(prepared, name)
        mean = max(1, round(_num_samples(prepared, name) / fleet.tier_size(name)))
        weakest = min(groups, key=lambda profile: math.inf if profile.budget_bytes is None else profile.budget_bytes)
        plans = {profile: _first_plan(planning, profile, mean) for profile in groups}
        able = sum(size for profile, size in groups.items() if plans[profile] is not None and plans[profile][1])
        rows.append(_tier_row(planning, name, weakest, plans[weakest], mean, clients=sum(groups.values()), able=able))
    return rows


def _groups(prepared: Prepared, tier: str) -> Counter[DeviceProfile]:
    """The different devices of a tier, and how many clients own each."""
    fleet = prepared.fleet
    if prepared.config.fleet.csv is None:
        return Counter({fleet.profile(int(fleet.tier_clients(tier, 1)[0])): fleet.tier_size(tier)})
    return Counter(fleet.profile(int(client)) for client in fleet.tier_clients(tier, None))


def _num_samples(prepared: Prepared, tier: str) -> int:
    return int(prepared.partition.sizes()[prepared.fleet.tier_clients(tier, None)].sum())


def _first_plan(planning: Planning, profile: DeviceProfile, num_samples: int) -> tuple[Plan, bool] | None:
    """The plan of the first round, and whether it runs, by the run's own rule (``memory.enforce``); None if there is none."""
    params = {name: torch.empty(shape, device="meta") for name, shape in planning.shapes.items()}
    planner = ClientPlanner(planning.costs, profile, num_samples, {})
    candidate = Candidate(0, 0, num_samples, profile, planner)
    plan = planning.strategy.plan(planning.strategy.init(params), candidate)
    if plan is None:
        return None
    budget = profile.budget_bytes
    runs = {"off": True, "predicted": budget is None or planning.costs.peak_bytes(plan) <= budget, "hard": planner.fits(plan)}
    return plan, runs[planning.enforce]


def _tier_row(planning: Planning, tier: str, profile: DeviceProfile, found: tuple[Plan, bool] | None, num_samples: int, *,
              clients: int, able: int) -> TierRow:
    costs = planning.costs
    most = found or _first_plan(planning, replace(profile, budget_bytes=None), num_samples)
    common: dict[str, Any] = {
        "tier": tier, "clients": clients, "able": able, "budget_bytes": profile.budget_bytes,
        "batch_size": planning.strategy.problem.phases[0].batch_size, "fits": found is not None and found[1],
        "largest_batch": costs.largest_batch(most[0], profile.budget_bytes, MOST_SAMPLES) if most else 0,
        "smallest_bytes": _smallest_budget(planning, profile, num_samples) if most else None,
    }
    if found is None:
        return TierRow(**common)
    plan, _ = found
    cost, (down, up) = ClientPlanner(costs, profile, num_samples, {}).cost(plan), costs.message_bytes(plan)
    return TierRow(**common, peak_bytes=costs.peak_bytes(plan), needed_bytes=costs.budget_bytes(plan),
                   trained_share=_trained_share(planning, plan), bytes_down=down, bytes_up=up,
                   flops=costs.flops(plan, num_samples), sim_time_s=cost.total_s, energy_j=cost.energy_j)


def _smallest_budget(planning: Planning, profile: DeviceProfile, num_samples: int) -> int:
    """The smallest budget with which the strategy has a plan for such a client, and one that fits."""
    low, high = 0, _MOST_BYTES  # low does not do, high does
    while high - low > 1:
        middle = (low + high) // 2
        found = _first_plan(planning, replace(profile, budget_bytes=middle), num_samples)
        low, high = (low, middle) if found is not None and found[1] else (middle, high)
    return high


def _trained_share(planning: Planning, plan: Plan) -> float:
    params = dict(planning.strategy.problem.chain.named_parameters())
    sent = sum(math.prod(entry.shape) for entry in planning.forms.of(plan).up if entry.name in params)
    return sent / sum(parameter.numel() for parameter in params.values())


def participation(prepared: Prepared, rows: Iterable[TierRow]) -> Participation:
    """What can take part, given the rows of one strategy. Of a tier in which some are able, their share of its data counts."""
    clients = able = 0
    samples, total, held = 0.0, 0, None
    num_classes, any_able = prepared.data.train.num_classes, False
    for row in rows:
        here = _num_samples(prepared, row.tier)
        clients, able, total = clients + row.clients, able + row.able, total + here
        samples += here * row.able / row.clients
        if row.able:
            any_able = True
            counts = prepared.partition.label_counts(prepared.fleet.tier_clients(row.tier, None).tolist())
            held = counts if held is None or counts is None else held + counts
    classes = (num_classes if held is None else int((held > 0).sum())) if any_able else 0
    return Participation(clients=able / clients, data=samples / total, classes=classes, num_classes=num_classes)
