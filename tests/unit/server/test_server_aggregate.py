import itertools

import numpy as np
import pytest
import torch

from dfed.comm.partial_sums import PartialSums, value_range, weight_scale
from dfed.region import WHOLE, Index, Segments, Slices
from dfed.rng import torch_generator
from dfed.server import Contribution, aggregate
from dfed.server.aggregate import _weights
from dfed.server.optimizers import adam, momentum, sgd
from dfed.state import ServerState

SHAPES = {"w": (6, 4), "b": (5,), "norm.mean": (4,), "untouched": (3,)}


def draw(shape, *keys):
    return torch.randn(shape, generator=torch_generator(4, "test", *keys))


def first_state(**fields):
    params = {name: draw(shape, name) for name, shape in SHAPES.items()}
    params["w"][5, 3] = -0.0
    params["w"][5, 2] = 1e-44  # a subnormal: to float64 and back it must stay what it is
    return ServerState(round_index=3, params=params, facts={"a": 1}, totals={"b": 2}, **fields)


CLIENTS = [
    (5, {"w": WHOLE, "b": Slices(((0, 3),)), "norm.mean": WHOLE}),
    (1, {"w": Slices(((0, 4), (1, 3))), "b": Slices(((0, 3),))}),
    (7, {"w": Index(((0, 3), None)), "norm.mean": Index(((2, 0),))}),
    (2, {"b": Index(((1,),)), "norm.mean": WHOLE}),
]
PARTIAL = [
    (5, {"w": Slices(((0, 2),)), "b": Slices(((0, 3),)), "norm.mean": Slices(((0, 2),))}),
    (3, {"w": Index(((4, 0), (1, 2))), "b": Slices(((2, 4),))}),
]


def updates(clients, state, value=None):
    return [
        {name: draw(region.shape(SHAPES[name]), name, number) if value is None else region.view(value[name]).clone()
         for name, region in regions.items()}
        for number, (_, regions) in enumerate(clients)
    ]


def run(clients, values, state, optimizer, names=tuple(SHAPES)):
    scale = weight_scale(sum(weight for weight, _ in clients))
    sums = PartialSums({name: SHAPES[name] for name in names})
    ranges = {name: value_range(state.params[name]) for name in SHAPES}
    for (weight, regions), update in zip(clients, values, strict=True):
        sums.add(update, regions, weight * scale, ranges)
    contributions = [Contribution(weight, regions) for weight, regions in clients]
    return aggregate(state, sums, contributions, scale, optimizer, {"norm.mean"})


def naive(clients, values, state):
    """Entry by entry: weighted mean over the holders in float64; None where there are none."""
    means = {}
    for name, shape in SHAPES.items():
        numbers = torch.arange(int(np.prod(shape))).reshape(shape)
        top, bottom = np.zeros(numbers.numel()), np.zeros(numbers.numel())
        for (weight, regions), update in zip(clients, values, strict=True):
            if name in regions:
                for place, value in zip(regions[name].view(numbers).reshape(-1).tolist(),
                                        update[name].reshape(-1).tolist(), strict=True):
                    top[place] += weight * value
                    bottom[place] += weight
        means[name] = [t / b if b else None for t, b in zip(top, bottom, strict=True)]
    return means


def test_weighted_mean_over_holders_and_uncovered_entries():
    for clients in (CLIENTS, PARTIAL):
        state = first_state()
        before = {name: value.clone() for name, value in state.params.items()}
        values = updates(clients, state)
        new = run(clients, values, state, sgd())
        assert (new.round_index, new.facts, new.totals) == (4, {"a": 1}, {"b": 2})
        kept = 0
        for name, mean in naive(clients, values, state).items():
            assert new.params[name].dtype == torch.float32
            assert new.params[name].shape == SHAPES[name]
            old = state.params[name].reshape(-1)
            assert torch.equal(old.view(torch.int32), before[name].reshape(-1).view(torch.int32))
            for place, (got, wanted) in enumerate(zip(new.params[name].reshape(-1), mean, strict=True)):
                if wanted is None:
                    kept += 1
                    assert got.view(torch.int32) == old[place].view(torch.int32)
                else:  # half a unit in the last place of float32, and 4 grid steps of 4e-12 over a weight of 1/16
                    assert abs(float(got) - wanted) <= 2.0**-24 * abs(wanted) + 3e-10
        assert kept >= 5  # those of `untouched`, and two of `b`


def test_all_orders_and_orders_of_contributions_give_the_same_bits():
    state = first_state()
    values = updates(CLIENTS, state)
    reference = run(CLIENTS, values, state, sgd())
    for order in itertools.permutations(range(len(CLIENTS))):
        new = run([CLIENTS[k] for k in order], [values[k] for k in order], state, sgd())
        for name in SHAPES:
            assert torch.equal(new.params[name].view(torch.int32), reference.params[name].view(torch.int32))


