"""All clients' devices, looked up one at a time: a fleet of a million clients costs no more than one of a thousand."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from dfed.errors import ConfigError, Fault
from dfed.fleet.budget import MemorySpread, TooSmall, resolve_memory, spread_budgets
from dfed.fleet.profile import DeviceProfile
from dfed.fleet.settings import DeviceSettings, FleetSettings, TierSettings
from dfed.fleet.table import Rows, read_rows
from dfed.rng import Permutation, uniform

__all__ = ["Fleet"]

_CHUNK = 1 << 16
_KEPT = 4096


class Fleet:
    """The devices of clients ``0 … num_clients − 1``; immutable.

    Which client is in which tier is a pure function of the settings and the seed: the clients are permuted by ``(seed,
    "fleet")`` and the permuted row is cut into tiers of exact sizes. Where a tier's budgets are spread, its part of the row
    is cut further, into levels (see :func:`dfed.fleet.budget.spread_budgets`), the smallest budget first. Nothing is stored
    for a client but those that were asked for last, and all clients of a tier with the same budget share one profile
    object. A fleet from a file keeps its columns instead.

    Build one with :meth:`from_settings`.

    Attributes:
        num_clients: Number of clients.
        tier_names: Names of the tiers, in the order of the settings (of first appearance in a file).
    """

    def __init__(self, table: _Tiers | Rows, *, seed: int):
        self._table = table
        self._seed = seed
        self.num_clients: int = table.num_clients
        self.tier_names: tuple[str, ...] = table.tier_names
        self._profile = functools.lru_cache(_KEPT)(table.profile)  # a round asks for those of its cohort again and again

    @classmethod
    def from_settings(cls, settings: FleetSettings, *, seed: int, full_peak_bytes: Callable[[], int]) -> Fleet:
        """Make the fleet that ``settings`` describe.

        Args:
            settings: Validated settings.
            seed: The run's seed.
            full_peak_bytes: Gives the peak of training the full model at the configured batch, in bytes. Called at
                most once, and only if some budget is a fraction of it.

        Raises:
            ConfigError: If a fraction comes to less than 1 MiB, or the file of ``settings.csv`` cannot be read or has
                faults; names the tiers or lines.
        """
        peak = functools.cache(full_peak_bytes)
        if settings.csv is not None:
            rows = read_rows(settings.csv, settings.clients, lambda device: resolve_memory(device.memory, peak))
            return cls(rows, seed=seed)
        assert settings.tiers is not None
        faults = [fault for i, tier in enumerate(settings.tiers) for fault in _too_small(f"fleet.tiers[{i}]", tier, peak)]
        if faults:
            raise ConfigError(faults)
        tiers = [
            [(_profile(tier, budget), size) for budget, size in spread_budgets(tier.memory, count, peak)]
            for tier, count in zip(settings.tiers, settings.counts(), strict=True)
        ]
        return cls(_Tiers(tiers, seed), seed=seed)

    @property
    def has_budgets(self) -> bool:
        """Whether any client has a memory budget."""
        return self._table.has_budgets

    def budgets(self) -> tuple[tuple[int | None, int], ...]:
        """The different budgets in bytes, ascending, None (no limit) last, and how many clients have each."""
        counts = sorted(self._table.budgets().items(), key=lambda item: math.inf if item[0] is None else item[0])
        return tuple(counts)

    def tier_of(self, clients: np.ndarray) -> np.ndarray:
        """Tier of each of ``clients`` (integers, any shape) as int64 indices into ``tier_names``, of the same shape."""
        clients = np.asarray(clients)
        outside = (clients < 0) | (clients >= self.num_clients)
        assert not outside.any(), f"clients must be at least 0 and less than {self.num_clients}"
        return self._table.tier_of(clients)

    def kinds(self) -> np.ndarray:
        """A number for each client, int64 (num_clients,): clients with the same number have equal devices."""
        return self._table.kinds()

    def profile(self, client: int) -> DeviceProfile:
        """The device of ``client``."""
        assert 0 <= client < self.num_clients, f"a client must be at least 0 and less than {self.num_clients}"
        return self._profile(client)

    def tier_size(self, name: str) -> int:
        """Number of clients in tier ``name``, one of ``tier_names``."""
        return self._table.sizes[self.tier_names.index(name)]

    def tier_clients(self, name: str, limit: int | None) -> np.ndarray:
        """The clients of tier ``name`` in ascending order (int64), at most the first ``limit`` of them.

        Clients are looked through in chunks, and only until enough are found.
        """
        tier, wanted = self.tier_names.index(name), self.tier_size(name)
        wanted = wanted if limit is None else min(wanted, limit)
        parts, found = [np.empty(0, dtype=np.int64)], 0
        for start in range(0, self.num_clients, _CHUNK):
            if found >= wanted:
                break
            clients = np.arange(start, min(start + _CHUNK, self.num_clients), dtype=np.int64)
            parts.append(clients[self._table.tier_of(clients) == tier])
            found += parts[-1].size
        return np.concatenate(parts)[:wanted]

    def available(self, client: int, round: int) -> bool:
        """Whether ``client`` can be reached in ``round``; depends on ``(seed, round, client)`` and its availability."""
        return uniform(self._seed, "availability", round, client) < self.profile(client).availability

    def drops_out(self, client: int, round: int) -> bool:
        """Whether ``client``, if chosen, vanishes during ``round``; keyed by ``(seed, round, client)``."""
        return uniform(self._seed, "dropout", round, client) < self.profile(client).dropout

    def upload_share(self, client: int, round: int) -> float | None:
        """What ``client`` can send in ``round``, as a share of the full model's bytes; None: no limit. Keyed by ``(seed, round,
        client)``."""
        profile = self.profile(client)
        ends = [share for share in (profile.upload_least, profile.upload_most) if share is not None]
        if not ends:
            return None
        least, most = ends[0], ends[-1]
        return least + (most - least) * uniform(self._seed, "upload", round, client)

    def straggles(self, client: int, round: int) -> bool:
        """Whether ``client``, if it takes part, is slowed down in ``round``; keyed by ``(seed, round, client)``."""
        return uniform(self._seed, "straggle", round, client) < self.profile(client).straggle


class _Tiers:
    """Tiers of exact sizes laid over a keyed permutation of the clients.

    Args:
        tiers: For each tier its different devices, in the order of the permuted row, and how many clients own each.
    """

    def __init__(self, tiers: Sequence[Sequence[tuple[DeviceProfile, int]]], seed: int):
        self.tier_names = tuple(kinds[0][0].tier for kinds in tiers)
        self.sizes = tuple(sum(size for _, size in kinds) for kinds in tiers)
        self.num_clients = sum(self.sizes)
        self._kinds = [kind for kinds in tiers for kind in kinds]
        self._ends = np.cumsum([size for _, size in self._kinds])
        self._tier_of_kind = np.repeat(np.arange(len(tiers), dtype=np.int64), [len(kinds) for kinds in tiers])
        self._order = Permutation(self.num_clients, seed, "fleet")
        self.has_budgets = any(profile.budget_bytes is not None for profile, _ in self._kinds)

    def tier_of(self, clients: np.ndarray) -> np.ndarray:
        return self._tier_of_kind[self._kind_of(clients)]

    def kinds(self) -> np.ndarray:
        return self._kind_of(np.arange(self.num_clients))

    def profile(self, client: int) -> DeviceProfile:
        return self._kinds[int(self._kind_of(np.asarray(client)))][0]

    def budgets(self) -> Counter[int | None]:
        counts: Counter[int | None] = Counter()
        for profile, size in self._kinds:
            counts[profile.budget_bytes] += size
        return counts

    def _kind_of(self, clients: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, self._order.take(clients), side="right").astype(np.int64)


def _too_small(field: str, tier: TierSettings, peak: Callable[[], int]) -> list[Fault]:
    """What is wrong with a tier's shares of the full model's peak, now that this is known."""
    memory, faults = tier.memory, []
    ends = {f"memory.{name}": end for name, end in memory} if isinstance(memory, MemorySpread) else {"memory": memory}
    for name, end in ends.items():
        try:
            resolve_memory(end, peak)
        except TooSmall as error:
            faults.append(Fault(f"{field}.{name}", str(error)))
    return faults


def _profile(tier: TierSettings, budget_bytes: int | None) -> DeviceProfile:
    own = {name: getattr(tier, name) for name in DeviceSettings.model_fields if name != "memory"}
    return DeviceProfile(tier=tier.name, budget_bytes=budget_bytes, **own)
