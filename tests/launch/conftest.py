"""What tests of launchers share: a run of many short rounds, and the same run undisturbed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dist"))  # jobs

from jobs import run_cli

LONG = """
seed: 7
rounds: 30
cohort: 4
model: {name: mlp, hidden: [32]}
data: {dataset: synthetic, shape: [1, 8, 8], classes: 4, samples: 600, test_samples: 40, partition: {name: dirichlet}}
fleet: {clients: 8, tiers: [{name: all, share: 1.0, dropout: 0.1}]}
client: {learning_rate: 0.05, momentum: 0.9, batch_size: 8, steps: 40}
server: {optimizer: momentum}
metrics: {tensorboard: false, every: 5}
checkpoint: {every: 1}
"""


@pytest.fixture(scope="session")
def long_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "long.yaml"
    path.write_text(LONG, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def undisturbed(long_config, tmp_path_factory):
    """The folder of the run in one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_cli(["run", long_config, "--out", folder / "run"], folder / "log") == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.fixture
def same_as_undisturbed(undisturbed):
    """``same_as_undisturbed(folder)``: the run in ``folder`` is finished, with the same model and the same lines."""
    from jobs import rounds_of, summary

    def check(folder):
        ours, theirs = summary(folder), summary(undisturbed)
        assert ours["finished"]
        for name in ("params_sha256", "rounds", "clients", "reasons", "accuracy", "loss"):
            assert ours[name] == theirs[name], name
        assert rounds_of(folder) == list(range(30))
        left = {path.name for path in folder.iterdir()}
        assert left == {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoint"}
        assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["round_000029", "round_000030"]

    return check
