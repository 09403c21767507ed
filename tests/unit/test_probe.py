"""The peaks that one prediction gives, against predictions at the sizes themselves, for every strategy's own plans."""

from __future__ import annotations

import pytest
from plan_problem import BASE

from dfed.config import load_config
from dfed.overview import Survey, choices, prepare_to_plan
from dfed.planner.costs import Costs, with_batch
from dfed.planner.line import PeakLine

SIZE = 20
CONFIG = {**BASE, "client": {**BASE["client"], "batch_size": 8}, "memory": {"enforce": "predicted"},
          "model": {"name": "cnn", "channels": [8, 16], "hidden": 1024, "norm": "batch"}}


@pytest.mark.parametrize(("settings", "names"), [
    ([], None),
    (["client.activation_checkpointing=true", "client.precision=bf16", "client.clip_norm=1.0"], ["fedavg", "neulite", "fjord"]),
], ids=["plain", "recomputed"])
def test_one_prediction_tells_what_another_size_would(settings, names, monkeypatch, tmp_path):
    met, probe = {}, Costs._probe

    def checked(costs, plan):
        found = probe(costs, plan)
        if found is not None and len(met.setdefault(type(costs.strategy).__name__, [])) < 2:
            line = PeakLine.from_json(found)
            met[type(costs.strategy).__name__].append((line.at(SIZE), max(costs._course(with_batch(plan, SIZE)))))
        return found

    monkeypatch.setattr(Costs, "_probe", checked)
    # Children would keep what they met to themselves.
    monkeypatch.setattr("dfed.planner.store.in_children", lambda work, items, **_: [None] * len(items))
    config = load_config(None, [*settings, f"data.cache={tmp_path}"], base=CONFIG)
    survey = Survey(prepare_to_plan(config))
    for choice in choices(config, names):
        survey.under(choice)
    assert len(met) >= (12 if names is None else len(names))
    assert not {name: peaks for name, found in met.items() for peaks in found if peaks[0] != peaks[1]}
