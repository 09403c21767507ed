"""Features that clients train on in the place of their samples: made once, kept in a file, read row by row.

See :class:`dfed.strategies.Feed`. A pass holds one frozen unit at a time, and its input and output for one mini-batch: never
more than training that unit takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dfed.blocks import cut
from dfed.client.home import ClientHome
from dfed.client.skeleton import Skeleton
from dfed.data import Dataset, Subset
from dfed.data.row_file import RowFile
from dfed.errors import CheckpointError, FeaturesLost
from dfed.models import Chain
from dfed.strategies import Feed

__all__ = ["Blank", "ClientFeatures", "Features", "pass_through", "units_of"]

_FLOAT = np.dtype(np.float32)


class Features(Protocol):
    """Where a client's features come from and go to.

    Attributes:
        units: What they pass; see :func:`units_of`.
    """

    units: Sequence[Skeleton]

    def source(self, size: int) -> Iterable[Tensor]:
        """What they are made of: float32 (b, …), on the CPU, ``size`` samples at a time, in the client's order."""

    def keep(self, pieces: Iterable[Tensor]) -> None:
        """Take the features, in the same order."""


def units_of(chain: Chain, feed: Feed) -> list[Skeleton]:
    """The units of a feed, each by itself, without storage."""
    return [Skeleton(cut(chain, place, place + 1)) for place in map(chain.index_of, feed.units)]


@dataclass(frozen=True)
class Blank:
    """One mini-batch of nothing in particular, of which nothing is kept: for predictions and rehearsals.

    Attributes:
        units: See :func:`units_of`.
        shape: Of one sample before them.
        make: A tensor of this shape.
    """

    units: Sequence[Skeleton]
    shape: tuple[int, ...]
    make: Callable[..., Tensor]

    def source(self, size: int) -> Iterator[Tensor]:
        yield self.make(size, *self.shape)

    def keep(self, pieces: Iterable[Tensor]) -> None:
        for _ in pieces:
            pass


@torch.no_grad()
def pass_through(features: Features, values: Mapping[str, Tensor], size: int, precision: str, device: torch.device,
                 after_batch: Callable[[], None]) -> None:
    """Make a client's features: everything that they are made of passes their units, in evaluation mode.

    Each unit is given storage when a mini-batch comes to it, and is emptied again: they are never there together.

    Args:
        values: The units' tensors, by their global names.
        size: Samples in a mini-batch.
        precision: As in the settings of training. Between units values are float32.
        after_batch: Called after each mini-batch; may raise to abandon the pass.
    """
    def passed(x: Tensor) -> Tensor:
        for unit in features.units:
            unit.load(values, device)
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    x = unit.model.eval()(x).float()
            finally:
                unit.unload()
        return x.contiguous()  # here, where predictions see it

    def pieces() -> Iterator[Tensor]:
        for x in features.source(size):
            x = passed(x.to(device))
            yield x
            del x  # one mini-batch is there at a time
            after_batch()

    features.keep(pieces())


class ClientFeatures:
    """The features that one client trains on, in its home.

    Args:
        chain: The full model, without storage.
        dataset, indices: The client's samples.
    """

    def __init__(self, chain: Chain, feed: Feed, home: ClientHome, client: int, dataset: Dataset, indices: np.ndarray):
        self.units = units_of(chain, feed)
        self._feed, self._home, self._client = feed, home, client
        self._dataset, self._indices = dataset, indices

    def check(self) -> None:
        """Look at every byte of the file that is there already, and is read or made into another one.

        Raises:
            FeaturesLost: If it is not there, or was changed since it was written.
        """
        version = self._feed.source if self._feed.units else self._feed.version
        if version is None:
            return
        fault = self._rows(version).fault(self._key(version), bytes_too=True)
        if fault is not None:
            raise FeaturesLost(f"client {self._client} must have the features that it made in round {version} or later, but "
                               f"{fault}. It makes them anew when it is next asked.")

    def source(self, size: int) -> Iterator[Tensor]:
        version, count = self._feed.source, len(self._indices)
        rows = Subset(self._dataset, self._indices) if version is None else self._features(version, self._feed.source_shape)
        for start in range(0, count, size):
            yield rows.batch(np.arange(start, min(start + size, count)))[0]

    def keep(self, pieces: Iterable[Tensor]) -> None:
        rows = self._rows(self._feed.version)

        def arrays() -> Iterator[np.ndarray]:
            for piece in pieces:
                array = piece.cpu().numpy()
                del piece
                yield array
                del array

        try:
            whole = rows.write(self._key(self._feed.version), len(self._indices), arrays())
            assert whole, "a pass makes features of all samples, or raises"
        except OSError as error:
            raise CheckpointError(f"cannot write the features of client {self._client} to {rows.data}: {error}") from error

    @property
    def dataset(self) -> Dataset:
        """The features as a data set of their own, in the client's order."""
        return self._features(self._feed.version, self._feed.shape)

    def _features(self, version: int, shape: tuple[int, ...]) -> Dataset:
        return _FeatureSet(self._rows(version), Subset(self._dataset, self._indices), shape)

    def _rows(self, version: int) -> RowFile:
        return RowFile(self._home.features_path(self._client, version), _FLOAT)

    def _key(self, version: int) -> str:
        return f"client {self._client} from round {version} on, {len(self._indices)} samples"


class _FeatureSet(Dataset):
    """Features as samples, with the labels of the samples that they were made of."""

    def __init__(self, rows: RowFile, samples: Dataset, shape: tuple[int, ...]):
        self._rows, self._samples = rows, samples
        self.num_samples, self.num_classes = samples.num_samples, samples.num_classes
        self.shape = shape  # type: ignore[assignment]

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self._samples.labels(indices)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        try:
            with self._rows.data.open("rb", buffering=0) as file:
                values = self._rows.read(file, indices, self.shape)
        except OSError as error:
            raise CheckpointError(f"features of a client cannot be read from {self._rows.data}: {error.strerror}.") from error
        return values, torch.from_numpy(self.labels(indices))
