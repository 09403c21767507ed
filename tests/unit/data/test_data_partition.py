"""Partitioners: on real labels, against references, and over many small combinations."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from dfed.data import PARTITIONER_GIVEN, Partition, load, make_partition
from dfed.errors import ConfigError, DataError
from dfed.registry import PARTITIONERS
from dfed.settings import settings_of

CASES = {
    "iid": {},
    "iid small": {"samples_per_client": 17},
    "fixed": {"samples_per_client": 12},
    "fixed alpha": {"samples_per_client": 12, "alpha": 0.3},
    "fixed all": {"samples_per_client": 35, "alpha": 0.1},
    "dirichlet": {"alpha": 0.3, "min_samples": 4},
    "shards": {"shards_per_client": 2},
    "dirichlet_tiers": {"alpha": 0.3},
    "dirichlet_tiers small": {"alpha": 0.3, "samples_per_client": 17},
    "quantity_skew": {"alpha": 0.5, "min_samples": 3},
    "quantity_skew power": {"alpha": 1.2, "distribution": "power_law"},
}
CLIENTS = 41


def tier_of(clients):
    return np.asarray(clients) % 3


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    train = load("digits", {"image_size": 8}, root=None, download=False, cache=cache, seed=0).train
    return train.labels(np.arange(train.num_samples))


def make(name, labels, clients=CLIENTS, seed=0, num_classes=10, tiers=tier_of, **options):
    return make_partition(
        name.split()[0], options, num_samples=len(labels), labels=lambda: labels, num_classes=num_classes,
        num_clients=clients, tier_of=tiers, seed=seed,
    )  # fmt: skip


def check(partition, labels, num_classes=10):
    """All that must hold of any partition; returns each client's samples."""
    assert isinstance(partition, Partition)
    clients = range(partition.num_clients)
    each = [partition.indices(client) for client in clients]
    every = np.concatenate(each)
    sizes = partition.sizes()
    assert every.dtype == sizes.dtype == np.int64
    assert every.min() >= 0
    assert every.max() < len(labels)
    assert len(np.unique(every)) == len(every) == partition.used_samples == sizes.sum()
    assert [partition.num_samples(client) for client in clients] == sizes.tolist() == [len(i) for i in each]
    assert partition.largest() == sizes.max()
    assert sizes.min() >= 1
    counts = partition.label_counts(clients[::2])
    if counts is not None:
        chosen = np.concatenate([labels[each[client]] for client in clients[::2]])
        np.testing.assert_array_equal(counts, np.bincount(chosen, minlength=num_classes))
    return each


def test_registry_and_cases_agree():
    assert {case.split()[0] for case in CASES} == set(PARTITIONERS)
    for case, options in CASES.items():
        settings_of(PARTITIONERS.get(case.split()[0]), PARTITIONER_GIVEN)(**options)
        assert PARTITIONERS.summary(case.split()[0])


@pytest.mark.parametrize("case", CASES)
def test_partitions_of_real_digits(labels, case):
    state = np.random.get_state()[1].copy()
    partition = make(case, labels, **CASES[case])
    each = check(partition, labels)
    assert (state == np.random.get_state()[1]).all()

    again, other = make(case, labels, **CASES[case]), make(case, labels, seed=1, **CASES[case])
    for client, indices in enumerate(each):
        np.testing.assert_array_equal(again.indices(client), indices)
    assert any(not np.array_equal(other.indices(c), each[c]) for c in range(CLIENTS))
    each[0][:] = 0  # a caller's copy
    np.testing.assert_array_equal(again.indices(0), partition.indices(0))
    for client in (-1, CLIENTS):
        with pytest.raises(IndexError, match="`client` must be at least 0 and less than 41"):
            partition.indices(client)


