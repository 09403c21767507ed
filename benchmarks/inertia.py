"""What `metrics.inertia` costs a round: ResNet-18 on images of 32 × 32, some clients of 48 samples, on one CPU thread.

Two runs in this process, one measured and one not, which are otherwise the same, take turns, a round each, so that the
machine's noise meets both. What counts is the processor time of the process, which does all of the work; wall time stands
beside it. On a busy machine other processes still show, in the caches: therefore the processor time inside the functions that
measure is given, too, as a share of the plain round.

    python benchmarks/inertia.py [--rounds 5] [--warm-up 2] [--cohort 4]

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dfed.client.worker
import dfed.inertia_record
import dfed.round
from dfed.comm import choose_device, join
from dfed.config import load_config
from dfed.leader import Leader
from dfed.report.folder import RunFolder
from dfed.run import StopFlag, assemble, prepare

CLIENTS, IMAGES, BATCH = 100, 48, 16
CONFIG = {
    "rounds": 100_000,
    "strategy": "fedavg",
    "model": "resnet18",
    "data": {"dataset": "synthetic", "samples": CLIENTS * IMAGES, "test_samples": BATCH},
    "fleet": {"clients": CLIENTS, "tiers": [{"name": "all", "share": 1.0}]},
    "client": {"learning_rate": 0.05, "batch_size": BATCH, "epochs": 1},
    "metrics": {"every": 100_000},
    "checkpoint": {"every": 100_000},
}
JOBS = {"plain": [], "inertia": ["metrics.inertia=true", "metrics.inertia_reference=1"]}


MEASURING = ((dfed.client.worker, "change_squares"), (dfed.round, "_received"), (dfed.round.MeanChange, "__call__"),
             (dfed.inertia_record.InertiaRecord, "measure"))


def count_time(inside: list[float]) -> None:
    """Have the functions that measure add their processor seconds to the only entry of ``inside``."""
    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.process_time()
            result = function(*arguments)
            inside[0] += time.process_time() - start
            return result

        return call

    for owner, name in MEASURING:
        setattr(owner, name, counted(getattr(owner, name)))


def leader_of(folder: Path, overrides: list[str]) -> Leader:
    """A run that is about to begin."""
    config = load_config(None, overrides, base=CONFIG)
    prepared = prepare(config, choose_device(config.backend))
    run = assemble(prepared, join(config.backend, prepared.device), StopFlag())
    run_folder = RunFolder(folder)
    run_folder.create(config)
    return Leader(run, run_folder, state=None, start=time.perf_counter())


def take_turns(rounds: int, warm_up: int, cohort: int) -> dict[str, list[tuple[float, float, float]]]:
    """Processor and wall seconds of every round, and processor seconds of measuring, by job."""
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in JOBS}
    inside = [0.0]
    count_time(inside)
    with tempfile.TemporaryDirectory() as name:
        leaders = {job: leader_of(Path(name) / job, [f"cohort={cohort}", *options]) for job, options in JOBS.items()}
        for turn in range(warm_up + rounds):
            for job in sorted(leaders, reverse=bool(turn % 2)):  # neither always comes first
                cpu, wall, inside[0] = time.process_time(), time.perf_counter(), 0.0
                leaders[job].round()
                if turn >= warm_up:
                    times[job].append((time.process_time() - cpu, time.perf_counter() - wall, inside[0]))
    return times


def report(times: dict[str, list[tuple[float, float, float]]]) -> None:
    """The table and the last line."""
    paired = {job: [mine[0] / plain[0] for mine, plain in zip(values, times["plain"], strict=True)]
              for job, values in times.items()}
    print(f"{'what':8} {'rounds':>6} {'median CPU s':>12} {'min':>8} {'max':>8} {'median wall s':>13} {'to plain':>9}")
    for job, values in times.items():
        cpu, wall, _ = zip(*values, strict=True)
        print(f"{job:8} {len(values):6} {statistics.median(cpu):12.3f} {min(cpu):8.3f} {max(cpu):8.3f} "
              f"{statistics.median(wall):13.3f} {statistics.median(paired[job]):9.4f}")
    measuring, plain = (statistics.median(each[place] for each in times[job]) for job, place in (("inertia", 2), ("plain", 0)))
    print(json.dumps({"inertia_ratio": round(statistics.median(paired["inertia"]), 4),
                      "measuring_share": round(measuring / plain, 4),
                      "least": round(min(paired["inertia"]), 4), "most": round(max(paired["inertia"]), 4),
                      "rounds": len(times["plain"])}))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--cohort", type=int, default=4)
    options = parser.parse_args()
    report(take_turns(options.rounds, options.warm_up, options.cohort))


if __name__ == "__main__":
    main()
