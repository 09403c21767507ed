"""The exchange of a round against bare collectives, folding against an addition, and codecs against a copy.

*Exchange.* The rounds of a federation of ResNet18 (3 × 32 × 32, 10 classes: 45 MB) with 2 and with 4 client ranks, as a run
makes them: the order is encoded and broadcast, every rank takes its payloads out of it, reports are gathered, partial sums
reduced. Training is left out, and the time of folding taken off. The reference is one bare `broadcast` and one bare
`reduce` of the same bytes, in the same processes, turn by turn. Cohorts of 50 and of 500 clients, likewise turn by turn.

*Folding.* Four clients' updates into the partial sums, one after the other, against `add_` of float32 tensors of the same
shapes, four times. (Sums take up to four updates in one pass, so that fewer would not show what one costs.)

*Codecs.* Encoding and decoding every tensor of the model, on one thread, against `copy_` of the same tensors, as speeds; and
the bytes of the encoded model, header included, as a share of float32's.

    python benchmarks/exchange.py [--turns 15] [--client-ranks 2 4]

Last line: one JSON object. Times are medians; ratios are medians over the turns. `exchange_ratio` is the worst over the numbers
of ranks; `codec_speed` is the speed of `copy_` at 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfed.memory import malloc

COHORTS = (50, 500)
FOLDED = 4
CODECS = ("fp32", "fp16", "bf16", "int8", "int8_affine", "int4", "qsgd", "top_k(density=0.01)", "random_k(density=0.01)",
          "bitmask(density=0.5)")
CONFIG = {
    "rounds": 1,
    "cohort": max(COHORTS),
    "strategy": "fedavg",
    "model": "resnet18",
    "data": {"dataset": "synthetic", "shape": [3, 32, 32], "samples": 1000, "test_samples": 10},
    "fleet": {"clients": 1000, "tiers": [{"name": "all", "share": 1.0}]},
    "client": {"learning_rate": 0.1, "batch_size": 32},
}


class IdleWorker:
    """Takes the payloads of its tasks out of the order, as a worker does, and reports without training."""

    def __init__(self, job: Any, update: Mapping[str, Tensor]):
        self._forms, self._seed, self._update = job.forms, job.seed, update
        self.fold_s = 0.0

    def work(self, order: Any, tasks: Any, sums: Any, deliver: Any) -> list[dict[str, Any]]:
        """A report for each task. The first client's update is folded, since sums do not come from nowhere."""
        from dfed.client import ClientReport
        from dfed.comm import wire
        from dfed.plan import Plan

        values, reports, round_index = wire.decode_all(order, seed=self._seed), [], order.meta["round"]
        plans, received = [Plan.from_json(plan) for plan in order.meta["plans"]], {}
        for task in tasks:
            plan = plans[task["plan"]].for_client(task["client"])
            form = self._forms.of(plan)
            if plan.shape_key() not in received:
                received[plan.shape_key()] = form.received(values)
                start = time.perf_counter()
                for last in (False, True):  # as a worker does with those of its clients
                    sums.add(self._update, form.regions, order.meta["scale"], order.meta["ranges"], last=last)
                self.fold_s = time.perf_counter() - start
            down, up = form.down_bytes(round_index, plan.client), form.up_bytes(round_index, plan.client)
            reports.append(dict(vars(ClientReport(client=plan.client, loss=2.3, num_visits=1, num_steps=1, bytes_down=down,
                                                  bytes_up=up))))
        return reports