def test_sizes_are_as_asked(labels):
    n = len(labels)
    for case in ("iid", "dirichlet_tiers"):
        sizes = make(case, labels, **CASES[case]).sizes()
        assert sizes.sum() == n
        assert sizes.max() - sizes.min() <= 1
    assert set(make("iid", labels, samples_per_client=17).sizes()) == {17}
    for alpha in (None, 0.05, 100.0):
        assert set(make("fixed", labels, samples_per_client=35, alpha=alpha).sizes()) == {35}
    assert make("dirichlet", labels, **CASES["dirichlet"]).sizes().min() >= 4
    assert make("dirichlet", labels, **CASES["dirichlet"]).used_samples == n
    assert make("shards", labels).used_samples == n
    for distribution in ("dirichlet", "power_law"):
        partition = make("quantity_skew", labels, alpha=0.5, min_samples=3, distribution=distribution)
        assert partition.used_samples == n
        assert partition.sizes().min() >= 3
        assert partition.sizes().max() > 4 * n / CLIENTS
        even = make("quantity_skew", labels, alpha=1e9, distribution=distribution).sizes()
        assert even.max() - even.min() <= 2  # proportions equal to about 1e-4, then rounded


def test_iid_clients_have_the_mix_of_the_whole(labels):
    many = np.repeat(labels, 20)
    expected = np.bincount(many) / len(many)
    for case in ("iid", "quantity_skew"):
        partition = make(case, many, clients=10)
        for client in range(10):
            size = partition.num_samples(client)
            got = np.bincount(many[partition.indices(client)], minlength=10) / size
            # Each share is binomial: deviation sqrt(0.1 * 0.9 / size); six of them.
            assert np.abs(got - expected).max() < 6 * np.sqrt(0.09 / size)


def _loop_dirichlet(labels, clients, alpha, generator):
    """The partition of Yurochkin et al., written as a plain loop over classes, clients' label counts (clients, 10)."""
    counts = np.zeros((clients, 10))
    for label in range(10):
        size = (labels == label).sum()
        gamma = generator.gamma(alpha, size=clients)
        counts[:, label] = gamma / gamma.sum() * size
    return counts


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_has_the_spread_of_an_independent_reference(labels, alpha):
    """Mean sum of squared class shares per client, and spread of sizes, over 20 seeds each."""
    generator = np.random.default_rng(0)
    clients = 20

    def describe(counts):
        sizes = counts.sum(1)
        shares = counts[sizes > 5] / sizes[sizes > 5, None]
        return (shares**2).sum(1).mean(), sizes.std() / sizes.mean()

    def mine(seed):
        partition = make("dirichlet", labels, clients=clients, seed=seed, alpha=alpha)
        return np.stack([partition.label_counts([c]) for c in range(clients)]).astype(float)

    got = np.array([describe(mine(seed)) for seed in range(20)])
    want = np.array([describe(_loop_dirichlet(labels, clients, alpha, generator)) for _ in range(20)])
    error = np.sqrt(got.var(0) / 20 + want.var(0) / 20)
    # Five standard errors of the difference of two means; 0.01 for rounding to whole samples.
    assert (np.abs(got.mean(0) - want.mean(0)) < 5 * error + 0.01).all(), (got.mean(0), want.mean(0))


def test_dirichlet_repairs_what_drawing_again_cannot(labels):
    # 1400 samples for 200 clients at this alpha: some hundred clients are empty in any draw.
    partition = make("dirichlet", labels, clients=200, alpha=0.01, min_samples=6)
    check(partition, labels)
    sizes = partition.sizes()
    assert sizes.min() == 6
    assert (sizes == 6).sum() > 100
    tight = make("dirichlet", labels[:1400], clients=200, alpha=0.01, min_samples=7)
    assert set(tight.sizes()) == {7}


def test_fixed_mix_is_dirichlet_while_samples_last(labels):
    many = np.repeat(labels, 200)
    alpha, size, clients = 0.5, 50, 400
    partition = make("fixed", many, clients=clients, samples_per_client=size, alpha=alpha)
    squares = np.array([((partition.label_counts([c]) / size) ** 2).sum() for c in range(clients)])
    # E, the mean sum of p² of a symmetric Dirichlet, is (alpha + 1) / (10 alpha + 1); drawing 50 adds (1 - E) / 50.
    exact = (alpha + 1) / (10 * alpha + 1)
    expected = exact + (1 - exact) / size
    assert abs(squares.mean() - expected) < 5 * squares.std() / np.sqrt(clients)  # five standard errors


