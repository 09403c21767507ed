"""What ``dfed plan`` says, against the parts it is made of, and against a run."""

import json
import sys

import numpy as np
import pytest

from dfed.cli import main
from dfed.config import load_config
from dfed.overview import choices, fleet_rows, participation, prepare_to_plan
from dfed.planning import Planning

MIB = 2**20
BASE = {
    "seed": 3, "rounds": 2, "cohort": 4, "strategy": {"name": "fedprox", "mu": 0.5},
    "model": {"name": "cnn", "channels": [8, 16], "hidden": 1024},
    "data": {"dataset": "synthetic", "shape": [1, 16, 16], "classes": 4, "samples": 400, "test_samples": 40,
             "partition": {"name": "shards", "shards_per_client": 1}},
    "fleet": {"clients": 8, "tiers": [{"name": "strong", "count": 5, "memory": 2.0},
                                      {"name": "weak", "count": 3, "memory": 0.4}]},
    "client": {"learning_rate": 0.05, "momentum": 0.9, "batch_size": 16, "epochs": 1},
    "metrics": {"tensorboard": False},
}
DEEPEST = """
from dfed.plan import Plan
from dfed.strategies import Strategy


class Deepest(Strategy):
    \"\"\"Trains the longest run of last blocks that fits.\"\"\"

    def plan(self, state, candidate):
        names = self.problem.splitting.names
        plans = [Plan(client=candidate.client, hold=names, train=names[start:], phases=self.problem.phases)
                 for start in range(len(names))]
        return candidate.planner.best(plans)
"""


@pytest.fixture(scope="module")
def prepared():
    return prepare_to_plan(load_config(None, base=BASE))


def planning_of(prepared, choice):
    return Planning(prepared.config, prepared.chain, choice, num_clients=8, device=prepared.device)


def test_rows_say_what_the_parts_say(prepared):
    (own, *others) = choices(prepared.config, None)
    assert (own.name, own.options) == ("fedprox", {"mu": 0.5})
    assert {choice.name for choice in others} >= {"fedavg", "exclusivefl"}
    for choice in (own, *others):
        costs = planning_of(prepared, choice).costs
        plan = planning_of(prepared, choice).full_plan()
        strong, weak = fleet_rows(prepared, choice)
        assert (strong.tier, strong.clients, strong.able, strong.fits) == ("strong", 5, 5, True)
        assert (weak.tier, weak.clients, weak.able, weak.fits) == ("weak", 3, 0, False)
        assert strong.batch_size == weak.batch_size == 16
        assert (strong.peak_bytes, strong.needed_bytes) == (costs.peak_bytes(plan), costs.budget_bytes(plan))
        assert strong.smallest_bytes == weak.smallest_bytes == costs.budget_bytes(plan)
        assert strong.largest_batch == costs.largest_batch(plan, strong.budget_bytes, 10**5)
        assert weak.largest_batch == costs.largest_batch(plan, weak.budget_bytes, 10**5) < 16
        assert strong.trained_share == 1
        assert (strong.bytes_down, strong.bytes_up) == costs.message_bytes(plan)
        assert strong.flops == costs.flops(plan, 50)  # 400 samples in 8 equal shards
        assert strong.sim_time_s == strong.flops / 10e9 + strong.bytes_up / 1.25e6 + strong.bytes_down / 6.25e6
        assert (weak.peak_bytes is None) == (choice.name == "exclusivefl")
        share = participation(prepared, [strong, weak])
        assert (share.clients, share.data, share.num_classes) == (5 / 8, 5 / 8, 4)
        able = prepared.fleet.tier_clients("strong", None)
        labels = [prepared.data.train.labels(prepared.partition.indices(int(client))) for client in able]
        assert share.classes == len(np.unique(np.concatenate(labels)))


def test_the_smallest_budget_of_a_strategy_with_smaller_plans(prepared, tmp_path, monkeypatch):
    (tmp_path / "deepest_plans.py").write_text(DEEPEST)
    monkeypatch.syspath_prepend(tmp_path)
    (choice,) = choices(prepared.config, ["deepest_plans:Deepest"])
    costs, full = planning_of(prepared, choice).costs, planning_of(prepared, choice).full_plan()
    head = type(full)(client=0, hold=full.hold, train=full.hold[-1:], phases=full.phases)
    strong, weak = fleet_rows(prepared, choice)
    assert strong.smallest_bytes == weak.smallest_bytes == costs.budget_bytes(head) < costs.budget_bytes(full)
    assert strong.trained_share == 1
    assert weak.fits == (weak.budget_bytes >= weak.smallest_bytes)
    del sys.modules["deepest_plans"]


