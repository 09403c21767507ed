"""Data sets: what dfed trains and tests on, and how one is found by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfed import registry, rng
from dfed.errors import DataError

__all__ = ["DATASET_GIVEN", "ArrayDataset", "Bundle", "Complement", "DataSplits", "Dataset", "Normalisation", "Subset", "load"]

DATASET_GIVEN = ("root", "download", "cache", "seed")
"""Parameters of a data set function that dfed passes itself; the others are its options."""

_MOST_VALIDATION = 2**26  # their indices are held: 0.5 GiB


@dataclass(frozen=True)
class Normalisation:
    """What is done to stored pixels: ``(pixel / divide_by - mean) / std``, with one number a channel."""

    divide_by: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Dataset(ABC):
    """Labelled images with integer indices; the same index always gives the same sample.

    Attributes:
        num_samples: Number of samples, at least 1.
        num_classes: Labels are in ``[0, num_classes)``.
        shape: ``(channels, height, width)`` of every image.
        normalisation: What is done to its pixels; None: they are given out as they are stored.
    """

    normalisation: Normalisation | None = None
    num_samples: int
    num_classes: int
    shape: tuple[int, int, int]

    @abstractmethod
    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Labels, int64 (b,), of the samples ``indices``, int64 (b,) in ``[0, num_samples)``."""

    @abstractmethod
    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Samples ``indices``, int64 (b,): normalised images float32 (b, C, H, W) and labels int64 (b,).

        Both are fresh CPU tensors, which the caller may change. A sample's values do not depend on what else is in
        the batch, to the bit.
        """


class ArrayDataset(Dataset):
    """A data set held in one array, or in one memory-mapped file.

    Args:
        images: uint8 or float32, (N, C, H, W). Bytes are divided by 255 first.
        labels: Integers, (N,), in ``[0, num_classes)``.
        num_classes: Number of classes.
        mean, std: One number per channel, or one for all: an image is given out as ``(x - mean) / std``.

    Raises:
        DataError: If the arrays are not as described.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        num_classes: int,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ):
        _check_arrays(images, labels, num_classes)
        # np.asarray sheds the memmap subclass, whose indexing costs several microseconds more; the pages stay shared.
        self._images = np.asarray(images)
        self._labels = np.asarray(labels, dtype=np.int64)
        self.num_samples, channels = images.shape[:2]
        self.num_classes = num_classes
        self.shape = tuple(images.shape[1:])
        means = np.broadcast_to(np.asarray(mean, dtype=np.float64), (channels,))
        stds = np.broadcast_to(np.asarray(std, dtype=np.float64), (channels,))
        if not (stds > 0).all():
            raise DataError(f"`std` must be above 0 for every channel, but is {stds.tolist()}.")
        unit = 255.0 if images.dtype == np.uint8 else 1.0
        if unit != 1.0 or means.any() or (stds != 1).any():
            self.normalisation = Normalisation(unit, tuple(means.tolist()), tuple(stds.tolist()))
        self._scale = torch.from_numpy(1 / (unit * stds)).to(torch.float32).view(-1, 1, 1)
        self._shift = torch.from_numpy(-means / stds).to(torch.float32).view(-1, 1, 1)

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self._labels.take(indices)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(self._images.take(indices, axis=0))
        if self.normalisation is not None:
            # A product and a sum, not one fused operation, whose last bit would depend on the place in the batch.
            images = images.to(torch.float32).mul_(self._scale).add_(self._shift)
        return images, torch.from_numpy(self._labels.take(indices))


class Subset(Dataset):
    """The samples ``indices``, int64 (n,), of another data set, in that order."""

    def __init__(self, dataset: Dataset, indices: np.ndarray):
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1 or not len(indices):
            raise DataError(f"`indices` must be one row of at least 1 index, but has shape {indices.shape}.")
        if indices.min() < 0 or indices.max() >= dataset.num_samples:
            raise DataError(
                f"`indices` must be at least 0 and less than {dataset.num_samples}, "
                f"but reach from {indices.min()} to {indices.max()}."
            )
        if isinstance(dataset, Subset):
            dataset, indices = dataset._dataset, dataset._indices.take(indices)
        self._dataset, self._indices = dataset, indices
        self.num_samples = len(indices)
        self.num_classes, self.shape, self.normalisation = dataset.num_classes, dataset.shape, dataset.normalisation

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self._dataset.labels(self._indices.take(indices))

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._dataset.batch(self._indices.take(indices))


class Complement(Dataset):
    """All samples of another data set but ``removed``, in their order; holds only the removed indices.

    Args:
        dataset: The whole.
        removed: int64 (r,), sorted, distinct, fewer than the whole.
    """

    def __init__(self, dataset: Dataset, removed: np.ndarray):
        assert len(removed) < dataset.num_samples, "nothing would be left"
        self._dataset = dataset
        # Entry j: how many samples that stay come before the j-th removed one.
        self._kept_before = removed - np.arange(len(removed))
        self.num_samples = dataset.num_samples - len(removed)
        self.num_classes, self.shape, self.normalisation = dataset.num_classes, dataset.shape, dataset.normalisation

    def _outer(self, indices: np.ndarray) -> np.ndarray:
        return indices + np.searchsorted(self._kept_before, indices, side="right")

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self._dataset.labels(self._outer(indices))

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._dataset.batch(self._outer(indices))


