"""NeuLite: what each stage holds, trains, sends and loses, and when the server goes on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from depth_problem import Small, data

from dfed.blocks import tail_parameters
from dfed.blocks.hsic import centred_kernel, nhsic
from dfed.errors import ConfigError
from dfed.plan import Phase
from dfed.registry import STRATEGIES
from dfed.settings import settings_of
from dfed.strategies.movement import MOST_ENTRIES, Pace, effective_movement, sample_of

STAGES = 3
CUTS = ["conv0", "conv1"]
SOME, NOBODY = {"senders": {"conv0": 1}}, {"senders": {}}


@pytest.fixture(scope="module")
def small():
    return Small("neulite", split=CUTS)


def test_blocks_and_stages(small):
    strategy = small.strategy
    assert strategy.blocks.blocks == {"b0": ("conv0",), "b1": ("conv1",), "b2": ("conv2", "hidden", "head")}
    assert set(strategy.extras) == {"output_b0", "output_b1"}
    first, second, last = (strategy.plan_at(number, 3) for number in range(STAGES))
    assert (first.hold, first.train) == (("conv0", "output_b0"),) * 2
    assert (second.hold, second.train) == (("conv0", "conv1", "output_b1"),) * 2  # conv0 for its tail
    assert last.hold == ("conv0", "conv1", "conv2", "hidden", "head")
    assert last.train == ("conv1", "conv2", "hidden", "head")
    assert strategy.weights == [(0.1, 0.0), (0.05, 0.05), (0.0, 0.1)]  # of the input falling, of the label rising
    x, _ = data(4)
    for number in range(STAGES):
        model = small.model(strategy.plan_at(number), torch.float32).eval()
        assert model(x).shape == (4, 3)


def test_the_output_has_the_final_shape_and_stands_in_for_each_block():
    strategy = Small("neulite", "resnet18", {}, shape=(3, 32, 32)).strategy
    assert [len(units) for units in strategy.blocks.blocks.values()] == [3, 2, 2, 3]  # the release's: by resolution
    for number, layers in ((0, 3), (1, 2), (2, 1)):
        output = strategy.extras[f"output_b{number}"]
        steps = [layer for name, layer in output.named_children() if name.startswith("step")]
        assert len(steps) == layers
        assert steps[-1].out_channels == 512
        assert all((step.stride, step.bias, step.kernel_size) == ((2, 2), None, (3, 3)) for step in steps)
        shapes = strategy.problem.chain.output_shapes()
        features = torch.empty(2, *shapes[strategy.blocks.blocks[f"b{number}"][-1]], device="meta")
        for step in steps:
            features = step(features)
        assert features.shape[1:] == shapes["layer4_1"]


def test_only_what_is_trained_moves_and_goes_up(small):
    strategy = small.strategy
    x, y = data()
    for number in range(STAGES):
        plan = replace(strategy.plan_at(number), phases=tuple(replace(phase, epochs=None, steps=2) for phase
                                                              in strategy.plan_at(number).phases))
        result, model = small.train(plan, x, y)
        state = model.state_dict()
        tail = set() if number == 0 else {name.rpartition(".")[0] for name in tail_parameters(small.chain, f"conv{number - 1}")}
        block = {*strategy.blocks.blocks[f"b{number}"], f"output_b{number}"}
        expected = {name for name in small.forms.of(plan).regions
                    if name.partition(".")[0] in block or name.rpartition(".")[0] in tail}
        assert set(result.update) == expected == {entry.name for entry in small.forms.of(plan).up}
        for name, value in result.update.items():
            assert not torch.equal(value, small.values[name]), name
        for name in set(small.forms.of(plan).regions) - expected:
            if not name.endswith(("running_mean", "running_var")) or name.partition(".")[0] not in plan.train:
                assert torch.equal(state[name], small.values[name]), name


def test_the_gradient_crosses_one_boundary():
    """A change of the block before the last changes its tail's gradient only; nothing earlier has one."""
    small = Small("neulite", "resnet8", {"width": 4}, shape=(3, 8, 8))
    strategy = small.strategy
    x, y = data(4, (3, 8, 8))
    for number in range(1, len(strategy.blocks.names)):
        plan = strategy.plan_at(number)
        model = small.model(plan, torch.float32)
        strategy.receive(model, {}, plan)
        strategy.loss(model, x, y, plan.phases[0]).backward()
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        before = strategy.blocks.blocks[strategy.blocks.names[number - 1]][-1]
        own = {name for name, _ in model.named_parameters()
               if name.partition(".")[0] in (*strategy.blocks.blocks[strategy.blocks.names[number]], plan.hold[-1])}
        assert with_gradient == own | set(tail_parameters(small.chain, before))


