from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dfed.region import WHOLE, Index, Slices, Whole

FULL = (4, 3, 5)

# Every region with the same region as plain lists of entries along each dimension.
REGIONS = [
    (WHOLE, (range(4), range(3), range(5))),
    (Slices(()), (range(4), range(3), range(5))),
    (Slices(((1, 3),)), (range(1, 3), range(3), range(5))),
    (Slices(((0, 4), (2, 3))), (range(4), range(2, 3), range(5))),
    (Slices(((3, 4), (0, 1), (4, 5))), ([3], [0], [4])),
    (Index(()), (range(4), range(3), range(5))),
    (Index(((2, 0),)), ([2, 0], range(3), range(5))),
    (Index((None, (2,))), (range(4), [2], range(5))),
    (Index(((3, 1), None, (4, 0, 2))), ([3, 1], range(3), [4, 0, 2])),
    (Index(((0, 1, 2, 3), (2, 1, 0), (0,))), (range(4), [2, 1, 0], [0])),
]


@pytest.mark.parametrize(("region", "entries"), REGIONS)
def test_regions_against_numpy(region, entries):
    reference = np.arange(60, dtype=np.float32).reshape(FULL)
    grid = np.ix_(*(list(axis) for axis in entries))
    expected = reference[grid]
    tensor = torch.from_numpy(reference.copy())
    assert region.shape(FULL) == expected.shape
    assert np.array_equal(region.view(tensor).numpy(), expected)
    assert torch.equal(tensor, torch.from_numpy(reference))  # looking changes nothing

    value = np.random.Generator(np.random.Philox(0)).standard_normal(expected.shape, dtype=np.float32)
    region.add_(tensor, torch.from_numpy(value))
    naive = reference.copy()
    for place in itertools.product(*(range(len(list(axis))) for axis in entries)):
        naive[tuple(list(axis)[i] for axis, i in zip(entries, place, strict=True))] += value[place]
    assert np.array_equal(tensor.numpy(), naive)

    region.put_(tensor, torch.from_numpy(value))
    assert np.array_equal(tensor.numpy()[grid], value)
    rest, kept = tensor.numpy().copy(), naive.copy()
    rest[grid] = kept[grid] = 0
    assert np.array_equal(rest, kept)  # the others stay as they were

    counts = torch.zeros(FULL, dtype=torch.float64)
    region.add_(counts, 2.5)
    region.add_(counts, 0.5)
    touched = np.zeros(FULL)
    touched[grid] = 3
    assert np.array_equal(counts.numpy(), touched)


def test_slices_are_views_and_indices_are_copies():
    tensor = torch.zeros(FULL)
    for region in (WHOLE, Slices(((1, 3), (0, 2)))):
        assert region.view(tensor).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert Index(((1, 2),)).view(tensor).untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_vectors_and_scalars():
    scalar = torch.tensor(2.0)
    for region in (WHOLE, Slices(()), Index(())):
        assert region.shape(()) == ()
        assert region.view(scalar).item() == 2.0
        target = torch.tensor(1.0)
        region.add_(target, scalar)
        assert target.item() == 3.0
    vector = torch.arange(5.0)
    assert Index(((4, 0),)).view(vector).tolist() == [4.0, 0.0]
    assert Slices(((1, 4),)).view(vector).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Slices(((0, 5),)), "bounds must lie in 0 … 4, but are 0 … 5"),
        (Slices(((-1, 2),)), "bounds must lie in 0 … 4, but are -1 … 2"),
        (Slices(((2, 2),)), "bounds must lie in 0 … 4, but are 2 … 2"),
        (Slices(((3, 1),)), "bounds must lie in 0 … 4, but are 3 … 1"),
        (Slices(((0, 4), (0, 3), (0, 6))), "bounds must lie in 0 … 5"),
        (Slices(((0, 1),) * 4), "4 dimensions does not fit a tensor of shape"),
        (Index(((4,),)), r"indices must be distinct, 0 … 3, and at least one, but are \(4,\)"),
        (Index(((0, -1),)), "indices must be distinct"),
        (Index(((1, 1),)), "indices must be distinct"),
        (Index((None, ())), "at least one"),
        (Index((None, None, (5,))), "0 … 4"),
        (Index((None,) * 4), "4 dimensions does not fit a tensor of shape"),
    ],
)
def test_regions_that_do_not_fit(region, message):
    with pytest.raises(ValueError, match=message):
        region.shape(FULL)


def test_equal_regions_are_equal_keys():
    assert {WHOLE: 1}[Whole()] == 1
    assert {Slices(((0, 2),)): 1}[Slices(((0, 2),))] == 1
    assert {Index(((0, 2), None)): 1}[Index(((0, 2), None))] == 1
    assert len({WHOLE, Slices(()), Slices(((0, 2),)), Slices(((0, 3),)), Index(()), Index(((0, 2),))}) == 6
