"""Seconds per round of dfed against a bare PyTorch loop that does the same work.

The work is pfl-research's CIFAR-10 set-up on synthetic images: 1000 clients with 50 images of 3×32×32, a cohort of 50, one
local epoch, batch 10, SGD 0.1, a CNN of 1,626,442 parameters; no evaluation. dfed runs as users run it, through its own
server loop, with one server and two client ranks; the bare loop is split over two processes that end each round with an
all-reduce. Every process uses one thread.

The jobs stand side by side and take turns, a round each, so that the machine's noise meets them all. Two bare loops are
measured: with glibc's allocator as it comes, which is the reference, and with the settings that dfed gives it.

    python benchmarks/overhead.py [--rounds 15] [--warm-up 3]

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CLIENTS, IMAGES, COHORT, BATCH, RATE = 1000, 50, 50, 10, 0.1
CONFIG = {
    "cohort": COHORT,
    "rounds": 100_000,
    "strategy": "fedavg",
    "model": {"name": "cnn", "channels": [32, 64], "kernel": 3, "hidden": 128, "padding": "valid", "pool": "last",
              "dropout": [0.25, 0.5]},
    "data": {"dataset": f"{Path(__file__).stem}:images", "partition": "iid"},
    "fleet": {"clients": CLIENTS, "tiers": [{"name": "all", "share": 1.0}]},
    "client": {"learning_rate": RATE, "batch_size": BATCH, "epochs": 1},
    "metrics": {"every": 100_000},
}
JOBS = {"dfed": 3, "bare": 2, "bare_same_allocator": 2}
SAME_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """50,000 images as CIFAR-10 has them: bytes, ten classes."""
    generator = np.random.default_rng(0)
    labels = np.arange(CLIENTS * IMAGES) % 10
    prototypes = generator.integers(0, 256, (10, 3, 32, 32))
    noise = generator.integers(-60, 60, (len(labels), 3, 32, 32), dtype=np.int16)
    return np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8), labels.astype(np.int64)


def images(*, root, download, cache, seed):
    """The data set as dfed takes a user's own."""
    from dfed.data import ArrayDataset, Bundle

    folder = Path(os.environ["OVERHEAD_DATA"])
    train = ArrayDataset(np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy"), num_classes=10)
    return Bundle(train, train)


def serve_turns(rank: int, take_turn) -> None:
    """On rank 0: take a turn whenever the coordinator says so, and tell it the seconds."""
    with socket.create_connection(("127.0.0.1", int(os.environ["OVERHEAD_PORT"]))) as connection:
        stream = connection.makefile("rw")
        stream.write(os.environ["OVERHEAD_JOB"] + "\n")
        stream.flush()
        for _ in stream:
            start = time.perf_counter()
            take_turn()
            stream.write(f"{time.perf_counter() - start}\n")
            stream.flush()


def run_dfed(folder: Path) -> None:
    """One rank of dfed."""
    from dfed.comm import choose_device, join
    from dfed.config import load_config
    from dfed.leader import Leader, follow
    from dfed.report.folder import RunFolder
    from dfed.run import StopFlag, assemble, prepare

    start = time.perf_counter()
    config = load_config(None, base=CONFIG)
    prepared = prepare(config, choose_device(config.backend))
    link = join(config.backend, prepared.device)
    run = assemble(prepared, link, StopFlag())
    if not link.transport.is_server:
        follow(run)
        link.transport.close()
        return
    run_folder = RunFolder(folder / "run")
    run_folder.create(config)
    leader = Leader(run, run_folder, state=None, start=start)
    serve_turns(0, leader.round)
    print(f"dfed: ready after {time.perf_counter() - start:.0f} s in all", file=sys.stderr)
    leader.dismiss()
    link.transport.close()


def run_bare(folder: Path) -> None:
    """One process of the bare loop: its half of the cohort, then an all-reduce of the weighted sums."""
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    pixels, labels = torch.from_numpy(np.load(folder / "images.npy")), torch.from_numpy(np.load(folder / "labels.npy"))
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(),
        nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_626_442
    parameters = list(model.parameters())
    current = [parameter.detach().clone() for parameter in parameters]
    turn = torch.zeros(1, dtype=torch.int64)
    model.train()

    def round_() -> None:
        nonlocal current
        cohort = np.random.default_rng(int(turn)).permutation(CLIENTS)[:COHORT]
        sums = [torch.zeros_like(tensor) for tensor in current]
        for client in cohort[rank::size]:
            with torch.no_grad():
                for parameter, value in zip(parameters, current, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.SGD(parameters, lr=RATE)
            order = torch.randperm(IMAGES) + int(client) * IMAGES
            for start in range(0, IMAGES, BATCH):
                chosen = order[start:start + BATCH]
                x = pixels[chosen].to(torch.float32).div_(255)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), labels[chosen]).backward()
                optimizer.step()
            with torch.no_grad():
                for total, parameter in zip(sums, parameters, strict=True):
                    total.add_(parameter, alpha=IMAGES)
        for total in sums:
            dist.all_reduce(total)
        current = [total / (COHORT * IMAGES) for total in sums]

    def lead() -> None:
        turn.add_(1)
        dist.broadcast(turn, 0)
        round_()

    if rank == 0:
        serve_turns(0, lead)
        turn.fill_(-1)
        dist.broadcast(turn, 0)
    else:
        while True:
            dist.broadcast(turn, 0)
            if int(turn) < 0:
                break
            round_()
    dist.destroy_process_group()


