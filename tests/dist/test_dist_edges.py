"""Runs at the edge: nobody completes, a checkpoint is damaged, a signal comes before there is anything to save."""

import os
import re
import shutil
import signal

import pytest
from jobs import Job, poll, rounds_of, rows, run_cli, run_several, summary

BROKEN = 1

EDGE = """
seed: 3
rounds: 3
cohort: 2
model: {name: mlp, hidden: [2000]}
data: {dataset: synthetic, shape: [1, 8, 8], classes: 4, samples: 60, test_samples: 20}
fleet: {clients: 4, tiers: [{name: all, share: 1.0}]}
client: {batch_size: 8}
metrics: {tensorboard: false}
checkpoint: {every: 1, keep: 1}
"""

OWN = '''
"""Data sets of one's own."""

import time

import numpy as np


def slow(*, root, download, cache, seed):
    """Takes its time."""
    print("loading", flush=True)
    time.sleep(600)


def spoilt(*, root, download, cache, seed):
    """One pixel of one image is NaN."""
    images = np.random.Generator(np.random.Philox(key=1)).random((60, 1, 8, 8), dtype=np.float32)
    labels = np.arange(60) % 4
    test = images.copy(), labels
    images[7, 0, 3, 3] = np.nan
    return (images, labels), test
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("edge") / "edge.yaml"
    path.write_text(EDGE)
    (path.parent / "own_data.py").write_text(OWN)
    return path


@pytest.mark.parametrize(("overrides", "first", "all_rounds"), [
    (["fleet.tiers.0.dropout=0.99999"], "2 dropped out", "6 dropped out"),
    (["fleet.tiers.0.availability=1e-9"], "4 not available", "12 not available"),
    (["fleet.tiers.0.memory=1MiB", "exchange=per_client"], "2 out of memory", r"\d+ out of memory.*"),
])
def test_a_run_in_which_nobody_completes_says_so(config, tmp_path, overrides, first, all_rounds):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert run_cli(["run", config, *overrides, "--out", folder], log) == 0, log.read_text()
    output = log.read_text()
    assert output.count("changes nothing, as no client completed it") == 1
    assert f"round 0 changes nothing, as no client completed it: {first} (said once)" in output
    assert re.search(rf"no client completed in any round: the model is the initial one \({all_rounds}\)", output)
    assert rounds_of(folder) == [0, 1, 2]
    assert summary(folder)["clients"]["completed"] == 0


def test_data_that_are_not_finite_are_blamed_on_the_data(config, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = [config, "data={dataset: 'own_data:spoilt'}", "cohort=4", "server.max_failed_fraction=0", "--out", folder]
    assert run_cli(["run", *arguments], log, path=config.parent) == BROKEN
    assert "TooManyFailures: round 0: 1 of 4 clients failed" in log.read_text()
    assert "check the data (training sample 7 holds NaN or infinity)" in log.read_text()


def test_the_only_checkpoint_damaged_or_gone(config, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert run_cli(["run", config, "rounds=1", "--out", folder], log) == 0, log.read_text()
    for number, damage in enumerate((
        lambda path: os.truncate(path / "state.safetensors", 100),
        lambda path: (path / "state.json").unlink(),
    )):
        damaged, log = tmp_path / f"damaged{number}", tmp_path / f"log{number}"
        shutil.copytree(folder, damaged)
        damage(damaged / "checkpoint" / "round_000001")
        assert run_cli(["run", "--resume", damaged], log) == BROKEN
        assert f"CheckpointError: no checkpoint in {damaged}/checkpoint can be read: round_000001: " in log.read_text()
        assert "Traceback" not in log.read_text()
        assert rounds_of(damaged) == [0]  # what there was is left alone


def test_a_signal_before_the_first_round_ends_the_process_at_once(config, tmp_path):
    """There is nothing to save, so nothing is in the way of the signal, and no folder is left behind."""
    folder, variables = tmp_path / "run", {"PYTHONPATH": str(config.parent)}
    arguments = ["run", config, "data={dataset: 'own_data:slow'}", "--out", folder]
    with Job(arguments, ranks=1, log=tmp_path / "log", environment=variables) as job:
        poll(lambda: "loading" in job.output, "the data were never asked for")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == -signal.SIGTERM  # to a shell: 143
        job.assert_gone()
    assert not folder.exists()


def test_what_methods_hold_besides_the_model_is_predicted(config, tmp_path):
    """Where one tensor is nearly all of the model: what masks, controls and variates take is no less than they are said to."""
    own = ["rounds=2", "strategy=exclusivefl", "model.hidden=[1200,1200]", "client={batch_size: 4, learning_rate: 0.01, steps: 2}",
           "fleet.tiers.0.memory=100MB"]
    lips = "wrap.lips={{period: 1, score: {score}, control: {control}, fill: {fill}}}"
    runs = {"gradient": [lips.format(score="gradient", control="none", fill="zero"), "fleet.clients=2"],
            "initial": [lips.format(score="low", control="none", fill="initial")],
            "noise": [lips.format(score="random", control="noise", fill="zero")],
            "scaffold": ["strategy=scaffold"]}
    run_several([[config, *own, *words, "--out", tmp_path / name] for name, words in runs.items()], tmp_path, ranks=1)
    for name in runs:
        clients = [row for row in rows(tmp_path / name) if row["kind"] == "client"]
        assert {row["status"] for row in clients} == {"completed"}
        # 12 MiB is what libraries may take beside tensors, here a tenth of it at most.
        last = [row for row in clients if row["round"] == 1]
        assert all(abs(row["peak_bytes"] - row["predicted_bytes"]) < 2 * 2**20 for row in last), (name, last)
