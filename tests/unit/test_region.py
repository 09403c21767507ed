from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dfed import rng
from dfed.region import WHOLE, Index, Segments, Slices, Whole, region_of

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
    (Segments(()), (range(4), range(3), range(5))),
    (Segments((((1, 3),),)), ([1, 2], range(3), range(5))),
    (Segments((((0, 1), (3, 4)),)), ([0, 3], range(3), range(5))),
    (Segments((((0, 4),), ((0, 1), (2, 3)))), (range(4), [0, 2], range(5))),
    (Segments((((0, 2), (3, 4)), ((1, 2),), ((0, 1), (2, 3), (4, 5)))), ([0, 1, 3], [1], [0, 2, 4])),
    (Segments((((1, 2), (3, 4)), ((0, 1), (2, 3)))), ([1, 3], [0, 2], range(5))),
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
    one_run, two_runs = Segments((((1, 3),), ((0, 2),))), Segments((((0, 1), (2, 3)),))
    assert one_run.view(tensor).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert two_runs.view(tensor).untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    assert Index(((1, 2),)).view(tensor).untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_vectors_and_scalars():
    scalar = torch.tensor(2.0)
    for region in (WHOLE, Slices(()), Index(()), Segments(())):
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
        (Segments((((0, 5),),)), "runs must be ascending, apart, and lie in 0 … 4"),
        (Segments((((-1, 2),),)), "lie in 0 … 4"),
        (Segments((((2, 2),),)), "ascending"),
        (Segments((((2, 3), (0, 1)),)), "ascending"),
        (Segments((((0, 2), (2, 3)),)), "apart"),
        (Segments((((0, 3), (2, 4)),)), "apart"),
        (Segments(((),)), "ascending"),
        (Segments((((0, 4),), ((0, 1), (2, 4)))), "lie in 0 … 3"),
        (Segments((((0, 1),),) * 4), "4 dimensions does not fit a tensor of shape"),
    ],
)
def test_regions_that_do_not_fit(region, message):
    with pytest.raises(ValueError, match=message):
        region.shape(FULL)


def test_equal_regions_are_equal_keys():
    assert {WHOLE: 1}[Whole()] == 1
    assert {Slices(((0, 2),)): 1}[Slices(((0, 2),))] == 1
    assert {Index(((0, 2), None)): 1}[Index(((0, 2), None))] == 1
    assert {Segments((((0, 1), (2, 3)),)): 1}[Segments((((0, 1), (2, 3)),))] == 1
    others = {WHOLE, Slices(()), Slices(((0, 2),)), Slices(((0, 3),)), Index(()), Index(((0, 2),)), Segments((((0, 2),),))}
    assert len(others) == 7


def random_axis(generator, size):
    """None, everything, a run, a wrapped run, scattered entries or every other one: ascending and distinct."""
    count, start = (int(generator.integers(1, size + 1)), int(generator.integers(size)))
    kind = int(generator.integers(6))
    if kind == 0:
        return None
    chosen = {1: np.arange(size), 2: start + np.arange(min(count, size - start)), 3: (start + np.arange(count)) % size,
              4: generator.choice(size, count, replace=False), 5: np.arange(0, size, 2)}[kind]
    return np.sort(chosen)


def kinds_of(axes, shape):
    """The documented choice, from runs counted the plain way; among boxes that are neither few nor many, size decides."""
    lists = [list(range(size)) if axis is None else axis.tolist() for axis, size in zip(axes, shape, strict=False)]
    if all(len(entries) == size for entries, size in zip(lists, shape, strict=False)):
        return {Whole}
    boxes = math.prod(sum(entry - 1 not in entries for entry in entries) for entries in lists)
    if boxes == 1:
        return {Slices}
    return {Segments} if boxes <= 9 else {Index} if boxes > 64 else {Segments, Index}


def test_region_of_random_axes():
    seen = {Whole: 0, Slices: 0, Segments: 0, Index: 0}
    for trial in range(600):
        generator = rng.numpy_generator(3, "axes", trial)
        shape = tuple(int(size) for size in generator.integers(1, 30, size=int(generator.integers(1, 4))))
        axes = [random_axis(generator, size) for size in shape[:int(generator.integers(0, len(shape) + 1))]]
        region = region_of(axes, shape)
        assert type(region) in kinds_of(axes, shape)
        seen[type(region)] += 1
        spelt_out = [np.arange(size) if axis is None else axis for axis, size in zip(axes, shape, strict=False)]
        grid = np.ix_(*spelt_out, *(np.arange(size) for size in shape[len(axes):]))
        reference = generator.standard_normal(shape)
        tensor, expected = torch.from_numpy(reference.copy()), reference[grid]
        assert region.shape(shape) == expected.shape
        assert np.array_equal(region.view(tensor).numpy(), expected)
        value = generator.standard_normal(expected.shape)
        if trial % 2:  # neither the sums nor the values of an update need be contiguous
            tensor = tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
            region.add_(tensor, torch.from_numpy(np.asfortranarray(value)))
        else:
            region.add_(tensor, torch.from_numpy(value))
        reference[grid] += value
        assert np.array_equal(tensor.numpy(), reference)
        region.add_(tensor, 0.5)
        reference[grid] += 0.5
        assert np.array_equal(tensor.numpy(), reference)
        region.put_(tensor, torch.from_numpy(value))
        reference[grid] = value
        assert np.array_equal(tensor.numpy(), reference)
        if type(region) is not Index:  # whichever way "all" is said, entries are visited once in an aggregation
            assert region == region_of(spelt_out, shape)
            assert hash(region) == hash(region_of(spelt_out, shape))
    assert min(seen.values()) >= 20
    assert region_of([], (3, 4)) is region_of([None, np.arange(4)], (3, 4)) is WHOLE
    assert region_of([np.array([0, 2])], (3, 4)) == Segments((((0, 1), (2, 3)),))  # whole dimensions at the end are not named
    assert region_of([None, np.array([1, 2])], (3, 4)) == Slices(((0, 3), (1, 3)))
