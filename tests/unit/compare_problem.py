"""A comparison whose run folders are written by hand."""

from __future__ import annotations

import itertools
import json
import os

from dfed.comparison import load_comparison
from dfed.yaml_io import dump_yaml

__all__ = ["BASE", "ENVIRONMENT", "load", "write_run", "write_yaml"]

BASE = {
    "seed": 5,
    "rounds": 3,
    "cohort": 2,
    "model": {"name": "mlp", "hidden": [4]},
    "data": {"dataset": "synthetic", "shape": [1, 8, 8], "classes": 4, "samples": 40, "test_samples": 8},
    "fleet": {"clients": 4, "tiers": [{"name": "strong", "count": 2, "memory": 3.0}, {"name": "we|ak", "count": 2}]},
    "compare": {"strategies": ["fedavg", {"name": "fedprox", "mu": 0.5}], "seeds": 2},
}
ENVIRONMENT = {"git_commit": "abc", "python": "3.11", "packages": {"torch": "2.15"}, "processor": "P", "cpus": 2, "gpu": None,
               "ranks": 1, "device": "cpu", "threads": 1, "system": "Linux"}


def write_yaml(path, compare=None, **changes):
    """``BASE`` with changes as a file."""
    value = {**BASE, **changes}
    if compare is not None:
        value["compare"] = compare
    path.write_text(dump_yaml(value), encoding="utf-8")
    return path


def load(tmp_path, *overrides, compare=None, strategies=None, seeds=None, quick=False, **changes):
    """The comparison of ``BASE`` with changes."""
    return load_comparison(write_yaml(tmp_path / "c.yaml", compare, **changes), overrides, strategies=strategies, seeds=seeds,
                           quick=quick)


def write_run(folder, config, *, accuracies=(0.5, 0.75, 0.8), completed=((0, 10), (1, 10)), oom=1, finished=True, plans=(),
              **changes):
    """A run folder as ``dfed run`` leaves it; a round takes 100 bytes up, 200 down, 2 s and 3 J.

    Args:
        plans: Options of plans, of clients' lines in order; those behind have none.
    """
    os.makedirs(folder, exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(config.to_dict()), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
    lines = [{"kind": "client", "round": 0, "client": client, "tier": "strong", "status": "completed", "num_samples": num,
              "peak_bytes": peak, "bytes_up": 1.5 * 2**20, "time_s": 0.25, "sim_time_s": 12.0}
             for (client, num), peak in zip(completed, itertools.cycle((600, 800, 500)), strict=False)]
    lines += [{"kind": "client", "round": 0, "client": 3, "tier": "we|ak", "status": "oom", "num_samples": 10,
               "peak_bytes": 900}] * oom
    for line, options in zip(lines, plans, strict=False):
        line["plan"] = options
    for number, accuracy in enumerate(accuracies):
        row = {"kind": "round", "round": number, "bytes": {"up": 100, "down": 200}, "sim_time_s": 2.0, "energy_j": 3.0}
        lines.append(row if accuracy is None else {**row, "accuracy": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rounds = len(accuracies)
    summary = {
        "finished": finished, "accuracy": accuracies[-1], "num_samples": 40, "full_peak_bytes": 700, "full_needed_bytes": 1000,
        "params_sha256": "f" * 64, "clients": {"oom": oom}, "bytes": {"up": 100 * rounds, "down": 200 * rounds},
        "sim_time_s": 2.0 * rounds, "energy_j": 3.0 * rounds, "time_s": 1.5,
        "tiers": [
            {"name": "strong", "clients": 2, "budget_bytes": 3000, "peak_bytes": 800, "accuracy": accuracies[-1] + 0.1},
            {"name": "we|ak", "clients": 2, "budget_bytes": None, "peak_bytes": None, "accuracy": accuracies[-1] - 0.1},
        ],
        **changes,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
