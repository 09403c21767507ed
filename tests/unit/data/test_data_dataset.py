"""Arrays as data sets, subsets, the validation split, and what a user's own data set may return."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfed.data import ArrayDataset, Bundle, Subset, load
from dfed.data.dataset import Complement
from dfed.errors import ConfigError, DataError
from dfed.registry import UnknownName

GIVEN = {"root": None, "download": False, "cache": None, "seed": 3}


def _arrays(count=23, channels=3, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, channels, 5, 7)).astype(np.uint8)
    return images, generator.integers(0, 4, count)


def test_array_dataset_normalises_as_a_float64_reference():
    images, labels = _arrays()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    reference = (images / 255.0 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    indices = np.array([4, 4, 0, 22, 9])
    for stored in (images, (images / 255.0).astype(np.float32)):
        dataset = ArrayDataset(stored, labels, num_classes=4, mean=mean, std=std)
        x, y = dataset.batch(indices)
        assert (dataset.num_samples, dataset.num_classes, dataset.shape) == (23, 4, (3, 5, 7))
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        # Values reach 3.5; scale, shift, product and sum round to 2^-24 each.
        np.testing.assert_allclose(x.numpy(), reference[indices], rtol=0, atol=2e-6)
        np.testing.assert_array_equal(y.numpy(), labels[indices])
        np.testing.assert_array_equal(dataset.labels(indices), labels[indices])
        assert dataset.labels(indices).dtype == np.int64


def test_batches_are_fresh_and_do_not_depend_on_their_neighbours():
    images, labels = _arrays(count=64)
    for dataset in (
        ArrayDataset(images, labels, num_classes=4, mean=0.3, std=0.21),
        ArrayDataset(images.astype(np.float32), labels, num_classes=4),
    ):
        whole, _ = dataset.batch(np.arange(64))
        for i in (0, 1, 17, 63):
            alone, label = dataset.batch(np.array([i]))
            assert torch.equal(alone[0], whole[i])
            alone.zero_()
            label.zero_()
            assert torch.equal(dataset.batch(np.array([i]))[0][0], whole[i])
            assert dataset.labels(np.array([i]))[0] == labels[i]


def test_float_images_of_mean_0_and_std_1_are_given_out_as_they_are(tmp_path):
    images = np.random.default_rng(0).standard_normal((9, 1, 4, 4)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    dataset = ArrayDataset(mapped, np.arange(9) % 2, num_classes=2)
    x, _ = dataset.batch(np.array([8, 1]))
    np.testing.assert_array_equal(x.numpy(), images[[8, 1]])
    x.add_(1)  # must not reach the read-only file


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 4), np.uint8), np.zeros(2, int), "`images` must be .* but is uint8"),
        (np.zeros((2, 1, 3, 4)), np.zeros(2, int), "but is float64"),
        (np.zeros((0, 1, 3, 4), np.uint8), np.zeros(0, int), "at least 1 image"),
        (np.zeros((2, 1, 3, 4), np.uint8), np.zeros(3, int), r"`labels` must be integers of shape \(2,\)"),
        (np.zeros((2, 1, 3, 4), np.uint8), np.zeros(2), "but are float64"),
        (np.zeros((2, 1, 3, 4), np.uint8), np.array([0, 4]), r"less than `num_classes` \(4\), but reach from 0 to 4"),
        (np.zeros((2, 1, 3, 4), np.uint8), np.array([-1, 0]), "but reach from -1 to 0"),
    ],
)
def test_wrong_arrays_are_refused(images, labels, message):
    with pytest.raises(DataError, match=message):
        ArrayDataset(images, labels, num_classes=4)


def test_std_of_zero_is_refused():
    with pytest.raises(DataError, match=r"`std` must be above 0 .* but is \[0.0"):
        ArrayDataset(*_arrays(), num_classes=4, std=0.0)


def test_subset_and_complement():
    images, labels = _arrays(count=30)
    whole = ArrayDataset(images, labels, num_classes=4)
    removed = np.array([0, 1, 5, 6, 7, 29])
    rest = np.setdiff1d(np.arange(30), removed)
    picks = np.array([3, 0, 23, 23, 11])
    nested = Subset(Subset(whole, rest[::-1]), np.arange(23, -1, -1))
    for dataset in (Subset(whole, rest), Complement(whole, removed), nested):
        assert (dataset.num_samples, dataset.num_classes, dataset.shape) == (24, 4, whole.shape)
        np.testing.assert_array_equal(dataset.labels(np.arange(24)), labels[rest])
        x, y = dataset.batch(picks)
        assert torch.equal(x, whole.batch(rest[picks])[0])
        np.testing.assert_array_equal(y.numpy(), labels[rest[picks]])
    for wrong in ([30], [-1], [], [[1]]):
        with pytest.raises(DataError, match="`indices` must be"):
            Subset(whole, np.array(wrong, dtype=np.int64))


def own_bundle(*, root, download, cache, seed, count: int = 40):
    images, labels = _arrays(count=count, seed=seed)
    dataset = ArrayDataset(images, labels, num_classes=4)
    return Bundle(dataset, dataset)


def own_arrays(*, root, download, cache, seed):
    return _arrays(seed=1), _arrays(count=5, seed=2)


def own_wrong(*, root, download, cache, seed, what: str):
    good = ArrayDataset(*_arrays(), num_classes=4)
    return {
        "array": np.zeros(3),
        "one part": _arrays(),
        "flat": ((np.zeros((4, 2), np.uint8), np.zeros(4, int)), _arrays()),
        "bundle of arrays": Bundle(_arrays(), _arrays()),
        "other shape": Bundle(good, ArrayDataset(*_arrays(channels=1), num_classes=4)),
        "other classes": Bundle(good, ArrayDataset(*_arrays(), num_classes=9)),
    }[what]


def test_own_data_sets():
    splits = load(f"{__name__}:own_bundle", {"count": 50}, **GIVEN)
    assert (splits.train.num_samples, splits.validation) == (50, None)
    splits = load(f"{__name__}:own_arrays", {}, **GIVEN)
    (images, labels), (_, test_labels) = _arrays(seed=1), _arrays(count=5, seed=2)
    assert splits.test.num_samples == 5
    assert splits.train.num_classes == splits.test.num_classes == max(labels.max(), test_labels.max()) + 1
    # One division against one product with the reciprocal: two roundings of values up to 1.
    np.testing.assert_allclose(splits.train.batch(np.arange(23))[0].numpy(), images / 255.0, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("array", "must return a dfed.data.Bundle.* but returns a ndarray"),
        ("one part", "must return a dfed.data.Bundle.* but returns a tuple"),
        ("flat", "training part: `images` must be"),
        ("bundle of arrays", "the train part must be a dfed.data.Dataset, but is a tuple"),
        ("other shape", "must have the same shape and classes"),
        ("other classes", "must have the same shape and classes"),
    ],
)
def test_own_data_sets_of_the_wrong_kind_are_refused(what, message):
    with pytest.raises(DataError, match=f"^`data.dataset` '{__name__}:own_wrong': .*{message}"):
        load(f"{__name__}:own_wrong", {"what": what}, **GIVEN)


def own_raises(*, root, download, cache, seed):
    return np.load("/nowhere/at/all.npy")


def test_what_an_own_function_raises_is_said_with_its_place():
    with pytest.raises(ConfigError) as caught:
        load(f"{__name__}:own_raises", {}, **GIVEN)
    line = own_raises.__code__.co_firstlineno + 1
    assert caught.value.faults[0].field == "data.dataset"
    assert f"'{__name__}:own_raises' raised FileNotFoundError: [Errno 2] No such file" in str(caught.value)
    assert str(caught.value).endswith(f" ({__file__}:{line}).")  # of this file, not of NumPy's
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_unknown_name_lists_the_known():
    with pytest.raises(UnknownName, match=r"digits.*Did you mean 'digits'"):
        load("digit", {}, **GIVEN)


def test_validation_is_drawn_from_train_and_keyed():
    name = f"{__name__}:own_bundle"
    options = {"count": 400}

    def parts(seed, fraction=0.2):
        splits = load(name, options, **(GIVEN | {"seed": seed}), validation_fraction=fraction)
        return [p.batch(np.arange(p.num_samples))[0].flatten(1).numpy() for p in (splits.train, splits.validation)]

    def rows(array):
        return {row.tobytes() for row in array}

    train, validation = parts(3)
    assert (len(train), len(validation)) == (320, 80)
    whole = load(name, options, **GIVEN).train.batch(np.arange(400))[0].flatten(1).numpy()
    assert rows(train).isdisjoint(rows(validation))
    assert rows(train) | rows(validation) == rows(whole)
    for again, first in zip(parts(3), (train, validation), strict=True):
        np.testing.assert_array_equal(again, first)
    assert len(parts(3, 0.0001)[1]) == 1

    for fraction in (-0.1, 1.0, 0.9999):
        with pytest.raises(DataError, match=r"`data\.validation_fraction` must"):
            load(name, options, **GIVEN, validation_fraction=fraction)
    with pytest.raises(DataError, match=r"at least 1 of 400 training samples \(as 0\.998 does\), but is 0.9999"):
        load(name, options, **GIVEN, validation_fraction=0.9999)
    with pytest.raises(DataError, match=r"must be 0, as there is only 1 training sample, but is 0\.5"):
        load(name, {"count": 1}, **GIVEN, validation_fraction=0.5)
    with pytest.raises(DataError, match="must take at most 67108864 of 100000000000 training samples"):
        load("synthetic", {"samples": 10**11}, **GIVEN, validation_fraction=0.5)