def test_the_loss_is_what_the_paper_says(small):
    x, y = data(8)
    for settings in ({}, {"projection": [5, 4]}, {"proximal_on": "trained", "proximal": 0.3, "tail": "none"},
                     {"mentor_input": 0.0, "mentor_label": 0.0, "proximal": 0.0}):
        this = Small("neulite", split=CUTS, **settings) if settings else small
        strategy = this.strategy
        for number in range(STAGES):
            plan = strategy.plan_at(number)
            model = this.model(plan, torch.float32)
            strategy.receive(model, {}, plan)
            shift = 0.01
            with torch.no_grad():
                moved = [parameter.add_(shift) for parameter in model.parameters() if parameter.requires_grad]
            found = strategy.loss(model, x, y, plan.phases[0])
            # By hand, from the model's parts.
            reference = this.model(plan, torch.float32)
            reference.load_state_dict(model.state_dict())
            reference.train()
            features = x
            for unit in plan.hold[:-1] if number < STAGES - 1 else ():
                if unit in this.chain.unit_names:
                    features = reference.unit(unit)(features)
            if number < STAGES - 1:
                for name, layer in reference.unit(f"output_b{number}").named_children():
                    scores = layer(features)
                    features = scores if name != "head" else features
            else:
                for unit in this.chain.unit_names[:-1]:
                    features = reference.unit(unit)(features)
                scores = reference.unit("head")(features)
            of_input, of_label = strategy.weights[number]
            expected = F.cross_entropy(scores, y)
            expected = expected - of_input * nhsic(centred_kernel(x), centred_kernel(features))
            pooled = features.mean((2, 3)) if features.ndim == 4 else features
            if strategy.projects:
                pooled = reference.get_submodule(f"mentor_b{number}")(pooled)
            expected = expected - of_label * nhsic(centred_kernel(F.one_hot(y, 3).float()), centred_kernel(pooled))
            entries = sum(parameter.numel() for parameter in moved)
            if strategy.proximal_on == "tail":
                tail = tail_parameters(this.chain, f"conv{number - 1}") if number and strategy.tail != "none" else ()
                entries = sum(dict(model.named_parameters())[name].numel() for name in tail)
            expected = expected + strategy.proximal / 2 * entries * shift**2
            # The same operations in float32, save for the proximal term: p + 0.01 − p is 0.01 to some 1e-5.
            assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_frozen_norms_use_and_keep_their_statistics(small):
    plan = small.strategy.plan_at(2)
    x, y = data()
    _, model = small.train(replace(plan, phases=(replace(plan.phases[0], epochs=None, steps=2),)), x, y)
    assert torch.equal(model.state_dict()["conv0.norm.running_mean"], small.values["conv0.norm.running_mean"])
    assert not torch.equal(model.state_dict()["conv2.norm.running_mean"], small.values["conv2.norm.running_mean"])


