import math
import random
from fractions import Fraction

import pytest
import torch

from dfed.comm.partial_sums import MIN_RANGE, PartialSums, SumsBuffer, check_update, check_values, value_range, weight_scale
from dfed.errors import SumsLost, UpdateRejected
from dfed.region import WHOLE, Index, Slices
from dfed.rng import torch_generator

GRID = MIN_RANGE * 2.0**-52
# No chunk of the implementation divides the first; the others are scalars, odd ends, and nothing at all.
SHAPES = {"long": (70_003,), "matrix": (37, 12), "scalar": (), "none": (0, 3)}


def adversarial(shape, seed):
    """float32 values over the whole range: tiny, huge, half-way between grid points, signed zeros, subnormal."""
    generator = torch_generator(seed, "test")
    count = math.prod(shape)
    exponents = torch.randint(-60, 13, (count,), generator=generator).double()
    value = torch.randn(count, generator=generator, dtype=torch.float64).clamp(-3.9, 3.9) * 2.0**-2 * 2.0**exponents
    steps = torch.randint(-(2**20), 2**20, (count,), generator=generator).double() * 2 + 1
    largest = MIN_RANGE / 2 * (1 - 2.0**-24)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, largest, -largest, GRID / 2, -GRID / 2, 1.0, -1.0])
    kind = torch.randint(0, 4, (count,), generator=generator)
    pick = special[torch.randint(0, len(special), (count,), generator=generator)].double()
    value = torch.where(kind == 0, steps * GRID / 2, torch.where(kind == 1, pick, value))
    return value.to(torch.float32).reshape(shape)


def clients(count, seed=0):
    """Updates with their regions and whole-number weights, of all kinds of regions."""
    made = []
    chance = random.Random(seed)
    for number in range(count):
        regions = {
            "long": chance.choice([WHOLE, Slices(((1, 66_000),)), Slices(((0, 70_003),))]),
            "matrix": chance.choice([
                WHOLE, Slices(((3, 20),)), Slices(((0, 37), (2, 9))), Index(((5, 0, 36), None)), Index((None, (11, 3))),
                Index(((7, 2), (0, 4, 1))),
            ]),
            "scalar": WHOLE,
            "none": WHOLE,
        }
        if chance.random() < 0.3:
            del regions["matrix"]
        update = {
            name: adversarial(region.shape(SHAPES[name]), 100 * seed + number) for name, region in regions.items()
        }
        made.append((update, regions, chance.choice([1, 2, 3, 7, 64, 999, 12_345])))
    return made


RANGES = dict.fromkeys(SHAPES, MIN_RANGE)


def folded(some, scale, last=None):
    """With ``last``, the number of the addition that is called the last one."""
    sums = PartialSums(SHAPES)
    for number, (update, regions, weight) in enumerate(some):
        sums.add(update, regions, weight * scale, RANGES, last=number == last)
    return sums.flat


def bits(tensor):
    return tensor.view(torch.int64)


@pytest.mark.parametrize("seed", [0, 1])
def test_any_order_and_any_grouping_give_the_same_bits(seed):
    made = clients(9, seed)
    scale = weight_scale(sum(weight for _, _, weight in made))
    reference = folded(made, scale).clone()
    assert reference.abs().max() > MIN_RANGE / 100  # far above the grid, and
    assert 0 < reference[reference != 0].abs().min() < 4 * GRID  # down to single grid steps
    chance = random.Random(seed)
    for size in (1, 2, 3, 5, 9):
        order = chance.sample(made, len(made))
        ranks = [[] for _ in range(size)]
        for client in order:
            chance.choice(ranks).append(client)
        parts = [folded(rank, scale, last=chance.choice([None, len(rank) - 1, 1])) for rank in ranks]
        chance.shuffle(parts)
        while len(parts) > 1:  # a reduction over the ranks, in any tree
            first, second = parts.pop(), parts.pop()
            parts.insert(chance.randrange(len(parts) + 1), first + second)
        assert torch.equal(bits(parts[0]), bits(reference))


