"""Mini-batches of a client, and augmentation."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from dfed.data import AUGMENTATIONS, ArrayDataset, client_batches
from dfed.data import batches as batches_module
from dfed.data.augment import PADDING
from dfed.rng import torch_generator


@pytest.fixture
def dataset():
    # Every pixel of sample i is i, so a batch tells which samples it holds.
    images = np.broadcast_to(np.arange(100, dtype=np.float32).reshape(-1, 1, 1, 1), (100, 2, 6, 5)).copy()
    return ArrayDataset(images, np.arange(100) % 7, num_classes=7)


def _ids(batches):
    out = []
    for x, y in batches:
        ids = x[:, 0, 0, 0].long()
        assert torch.equal(x, ids.view(-1, 1, 1, 1).expand_as(x).float())
        assert torch.equal(y, ids % 7)
        out.append(ids.tolist())
    return out


@pytest.fixture(params=["gathered", "batch by batch"])
def source(request, monkeypatch):
    if request.param == "batch by batch":
        monkeypatch.setattr(batches_module, "_GATHER_BYTES", 0)


@pytest.mark.usefixtures("source")
def test_epochs_go_through_all_samples_in_a_new_order(dataset):
    indices = np.arange(90, 67, -1)
    state = torch.get_rng_state()
    generator = torch_generator(0, "test")
    epochs = _ids(client_batches(dataset, indices, batch_size=10, generator=generator, epochs=3))
    assert torch.equal(state, torch.get_rng_state())
    assert [len(b) for b in epochs] == [10, 10, 3] * 3
    orders = [list(chain.from_iterable(epochs[3 * e : 3 * e + 3])) for e in range(3)]
    for order in orders:
        assert sorted(order) == sorted(indices)
    assert len({tuple(order) for order in orders}) == 3
    again = _ids(client_batches(dataset, indices, batch_size=10, generator=torch_generator(0, "test"), epochs=3))
    other = _ids(client_batches(dataset, indices, batch_size=10, generator=torch_generator(1, "test"), epochs=3))
    assert epochs == again != other
    # The reference: the generator's own permutations.
    reference = torch_generator(0, "test")
    assert orders == [indices[torch.randperm(23, generator=reference).numpy()].tolist() for _ in range(3)]


@pytest.mark.usefixtures("source")
def test_steps_cycle_through_epochs(dataset):
    def batches(**length):
        return _ids(
            client_batches(dataset, np.arange(23), batch_size=10, generator=torch_generator(0, "x"), **length)
        )

    assert batches(steps=7) == batches(epochs=3)[:7]
    assert batches(steps=0) == batches(epochs=0) == []
    dropped = batches(epochs=2, drop_last=True)
    assert [len(b) for b in dropped] == [10] * 4
    assert dropped[:2] == batches(epochs=1)[:2]
    assert len(batches(steps=5, drop_last=True)) == 5


def test_a_small_client_keeps_its_only_batch(dataset):
    for drop_last in (False, True):
        got = client_batches(
            dataset, np.arange(3), batch_size=10, generator=torch_generator(0, "x"), steps=2, drop_last=drop_last
        )
        assert [sorted(b) for b in _ids(got)] == [[0, 1, 2]] * 2


def test_gathered_and_read_batch_by_batch_are_the_same(dataset, monkeypatch):
    def batches():
        return list(
            client_batches(
                dataset, np.arange(40, 80), batch_size=16, generator=torch_generator(0, "x"), epochs=2,
                augment=AUGMENTATIONS["crop_flip"],
            )
        )  # fmt: skip

    gathered = batches()
    monkeypatch.setattr(batches_module, "_GATHER_BYTES", 0)
    for (x, y), (x2, y2) in zip(gathered, batches(), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


@pytest.mark.usefixtures("source")
def test_batches_may_be_changed(dataset):
    generator = torch_generator(0, "x")
    batches = client_batches(dataset, np.arange(10), batch_size=5, generator=generator, epochs=2)
    for _ in range(2):
        next(batches)[0].fill_(-1)
    assert sorted(chain.from_iterable(_ids(batches))) == list(range(10))


def test_misuse_is_an_assertion(dataset):
    good = {"batch_size": 2, "generator": torch_generator(0, "x"), "epochs": 1}
    for wrong in ({"steps": 3}, {"epochs": None}, {"batch_size": 0}):
        with pytest.raises(AssertionError):
            client_batches(dataset, np.arange(4), **(good | wrong))
    with pytest.raises(AssertionError, match="at least 1 sample"):
        client_batches(dataset, np.arange(0), **good)


def _images(count=300):
    return torch.randn(count, 3, 8, 6, generator=torch_generator(0, "images"))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_keyed_and_leaves_its_input_alone(name):
    images = _images()
    before, state = images.clone(), torch.get_rng_state()
    augment = AUGMENTATIONS[name]
    first = augment(images, torch_generator(0, "a"))
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert torch.equal(images, before)
    assert torch.equal(first, augment(images, torch_generator(0, "a")))
    assert torch.equal(state, torch.get_rng_state())
    if name == "none":
        assert first is images
    else:
        assert not torch.equal(first, augment(images, torch_generator(1, "a")))
        assert augment(images[:1], torch_generator(0, "a")).shape == (1, 3, 8, 6)


def test_flip_mirrors_half_of_the_samples():
    images = _images()
    out = AUGMENTATIONS["flip"](images, torch_generator(0, "a"))
    mirrored = 0
    for image, result in zip(images, out, strict=True):
        assert torch.equal(result, image) or torch.equal(result, image.flip(-1))
        mirrored += not torch.equal(result, image)
    assert abs(mirrored - 150) < 5 * np.sqrt(75)  # binomial, five deviations


@pytest.mark.parametrize("name", ["crop", "crop_flip"])
def test_crop_takes_a_window_of_the_padded_image(name):
    images = _images()
    out = AUGMENTATIONS[name](images, torch_generator(0, "a"))
    seen = {}
    for image, result in zip(images.numpy(), out.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
        windows = {
            (top, left, flip): padded[:, top : top + 8, left : left + 6][:, :, :: -1 if flip else 1]
            for top in range(9)
            for left in range(9)
            for flip in ([0, 1] if name == "crop_flip" else [0])
        }
        found = [place for place, window in windows.items() if np.array_equal(window, result)]
        assert found
        seen[found[0]] = seen.get(found[0], 0) + 1
    for axis in (0, 1):
        assert {place[axis] for place in seen} == set(range(9))
    # 300 draws from 81 windows or more: were two samples tied, far fewer would be seen.
    assert len(seen) > 60