def test_identical_values_come_back_exactly():
    state = first_state()
    # Above 2^-10 half a unit in the last place (2^-35) is more than the error of four roundings to the grid (2^-39 each)
    # divided by the smallest share of the weight (1/16).
    wanted = {name: draw(shape, name, "value") for name, shape in SHAPES.items()}
    wanted = {name: torch.where(value.abs() < 2.0**-10, torch.ones(()), value) for name, value in wanted.items()}
    for clients in (CLIENTS, PARTIAL):
        new = run(clients, updates(clients, state, wanted), state, sgd())
        for name, value in wanted.items():
            covered = torch.zeros(SHAPES[name])
            for _, regions in clients:
                if name in regions:
                    regions[name].add_(covered, 1.0)
            assert torch.equal(new.params[name], torch.where(covered > 0, value, state.params[name]))


def test_buffers_take_the_mean_and_skip_the_server_optimiser():
    state = first_state()
    values = updates(CLIENTS, state)
    plain = run(CLIENTS, values, state, sgd())
    for optimizer in (momentum(learning_rate=0.5), adam(), sgd(learning_rate=0.5)):
        new = run(CLIENTS, values, state, optimizer)
        assert torch.equal(new.params["norm.mean"], plain.params["norm.mean"])
        assert "norm.mean" not in new.slots
        assert "untouched" not in new.slots
        mean, covered = plain.params["w"], torch.ones(6, 4, dtype=torch.bool)
        first = optimizer.init("w", state.params["w"])
        wanted, slots = optimizer.step("w", state.params["w"], mean, first, covered)
        assert torch.equal(new.params["w"], wanted)
        assert new.slots["w"].keys() == slots.keys()
        assert all(torch.equal(new.slots["w"][key], slots[key]) for key in slots)
        held = torch.tensor([True, True, True, False, False])
        assert torch.equal(new.params["b"][~held], state.params["b"][~held])
        for key, value in new.slots["b"].items():
            assert torch.equal(value[~held], optimizer.init("b", state.params["b"])[key][~held])
        # The second round goes on from the slots of the first.
        again = run(CLIENTS, values, new, optimizer)
        wanted, _ = optimizer.step("w", new.params["w"], mean, dict(new.slots["w"]), covered)
        assert torch.equal(again.params["w"], wanted)
        assert state.slots == {}


def test_nobody_completed_or_nothing_came_up():
    slots = {"w": {"m": torch.ones(6, 4)}}
    state = first_state(slots=slots)
    new = run([], [], state, momentum())
    assert new.round_index == 4
    assert new.slots == slots
    for name in SHAPES:
        assert new.params[name] is state.params[name]
    # A client without weight holds nothing: no division by zero.
    weightless = [(0, {"w": WHOLE}), (0, {"b": Slices(((0, 2),))})]
    new = run(weightless, updates(weightless, state), state, sgd())
    assert all(torch.equal(new.params[name], state.params[name]) for name in SHAPES)
    # Tensors that are not summed this round stay, whoever claims them.
    new = run(CLIENTS[:1], [{"b": torch.zeros(3)}], state, sgd(), names=("b",))
    assert new.params["w"] is state.params["w"]
    assert torch.equal(new.params["b"][:3], torch.zeros(3))


@pytest.mark.parametrize(("shape", "regions"), [
    ((), [WHOLE]),
    ((7,), [WHOLE, Slices(((2, 5),)), Segments((((0, 2), (4, 7)),)), Index(((1, 6, 3),))]),
    ((6, 5), [Slices(((0, 3), (1, 5))), Segments((((0, 1), (3, 6)), ((2, 3),))), Index((None, (4, 0))), Index(((5, 2), None))]),
    ((6, 5, 3, 3), [WHOLE, Slices(((0, 3), (1, 5))), Index(((5, 0, 3), (4, 0))), Slices(((0, 2),)), Index(((2,),))]),
    ((4, 5, 3), [Slices(((0, 3), (1, 5), (0, 2))), Index(((3, 0), (4, 0), (2, 1))), Segments((((1, 3),), ((0, 1), (2, 5)))),
                 WHOLE]),
])
def test_the_weights_behind_entries_are_those_added_up_region_by_region(shape, regions):
    for few in range(1, len(regions) + 1):
        held = {region: (3 + 2 * number) * 2.0**-7 for number, region in enumerate(regions[:few])}
        one_by_one = torch.zeros(shape, dtype=torch.float64)
        for region, weight in held.items():
            region.view(one_by_one)  # fits
            region.add_(one_by_one, weight)
        assert torch.equal(_weights(shape, held).expand(shape), one_by_one), few
