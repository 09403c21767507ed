"""FeDepth: parts one after another against a naive training, and as few parts as the memory asks for."""

import itertools
import json

import pytest
import torch
from depth_problem import CNN, Small, data

from dfed.plan import Phase, Plan
from dfed.registry import STRATEGIES
from dfed.settings import settings_of
from dfed.state import ServerState

STATE = ServerState(round_index=0, params={})
UNITS = ("conv0", "conv1", "conv2", "hidden", "head")
WIDE = {**CNN, "channels": [8, 8], "pool": "last"}  # activations make the peak


def test_plans():
    small = Small("fedepth", client={"epochs": 2})
    plan = small.strategy.plan_of((1, 3, 4), 2)
    assert (plan.client, plan.hold, plan.train) == (2, UNITS, UNITS)
    assert plan.phases == tuple(
        Phase(batch_size=8, epochs=2, objective="part", train=train)
        for train in (("conv0", "head"), ("conv1", "conv2", "head"), ("hidden", "head"))
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert {entry.name for entry in small.forms.of(plan).up} == set(small.shapes)
    assert small.strategy.plan_of((4,), 2) == small.strategy.full_plan(2)
    assert small.strategy.evaluated(STATE) == small.strategy.full_plan()


def padded(x, size):
    """The shortcut by hand, to a vector."""
    x = x.mean((2, 3)) if x.dim() == 4 else x
    return torch.cat([x, x.new_zeros(len(x), size - x.shape[1])], 1)


def test_training_part_by_part_in_float64():
    small = Small("fedepth", client={"steps": 2, "momentum": 0.9})
    plan, (x, y) = small.strategy.plan_of((1, 3, 4)), data()
    result, trained = small.train(plan, x, y)
    model = small.model(plan)
    for part, before in ((["conv0"], []), (["conv1", "conv2"], ["conv0"]), (["hidden"], ["conv0", "conv1", "conv2"])):
        for name, unit in model.named_children():
            unit.train(name in part)
        wanted = [parameter for name in [*part, "head"] for parameter in model.get_submodule(name).parameters()]
        optimizer = torch.optim.SGD(wanted, lr=0.05, momentum=0.9)
        for _ in range(2):
            h = x.double()
            for name in [*before, *part]:
                h = model.get_submodule(name)(h)
            found = torch.autograd.grad(torch.nn.functional.cross_entropy(model.head(padded(h, 8)), y), wanted)
            for parameter, gradient in zip(wanted, found, strict=True):
                parameter.grad = gradient
            optimizer.step()
    for name, value in model.state_dict().items():
        if value.is_floating_point():  # float32 against float64, six steps
            torch.testing.assert_close(result.update[name].double(), value, rtol=1e-4, atol=5e-6)
    assert trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_parts_of_other_models_train():
    for model, options, shape in (("resnet8", {"width": 4}, (3, 8, 8)), ("vit_tiny", {"depth": 2, "width": 12}, (3, 8, 8)),
                                  ("mlp", {"hidden": [9, 5, 7]}, (1, 4, 4))):
        small = Small("fedepth", model, options, shape=shape, client={"steps": 1})
        x, y = data(shape=shape)
        body = len(small.chain) - 1
        result, _ = small.train(small.strategy.plan_of(tuple(range(1, body + 1))), x, y)
        # Whatever has a gradient has moved; a transformer's classifier starts at 0 and passes none on in its first step.
        still = {name for name, value in result.update.items() if torch.equal(value, small.values[name])}
        assert all(name.startswith(("embed", "block0")) for name in still) if model == "vit_tiny" else len(still) == 0, still


def test_frozen_parts_stay_as_they_are_to_the_bit():
    small = Small("fedepth", client={"steps": 2})
    plan, (x, y) = small.strategy.plan_of((2, 4)), data()
    first = Plan(client=0, hold=plan.hold, train=plan.train, phases=plan.phases[:1])
    after_first, after_both = (small.train(each, x, y)[0].update for each in (first, plan))
    for name, value in after_first.items():
        unit = name.split(".")[0]
        assert torch.equal(value, small.values[name]) == (unit in ("conv2", "hidden")), name
        assert torch.equal(value, after_both[name]) == (unit in ("conv0", "conv1")), name  # statistics of norms, too


def test_the_fewest_parts_that_fit():
    small = Small("fedepth", options=WIDE, shape=(1, 16, 16), client={"momentum": 0.9, "batch_size": 16})
    strategy, costs = small.strategy, small.costs
    needed = {}
    for number in range(1, 4):
        ends = strategy.ends(number)
        assert len(ends) == number
        plan = strategy.plan_of(ends)
        needed[number] = costs.budget_bytes(plan)
        singles = [Plan(client=0, hold=plan.hold, train=plan.train, phases=(phase,)) for phase in plan.phases]
        assert costs.peak_bytes(plan) == max(costs.peak_bytes(single) for single in singles)
        # No other choice of so many parts needs less: the bisection found the best of all.
        others = [costs.budget_bytes(strategy.plan_of((*inner, 3))) for inner in itertools.combinations((1, 2), number - 1)]
        assert needed[number] == min(others)
    assert needed[1] > needed[2] >= needed[3]
    for budget in (None, needed[1], needed[1] - 1, needed[2], needed[3]):
        fewest = 1 if budget is None else min(number for number, bytes_ in needed.items() if bytes_ <= budget)
        assert strategy.plan(STATE, small.candidate(budget)) == strategy.plan_of(strategy.ends(fewest), 3)
    assert strategy.plan(STATE, small.candidate(min(needed.values()) - 1)) is None
    # What ran out of memory makes way for more parts.
    failed = {strategy.full_plan().cost_key(): needed[1]}
    assert strategy.plan(STATE, small.candidate(needed[1], infeasible=failed)) == strategy.plan_of(strategy.ends(2), 3)


def test_a_part_needs_memory_for_itself_only():
    small = Small("fedepth", options=WIDE, shape=(1, 16, 16), client={"momentum": 0.9, "batch_size": 64})
    full, last = small.strategy.full_plan(), small.strategy.plan_of((2, 3))
    last = Plan(client=0, hold=last.hold, train=last.train, phases=last.phases[1:])
    weights = 4 * sum(tensor.numel() for tensor in small.values.values())
    feature_map = 4 * 64 * 8 * 16 * 16
    # Two convolutions and two norms, with a gradient on the way back; the hidden layer alone keeps none of these.
    assert small.costs.peak_bytes_at(full) > 5 * feature_map
    assert small.costs.peak_bytes_at(last) < 4 * feature_map + 4 * weights  # a forward pass through them


@pytest.mark.parametrize("hidden", [[], [6]])
def test_chains_too_short_to_cut(hidden):
    small = Small("fedepth", "mlp", {"hidden": hidden})
    assert [plan for plan in small.strategy._plans(1)] == [small.strategy.full_plan(1)]
    assert small.strategy.plan(STATE, small.candidate(1)) is None


def test_settings():
    assert settings_of(STRATEGIES.get("fedepth"))().model_dump() == {}
