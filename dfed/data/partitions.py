"""Which client owns which samples: tables, and partitions that are computed instead of stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from dfed.rng import Permutation

__all__ = ["EqualPartition", "OffsetPartition", "Partition", "TablePartition"]


class Partition(ABC):
    """Assigns samples to clients; no sample belongs to two, and every client has at least one.

    Attributes:
        num_clients: Number of clients.
        used_samples: Number of samples that belong to a client.
    """

    num_clients: int
    used_samples: int

    def indices(self, client: int) -> np.ndarray:
        """The client's samples, int64 (n,), in an order that never changes."""
        return self._samples(*self._bounds(client))

    def num_samples(self, client: int) -> int:
        """Number of the client's samples."""
        start, stop = self._bounds(client)
        return stop - start

    @abstractmethod
    def sizes(self) -> np.ndarray:
        """Number of samples of every client, int64 (num_clients,)."""

    def largest(self) -> int:
        """Number of samples of the client that has most."""
        return int(self.sizes().max())

    @abstractmethod
    def label_counts(self, clients: Iterable[int]) -> np.ndarray | None:
        """Samples of each class, summed over ``clients``, int64 (num_classes,).

        None for a partition without regard to labels: the expected mix is that of the whole set.
        """

    @abstractmethod
    def _bounds(self, client: int) -> tuple[int, int]:
        """Start and stop of the client's places."""

    @abstractmethod
    def _samples(self, start: int, stop: int) -> np.ndarray:
        """Samples at these places."""


class _PermutedPartition(Partition):
    """Clients take stretches of a keyed permutation of all samples, which is not stored."""

    def __init__(self, num_clients: int, used_samples: int, permutation: Permutation):
        self.num_clients, self.used_samples = num_clients, used_samples
        self._permutation = permutation

    def label_counts(self, clients: Iterable[int]) -> None:
        return None

    def _samples(self, start: int, stop: int) -> np.ndarray:
        return self._permutation.take(np.arange(start, stop))


class EqualPartition(_PermutedPartition):
    """Stretches as equal as can be, in O(1) memory for any number of clients.

    Args:
        num_clients: Number of clients, at most ``used_samples``.
        used_samples: How many samples to deal out; the first clients get one more if it does not divide.
        permutation: Of all samples, at least ``used_samples``.
    """

    def __init__(self, num_clients: int, used_samples: int, permutation: Permutation):
        super().__init__(num_clients, used_samples, permutation)
        self._size, self._longer = divmod(used_samples, num_clients)

    def sizes(self) -> np.ndarray:
        return self._size + (np.arange(self.num_clients) < self._longer)

    def largest(self) -> int:
        return self._size + (self._longer > 0)

    def _bounds(self, client: int) -> tuple[int, int]:
        _check_client(client, self.num_clients)
        start = client * self._size + min(client, self._longer)
        return start, start + self._size + (client < self._longer)


class OffsetPartition(_PermutedPartition):
    """Stretches of given lengths, int64 (num_clients,)."""

    def __init__(self, sizes: np.ndarray, permutation: Permutation):
        super().__init__(len(sizes), int(sizes.sum()), permutation)
        self._offsets = _offsets(sizes)

    def sizes(self) -> np.ndarray:
        return np.diff(self._offsets)

    def _bounds(self, client: int) -> tuple[int, int]:
        _check_client(client, self.num_clients)
        return int(self._offsets[client]), int(self._offsets[client + 1])


class TablePartition(Partition):
    """A stored table: all clients' samples one after another.

    Args:
        samples: int64 (used,), client by client.
        sizes: int64 (num_clients,), how many belong to each.
        labels: Labels of the whole training set, integers (N,).
        num_classes: Number of classes.
    """

    def __init__(self, samples: np.ndarray, sizes: np.ndarray, labels: np.ndarray, num_classes: int):
        self.num_clients, self.used_samples = len(sizes), len(samples)
        self._table, self._offsets = samples, _offsets(sizes)
        self._labels, self._num_classes = labels, num_classes

    def sizes(self) -> np.ndarray:
        return np.diff(self._offsets)

    def label_counts(self, clients: Iterable[int]) -> np.ndarray:
        counts = np.zeros(self._num_classes, dtype=np.int64)
        for client in clients:
            counts += np.bincount(self._labels[self.indices(client)], minlength=self._num_classes)
        return counts

    def _bounds(self, client: int) -> tuple[int, int]:
        _check_client(client, self.num_clients)
        return int(self._offsets[client]), int(self._offsets[client + 1])

    def _samples(self, start: int, stop: int) -> np.ndarray:
        return self._table[start:stop].copy()


def _check_client(client: int, num_clients: int) -> None:
    if not 0 <= client < num_clients:
        raise IndexError(f"`client` must be at least 0 and less than {num_clients}, but is {client}.")


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