def run_rank(turns: int) -> None:
    """One rank of the measurement of exchanges; rank 0 prints its times as JSON."""
    import torch.distributed as dist

    from dfed.cohort import choose_cohort, encode_order
    from dfed.comm import choose_device, join
    from dfed.config import load_config
    from dfed.models import materialise
    from dfed.rng import torch_generator
    from dfed.round import take_part
    from dfed.run import StopFlag, assemble, prepare

    config = load_config(None, base=CONFIG)
    prepared = prepare(config, choose_device(config.backend))
    link = join(config.backend, prepared.device)
    job = assemble(prepared, link, StopFlag()).job
    transport = link.transport
    model = materialise(prepared.chain.skeleton(), torch_generator(0, "init"))
    params = {name: value.detach() for name, value in model.state_dict().items() if name in job.shapes}
    worker = IdleWorker(job, params)
    job = replace(job, worker=worker if transport.is_client else None)
    cohorts: dict[int, Any] = {}
    if transport.is_server:
        state = job.strategy.init(params)
        cohorts = {size: (replace(job, cohort=size), choose_cohort(replace(job, cohort=size), state)) for size in COHORTS}
    entries = sum(value.numel() for value in params.values())
    payload, sums = torch.zeros(4 * entries, dtype=torch.uint8), torch.zeros(entries, dtype=torch.float64)

    def bare() -> None:
        dist.broadcast(payload, src=0)
        dist.reduce(sums, dst=0)

    def as_planned(size: int) -> Any:
        """The cohort, with plans as new as a strategy's."""
        sized, cohort = cohorts[size]
        return sized, replace(cohort, plans={client: replace(plan) for client, plan in cohort.plans.items()})

    def exchange(planned: Any) -> None:
        message = encode_order(planned[0], state, planned[1]) if transport.is_server else None
        take_part(job, transport.broadcast(message))

    works: dict[str, Callable[[Any], None]] = {"bare": lambda _: bare(), **dict.fromkeys(map(str, COHORTS), exchange)}
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 2):
        for name, work in works.items():
            planned = as_planned(int(name)) if transport.is_server and name != "bare" else None
            worker.fold_s = 0.0
            dist.barrier()
            start = time.perf_counter()
            work(planned)
            dist.barrier()
            seconds, folding = time.perf_counter() - start, torch.tensor(worker.fold_s)
            dist.all_reduce(folding, dist.ReduceOp.MAX)
            if turn >= 2:
                times[name].append(seconds - float(folding))
    if transport.is_server:
        print(json.dumps(times), flush=True)
    transport.close()


def exchanges(client_ranks: list[int], turns: int) -> tuple[float, float]:
    """Print times by number of ranks; the worst ratio to the bare collectives, and of the large cohort to the small one."""
    print(f"{'client ranks':>12} {'bare s':>8} " + " ".join(f"{f'cohort {size} s':>13}" for size in COHORTS)
          + f" {'exchange':>9} {'cohort':>7}")
    worst, worst_cohort = 0.0, 0.0
    for ranks in client_ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks + 1}", __file__,
                   "--rank", "--turns", str(turns)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        times = json.loads(done.stdout.splitlines()[-1])
        small, large = (times[str(size)] for size in COHORTS)
        ratio, cohort = _ratio(small, times["bare"]), _ratio(large, small)
        medians = [statistics.median(times[name]) for name in ("bare", *map(str, COHORTS))]
        print(f"{ranks:12} {medians[0]:8.3f} {medians[1]:13.3f} {medians[2]:13.3f} {ratio:9.2f} {cohort:7.2f}", flush=True)
        worst, worst_cohort = max(worst, ratio), max(worst_cohort, cohort)
    return worst, worst_cohort


def _ratio(times: list[float], reference: list[float]) -> float:
    return statistics.median(mine / other for mine, other in zip(times, reference, strict=True))


def model_tensors() -> dict[str, Tensor]:
    """ResNet18's tensors, with values as after initialisation."""
    from dfed.models import build_chain, materialise
    from dfed.rng import torch_generator

    chain = materialise(build_chain("resnet18", {}, input_shape=(3, 32, 32), num_classes=10), torch_generator(0, "init"))
    return {name: value.detach() for name, value in chain.state_dict().items() if value.is_floating_point()}