def test_the_last_addition_brings_the_sums_to_their_values():
    made = [client for client in clients(15) if len(client[0]) == len(SHAPES)]
    assert len(made) >= 5
    for count in range(1, 6):
        sums = PartialSums(SHAPES)
        for number, (update, regions, weight) in enumerate(made[:count], start=1):
            sums.add(update, regions, weight / 2**20, RANGES, last=number == count)
        assert not sums._waiting
        whole = {name for name in SHAPES if all(regions[name] is WHOLE for _, regions, _ in made[:count])}
        assert whole
        assert not whole & set(sums._offsets)
        assert torch.equal(bits(sums.flat), bits(folded(made[:count], 2**-20)))


def test_sums_may_be_read_in_between_and_cleared():
    made = clients(5)
    scale = weight_scale(sum(weight for _, _, weight in made))
    reference = folded(made, scale).clone()
    sums = PartialSums(SHAPES)
    for _ in range(2):
        for update, regions, weight in made:
            sums.add(update, regions, weight * scale, RANGES)
            assert sums["matrix"].shape == (37, 12)
        assert torch.equal(bits(sums.flat), bits(reference))
        assert torch.equal(sums["long"], reference[:70_003])
        assert torch.equal(sums["scalar"], reference[70_003 + 37 * 12])
        sums.clear()
        assert not bits(sums.flat).any()  # +0.0 throughout
    sums.flat.add_(reference)  # what a reduction does to the server's buffer
    assert torch.equal(sums["matrix"].reshape(-1), reference[70_003:70_003 + 37 * 12])


