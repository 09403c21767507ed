"""All clients' devices, looked up one at a time: a fleet of a million clients costs no more than one of a thousand."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from dfed.errors import ConfigError, Fault
from dfed.fleet.profile import DeviceProfile
from dfed.fleet.settings import DeviceSettings, FleetSettings, TooSmall, resolve_memory
from dfed.fleet.table import Rows, read_rows
from dfed.rng import Permutation, uniform

__all__ = ["Fleet"]

_CHUNK = 1 << 16


class Fleet:
    """The devices of clients ``0 … num_clients − 1``; immutable.

    Which client is in which tier is a pure function of the settings and the seed: the clients are permuted by
    ``(seed, "fleet")`` and the permuted row is cut into tiers of exact sizes. Nothing is stored for a client, and all
    clients of a tier share one profile object. A fleet from a file keeps its columns instead.

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

        def budget(device: DeviceSettings) -> int | None:
            return resolve_memory(device.memory, peak)

        if settings.csv is not None:
            return cls(read_rows(settings.csv, settings.clients, budget), seed=seed)
        assert settings.tiers is not None
        profiles, faults = [], []
        for i, tier in enumerate(settings.tiers):
            try:
                profiles.append(_profile(tier.name, tier, budget(tier)))
            except TooSmall as error:
                faults.append(Fault(f"fleet.tiers[{i}].memory", str(error)))
        if faults:
            raise ConfigError(faults)
        return cls(_Tiers(tuple(profiles), settings.counts(), seed), seed=seed)

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
        return self._table.profile(client, int(self.tier_of(np.asarray(client))))

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


class _Tiers:
    """Tiers of exact sizes laid over a keyed permutation of the clients."""

    def __init__(self, profiles: tuple[DeviceProfile, ...], sizes: tuple[int, ...], seed: int):
        self.tier_names = tuple(profile.tier for profile in profiles)
        self.sizes = sizes
        self.num_clients = sum(sizes)
        self._profiles = profiles
        self._ends = np.cumsum(sizes)
        self._order = Permutation(self.num_clients, seed, "fleet")
        self.has_budgets = any(profile.budget_bytes is not None for profile in profiles)

    def tier_of(self, clients: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, self._order.take(clients), side="right").astype(np.int64)

    def kinds(self) -> np.ndarray:
        return self.tier_of(np.arange(self.num_clients))

    def profile(self, client: int, tier: int) -> DeviceProfile:
        return self._profiles[tier]

    def budgets(self) -> Counter[int | None]:
        counts: Counter[int | None] = Counter()
        for profile, size in zip(self._profiles, self.sizes, strict=True):
            counts[profile.budget_bytes] += size
        return counts


def _profile(tier: str, device: DeviceSettings, budget_bytes: int | None) -> DeviceProfile:
    return DeviceProfile(
        tier=tier,
        budget_bytes=budget_bytes,
        flops=device.flops,
        up=device.up,
        down=device.down,
        watts=device.watts,
        radio_watts=device.radio_watts,
        availability=device.availability,
        dropout=device.dropout,
    )
