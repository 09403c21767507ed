"""The well-known image data sets, from files of their publishers; torchvision serves only to download them.

CIFAR is read in its binary version: the Python version, which torchvision reads, is a pickle.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import numpy as np
from pydantic import Field

from dfed.data.cache import Create, cache_folder, cached, fingerprint, lock
from dfed.data.dataset import ArrayDataset, Bundle
from dfed.data.image_folder import image_folder
from dfed.data.readers import parse_cifar, read_idx, read_members
from dfed.errors import DataError

__all__ = ["cifar10", "cifar100", "fashion_mnist", "image_folder", "mnist"]

_IDX_FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
_PaddedSize = Annotated[int, Field(ge=28)] | None
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Idx:
    """Where one of the sets in idx format is found; ``title`` is torchvision's class, ``package`` Debian's."""

    title: str
    package: str | None
    package_folder: str | None
    mean: float
    std: float


@dataclass(frozen=True)
class _Cifar:
    """Where one of the two CIFAR sets is found, and what its files look like."""

    title: str
    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    label_bytes: int
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def url(self) -> str:
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"


_MNIST = _Idx("MNIST", None, None, 0.1307, 0.3081)
_FASHION_MNIST = _Idx("FashionMNIST", "dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist", 0.2860, 0.3530)
_CIFAR10 = _Cifar(
    "CIFAR-10", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 1, 10,
    (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
)  # fmt: skip
_CIFAR100 = _Cifar(
    "CIFAR-100", "cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8",
    ("train.bin",), "test.bin", 2, 100,
    (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
)  # fmt: skip


def mnist(
    *, root: str | None, download: bool, cache: str | None, seed: int, image_size: _PaddedSize = None
) -> Bundle:
    """MNIST, 60,000 + 10,000 handwritten digits in 10 classes, 28 × 28, grey.

    Args:
        root: Folder with the four idx files, plain or ``.gz``.
        download: Whether to fetch them if they are not there.
        cache: Folder for decoded data, and for downloads if there is no ``root``.
        seed: Not needed: the test set is the official one.
        image_size: Height and width to which the images are padded with zeros (black), e.g. 32; None leaves 28.

    Raises:
        DataError: If the files are missing or damaged.
    """
    return _idx_set("mnist", _MNIST, root, download, cache, image_size or 28)


def fashion_mnist(
    *, root: str | None, download: bool, cache: str | None, seed: int, image_size: _PaddedSize = None
) -> Bundle:
    """Fashion-MNIST, 60,000 + 10,000 articles of clothing in 10 classes, 28 × 28, grey.

    Args:
        root: Folder with the four idx files, plain or ``.gz``; else those of Debian's package
            ``dataset-fashion-mnist`` are used.
        download: Whether to fetch them if they are in neither place.
        cache: Folder for decoded data, and for downloads if there is no ``root``.
        seed: Not needed: the test set is the official one.
        image_size: Height and width to which the images are padded with zeros (black), e.g. 32; None leaves 28.

    Raises:
        DataError: If the files are missing or damaged.
    """
    return _idx_set("fashion_mnist", _FASHION_MNIST, root, download, cache, image_size or 28)


def cifar10(*, root: str | None, download: bool, cache: str | None, seed: int) -> Bundle:
    """CIFAR-10, 50,000 + 10,000 photographs in 10 classes, 32 × 32, colour (binary version).

    Args:
        root: Folder with ``cifar-10-batches-bin/`` or ``cifar-10-binary.tar.gz``.
        download: Whether to fetch the archive if it is not there.
        cache: Folder for decoded data, and for downloads if there is no ``root``.
        seed: Not needed: the test set is the official one.

    Raises:
        DataError: If the files are missing or damaged.
    """
    return _cifar_set("cifar10", _CIFAR10, root, download, cache)


def cifar100(*, root: str | None, download: bool, cache: str | None, seed: int) -> Bundle:
    """CIFAR-100, 50,000 + 10,000 photographs in 100 classes, 32 × 32, colour (binary version).

    Args:
        root: Folder with ``cifar-100-binary/`` or ``cifar-100-binary.tar.gz``.
        download: Whether to fetch the archive if it is not there.
        cache: Folder for decoded data, and for downloads if there is no ``root``.
        seed: Not needed: the test set is the official one.

    Raises:
        DataError: If the files are missing or damaged.
    """
    return _cifar_set("cifar100", _CIFAR100, root, download, cache)


def _idx_set(
    name: str, spec: _Idx, root: str | None, download: bool, cache: str | None, image_size: int
) -> Bundle:
    target = _download_folder(root, cache)

    def look() -> list[Path] | None:
        packaged = [Path(spec.package_folder)] if spec.package_folder else []
        for folder in (target, target / name, target / spec.title / "raw", *packaged):
            found = [next((p for p in _plain_or_gz(folder / stem) if p.is_file()), None) for stem in _IDX_FILES]
            if all(found):
                if root and folder in packaged:
                    _log.warning("`data.root` '%s' has no %s: that in '%s' is used.", root, spec.title, folder)
                return found
        return None

    def fetch() -> None:
        source = getattr(_torchvision_datasets(), spec.title)
        for file, md5 in source.resources:
            _download([mirror + file for mirror in source.mirrors], target / name, file, md5)

    need = f"`data.root` must be a folder with the files of {spec.title} ({_IDX_FILES[0]}.gz, ...), but is {root!r}"
    package = f" or `apt-get install {spec.package}` (Debian, Ubuntu)," if spec.package else ""
    files = _find(name, look, fetch, f"{need}. Set it,{package} or set `data.download: true`.", download, cache)

    def build(create: Create) -> None:
        for part, images_file, labels_file in (("train", *files[:2]), ("test", *files[2:])):
            images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
            if len(images) != len(labels) or not len(labels) or labels.max() >= 10:
                raise DataError(f"'{labels_file}' must hold a label less than 10 for each of {len(images)} images.")
            _store(create, part, _padded(images, image_size, images_file)[:, None], labels)

    depends = {"image_size": image_size, "files": fingerprint(files)}
    return _bundle(cached(name, depends, build, cache=cache), 10, spec.mean, spec.std)


def _cifar_set(name: str, spec: _Cifar, root: str | None, download: bool, cache: str | None) -> Bundle:
    target = _download_folder(root, cache)
    names = (*spec.train, spec.test)

    def look() -> list[Path] | None:
        for folder in (target / spec.folder, target):
            if (folder / spec.train[0]).is_file():
                return [folder, *(folder / file for file in names)]
        return [target / spec.archive] if (target / spec.archive).is_file() else None

    need = f"`data.root` must be a folder with {spec.folder}/ or {spec.archive}, but is {root!r}"
    message = f"{need}. Get the binary version of {spec.title} from {spec.url}, or set `data.download: true`."
    found = _find(
        name, look, lambda: _download([spec.url], target, spec.archive, spec.md5), message, download, cache
    )

    def build(create: Create) -> None:
        contents = read_members(found[0], spec.folder, names)
        for part, files in (("train", spec.train), ("test", (spec.test,))):
            parsed = [
                parse_cifar(
                    contents[file], label_bytes=spec.label_bytes, num_classes=spec.num_classes,
                    where=str(found[0] / file),
                )
                for file in files
            ]
            _store(create, part, np.concatenate([p[0] for p in parsed]), np.concatenate([p[1] for p in parsed]))

    arrays = cached(name, {"files": fingerprint(found[1:] or found)}, build, cache=cache)
    return _bundle(arrays, spec.num_classes, spec.mean, spec.std)


def _store(create: Create, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    create(f"{part}_images", images.shape, np.uint8)[:] = images
    create(f"{part}_labels", labels.shape, np.int64)[:] = labels


def _bundle(arrays: dict[str, np.ndarray], num_classes: int, mean: object, std: object) -> Bundle:
    train, test = (
        ArrayDataset(arrays[f"{p}_images"], arrays[f"{p}_labels"], num_classes=num_classes, mean=mean, std=std)
        for p in ("train", "test")
    )
    return Bundle(train, test)


def _padded(images: np.ndarray, size: int, file: Path) -> np.ndarray:
    """uint8 (n, 28, 28) with zeros around, as (n, size, size)."""
    if images.shape[1:] != (28, 28):
        raise DataError(f"'{file}' must hold images of 28 × 28, but has {images.shape[1]} × {images.shape[2]}.")
    before = (size - 28) // 2
    edges = (before, size - 28 - before)
    return np.pad(images, ((0, 0), edges, edges))


def _plain_or_gz(path: Path) -> tuple[Path, Path]:
    return path, path.with_name(path.name + ".gz")


def _download_folder(root: str | None, cache: str | None) -> Path:
    """Where downloads go, and where files are looked for."""
    return Path(root).expanduser() if root else cache_folder(cache) / "downloads"


def _find(
    name: str, look: Callable[[], list[Path] | None], fetch: Callable[[], None], message: str, download: bool,
    cache: str | None,
) -> list[Path]:
    """What ``look`` finds, after ``fetch`` if need be; one process of a node fetches, the others wait.

    Raises:
        DataError: With ``message`` if nothing is found.
    """
    files = look()
    if files is None and download:
        with lock(cache, f"{name}-download"):
            files = look()
            if files is None:
                fetch()
                files = look()
    if files is None:
        raise DataError(message)
    return files


def _torchvision_datasets() -> ModuleType:
    """The module torchvision.datasets.

    Raises:
        DataError: If it cannot be imported.
    """
    try:
        return importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"`data.download: true` needs torchvision, which cannot be imported: {error}. A CPU-only torch does not "
            "fit the package registry's torchvision: install both from the same index."
        ) from error


def _download(urls: Sequence[str], folder: Path, file: str, md5: str) -> None:
    """Fetch one file from the first of ``urls`` that gives it with the right MD5 sum; never leaves half a file.

    Raises:
        DataError: If none does.
    """
    download_url = _torchvision_datasets().utils.download_url
    failures = []
    for url in urls:
        try:
            download_url(url, folder / ".partial", file, md5)
            os.replace(folder / ".partial" / file, folder / file)
            return
        except (OSError, RuntimeError) as error:
            failures.append(f"{url}: {error}")
    raise DataError(f"'{file}' could not be downloaded to '{folder}': {'; '.join(failures)}.")