def test_an_elastic_tail_takes_what_the_budget_allows():
    small = Small("neulite", "resnet8", {"width": 8}, shape=(3, 16, 16), split=["layer1_0", "layer2_0"], tail="elastic")
    strategy = small.strategy
    state = strategy.init(small.values)
    state = replace(state, facts={**state.facts, "stage": 1})
    needs = [small.costs.budget_bytes(strategy.plan_at(1, thawed=thawed)) for thawed in range(3)]
    assert needs == sorted(needs)
    assert needs[2] > needs[1] > needs[0]
    for thawed in range(3):
        plan = strategy.plan(state, small.candidate(needs[thawed]))
        assert plan.options["thawed"] == thawed
        assert plan.train == (*(("layer1_0",), ("layer1_0",), ("stem", "layer1_0"))[thawed], "layer2_0", "output_b1")
    plan = strategy.plan(state, small.candidate(needs[0] - 1))  # less than for the tail: nothing of the block before
    assert (plan.train, plan.options["tail"]) == (("layer2_0", "output_b1"), False)
    least = small.costs.budget_bytes(plan)
    assert strategy.plan(state, small.candidate(least)) == plan
    assert strategy.plan(state, small.candidate(least - 1)) is None
    trained = (name for name, parameter in strategy.build(plan).named_parameters() if parameter.requires_grad)
    assert {name.partition(".")[0] for name in trained} == {"layer2_0", "output_b1"}
    first = replace(state, facts={**state.facts, "stage": 0})
    assert strategy.plan(first, small.candidate(0)) is None
    assert len(strategy.plans(0, 3, shrinks=False)) == 1


def test_rotation(small):
    strategy = small.strategy
    state = strategy.init(small.values)
    stages, noted = [], []
    for _ in range(7):
        stages.append(state.facts["stage"])
        state = strategy.advance(state, replace(state, round_index=state.round_index + 1), SOME)
        noted.append(strategy.note(state))
    assert stages == [0, 1, 2, 0, 1, 2, 0]
    assert noted == [{"stage": stage + 1, "movement": None} for stage in stages]
    evaluated = strategy.evaluated(state)
    assert evaluated == strategy.full_plan()
    form = small.forms.of(evaluated)
    assert form.regions.keys() == small.chain.state_dict().keys() & small.shapes.keys() == {entry.name for entry in form.up}
    model, (x, y) = small.model(evaluated, torch.float32).eval(), data()
    strategy.receive(model, {}, evaluated)
    assert torch.equal(strategy.loss(model, x, y, evaluated.phases[0]), F.cross_entropy(model(x), y))


def test_elastic_goes_on_when_the_block_has_settled():
    """Steady steps give EM = 1 in every window: settled as soon as ``patience`` lines are flat. A turn-around bends them."""
    small = Small("neulite", split=CUTS, order="elastic", window=3, patience=2, threshold=0.05)
    strategy = small.strategy
    state, series, slopes, left, stages, evaluated = strategy.init(small.values), [], [], [], [], []
    assert strategy.evaluated(state).options["stage"] == 1
    steps = [1.0] * 8
    for step in steps:
        params = {name: value + step * 1e-3 if name.startswith("conv0") else value for name, value in state.params.items()}
        state = strategy.advance(state, replace(state, params=params, round_index=state.round_index + 1), SOME)
        stages.append(state.facts["stage"])
        evaluated.append(strategy.evaluated(state).options["stage"] - 1)
        noted = strategy.note(state)
        series.append(noted["movement"])
        slopes.append(noted["slope"])
        left.append(noted.get("left"))
    # Windows are full from round 3 on; lines of three values from round 5; two flat ones in round 6.
    assert stages == [0, 0, 0, 0, 0, 1, 1, 1]
    # Sums of a thousandth in float32 leave four digits.
    assert series[2:6] == pytest.approx([1, 1, 1, 1], rel=1e-3)
    assert series[6] is None  # the next block starts with a window of its own
    assert left == [None] * 5 + [{"stage": 1, "why": "settled"}] + [None] * 2
    assert slopes[:4] == [None] * 4
    assert slopes[4:6] == pytest.approx([0, 0], abs=1e-3)
    assert evaluated == [0, 0, 0, 0, 0, 0, 1, 1]  # never one that nobody has trained
    nobody = strategy.advance(replace(state, facts={**state.facts, "stage": 2}, tensors={}), state, NOBODY)
    assert strategy.evaluated(nobody).options["stage"] == 2
    for _ in range(9):  # what is remembered does not grow with the run
        state = strategy.advance(state, replace(state, round_index=state.round_index + 1), SOME)
        assert len(state.facts["movement"]) <= 3 + 2 - 1
        assert len(state.tensors.get("movement", ())) <= 3
    assert not Pace(window=3, threshold=0.05, patience=2).is_settled([1.0, 1.0, 1.0, 0.8, 0.6])  # flat once only


