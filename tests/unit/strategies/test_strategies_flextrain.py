"""FlexTrain against a naive loss and naive means; FedSmall and FedClass against federated averaging."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from depth_problem import CLASSES, CNN, CPU, Small, data
from run_problem import assembled

from dfed.blocks.prefix import TO_HEAD, PrefixChain, Shortcut
from dfed.comm import join
from dfed.comm.partial_sums import PartialSums
from dfed.config import load_config
from dfed.errors import ConfigError
from dfed.models import Chain, build_chain
from dfed.plan import Plan
from dfed.region import WHOLE
from dfed.registry import STRATEGIES
from dfed.round import lead_round
from dfed.run import StopFlag, assemble, prepare
from dfed.settings import settings_of
from dfed.state import ServerState
from dfed.strategies.flextrain import feature_distance

STATE = ServerState(round_index=0, params={})
UNITS = ("conv0", "conv1", "conv2", "hidden", "head")
RESNET = {"model": "resnet8", "options": {"width": 4}, "shape": (3, 9, 9)}
VIT = {"model": "vit_tiny", "options": {"depth": 3, "width": 12, "dropout": 0.2}, "shape": (3, 8, 8)}
BASE = {
    "rounds": 3,
    "cohort": 6,
    "seed": 5,
    "model": {"name": "cnn", **CNN},
    "data": {"dataset": "synthetic", "shape": [1, 8, 8], "classes": CLASSES, "samples": 200, "test_samples": 30,
             "partition": {"name": "dirichlet", "alpha": 1.0, "min_samples": 8}},
    "fleet": {"clients": 6, "tiers": [{"name": "strong", "count": 2}, {"name": "weak", "count": 4}]},
    "client": {"batch_size": 8, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "memory": {"enforce": "off"},
}


def flextrain(**options):
    text = ", ".join(f"{name}: {value}" for name, value in options.items())
    return f"strategy={{name: flextrain, tier_depths: {{strong: 4, weak: 2}}, {text}}}"


def test_plans_and_sub_models():
    small = Small("flextrain")
    strategy = small.strategy
    assert not strategy.keeps_state
    assert (strategy.stops, strategy.num_depths, strategy.extras) == ((1, 2, 3, 4), 4, {})
    for depth in range(1, 5):
        plan, hold = strategy.plan_at(depth, 3), (*UNITS[:depth], "head")
        assert (plan.client, plan.hold, plan.train, plan.options) == (3, hold, hold, {"depth": depth})
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        model = strategy.build(plan)
        assert isinstance(model, PrefixChain)
        assert model.unit_names == (*UNITS[:depth], TO_HEAD, "head")
        assert model.prefix_stops == tuple(range(1, depth + 1))
        held = {name for name in small.shapes if name.split(".")[0] in hold}
        assert {entry.name for entry in small.forms.of(plan).down} == held
        assert {entry.name for entry in small.forms.of(plan).up} == held  # norm statistics, too
        assert {strategy.region(name, small.shapes[name], plan) for name in held} == {WHOLE}
        assert strategy.variants(STATE)[f"depth {depth}"] == strategy.plan_at(depth)
        assert strategy.variant_of(plan) == f"depth {depth}"
    assert list(strategy.variants(STATE)) == ["depth 1", "depth 2", "depth 3", "depth 4"]
    assert strategy.evaluated(STATE) == strategy.plan_at(4)
    own = Chain([("to_head", torch.nn.Flatten()), ("head", torch.nn.Linear(4, 3))], input_shape=(1, 2, 2), num_classes=3,
                name="own")
    for name in ("flextrain", "fedsmall", "fedclass"):
        with pytest.raises(ConfigError, match="no unit called to_head, which this method's own modules are called"):
            STRATEGIES.get(name)(replace(strategy.problem, chain=own))


def test_the_deepest_that_fits():
    small = Small("flextrain", options={**CNN, "hidden": 256}, client={"momentum": 0.9})
    needed = [small.costs.budget_bytes(small.strategy.plan_at(depth)) for depth in range(1, 5)]
    assert needed[0] < needed[3]
    for budget in (None, needed[3], needed[3] - 1, min(needed), min(needed) - 1):
        depth = max((depth for depth in range(1, 5) if budget is None or needed[depth - 1] <= budget), default=None)
        plan = small.strategy.plan(STATE, small.candidate(budget))
        assert plan == (None if depth is None else small.strategy.plan_at(depth, 3))


def test_depths_of_tiers():
    small = Small("flextrain", tiers=("t", "weak"), tier_depths={"weak": 2}, options={**CNN, "hidden": 256})
    needed = [small.costs.budget_bytes(small.strategy.plan_at(depth)) for depth in range(1, 5)]
    assert small.strategy.plan(STATE, small.candidate(tier="weak")) == small.strategy.plan_at(2, 3)
    assert small.strategy.plan(STATE, small.candidate(needed[1], tier="weak")) == small.strategy.plan_at(2, 3)
    assert small.strategy.plan(STATE, small.candidate(needed[1] - 1, tier="weak")) is None  # not another depth
    assert small.strategy.plan(STATE, small.candidate()) == small.strategy.plan_at(4, 3)
    for name in ("flextrain", "fedsmall", "fedclass"):
        with pytest.raises(ConfigError) as caught:
            Small(name, tiers=("t", "weak"), tier_depths={"nobody": 1, "t": 5, "weak": 0})
        assert str(caught.value).count("`tier_depths`") == 3
        assert "must name tiers of the fleet (t, weak), but names 'nobody'." in str(caught.value)
        assert "must be at least 1 and at most 4, the last depth, but is 5 for 't'." in str(caught.value)
    with pytest.raises(ConfigError, match=r"`strategy.tier_depths` must name tiers of the fleet \(strong, weak\)"):
        assembled(BASE, ["strategy={name: flextrain, tier_depths: {stong: 1}}"])


def naive_features(model, x, names):
    """What the classifier takes behind these units of a small residual network, in float64."""
    for name in names:
        x = model.get_submodule(name)(x)
    width = 16
    while x.shape[1] < width:
        x = torch.cat([x[:, :, ::2, ::2], torch.zeros_like(x[:, :, ::2, ::2])], 1)  # a stage doubles the channels
    return x.mean((2, 3))


def naive_loss(model, x, y, names, beta, stop=True):
    """The objective; the two depths are passed apart."""
    own, smaller = naive_features(model, x, names), naive_features(model, x, names[:-1])
    scores = own @ model.head.fc.weight.T + model.head.fc.bias
    entropy = (scores.exp().sum(1).log() - scores[torch.arange(len(y)), y]).mean()
    given = own.detach() if stop else own
    return entropy + beta * sum(((smaller[i] - given[i]) ** 2).mean() for i in range(len(y))) / len(y)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_loss_and_its_gradients(depth):
    small = Small("flextrain", beta=0.3, **RESNET)
    plan, (x, y) = small.strategy.plan_at(depth), data(shape=RESNET["shape"])
    names = small.chain.unit_names[:depth]
    model, naive, other = (small.model(plan).train() for _ in range(3))
    loss = small.strategy.loss(model, x.double(), y, plan.phases[0])
    expected = naive_loss(naive, x.double(), y, names, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    naive_loss(other, x.double(), y, names, 0.3, stop=False).backward()
    differs = []
    for name, parameter in model.named_parameters():
        # float64, and the same sums in another order.
        torch.testing.assert_close(parameter.grad, naive.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
        differs.append(not torch.allclose(parameter.grad, other.get_parameter(name).grad, rtol=1e-6, atol=1e-9))
    assert any(differs)  # the teacher's gradient would show
    taught = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(x.double()), y).backward()
    for name, parameter in model.named_parameters():
        learns = name.split(".")[0] in names[:-1]  # neither the teacher's own units nor the classifier
        assert torch.allclose(parameter.grad, taught[name], rtol=1e-9, atol=1e-12) == (not learns), name


def test_without_a_smaller_depth_or_weight_it_is_cross_entropy():
    x, y = data(shape=RESNET["shape"])
    for beta, depth in ((0.2, 1), (0.0, 3)):
        small = Small("flextrain", beta=beta, **RESNET)
        plan = small.strategy.plan_at(depth)
        found = small.strategy.loss(small.model(plan), x.double(), y, plan.phases[0])
        assert torch.equal(found, F.cross_entropy(small.model(plan)(x.double()), y))


def test_the_distance_by_hand():
    student = torch.tensor([[[1.0], [2.0]], [[0.0], [4.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0], [2.0]], [[3.0], [0.0]]], requires_grad=True)
    distance = feature_distance(student, teacher)
    assert distance.item() == (1 + 0 + 9 + 16) / 4
    distance.backward()
    assert torch.equal(student.grad, (student.detach() - teacher.detach()) / 2)
    assert teacher.grad is None
    assert feature_distance(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("case", [RESNET, VIT], ids=["resnet8", "vit_tiny"])
def test_activation_checkpointing_gives_the_same_bits(case):
    found, (x, y) = [], data(shape=case["shape"])
    for recompute in (False, True):
        client = {"steps": 3, "momentum": 0.9, "activation_checkpointing": recompute}
        small = Small("flextrain", depths=3, client=client, **case)
        result, _ = small.train(small.strategy.plan_at(3), x, y)
        found.append((result.loss_sum, result.update))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() == small.values.keys()
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name
        assert not torch.equal(value, small.values[name]), name


TURNS = [(1, 3), (2, 10), (2, 7), (3, 16)]  # depth and samples of a round's clients


def round_of(small, turns, seed):
    """First values with means over holders in their place, what `padded` makes of it, and the metrics, all by hand."""
    generator, strategy = torch.Generator().manual_seed(seed), small.strategy
    old, mean, padded, senders, weights = small.values, {}, {}, {}, {}
    sent = [{name: old[name] + 0.1 * torch.randn(old[name].shape, generator=generator) for name in old
             if name.split(".")[0] in strategy.plan_at(depth).hold} for depth, _ in turns]
    for name, value in old.items():
        held = [(update[name].double(), count) for update, (_, count) in zip(sent, turns, strict=True) if name in update]
        everybody = [(update.get(name, value).double(), count) for update, (_, count) in zip(sent, turns, strict=True)]
        mean[name] = (sum(v * n for v, n in held) / sum(n for _, n in held)).float() if held else value
        padded[name] = sum(v * n for v, n in everybody) / sum(n for _, n in everybody) if turns else value.double()
    for depth, count in turns:
        for block in strategy.plan_at(depth).train:
            senders[block], weights[block] = senders.get(block, 0) + 1, weights.get(block, 0) + count
    return mean, padded, {"senders": senders, "sender_weights": weights}


@pytest.mark.parametrize("aggregation", ["padded", "counted"])
def test_clients_that_do_not_hold_a_tensor_vote_for_its_old_value_or_not_at_all(aggregation):
    small = Small("flextrain", aggregation=aggregation)
    old = small.strategy.init(small.values)
    mean, padded, metrics = round_of(small, TURNS, 1)
    new = small.strategy.advance(old, replace(old, round_index=1, params=mean), metrics)
    assert new.facts == {"deepest": 3}
    for name, value in new.params.items():
        block = name.split(".")[0]
        if block == "hidden":  # held by nobody
            assert value is small.values[name]
        elif aggregation == "counted" or block in ("conv0", "head"):
            assert value is mean[name]
        else:
            # float32: a few roundings of values of order 1.
            torch.testing.assert_close(value.double(), padded[name], rtol=1e-6, atol=2e-7)
            assert not torch.allclose(value, mean[name], rtol=1e-3, atol=1e-4), name
    assert new.params["conv2.norm.running_mean"].ne(small.values["conv2.norm.running_mean"]).all()
    mean, _, metrics = round_of(small, [], 2)
    after = small.strategy.advance(new, replace(new, round_index=2), metrics)
    assert after == replace(new, round_index=2)  # nobody trained anything
    assert small.strategy.advance(old, old, metrics).facts == {"deepest": 0}


def test_evaluated_is_the_deepest_that_was_trained_so_far():
    strategy, state, deepest = Small("flextrain").strategy, STATE, []
    for depths in ((), (2,), (1,), (2, 1), (3,), (4, 1), (1,)):
        weights = {block: 5 for depth in depths for block in strategy.plan_at(depth).train}
        state = strategy.advance(state, replace(state, round_index=state.round_index + 1), {"sender_weights": weights})
        deepest.append(strategy.evaluated(state).options["depth"])
    assert deepest == [4, 2, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("aggregation", ["padded", "counted"])
def test_a_round_against_what_its_clients_sent(aggregation, monkeypatch):
    sent, add = [], PartialSums.add

    def spy(sums, update, regions, weight, ranges, **options):
        sent.append(({name: value.double() for name, value in update.items()}, weight))
        add(sums, update, regions, weight, ranges, **options)

    monkeypatch.setattr(PartialSums, "add", spy)
    run, state = assembled(BASE, [flextrain(aggregation=aggregation)])
    new = lead_round(run.job, state).state
    assert len(sent) == 6
    assert len({weight for _, weight in sent}) > 3  # not all have equally many samples
    moved = set()
    for name, value in state.params.items():
        votes = [(update[name] if name in update else value.double(), weight) for update, weight in sent
                 if aggregation == "padded" or name in update]
        expected = sum(vote * weight for vote, weight in votes) / sum(weight for _, weight in votes)
        # float32: a few roundings of values of order 1.
        torch.testing.assert_close(new.params[name].double(), expected, rtol=1e-6, atol=2e-7)
        moved |= {name.split(".")[0]} if not torch.equal(new.params[name], value) else set()
    assert moved == set(UNITS)
    assert new.facts == {"deepest": 4}


def test_what_nobody_holds_stays_as_it_is():
    run, state = assembled(BASE, ["strategy={name: flextrain, tier_depths: {strong: 2, weak: 1}}"])
    new = lead_round(run.job, state).state
    for name, value in state.params.items():  # with momentum and weight decay
        assert torch.equal(new.params[name], value) == (name.split(".")[0] in ("conv2", "hidden")), name
    assert run.job.strategy.evaluated(new) == run.job.strategy.plan_at(2)
    run, state = assembled(BASE, [flextrain(beta=0.1), *(f"fleet.tiers.{tier}.dropout=1.0" for tier in (0, 1))])
    new = lead_round(run.job, state).state
    assert all(torch.equal(new.params[name], value) for name, value in state.params.items())
    assert run.job.strategy.evaluated(new) == run.job.strategy.plan_at(4)


def test_codecs_by_settings_alone(tmp_path):
    found = []
    for number, overrides in enumerate([[], ["codecs={down: {name: top_k, density: 0.7}, up: int8, error_feedback: true}"]]):
        config, device, folder = load_config(None, [flextrain(beta=0.2), *overrides], base=BASE), CPU, tmp_path / str(number)
        folder.mkdir()
        run = assemble(prepare(config, device), join(config.backend, device), StopFlag(), clients_folder=folder)
        state, rows = run.job.strategy.init(run.planning.first_params(5)), []
        for _ in range(3):
            result = lead_round(run.job, state)
            state, rows = result.state, [*rows, result.row]
        assert all(row["clients"]["completed"] == 6 for row in rows)
        assert all(value.isfinite().all() for value in state.params.values())
        assert set(state.clients) == (set(range(6)) if overrides else set())
        found.append(rows)
    for plain, coded in zip(*found, strict=True):
        assert coded["bytes"]["up"] < plain["bytes"]["up"]
        assert coded["bytes"]["down"] < plain["bytes"]["down"]
        assert coded["train_loss"] != plain["train_loss"]


def prefix_of_the_cnn(*, input_shape, num_classes):
    """The first two units of the CNN and its head as a model of its own."""
    whole = build_chain("cnn", CNN, input_shape=input_shape, num_classes=num_classes)
    units = [(name, whole.unit(name)) for name in UNITS[:2]]
    return Chain([*units, (TO_HEAD, Shortcut((8,))), ("head", whole.unit("head"))], input_shape=input_shape,
                 num_classes=num_classes, name="prefix")


def test_fedsmall_is_federated_averaging_of_a_small_model():
    run, state = assembled(BASE, ["strategy={name: fedsmall, tier_depths: {strong: 4, weak: 2}}"])
    plain, other = assembled({**BASE, "model": "test_strategies_flextrain:prefix_of_the_cnn"}, ["strategy=fedavg"])
    first, other = state, replace(other, params={name: state.params[name] for name in other.params})
    for _ in range(3):
        state, other = lead_round(run.job, state).state, lead_round(plain.job, other).state
    for name, value in state.params.items():
        assert torch.equal(value, other.params.get(name, first.params[name])), name
        assert torch.equal(value, first.params[name]) == (name not in other.params), name
    assert run.job.strategy.evaluated(state) == run.job.strategy.plan_at(2)
    assert (run.job.strategy.variants(state), run.job.strategy.variant_of(run.job.strategy.plan_at(2))) == ({}, None)


def test_fedsmall_takes_the_depth_of_the_smallest_budget():
    options = {**CNN, "hidden": 256}
    measure = Small("fedsmall", options=options)
    needed = [measure.costs.budget_bytes(measure.strategy.plan_at(depth)) for depth in range(1, 5)]
    for smallest in (None, needed[3], needed[3] - 1, min(needed), min(needed) - 1):
        small = Small("fedsmall", options=options, budgets=((smallest, 2), (None, 3)) if smallest else ((None, 5),))
        small.costs = measure.costs  # predicted once
        depth = max((depth for depth in range(1, 5) if smallest is None or needed[depth - 1] <= smallest), default=1)
        assert small.strategy.plan(STATE, small.candidate()) == small.strategy.plan_at(depth, 3)
        assert small.strategy.evaluated(STATE) == small.strategy.plan_at(depth)
        fits = smallest is None or needed[depth - 1] <= smallest
        assert (small.strategy.plan(STATE, small.candidate(smallest)) is not None) == fits


def test_classes_share_nothing():
    overrides = ["strategy={name: fedclass, tier_depths: {strong: 4, weak: 2}}"]
    run, state = assembled(BASE, overrides)
    strategy = run.job.strategy
    for depth in (1, 2, 3, 4):
        plan, prefix = strategy.plan_at(depth), "" if depth == 4 else f"class{depth}_"
        assert plan.hold == plan.train == tuple(f"{prefix}{unit}" for unit in (*UNITS[:depth], "head"))
        assert set(strategy.build(plan).state_dict()) >= {name for name in state.params if name.split(".")[0] in plan.hold}
        assert strategy.variants(state)[strategy.variant_of(plan)] == plan
    assert len(set(strategy.splitting.names)) == len(strategy.splitting.names) == 2 + 3 + 4 + 5
    drawn = [state.params[f"{prefix}head.fc.weight"] for prefix in ("class1_", "class2_", "class3_", "")]
    assert not any(torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])
    new = lead_round(run.job, state).state
    weak = set(strategy.plan_at(2).hold)
    for name, value in state.params.items():
        assert torch.equal(new.params[name], value) == (name.split(".")[0] not in {*weak, *UNITS}), name
    assert strategy.evaluated(new) == strategy.plan_at(4)
    run, again = assembled(BASE, [*overrides, "fleet.tiers.0.dropout=1.0"])  # the weak ones by themselves
    alone = lead_round(run.job, again).state
    for name, value in alone.params.items():
        assert torch.equal(value, (new if name.split(".")[0] in weak else state).params[name]), name
    assert run.job.strategy.evaluated(alone) == strategy.plan_at(2)
    assert Small("fedclass", **VIT).values  # first values of every class of a model with tokens


def test_settings():
    assert settings_of(STRATEGIES.get("flextrain"))().model_dump() == {
        "depths": 4, "cuts": None, "tier_depths": None, "beta": 0.2, "aggregation": "padded"}
    for name in ("fedsmall", "fedclass"):
        assert settings_of(STRATEGIES.get(name))().model_dump() == {"depths": 4, "cuts": None, "tier_depths": None}
    for bad in ({"depths": 0}, {"beta": -0.1}, {"aggregation": "mean"}, {"tier_depths": {"t": 0}}, {"cuts": "conv0"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            settings_of(STRATEGIES.get("flextrain"))(**bad)
    assert Small("flextrain", cuts=["conv1"]).strategy.stops == (2, 4)
    assert Small("flextrain", depths=1).strategy.stops == (4,)
