"""Federations on GPUs: ranks that share one over Gloo, and a GPU for each rank over NCCL."""

import json

import pytest
import torch
from jobs import Job, rows, summary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# As the smoke config, but large enough that a budget is many of the CUDA allocator's segments (2 MiB to 20 MiB).
CONFIG = """
seed: 3
rounds: 3
cohort: 4
model: {name: cnn, channels: [32, 64], hidden: 4096}
data: {dataset: synthetic, shape: [3, 32, 32], classes: 4, samples: 320, test_samples: 80, partition: {name: dirichlet}}
fleet:
  clients: 8
  tiers:
    - {name: strong, count: 5, memory: 4.0}
    - {name: weak, count: 3, memory: 0.3}
client: {learning_rate: 0.02, momentum: 0.9, batch_size: 32, epochs: 1}
metrics: {batch_size: 40, tensorboard: false}
"""
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run(tmp_path, ranks, *overrides):
    config = tmp_path / "gpu.yaml"
    config.write_text(CONFIG)
    folder = tmp_path / f"ranks{ranks}"
    with Job(["run", config, *overrides, "--out", folder], ranks=ranks, log=tmp_path / f"log{ranks}",
             environment=DETERMINISTIC) as job:
        assert job.wait() == 0, job.output
        job.assert_gone()
    return folder


def environment(folder):
    return json.loads((folder / "environment.json").read_text())


@pytest.mark.skipif(torch.cuda.device_count() > 2, reason="three ranks must share a GPU")
def test_three_ranks_share_a_gpu(tmp_path):
    shared, alone = run(tmp_path, 3), run(tmp_path, 1)
    assert environment(shared)["backend"] == "gloo"
    assert environment(shared)["backend_reason"] == "ranks share a GPU, which NCCL refuses"
    assert environment(shared)["device"] == "cuda:0"
    strong, weak = summary(shared)["tiers"]
    assert strong["completed"] == strong["selected"] > 0
    assert weak["oom"] == weak["selected"] > 0
    assert 0 < strong["peak_bytes"] <= strong["budget_bytes"]
    assert {row["rank"] for row in rows(shared) if row["kind"] == "client"} == {1, 2}
    one, three = summary(alone), summary(shared)
    for name in ("params_sha256", "accuracy", "loss", "clients", "sim_time_s", "energy_j"):
        assert one[name] == three[name], name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_gpu_for_each_rank_takes_nccl(tmp_path):
    together, alone = run(tmp_path, 2), run(tmp_path, 1)
    assert environment(together)["backend"] == "nccl"
    assert environment(together)["backend_reason"] == "every rank has a GPU of its own"
    assert summary(together)["params_sha256"] == summary(alone)["params_sha256"]
    assert summary(together)["clients"] == summary(alone)["clients"]
