"""DepthFL against a naive loss, FedDyn by hand, and the memory that its clients' states take."""

import json
import math
from dataclasses import replace

import pytest
import torch
from depth_problem import CLASSES, CNN, CPU, SHAPE, Small, data

from dfed.blocks import ExitChain
from dfed.client import Skeleton, run_plan
from dfed.memory import predict_peak
from dfed.plan import Plan
from dfed.region import WHOLE
from dfed.registry import STRATEGIES
from dfed.settings import settings_of
from dfed.state import ServerState

UNITS = ("conv0", "conv1", "conv2", "hidden", "head")
STATE = ServerState(round_index=0, params={})


def at(small, depth, weight=None, **changes):
    return small.strategy.plan_at(depth, 3, None if weight is None else {"consistency": weight}, **changes)


def test_plans_and_sub_models():
    small = Small("depthfl")
    strategy = small.strategy
    assert strategy.keeps_state
    assert strategy.splitting.names == (*UNITS, "exit1", "exit2", "exit3")
    for depth, hold in enumerate([UNITS[:1], UNITS[:2], UNITS[:3], UNITS], start=1):
        exits = [f"exit{number}" for number in range(1, min(depth, 3) + 1)]
        plan = at(small, depth, 0.5)
        assert (plan.hold, plan.train) == ((*hold, *exits), (*hold, *exits))
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        model = strategy.build(plan)
        assert isinstance(model, ExitChain)
        assert [name for name, _ in model.named_children()] == [*hold, *exits]
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
        held = {name for name in small.shapes if strategy.splitting.block_of(name) in plan.hold}
        assert {name for name in model.state_dict() if "num_batches" not in name} == held
        assert {entry.name for entry in small.forms.of(plan).up} == held  # norm statistics, too
        assert strategy.region("conv0.conv.weight", (4, 1, 3, 3), plan) == WHOLE
        alone = strategy.variants(STATE)[f"exit{depth}"]
        assert alone.hold == (*hold, *(exits[-1:] if depth < 4 else ()))
        x = data()[0]
        full, one = small.model(plan, torch.float32), small.model(alone, torch.float32).eval()
        torch.testing.assert_close(one(x), _last(full.eval(), x), rtol=0, atol=0)
    assert strategy.evaluated(STATE) == strategy.plan_at(4)
    assert list(strategy.variants(STATE)) == ["exit1", "exit2", "exit3", "exit4"]


def _last(model, x):
    """What the last of a model's exits says."""
    exits = [module for name, module in model.named_children() if name.startswith("exit")]
    return model.run(x) if len(exits) < len(model) else exits[-1](model.run(x))


def test_the_deepest_that_fits():
    small = Small("depthfl", options={**CNN, "hidden": 256}, client={"momentum": 0.9})
    needed = [small.costs.budget_bytes(at(small, depth)) for depth in range(1, 5)]
    assert needed == sorted(needed)
    assert needed[0] < needed[3]
    for budget, depth in ((needed[3], 4), (needed[3] - 1, 3), (needed[0], 1), (None, 4)):
        plan = small.strategy.plan(STATE, small.candidate(budget, round_index=7))
        assert plan.options == {"depth": depth, "alone": False}
        assert plan.client == 3
    assert small.strategy.plan(STATE, small.candidate(needed[0] - 1)) is None


@pytest.mark.parametrize(("ramp", "rounds"), [(300, [0, 1, 150, 300, 10_000]), (4, [0, 2, 4, 5])])
def test_depths_learn_from_each_other_more_and_more(ramp, rounds):
    small = Small("depthfl", ramp_rounds=ramp)
    for number in rounds:
        plan = small.strategy.plan(STATE, small.candidate(round_index=number))
        assert plan.details["consistency"] == pytest.approx(math.exp(-5 * (1 - min(number, ramp) / ramp) ** 2), rel=1e-15)
        assert plan.without_details() == small.strategy.plan_at(4, 3)  # by which it is predicted


def naive_loss(scores, y, weight):
    """The paper's objective, entry by entry, float64."""
    probabilities = [each.softmax(1) for each in scores]
    total = 0.0
    for i, p_i in enumerate(probabilities):
        total = total - torch.log(p_i[torch.arange(len(y)), y]).mean()
        for j, p_j in enumerate(probabilities):
            if j != i:
                given = p_j.detach()
                total = total + weight / (len(scores) - 1) * (given * (given / p_i).log()).sum(1).mean()
    return total


