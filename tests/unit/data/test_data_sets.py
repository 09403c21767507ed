"""The data sets by name: digits, and those in MNIST's idx format."""

from __future__ import annotations

import dataclasses
import gzip
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from dfed.data import DATASET_GIVEN, load, torchvision_sets
from dfed.errors import DataError
from dfed.registry import DATASETS
from dfed.settings import settings_of

FASHION = Path("/usr/share/datasets/fashion-mnist")
STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture
def given(tmp_path):
    return {"root": str(tmp_path / "root"), "download": False, "cache": str(tmp_path / "cache"), "seed": 0}


def _all(dataset):
    x, y = dataset.batch(np.arange(dataset.num_samples))
    return x.numpy(), y.numpy()


def test_every_data_set_has_settings_and_a_summary():
    for name in DATASETS:
        settings = settings_of(DATASETS.get(name), DATASET_GIVEN)
        assert not set(settings.model_fields) & set(DATASET_GIVEN)
        settings()  # all options have defaults that are valid
        assert DATASETS.summary(name)


def test_digits_are_those_of_scikit_learn(given):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    splits = load("digits", {"image_size": 8}, **given)
    assert splits.train.shape == (1, 8, 8)
    x, y = (np.concatenate(parts) for parts in zip(_all(splits.train), _all(splits.test), strict=True))
    # Normalising undone by a line through all pixels: the set is the same, sample for sample.
    restored = np.rint((x - x.min()) / (x.max() - x.min()) * 16).reshape(-1, 64)
    assert sorted(map(bytes, np.column_stack([restored, y]).astype(np.uint8))) == sorted(
        map(bytes, np.column_stack([pixels, labels]).astype(np.uint8))
    )
    assert abs(x.mean()) < 1e-4  # a float32 mean of 115,008 numbers
    assert abs(x.std() - 1) < 1e-4


def test_digits_are_resized_and_split_by_class_and_seed(given):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    splits = load("digits", {}, **given)
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()

    small = load("digits", {"image_size": 8}, **given)
    x8, x32 = _all(small.test)[0], _all(splits.test)[0]
    # Bilinear, by hand: with 4 new pixels per old one, pixel 4i + 1 lies 1/8 of the way back towards pixel i - 1.
    row = 0.875 * x8[:, 0, 1:] + 0.125 * x8[:, 0, :-1]
    expected = 0.875 * row[:, :, 1:] + 0.125 * row[:, :, :-1]
    got = x32[:, 0, 5::4, 5::4]
    # The two are normalised by slightly different moments: compare up to a line.
    assert np.corrcoef(expected.ravel(), got.ravel())[0, 1] > 1 - 1e-6
    counts = [np.bincount(_all(part)[1], minlength=10) for part in (splits.train, splits.test)]
    assert sum(c.sum() for c in counts) == 1797
    np.testing.assert_array_equal(counts[1], np.rint((counts[0] + counts[1]) * 0.2))

    for fraction in (1e-9, 0.999999):
        with pytest.raises(DataError, match=rf"`data.test_fraction` .* as 0.00546 to 0.995 do, but is {fraction}\."):
            load("digits", {"image_size": 8, "test_fraction": fraction}, **given)
    for fraction in (0.00546, 0.995):
        edge = load("digits", {"image_size": 8, "test_fraction": fraction}, **given)
        assert min(edge.train.num_samples, edge.test.num_samples) >= 1

    again = load("digits", {}, **given)
    other = load("digits", {}, **(given | {"seed": 1}))
    np.testing.assert_array_equal(x32, _all(again.test)[0])
    assert not np.array_equal(x32, _all(other.test)[0])


