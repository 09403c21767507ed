"""What progressive methods share beside stages: shrinking before growing, and going back when the validation loss says so."""

import math
from dataclasses import replace

import pytest
import torch
from depth_problem import Small, data

from dfed.errors import ConfigError
from dfed.registry import STRATEGIES
from dfed.settings import settings_of

CUTS = ["conv0", "conv1"]
SOME = {"senders": {"conv0": 1}}


def after_round(strategy, state, step=0.0, blocks=()):
    """The state after a round in which what begins with one of ``blocks`` moved by ``step``."""
    params = {name: value + step * name.startswith(tuple(blocks)) for name, value in state.params.items()}
    return strategy.advance(state, replace(state, params=params, round_index=state.round_index + 1), SOME)


def test_shrinking_goes_from_the_last_block_to_the_second_and_hands_down():
    small = Small("profl", split=CUTS, shrink_rounds=2, window=2, patience=1, threshold=0.5)
    strategy = small.strategy
    state, seen = strategy.init(small.values), []
    for number in range(8):
        plan = strategy.plan(state, small.candidate())
        seen.append((plan.options["stage"] - 1, not plan.options.get("tail", True)))
        assert strategy.evaluated(state).options["stage"] == state.facts["trained"] + 1
        before = state.params
        state = after_round(strategy, state, 1e-3, ("conv", "output", "head"))
        if number == 1:  # the classifier as it was learned is the output module's of the second block
            for rest in ("weight", "bias"):
                names = [name for name in before if name.startswith("head.") and name.endswith(rest)]
                for name in names:
                    assert torch.equal(state.params[f"output_b1.{name}"], state.params[name])
        if number == 3:  # one more layer comes first in the output module of the first block
            moved = [name for name in state.params if name.startswith("output_b1.")]
            assert {name.split(".")[1] for name in moved} == {"step0", "head"}
            for name in moved:
                there = name.replace("output_b1", "output_b0").replace("step0", "step1")
                assert torch.equal(state.params[there], state.params[name]), name
            own = "output_b0.step0.weight"
            assert torch.equal(state.params[own], before[own] + 1e-3)
    # Steady steps settle as soon as two windows of two rounds can be compared: three rounds a stage.
    assert seen == [(2, True)] * 2 + [(1, True)] * 2 + [(0, False)] * 3 + [(1, False)]
    assert [strategy.note(replace(state, facts={**state.facts, "trained": stage}))["stage"] for stage in range(3)] == [1, 2, 3]


def test_shrinking_trains_its_block_and_output_only():
    """The front is as it was drawn: no tail, although the method trains one when it grows."""
    small = Small("neulite", split=CUTS, order="elastic", shrink_rounds=1)
    plan = small.strategy.plan(small.strategy.init(small.values), small.candidate())
    assert plan.options == {"stage": 3, "thawed": 0, "tail": False}
    x, y = data()
    result, _ = small.train(replace(plan, phases=(replace(plan.phases[0], epochs=None, steps=2),)), x, y)
    assert {name.partition(".")[0] for name in result.update} == {"conv2", "hidden", "head"}
    growing = small.strategy.plan_at(2)
    assert growing.train[0] == "conv1"
    assert plan.train == growing.train[1:]
    assert plan.cost_key() != growing.cost_key()


def test_a_stage_that_makes_things_worse_is_rolled_back():
    small = Small("neulite", split=CUTS, order="elastic", rollback=3, threshold=1e-9)
    strategy = small.strategy
    assert strategy.heeds_evaluation == 3
    state, history = strategy.init(small.values), []
    losses = [1.0, 0.8, 0.9, math.nan, 0.85, 0.7]
    for loss in losses:
        state = after_round(strategy, state, 1e-2, ("conv0", "output_b0"))
        state = strategy.judged(state, loss)
        history.append(state)
    # The second round was the best; three rounds later the stage goes back to it, and the next one begins.
    assert [s.facts["stage"] for s in history] == [0, 0, 0, 0, 1, 1]
    best, back = history[1], history[4]
    for name, value in back.params.items():
        assert torch.equal(value, best.params[name]), name
    assert not torch.equal(history[3].params["conv0.conv.weight"], best.params["conv0.conv.weight"])
    assert strategy.note(back)["left"] == {"stage": 1, "why": "rolled back", "to_round": 2}
    assert back.tensors == {}
    assert "left" not in strategy.note(history[5])
    assert history[5].facts["best"] == {"loss": 0.7, "round": 6, "since": 0}
    kept = {name for name in history[5].tensors if name.startswith("best/")}
    assert {name.split("/")[1].partition(".")[0] for name in kept} == {"conv0", "conv1", "output_b1"}
    # What a resumed run would have: JSON facts and float32 tensors, of a stage's size and no more.
    assert all(tensor.dtype == torch.float32 for tensor in history[5].tensors.values())