def coordinate(rounds: int, warm_up: int) -> None:
    """Start the jobs, let them take turns, print the table."""
    times: dict[str, list[float]] = {name: [] for name in JOBS}
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as server:
        folder = Path(name)
        pixels, labels = arrays()
        np.save(folder / "images.npy", pixels)
        np.save(folder / "labels.npy", labels)
        port, processes, connections, streams, ready = server.getsockname()[1], [], [], {}, {}
        for job, ranks in JOBS.items():
            environment = {**os.environ, "OVERHEAD_PORT": str(port), "OVERHEAD_JOB": job, "OVERHEAD_DATA": name,
                           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
            environment |= SAME_ALLOCATOR if job == "bare_same_allocator" else {}
            begun = time.perf_counter()
            processes.append(subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__,
                 "--job", job, "--folder", name], env=environment, stdout=subprocess.DEVNULL,
            ))
            connection, _ = server.accept()
            connections.append(connection)
            stream = connection.makefile("rw")
            streams[stream.readline().strip()] = stream
            ready[job] = time.perf_counter() - begun
        for turn in range(warm_up + rounds):
            for job, stream in streams.items():
                stream.write("go\n")
                stream.flush()
                seconds = float(stream.readline())
                if turn >= warm_up:
                    times[job].append(seconds)
        for connection in connections:
            connection.shutdown(socket.SHUT_WR)  # the job sees the end of its turns
        for process in processes:
            process.wait(timeout=60)
    report(times, ready)


def report(times: dict[str, list[float]], ready: dict[str, float]) -> None:
    """The table and the last line."""
    paired = {job: [a / b for a, b in zip(times["dfed"], times[job], strict=True)] for job in JOBS}
    print(f"{'what':22} {'rounds':>6} {'median s':>9} {'min s':>8} {'max s':>8} {'dfed / it':>10} {'start-up s':>11}")
    for job, values in times.items():
        print(f"{job:22} {len(values):6} {statistics.median(values):9.3f} {min(values):8.3f} {max(values):8.3f} "
              f"{statistics.median(paired[job]):10.3f} {ready[job]:11.1f}")
    print(json.dumps({
        "ratio": round(statistics.median(paired["bare"]), 4),
        "ratio_same_allocator": round(statistics.median(paired["bare_same_allocator"]), 4),
        "rounds": len(times["dfed"]),
    }))


def main() -> None:
    """Coordinate, or be a rank of a job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.job is None:
        coordinate(options.rounds, options.warm_up)
    elif options.job == "dfed":
        run_dfed(options.folder)
    else:
        run_bare(options.folder)


if __name__ == "__main__":
    main()
