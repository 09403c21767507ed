from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from scipy import stats

from dfed.rng import Permutation, key, numpy_generator, torch_generator, uniform

# Chance that a correct generator fails one of the statistical tests below. The seeds are fixed, so each outcome is too.
SIGNIFICANCE = 1e-3


def test_a_key_depends_on_every_argument_and_on_nothing_else():
    assert key(1, "cohort", 2, 3) == key(1, "cohort", 2, 3) == key(np.int64(1), "cohort", np.int32(2), 3)
    different = [
        (0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", "0"), (0, "a", 0, 0), (0, "a", 1), (0, "a", -1), (-1, "a"),
        (0, "a", ""), (0, "a", "", ""), (0, "ab"), (0, "a", "b"), (0, "a", 12, 3), (0, "a", 1, 23), (10, "a"),
        (0, "a", 2**70),
        (2**70, "a"),
    ]
    keys = [key(*arguments) for arguments in different]
    assert len(set(keys)) == len(keys)
    assert all(0 <= value < 2**128 for value in keys)
    assert len({key(0, "bits", i) for i in range(20_000)}) == 20_000


def test_a_key_never_changes():
    # A checkpoint is continued by later versions: these are part of the format.
    assert key(0, "init") == 264174058692973578196680458708008017709
    assert key(7, "batches", 3, 12, "a") == 333683073118280480720718855954940178463
    assert uniform(3, "fleet", 7, "up") == 0.3099113328630104
    assert Permutation(5000, 0, "a").take(np.arange(5)).tolist() == [3255, 2997, 1462, 4055, 4674]
    assert Permutation(10**9, 0, "a")[10**9 - 1] == 4995091


def test_every_bit_of_a_key_is_fair():
    count = 4000
    keys = [key(5, "bits", i) for i in range(count)]
    ones = [sum(value >> bit & 1 for value in keys) for bit in range(128)]
    statistic = sum((n - count / 2) ** 2 for n in ones) / (count / 4)
    assert statistic < stats.chi2.ppf(1 - SIGNIFICANCE, 128)


def test_uniform_is_uniform_and_independent_between_purposes():
    draws = np.array([[uniform(0, purpose, i) for i in range(4000)] for purpose in ("availability", "dropout")])
    assert (draws >= 0).all()
    assert (draws < 1).all()
    for row in draws:
        assert stats.kstest(row, "uniform").pvalue > SIGNIFICANCE
    table = np.histogram2d(*draws, bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(table.ravel()).pvalue > SIGNIFICANCE
    assert stats.pearsonr(draws[0, :-1], draws[0, 1:]).pvalue > SIGNIFICANCE  # client i and client i + 1


def test_generators_are_keyed_and_leave_the_global_ones_alone():
    random_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first = torch.rand(8, generator=torch_generator(1, "x", 2))
    assert torch.equal(first, torch.rand(8, generator=torch_generator(1, "x", 2)))
    assert not torch.equal(first, torch.rand(8, generator=torch_generator(1, "x", 3)))
    assert torch_generator(1, "x").device.type == "cpu"
    row = numpy_generator(1, "x", 2).random(8)
    assert (row == numpy_generator(1, "x", 2).random(8)).all()
    assert (row != numpy_generator(1, "y", 2).random(8)).all()
    Permutation(100, 0, "x").take(np.arange(100))
    Permutation(10_000, 0, "x").take(np.arange(100))
    uniform(0, "x")
    assert random.getstate() == random_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_permutations_of_every_small_size_are_permutations():
    everything = np.arange(5000)
    for size in range(1, 5001):
        seen = Permutation(size, 0, "sizes", size).take(everything[:size])
        assert np.bincount(seen, minlength=size).tolist() == [1] * size if size < 50 else (np.bincount(seen) == 1).all(), size
        assert len(seen) == size


@pytest.mark.parametrize("size", [65_536, 65_537, 262_143, 262_144, 300_007])
def test_permutations_of_large_sizes_are_permutations(size):
    permutation = Permutation(size, 1, "large")
    seen = permutation.take(np.arange(size))
    assert len(permutation) == size
    assert seen.dtype == np.int64
    assert seen.max() == size - 1
    assert (np.bincount(seen, minlength=size) == 1).all()
    order = np.random.Generator(np.random.Philox(1)).permutation(size)[:1000]
    assert (permutation.take(order) == seen[order]).all()  # whatever is asked beside it
    assert permutation[size - 1] == seen[-1]


def test_huge_permutations_cost_nothing_and_stay_in_range():
    for size in (10**9, 2**38, 2**40 + 1):
        seen = Permutation(size, 0, "huge").take(np.arange(5000))
        assert len(np.unique(seen)) == 5000
        assert seen.min() >= 0
        assert seen.max() < size
        assert stats.kstest(seen / size, "uniform").pvalue > SIGNIFICANCE


def test_the_shape_of_the_indices_is_kept_and_outside_is_refused():
    for size in (10, 5000):
        permutation = Permutation(size, 0, "shape")
        grid = np.arange(6).reshape(2, 3)
        assert (permutation.take(grid) == permutation.take(np.arange(6)).reshape(2, 3)).all()
        assert permutation.take(np.empty(0, dtype=np.int64)).shape == (0,)
        assert [permutation[i] for i in range(6)] == permutation.take(np.arange(6)).tolist()
        for outside in (size, -1):
            with pytest.raises(IndexError, match="less than"):
                permutation[outside]
    with pytest.raises(AssertionError, match="at least 1"):
        Permutation(0, 0, "none")


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_favour_no_order(size):
    orders = {order: 0 for order in itertools.permutations(range(size))}
    for seed in range(40 * len(orders)):
        orders[tuple(Permutation(size, seed, "orders", size).take(np.arange(size)).tolist())] += 1
    assert stats.chisquare(list(orders.values())).pvalue > SIGNIFICANCE


def test_large_permutations_favour_no_place():
    # The network of four rounds is used from 4097 elements on: where the first element goes, where two neighbours go.
    size, places = 5000, np.arange(0, 5000)
    takes = np.stack([Permutation(size, seed, "places").take(places[:2]) for seed in range(4000)])
    assert stats.chisquare(np.bincount(takes[:, 0] // 250, minlength=20)).pvalue > SIGNIFICANCE
    pairs = np.bincount(takes[:, 0] // 1000 * 5 + takes[:, 1] // 1000, minlength=25)
    assert stats.chisquare(pairs).pvalue > SIGNIFICANCE
    whole = Permutation(size, 0, "places").take(places)
    assert stats.spearmanr(places, whole).pvalue > SIGNIFICANCE
    assert stats.pearsonr(whole[:-1], whole[1:]).pvalue > SIGNIFICANCE
    # Fixed points of a random permutation are Poisson with mean 1.
    fixed = sum(int((Permutation(size, seed, "fixed").take(places) == places).sum()) for seed in range(100))
    assert stats.poisson.ppf(SIGNIFICANCE / 2, 100) <= fixed <= stats.poisson.ppf(1 - SIGNIFICANCE / 2, 100)
