"""The built-in data set: 1797 scans of handwritten digits, which come with scikit-learn."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from dfed import rng
from dfed.data.cache import Create, cached
from dfed.data.dataset import ArrayDataset, Bundle, Subset
from dfed.errors import DataError

__all__ = ["digits", "stratified_split"]


def digits(
    *,
    root: str | None,
    download: bool,
    cache: str | None,
    seed: int,
    image_size: Annotated[int, Field(ge=8)] = 32,
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2,
) -> Bundle:
    """Handwritten digits, 1797 scans in 10 classes, from the scikit-learn wheel: no files, no network.

    The source is scikit-learn's ``load_digits`` (the test part of the UCI set "Optical Recognition of Handwritten
    Digits"), 8 × 8 pixels of 0 to 16, one channel. The images are normalised by the mean and standard deviation of
    all of them.

    Args:
        root, download: Not needed.
        cache: Folder for decoded data.
        seed: Keys the split.
        image_size: Height and width in pixels; 8 leaves the scans alone, more resizes them (bilinear).
        test_fraction: Part of every class that becomes the test set.

    Raises:
        DataError: If training or test set would be empty.
    """
    depends = {"scikit-learn": importlib.metadata.version("scikit-learn"), "image_size": image_size}
    arrays = cached("digits", depends, lambda create: _decode(create, image_size), cache=cache)
    whole = ArrayDataset(arrays["images"], arrays["labels"], num_classes=10)
    train, test = stratified_split(arrays["labels"], test_fraction, seed, "digits")
    if not len(train) or not len(test):
        step = 1 / int(np.bincount(arrays["labels"]).max())
        raise DataError(
            f"`data.test_fraction` must leave samples on both sides, as {step:.3g} to {1 - step:.3g} do, "
            f"but is {test_fraction}."
        )
    return Bundle(Subset(whole, train), Subset(whole, test))


def _decode(create: Create, image_size: int) -> None:
    scans = _scans()
    pixels, labels = np.ascontiguousarray(scans[:, :-1]), scans[:, -1].astype(np.int64)
    images = torch.from_numpy(pixels).to(torch.float32).view(-1, 1, 8, 8) / 16
    if image_size != 8:
        images = torch.nn.functional.interpolate(images, size=image_size, mode="bilinear", align_corners=False)
    images = (images - images.mean()) / images.std()
    create("images", tuple(images.shape), np.float32)[:] = images.numpy()
    create("labels", labels.shape, np.int64)[:] = labels


def _scans() -> np.ndarray:
    """Float64 (1797, 65): the pixels of each scan, then its label.

    Read from scikit-learn's file, where it is: to import scikit-learn for that takes a second.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels])


def stratified_split(labels: np.ndarray, fraction: float, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Split ``range(len(labels))`` in two, every class in the same proportion.

    Args:
        labels: Integers, (n,).
        fraction: Part of each class, in (0, 1), that goes to the second; rounded per class.
        seed, purpose: Key of the draw.

    Returns:
        Two sorted int64 arrays of indices: the rest, and the part drawn.
    """
    drawn = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = rng.numpy_generator(seed, "split", purpose, int(label)).permutation(len(members))
        drawn[members[order[: round(fraction * len(members))]]] = True
    return np.flatnonzero(~drawn), np.flatnonzero(drawn)
