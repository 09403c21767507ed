"""NeuLite's promises in figures: the memory of its stages, predicted and measured under the cap, and what its terms cost.

    python benchmarks/neulite.py [--models resnet18 resnet34] [--conv-parts 8] [--repeats 7] [--markdown FILE]    (on the CPU)

Memory: for each model and splitting a real run (`python -m dfed run`) on synthetic CIFAR shapes, batch 64, trains every stage
on a device with exactly the budget that the largest stage needs by prediction; peaks are those of the run's metrics. Full
training likewise, by `exclusivefl`, on what it needs. Each stage has two turns, of which the second counts. A stage that does
not fit its budget ends the benchmark. All with `client.conv_parts`, as predictions do not see the copies that the CPU's
library makes; full training also without, and the smaller peak is what the stages are compared with.

Time: steps of ResNet18 at batch 64, with and without the terms of the loss, with and without activation checkpointing,
interleaved in one process on one thread; medians of ratios.

Last line: one JSON object. `reduction` is 1 − largest stage / full training, of predicted and of measured peaks;
`nhsic_ratio` is a step with both terms over one with neither, the worst stage of the paper's splitting, and of the full model;
`conv_parts`: time of a step of the first stage of that splitting with convolutions in parts over that without;
`checkpointing`: `time` of a step of the first stage of the paper's splitting of ResNet18 with activation checkpointing over
that without, and `peak`, measured, of the largest stage of the planner's four blocks likewise.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dfed import rng
from dfed.blocks import Splitting
from dfed.blocks.hsic import centred_kernel, nhsic
from dfed.client import ClientSettings
from dfed.memory import CPU_OVERHEAD_BYTES, GREY_ZONE
from dfed.models import Chain, build_chain, convolutions_in_parts, materialise
from dfed.registry import STRATEGIES
from dfed.strategies import Problem, Strategy
from dfed.yaml_io import dump_yaml

MIB = 2**20
BATCH, SHAPE, CLASSES = 64, (3, 32, 32), 10
SPLITS: dict[str, dict[str, Any]] = {
    "paper": {"split": "paper"},
    "auto 4": {"split": "auto", "blocks": 4},
    "auto": {"split": "auto", "blocks": None},
    "auto 4, checkpointing": {"split": "auto", "blocks": 4},
}


def peaks(model: str, strategy: dict[str, Any], rounds: int, parts: int,
          checkpointing: bool = False) -> tuple[list[int], list[int], int]:
    """Predicted and measured peaks of each stage's second turn in a run under the cap, and the budget.

    In its first turn code is touched for the first time, which resident memory counts too.
    """
    config: dict[str, Any] = {
        "rounds": rounds, "cohort": 1, "model": model, "strategy": strategy,
        "data": {"dataset": "synthetic", "shape": list(SHAPE), "classes": CLASSES, "samples": BATCH, "test_samples": 2},
        "fleet": {"clients": 1, "tiers": [{"name": "device", "count": 1}]},
        "backend": {"device": "cpu"},
        "client": {"batch_size": BATCH, "learning_rate": 0.01, "momentum": 0.9, "epochs": None, "steps": 2,
                   "activation_checkpointing": checkpointing, "conv_parts": parts},
        "metrics": {"every": rounds, "tensorboard": False}, "checkpoint": {"every": rounds},
    }
    with tempfile.TemporaryDirectory() as folder:
        _run(config, Path(folder) / "plans", ["memory.enforce=off"])
        largest = max(row["predicted_bytes"] for row in _clients(Path(folder) / "plans"))
        budget = math.ceil(largest * (1 + GREY_ZONE)) + CPU_OVERHEAD_BYTES
        config |= {"rounds": 2 * rounds}
        config["fleet"]["tiers"][0]["memory"] = budget
        _run(config, Path(folder) / "capped", [])
        rows = _clients(Path(folder) / "capped")
    bad = [row for row in rows if row["status"] != "completed"]
    assert len(rows) == 2 * rounds, f"{model} {strategy}: {2 * rounds - len(rows)} of {2 * rounds} rounds had no client"
    assert not bad, f"{model} {strategy}: {bad[0]['status']} on {budget / MIB:.1f} MiB: {bad[0]['reason']}"
    return [row["predicted_bytes"] for row in rows[rounds:]], [row["peak_bytes"] for row in rows[rounds:]], budget


def _run(config: dict[str, Any], folder: Path, overrides: list[str]) -> None:
    path = folder.with_suffix(".yaml")
    path.write_text(dump_yaml(config), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "dfed", "run", str(path), "--out", str(folder), *overrides], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _clients(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == "client"]


def _strategy(chain: Chain, options: dict[str, Any]) -> Strategy:
    problem = Problem(chain=chain, splitting=Splitting.by_unit(chain.unit_names), num_clients=1, seed=0,
                      phases=ClientSettings(batch_size=BATCH).phases)
    return STRATEGIES.get("neulite")(problem, **options)


def _stage(chain: Chain, number: int, checkpointing: bool = False, parts: int = 1, **options: Any) -> Callable[[], None]:
    """A step, forward and backward, of a stage of the paper's splitting."""
    strategy = _strategy(chain, options)
    plan = strategy.plan_at(number)
    model = materialise(strategy.build(plan), rng.torch_generator(0, "init")).train()
    if checkpointing:
        model.recompute = True
    strategy.receive(model, {}, plan)
    x, y = _batch()

    def step() -> None:
        with convolutions_in_parts(parts):
            strategy.loss(model, x, y, plan.phases[0]).backward()

    return step


