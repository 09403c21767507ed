"""Training under a budget, kept by the kernel or by prediction, and SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from central_problem import CPU, base, trainer, under_a_cap

from dfed.central.config import load_train_config
from dfed.central.prepared import prepare
from dfed.checkpoint import params_sha256
from dfed.cli import main
from dfed.errors import TrainingFailed
from dfed.memory import CPU_OVERHEAD_BYTES
from dfed.yaml_io import dump_yaml

LARGE = {"model": {"channels": [16, 8], "norm": "none"}, "training": {"epochs": 1, "batch_size": 128, "augment": "none"},
         "data": {"shape": [1, 32, 32], "samples": 160, "test_samples": 20}}


def write(path, **changes):
    raw = base(**changes)
    path.write_text(dump_yaml(raw), encoding="utf-8")
    return raw


def start(path, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "dfed", "train", *words], cwd=path, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@under_a_cap
def test_a_budget_holds_and_one_that_would_do_is_named(tmp_path, capsys):
    raw = write(tmp_path / "a.yaml", **LARGE)
    method = prepare(load_train_config(None, base=raw), CPU).method
    assert method.peak_bytes > 16 * 2**20
    small = int(0.8 * method.peak_bytes) - CPU_OVERHEAD_BYTES  # sure to fail
    free = trainer(raw, tmp_path / "free")
    assert free.train() == 0
    capsys.readouterr()
    assert main(["train", "a.yaml", f"memory={small}", "--out", "small"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "`memory.budget` must be large enough for training, which is out of memory under" in error
    enough = int(re.search(r"would do for this config \((\d+) bytes\)", error)[1])
    assert enough == prepare(load_train_config(None, ["memory=1GB"], raw), CPU).needed_bytes(method.peak_bytes)
    # Gone on with under a budget that was named, it comes to the bits of a training without one.
    assert main(["train", "--resume", "small", f"memory={enough}"]) == 0
    found = json.loads((tmp_path / "small" / "summary.json").read_text())
    assert found["params_sha256"] == params_sha256(free.state.tensors)
    assert found["budget_bytes"] == enough
    assert found["peak_bytes"] < enough + 2**20  # by which the kernel's counters may lag


def test_a_budget_by_prediction(tmp_path, capsys):
    raw = write(tmp_path / "a.yaml", **LARGE)
    peak = prepare(load_train_config(None, base=raw), CPU).method.peak_bytes
    raw["memory"] = {"enforce": "predicted", "budget": peak - 1}
    with pytest.raises(TrainingFailed) as caught:
        trainer(raw, tmp_path / "out").train()
    assert "which is predicted to take more than" in str(caught.value)
    assert f"would do for this config ({peak} bytes)" in str(caught.value)
    assert "depth 2" in capsys.readouterr().out  # the table says what each takes
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    raw["memory"]["budget"] = peak
    assert trainer(raw, tmp_path / "fits").train() == 0


def test_sigterm_ends_it_with_a_checkpoint(tmp_path):
    write(tmp_path / "a.yaml", training={"epochs": 100_000}, metrics={"every": 100_000}, checkpoint={"every": 100_000})
    process = start(tmp_path, "a.yaml", "--out", "out")
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate()
    assert process.returncode == 143, error
    assert "stopped on request after epoch" in out
    assert "python -m dfed train --resume out" in out
    assert len(list((tmp_path / "out" / "checkpoint").iterdir())) == 1
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not found["finished"]
    assert found["accuracy"] is None
