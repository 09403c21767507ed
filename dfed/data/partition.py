"""Partitioners: the ways to deal a training set out to clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dfed import registry, rng
from dfed.data.allocation import apportion, deal, draw_counts, fit_margins, move_to_minimum
from dfed.data.partitions import EqualPartition, OffsetPartition, Partition, TablePartition
from dfed.errors import DataError

__all__ = [
    "PARTITIONER_GIVEN",
    "dirichlet",
    "dirichlet_tiers",
    "fixed",
    "iid",
    "make_partition",
    "quantity_skew",
    "shards",
]

PARTITIONER_GIVEN = ("num_samples", "labels", "num_classes", "num_clients", "tier_of", "seed")
"""Parameters of a partitioner that dfed passes itself; the others are its options."""

_DIRICHLET_ATTEMPTS = 20
_MOST_PER_CLIENT = 2**26  # a client's indices and their order are held: a few GiB while they are worked out
_MOST_LABELS = 2**28  # 2 GiB, and as much again for each order of them

Alpha = Annotated[float, Field(gt=0, le=1e9)]
Count = Annotated[int, Field(ge=1)]
Labels = Callable[[], np.ndarray]
TierOf = Callable[[np.ndarray], np.ndarray]


def make_partition(
    name: str,
    options: dict[str, Any],
    *,
    num_samples: int,
    labels: Labels,
    num_classes: int,
    num_clients: int,
    tier_of: TierOf,
    seed: int,
) -> Partition:
    """Deal ``num_samples`` samples out to ``num_clients`` clients.

    Args:
        name: A name in ``registry.PARTITIONERS``, or ``package.module:function``.
        options: Its own settings, already checked against ``settings_of(function, PARTITIONER_GIVEN)``.
        num_samples: Size of the training set.
        labels: Gives all its labels, integers (num_samples,); called only if they are needed.
        num_classes: Labels are in ``[0, num_classes)``.
        num_clients: Number of clients, at least 1.
        tier_of: Maps client ids, int64 (n,), to the indices of their device tiers, integers (n,).
        seed: Keys every draw.

    Raises:
        UnknownName: If there is no such partitioner.
        DataError: If the samples cannot be dealt out as asked; the message says what would be possible.
        ConfigError: If a function of your own raises, or there is too little memory.
    """
    if num_clients < 1 or num_clients > num_samples:
        raise DataError(
            f"`fleet.clients` must be at least 1 and at most {num_samples}, the number of training samples, as every client "
            f"needs one, but is {num_clients}."
        )
    function = registry.PARTITIONERS.get(name)
    with registry.calling("data.partition", name):
        partition = function(
            num_samples=num_samples, labels=lambda: _checked(labels, name, num_samples, num_classes),
            num_classes=num_classes, num_clients=num_clients, tier_of=tier_of, seed=seed, **options,
        )
        if not isinstance(partition, Partition):
            kind = type(partition).__name__
            raise DataError(f"the partitioner must return a dfed.data.Partition, but returns a {kind}.")
        largest = partition.largest()
    if largest > _MOST_PER_CLIENT:
        raise DataError(
            f"`data.partition` must give every client at most {_MOST_PER_CLIENT} samples, but gives one {largest}: take "
            "fewer samples, or more clients."
        )
    return partition


def _checked(labels: Labels, name: str, num_samples: int, num_classes: int) -> np.ndarray:
    """All labels, if they can be held and are what a data set promises."""
    if num_samples > _MOST_LABELS:
        raise DataError(
            f"`data.partition` must be one that needs no labels (iid, quantity_skew, or fixed without alpha) for more than "
            f"{_MOST_LABELS} training samples, but is '{name}' for {num_samples}."
        )
    found = np.asarray(labels())
    if found.shape != (num_samples,) or found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= num_classes:
        raise DataError(
            f"`data.dataset` must have labels that are integers in [0, {num_classes}), one for each of {num_samples} training "
            f"samples, but has {found.dtype} {found.shape}" + (
                f" from {found.min()} to {found.max()}." if found.size and found.dtype.kind in "iu" else "."
            )
        )
    return found


def iid(
    *, num_samples: int, labels: Labels, num_classes: int, num_clients: int, tier_of: TierOf, seed: int,
    samples_per_client: Count | None = None,
) -> Partition:
    """Samples dealt out at random, as equally as can be; any number of clients costs the same.

    Args:
        samples_per_client: Exactly so many for each client; None deals out all samples.
    """
    if samples_per_client is not None:
        _check_enough("samples_per_client", samples_per_client, num_clients, num_samples)
    used = num_samples if samples_per_client is None else samples_per_client * num_clients
    return EqualPartition(num_clients, used, rng.Permutation(num_samples, seed, "partition"))


def fixed(
    *, num_samples: int, labels: Labels, num_classes: int, num_clients: int, tier_of: TierOf, seed: int,
    samples_per_client: Count, alpha: Alpha | None = None,
) -> Partition:
    """The same small number of samples for every client; optionally each client with a class mix of its own.

    With ``alpha``, client by client, a class mix is drawn from Dirichlet(alpha, ..., alpha) and so many samples by
    that mix (Hsu et al., 2019, arXiv:1909.06335; their concentration is alpha × the number of classes). Where a
    class runs out, the rest comes from the others, so the last clients are less skewed if all samples are used.

    Args:
        samples_per_client: Samples of each client.
        alpha: Concentration, the smaller the more skewed; None draws without regard to labels.
    """
    _check_enough("samples_per_client", samples_per_client, num_clients, num_samples)
    if alpha is None:
        return EqualPartition(
            num_clients, samples_per_client * num_clients, rng.Permutation(num_samples, seed, "partition")
        )
    all_labels = labels()
    generator = rng.numpy_generator(seed, "partition fixed")
    mixes = generator.dirichlet(np.full(num_classes, alpha), size=num_clients)
    left = np.bincount(all_labels, minlength=num_classes)
    counts = np.empty((num_clients, num_classes), dtype=np.int64)
    for client, mix in enumerate(mixes):
        counts[client] = draw_counts(generator, mix, samples_per_client, left)
        left -= counts[client]
    return TablePartition(*deal(counts, all_labels, generator), all_labels, num_classes)


def dirichlet(
    *, num_samples: int, labels: Labels, num_classes: int, num_clients: int, tier_of: TierOf, seed: int,
    alpha: Alpha = 0.5, min_samples: Count = 1,
) -> Partition:
    """Each class is divided among the clients in proportions drawn from a Dirichlet distribution.

    For each class, proportions over the clients are drawn from Dirichlet(alpha, ..., alpha) (Yurochkin et al., 2019,
    arXiv:1905.12022, section 4), so that clients differ in class mix and in size. If a client gets fewer than
    ``min_samples``, all is drawn again, up to 20 times; then samples move, one by one, from the largest client.

    Args:
        alpha: Concentration, the smaller the more skewed.
        min_samples: Every client has at least so many.
    """
    _check_enough("min_samples", min_samples, num_clients, num_samples)
    all_labels = labels()
    class_sizes = np.bincount(all_labels, minlength=num_classes)
    for attempt in range(_DIRICHLET_ATTEMPTS):
        generator = rng.numpy_generator(seed, "partition dirichlet", attempt)
        shares = generator.dirichlet(np.full(num_clients, alpha), size=num_classes)  # (classes, clients)
        # Rounding the running sum, not each share, keeps every class's total exact.
        ends = np.rint(np.minimum(np.cumsum(shares, axis=1), 1.0) * class_sizes[:, None]).astype(np.int64)
        ends[:, -1] = class_sizes
        counts = np.diff(ends, axis=1, prepend=0).T  # (clients, classes)
        if counts.sum(axis=1).min() >= min_samples:
            break
    samples, sizes = move_to_minimum(*deal(counts, all_labels, generator), min_samples)
    return TablePartition(samples, sizes, all_labels, num_classes)


def shards(
    *, num_samples: int, labels: Labels, num_classes: int, num_clients: int, tier_of: TierOf, seed: int,
    shards_per_client: Count = 2,
) -> Partition:
    """Samples sorted by label and cut into shards, of which every client gets a few.

    The pathological non-IID partition of McMahan et al., 2017 (arXiv:1602.05629, section 3). Shards are as equal as
    can be; all samples are used.

    Args:
        shards_per_client: Shards for each client, which bounds the number of classes that it sees.
    """
    _check_enough("shards_per_client", shards_per_client, num_clients, num_samples)
    all_labels = labels()
    generator = rng.numpy_generator(seed, "partition shards")
    order = generator.permutation(num_samples)
    by_class = order[np.argsort(all_labels[order], kind="stable")]
    num_shards = num_clients * shards_per_client
    ends = np.arange(num_shards + 1) * num_samples // num_shards
    owner_of_shard = generator.permutation(num_shards) // shards_per_client
    owner = np.repeat(owner_of_shard, np.diff(ends))  # of the places in by_class
    samples = by_class[np.argsort(owner, kind="stable")]
    return TablePartition(samples, np.bincount(owner, minlength=num_clients), all_labels, num_classes)


def dirichlet_tiers(
    *, num_samples: int, labels: Labels, num_classes: int, num_clients: int, tier_of: TierOf, seed: int,
    alpha: Alpha = 0.5, samples_per_client: Count | None = None,
) -> Partition:
    """Class mix that depends on the device tier: Dirichlet between tiers, IID within each.

    Data correlated with resources, after the rc-non-IID setting of CoCoFL (Pfeiffer et al., 2023, arXiv:2203.05468).
    Each tier's class mix is drawn from Dirichlet(alpha, ..., alpha), then all mixes are scaled together (iterative
    proportional fitting) so that the classes' totals are those of the data and clients are of equal size, whatever their
    tier. A fleet of one tier thus has IID data.

    Args:
        alpha: Concentration, the smaller the more the tiers differ.
        samples_per_client: Exactly so many for each client, of all classes in proportion; None deals out all samples.
    """
    all_labels = labels()
    class_sizes = np.bincount(all_labels, minlength=num_classes)
    if samples_per_client is not None:
        _check_enough("samples_per_client", samples_per_client, num_clients, num_samples)
        num_samples = samples_per_client * num_clients
        class_sizes = apportion(class_sizes, num_samples)
    generator = rng.numpy_generator(seed, "partition tiers")
    tier_names, tiers = np.unique(np.asarray(tier_of(np.arange(num_clients))), return_inverse=True)
    sizes = num_samples // num_clients + (np.arange(num_clients) < num_samples % num_clients)
    tier_sizes = np.bincount(tiers, weights=sizes, minlength=len(tier_names)).astype(np.int64)
    mixes = np.stack([
        rng.numpy_generator(seed, "partition tiers", int(tier)).dirichlet(np.full(num_classes, alpha))
        for tier in tier_names
    ])
    counts = fit_margins(mixes, tier_sizes, class_sizes)
    by_tier, _ = deal(counts, all_labels, generator)
    # by_tier lists the tiers' samples in turn; dealing them to the clients sorted by tier keeps each in its tier.
    clients = np.argsort(tiers, kind="stable")
    owner = np.repeat(clients, sizes[clients])
    return TablePartition(by_tier[np.argsort(owner, kind="stable")], sizes, all_labels, num_classes)


def quantity_skew(
    *, num_samples: int, labels: Labels, num_classes: int, num_clients: int, tier_of: TierOf, seed: int,
    alpha: Alpha = 1.0, min_samples: Count = 1, distribution: Literal["dirichlet", "power_law"] = "dirichlet",
) -> Partition:
    """Clients of very different sizes, each with random samples of all classes.

    Every client gets ``min_samples``; the rest is divided in proportions drawn from a Dirichlet or Pareto
    distribution (the quantity skew of Li et al., 2022, arXiv:2102.02079, section 3.3).

    Args:
        alpha: Concentration (dirichlet) or exponent of the tail (power_law): the smaller the more skewed.
        min_samples: Every client has at least so many.
        distribution: ``dirichlet``, or ``power_law`` for a few very large clients and a long tail.
    """
    _check_enough("min_samples", min_samples, num_clients, num_samples)
    generator = rng.numpy_generator(seed, "partition quantity")
    if distribution == "dirichlet":
        weights = generator.dirichlet(np.full(num_clients, alpha))
    else:
        logs = -np.log1p(-generator.random(num_clients)) / alpha  # of Pareto draws
        weights = np.exp(logs - logs.max())  # the draws themselves could overflow
    sizes = min_samples + apportion(weights, num_samples - min_samples * num_clients)
    return OffsetPartition(sizes, rng.Permutation(num_samples, seed, "partition"))


def _check_enough(option: str, per_client: int, num_clients: int, num_samples: int) -> None:
    """Raise if ``num_samples`` do not suffice for ``per_client`` each."""
    if per_client * num_clients > num_samples:
        fewer = num_samples // per_client  # none if one client alone would want more than there is
        raise DataError(
            f"`data.partition.{option}` must be at most {num_samples // num_clients} for {num_clients} clients"
            + (f", or `fleet.clients` at most {fewer} for {per_client} each" if fewer else "")
            + f", as there are {num_samples} training samples, but is {per_client}."
        )