def test_what_an_elastic_tail_trained_comes_back_too():
    """Clients with more memory train more of the block before than the plan without any of it."""
    small = Small("neulite", "resnet8", {"width": 4}, shape=(3, 8, 8), split=["layer1_0", "layer2_0"], tail="elastic",
                  order="elastic", rollback=1)
    strategy = small.strategy
    state = strategy.init(small.values)
    state = replace(state, facts={**state.facts, "stage": 1, "trained": 1}, slots={"stem.conv.weight": {"momentum": 1},
                                                                                  "layer3_0.conv1.weight": {"momentum": 2}})
    best = strategy.judged(after_round(strategy, state, 1e-2, ("stem", "layer1_0", "layer2_0", "output_b1")), 0.5)
    bad = after_round(strategy, best, 1e-2, ("stem", "layer1_0", "layer2_0", "output_b1"))
    worse = strategy.judged(bad, 0.6)
    for name, value in best.params.items():
        assert torch.equal(worse.params[name], value), name
    assert worse.facts["stage"] == 2
    assert worse.slots == {"layer3_0.conv1.weight": {"momentum": 2}}  # the others led to what was given up


def test_a_loss_that_is_not_finite_is_no_best():
    strategy = (small := Small("neulite", split=CUTS, order="elastic", rollback=1)).strategy
    state = strategy.init(small.values)
    for _ in range(3):
        state = strategy.judged(after_round(strategy, state, 1e-2, ("conv0",)), math.nan)
        assert (state.facts["best"], state.facts["stage"]) == (None, 0)
    assert strategy.judged(after_round(strategy, state), 0.5).facts["best"] == {"loss": 0.5, "round": 4, "since": 0}


def test_the_last_stage_goes_back_and_goes_on():
    small = Small("smartfreeze", split=["conv0"], rollback=1)
    strategy = small.strategy
    state = strategy.init(small.values)
    state = replace(state, facts={**state.facts, "stage": 1, "trained": 1})
    best = strategy.judged(after_round(strategy, state, 1e-2, ("hidden",)), 0.5)
    worse = strategy.judged(after_round(strategy, best, 1e-2, ("hidden",)), 0.6)
    assert worse.facts["stage"] == 1
    for name, value in best.params.items():
        assert torch.equal(worse.params[name], value), name
    assert worse.facts["best"]["round"] == worse.round_index
    assert strategy.note(worse)["left"]["to_round"] == best.round_index


def test_rounds_in_which_nobody_trained_do_not_count():
    strategy = Small("neulite", split=CUTS, order="elastic", rollback=2).strategy
    state = strategy.judged(after_round(strategy, strategy.init(Small("neulite", split=CUTS).values), 1e-2, ("conv0",)), 0.5)
    for _ in range(5):
        state = strategy.advance(state, replace(state, round_index=state.round_index + 1), {"senders": {}})
        state = strategy.judged(state, 0.5)
    assert (state.facts["stage"], state.facts["best"]["since"]) == (0, 0)
    for stage in (0, 1):
        state = strategy.judged(after_round(strategy, state, 1e-2, ("conv0",)), 0.6)
        assert state.facts["stage"] == stage


def test_figures_of_another_stage_count_for_nothing():
    small = Small("neulite", split=CUTS, order="elastic", rollback=1, window=2, patience=1, threshold=0.5)
    strategy, states = small.strategy, []
    state = strategy.init(small.values)
    for _ in range(3):
        state = strategy.judged(after_round(strategy, state, 1e-2, ("conv0",)), 1.0 - 0.1 * len(states))
        states.append(state)
    assert states[2].facts["stage"] == 1  # settled: the figures are of the stage that it left
    assert states[2].facts["best"] is None
    without = Small("neulite", split=CUTS, order="rotate").strategy
    for options in ({"rollback": 1}, {"shrink_rounds": 2}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}.*must be .* with `order: rotate`"):
            Small("neulite", split=CUTS, order="rotate", **options)
    assert without.heeds_evaluation is None
    assert without.judged(state, 9.0) is state


@pytest.mark.parametrize("name", ["profl", "smartfreeze"])
def test_siblings_train_by_cross_entropy_without_a_tail(name):
    settings = {"shrink_rounds": 0} if name == "profl" else {}
    small = Small(name, split=CUTS, **settings)
    plan, (x, y) = small.strategy.plan_at(1), data()
    assert (plan.train, plan.phases[0].objective) == (("conv1", "output_b1"), "cross_entropy")
    model = small.model(plan, torch.float32)
    small.strategy.receive(model, {}, plan)
    assert torch.equal(small.strategy.loss(model, x, y, plan.phases[0]), torch.nn.functional.cross_entropy(model(x), y))
    assert small.strategy.schedule.pace.criterion == ("slope" if name == "profl" else "level")
    with pytest.raises(ValueError, match="shrink_rounds" if name == "profl" else "patience"):
        settings_of(STRATEGIES.get(name))(**({} if name == "profl" else {"patience": 0}))