def test_effective_movement_against_its_definition():
    generator = np.random.default_rng(0)
    changes = generator.standard_normal((5, 40))
    naive = np.abs(changes.sum(0)).sum() / np.abs(changes).sum()
    assert effective_movement(torch.from_numpy(changes)) == pytest.approx(naive, rel=1e-12)
    assert effective_movement(torch.tensor([[1.0, -2.0], [-1.0, 2.0]])) == 0.0
    assert effective_movement(torch.zeros(3, 4)) == 0.0
    assert effective_movement(torch.ones(3, 4)) == 1.0
    series = generator.standard_normal(9).tolist()
    slope = np.polyfit(range(4), series[5:], 1)[0]
    for threshold, settled in ((abs(slope) * 1.01, True), (abs(slope) * 0.99, False)):
        pace = Pace(window=4, threshold=threshold, patience=1)
        assert pace.is_settled(series) == settled
        assert pace.slope(series) == pytest.approx(slope, rel=1e-9)
    assert not Pace(window=4, threshold=math.inf, patience=1).is_settled(series[:3])
    assert Pace(window=4, threshold=math.inf, patience=1).slope(series[:3]) is None
    low = Pace(window=4, threshold=0.3, patience=2, criterion="level")
    assert [low.is_settled(values) for values in ([0.9, 0.2, 0.2], [0.9, 0.2, 0.4], [0.2], [])] == [True, False, False, False]


def test_the_sample_is_always_the_same_and_at_most_so_many():
    params = {"a": torch.arange(9000.0).view(90, 100), "b": torch.arange(9000.0, 21000.0), "c": torch.zeros(3)}
    first = sample_of(params, ["a", "b"], 1, "block")
    assert len(first) == MOST_ENTRIES == len(set(first.tolist()))
    assert torch.equal(first, sample_of(params, ["a", "b"], 1, "block"))
    assert not torch.equal(first, sample_of(params, ["a", "b"], 2, "block"))
    assert 0.35 < (first < 9000).float().mean() < 0.5  # 9,000 of 21,000, give or take 15 standard deviations
    assert sample_of(params, ["c", "a"], 1, "block")[:3].tolist() == [0, 0, 0]


def test_a_tail_in_a_residual_unit_leaves_its_first_norm_alone():
    """What of the tail's unit does not go up is used as it came down: statistics included."""
    small = Small("neulite", "resnet8", {"width": 4}, shape=(3, 8, 8), split=["layer1_0", "layer2_0"])
    plan, (x, y) = small.strategy.plan_at(1), data(8, (3, 8, 8))
    result, model = small.train(replace(plan, phases=(replace(plan.phases[0], epochs=None, steps=2),)), x, y)
    state, unit = model.state_dict(), "layer1_0"
    assert any(name.startswith(f"{unit}.bn2") for name in result.update)
    for name in small.forms.of(plan).regions:
        assert (name in result.update) == (not torch.equal(state[name], small.values[name])), name


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="window"):  # no line goes through one value
        settings_of(STRATEGIES.get("neulite"))(window=1)
    for cuts in (["nope"], ["conv1", "conv0"], ["hidden"], ["head"]):
        with pytest.raises(ConfigError, match="split"):
            Small("neulite", split=cuts)
    assert len(Small("neulite", blocks=9).strategy.blocks.names) == 4  # no more than the units of the body
    assert Phase(batch_size=8, epochs=1) == Small("neulite").strategy.full_plan().phases[0]
