"""ProgFed: stages that grow, warm-ups, and a last stage that is the full model's training to the bit."""

import dataclasses
import json

import pytest
import torch
from depth_problem import CNN, Small, data

from dfed.plan import Plan
from dfed.registry import STRATEGIES
from dfed.settings import settings_of
from dfed.state import ServerState

UNITS = ("conv0", "conv1", "conv2", "hidden", "head")
SOME = {"senders": {"conv0": 1}}


def rounds(small, number):
    """The states with which so many rounds start."""
    state = small.strategy.init(small.values)
    for _ in range(number):
        yield state
        state = small.strategy.advance(state, dataclasses.replace(state, round_index=state.round_index + 1), SOME)


def test_the_course_of_a_run():
    small = Small("progfed", stage_rounds=3, warmup_rounds=1, client={"steps": 2})
    trained, before = [], UNITS[:1]
    for state in rounds(small, 14):
        plan = small.strategy.plan(state, small.candidate(round_index=state.round_index))
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        trained.append(plan.train)
        evaluated = small.strategy.evaluated(state)
        assert evaluated.hold == (*before, f"stage{len(before)}_head")[:len(UNITS)]  # what the round before trained
        before = tuple(name for name in plan.hold if name in UNITS)
        assert small.strategy.build(evaluated).eval()(data()[0].to("meta")).shape == (8, 3)
        held = {name for name in small.shapes if small.strategy.splitting.block_of(name) in plan.hold}
        assert {entry.name for entry in small.forms.of(plan).down} == held  # no byte of what is not there yet
        assert {entry.name for entry in small.forms.of(plan).up} == {n for n in held if n.split(".")[0] in plan.train}
        assert json.loads(json.dumps(state.facts)) == {
            "stage": 4 if plan.hold == UNITS else len(plan.hold) - 1,
            "trained": 4 if evaluated.hold == UNITS else len(evaluated.hold) - 1,
        }
    first, second, third = ((*UNITS[:stage], f"stage{stage}_head") for stage in (1, 2, 3))
    assert trained == [first] * 3 + [second[1:]] + [second] * 2 + [third[2:]] + [third] * 2 + [UNITS[3:]] + [UNITS] * 4


def test_the_last_stage_is_full_training_to_the_bit():
    client = {"steps": 3, "momentum": 0.9}
    small, plain = Small("progfed", stage_rounds=1, warmup_rounds=0, client=client), Small("fedavg", client=client)
    *_, state = rounds(small, 4)
    plan = small.strategy.plan(state, small.candidate(round_index=3))
    other = plain.strategy.plan(state, plain.candidate())
    assert plan == other
    assert small.strategy.build(plan).state_dict().keys() == small.chain.state_dict().keys()
    assert small.costs.peak_bytes(plan) == plain.costs.peak_bytes(other)
    x, y = data()
    ours, theirs = (each.train(plan, x, y)[0].update for each in (small, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_stage_that_nobody_trained_is_not_evaluated():
    small = Small("progfed", stage_rounds=1)
    state, evaluated = small.strategy.init(small.values), []
    for senders in ({"conv0": 1}, {}, {}, {"conv0": 1}):
        new = dataclasses.replace(state, round_index=state.round_index + 1)
        state = small.strategy.advance(state, new, {"senders": senders})
        evaluated.append(small.strategy.evaluated(state).options.get("stage", 4))
    assert evaluated == [1, 1, 1, 4]


@pytest.mark.parametrize("warms_up", [False, True])
def test_a_stage_in_float64(warms_up):
    small = Small("progfed", stage_rounds=1, client={"steps": 2, "momentum": 0.9})
    plan, (x, y) = small.strategy.plan_at(2, warms_up=warms_up), data()
    result, trained = small.train(plan, x, y)
    model = small.model(plan)
    wanted = list(model.parameters())
    if warms_up:
        model.conv0.eval()
        wanted = [parameter for name, parameter in model.named_parameters() if not name.startswith("conv0")]
        assert not any(parameter.requires_grad for parameter in model.conv0.parameters())
    optimizer = torch.optim.SGD(wanted, lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.stage2_head(model.conv1(model.conv0(x.double()))), y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        if value.is_floating_point():  # float32 against float64, two steps
            torch.testing.assert_close(trained.state_dict()[name].double(), value, rtol=1e-4, atol=2e-6)
    assert {name.split(".")[0] for name in result.update} == set(plan.train)


def test_who_takes_part():
    small = Small("progfed", options={**CNN, "hidden": 256}, stage_rounds=2, warmup_rounds=1, client={"momentum": 0.9})
    needed = {(stage, warm): small.costs.budget_bytes(small.strategy.plan_at(stage, warms_up=warm))
              for stage in (1, 2, 3, 4) for warm in (False, True) if stage > 1 or not warm}
    assert needed[4, False] == max(needed.values())
    assert needed[2, True] <= needed[2, False]
    budget = needed[3, False]
    takes_part = [small.strategy.plan(state, small.candidate(budget, round_index=state.round_index)) is not None
                  for state in rounds(small, 9)]
    fits = [needed[key] <= budget for key in [(1, False)] * 2 + [(2, True), (2, False), (3, True), (3, False), (4, True)]]
    assert takes_part == [*fits, False, False]


def test_settings():
    settings = settings_of(STRATEGIES.get("progfed"))
    assert settings(stage_rounds=4).model_dump() == {"depths": 4, "cuts": None, "stage_rounds": 4, "warmup_rounds": None}
    for bad in ({"stage_rounds": 0}, {"warmup_rounds": -1}, {"depths": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            settings(**{"stage_rounds": 3, **bad})
    with pytest.raises(ValueError, match="stage_rounds"):  # nobody knows how long a run is to be
        settings()
    for length, warmup in ((9, 0), (40, 4), (1000, 25)):
        assert Small("progfed", stage_rounds=length).strategy.warmup_rounds == warmup
    single = Small("progfed", stage_rounds=1, depths=1).strategy
    state = ServerState(round_index=0, params={}, facts={"stage": 1, "trained": 1})
    assert single.plan_at(1) == single.full_plan() == single.evaluated(state)
