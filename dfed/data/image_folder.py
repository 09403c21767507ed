"""Your own images: a folder per class, decoded once into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from dfed.data.cache import Create, cached, fingerprint
from dfed.data.dataset import ArrayDataset, Bundle
from dfed.errors import DataError

__all__ = ["image_folder"]

_SUFFIXES = (".png", ".jpg", ".jpeg")


def image_folder(
    *,
    root: str | None,
    download: bool,
    cache: str | None,
    seed: int,
    image_size: Annotated[int, Field(ge=1)] = 32,
    channels: Literal[1, 3] = 3,
) -> Bundle:
    """Your own images in root/train/<class>/ and root/test/<class>/, as png or jpg.

    The classes are the folders of ``root/train``, numbered in the order of their names. Images are cropped to a
    square about their centre, resized (bilinear), and normalised by the mean and standard deviation of each channel
    over the training images.

    Args:
        root: The folder; must be given.
        download, seed: Not needed.
        cache: Folder for decoded data.
        image_size: Height and width in pixels.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: If there are no images, a test class that is not a training class, or an unreadable image.
    """
    folder = Path(root).expanduser() if root else None
    if folder is None or not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise DataError(f"`data.root` must be a folder that holds train/<class>/ and test/<class>/, but is {root!r}.")
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    parts = {part: _files(folder / part, classes) for part in ("train", "test")}
    files = [path for members in parts.values() for path, _ in members]
    depends = {"image_size": image_size, "channels": channels, "classes": classes, "files": fingerprint(files)}
    arrays = cached("image_folder", depends, lambda create: _decode(create, parts, image_size, channels), cache=cache)
    train, test = (
        ArrayDataset(
            arrays[f"{part}_images"], arrays[f"{part}_labels"],
            num_classes=len(classes), mean=arrays["mean"].tolist(), std=arrays["std"].tolist(),
        )
        for part in ("train", "test")
    )
    return Bundle(train, test)


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """All images of one part in a fixed order, each with its label."""
    present = sorted(path.name for path in folder.iterdir() if path.is_dir())
    extra = [name for name in present if name not in classes]
    if extra:
        raise DataError(f"'{folder / extra[0]}' must have a folder of the same name among the training classes.")
    members = [
        (path, label)
        for label, name in enumerate(classes)
        for path in (sorted((folder / name).iterdir()) if name in present else [])
        if path.suffix.lower() in _SUFFIXES
    ]
    if not members:
        raise DataError(f"'{folder}' must hold at least 1 image ({', '.join(_SUFFIXES)}) in a folder of its class.")
    return members


def _decode(create: Create, parts: dict[str, list[tuple[Path, int]]], image_size: int, channels: int) -> None:
    for part, members in parts.items():
        images = create(f"{part}_images", (len(members), channels, image_size, image_size), np.uint8)
        labels = create(f"{part}_labels", (len(members),), np.int64)
        total, squares = np.zeros(channels), np.zeros(channels)  # whole numbers, exact in float64
        for i, (path, label) in enumerate(members):
            images[i] = pixels = _read(path, image_size, channels)
            labels[i] = label
            total += pixels.sum(axis=(1, 2), dtype=np.int64)
            squares += np.square(pixels, dtype=np.int64).sum(axis=(1, 2))
        if part == "train":
            mean = total / (len(members) * image_size**2)
            spread = np.sqrt(np.maximum(squares / (len(members) * image_size**2) - mean**2, 0))
            create("mean", (channels,), np.float64)[:] = mean / 255
            create("std", (channels,), np.float64)[:] = np.maximum(spread, 1) / 255  # flat images have no spread


def _read(path: Path, image_size: int, channels: int) -> np.ndarray:
    """One image as uint8 (channels, image_size, image_size)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            grey_or_colour = image.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"'{path}' must be an image that can be read, but: {error}.") from error
    square = ImageOps.fit(grey_or_colour, (image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(square, dtype=np.uint8).reshape(image_size, image_size, channels)
    return pixels.transpose(2, 0, 1)
