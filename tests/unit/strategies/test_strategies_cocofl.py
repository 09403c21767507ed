"""CoCoFL: which ranges are drawn, what their clients hold, train and send, and how those count that froze a block."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from depth_problem import Small, data

from dfed import rng
from dfed.comm.codecs import codec_of
from dfed.fleet import DeviceProfile
from dfed.planner import ClientPlanner, Limits
from dfed.planner.costs import with_batch
from dfed.strategies import Candidate
from dfed.strategies.cocofl import maximal_ranges


@pytest.fixture(scope="module")
def small():
    return Small("cocofl", frozen="fp32", client={"batch_size": 8, "learning_rate": 0.05})


def naive(count, fits):
    """By definition: all that fit, less those that lie in another."""
    able = [(i, j) for i in range(count) for j in range(i, count) if fits(i, j)]
    return [(i, j) for i, j in able if not any((a, b) != (i, j) and a <= i and j <= b for a, b in able)]


def test_maximal_ranges_against_their_definition():
    generator = rng.numpy_generator(0, "ranges")
    for _ in range(200):
        count = int(generator.integers(1, 12))
        costs, limit = generator.random(count), generator.random() * count / 2
        asked = []

        def fits(i, j, costs=costs, limit=limit, asked=asked):
            asked.append((i, j))
            return costs[i:j + 1].sum() <= limit

        assert maximal_ranges(count, fits) == naive(count, lambda i, j, costs=costs, limit=limit: costs[i:j + 1].sum() <= limit)
        assert len(asked) <= 2 * count
    asked = []
    assert maximal_ranges(20, lambda i, j: asked.append(1) or j - i < 4) == [(i, i + 3) for i in range(17)]
    assert len(asked) <= 40
    assert maximal_ranges(5, lambda i, j: True) == [(0, 4)]
    assert maximal_ranges(5, lambda i, j: False) == []
    assert maximal_ranges(5, lambda i, j: i >= 3 and j == i) == [(3, 3), (4, 4)]


def candidate(small, *, client=3, round_index=0, upload=None, **profile):
    device = DeviceProfile(**{"tier": "t", "budget_bytes": None, "flops": 1e9, "up": 1e6, "down": 1e6, "watts": 1.0,
                              "radio_watts": 1.0, "availability": 1.0, "dropout": 0.0, **profile})
    limits = Limits.of(small.costs, device, client, 20, deadline_s=None, upload_share=upload)
    planner = ClientPlanner(small.costs, device, 20, {}, limits)
    return Candidate(client, round_index, 20, device, planner)


def test_a_range_within_all_three_limits_is_drawn(small):
    strategy, state = small.strategy, small.strategy.init(small.values)
    count = len(small.chain)
    whole = strategy.plan(state, candidate(small))
    assert whole.train == small.chain.unit_names
    assert whole.options == {"first": 1, "last": count}
    free = candidate(small).planner
    peaks = {ends: small.costs.budget_bytes(plan) for ends, plan in strategy.plans.items()}
    for limits in ({"time_share": 0.7}, {"budget_bytes": sorted(peaks.values())[len(peaks) // 2]}, {"upload": 0.3},
                   {"time_share": 0.8, "upload": 0.6}):
        able = candidate(small, **limits).planner
        allowed = naive(count, lambda i, j, able=able: able.fits(strategy.plans[i, j]))
        assert len(allowed) > 0
        assert (0, count - 1) not in allowed
        drawn = [strategy.plan(state, candidate(small, round_index=number, **limits)) for number in range(60)]
        assert {(plan.options["first"] - 1, plan.options["last"] - 1) for plan in drawn} == set(allowed)
        again = strategy.plan(state, candidate(small, round_index=7, **limits))
        assert again == drawn[7]
        assert again.client == 3
        for plan in drawn:
            assert free.cost(plan).total_s <= limits.get("time_share", 9.0) * free.cost(strategy.full_plan()).total_s
            assert small.costs.message_bytes(plan)[1] <= limits.get("upload", 1.0) * small.costs.message_bytes(whole)[1]
    assert strategy.plan(state, candidate(small, upload=1e-6)) is None
    assert strategy.plan(state, candidate(small, budget_bytes=2**20)) is None


def test_only_the_range_moves_and_goes_up(small):
    strategy, (x, y) = small.strategy, data()
    names = small.chain.unit_names
    for first, last in itertools.combinations_with_replacement(range(len(names)), 2):
        plan = strategy.plans[first, last]
        plan = replace(plan, phases=tuple(replace(phase, epochs=None, steps=2) for phase in plan.phases))
        result, model = small.train(plan, x, y)
        trained = set(names[first:last + 1])
        assert {name.partition(".")[0] for name in result.update} == trained
        state = model.state_dict()
        for name, value in small.values.items():
            assert torch.equal(state[name], value) == (name.partition(".")[0] not in trained), name
        assert {entry.name for entry in small.forms.of(plan).up} == set(result.update)


def test_those_who_froze_a_block_vote_for_its_old_value(small):
    strategy = small.strategy
    old = strategy.init(small.values)
    moved = {name: value + 1.0 for name, value in old.params.items()}
    senders = {"conv0": 1, "conv1": 3, "conv2": 4}
    new = strategy.advance(old, replace(old, params=moved), {"clients": {"completed": 4}, "senders": senders})
    for name, value in old.params.items():
        share = senders.get(name.partition(".")[0], 0) / 4
        expected = value.double() + (share or 1.0)  # whom nobody trained did not move: what aggregation leaves stays
        assert torch.allclose(new.params[name].double(), expected, rtol=0, atol=1e-6), name  # sums of numbers near 1, float32
    assert np.isfinite(sum(float(value.sum()) for value in new.params.values()))


@pytest.mark.parametrize(("model", "options", "shape"), [
    ("cnn", {"channels": [8, 12, 16], "kernel": 3, "hidden": 32, "norm": "batch"}, (1, 16, 16)),
    ("resnet8", {"width": 8}, (3, 16, 16)), ("vit_tiny", {"depth": 3, "width": 96, "patch": 4}, (3, 16, 16)),
])
def test_around_a_range_units_compute_as_int8(model, options, shape):
    """The same loss and the same step as with float32, to the error of 8 bits, in less memory and fewer bytes down."""
    int8, fp32 = (Small("cocofl", model, options, shape=shape, frozen=frozen) for frozen in ("int8", "fp32"))
    names, (x, y) = int8.chain.unit_names, data(16, shape)
    middle, generator = len(names) // 2, rng.torch_generator(0, "noise")
    values = {name: value + 0.05 * torch.randn(value.shape, generator=generator) * ("running" not in name)
              for name, value in int8.values.items()}  # a ViT's classifier starts at zero, and would pass nothing on
    for first, last in ((middle, middle), (0, 0), (len(names) - 1, len(names) - 1), (0, len(names) - 1)):
        plan = int8.strategy.plans[first, last]
        plan = replace(plan, phases=tuple(replace(phase, epochs=None, steps=1) for phase in plan.phases))
        frozen = [name for name in names[1:-1] if name not in plan.train]
        assert dict(plan.down) == dict.fromkeys(frozen, "int8")
        (ours, model_int8), (theirs, _) = (each.train(plan, x, y, values=values) for each in (int8, fp32))
        assert set(ours.update) == set(theirs.update)
        held = (name for name, _ in model_int8.named_parameters() if name.partition(".")[0] in frozen)
        assert not [name for name in held if "conv.weight" in name]
        if not frozen:
            assert all(torch.equal(ours.update[name], theirs.update[name]) for name in theirs.update)
            continue
        assert float(ours.loss_sum) == pytest.approx(float(theirs.loss_sum), rel=0.05)
        moved = torch.cat([(theirs.update[name] - values[name]).flatten() for name in theirs.update])
        apart = torch.cat([(ours.update[name] - theirs.update[name]).flatten() for name in theirs.update])
        # Each layer is off by 1 to 2 %, ReLUs whose sign flips add theirs: some 10 % a unit passed, by measurement.
        assert float(apart.norm() / moved.norm()) < 0.4
        assert int8.costs.peak_bytes(plan) < fp32.costs.peak_bytes(plan)
        for size in (2, 60, 70, 300):  # a buffer of the kernels is as large as it gets from 64 images of the CNN on
            assert int8.costs.peak_bytes(with_batch(plan, size)) == int8.costs.peak_bytes_at(with_batch(plan, size))
        ours_down, theirs_down = (sum(each.forms.of(each.strategy.plans[first, last]).down_bytes(0, 0).values())
                                  for each in (int8, fp32))
        assert ours_down < theirs_down
        assert int8.costs.int8_flops(plan, 10) > 0
        total = int8.costs.flops(plan, 10) + int8.costs.int8_flops(plan, 10)
        assert total < int8.costs.flops(int8.strategy.full_plan(), 10)


def test_a_block_that_travelled_as_int8_has_the_codes_that_it_would_have_had():
    options = {"channels": [8, 12, 16], "kernel": 3, "hidden": 32, "norm": "batch"}
    small = Small("cocofl", "cnn", options, shape=(1, 16, 16))
    plan, (x, y) = small.strategy.plans[2, 2], data(8, (1, 16, 16))
    plan = replace(plan, phases=tuple(replace(phase, epochs=None, steps=1) for phase in plan.phases))
    through = dict(small.values)
    for entry in small.forms.of(plan).down:
        if entry.codec == "int8":
            codec, body = codec_of(entry.codec), torch.empty(entry.num_bytes, dtype=torch.uint8)
            codec.encode_into(small.values[entry.name], body, 0)
            through[entry.name] = codec.decode(body, entry.shape, 0)
            assert not torch.equal(through[entry.name], small.values[entry.name])
    (sent, _), (whole, _) = small.train(plan, x, y, values=through), small.train(plan, x, y)
    # A scale may differ in its last bit: the largest code times the scale, divided by 127 again.
    for name, value in whole.update.items():
        assert torch.allclose(sent.update[name], value, rtol=1e-4, atol=1e-6), name
    assert not small.strategy.plans[0, len(small.chain) - 1].down
    assert not Small("cocofl", "cnn", options, shape=(1, 16, 16), int8_download=False).strategy.plans[2, 2].down
