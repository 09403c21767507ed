"""A data set of any size that is never stored: every sample is computed from the seed and its index."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dfed import rng
from dfed.data.dataset import Bundle, Dataset
from dfed.errors import DataError

__all__ = ["SyntheticDataset", "synthetic"]

_TAPE_BITS = 19
_TEST_START = 1 << (2 * _TAPE_BITS - 1)
_SHAPE = [3, 32, 32]
_MOST_VALUES = 2**28  # of all patterns, which are held: 1 GiB

_Samples = Annotated[int, Field(ge=1, le=_TEST_START)]


def synthetic(
    *,
    root: str | None,
    download: bool,
    cache: str | None,
    seed: int,
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)] = _SHAPE,
    classes: Annotated[int, Field(ge=1)] = 10,
    samples: _Samples = 50_000,
    test_samples: _Samples = 10_000,
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,
) -> Bundle:
    """Class patterns plus noise, of any shape and number, computed on demand: for tests of scale and speed.

    Args:
        root, download, cache: Not needed: nothing is stored.
        seed: Keys patterns, labels and noise.
        shape: Channels, height and width.
        classes: Number of classes.
        samples, test_samples: Number of training and test samples; neither costs memory or time.
        noise: Standard deviation of a pixel's noise; the patterns' is 1.

    Raises:
        DataError: If one image of every class is more than 1 GiB in all.
    """
    size = (shape[0], shape[1], shape[2])
    if classes * math.prod(size) > _MOST_VALUES:
        raise DataError(
            f"`data.shape` must have at most {_MOST_VALUES // classes} pixels (all channels) for {classes} classes "
            f"(`data.classes`), but is {shape}." if classes <= _MOST_VALUES else
            f"`data.classes` must be at most {_MOST_VALUES}, but is {classes}."
        )
    train = SyntheticDataset(size, classes=classes, samples=samples, start=0, noise=noise, seed=seed)
    test = SyntheticDataset(size, classes=classes, samples=test_samples, start=_TEST_START, noise=noise, seed=seed)
    return Bundle(train, test)


class SyntheticDataset(Dataset):
    """Samples ``start`` to ``start + samples`` of an endless keyed sequence.

    A sample is its class's smooth pattern (mean 0, standard deviation 1 over its pixels) plus two windows, one from
    each of two keyed tapes of Gaussian noise. A keyed permutation maps the sample's number to the two positions, so
    no two samples have the same pair of windows. Each run of ``classes`` samples holds every class once, in an order
    that is rotated by a keyed amount.

    Args:
        shape: ``(channels, height, width)``.
        classes: Number of classes.
        samples: Number of samples.
        start: Number of the first one; ``start + samples`` is at most 2³⁸.
        noise: Standard deviation of a pixel's noise.
        seed: Keys everything.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, classes: int, samples: int, start: int, noise: float, seed: int
    ):
        assert samples >= 1, f"`samples` must be at least 1, but is {samples}."
        assert 0 <= start <= 2 * _TEST_START - samples, f"{samples} samples from {start} on are too many"
        self.num_samples, self.num_classes, self.shape = samples, classes, shape
        self._start = start
        self._permutation = rng.Permutation(1 << (2 * _TAPE_BITS), seed, "synthetic")
        self._patterns = _patterns(shape, classes, seed)  # (classes, C * H * W)
        pixels = self._patterns.shape[1]
        # Weights 0.8 and 0.6 keep the variance at 1; they differ, so that swapped windows give a different sample.
        self._tapes = [_tape(pixels, noise * weight, seed, i) for i, weight in enumerate((0.8, 0.6))]

    def labels(self, indices: np.ndarray) -> np.ndarray:
        block, place = np.divmod(indices + self._start, self.num_classes)
        return (place + self._permutation.take(block)) % self.num_classes

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        numbers = indices + self._start
        block, place = np.divmod(numbers, self.num_classes)
        # One look-up for both, as most of its time does not depend on how many it is for.
        where, turn = self._permutation.take(np.stack([numbers, block]))
        labels = (place + turn) % self.num_classes
        images = self._patterns.take(labels, axis=0)  # (b, C * H * W)
        images += self._tapes[0][where >> _TAPE_BITS]
        images += self._tapes[1][where & ((1 << _TAPE_BITS) - 1)]
        return torch.from_numpy(images).view(-1, *self.shape), torch.from_numpy(labels)


def _tape(pixels: int, scale: float, seed: int, number: int) -> np.ndarray:
    """All windows of one tape of noise, as a view (2 ** _TAPE_BITS, pixels) of about 2 MiB."""
    generator = rng.numpy_generator(seed, "synthetic noise", number)
    tape = generator.standard_normal((1 << _TAPE_BITS) + pixels - 1, dtype=np.float32) * np.float32(scale)
    return np.lib.stride_tricks.sliding_window_view(tape, pixels)


def _patterns(shape: tuple[int, int, int], classes: int, seed: int) -> np.ndarray:
    """One smooth random image per class, float32 (classes, C * H * W), of mean 0 and standard deviation 1."""
    channels, height, width = shape
    patterns = np.empty((classes, channels * height * width), dtype=np.float32)
    for label in range(classes):
        coarse = rng.numpy_generator(seed, "synthetic pattern", label).standard_normal((1, channels, 4, 4))
        smooth = torch.nn.functional.interpolate(
            torch.from_numpy(coarse), size=(height, width), mode="bilinear", align_corners=True
        )
        flat = smooth.numpy().reshape(-1)
        if flat.size > 1:  # a single pixel has no spread to scale to 1
            flat = (flat - flat.mean()) / flat.std()
        patterns[label] = flat
    return patterns
