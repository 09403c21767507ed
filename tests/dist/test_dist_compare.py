"""``dfed compare`` with real runs: what is finished is not run again, and what is not goes on."""

from __future__ import annotations

import csv
import json

import pytest
from jobs import run_cli, summary

CONFIG = """
seed: 3
rounds: 2
cohort: 3
model: {name: mlp, hidden: [16]}
data: {dataset: synthetic, shape: [1, 8, 8], classes: 4, samples: 120, test_samples: 40, partition: dirichlet,
       validation_fraction: 0.2}
fleet:
  clients: 6
  tiers:
    - {name: strong, count: 4, memory: 3.0}
    - {name: weak, count: 2}
client: {learning_rate: 0.05, batch_size: 8}
metrics: {tensorboard: false, split: validation, test_at_end: true, batch_size: 16}
compare:
  strategies: [heterofl, {name: fedprox, mu: 0.5, label: prox, settings: {client.momentum: 0.5}}]
  seeds: 2
"""
NAMES = ["heterofl-s3", "prox-s3", "heterofl-s4", "prox-s4"]


@pytest.mark.slow
def test_a_comparison_runs_once_and_goes_on(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG, encoding="utf-8")
    out = tmp_path / "o"

    def compare(log, *arguments):
        status = run_cli(["compare", tmp_path / "c.yaml", "--out", out, *arguments], tmp_path / log)
        return status, (tmp_path / log).read_text(encoding="utf-8")

    status, said = compare("first")
    assert status == 0, said
    assert said.count(": started") == 4
    written = {name: (out / "runs" / name / "environment.json").stat().st_mtime_ns for name in NAMES}
    table = (out / "comparison.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    assert [f"{row['label']}-s{row['seed']}" for row in rows] == NAMES
    for row in rows:
        mine = summary(out / "runs" / f"{row['label']}-s{row['seed']}")
        assert (row["state"], row["params_sha256"]) == ("finished", mine["params_sha256"])
        assert (float(row["accuracy"]), float(row["test_accuracy"])) == (mine["accuracy"], mine["test"]["accuracy"])
        assert int(row["bytes_up"]) == mine["bytes"]["up"]
        assert mine["num_samples"] == 96
        assert 0 < mine["full_peak_bytes"] < mine["full_needed_bytes"]
        assert mine["tiers"][0]["budget_bytes"] == 3 * mine["full_needed_bytes"]
        assert 0 < float(row["participation_data"]) <= 1
    report = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert report["target_accuracy"] > 0
    plans = [entry["plans"]["rows"] for entry in report["entries"]]
    assert {row["options"]["rate"] for row in plans[0]} >= {1.0}
    assert all(0 < row["clients"] <= 1 and row["turns"] > 0 and row["peak_share"] > 0 for row in plans[0])
    assert plans[1] == []
    assert (out / "comparison.png").stat().st_size > 0

    # Again, and one summary is missing: only that run goes on, on two ranks, to the same model and figures.
    (out / "runs" / "heterofl-s3" / "summary.json").unlink()
    status, said = compare("second", "--ranks", "2")
    assert status == 0, said
    assert (said.count("finished before"), said.count(": going on"), said.count(": started")) == (3, 1, 0)
    now = {name: (out / "runs" / name / "environment.json").stat().st_mtime_ns for name in NAMES}
    assert [name for name in NAMES if now[name] != written[name]] == ["heterofl-s3"]
    assert (out / "comparison.csv").read_text(encoding="utf-8") == table

    # Other settings are refused, before anything is run.
    status, said = compare("third", "client.batch_size=4")
    assert status == 2
    assert "`client.batch_size` is 8, where it would be 4 now" in said
