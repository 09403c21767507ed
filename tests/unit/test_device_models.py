"""Which of a run's models each device can use: counts by hand, many kinds of devices, what strategies say of their plans."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_problem import assembled

from dfed.client import Evaluation
from dfed.config import load_config
from dfed.device_models import DeviceModels, device_models
from dfed.leader import Leader
from dfed.registry import STRATEGIES
from dfed.report.folder import RunFolder
from dfed.round import lead_round

torch.set_num_threads(1)

SMOKE = Path(__file__).parents[2] / "configs" / "smoke"
FLEET = {
    "rounds": 1,
    "cohort": 4,
    "seed": 5,
    "strategy": {"name": "flextrain", "depths": 3, "tier_depths": {"strong": 3, "medium": 2, "weak": 1, "tiny": 3}},
    "model": {"name": "cnn", "channels": [4, 6], "hidden": 6000, "norm": "batch"},
    "data": {"dataset": "synthetic", "shape": [1, 8, 8], "classes": 4, "samples": 200, "test_samples": 60,
             "validation_fraction": 0.3},
    "fleet": {"clients": 12, "tiers": [{"name": "strong", "count": 5}, {"name": "medium", "count": 4, "flops": 1e8},
                                       {"name": "weak", "count": 1, "flops": 1e7},
                                       {"name": "tiny", "count": 2, "memory": "1 MiB"}]},
    "client": {"batch_size": 8, "learning_rate": 0.1, "epochs": 2},
    "memory": {"enforce": "predicted"},
    "metrics": {"tensorboard": False, "batch_size": 16, "split": "validation", "test_at_end": True},
}


def evaluation(accuracy):
    return Evaluation(loss=1.0, accuracy=accuracy, correct=np.zeros(1), count=np.zeros(1))


def test_the_mean_over_devices_by_hand():
    models = DeviceModels({None: 2, "depth 1": 5, "depth 2": 1}, 4)
    variants = {"depth 1": evaluation(0.5), "depth 2": evaluation(0.75), "depth 3": evaluation(float("nan"))}
    assert models.accuracy(evaluation(0.875), variants) == (2 * 0.875 + 5 * 0.5 + 0.75) / 8  # exact in binary
    assert models.variants == ["depth 1", "depth 2"]
    assert models.to_json() == {"using": {"global": 2, "depth 1": 5, "depth 2": 1}, "without": 4}
    nobody = DeviceModels({}, 3)
    assert nobody.accuracy(evaluation(0.5), variants) is None
    assert (nobody.variants, nobody.to_json()) == ([], {"using": {}, "without": 3})


def test_devices_of_a_fleet_and_what_the_summary_says(tmp_path):
    run, state = assembled(FLEET, [])
    models = device_models(run.job, state)
    assert models == DeviceModels({"depth 1": 1, "depth 2": 4, "depth 3": 5}, 2)
    folder = RunFolder(tmp_path / "run")
    folder.create(run.config)
    assert Leader(run, folder, state=None, start=0.0).lead() == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["devices"] == {"using": {"depth 1": 1, "depth 2": 4, "depth 3": 5}, "without": 2}
    accuracies = [summary["variants"][f"depth {depth}"]["accuracy"] for depth in (1, 2, 3)]
    assert len(set(accuracies)) > 1
    # Sums of three in float64.
    assert summary["device_accuracy"] == pytest.approx(np.dot([1, 4, 5], accuracies) / 10, rel=1e-14)
    assert summary["test"]["device_accuracy"] != summary["device_accuracy"]
    assert 0 < summary["test"]["device_accuracy"] <= 1


def test_a_client_without_samples_has_no_model():
    run, state = assembled(FLEET, ["strategy=fedavg"])
    assert device_models(run.job, state) == DeviceModels({None: 12}, 0)  # whoever has memory enough or not is found out later
    sizes = run.job.partition.sizes()
    strong = int(run.job.fleet.tier_clients("strong", 1)[0])
    sizes[strong] = 0
    job = SimpleNamespace(fleet=run.job.fleet, strategy=run.job.strategy, asked=run.job.asked,
                          partition=SimpleNamespace(sizes=lambda: sizes))
    assert device_models(job, state) == DeviceModels({None: 11}, 1)
    learned = lead_round(run.job, state).state
    for _ in range(8):
        learned = learned if learned.infeasible else lead_round(run.job, learned).state
    assert device_models(run.job, learned) == DeviceModels({None: 10}, 2)


def test_clients_with_equal_devices_are_asked_apart_where_their_samples_count():
    """Under a deadline the depth that fits depends on the number of samples."""
    small = ["strategy={name: flextrain, depths: 3}", "fleet={clients: 12, tiers: [{name: all, count: 12, flops: 1e9}]}",
             "data.partition={name: dirichlet, alpha: 0.3, min_samples: 2}", "metrics={tensorboard: false, batch_size: 16}"]
    run, state = assembled(FLEET, small)
    times = [run.job.asked(state).cost(client) for client in range(12)]  # of the full model, whose plan they all have
    run, state = assembled(FLEET, [*small, f"server.deadline_s={float(np.median(times))}"])
    asked = run.job.asked(state)
    plans = [asked.plan(client) for client in range(12)]
    depths = [None if plan is None else run.job.strategy.variant_of(plan) for plan in plans]
    assert len(set(depths)) > 1
    by_hand = {depth: depths.count(depth) for depth in set(depths) - {None}}
    assert device_models(run.job, state) == DeviceModels(by_hand, depths.count(None))


class Spread:
    """A job of 2,500 kinds of devices, one to three clients each, every tenth without samples; the weakest have no plan."""

    def __init__(self):
        generator, self.asked_for = np.random.default_rng(1), []
        self.kinds = generator.permutation(np.repeat(np.arange(2500), 1 + np.arange(2500) % 3))
        self.sizes = np.where(np.arange(len(self.kinds)) % 10 == 3, 0, 7)
        self.fleet = SimpleNamespace(kinds=lambda: self.kinds)
        self.partition = SimpleNamespace(sizes=lambda: self.sizes)
        self.strategy = SimpleNamespace(variant_of=lambda kind: None if kind >= 1500 else "half" if kind >= 600 else "small")

    def asked(self, state):
        return SimpleNamespace(plan=self.plan, cases=lambda: self.kinds)

    def plan(self, client):
        self.asked_for.append(client)
        kind = int(self.kinds[client])
        return None if kind < 200 else kind


def test_more_than_a_thousand_kinds_stand_for_their_neighbours():
    job = Spread()
    models = device_models(job, None)
    assert len(job.asked_for) == len(set(job.asked_for)) == 1000
    assert all(job.sizes[job.asked_for])
    kinds = job.kinds[np.array(job.asked_for)]
    assert (np.diff(kinds) >= 1).all()
    assert np.diff(kinds).max() <= 6  # every second or third, and of the smallest kinds some have no client with samples
    with_data = job.kinds[job.sizes > 0]
    exact = {"small": ((with_data >= 200) & (with_data < 600)).sum(), "half": ((with_data >= 600) & (with_data < 1500)).sum(),
             None: (with_data >= 1500).sum()}
    assert models.devices.keys() == exact.keys()
    assert sum(models.devices.values()) + models.without == len(job.kinds)
    for name, count in exact.items():  # at each of two ends at most two kinds of three clients take their neighbour's
        assert abs(models.devices[name] - count) <= 12
    few = Spread()
    few.kinds = few.kinds % 1000
    models = device_models(few, None)
    assert len(few.asked_for) == len(set(few.kinds[few.sizes > 0].tolist())) > 950
    small = ((few.sizes > 0) & (few.kinds >= 200) & (few.kinds < 600)).sum()
    assert models.devices == {"small": small, "half": ((few.sizes > 0) & (few.kinds >= 600)).sum()}  # nothing estimated


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_plan_belongs_to_a_variant_or_the_global_model(name):
    strong = "{name: strong, count: 3}"
    small = ["memory.enforce=predicted", "model.channels=[3, 4]", "data.shape=[1, 8, 8]", "fleet.clients=5",
             f"fleet.tiers=[{strong}, {{name: weak, count: 2, memory: 2 MiB}}]"]
    run, state = assembled(load_config(SMOKE / f"{name}.yaml", small).to_dict(), [])
    strategy = run.job.strategy
    variants, asked = strategy.variants(state), run.job.asked(state)
    assert None not in variants
    for variant, plan in variants.items():
        assert strategy.variant_of(plan) in (variant, None)
    plans = [asked.plan(client) for client in range(5)]
    names = [strategy.variant_of(plan) for plan in plans if plan is not None]
    assert names
    assert set(names) <= {*variants, None}
    assert device_models(run.job, state) == DeviceModels({variant: names.count(variant) for variant in set(names)},
                                                         plans.count(None))