def test_shards_bound_the_classes_of_a_client(labels):
    for shards in (1, 2, 5):
        partition = make("shards", labels, clients=20, shards_per_client=shards)
        classes = [(partition.label_counts([c]) > 0).sum() for c in range(20)]
        # A shard is shorter than a class here, so it covers at most two.
        assert max(classes) <= 2 * shards
        assert partition.sizes().max() - partition.sizes().min() <= shards
    assert np.mean(classes) > 3
    assert make("shards", labels, clients=3, shards_per_client=1).used_samples == len(labels)


def test_tiers_differ_and_clients_of_a_tier_do_not(labels):
    many = np.repeat(labels, 20)
    clients = 60
    total = np.bincount(many)

    def mixes(alpha, tiers=tier_of):
        partition = make("dirichlet_tiers", many, clients=clients, alpha=alpha, tiers=tiers)
        assert partition.used_samples == len(many)
        counts = np.stack([partition.label_counts([c]) for c in range(clients)])
        np.testing.assert_array_equal(counts.sum(0), total)
        return counts / counts.sum(1, keepdims=True)

    skewed, even = mixes(0.2), mixes(1e6)
    tiers = tier_of(np.arange(clients))
    centres = np.stack([skewed[tiers == t].mean(0) for t in range(3)])
    assert min(np.abs(centres[a] - centres[b]).sum() for a, b in ((0, 1), (0, 2), (1, 2))) > 0.5
    # About 480 samples per client: a share is known to sqrt(0.25 / 480) = 0.023; five deviations.
    assert np.abs(skewed - centres[tiers]).max() < 0.115
    assert np.abs(even - total / total.sum()).max() < 0.115
    # One tier: nothing to correlate with.
    single = mixes(0.2, tiers=lambda clients: np.full(len(clients), 7))
    assert np.abs(single - total / total.sum()).max() < 0.115

    uneven = make("dirichlet_tiers", many, clients=clients, alpha=0.2, tiers=lambda c: (np.asarray(c) < 6).astype(int))
    assert abs(uneven.sizes()[:6].sum() - len(many) / 10) <= 6
    # Of fewer samples the classes keep their shares, to a sample.
    few = make("dirichlet_tiers", many, clients=clients, alpha=0.2, samples_per_client=100)
    assert set(few.sizes().tolist()) == {100}
    assert np.abs(few.label_counts(range(clients)) - total / total.sum() * 6000).max() < 1
    shares = np.stack([few.label_counts(np.flatnonzero(tiers == t)) for t in range(3)]) / 2000
    # The same mixes are scaled to the same margins: whole numbers of 2,000, and those of the whole data, apart.
    assert np.abs(shares - np.stack([skewed[tiers == t].mean(0) for t in range(3)])).max() < 0.01


@pytest.mark.parametrize("samples", [1, 2, 7, 40])
def test_any_combination_is_a_partition_or_a_data_error(samples):
    generator = np.random.default_rng(samples)
    done = 0
    for clients in (1, 2, 3, 7, 8, 41):
        for alpha in (1e-9, 0.05, 1.0, 1e6):
            few = generator.integers(1, 9)
            labels = generator.integers(0, generator.integers(1, 5), samples)
            for name, options in (
                ("iid", {}),
                ("iid", {"samples_per_client": few}),
                ("fixed", {"samples_per_client": few}),
                ("fixed", {"samples_per_client": few, "alpha": alpha}),
                ("dirichlet", {"alpha": alpha, "min_samples": few}),
                ("dirichlet_tiers", {"alpha": alpha, "samples_per_client": few}),
                ("dirichlet", {"alpha": alpha}),
                ("shards", {"shards_per_client": few}),
                ("dirichlet_tiers", {"alpha": alpha}),
                ("quantity_skew", {"alpha": alpha, "min_samples": few}),
                ("quantity_skew", {"alpha": alpha, "distribution": "power_law"}),
            ):
                per_client = options.get("samples_per_client", options.get("min_samples", 1))
                per_client = options.get("shards_per_client", per_client)
                possible = per_client * clients <= samples
                try:
                    partition = make(name, labels, clients=clients, num_classes=5, **options)
                except DataError:
                    assert not possible, (name, options)
                    continue
                assert possible, (name, options)
                check(partition, labels, num_classes=5)
                assert partition.sizes().min() >= options.get("min_samples", 1)
                done += 1
    assert done >= 16  # one client, each alpha, and the four ways that do not use `few`


