"""Whole-number arithmetic of dealing out, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from dfed.data.allocation import apportion, deal, draw_counts, fit_margins, move_to_minimum


def test_apportion_is_within_one_of_the_exact_share():
    generator = np.random.default_rng(0)
    for total in (0, 1, 9, 1000):
        weights = generator.random(7) ** 5
        counts = apportion(weights, total)
        assert counts.sum() == total
        assert np.abs(counts - weights / weights.sum() * total).max() < 1
    assert apportion(np.ones(3), 4).tolist() == [2, 1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_move_to_minimum_is_one_sample_at_a_time_from_the_largest(seed):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 30, 8)
    minimum = int(sizes.sum() // 8)
    samples = generator.permutation(int(sizes.sum()))
    expected = sizes.copy()
    while expected.min() < minimum:
        expected[np.argmin(expected)] += 1
        expected[np.argmax(expected)] -= 1
    moved, after = move_to_minimum(samples, sizes, minimum)
    assert after.tolist() == expected.tolist()
    assert sorted(moved) == sorted(samples)
    starts, new_starts = np.cumsum(sizes) - sizes, np.cumsum(after) - after
    for owner in range(8):  # nobody loses more than its last samples
        kept = min(sizes[owner], after[owner])
        ours = moved[new_starts[owner] : new_starts[owner] + after[owner]]
        assert set(samples[starts[owner] : starts[owner] + kept]) <= set(ours)


def test_fit_margins_keeps_sums_whatever_the_weights_and_cross_ratios_where_it_can():
    generator = np.random.default_rng(0)
    for alpha in (1e-9, 0.01, 0.5, 100.0):
        for _ in range(10):
            columns = generator.integers(0, 50, 6)
            rows = apportion(generator.random(4) + 0.1, int(columns.sum()))
            counts = fit_margins(generator.dirichlet(np.full(6, alpha), size=4), rows, columns)
            assert counts.min() >= 0
            np.testing.assert_array_equal(counts.sum(axis=1), rows)
            np.testing.assert_array_equal(counts.sum(axis=0), columns)
    weights = np.array([[4.0, 1.0], [1.0, 1.0]])
    table = fit_margins(weights, np.array([10**6, 10**6]), np.array([10**6, 10**6])).astype(float)
    # 4 : 1 is kept; rounding to whole samples of half a million moves it by about 1e-5.
    assert abs(table[0, 0] * table[1, 1] / (table[0, 1] * table[1, 0]) - 4) < 1e-4


def test_draw_counts_falls_back_on_what_is_left():
    generator = np.random.default_rng(0)
    left = np.array([3, 0, 5, 2])
    only_first = np.array([1.0, 0.0, 0.0, 0.0])
    assert draw_counts(generator, only_first, 3, left).tolist() == [3, 0, 0, 0]
    counts = draw_counts(generator, only_first, 8, left)
    assert counts[0] == 3
    assert counts.sum() == 8
    assert (counts <= left).all()
    assert draw_counts(generator, np.full(4, 0.25), 10, left).tolist() == left.tolist()


def test_deal_gives_each_owner_its_counts_in_an_order_without_regard_to_class():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 9000)
    class_sizes = np.bincount(labels)
    # Class 0 is shared, class 1 is the first owner's alone, half of class 2 is left over.
    counts = np.array([[class_sizes[0] // 2, class_sizes[1], 0], [class_sizes[0] // 2, 0, class_sizes[2] // 2]])
    samples, sizes = deal(counts, labels, generator)
    assert sizes.tolist() == counts.sum(axis=1).tolist()
    assert len(np.unique(samples)) == len(samples)
    for owned, wanted in zip(np.split(samples, [sizes[0]]), counts, strict=True):
        np.testing.assert_array_equal(np.bincount(labels[owned], minlength=3), wanted)
        half = len(owned) // 2
        first = np.bincount(labels[owned[:half]], minlength=3)
        # Hypergeometric with deviation below sqrt(half) / 2; six of them.
        assert np.abs(first - wanted / 2).max() < 3 * np.sqrt(half)
