"""Synthetic images: pure functions of seed and index, class-conditional, of any number."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dfed.data import DATASET_GIVEN, load
from dfed.data.synthetic import SyntheticDataset, synthetic
from dfed.errors import DataError
from dfed.settings import settings_of

GIVEN = {"root": None, "download": False, "cache": None, "seed": 5}


@pytest.fixture(scope="module")
def huge():
    return load("synthetic", {"samples": 50_000_000, "shape": [3, 16, 12]}, **GIVEN)


def test_a_sample_depends_on_seed_and_index_only(huge):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    indices = np.array([0, 49_999_999, 7, 12_345_678, 7])
    x, y = huge.train.batch(indices)
    assert (x.shape, x.dtype, y.dtype) == ((5, 3, 16, 12), torch.float32, torch.int64)
    for place, i in enumerate(indices):
        alone, label = huge.train.batch(indices[place : place + 1])
        assert torch.equal(alone[0], x[place]), i
        assert label[0] == y[place] == huge.train.labels(np.array([i]))[0]
    small = load("synthetic", {"samples": 10, "shape": [3, 16, 12]}, **GIVEN)
    assert torch.equal(small.train.batch(np.array([7]))[0][0], x[2])
    other = load("synthetic", {"samples": 10, "shape": [3, 16, 12]}, **(GIVEN | {"seed": 6}))
    assert not torch.equal(other.train.batch(np.array([7]))[0][0], x[2])
    assert not torch.equal(huge.test.batch(np.array([7]))[0][0], x[2])
    x.zero_()
    assert huge.train.batch(indices)[0].abs().sum() > 0
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()


def test_labels_are_balanced_and_not_in_a_fixed_order(huge):
    labels = huge.train.labels(np.arange(1_000_000, 1_010_000))
    np.testing.assert_array_equal(np.bincount(labels), [1000] * 10)
    first = labels.reshape(-1, 10)[:, 0]
    # 1000 rotations, uniform over 10: each count is 100 ± 9.5; six deviations.
    assert np.abs(np.bincount(first, minlength=10) - 100).max() < 57


def test_samples_are_distinct_with_noise_of_the_given_strength():
    dataset = SyntheticDataset((1, 12, 12), classes=4, samples=20_000, start=0, noise=0.5, seed=1)
    x, y = dataset.batch(np.arange(20_000))
    assert len({row.tobytes() for row in x.numpy()}) == 20_000
    for label in range(4):
        noise = x[y == label] - x[y == label].mean(0)
        # 5000 images with pixels from tapes of 2^19 numbers: the spread is known to about 0.3 %, allow five times that.
        assert abs(noise.std().item() - 0.5) < 0.0075
    clean = SyntheticDataset((1, 12, 12), classes=4, samples=8, start=0, noise=0.0, seed=1)
    patterns, labels = clean.batch(np.arange(8))
    for pattern, label in zip(patterns, labels, strict=True):
        # Scaled in float64, stored in float32.
        assert abs(pattern.mean().item()) < 1e-6
        assert abs(pattern.std(correction=0).item() - 1) < 1e-6
        # The mean of 5000 noisy images is the pattern ± 0.5 / sqrt(5000) = 0.007; six deviations.
        assert (x[y == label].mean(0) - pattern).abs().max() < 0.043


def test_classes_can_be_learnt_from_train_and_told_apart_in_test(huge):
    x, y = huge.train.batch(np.arange(500))
    centres = torch.stack([x[y == c].mean(0) for c in range(10)]).flatten(1)
    x, y = huge.test.batch(np.arange(500))
    predicted = torch.cdist(x.flatten(1), centres).argmin(1)
    assert (predicted == y).float().mean() > 0.95  # distances between patterns are many times the noise


def test_nothing_of_the_size_of_the_set_is_held():
    options = {"samples": 2**37, "shape": [3, 16, 12]}
    tracemalloc.start()
    try:
        splits = load("synthetic", options, **GIVEN)
        splits.train.batch(np.array([2**37 - 1, 0]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20  # two tapes of 2 MiB for each of train and test, twice while they are made


def test_one_pixel_and_one_class():
    bundle = synthetic(**GIVEN, shape=[1, 1, 1], classes=1, samples=3)
    x, y = bundle.train.batch(np.arange(3))
    assert x.isfinite().all()
    assert y.tolist() == [0, 0, 0]


def test_patterns_that_cannot_be_held_are_refused():
    for options, message in (
        ({"shape": [3, 10**5, 10**5]}, r"`data.shape` must have at most 26843545 pixels .* for 10 classes .* but is \[3, "),
        ({"classes": 10**9}, "`data.classes` must be at most 268435456, but is 1000000000"),
    ):
        with pytest.raises(DataError, match=message):
            synthetic(**GIVEN, **options)


def test_options_are_checked_by_their_settings():
    settings = settings_of(synthetic, DATASET_GIVEN)
    for wrong in ({"shape": [3, 32]}, {"shape": [3, 0, 2]}, {"classes": 0}, {"samples": 2**38}, {"noise": -1.0}):
        with pytest.raises(ValidationError):
            settings(**wrong)
    assert settings(samples=50_000_000).shape == [3, 32, 32]