@pytest.mark.parametrize("exits", ["linear", "bottleneck"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_loss_and_its_gradients(depth, exits):
    small = Small("depthfl", alpha=0.0, exits=exits)
    assert not small.strategy.keeps_state
    plan, (x, y) = at(small, depth, 0.7), data()
    model, naive, full = small.model(plan), small.model(plan), small.model(at(small, 4))
    small.strategy.receive(model, {}, plan)
    loss = small.strategy.loss(model, x.double(), y, plan.phases[0])
    expected = naive_loss(naive(x.double()), y, 0.7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    naive_loss(full(x.double())[:depth], y, 0.7).backward()  # of the full model, what these depths say
    for name, parameter in model.named_parameters():
        # float64, and the same sums in another order.
        torch.testing.assert_close(parameter.grad, naive.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(parameter.grad, full.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
    assert all((p.grad is None) == (name not in dict(model.named_parameters())) for name, p in full.named_parameters())


def reference_turn(small, plan, x, y, gradients, steps, weight, alpha, rate):
    """A client's turn in float64: parameters, and ∇L afterwards."""
    model = small.model(plan)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(steps):
        loss = naive_loss(model(x.double()), y, weight)
        found = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), found, strict=True):
                penalty = -gradients.get(name, 0.0) + alpha * (parameter - start[name])
                parameter.sub_(gradient + penalty, alpha=rate)
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return after, {name: gradients.get(name, 0.0) - alpha * (after[name] - start[name]) for name in after}


def test_feddyn_on_the_client():
    small = Small("depthfl", alpha=0.3, client={"steps": 3})
    x, y = data()
    state, expected_state = {}, {}
    for depth, weight in ((2, 0.2), (3, 0.4), (2, 0.9)):  # a client may have to do with less
        plan = at(small, depth, weight)
        result, _ = small.train(plan, x, y, client_state=state)
        after, gradients = reference_turn(small, plan, x, y, expected_state, 3, weight, 0.3, 0.05)
        expected_state = {**expected_state, **gradients}
        state = result.client_state
        for name, value in after.items():
            # float32 against float64: three steps of gradients of order 1.
            torch.testing.assert_close(result.update[name].double(), value, rtol=1e-4, atol=2e-6)
        assert state.keys() == expected_state.keys()
        for name, value in expected_state.items():
            torch.testing.assert_close(state[name].double(), value, rtol=1e-4, atol=2e-6)
        assert {name for name in result.update if "running" in name}  # sent as they are
    assert not any("running" in name for name in state)


def test_feddyn_on_the_server():
    small = Small("depthfl", alpha=0.3, num_clients=5)
    strategy, generator = small.strategy, torch.Generator().manual_seed(3)
    old = strategy.init(small.values)
    h = {name: 0.0 for name in small.values}
    for senders in ({"conv0": 3, "exit1": 3, "conv1": 1, "exit2": 1}, {"conv0": 2, "exit1": 2}, {}):
        means = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            if senders.get(strategy.splitting.block_of(name)) else value for name, value in old.params.items()
        }
        new = strategy.advance(old, ServerState(round_index=1, params=means, tensors=old.tensors), {"senders": senders})
        for name, mean in means.items():
            count = senders.get(strategy.splitting.block_of(name), 0)
            if count == 0 or "running" in name:
                assert new.params[name] is mean
                continue
            h[name] = h[name] - 0.3 * count / 5 * (mean.double() - old.params[name].double())
            # float32: a few roundings of values of order 1.
            torch.testing.assert_close(new.tensors[name].double(), h[name], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(new.params[name].double(), mean.double() - h[name] / 0.3, rtol=1e-5, atol=1e-6)
        assert new.tensors.keys() >= old.tensors.keys()
        old = new
    sent = {name for name in small.values if name.split(".")[0] in ("conv0", "exit1", "conv1", "exit2")}
    assert set(old.tensors) == {name for name in sent if "running" not in name}
    without = Small("depthfl", alpha=0.0).strategy
    assert replace(without.advance(old, new, {"senders": {"conv0": 1}}), facts=new.facts) == new


def test_exits_that_nobody_has_trained_have_no_say():
    """Where no client holds the deepest prefix, its classifier is as it was drawn."""
    strategy = Small("depthfl", alpha=0.0).strategy
    state, deepest = STATE, []
    for senders in ({}, {"conv0": 2, "exit1": 2}, {"conv0": 2, "exit1": 2, "conv1": 1, "exit2": 1}, {"exit1": 1},
                    {"exit1": 1, "exit2": 1, "exit3": 1, "head": 1}):
        state = strategy.advance(state, replace(state, round_index=state.round_index + 1), {"senders": senders})
        deepest.append(strategy.evaluated(state).options["depth"])
    assert deepest == [4, 1, 2, 2, 4]
    assert list(strategy.variants(state)) == ["exit1", "exit2", "exit3", "exit4"]


def test_a_first_turn_needs_what_later_ones_need():
    small = Small("depthfl", client={"momentum": 0.9})
    plan = at(small, 4)
    form = small.forms.of(plan)

    def peak(turn):
        def work(values):
            state = {name: torch.empty(small.shapes[name]) for name, _ in skeleton.model.named_parameters()} if turn else {}
            run_plan(small.strategy, plan, skeleton, values, form.regions, batches, small.settings, rate_factor=1.0, device=CPU,
                     generator=torch.Generator(), client_state=state)

        def batches(phase):
            for _ in range(2):
                yield torch.empty(8, *SHAPE), torch.zeros(8, dtype=torch.int64)

        skeleton = Skeleton(small.strategy.build(plan))
        return predict_peak(lambda: {entry.name: torch.empty(entry.shape) for entry in form.down}, work)

    assert peak(0) == peak(1) == small.costs.peak_bytes_at(plan)
    plain = Small("depthfl", alpha=0.0, client={"momentum": 0.9})
    weights = 4 * sum(math.prod(shape) for name, shape in small.shapes.items() if "running" not in name)
    assert small.costs.peak_bytes_at(plan) >= plain.costs.peak_bytes_at(at(plain, 4)) + 2 * weights  # where it stood, and ∇L


def test_bottlenecks_stand_in_for_the_depths_that_are_missing():
    small = Small("depthfl", exits="bottleneck")
    shapes = [{name: shape for name, shape in small.shapes.items() if name.startswith(f"exit{depth}.")} for depth in (1, 2, 3)]
    head = {name.partition(".")[2]: shape for name, shape in small.shapes.items() if name.startswith("head.")}
    steps = [(6, 4, 3, 3), (5, 6, 3, 3), (8, 5)]  # to the channels of conv1 and conv2, and to the hidden layer's
    for depth, found in enumerate(shapes, start=1):
        values = [shape for name, shape in found.items() if ".head." not in name]
        assert values == steps[depth - 1:]
        assert {name.partition(".head.")[2]: shape for name, shape in found.items() if ".head." in name} == head
    linear = Small("depthfl")
    assert small.strategy.training_key() != linear.strategy.training_key()
    for depth in (1, 2, 3):
        assert small.costs.peak_bytes_at(at(small, depth)) > linear.costs.peak_bytes_at(at(linear, depth))
    x = data()[0]
    outputs = small.model(at(small, 4)).train()(x.double())
    assert [tuple(each.shape) for each in outputs] == [(len(x), CLASSES)] * 4


@pytest.mark.parametrize("model", ["resnet8", "vgg11_bn", "vit_tiny", "mlp"])
def test_bottlenecks_behind_any_chain(model):
    options = {"vit_tiny": {"depth": 4, "width": 24}}.get(model, {})
    strategy = Small("depthfl", model, options, shape=(3, 32, 32), exits="bottleneck").strategy
    scores = strategy.build(strategy.plan_at(len(strategy.stops)))(torch.empty(2, 3, 32, 32, device="meta"))
    assert [tuple(each.shape) for each in scores] == [(2, CLASSES)] * len(strategy.stops)


def test_settings():
    settings = settings_of(STRATEGIES.get("depthfl"))
    assert settings().model_dump() == {"depths": 4, "cuts": None, "alpha": 0.1, "ramp_rounds": 300, "exits": "linear"}
    for bad in ({"depths": 0}, {"alpha": -0.1}, {"ramp_rounds": 0}, {"cuts": "conv0"}, {"exits": "none"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            settings(**bad)
    assert Small("depthfl", cuts=["conv1"]).strategy.stops == (2, 5)
    single = Small("depthfl", depths=1)
    assert single.strategy.build(single.strategy.plan_at(1))(torch.empty(2, *SHAPE, device="meta"))[0].shape == (2, CLASSES)
