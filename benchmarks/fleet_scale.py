"""Start-up with a fleet of 1,000,000 clients against one of 1,000: wall time, and memory of the process.

Each measurement is a fresh process that builds everything a rank builds (synthetic data made lazily, fleet, partition,
planner, worker), draws the first cohort, and encodes the first round's order. The two sizes take turns.

    python benchmarks/fleet_scale.py [--runs 7]

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SMALL, LARGE, SAMPLES = 1_000, 1_000_000, 50


def start_up(clients: int) -> None:
    """Build a run with this many clients as far as its first round; print seconds and peak memory."""
    start = time.perf_counter()
    from dfed.cohort import choose_cohort, encode_order
    from dfed.comm import choose_device, join
    from dfed.config import load_config
    from dfed.memory.measure import peak_resident_bytes
    from dfed.run import StopFlag, assemble, prepare

    imported = time.perf_counter()
    config = load_config(None, base={
        "rounds": 1, "cohort": 50, "model": "cnn",
        "data": {"dataset": "synthetic", "samples": clients * SAMPLES, "test_samples": 1000, "partition": "iid"},
        "fleet": {"clients": clients, "tiers": [
            {"name": "strong", "share": 0.3, "memory": 4.0, "availability": 0.9},
            {"name": "weak", "share": 0.7, "memory": 0.2, "availability": 0.5},
        ]},
        "strategy": "exclusivefl",
    })
    prepared = prepare(config, choose_device(config.backend))
    run = assemble(prepared, join(config.backend, prepared.device), StopFlag())

    state = run.job.strategy.init(run.planning.first_params(config.seed))
    cohort = choose_cohort(run.job, state)
    encode_order(run.job, state, cohort)
    assert len(cohort.plans) == config.cohort
    done = time.perf_counter()
    print(json.dumps({"total_s": done - start, "build_s": done - imported, "peak_bytes": peak_resident_bytes()}))


def main() -> None:
    """Measure both sizes in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--clients", type=int)
    options = parser.parse_args()
    if options.clients is not None:
        start_up(options.clients)
        return
    found: dict[int, list[dict[str, float]]] = {SMALL: [], LARGE: []}
    for _ in range(options.runs):
        for clients, rows in found.items():
            done = subprocess.run([sys.executable, __file__, "--clients", str(clients)], check=True, capture_output=True,
                                  text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    median = {clients: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for clients, rows in found.items()}
    print(f"{'clients':>9} {'runs':>5} {'start-up s':>11} {'of it after imports s':>22} {'spread s':>9} {'peak MiB':>9}")
    for clients, rows in found.items():
        totals = [row["total_s"] for row in rows]
        print(f"{clients:9,} {len(rows):5} {median[clients]['total_s']:11.2f} {median[clients]['build_s']:22.2f} "
              f"{max(totals) - min(totals):9.2f} {median[clients]['peak_bytes'] / 2**20:9.0f}")
    print(json.dumps({
        "time_ratio": round(median[LARGE]["total_s"] / median[SMALL]["total_s"], 4),
        "build_time_ratio": round(median[LARGE]["build_s"] / median[SMALL]["build_s"], 4),
        "memory_ratio": round(median[LARGE]["peak_bytes"] / median[SMALL]["peak_bytes"], 4),
    }))


if __name__ == "__main__":
    main()
