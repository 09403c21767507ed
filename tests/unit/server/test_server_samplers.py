from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from dfed.registry import SAMPLERS
from dfed.server.samplers import Uniform, Weighted, weighted_order
from dfed.settings import settings_of

# Chi-square quantile by Wilson and Hilferty at z = 4.265: a right sampler stays below it with probability 1 - 1e-5.
# The seeds are fixed, so a test that passes once passes always.
Z = 4.265


def chi_square(observed, expected):
    observed, expected = np.asarray(observed, dtype=float), np.asarray(expected, dtype=float)
    assert expected.min() >= 5  # the usual condition for the approximation
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + Z * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((observed - expected) ** 2 / expected).sum(), limit


def draw(sampler, size, sizes, seed=1, round_index=0, admit=lambda client: True):
    return sampler.cohort(size=size, num_clients=len(sizes), seed=seed, round_index=round_index, admit=admit,
                          sizes=lambda: np.asarray(sizes))


@pytest.mark.parametrize("name", ["uniform", "weighted"])
def test_samplers_without_a_state_keep_the_contract(name):
    assert not settings_of(SAMPLERS.get(name)).model_fields
    sampler = SAMPLERS.get(name)()
    sizes = np.arange(1, 5001)
    cohort = draw(sampler, 50, sizes)
    assert len(cohort) == len(set(cohort)) == 50
    assert all(type(client) is int and 0 <= client < 5000 for client in cohort)
    assert draw(SAMPLERS.get(name)(), 50, sizes) == cohort  # nothing but the arguments
    assert draw(sampler, 20, sizes) == cohort[:20]
    assert draw(sampler, 50, sizes, round_index=1) != cohort
    assert draw(sampler, 50, sizes, seed=2) != cohort
    assert draw(sampler, 0, sizes) == []

    asked = []
    even = draw(sampler, 30, sizes, admit=lambda client: asked.append(client) or client % 2 == 0)
    whole = draw(sampler, 5000, sizes)
    assert sorted(whole) == list(range(5000))
    assert even == [client for client in whole if client % 2 == 0][:30]
    assert asked == whole[: len(asked)]  # each once, in order, and nobody after the last one drawn
    assert asked[-1] == even[-1]

    assert sorted(draw(sampler, 99, sizes, admit=lambda client: client < 7)) == list(range(7))
    assert draw(sampler, 99, sizes, admit=lambda client: False) == []
    assert draw(sampler, 3, [4]) == [0]


def test_uniform_touches_only_what_it_needs():
    asked = []

    def no_sizes():
        raise AssertionError("uniform sampling needs no sizes")

    cohort = Uniform().cohort(size=10, num_clients=10**12, seed=0, round_index=0,
                              admit=lambda client: asked.append(client) or True, sizes=no_sizes)
    assert cohort == asked


def test_uniform_draws_pairs_equally_often():
    clients, rounds = 20, 10_000
    counts = dict.fromkeys(permutations(range(clients), 2), 0)
    for round_index in range(rounds):
        counts[tuple(draw(Uniform(), 2, np.ones(clients), round_index=round_index))] += 1
    statistic, limit = chi_square(list(counts.values()), [rounds / len(counts)] * len(counts))
    assert statistic < limit


def test_weighted_draws_pairs_in_proportion():
    sizes, rounds = np.array([1, 2, 0, 3, 6]), 20_000
    counts: dict[tuple[int, ...], int] = {}
    for round_index in range(rounds):
        pair = tuple(draw(Weighted(), 2, sizes, round_index=round_index))
        counts[pair] = counts.get(pair, 0) + 1
    pairs = [pair for pair in permutations(range(5), 2) if 2 not in pair]
    assert counts.keys() == set(pairs)  # a client without samples is never drawn
    total = sizes.sum()
    expected = [rounds * sizes[i] / total * sizes[j] / (total - sizes[i]) for i, j in pairs]
    statistic, limit = chi_square([counts[pair] for pair in pairs], expected)
    assert statistic < limit
    # The test can tell: the same counts do not fit uniform pairs.
    statistic, limit = chi_square([counts[pair] for pair in pairs], [rounds / len(pairs)] * len(pairs))
    assert statistic > limit


def test_nothing_weighs_nothing():
    draws = np.array([0.5, 0.0, 0.9, 0.2, 0.7])
    assert weighted_order(np.array([0.0, 1.0, 0.0, 2.0, 1e-300]), draws).tolist() == [1, 3, 4, 0, 2]
    assert weighted_order(np.array([]), np.array([])).tolist() == []


def test_weighted_takes_extreme_sizes_and_refuses_wrong_ones():
    assert sorted(draw(Weighted(), 9, [0, 10**12, 1, 0])) == [1, 2]
    assert draw(Weighted(), 9, [0, 0]) == []
    with pytest.raises(AssertionError, match="negative"):
        draw(Weighted(), 1, [1, -1])
    with pytest.raises(AssertionError, match="shape"):
        Weighted().cohort(size=1, num_clients=3, seed=0, round_index=0, admit=bool, sizes=lambda: np.ones(2))
    for sampler in (Uniform(), Weighted()):
        with pytest.raises(AssertionError, match="at least 0"):
            draw(sampler, -1, [1])
