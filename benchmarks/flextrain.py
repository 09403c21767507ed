"""FlexTrain on one device: one model for all depths against a model trained for each, and against the full model cut short.

    python benchmarks/flextrain.py [--seeds 3] [--samples 5000] [--epochs 20] [--out DIR] [--markdown FILE]

ResNet-20 of width 8 on a keyed choice of Fashion-MNIST's training samples (`python -m dfed train`; what is reported is measured
on the test set, once, after the last epoch). Three sizes as in the paper: the full model, which half of all steps train, and
prefixes with a quarter of the steps each, of 45 % and 18 % of the parameters (the paper: 35 % and 15 %). Independent models are
the same prefixes, trained from the same first values for as many epochs each, with the same settings; cut short is the
independent full model with its blocks beyond the prefix left out. What is finished in DIR is not run again.

Cost: arithmetic of the training, wall seconds, measured peak; of FlexTrain, and summed over the independent models. Runs follow
each other seed by seed, so that what else the machine does falls on all.

Last line: one JSON object. By depth, shallowest first: `independent`, `flextrain`, `truncated`, mean test accuracy in per cent,
and `gap`, independent less flextrain; `flops_ratio`, `time_ratio`: of FlexTrain's training to the sum of the independents'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from trained import trained

CUTS = ["layer2_1", "layer3_0"]  # 17.9 % and 45.3 % of the parameters
SHARES = [0.25, 0.25, 0.5]
DEPTHS = (1, 2, 3)
METHODS: dict[str, dict[str, Any]] = {
    "flextrain": {"name": "flextrain", "cuts": CUTS, "shares": SHARES},
    **{f"depth {depth}": {"name": "bp", "cuts": CUTS, "depth": depth} for depth in DEPTHS},
}


def train(folder: Path, method: dict[str, Any], seed: int, samples: int, epochs: int) -> dict[str, Any]:
    """The summary of one training, which is carried out unless it is finished."""
    config = {
        "seed": seed, "model": {"name": "resnet20", "width": 8}, "method": method,
        "data": {"dataset": "fashion_mnist", "train_samples": samples, "validation_fraction": 0.1},
        "training": {"epochs": epochs, "batch_size": 50, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.001,
                     "schedule": {"name": "cosine"}},
        "metrics": {"every": epochs, "split": "validation", "test_at_end": True},
        "checkpoint": {"every": epochs},
    }
    summary, said = trained(folder, config)
    if summary is None:
        raise SystemExit(f"{' '.join(map(str, method.values()))}, seed {seed} failed:\n{said}")
    return summary


def accuracy(summary: dict[str, Any], depth: int) -> float:
    """Test accuracy of a depth, in per cent."""
    return 100 * summary["variants"][f"depth {depth}"]["test"]["accuracy"]


def figures(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What the runs of all seeds come to."""
    def mean(values: list[float]) -> float:
        return round(statistics.fmean(values), 3)

    alone = {depth: mean([accuracy(run[f"depth {depth}"], depth) for run in runs]) for depth in DEPTHS}
    flexible = {depth: mean([accuracy(run["flextrain"], depth) for run in runs]) for depth in DEPTHS}
    full = f"depth {DEPTHS[-1]}"
    return {
        "seeds": len(runs),
        "parameter_share": [round(runs[0][full]["variants"][f"depth {depth}"]["num_params"] / runs[0][full]["num_params"], 3)
                            for depth in DEPTHS],
        "independent": [alone[depth] for depth in DEPTHS],
        "flextrain": [flexible[depth] for depth in DEPTHS],
        "truncated": [mean([accuracy(run[full], depth) for run in runs]) for depth in DEPTHS],
        "gap": [round(alone[depth] - flexible[depth], 3) for depth in DEPTHS],
        **{name: mean([run["flextrain"][what] / sum(run[f"depth {depth}"][what] for depth in DEPTHS) for run in runs])
           for name, what in (("flops_ratio", "training_flops"), ("time_ratio", "time_s"))},
    }


def table(runs: list[dict[str, dict[str, Any]]], found: dict[str, Any]) -> str:
    """Markdown: accuracy by depth, and cost by training."""
    lines = ["| depth | parameters | independent % | FlexTrain % | full model cut short % | gap |", "|---|--:|--:|--:|--:|--:|"]
    for number, depth in enumerate(DEPTHS):
        cells = [f"{100 * found['parameter_share'][number]:.1f} %",
                 *(f"{found[name][number]:.2f}" for name in ("independent", "flextrain", "truncated", "gap"))]
        lines.append(f"| {depth} | {' | '.join(cells)} |")
    lines += ["", "| training | GFLOP | wall s | measured peak MiB | predicted MiB | ms a step by depth |",
              "|---|--:|--:|--:|--:|---|"]
    for name in METHODS:
        summaries = [run[name] for run in runs]
        steps = {depth: [each["variants"][depth]["step_s"] for each in summaries if each["variants"][depth]["step_s"]]
                 for depth in summaries[0]["variants"]}
        told = ", ".join(f"{depth}: {1000 * statistics.median(times):.1f}" for depth, times in steps.items() if times)
        peaks = [each["peak_bytes"] for each in summaries if each["peak_bytes"] is not None]
        cells = [f"{statistics.median(each['training_flops'] for each in summaries) / 1e9:,.0f}",
                 f"{statistics.median(each['time_s'] for each in summaries):,.1f}",
                 f"{statistics.median(peaks) / 2**20:.1f}" if peaks else "–",
                 f"{summaries[0]['predicted_bytes'] / 2**20:.1f}", told]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="where the trainings lie (default: a temporary folder)")
    parser.add_argument("--markdown", type=Path, help="the table, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        runs = [{name: train(out / f"{name.replace(' ', '')}-s{seed}", method, seed, options.samples, options.epochs)
                 for name, method in METHODS.items()} for seed in range(options.seeds)]
    found = figures(runs)
    text = table(runs, found)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
