"""InclusiveFL: what sizes share, and what a size learns from the next larger one, by hand."""

import json

import pytest
import torch
from depth_problem import CNN, Small, data

from dfed.comm.partial_sums import PartialSums, value_range, weight_scale
from dfed.plan import Plan
from dfed.registry import STRATEGIES
from dfed.server import Contribution, aggregate
from dfed.server.optimizers import sgd
from dfed.settings import settings_of
from dfed.state import ServerState

STATE = ServerState(round_index=0, params={})
ALIKE = {**CNN, "channels": [4, 4, 4, 4], "pool": "last"}  # conv1 … conv3 have one shape, conv0 has one input channel


def test_plans_and_sub_models():
    small = Small("inclusivefl")
    strategy = small.strategy
    assert not strategy.keeps_state
    holds = [("size1_last", "size1_head"), ("conv0", "size2_last", "size2_head"),
             ("conv0", "conv1", "size3_last", "size3_head"), small.chain.unit_names]
    for size, hold in enumerate(holds, start=1):
        plan = strategy.plan_at(size, 2)
        assert (plan.hold, plan.train, plan.client) == (hold, hold, 2)
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        model = strategy.build(plan)
        assert model.unit_names == hold
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
        assert {name for name in model.state_dict() if "num_batches" not in name} == {e.name for e in small.forms.of(plan).up}
        assert small.model(plan, torch.float32)(data()[0]).shape == (8, 3)
    assert strategy.evaluated(STATE) == strategy.variants(STATE)["size4"] == strategy.full_plan()
    assert list(strategy.variants(STATE)) == ["size1", "size2", "size3", "size4"]


def test_the_largest_that_fits():
    small = Small("inclusivefl", options={**CNN, "hidden": 256}, client={"momentum": 0.9})
    needed = [small.costs.budget_bytes(small.strategy.plan_at(size)) for size in range(1, 5)]
    for budget, size in ((None, 4), (needed[3], 4), (needed[3] - 1, 3), (needed[0], 1)):
        assert small.strategy.plan(STATE, small.candidate(budget)) == small.strategy.plan_at(size, 3)
    assert small.strategy.plan(STATE, small.candidate(min(needed) - 1)) is None


def test_an_own_layer_starts_as_the_full_models():
    small = Small("inclusivefl")
    state = small.strategy.init(small.values)
    for size, unit in ((1, "conv0"), (2, "conv1"), (3, "conv2")):
        own = {name: value for name, value in state.params.items() if name.startswith(f"size{size}_last.")}
        assert own
        for name, value in own.items():
            shared = state.params[name.replace(f"size{size}_last", unit)]
            assert torch.equal(value, shared)
            assert value is not shared
    assert all(state.params[name] is value for name, value in small.values.items() if "_last." not in name)


def test_a_size_trains_as_a_model_of_its_own():
    small = Small("inclusivefl", client={"steps": 2, "momentum": 0.9})
    plan, (x, y) = small.strategy.plan_at(2), data()
    result, _ = small.train(plan, x, y)
    model = small.model(plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        scores = model.size2_head(model.size2_last(model.conv0(x.double())))
        torch.nn.functional.cross_entropy(scores, y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        if value.is_floating_point():  # float32 against float64, two steps
            torch.testing.assert_close(result.update[name].double(), value, rtol=1e-4, atol=2e-6)


def moved(values, amount):
    generator = torch.Generator().manual_seed(int(amount * 1000))
    return {name: value + amount * torch.randn(value.shape, generator=generator) for name, value in values.items()}


def test_tensors_are_averaged_over_the_sizes_that_hold_them():
    small = Small("inclusivefl")
    state, sums = small.strategy.init(small.values), PartialSums(small.shapes)
    plans, weights, scale = [small.strategy.plan_at(size) for size in (2, 3, 4)], [3, 5, 2], weight_scale(10)
    ranges = {name: value_range(value) for name, value in state.params.items()}
    sent, contributions = [], []
    for plan, weight in zip(plans, weights, strict=True):
        form, values = small.forms.of(plan), moved(state.params, 0.01 * weight)
        sent.append({entry.name: values[entry.name] for entry in form.up})
        sums.add(sent[-1], form.regions, weight * scale, ranges)
        contributions.append(Contribution(weight, {entry.name: form.regions[entry.name] for entry in form.up}))
    new = aggregate(state, sums, contributions, scale, sgd(), {name for name in small.shapes if "running" in name})
    for name, value in new.params.items():
        holders = [(weight, values[name]) for weight, values in zip(weights, sent, strict=True) if name in values]
        if not holders:
            assert torch.equal(value, state.params[name])
            assert name.startswith("size1")
            continue
        mean = sum(weight * each.double() for weight, each in holders) / sum(weight for weight, _ in holders)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)  # rounded to float32 once


@pytest.mark.parametrize("beta", [0.2, 0.0, 1.0])
def test_momentum_distillation_by_hand(beta):
    small = Small("inclusivefl", options=ALIKE, cuts=["conv1", "conv3"], beta=beta)
    assert small.strategy.stops == (2, 4, 6)
    old = small.strategy.init(small.values)
    means = ServerState(round_index=1, params=moved(old.params, 0.05))
    senders = dict.fromkeys([*small.chain.unit_names, *small.strategy.extras], 1)
    new = small.strategy.advance(old, means, {"senders": senders})

    def change(name):
        return means.params[name].double() - old.params[name].double()

    for name, value in new.params.items():
        own, _, rest = name.partition(".")
        # Of the next larger size the layers from this one's place on; conv3 is size 2's own, hidden and head have other shapes.
        taught = {"size1_last": ["conv1", "conv2", "size2_last"], "size2_last": ["conv3"]}.get(own)
        if taught is None or "running" in name:
            assert value is means.params[name]
            continue
        teachers = torch.stack([change(f"{unit}.{rest}") for unit in taught]).mean(0)
        expected = old.params[name].double() + (1 - beta) * change(name) + beta * teachers
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)  # float32, a few roundings
    assert any(not torch.equal(new.params[name], means.params[name]) for name in new.params) == (beta > 0)


def test_what_nobody_trained_teaches_and_learns_nothing():
    small = Small("inclusivefl", options=ALIKE, cuts=["conv1", "conv3"])
    old = small.strategy.init(small.values)
    means = ServerState(round_index=1, params=moved(old.params, 0.05))

    def advance(*blocks):
        return small.strategy.advance(old, means, {"senders": dict.fromkeys(blocks, 2)}).params

    alone = advance("size1_last", "size1_head", "conv0")
    assert all(alone[name] is value for name, value in means.params.items())
    untouched = advance("conv0", "conv1", "conv2", "size2_last")
    assert all(untouched[name] is value for name, value in means.params.items())
    name, one = "size1_last.conv.weight", advance("size1_last", "conv2")["size1_last.conv.weight"]
    change = {each: means.params[each] - old.params[each] for each in (name, "conv2.conv.weight")}
    expected = old.params[name] + 0.8 * change[name] + 0.2 * change["conv2.conv.weight"]
    torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-7)  # a few roundings


def test_settings():
    settings = settings_of(STRATEGIES.get("inclusivefl"))
    assert settings().model_dump() == {"depths": 4, "cuts": None, "beta": 0.2}
    for bad in ({"depths": 0}, {"beta": -0.1}, {"beta": 1.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            settings(**bad)
    single = Small("inclusivefl", depths=1).strategy
    assert list(single.variants(STATE).values()) == [single.full_plan()]
