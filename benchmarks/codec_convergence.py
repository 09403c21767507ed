"""What codecs cost in accuracy: Fashion-MNIST after the same rounds with each, and the bytes up that 85 % took.

Every run is `configs/fashion_mnist_cnn.yaml` with another codec for the updates, evaluated on a validation split after every
round, one after another on 3 ranks.

    python benchmarks/codec_convergence.py [--rounds 20] [--codecs fp32 int8 …] [--seed 0]

Last line: one JSON object. `bytes_to_85` counts what all clients sent up, headers included, until a round first ended with 85 %
or more; null if none did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "fashion_mnist_cnn.yaml"
TARGET = 0.85
CODECS = {
    "fp32": ["codecs.up=fp32"],
    "bf16": ["codecs.up=bf16"],
    "int8": ["codecs.up=int8"],
    "int4": ["codecs.up=int4"],
    "qsgd, 4 bits": ["codecs.up={name: qsgd, bits: 4}"],
    "top-k 1 %": ["codecs.up={name: top_k, density: 0.01}"],
    "top-k 1 %, error feedback": ["codecs={up: {name: top_k, density: 0.01}, error_feedback: true}"],
    "random-k 10 %": ["codecs.up={name: random_k, density: 0.1}"],
    "random-k 10 %, error feedback": ["codecs={up: {name: random_k, density: 0.1}, error_feedback: true}"],
}


def run(codec: str, rounds: int, seed: int, folder: Path) -> tuple[list[float], list[int]]:
    """Accuracy after each round, and bytes up in each."""
    out = folder / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "-m", "dfed", "run",
               str(CONFIG), *CODECS[codec], f"rounds={rounds}", f"seed={seed}", "data.validation_fraction=0.1",
               "metrics={split: validation, every: 1, tensorboard: false}", "--out", str(out)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "round"]
    return [row["accuracy"] for row in rows], [row["bytes"]["up"] for row in rows]


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    options = parser.parse_args()
    print(f"{'codec':30} {'accuracy':>8} {'MB up':>8} {'round of 85 %':>13} {'MB to 85 %':>10} {'s':>5}")
    accuracy, reached = {}, {}
    for codec in options.codecs:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            accuracies, sent = run(codec, options.rounds, options.seed, Path(folder))
        first = next((number for number, value in enumerate(accuracies) if value >= TARGET), None)
        accuracy[codec], reached[codec] = round(accuracies[-1], 4), None if first is None else sum(sent[:first + 1])
        shown = ("–", "–") if first is None else (str(first + 1), f"{reached[codec] / 1e6:.1f}")
        print(f"{codec:30} {accuracies[-1]:8.4f} {sum(sent) / 1e6:8.1f} {shown[0]:>13} {shown[1]:>10} "
              f"{time.perf_counter() - start:5.0f}", flush=True)
    print(json.dumps({"rounds": options.rounds, "seed": options.seed, "accuracy": accuracy, "bytes_to_85": reached}))


if __name__ == "__main__":
    main()
