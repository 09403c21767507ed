"""Ways to train a model by itself, and when a budget does for them."""

from __future__ import annotations

import sys

import pytest
import torch

from dfed.client import ClientSettings
from dfed.errors import ConfigError
from dfed.models import build_chain
from dfed.planner import Store, chain_costs, split_chain, ways, with_batch
from dfed.planner.ways import largest_batch, stage_ways, verdict_of, why_not
from dfed.registry import UnknownName

SETTINGS = ClientSettings(batch_size=8, momentum=0.9)
ENOUGH = 2**34


@pytest.fixture(scope="module")
def chain():
    return build_chain("mlp", {"hidden": [6, 5]}, input_shape=(7,), num_classes=4)


@pytest.fixture(scope="module")
def normed():
    """A batch norm sees one value a channel of each sample."""
    return build_chain("resnet8", {}, input_shape=(1, 4, 4), num_classes=4)


def test_verdicts():
    table = {"hard": ["no", "maybe", "maybe", "yes"], "predicted": ["no", "yes", "yes", "yes"], "off": ["yes"] * 4}
    for enforce, expected in table.items():
        assert [verdict_of(100, 130, budget, enforce) for budget in (99, 100, 129, 130)] == expected
        assert verdict_of(100, 130, None, enforce) == "yes"


def test_ranges_may_leave_out_an_end(chain):
    first, second, *_, last = chain.unit_names
    shares, store = {}, Store(None)
    for train in (first, f"{first}:{first}", f":{first}", f"{second}:{last}", f"{second}:", f":{last}", f"{first}:"):
        rows = ways(chain, SETTINGS, 2**20, train=train, store=store)
        shares[train] = rows[-1].trained_share if rows[-1].name == f"{train} trained" else None
    assert 0 < shares[first] == shares[f"{first}:{first}"] == shares[f":{first}"] < 1
    assert shares[f"{second}:{last}"] == shares[f"{second}:"] == pytest.approx(1 - shares[first])
    assert shares[f":{last}"] is shares[f"{first}:"] is None  # full training, which is there already
    for wrong, error in ((":", ConfigError), ("", ConfigError), (f"{last}:{first}", ConfigError), ("x:", UnknownName)):
        with pytest.raises(error):
            ways(chain, SETTINGS, None, train=wrong)


def test_what_trains_the_same_is_there_once(chain, monkeypatch):
    assert [way.name for way in ways(chain, SETTINGS, ENOUGH)] == ["full training", "full, activations recomputed"]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["dfed.planner.ways"], "_longest_range", None)  # is not looked for where everything fits
        assert len(ways(chain, SETTINGS, ENOUGH)) == 2
    last = chain.unit_names[-1]
    names = [way.name for way in ways(chain, SETTINGS, 2**20, train=last)]
    assert names[2:] == [f"{last} to the end trained"]


def test_the_longest_range_is_the_first_that_fits(chain):
    names = chain.unit_names
    needed = [ways(chain, SETTINGS, 2**20, train=f"{name}:")[-1].needed_bytes for name in names[1:]]
    needed = [ways(chain, SETTINGS, 2**20)[0].needed_bytes, *needed]
    assert needed == sorted(set(needed), reverse=True)
    for start in range(1, len(names)):
        for budget in (needed[start], needed[start - 1] - 1):
            longest = ways(chain, SETTINGS, budget)[-1]
            assert (longest.name, longest.fits) == (f"{names[start]} to the end trained", True)


def test_stages_are_numbered_and_need_what_the_splitting_says(chain):
    split = split_chain(chain, SETTINGS, num_blocks=2)
    rows = stage_ways(chain, split, SETTINGS, ENOUGH)
    assert [row.name for row in rows] == ["stage 1 of 2", "stage 2 of 2"]
    assert tuple(row.peak_bytes for row in rows) == split.peak_bytes


def test_a_batch_that_cannot_run_fits_no_budget(normed):
    costs, plan = chain_costs(normed, SETTINGS, torch.device("cpu"))
    alone = with_batch(plan, 1)
    assert why_not(costs, plan) is why_not(costs, with_batch(plan, 2)) is None
    assert "batch norm" in why_not(costs, alone)
    for batch_size, needed in ((1, 0), (2, 2), (3, 3)):
        assert largest_batch(costs, plan, costs.budget_bytes(with_batch(plan, batch_size))) == needed
    for way in ways(normed, SETTINGS.model_copy(update={"batch_size": 1}), ENOUGH):
        assert (way.verdict, way.fits, way.peak_bytes, way.needed_bytes) == ("no", False, None, None)
        assert "batch norm" in way.reason
        assert way.smallest_batch == 2
    for way in ways(normed, SETTINGS, ENOUGH):
        assert (way.verdict, way.reason, way.smallest_batch) == ("yes", None, 2)


def test_a_batch_of_one_runs_elsewhere(chain):
    costs, plan = chain_costs(chain, SETTINGS, torch.device("cpu"))
    assert why_not(costs, with_batch(plan, 1)) is None
    assert largest_batch(costs, plan, costs.budget_bytes(with_batch(plan, 1))) >= 1
    assert {way.smallest_batch for way in ways(chain, SETTINGS, ENOUGH)} == {1}


def test_other_errors_are_not_taken_for_it():
    class Costs:
        def peak_bytes_at(self, plan):
            raise ValueError("something else")

    _, plan = chain_costs(build_chain("mlp", {}, input_shape=(3,), num_classes=2), SETTINGS, torch.device("cpu"))
    with pytest.raises(ValueError, match="something else"):
        why_not(Costs(), with_batch(plan, 1))
