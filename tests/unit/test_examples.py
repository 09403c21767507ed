"""The examples in the documentation: they run, and their figures are sound."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfed.config import load_config
from dfed.memory import CPU_OVERHEAD_BYTES, GREY_ZONE
from dfed.run import prepare

ROOT = Path(__file__).parents[2]


def test_the_parts_of_ones_own_work_together(tmp_path):
    page = (ROOT / "docs" / "own_parts.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^`(\w+\.\w+)`:\n\n```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    assert files.keys() == {"own_model.py", "own_data.py", "own_rest.py", "own_turns.py", "own.yaml"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [
        sys.executable, "-m", "dfed", "run", "own.yaml", "rounds=1", "data.partition=own_rest:by_label",
        "sampler=own_rest:Neighbours", "server.optimizer={name: own_rest:signs, step_size: 0.02}", "--out", "run",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "round 1/1 | 4/4 clients" in done.stdout
    config = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    for line in ("name: own_model:small", "dropout: 0.1", "noise: 0.5", "name: own_rest:Neighbours", "step_size: 0.02"):
        assert line in config


@pytest.mark.parametrize("overrides", [[], ["rounds=3", "client.epochs=3", "fleet.tiers.1.memory=0.5"]])
def test_the_config_in_the_readme_keeps_out_of_the_grey_zone(overrides, tmp_path):
    (text,) = re.findall(r"^```yaml\n(# my\.yaml\n.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    config = load_config(tmp_path / "my.yaml", overrides)
    prepared = prepare(config, torch.device("cpu"))
    tensors = prepared.planning.costs.peak_bytes(prepared.planning.full_plan())
    fails = tensors * (1 - GREY_ZONE) - CPU_OVERHEAD_BYTES
    passes = tensors * (1 + GREY_ZONE) + CPU_OVERHEAD_BYTES
    fleet = prepared.fleet
    budgets = {name: fleet.profile(int(fleet.tier_clients(name, 1)[0])).budget_bytes for name in fleet.tier_names}
    assert budgets["strong"] > passes
    assert budgets["weak"] < fails if overrides else budgets["weak"] > passes
    assert prepared.partition.sizes().min() >= config.client.batch_size  # or a client needs less than the prediction