def test_memory_layout_of_a_value_does_not_matter():
    value = adversarial((37, 12), 5)
    results = []
    for laid_out in (value, value.T.contiguous().T, torch.stack([value, value], dim=2)[:, :, 0]):
        assert torch.equal(laid_out, value)
        sums = PartialSums({"matrix": (37, 12)})
        sums.add({"matrix": laid_out}, {"matrix": WHOLE}, 12_345 * weight_scale(30_000), RANGES)
        results.append(bits(sums.flat).clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_sums_against_exact_fractions():
    made = clients(7, seed=3)
    total = sum(weight for _, _, weight in made)
    scale = weight_scale(total)
    sums = PartialSums(SHAPES)
    for update, regions, weight in made:
        sums.add(update, regions, weight * scale, RANGES)
    exact = {name: {} for name in ("long", "matrix", "scalar")}
    size, holders = dict.fromkeys(exact, 0.0), dict.fromkeys(exact, 0)
    probes = {"long": [0, 1, 63, 64, 65_535, 65_536, 65_999, 70_001, 70_002, *range(1000, 1100)],
              "matrix": range(37 * 12), "scalar": [0]}
    for name, places in probes.items():
        numbers = torch.arange(math.prod(SHAPES[name])).reshape(SHAPES[name])
        for place in places:
            exact[name][place] = Fraction(0)
        for update, regions, weight in made:
            if name not in update:
                continue
            holders[name] += 1
            covered = regions[name].view(numbers).reshape(-1).tolist()
            values = dict(zip(covered, update[name].reshape(-1).tolist(), strict=True))
            for place in places:
                exact[name][place] += Fraction(values.get(place, 0.0)) * weight * Fraction(scale)
                size[name] = max(size[name], abs(values.get(place, 0.0)) * weight * scale)
    for name, wanted in exact.items():
        got = sums[name].reshape(-1)
        # Half a grid step for each client, and a few units in the last place of float64 of the products.
        bound = Fraction(holders[name]) * (Fraction(GRID) / 2 + Fraction(size[name]) * Fraction(2) ** -51)
        for place, value in wanted.items():
            assert abs(Fraction(float(got[place])) - value) <= bound
            assert (Fraction(float(got[place])) / Fraction(GRID)).denominator == 1  # on the grid


def test_naive_float64_mean_within_the_grid():
    generator = torch_generator(9, "test")
    values = [torch.randn(5000, generator=generator) for _ in range(12)]
    weights = [3, 50, 7, 1, 20, 20, 11, 400, 2, 2, 9, 75]
    scale = weight_scale(sum(weights))
    sums = PartialSums({"w": (5000,)})
    for value, weight in zip(values, weights, strict=True):
        sums.add({"w": value}, {"w": WHOLE}, weight * scale, {"w": MIN_RANGE})
    naive = sum(value.double() * weight for value, weight in zip(values, weights, strict=True)) * scale
    # 12 products, each off by half a grid step at most; float64 of values of order 1 adds 1e-15.
    assert (sums["w"] - naive).abs().max() <= 12 * GRID / 2 + 1e-14


def test_refused_updates_leave_no_trace():
    made = clients(2)
    scale = weight_scale(20_000)
    reference = folded(made, scale).clone()
    sums = PartialSums(SHAPES)
    for update, regions, weight in made:
        sums.add(update, regions, weight * scale, RANGES)
    for bad, reason in ((math.nan, "non_finite"), (math.inf, "non_finite"), (-math.inf, "non_finite"),
                        (MIN_RANGE / 2, "out_of_range"), (-MIN_RANGE / 2, "out_of_range"), (3e38, "out_of_range")):
        for place in (0, 69_999, 70_002):
            # What is good comes first, a tensor and the beginning of another, and must be taken out again.
            update = {"scalar": torch.tensor(1 / 3), "long": torch.randn(70_003, generator=torch_generator(place, "update"))}
            update["long"][place] = bad
            with pytest.raises(UpdateRejected, match="tensor 'long' must") as caught:
                sums.add(update, {"scalar": WHOLE, "long": WHOLE}, scale, RANGES)
            assert caught.value.reason == reason
    assert torch.equal(bits(sums.flat), bits(reference))
    check_values("x", torch.tensor([MIN_RANGE / 2 * (1 - 2.0**-24)]), MIN_RANGE)
    check_values("x", torch.empty(0), MIN_RANGE)


def test_range_and_weight_scale():
    for largest in (0.0, 1e-30, 1.0, 255.9, 256.0, 257.0, 3e4, 1e30, 3.4e38):
        for sign in (1, -1):
            limit = value_range(torch.tensor([0.0, sign * largest]))
            assert math.frexp(limit)[0] == 0.5  # a power of two
            assert limit >= max(MIN_RANGE, 64 * float(torch.tensor(largest)))
            assert limit == MIN_RANGE or limit < 2 * 64 * float(torch.tensor(largest)) * (1 + 1e-6)
    assert value_range(torch.empty(0)) == MIN_RANGE
    for total in [1, 2, 3, 4, 5, 1023, 1024, 1025, 10**6, 2**40 + 1]:
        scale = weight_scale(total)
        assert math.frexp(scale)[0] == 0.5
        assert 0.5 < total * scale <= 1
    assert weight_scale(0) == 1.0  # nobody: nothing to scale


def test_a_wider_range_has_a_wider_grid():
    big = torch.tensor([1e6, 1.0, -3e7])
    limit = value_range(big)
    values = [big + 0.1 * k for k in range(3)]
    forward, backward = PartialSums({"w": (3,)}), PartialSums({"w": (3,)})
    for value in values:
        forward.add({"w": value}, {"w": WHOLE}, 0.25, {"w": limit})
    for value in reversed(values):
        backward.add({"w": value}, {"w": WHOLE}, 0.25, {"w": limit})
    assert torch.equal(bits(forward.flat), bits(backward.flat))
    naive = sum(value.double() for value in values) * 0.25
    assert (forward["w"] - naive).abs().max() <= 3 * limit * 2.0**-53 + 1e-8  # grid; float64 of 3e7


def test_the_memory_of_sums_is_kept_and_cleared():
    buffer, shapes = SumsBuffer(), {"a": (2, 3), "b": (4,)}
    first = buffer.of(shapes)
    first.flat.add_(1.0)
    second = buffer.of(shapes)
    assert second is first
    assert not second.flat.any()
    third = buffer.of({"a": (2, 3)})
    assert third is not first
    assert list(third.shapes) == ["a"]


def test_an_addition_that_breaks_off_is_no_clients_fault(monkeypatch):
    sums = PartialSums({"a": (3,), "b": (3,)})
    update, regions = {"a": torch.ones(3), "b": torch.ones(3)}, {"a": WHOLE, "b": WHOLE}
    sums.add(update, regions, 0.25, {"a": MIN_RANGE, "b": MIN_RANGE})
    calls = []

    def fails(*arguments):
        calls.append(1)
        raise MemoryError("no")

    monkeypatch.setattr(PartialSums, "_add_flat", fails)
    with pytest.raises(SumsLost, match="MemoryError: no"):
        sums.add(update, regions, 0.25, {"a": MIN_RANGE, "b": MIN_RANGE}, last=True)
    assert calls


@pytest.mark.parametrize(("num_bytes", "waits"), [(2**28, 4), (2 * 400 + 1, 3), (2 * 400, 2), (1, 2)])
def test_few_updates_wait_where_they_are_large(num_bytes, waits, monkeypatch):
    monkeypatch.setattr("dfed.comm.partial_sums._WAITING_BYTES", num_bytes)
    sums, waiting = PartialSums({"a": (100,)}), []
    for number in range(8):
        sums.add({"a": torch.full((100,), 1.0 + number)}, {"a": WHOLE}, 0.125, {"a": MIN_RANGE})
        waiting.append(len(sums._waiting))
    assert waiting == [number % waits for number in range(1, 9)]
    assert torch.equal(sums["a"], torch.full((100,), 4.5, dtype=torch.float64))


def test_small_updates_are_looked_at_as_a_whole(monkeypatch):
    monkeypatch.setattr("dfed.comm.partial_sums.check_values", None)
    many = {str(number): torch.full((100,), 0.24 * MIN_RANGE / 100) for number in range(100)}
    update = {**many, "empty": torch.empty(0), "scalar": torch.tensor(0.0)}
    check_update(update, dict.fromkeys(update, MIN_RANGE))


def test_an_update_is_refused_by_the_tensor_and_its_own_range():
    ranges = {"a": MIN_RANGE, "b": 4 * MIN_RANGE, "empty": MIN_RANGE}
    update = {"a": torch.ones(3), "b": torch.full((3,), 1.9 * MIN_RANGE), "empty": torch.empty(0)}
    check_update(update, ranges)
    check_update({}, {})
    for share in (0.5, 0.6, 3.9):  # of its own range the least that is too much, and what others may have
        with pytest.raises(UpdateRejected, match="tensor 'a'"):
            check_update({"a": torch.tensor([share * MIN_RANGE]), "b": torch.ones(3)}, ranges)
    check_update({"a": torch.tensor([0.49 * MIN_RANGE]), "b": torch.ones(3)}, ranges)
    for bad, reason in ((2 * MIN_RANGE, "out_of_range"), (math.nan, "non_finite"), (-math.inf, "non_finite")):
        for name in ("a", "b"):
            with pytest.raises(UpdateRejected, match=f"tensor '{name}'") as caught:
                check_update({**update, name: torch.tensor([0.0, bad, 0.0])}, ranges)
            assert caught.value.reason == reason


def test_clearing_forgets_an_update_that_waits():
    sums = PartialSums({"a": (3,)})
    sums.add({"a": torch.ones(3)}, {"a": WHOLE}, 0.25, {"a": MIN_RANGE})
    sums.clear()
    assert not sums.flat.any()
