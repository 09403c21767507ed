"""What ``dfed plan`` says before anything is run: who can train what, at which batch, and what a round would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import ValidationError

from dfed.config import Choice, Config
from dfed.errors import ConfigError
from dfed.faults import faults_of
from dfed.fleet import DeviceProfile, Fleet
from dfed.forecast import Forecast, TierRow, asking, device_order
from dfed.planner.children import in_children
from dfed.planner.store import Store, apart, shapes_kept
from dfed.planning import Planning
from dfed.registry import STRATEGIES, calling
from dfed.run import Prepared, prepare
from dfed.settings import settings_of

__all__ = ["Participation", "Survey", "choices", "prepare_to_plan"]

_CLIENTS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Participation:
    """Whose plan is sure to fit under one strategy: shares of the clients and of the training samples that belong to clients,
    and classes.

    Attributes:
        classes: Classes of which some of these clients has a sample.
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
    with apart(), shapes_kept(Store.of_user(config.data.cache)):
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


@dataclass(frozen=True)
class _Tier:
    """One tier's clients, ascending, the different devices that they own, and which of these each of them does."""

    clients: np.ndarray
    profiles: list[DeviceProfile]
    devices: np.ndarray


def _tier(fleet: Fleet, kinds: np.ndarray, name: str) -> _Tier:
    """The tier of this name.

    Args:
        kinds: ``fleet.kinds()``.
    """
    clients = fleet.tier_clients(name, None)
    _, first, kind_of = np.unique(kinds[clients], return_index=True, return_inverse=True)
    owned = [fleet.profile(client) for client in clients[first].tolist()]
    order = sorted(range(len(owned)), key=lambda kind: device_order(owned[kind]))
    return _Tier(clients, [owned[kind] for kind in order], np.argsort(order)[kind_of])


class Survey:
    """The fleet of a config, looked through once for all strategies."""

    def __init__(self, prepared: Prepared):
        self._prepared = prepared
        self._sizes = prepared.partition.sizes()
        fleet = prepared.fleet
        kinds = fleet.kinds()
        self._tiers = [_tier(fleet, kinds, name) for name in fleet.tier_names]
        self._classes: dict[bytes, int] = {}

    def under(self, choice: Choice) -> tuple[list[TierRow], Participation]:
        """A row for each tier under one strategy, and what can take part.

        Raises:
            ConfigError: If the strategy, or a model of the user's own, fails; names it and says how.
        """
        prepared = self._prepared
        planning = Planning(prepared.config, prepared.chain, choice, num_clients=prepared.fleet.num_clients,
                            device=prepared.device, budgets=prepared.fleet.budgets(), tiers=prepared.fleet.tier_names,
                            wraps=prepared.config.wrap if choice == prepared.config.strategy else ())
        rows, able = [], []
        with asking(choice.name, prepared.config.model.name):
            forecast = Forecast(planning, choice.name, prepared.plain.costs, prepared.config.server.deadline_s)
            for tier in self._tiers:
                mean = max(1, round(int(self._sizes[tier.clients].sum()) / len(tier.clients)))
                found = forecast.first_of_all(tier.profiles, mean)
                sure = np.array([first is not None and first.verdict == "yes" for first in found])
                able.append(tier.clients[sure[tier.devices]])
                rows.append(forecast.row(tier.profiles, np.bincount(tier.devices), found, mean))
        return rows, self._participation(np.sort(np.concatenate(able)))

    def under_each(self, choices: Sequence[Choice]) -> list[tuple[list[TierRow], Participation]]:
        """As :meth:`under` for each of ``choices``, several at a time where this process may use several cores."""
        found = in_children(self.under, choices)
        # What came to nothing there is asked here, which says why.
        return [self.under(choice) if answer is None else answer for choice, answer in zip(choices, found, strict=True)]

    def _participation(self, able: np.ndarray) -> Participation:
        """What these clients, in ascending order, come to."""
        key = able.tobytes()
        if key not in self._classes:
            with calling("data.dataset", self._prepared.config.data.dataset):
                self._classes[key] = self._num_classes(able)
        return Participation(
            clients=len(able) / len(self._sizes), data=int(self._sizes[able].sum()) / int(self._sizes.sum()),
            classes=self._classes[key], num_classes=self._prepared.data.train.num_classes,
        )

    def _num_classes(self, clients: np.ndarray) -> int:
        """Classes of which one of ``clients`` has a sample; looks no further when it has met all."""
        partition, train = self._prepared.partition, self._prepared.data.train
        met = np.zeros(train.num_classes, dtype=bool)
        for start in range(0, len(clients), _CLIENTS_AT_ONCE):
            for client in clients[start:start + _CLIENTS_AT_ONCE].tolist():
                met[train.labels(partition.indices(client))] = True
            if met.all():
                break
        return int(met.sum())