def _full(chain: Chain, with_terms: bool) -> Callable[[], None]:
    """A step of the full model, with or without nHSIC of images and features, and of labels and pooled features."""
    model = materialise(chain.skeleton().requires_grad_(True), rng.torch_generator(0, "init")).train()
    x, y = _batch()

    def step() -> None:
        features = model.run(x, stop=model.unit_names[-1])
        loss = F.cross_entropy(model.unit(model.unit_names[-1])(features), y)
        if with_terms:
            loss = loss - 0.1 * nhsic(centred_kernel(x), centred_kernel(features))
            labels = F.one_hot(y, CLASSES).float()
            loss = loss - 0.1 * nhsic(centred_kernel(labels), centred_kernel(features.mean((2, 3))))
        loss.backward()

    return step


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = rng.torch_generator(0, "batch")
    return torch.randn(BATCH, *SHAPE, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def ratio(reference: Callable[[], None], changed: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median of the time of ``changed`` over that of ``reference`` just before it, and the latter's median in seconds."""
    reference(), changed()
    ratios, times = [], []
    for _ in range(repeats):
        first, second = _seconds(reference), _seconds(changed)
        ratios.append(second / first)
        times.append(first)
    return statistics.median(ratios), statistics.median(times)


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def memory(models: list[str], parts: int) -> tuple[list[list[str]], dict[str, Any]]:
    """The table of peaks, and the reductions."""
    rows, found = [], {}
    for model in models:
        wholes = []
        for number in sorted({1, parts}):
            predicted, measured, budget = peaks(model, {"name": "exclusivefl"}, 1, number)
            wholes.append((predicted[0], measured[0]))
            rows.append([model, "full" if number == 1 else "full, in parts", "1", f"{budget / MIB:.0f}",
                         f"{predicted[0] / MIB:.0f}", f"{measured[0] / MIB:.0f}", "", "", ""])
            _say(rows[-1])
        whole = [min(sizes) for sizes in zip(*wholes, strict=True)]
        for name, options in SPLITS.items():
            checkpointing = name.endswith("checkpointing")
            count = _num_stages(model, options)
            predicted, measured, budget = peaks(model, {"name": "neulite", **options}, count, parts, checkpointing)
            reductions = [1 - max(part) / size for part, size in zip((predicted, measured), whole, strict=True)]
            stages = " ".join(f"{peak / MIB:.0f}" for peak in measured)
            rows.append([model, name, str(count), f"{budget / MIB:.0f}", f"{max(predicted) / MIB:.0f}",
                         f"{max(measured) / MIB:.0f}", *(f"{value:.3f}" for value in reductions), stages])
            _say(rows[-1])
            key = f"{model} {name}".replace(",", "").replace(" ", "_")
            found[key] = {"predicted": round(reductions[0], 4), "measured": round(reductions[1], 4)}
    return rows, found


def _num_stages(model: str, options: dict[str, Any]) -> int:
    """How many blocks a run with these options has, as its own summary says."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "rounds": 1, "cohort": 1, "model": model, "strategy": {"name": "neulite", **options},
            "data": {"dataset": "synthetic", "shape": list(SHAPE), "classes": CLASSES, "samples": 2, "test_samples": 1},
            "fleet": {"clients": 1, "tiers": [{"name": "device", "count": 1}]},
            "client": {"batch_size": BATCH, "learning_rate": 0.01, "momentum": 0.9}, "metrics": {"tensorboard": False},
        }
        _run(config, Path(folder) / "run", [])
        return len(json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))["variants"])


def _say(row: list[str]) -> None:
    widths = (9, 22, 6, 7, 9, 8, 9, 8, 0)
    print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)


HEADINGS = ["model", "blocks", "number", "budget", "predicted", "measured", "reduction", "measured", "stages, measured MiB"]


def main() -> None:
    """Run both parts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["resnet18", "resnet34"])
    parser.add_argument("--conv-parts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--markdown", type=Path, help="also write the table of peaks to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _say(HEADINGS)
    rows, reductions = memory(options.models, options.conv_parts)
    if options.markdown is not None:
        lines = ["| " + " | ".join(row) + " |" for row in (HEADINGS, ["---", "---", *["--:"] * 6, "---"], *rows)]
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    chain = build_chain("resnet18", {}, input_shape=SHAPE, num_classes=CLASSES)
    without = {"mentor_input": 0.0, "mentor_label": 0.0}
    terms = []
    for number in range(4):
        found, seconds = ratio(_stage(chain, number, **without), _stage(chain, number), options.repeats)
        print(f"stage {number + 1}: {1000 * seconds:.0f} ms a step; with nHSIC {found:.3f} of it", flush=True)
        terms.append(found)
    full, seconds = ratio(_full(chain, False), _full(chain, True), options.repeats)
    print(f"full model: {1000 * seconds:.0f} ms a step; with nHSIC {full:.3f} of it", flush=True)
    recomputed, seconds = ratio(_stage(chain, 0), _stage(chain, 0, True), options.repeats)
    print(f"largest stage: {1000 * seconds:.0f} ms a step; with activation checkpointing {recomputed:.3f} of it", flush=True)
    in_parts, seconds = ratio(_stage(chain, 0), _stage(chain, 0, parts=options.conv_parts), options.repeats)
    print(f"first stage: {1000 * seconds:.0f} ms a step; in {options.conv_parts} parts {in_parts:.3f} of it", flush=True)
    left = {name: 1 - found["measured"] for name, found in reductions.items()}
    peak = {model: round(left[f"{model}_auto_4_checkpointing"] / left[f"{model}_auto_4"], 4) for model in options.models}
    print(json.dumps({"reduction": reductions, "nhsic_ratio": {"worst_stage": round(max(terms), 4), "full": round(full, 4)},
                      "conv_parts": round(in_parts, 4),
                      "checkpointing": {"time": round(recomputed, 4), "peak": peak}}))


if __name__ == "__main__":
    main()
