"""Arithmetic of dealing out samples: how many of each class go where, in whole numbers that add up."""

from __future__ import annotations

import numpy as np

__all__ = ["apportion", "deal", "draw_counts", "fit_margins", "move_to_minimum"]


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to ``weights`` (n,) that add up to ``total``: largest remainders, int64 (n,)."""
    shares = weights / weights.sum() * total
    counts = np.floor(shares).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:missing]] += 1
    return counts


def draw_counts(generator: np.random.Generator, mix: np.ndarray, size: int, left: np.ndarray) -> np.ndarray:
    """How many samples of each class make up one client of exactly ``size`` samples.

    A multinomial draw; what a class lacks is drawn again from the classes that have samples left, by ``mix``, or by
    what they have left where ``mix`` is zero.

    Args:
        generator: Source of the draw.
        mix: Probabilities, (classes,).
        size: At most ``left.sum()``.
        left: Samples not yet dealt out, int64 (classes,).
    """
    counts = np.minimum(generator.multinomial(size, mix), left)
    while (missing := size - int(counts.sum())) > 0:
        room = left - counts
        weights = np.where(room > 0, mix, 0.0)
        if weights.sum() < 1e-100:  # too small to be normalised
            weights = room.astype(np.float64)
        counts += np.minimum(generator.multinomial(missing, weights / weights.sum()), room)
    return counts


def fit_margins(weights: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A table of whole numbers with the given sums that stays close to ``weights`` in its cross ratios.

    Iterative proportional fitting (Deming and Stephan, 1940), then rounding down; what is missing is filled in along
    the margins, so that the sums are exact whatever the weights.

    Args:
        weights: (r, c), at least 0.
        rows, columns: The sums, int64 (r,) and (c,), with the same total.

    Returns:
        int64 (r, c).
    """
    table = weights + 1e-9  # a zero could never be scaled up
    for _ in range(200):
        table *= (columns / np.maximum(table.sum(axis=0), 1e-300))[None, :]
        table *= (rows / np.maximum(table.sum(axis=1), 1e-300))[:, None]
    table *= np.minimum(columns / np.maximum(table.sum(axis=0), 1e-300), 1.0)[None, :]
    # The slack keeps a sum that is off by rounding from exceeding its margin.
    counts = np.floor(table * (1 - 1e-12)).astype(np.int64)
    row_left, column_left = rows - counts.sum(axis=1), columns - counts.sum(axis=0)
    for r in range(len(rows)):
        for c in range(len(columns)):
            step = min(row_left[r], column_left[c])
            counts[r, c] += step
            row_left[r] -= step
            column_left[c] -= step
    return counts


def deal(
    counts: np.ndarray, labels: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw samples for each owner, so many of each class, without replacement.

    Args:
        counts: int64 (owners, classes); no class is dealt out beyond what there is.
        labels: Integers, (N,).
        generator: Source of the draw.

    Returns:
        The samples owner by owner, each owner's in random order, int64 (used,), and how many each has, (owners,).
    """
    order = generator.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], np.arange(counts.shape[1]))
    owner = np.full(len(labels), -1, dtype=np.int64)
    for label, start in enumerate(starts):
        owners = np.repeat(np.arange(len(counts)), counts[:, label])
        owner[by_class[start : start + len(owners)]] = owners
    # A second order: in the first, an owner's classes that others share come earlier or later than those that none do.
    order = generator.permutation(len(labels))
    used = order[owner[order] >= 0]
    return used[np.argsort(owner[used], kind="stable")], counts.sum(axis=1)


def move_to_minimum(samples: np.ndarray, sizes: np.ndarray, minimum: int) -> tuple[np.ndarray, np.ndarray]:
    """Bring every owner up to ``minimum`` samples, one at a time from whoever has most (the first, if several).

    Args:
        samples: Owner by owner, int64 (used,); at least ``minimum`` per owner in all.
        sizes: int64 (owners,).

    Returns:
        As :func:`deal`. An owner gives away the last of its samples.
    """
    wanted = np.maximum(minimum - sizes, 0)
    kept = _levelled(sizes, int(wanted.sum()))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(samples)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    owner[place >= kept[owner]] = np.repeat(np.arange(len(sizes)), wanted)
    return samples[np.argsort(owner, kind="stable")], kept + wanted


def _levelled(sizes: np.ndarray, surplus: int) -> np.ndarray:
    """``sizes`` after ``surplus`` samples were taken, each from the largest: cut off at a common level."""
    low, high = 0, int(sizes.max())
    while low < high:  # the highest level that takes at least the surplus
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.maximum(sizes - middle, 0).sum() >= surplus else (low, middle - 1)
    kept = np.minimum(sizes, low)
    too_many = int((sizes - kept).sum()) - surplus
    cut = np.flatnonzero(sizes > low)
    kept[cut[len(cut) - too_many :]] += 1
    return kept
