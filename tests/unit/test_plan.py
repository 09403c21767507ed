from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest

from dfed.data import ArrayDataset, client_batches
from dfed.plan import Phase, Plan
from dfed.rng import torch_generator

EPOCH = Phase(batch_size=8, epochs=1)


def _plan(**changes):
    settings = {"client": 3, "hold": ("stem", "head"), "train": ("head",), "phases": (EPOCH,)}
    return Plan(**(settings | changes))


RICH = _plan(
    phases=(Phase(batch_size=4, epochs=2), Phase(batch_size=16, steps=5, objective="distil")),
    down={"stem": "bf16"}, up={"head": "fp16"},
    options={"rate": 0.25, "widths": [1, 2, None], "nested": {"on": True, "name": "ä"}},
    details={"first": 3},
)


@pytest.mark.parametrize("plan", [_plan(), RICH, _plan(hold=(), train=(), phases=())])
def test_a_plan_survives_json(plan):
    assert Plan.from_json(plan.to_json()) == plan
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert isinstance(again.hold, tuple)
    assert isinstance(again.train, tuple)
    assert all(isinstance(phase, Phase) for phase in again.phases)
    assert again.shape_key() == plan.shape_key()


def test_reading_a_plan_leaves_the_json_as_it_was():
    value = RICH.to_json()
    before = json.dumps(value)
    Plan.from_json(value)
    assert json.dumps(value) == before
    value["options"]["nested"]["on"] = False
    assert RICH.options["nested"]["on"] is True


def test_the_shape_key_tells_plans_apart_but_not_clients():
    assert RICH.shape_key() == dataclasses.replace(RICH, client=99).shape_key()
    changes = [
        {"hold": ("stem", "body", "head")}, {"train": ("stem", "head")}, {"down": {}},
        {"up": {"head": "bf16"}},
        {"phases": RICH.phases[:1]}, {"phases": RICH.phases[::-1]}, {"options": {}},
        {"options": RICH.options | {"rate": 0.5}}, {"details": {}}, {"details": {"first": 4}},
    ]
    keys = {dataclasses.replace(RICH, **change).shape_key() for change in changes}
    assert len(keys) == len(changes)
    assert RICH.shape_key() not in keys
    assert _plan(down={"stem": "fp16", "head": "bf16"}).shape_key() == _plan(down={"head": "bf16",
                                                                                   "stem": "fp16"}).shape_key()


def test_the_cost_key_tells_apart_what_needs_other_memory():
    same = [_plan(), _plan(client=9), _plan(details={"first": 2}), _plan(details={"first": 3}), _plan(up={"head": "int8"}),
            _plan(phases=tuple(replace(phase, epochs=None, steps=7) for phase in _plan().phases))]
    assert len({plan.cost_key() for plan in same}) == 1
    other = [_plan(), _plan(options={"rate": 0.5}), _plan(train=()),
             _plan(phases=tuple(replace(phase, batch_size=3) for phase in _plan().phases)),
             _plan(phases=tuple(replace(phase, epochs=None, steps=1) for phase in _plan().phases))]
    assert len({plan.cost_key() for plan in other}) == len(other)
    # What is sent, and the sub-model, may depend on all of them but the client.
    assert len({plan.shape_key() for plan in same}) == len(same) - 1
    for plan in same:
        assert plan.for_client(4) == replace(plan, client=4)
        assert plan.for_client(4).shape_key() == plan.shape_key() == replace(plan, client=4).shape_key()


def test_what_no_plan_can_be():
    with pytest.raises(AssertionError, match="does not hold: \\['body'\\]"):
        _plan(train=("head", "body"))
    for both in ({}, {"epochs": 1, "steps": 1}):
        with pytest.raises(AssertionError, match="either epochs or steps"):
            Phase(batch_size=1, **both)
    for broken in ({"epochs": 1}, {"batch_size": 1, "epochs": 1, "colour": 2}):
        with pytest.raises(TypeError):
            Plan.from_json({**RICH.to_json(), "phases": [broken]})
    with pytest.raises(dataclasses.FrozenInstanceError):
        RICH.client = 1


@pytest.mark.parametrize("num_samples", [1, 2, 7, 8, 9, 20])
def test_steps_and_visits_are_those_of_the_batches(num_samples):
    dataset = ArrayDataset(np.zeros((20, 1, 1, 1), np.float32), np.zeros(20, np.int64), num_classes=1)
    for batch_size in (1, 3, 8, 32):
        for amount in ({"epochs": 1}, {"epochs": 3}, {"steps": 1}, {"steps": 2}, {"steps": 7}, {"steps": 40}):
            phase = Phase(batch_size=batch_size, **amount)
            batches = client_batches(
                dataset, np.arange(num_samples), batch_size=batch_size, generator=torch_generator(0, "plan"), **amount
            )
            sizes = [len(y) for _, y in batches]
            case = (num_samples, batch_size, amount)
            assert phase.num_steps(num_samples) == len(sizes), case
            assert phase.num_visits(num_samples) == sum(sizes), case