def test_impossible_requests_say_what_is_possible(labels):
    thousand = labels[:1000]
    for name, option in (
        ("iid", "samples_per_client"),
        ("fixed", "samples_per_client"),
        ("shards", "shards_per_client"),
        ("dirichlet", "min_samples"),
        ("quantity_skew", "min_samples"),
    ):
        field = f"`data.partition.{option}` must be at most 10 for 100 clients"
        with pytest.raises(DataError, match=f"{field}, or `fleet.clients` at most 83 for 12 each, .* but is 12"):
            make(name, thousand, clients=100, **{option: 12})
        with pytest.raises(DataError, match=f"{field}, as there are 1000 training samples, but is 1001"):
            make(name, thousand, clients=100, **{option: 1001})
    for name in ("iid", "dirichlet_tiers"):
        for clients in (0, 1001):
            with pytest.raises(DataError, match=rf"`fleet.clients` must be .*at most 1000.* but is {clients}"):
                make(name, thousand, clients=clients)


def wrong(*, num_samples, labels, num_classes, num_clients, tier_of, seed):
    return [[0]]


def raises(*, num_samples, labels, num_classes, num_clients, tier_of, seed):
    return labels()[num_samples]


def test_own_partitioners_are_checked(labels):
    with pytest.raises(DataError, match=r"^`data.partition` '.*:wrong': .* must return a dfed.data.Partition, but .* a list"):
        make(f"{__name__}:wrong", labels)
    with pytest.raises(ConfigError, match=r"`data.partition` must .* but '.*:raises' raised IndexError: .*") as caught:
        make(f"{__name__}:raises", labels)
    assert isinstance(caught.value.__cause__, IndexError)


def test_labels_of_an_own_data_set_are_checked(labels):
    for wrong in (labels[:-1], labels[:, None], labels.astype(float), labels - 1, labels + 1):
        with pytest.raises(DataError, match=r"`data.dataset` must have labels that are integers in \[0, 10\)"):
            make_partition(
                "dirichlet", {}, num_samples=len(labels), labels=lambda wrong=wrong: wrong, num_classes=10, num_clients=4,
                tier_of=tier_of, seed=0,
            )  # fmt: skip


def test_what_could_not_be_held_is_refused_before_it_is_made():
    def refuse():
        raise AssertionError("labels that cannot be held must not be asked for")

    def huge(name, clients, **options):
        return make_partition(name, options, num_samples=2**37, labels=refuse, num_classes=10, num_clients=clients,
                              tier_of=tier_of, seed=0)

    with pytest.raises(DataError, match="at most 67108864 samples, but gives one 67108865: take fewer"):
        huge("iid", 1000, samples_per_client=2**26 + 1)
    with pytest.raises(DataError, match="at most 67108864 samples"):
        huge("quantity_skew", 100)
    for name in ("dirichlet", "shards", "dirichlet_tiers"):
        with pytest.raises(DataError, match=f"more than 268435456 training samples, but is '{name}' for {2**37}"):
            huge(name, 100)
    assert huge("iid", 1000, samples_per_client=2**26).largest() == 2**26
    assert huge("iid", 10**6).largest() == -(-(2**37) // 10**6)


@pytest.mark.parametrize(("name", "options"), [("iid", {}), ("fixed", {"samples_per_client": 50})])
def test_a_million_clients_hold_nothing(name, options):
    def refuse(*args):
        raise AssertionError("a lazy partition needs neither labels nor tiers")

    tracemalloc.start()
    try:
        partition = make_partition(
            name, options, num_samples=50_000_123, labels=refuse, num_classes=10, num_clients=1_000_000,
            tier_of=refuse, seed=0,
        )  # fmt: skip
        first, last = partition.indices(0), partition.indices(999_999)
        assert partition.label_counts([1, 2]) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert len(np.intersect1d(first, last)) == 0
    assert (partition.num_samples(0), len(first), len(last)) == ((51, 51, 50) if name == "iid" else (50, 50, 50))
    assert partition.used_samples == partition.sizes().sum() == (50_000_123 if name == "iid" else 50_000_000)