def fold_ratio(tensors: Mapping[str, Tensor], turns: int) -> float:
    """Time of folding updates against additions in float32, turn by turn."""
    from dfed.comm.partial_sums import PartialSums, value_range
    from dfed.region import WHOLE

    sums = PartialSums({name: tuple(value.shape) for name, value in tensors.items()})
    ranges = {name: value_range(value) for name, value in tensors.items()}
    totals = {name: torch.zeros_like(value) for name, value in tensors.items()}
    regions = dict.fromkeys(tensors, WHOLE)
    updates = [{name: value.clone() for name, value in tensors.items()} for _ in range(FOLDED)]

    def fold() -> None:
        for update in updates:
            sums.add(update, regions, 0.001, ranges)

    def add() -> None:
        for update in updates:
            for name, value in update.items():
                totals[name].add_(value)

    folded, added = _turns([fold, add], turns)
    milliseconds = [1e3 / FOLDED * statistics.median(times) for times in (folded, added)]
    print(f"\nan update: folding {milliseconds[0]:.1f} ms, float32 addition {milliseconds[1]:.1f} ms, "
          f"ratio {_ratio(folded, added):.2f}")
    return _ratio(folded, added)


def _turns(works: list[Callable[[], None]], turns: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in works]
    for turn in range(turns + 2):
        for work, mine in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            if turn >= 2:
                mine.append(time.perf_counter() - start)
    return times


def codecs(tensors: Mapping[str, Tensor], turns: int) -> tuple[dict[str, float], dict[str, float]]:
    """Print speeds and sizes of the codecs; speed relative to ``copy_``, bytes relative to float32."""
    from dfed.client.forms import PREFIX_BYTES
    from dfed.comm import wire

    print(f"\n{'codec':24} {'encode ms':>9} {'decode ms':>9} {'copy ms':>8} {'speed':>6} {'bytes':>7}")
    speeds, sizes = {}, {}
    fp32 = 4 * sum(value.numel() for value in tensors.values())
    copies = {name: torch.empty_like(value) for name, value in tensors.items()}
    for name in CODECS:
        codec = wire.codec_of(name)
        of = {n: wire.codec_of("fp32") if codec.for_matrices and v.ndim < 2 else codec for n, v in tensors.items()}
        given = {n: _half_empty(v) if name.startswith("bitmask") and of[n] is codec else v for n, v in tensors.items()}
        out = {n: torch.empty(of[n].num_bytes(v.shape), dtype=torch.uint8) for n, v in tensors.items()}

        def encode(given: Any = given, out: Any = out, of: Any = of) -> None:
            for n, value in given.items():
                of[n].encode_into(value, out[n], 1)

        def decode(given: Any = given, out: Any = out, of: Any = of) -> None:
            for n, value in given.items():
                of[n].decode(out[n], value.shape, 1)

        def copy(given: Any = given) -> None:
            for n, value in given.items():
                copies[n].copy_(value)

        encoded, decoded, copied = _turns([encode, decode, copy], turns)
        both = [a + b for a, b in zip(encoded, decoded, strict=True)]
        entries, body_bytes = wire.layout((n, "b", of[n].name, tuple(v.shape)) for n, v in tensors.items())
        message = wire.Message("update", {"round": 1, "client": 1}, entries, torch.empty(body_bytes, dtype=torch.uint8))
        size = (PREFIX_BYTES + wire.encode_header(message.header()).numel() + body_bytes) / fp32
        speeds[name], sizes[name] = round(1 / _ratio(both, copied), 3), round(size, 4)
        medians = [1e3 * statistics.median(times) for times in (encoded, decoded, copied)]
        print(f"{name:24} {medians[0]:9.1f} {medians[1]:9.1f} {medians[2]:8.1f} {speeds[name]:6.2f} {size:7.4f}", flush=True)
    return speeds, sizes


def _half_empty(value: Tensor) -> Tensor:
    """``value`` with its smaller half set to 0."""
    flat = value.abs().flatten()
    order = torch.argsort(flat, stable=True)
    return value.flatten().index_fill(0, order[:math.floor(len(flat) / 2)], 0.0).view_as(value)


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--client-ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    malloc.roomy()  # as a rank that caps nobody
    if options.rank:
        run_rank(options.turns)
        return
    exchange, cohort = exchanges(options.client_ranks, options.turns)
    tensors = model_tensors()
    fold = fold_ratio(tensors, options.turns)
    speeds, sizes = codecs(tensors, options.turns)
    print(json.dumps({"exchange_ratio": round(exchange, 3), "cohort_ratio": round(cohort, 3), "fold_ratio": round(fold, 3),
                      "codec_speed": speeds, "codec_bytes": sizes}))


if __name__ == "__main__":
    main()