@dataclass(frozen=True)
class Bundle:
    """What a data set function returns."""

    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class DataSplits:
    """A data set ready for use: ``validation`` was taken out of ``train``, or is None."""

    train: Dataset
    validation: Dataset | None
    test: Dataset


def load(
    name: str,
    options: dict[str, Any],
    *,
    root: str | None,
    download: bool,
    cache: str | None,
    seed: int,
    validation_fraction: float = 0.0,
) -> DataSplits:
    """Find a data set by its name and take the validation part out of the training part.

    Args:
        name: A name in ``registry.DATASETS``, or ``package.module:function`` of your own: a function of the
            keyword arguments ``root, download, cache, seed`` and its options. It returns a :class:`Bundle`, or a
            pair ``((images, labels), (images, labels))`` of arrays for training and test, as for
            :class:`ArrayDataset` with mean 0 and standard deviation 1.
        options: The function's own settings, already checked against ``settings_of(function, DATASET_GIVEN)``.
        root: Folder where the raw files are, or None.
        download: Whether missing files may be fetched from the network.
        cache: Folder for decoded data; None: see :func:`dfed.data.cache.cache_folder`.
        seed: Keys every random choice: splits, synthetic data.
        validation_fraction: Part of the training samples, in ``[0, 1)``, that becomes the validation set.

    Raises:
        UnknownName: If there is no such data set.
        DataError: If the data are missing, damaged, or not of the kind promised.
        ConfigError: If a function of your own raises.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"`data.validation_fraction` must be at least 0 and less than 1, but is {validation_fraction}.")
    function = registry.DATASETS.get(name)
    with registry.calling("data.dataset", name):
        bundle = _as_bundle(function(root=root, download=download, cache=cache, seed=seed, **options))
    if validation_fraction == 0:
        return DataSplits(bundle.train, None, bundle.test)
    total = bundle.train.num_samples
    count = _validation_count(validation_fraction, total)
    taken = np.sort(rng.Permutation(total, seed, "validation").take(np.arange(count)))
    return DataSplits(Complement(bundle.train, taken), Subset(bundle.train, taken), bundle.test)


def _validation_count(fraction: float, total: int) -> int:
    """How many of ``total`` training samples become the validation set."""
    count = max(1, round(fraction * total))
    if total == 1:
        raise DataError(f"`data.validation_fraction` must be 0, as there is only 1 training sample, but is {fraction}.")
    if count >= total:
        raise DataError(
            f"`data.validation_fraction` must leave at least 1 of {total} training samples (as {1 - 1 / total:.3g} does), "
            f"but is {fraction}, which takes {count}."
        )
    if count > _MOST_VALIDATION:
        raise DataError(
            f"`data.validation_fraction` must take at most {_MOST_VALIDATION} of {total} training samples, but is "
            f"{fraction}, which takes {count}."
        )
    return count


def _as_bundle(result: object) -> Bundle:
    """The data set function's result as a checked :class:`Bundle`."""
    if not isinstance(result, Bundle):
        result = _bundle_of_arrays(result)
    for part in ("train", "test"):
        if not isinstance(getattr(result, part), Dataset):
            kind = type(getattr(result, part)).__name__
            raise DataError(f"the {part} part must be a dfed.data.Dataset, but is a {kind}.")
    train, test = result.train, result.test
    if (train.shape, train.num_classes) != (test.shape, test.num_classes):
        raise DataError(
            f"both parts must have the same shape and classes, but training has {train.shape} "
            f"and {train.num_classes} classes, test {test.shape} and {test.num_classes}."
        )
    return result


def _bundle_of_arrays(result: object) -> Bundle:
    """A :class:`Bundle` of ``((images, labels), (images, labels))``."""
    is_pair = isinstance(result, (tuple, list)) and len(result) == 2
    if not is_pair or not all(isinstance(part, (tuple, list)) and len(part) == 2 for part in result):
        raise DataError(
            f"the function must return a dfed.data.Bundle, or ((images, labels), (images, labels)) for training and test, "
            f"but returns a {type(result).__name__}."
        )
    parts = [tuple(np.asarray(array) for array in part) for part in result]
    for part, (images, labels) in zip(("training", "test"), parts, strict=True):
        try:
            _check_arrays(images, labels, None)
        except DataError as error:
            raise DataError(f"{part} part: {error}") from error
    num_classes = int(max(labels.max() for _, labels in parts)) + 1
    train, test = (ArrayDataset(images, labels, num_classes=num_classes) for images, labels in parts)
    return Bundle(train, test)


def _check_arrays(images: np.ndarray, labels: np.ndarray, num_classes: int | None) -> None:
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32) or 0 in images.shape:
        raise DataError(
            f"`images` must be a uint8 or float32 array (N, C, H, W) with at least 1 image, "
            f"but is {images.dtype} {images.shape}."
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"`labels` must be integers of shape ({len(images)},), as there are {len(images)} images, "
            f"but are {labels.dtype} {labels.shape}."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        limit = "" if num_classes is None else f" and less than `num_classes` ({num_classes})"
        raise DataError(f"`labels` must be at least 0{limit}, but reach from {low} to {high}.")
