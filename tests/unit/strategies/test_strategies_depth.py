"""What the four methods on depth have in common with every strategy."""

import pytest
import torch
from depth_problem import Small, data

from dfed.errors import ConfigError
from dfed.state import ServerState

NAMES = ["depthfl", "fedepth", "inclusivefl", "progfed"]
SETTINGS = {"progfed": {"stage_rounds": 2}}
VIT = {"depth": 3, "width": 12, "dropout": 0.1}


def small_plans(small):
    """One plan of each kind."""
    strategy = small.strategy
    if hasattr(strategy, "ends"):
        return [strategy.plan_of((1, 2, 3, 4))]
    plans = [strategy.plan_at(depth) for depth in (1, 2, 3)]
    return plans if strategy.__class__.__name__ != "ProgFed" else [*plans, strategy.plan_at(2, warms_up=True)]


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_no_bit(name):
    updates = []
    for recompute in (False, True):
        small = Small(name, "vit_tiny", VIT, shape=(3, 8, 8), **SETTINGS.get(name, {}),
                      client={"steps": 2, "activation_checkpointing": recompute})
        updates.append([small.train(plan, *data(shape=(3, 8, 8)))[0].update for plan in small_plans(small)])
    for plain, recomputed in zip(*updates, strict=True):
        assert plain.keys() == recomputed.keys()
        assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_trains_and_a_strategy_does_not_change(name):
    small = Small(name, **SETTINGS.get(name, {}), client={"steps": 2, "precision": "bf16"})
    before = dict(vars(small.strategy))
    for plan in small_plans(small):
        result, _ = small.train(plan, *data())
        assert result.loss_sum.dtype == torch.float32
        assert torch.isfinite(result.loss_sum)
        assert all(value.dtype == torch.float32 for value in result.update.values())
        assert any(not torch.equal(value, small.values[key]) for key, value in result.update.items())
    assert vars(small.strategy) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_client_without_a_limit_gets_the_most(name):
    small = Small(name, **SETTINGS.get(name, {}))
    state = small.strategy.init(small.values)
    assert small.strategy.plan(state, small.candidate(None)) is not None
    for plan in (small.strategy.evaluated(state), *small.strategy.variants(state).values()):
        model = small.model(plan, torch.float32).eval()
        assert model(data()[0]).shape == (8, 3)
    new = ServerState(round_index=1, params=state.params, tensors=state.tensors, facts=state.facts)
    after = small.strategy.advance(state, new, {"senders": {}})  # a round in which nobody completed
    assert all(after.params[key] is value for key, value in state.params.items())


@pytest.mark.parametrize("name", ["depthfl", "inclusivefl", "progfed"])
def test_cuts_that_cannot_be_are_a_fault_of_the_config(name):
    with pytest.raises(ConfigError, match=r"`cuts` must name units of 'cnn'.*conv0, conv1, conv2; but is \['head'\]"):
        Small(name, cuts=["head"], **SETTINGS.get(name, {}))
