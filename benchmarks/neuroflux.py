"""NeuroFlux against back-propagation and classic local learning, each under the same memory budget, held by the hard cap.

    python benchmarks/neuroflux.py [--models vgg11_bn resnet18] [--samples 1000] [--epochs 5] [--batch 128] [--at-most N]
                                   [--learning-rate 0.1] [--seed 0]
                                   [--budgets 0.3 0.45 1.0] [--methods bp neuroflux …] [--no-test] [--out DIR] [--markdown FILE]

Fashion-MNIST padded to 32 × 32, a keyed choice of its training samples, and 1,200 others as validation data; `python -m dfed
train`. Budgets are shares of what plain back-propagation in mini-batches of `--batch` needs, in bytes the same for all
methods: tight, medium, loose. Every method uses the largest mini-batch, up to `--at-most` (default: `--batch`), that fits the
budget: `bp`; `bp` with activation checkpointing; `bp` in micro-batches, whose gradients are added up; classic local learning,
all layers in every mini-batch, or one after another (`sequential`); and `neuroflux`. Every layer sees every sample `--epochs`
times under each method. `--learning-rate` is that of a mini-batch of `--batch`, and goes with the mini-batch.

Time is that of training without evaluation (`time_s` of the summary, caches and all), accuracy that on the test set after the
last epoch, of `neuroflux` that of the exit that was chosen on the validation data (1 point). `--no-test` leaves it out, which
costs more than a short training: speed is the same with few samples, accuracy needs many. The peak is that of the epochs after
the first, in which pages of code that runs for the first time count, too. A method that does not fit is told as such. What is
finished in DIR is not run again. Trainings follow each other method by method within a budget.

Last line: one JSON object. Of each model and budget `speed_over_bp` and `speed_over_local`: time of the fastest form of each
that fits over that of `neuroflux` (null: none fits), and `accuracy_gap`: `bp`'s accuracy (of the fastest form) less that of
`neuroflux`'s exit, in points. `parameter_ratio`: parameters of the full model over those of the exit; `throughput_ratio`:
samples a second of the exit over those of the full model; both are medians over all budgets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from trained import trained

from dfed.central.config import load_train_config
from dfed.central.prepared import prepare

MIB = 2**20
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bp": ({"name": "bp", "batch": "auto"}, {}),
    "bp, checkpointing": ({"name": "bp", "batch": "auto"}, {"activation_checkpointing": True}),
    "bp, micro-batches": ({"name": "bp", "micro_batch": "auto"}, {}),
    "local, simultaneous": ({"name": "local", "order": "simultaneous"}, {}),
    "local, sequential": ({"name": "local", "order": "sequential"}, {}),
    "neuroflux": ({"name": "neuroflux", "exit_tolerance": 0.01}, {}),
}


def config_of(model: str, method: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Of a training without a budget, in mini-batches of up to ``batch``."""
    chosen, training = METHODS[method]
    rate = options.learning_rate * batch / options.batch
    return {
        "seed": options.seed, "model": model, "method": chosen,
        "data": {"dataset": "fashion_mnist", "image_size": 32, "train_samples": options.samples, "validation_fraction": 0.02},
        "training": {"epochs": options.epochs, "batch_size": batch, "learning_rate": rate, "momentum": 0.9,
                     "weight_decay": 0.0005, "schedule": {"name": "cosine"}, **training},
        "metrics": {"every": 1000, "split": "validation", "test_at_end": options.test}, "checkpoint": {"every": 1000},
    }


def full_bytes(model: str, options: argparse.Namespace) -> int:
    """The budget that is sure to do for back-propagation in whole mini-batches."""
    config = {**config_of(model, "bp", options.batch, options), "method": "bp", "memory": 1.0}
    budget = prepare(load_train_config(None, (), config), torch.device("cpu")).budget_bytes
    assert budget is not None
    return budget


