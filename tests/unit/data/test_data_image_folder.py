"""Folders of the user's own images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfed.data import load
from dfed.errors import DataError


@pytest.fixture
def given(tmp_path):
    return {"root": str(tmp_path / "root"), "download": False, "cache": str(tmp_path / "cache"), "seed": 0}


def _all(dataset):
    x, y = dataset.batch(np.arange(dataset.num_samples))
    return x.numpy(), y.numpy()


def _image(path, colour, size=(10, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_image_folder(given):
    root = Path(given["root"])
    _image(root / "train" / "cat" / "b.png", (200, 0, 0), size=(40, 20))
    _image(root / "train" / "cat" / "a.PNG", (100, 50, 0))
    _image(root / "train" / "dog" / "c.jpg", (0, 0, 0))
    _image(root / "test" / "dog" / "d.png", 100, mode="L")
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    splits = load("image_folder", {"image_size": 16}, **given)
    assert (splits.train.shape, splits.train.num_classes, splits.train.num_samples) == ((3, 16, 16), 2, 3)
    x, y = _all(splits.train)
    np.testing.assert_array_equal(y, [0, 0, 1])
    flat = np.array([[100, 50, 0], [200, 0, 0], [0, 0, 0]])  # sorted by class, then by name
    std = np.maximum(flat.std(axis=0), 1)
    # float32 roundings of values up to 1.4
    np.testing.assert_allclose(x[:, :, 8, 8], (flat - flat.mean(axis=0)) / std, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(x, np.broadcast_to(x[:, :, :1, :1], x.shape))
    np.testing.assert_array_equal(_all(splits.test)[1], [1])
    grey = load("image_folder", {"image_size": 4, "channels": 1}, **given)
    assert grey.train.shape == (1, 4, 4)

    (root / "train" / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DataError, match=r"broken.png' must be an image that can be read"):
        load("image_folder", {}, **given)
    (root / "train" / "dog" / "broken.png").unlink()
    _image(root / "test" / "fish" / "d.png", (0, 0, 0))
    with pytest.raises(DataError, match="fish' must have a folder of the same name among the training classes"):
        load("image_folder", {}, **given)
    for path in (root / "test").rglob("*.png"):
        path.unlink()
    (root / "test" / "fish").rmdir()
    with pytest.raises(DataError, match="test' must hold at least 1 image"):
        load("image_folder", {}, **given)
    for wrong in (None, str(root / "train")):
        with pytest.raises(DataError, match=r"`data.root` must be a folder that holds train/<class>/"):
            load("image_folder", {}, **(given | {"root": wrong}))