def _idx(array, code=8):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _write_idx(folder, suffix="", seed=0):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    arrays = [
        generator.integers(0, 256, (n, 28, 28)).astype(np.uint8) if i == 0 else (np.arange(n) % 10).astype(np.uint8)
        for n in (12, 11)
        for i in range(2)
    ]
    for stem, array in zip(STEMS, arrays, strict=True):
        data = _idx(array)
        (folder / f"{stem}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return arrays


@pytest.mark.parametrize(("sub", "suffix"), [("", ""), ("mnist", ".gz"), ("MNIST/raw", ".gz")])
def test_mnist_reads_idx_files(given, sub, suffix):
    train_images, train_labels, test_images, test_labels = _write_idx(Path(given["root"]) / sub, suffix)
    splits = load("mnist", {}, **given)
    padded = load("mnist", {"image_size": 33}, **given)
    assert splits.train.shape == (1, 28, 28)
    for part, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        x, y = _all(getattr(splits, part))
        # Values up to 2.8, three float32 roundings of scale, product and sum.
        np.testing.assert_allclose(x[:, 0], (images / 255.0 - 0.1307) / 0.3081, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(y, labels)
        wide = _all(getattr(padded, part))[0]
        np.testing.assert_array_equal(wide[:, :, 2:30, 2:30], x)
        black = wide.copy()
        black[:, :, 2:30, 2:30] = -0.1307 / 0.3081
        np.testing.assert_allclose(black, -0.1307 / 0.3081, rtol=1e-6)  # float32


def test_changed_files_are_decoded_again(given):
    folder = Path(given["root"])
    _write_idx(folder)
    first = _all(load("mnist", {}, **given).train)[0]
    (folder / STEMS[0]).write_bytes(_idx(np.zeros((12, 28, 28), np.uint8)))
    assert not np.array_equal(first, _all(load("mnist", {}, **given).train)[0])


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("", lambda data: data[:-1], "must be 9424 bytes long .* but is 9423"),
        ("", lambda data: data + b"x", "but is 9425"),
        ("", lambda data: b"\0\0\x0d" + data[3:], "must be an idx file of bytes in 3 dimensions"),
        ("", lambda data: b"", "but starts with nothing"),
        ("", lambda data: data[:7], "idx file"),
        ("", lambda data: _idx(np.zeros((12, 27, 28), np.uint8)), "must hold images of 28 × 28, but has 27 × 28"),
        ("", lambda data: _idx(np.zeros((13, 28, 28), np.uint8)), "for each of 13 images"),
        (".gz", lambda data: data[: len(data) // 2], "must be an idx file that can be read"),
        (".gz", lambda data: b"not gzip at all", "must be an idx file that can be read"),
        (".gz", lambda data: data[:40] + bytes(20) + data[60:], "must be an idx file"),
    ],
)
def test_damaged_idx_files_are_named(given, suffix, damage, message):
    folder = Path(given["root"])
    _write_idx(folder, suffix)
    file = folder / f"{STEMS[0]}{suffix}"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", {}, **given)
    named = STEMS[1] if "each of 13" in message else file.name  # the labels do not fit the images
    assert named in str(caught.value)


def test_missing_files_say_how_to_get_them(given, tmp_path, monkeypatch):
    nowhere = dataclasses.replace(torchvision_sets._FASHION_MNIST, package_folder=str(tmp_path / "nowhere"))
    monkeypatch.setattr(torchvision_sets, "_FASHION_MNIST", nowhere)
    for root in (given["root"], None):
        for name, hints in (
            ("mnist", ("MNIST",)),
            ("fashion_mnist", ("apt-get install dataset-fashion-mnist",)),
            ("cifar10", ("cifar-10-batches-bin", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz")),
            ("cifar100", ("cifar-100-binary", "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz")),
        ):
            with pytest.raises(DataError) as caught:
                load(name, {}, **(given | {"root": root}))
            for hint in (*hints, "`data.root` must be", "`data.download: true`", repr(root)):
                assert hint in str(caught.value)


def test_packaged_fashion_mnist_is_used_with_a_warning_if_root_has_none(given, tmp_path, monkeypatch, caplog):
    arrays = _write_idx(tmp_path / "package", ".gz")
    spec = dataclasses.replace(torchvision_sets._FASHION_MNIST, package_folder=str(tmp_path / "package"))
    monkeypatch.setattr(torchvision_sets, "_FASHION_MNIST", spec)
    with caplog.at_level(logging.WARNING):
        load("fashion_mnist", {}, **(given | {"root": None}))
        assert not caplog.records
        splits = load("fashion_mnist", {}, **given)
    assert "`data.root`" in caplog.text
    np.testing.assert_array_equal(_all(splits.test)[1], arrays[3])


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_real_fashion_mnist(given):
    splits = load("fashion_mnist", {"image_size": 32}, **(given | {"root": None}))
    assert (splits.train.num_samples, splits.test.num_samples) == (60_000, 10_000)
    for part, each in ((splits.train, 6000), (splits.test, 1000)):
        np.testing.assert_array_equal(np.bincount(part.labels(np.arange(part.num_samples))), [each] * 10)
    x, _ = splits.train.batch(np.arange(2000))
    inner = x[:, :, 2:30, 2:30]
    # 2000 of 60,000 images, each of mean about 0 ± 0.5: the mean of means is within 0.05 of 0 (four deviations).
    assert abs(inner.mean().item()) < 0.05
    assert abs(inner.std().item() - 1) < 0.05


def test_mnist_download_tries_the_mirrors(given, tmp_path, monkeypatch):
    import torchvision.datasets
    import torchvision.datasets.utils as utils

    _write_idx(tmp_path / "server", ".gz")
    urls = []

    def download(url, root, filename, md5):
        urls.append(url)
        if url.startswith("https://ossci"):
            raise OSError("no route to host")
        root.mkdir(parents=True, exist_ok=True)
        (root / filename).write_bytes((tmp_path / "server" / filename).read_bytes())

    monkeypatch.setattr(utils, "download_url", download)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["https://ossci.example/", "https://second.example/"])
    assert load("mnist", {}, **(given | {"download": True})).train.num_samples == 12
    assert len(urls) == 8
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["https://ossci.example/"])
    with pytest.raises(DataError, match=r"could not be downloaded .*no route to host"):
        load("mnist", {}, **(given | {"download": True, "root": str(tmp_path / "new")}))