def test_a_fleet_from_a_file_is_counted_client_by_client(tmp_path):
    needed = fleet_rows(prepare_to_plan(load_config(None, base=BASE)), choices(load_config(None, base=BASE), ["fedavg"])[0])
    enough, little = needed[0].needed_bytes, needed[0].needed_bytes - 1
    path = tmp_path / "fleet.csv"
    lines = [f"a,{enough}"] * 3 + [f"a,{little}"] + [f"b,{little}"] * 4
    path.write_text("\n".join(["tier,memory", *lines, ""]))
    prepared = prepare_to_plan(load_config(None, base={**BASE, "fleet": {"csv": str(path)}}))
    (choice,) = choices(prepared.config, ["fedavg"])
    a, b = fleet_rows(prepared, choice)
    assert (a.clients, a.able, a.fits, a.budget_bytes) == (4, 3, False, little)
    assert (b.clients, b.able) == (4, 0)
    share = participation(prepared, [a, b])
    assert (share.clients, share.data) == (3 / 8, 3 / 8)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(BASE))
    assert main(["plan", str(path), "--json", "--strategies", "fedavg,fedprox", "client.batch_size=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in found["strategies"]] == ["fedavg", "fedprox"]
    assert found["batch_size"] == 8
    tiers = found["strategies"][0]["tiers"]
    assert [tier["able"] for tier in tiers] == [5, 0]
    assert found["strategies"][0]["participation"] == {"clients": 5 / 8, "data": 5 / 8, "classes": 4, "num_classes": 4}
    assert main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "fedprox: 62 % of the clients can take part, with 62 % of the samples and 4 of 4 classes" in out
    assert out.index("fedprox: ") < out.index("fedavg: ")  # the config's own comes first
    assert f"weak: a budget of {tiers[0]['needed_bytes'] / MIB:.2f} MiB would do" not in out  # that was at a batch of 8


def test_a_model_by_itself(capsys):
    assert main(["plan", "--model", "resnet8", "--shape", "3,16,16", "--budget", "20MiB", "--train", "layer3_0:head", "--units",
                 "--split", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budget_bytes"] == 20 * MIB
    assert [unit["name"] for unit in found["units"]] == ["stem", "layer1_0", "layer2_0", "layer3_0", "head"]
    assert sum(unit["num_params"] for unit in found["units"]) == found["num_params"]
    names = [way["name"] for way in found["ways"]]
    assert names[:2] == ["full training", "full, activations recomputed"]
    assert "layer3_0:head trained" in names
    assert sum(name.startswith("stage ") for name in names) == 2
    full, thrifty = found["ways"][:2]
    assert thrifty["peak_bytes"] < full["peak_bytes"]
    assert all(way["fits"] == (way["needed_bytes"] <= 20 * MIB) for way in found["ways"])
    assert main(["plan", "--model", "resnet8", "--budget", "12.1MiB", "--measure"]) == 0
    out = capsys.readouterr().out
    assert "nothing fits 12.10 MiB at batch 32; the least that is sure to do is" in out
    assert "times measured here on a mini-batch of 32" in out


@pytest.mark.parametrize(("words", "said"), [
    ([], "`CONFIG` must be one YAML file, or else --model NAME"),
    (["x.yaml", "--model", "cnn"], "exactly one of the two"),
    (["--model", "resnet9"], "must be one of .* but is 'resnet9'. Did you mean 'resnet8'"),
    (["--model", "cnn", "--budget", "much"], "`--budget` must be"),
    (["--model", "cnn", "--shape", "3,x"], "`--shape` must be a whole number, but is 'x'"),
    (["--model", "cnn", "--train", "conv9"], "`--train` unit must be one of conv0, conv1, hidden, head, but is 'conv9'."),
    (["--model", "cnn", "--train", "head:conv0"], "`--train` must name units in the order of the chain"),
    (["--model", "cnn", "--split", "9"], "must be at least 1 and at most 3, the units of 'cnn' before its last, but is 9"),
    (["--model", "cnn", "--split", "many"], "`--split` must be a whole number, but is 'many'"),
    (["--model", "cnn", "--strategies", "fedavgg"], "`--strategies` must be one of .*Did you mean 'fedavg'"),
    (["--model", "cnn", "client.bach_size=3"], "client.bach_size"),
])
def test_faults_of_the_command(words, said, capsys):
    assert main(["plan", *words]) == 2
    import re

    assert re.search(said, capsys.readouterr().err)
