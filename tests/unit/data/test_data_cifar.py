"""CIFAR's binary version: folders, archives, damage, download."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dfed.data import load, torchvision_sets
from dfed.errors import DataError


@pytest.fixture
def given(tmp_path):
    return {"root": str(tmp_path / "root"), "download": False, "cache": str(tmp_path / "cache"), "seed": 0}


def _all(dataset):
    x, y = dataset.batch(np.arange(dataset.num_samples))
    return x.numpy(), y.numpy()


def _cifar_files(label_bytes, classes, names, seed=0):
    generator = np.random.default_rng(seed)
    contents, images, labels = {}, {}, {}
    for name in names:
        images[name] = generator.integers(0, 256, (4, 3, 32, 32)).astype(np.uint8)
        labels[name] = generator.integers(0, classes, 4).astype(np.uint8)
        records = [
            bytes([19] * (label_bytes - 1) + [label]) + image.tobytes()
            for image, label in zip(images[name], labels[name], strict=True)
        ]
        contents[name] = b"".join(records)
    return contents, images, labels


CIFAR = {
    "cifar10": (1, 10, [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "cifar-10-batches-bin"),
    "cifar100": (2, 100, ["train.bin"], "test.bin", "cifar-100-binary"),
}


def _write_archive(path, folder, contents, extra=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if extra:
            for name in ("../escaped.bin", f"{folder}/readme.html"):
                member = tarfile.TarInfo(name)
                member.size = 4
                archive.addfile(member, io.BytesIO(b"evil"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["folder", "root itself", "archive"])
def test_cifar_binary_files(given, name, place):
    label_bytes, classes, train, test, folder = CIFAR[name]
    contents, images, labels = _cifar_files(label_bytes, classes, [*train, test])
    root = Path(given["root"])
    if place == "archive":
        _write_archive(root / f"{name.replace('cifar', 'cifar-')}-binary.tar.gz", folder, contents)
    else:
        where = root / folder if place == "folder" else root
        where.mkdir(parents=True)
        for file, data in contents.items():
            (where / file).write_bytes(data)
    splits = load(name, {}, **given)
    assert splits.train.num_classes == classes
    spec = {"cifar10": torchvision_sets._CIFAR10, "cifar100": torchvision_sets._CIFAR100}[name]
    mean, std = np.reshape(spec.mean, (3, 1, 1)), np.reshape(spec.std, (3, 1, 1))
    for part, files in ((splits.train, train), (splits.test, [test])):
        x, y = _all(part)
        expected = (np.concatenate([images[f] for f in files]) / 255.0 - mean) / std
        # Values up to 2.2, three float32 roundings.
        np.testing.assert_allclose(x, expected, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(y, np.concatenate([labels[f] for f in files]))
    assert not list(root.parent.rglob("escaped.bin"))
    assert not list(root.rglob("readme.html"))


def test_damaged_cifar_files_are_named(given):
    label_bytes, classes, train, test, folder = CIFAR["cifar10"]
    contents, *_ = _cifar_files(label_bytes, classes, [*train, test])
    where = Path(given["root"]) / folder
    where.mkdir(parents=True)

    def write(changes):
        for file, data in (contents | changes).items():
            (where / file).write_bytes(data)

    whole = contents[train[2]]
    for data, message in (
        (whole[:-1], "a whole number of records of 3073 bytes, but has 12291"),
        (b"", "a whole number of records"),
        (b"\x0a" + whole[1:], "a file of labels less than 10, but has a label 10"),
    ):
        write({train[2]: data})
        with pytest.raises(DataError, match=rf"data_batch_3.bin' must be {message}"):
            load("cifar10", {}, **given)
    write({})
    (where / train[4]).unlink()
    with pytest.raises(DataError, match=r"data_batch_5.bin' must be a file that can be read"):
        load("cifar10", {}, **given)


def test_damaged_cifar_archives_are_named(given):
    label_bytes, classes, train, test, folder = CIFAR["cifar100"]
    contents, *_ = _cifar_files(label_bytes, classes, [*train, test])
    path = Path(given["root"]) / "cifar-100-binary.tar.gz"
    _write_archive(path, folder, contents)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"nonsense", b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"cifar-100-binary.tar.gz' must be a file that can be read"):
            load("cifar100", {}, **given)
    _write_archive(path, folder, {"train.bin": contents["train.bin"]})
    with pytest.raises(DataError, match=r"tar.gz' must be an archive with cifar-100-binary/test.bin"):
        load("cifar100", {}, **given)
    with tarfile.open(path, "w:gz") as archive:  # a link is not followed
        member = tarfile.TarInfo(f"{folder}/test.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(member)
    with pytest.raises(DataError, match="must be an archive with"):
        load("cifar100", {}, **given)


def test_download_checks_the_sum_and_leaves_no_half_file(given, tmp_path, monkeypatch):
    import torchvision.datasets.utils as utils

    label_bytes, classes, train, test, folder = CIFAR["cifar10"]
    contents, *_ = _cifar_files(label_bytes, classes, [*train, test])
    source = tmp_path / "source.tar.gz"
    _write_archive(source, folder, contents)
    calls = []

    def retrieve(url, path, *args):
        calls.append(url)
        Path(path).write_bytes(source.read_bytes())

    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
    wanted = given | {"download": True}
    with pytest.raises(DataError, match=r"could not be downloaded .*https://www.cs.toronto.edu/~kriz/cifar-10-binary"):
        load("cifar10", {}, **wanted)
    assert not (Path(given["root"]) / "cifar-10-binary.tar.gz").exists()

    md5 = hashlib.md5(source.read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision_sets, "_CIFAR10", dataclasses.replace(torchvision_sets._CIFAR10, md5=md5))
    assert load("cifar10", {}, **wanted).train.num_samples == 20
    count = len(calls)
    assert load("cifar10", {}, **wanted).test.num_samples == 4
    assert len(calls) == count
    assert load("cifar10", {}, **(wanted | {"root": None})).train.num_samples == 20
    assert (Path(given["cache"]) / "downloads" / "cifar-10-binary.tar.gz").is_file()