def train(folder: Path, model: str, budget_bytes: int, method: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The summary of one training, which is carried out unless it is finished; None: it does not fit."""
    config = config_of(model, method, options.at_most or options.batch, options)
    summary, said = trained(folder, {**config, "memory": budget_bytes})
    if summary is None:
        if "memory.budget" not in said:
            raise RuntimeError(f"{folder}: {said}")
        print(f"{model}, {budget_bytes / MIB:.1f} MiB, {method}: {said.strip()[-300:]}", flush=True)
        return None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peaks = [line["peak_bytes"] for line in lines if line["kind"] == "epoch" and line.get("peak_bytes")]
    return {**summary, "peak_bytes": max(peaks[1:] or peaks, default=None)}


def accuracy(summary: dict[str, Any]) -> float | None:
    """Test accuracy in per cent: of the chosen exit, if there is one."""
    found = (summary.get("exit") or summary)["test"]
    return None if found is None else 100 * found["accuracy"]


def figures(model: str, budget: float, runs: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """What the trainings under one budget come to."""
    def fastest(prefix: str) -> dict[str, Any] | None:
        fitting = [run for name, run in runs.items() if name.startswith(prefix) and run is not None]
        return min(fitting, key=lambda run: run["time_s"], default=None)

    own, bp, local = runs.get("neuroflux"), fastest("bp"), fastest("local")
    unknown = dict.fromkeys(("budget_mib", "speed_over_bp", "speed_over_local", "accuracy_gap"))
    found: dict[str, Any] = {"model": model, "budget": budget, **unknown}
    if own is None:
        return found
    found["budget_mib"] = round(own["budget_bytes"] / MIB, 1)
    if bp is not None:
        found["speed_over_bp"] = round(bp["time_s"] / own["time_s"], 3)
        reached, ours = accuracy(bp), accuracy(own)
        found["accuracy_gap"] = None if reached is None or ours is None else round(reached - ours, 2)
    if local is not None:
        found["speed_over_local"] = round(local["time_s"] / own["time_s"], 3)
    return found


def table(model: str, budget: float, runs: dict[str, dict[str, Any] | None]) -> list[str]:
    """Markdown."""
    lines = [f"### {model}, budget {budget:g} of full training", "",
             "| method | time s | peak MiB | predicted MiB | test accuracy % | steps | exit, parameters | |",
             "|---|--:|--:|--:|--:|--:|---|---|"]
    for name, run in runs.items():
        if run is None:
            lines.append(f"| {name} | | | | | | | does not fit |")
            continue
        peak = "–" if run["peak_bytes"] is None else f"{run['peak_bytes'] / MIB:.1f}"
        chosen = run.get("exit")
        told = f"{chosen['name']}, {100 * chosen['param_share']:.1f} %" if chosen else ""
        reached = accuracy(run)
        tested = "" if reached is None else f"{reached:.2f}"
        lines.append(f"| {name} | {run['time_s']:.1f} | {peak} | {run['predicted_bytes'] / MIB:.1f} | {tested} | "
                     f"{run['steps']:,} | {told} | |")
    return [*lines, ""]


def main() -> None:
    """Train, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg11_bn", "resnet18"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.3, 0.45, 1.0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--at-most", type=int, help="no larger mini-batch than this (default: --batch)")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--no-test", dest="test", action="store_false", help="speed only")
    parser.add_argument("--out", type=Path, help="where the trainings lie (default: a temporary folder)")
    parser.add_argument("--markdown", type=Path, help="the tables, too")
    options = parser.parse_args()
    lines, found, exits = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        for model in options.models:
            full = full_bytes(model, options)
            for budget in options.budgets:
                folder, budget_bytes = out / f"{model}-{budget:g}", round(budget * full)
                runs = {name: train(Path(f"{folder}-{name.replace(', ', '-')}"), model, budget_bytes, name, options)
                        for name in options.methods}
                lines += table(model, budget, runs)
                found.append(figures(model, budget, runs))
                exits += [run["exit"] for run in runs.values() if run is not None and run.get("exit")]
    text = "\n".join(lines)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    rates = [each["samples_per_s"] / each["full_samples_per_s"] for each in exits]
    print(json.dumps({
        "budgets": found,
        "parameter_ratio": round(statistics.median(1 / each["param_share"] for each in exits), 3) if exits else None,
        "throughput_ratio": round(statistics.median(rates), 3) if rates else None,
    }))


if __name__ == "__main__":
    main()
