"""What a run learns from running out of memory: the client gets a smaller plan the next time, also after a resumption."""

import json

from jobs import run_cli, rows, summary

# Training takes 32 MiB of which the planner knows nothing: it sees tensors without storage, and gets none.
UNFORESEEN = '''
import torch
from torch._subclasses.fake_tensor import FakeTensor

from dfed.planner import with_batch
from dfed.strategies import Strategy


class Unforeseen(Strategy):
    """Full training at half the batch size whenever the last one did not fit."""

    def plan(self, state, candidate):
        full = self.full_plan(candidate.client)
        sizes = [64, 32, 16, 8]
        return candidate.planner.best(with_batch(full, size) for size in sizes)

    def receive(self, model, client_state, plan):
        if not isinstance(next(model.parameters()), FakeTensor):
            rest = plan.phases[0].batch_size > 16
            model.ballast = torch.ones(32 * 2**20 // 4 if rest else 1)
'''
CONFIG = {
    "rounds": 4, "cohort": 3, "strategy": "unforeseen:Unforeseen",
    "model": {"name": "cnn", "channels": [16, 32], "hidden": 512},
    "data": {"dataset": "synthetic", "shape": [1, 32, 32], "classes": 4, "samples": 256, "test_samples": 16},
    "fleet": {"clients": 4, "tiers": [{"name": "tight", "count": 4, "memory": 1.0}]},
    "client": {"batch_size": 64, "steps": 1, "learning_rate": 0.01},
    "metrics": {"tensorboard": False}, "checkpoint": {"every": 1},
}


def batches(folder):
    """By round, the predicted peaks of the plans that were tried, and how they ended."""
    found = {}
    for row in rows(folder):
        if row["kind"] == "client":
            found.setdefault(row["round"], set()).add((row["predicted_bytes"], row["status"]))
    return found


def test_a_client_gets_a_smaller_plan_after_running_out_of_memory(tmp_path):
    (tmp_path / "unforeseen.py").write_text(UNFORESEEN)
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG))
    config = tmp_path / "config.yaml"
    assert run_cli(["run", config, "--out", tmp_path / "run"], tmp_path / "log", path=tmp_path) == 0, (tmp_path / "log").read_text()
    tried = batches(tmp_path / "run")
    ((first, how), *rest) = tried[0]
    assert how == "oom"
    assert not rest
    ((second, how), *_) = tried[1]
    assert how == "oom"
    assert second < first
    ((third, how), *_) = tried[2]
    assert how == "completed"
    assert third < second
    assert tried[3] == tried[2]
    assert summary(tmp_path / "run")["clients"]["oom"] == 6

    # Stopped after the first failures and resumed, it does not try them again.
    parts = [["run", config, "rounds=1", "--out", tmp_path / "parts"], ["run", config, "--resume", tmp_path / "parts"]]
    for arguments in parts:
        assert run_cli(arguments, tmp_path / "log", path=tmp_path) == 0, (tmp_path / "log").read_text()
    assert batches(tmp_path / "parts") == tried
    assert summary(tmp_path / "parts")["params_sha256"] == summary(tmp_path / "run")["params_sha256"]
    (state,) = [json.loads(path.read_text()) for path in (tmp_path / "parts" / "checkpoint").glob("round_000004/state.json")]
    assert len(state["infeasible"]) == 2
