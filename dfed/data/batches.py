"""A client's mini-batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dfed.data.dataset import Dataset

__all__ = ["Augment", "client_batches"]

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Images (b, C, H, W) and a generator to draw from, to images of the same shape."""

_GATHER_BYTES = 2 * 2**20  # so little that it does not matter to any device's budget


def client_batches(
    dataset: Dataset,
    indices: np.ndarray,
    *,
    batch_size: int,
    generator: torch.Generator,
    epochs: int | None = None,
    steps: int | None = None,
    augment: Augment | None = None,
    drop_last: bool = False,
    at_once: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches of a client's samples, in a new random order each epoch.

    The sequence depends on the arguments only, the generator's state included.

    Args:
        dataset: Where the samples are.
        indices: The client's samples, int64 (n,), at least 1.
        batch_size: Samples per batch, at least 1; the last batch of an epoch may be smaller.
        generator: CPU generator for order and augmentation; advanced while batches are drawn.
        epochs: How often to go through the samples; or
        steps: how many batches to give, going through the samples as often as it takes. Exactly one of the two.
        augment: Applied to each batch's images.
        drop_last: Leave out an epoch's last batch if it is smaller than ``batch_size``, unless it is the only one.
        at_once: Samples of up to 2 MiB in all are read once, when this function is called; more, and without this also fewer,
            are read batch by batch. Nothing else depends on it.

    Returns:
        Iterator over images, float32 (b, C, H, W), and labels, int64 (b,); fresh tensors.
    """
    num_samples = len(indices)
    assert num_samples >= 1, "a client needs at least 1 sample"
    assert batch_size >= 1, f"`batch_size` must be at least 1, but is {batch_size}."
    assert (epochs is None) != (steps is None), f"give `epochs` ({epochs}) or `steps` ({steps}), not both or none"
    stop = num_samples - num_samples % batch_size if drop_last and num_samples >= batch_size else num_samples
    per_epoch = -(-stop // batch_size)
    count = steps if steps is not None else epochs * per_epoch
    source = _source(dataset, np.asarray(indices, dtype=np.int64), _GATHER_BYTES if at_once else 0)
    return itertools.islice(_endless(source, num_samples, stop, batch_size, generator, augment), count)


def _source(dataset: Dataset, indices: np.ndarray, most_bytes: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from places among ``indices``, int64 (b,), to images and labels."""
    if 4 * math.prod(dataset.shape) * len(indices) > most_bytes:
        return lambda places: dataset.batch(indices.take(places.numpy()))
    images, labels = dataset.batch(indices)
    return lambda places: (images.index_select(0, places), labels.index_select(0, places))


def _endless(
    source: Callable[[Tensor], tuple[Tensor, Tensor]], num_samples: int, stop: int, batch_size: int,
    generator: torch.Generator, augment: Augment | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        order = torch.randperm(num_samples, generator=generator)
        for places in order[:stop].split(batch_size):
            images, labels = source(places)
            yield (images if augment is None else augment(images, generator)), labels
