"""What CoCoFL's ranges cost: time of a training step and predicted peak, relative to full training, on this machine.

    python benchmarks/cocofl.py [--models resnet18 mobilenet_v2] [--batch 32] [--repeats 9]

For each model: ranges of one unit at the end, in the middle and at the start, and halves; frozen blocks as int8 and, for
comparison, as float32. Steps (forward, backward, SGD) of the full model, of the range with int8 and of the range with float32
are taken in turn, in one process on one thread; times are medians of ratios. Then the forward pass of everything before the
last block, frozen: int8 against float32. And the choice of a range for a client with half of the memory and time and two thirds
of the upload: milliseconds, once what the ranges cost is known, and seconds before.

Last line: one JSON object: `time` and `time_fp32` by model and range, `peak` likewise (predicted), `prefix` (int8 / fp32),
`search_ms` and `first_search_s` by model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfed import rng
from dfed.blocks import Splitting
from dfed.client import ClientSettings, Forms, Skeleton
from dfed.fleet import DeviceProfile
from dfed.models import build_chain, materialise
from dfed.plan import Plan
from dfed.planner import ClientPlanner, Costs, Limits
from dfed.registry import STRATEGIES
from dfed.strategies import Candidate, Problem, Strategy

SHAPE, CLASSES = (3, 32, 32), 10


class Bench:
    """One model under CoCoFL, with int8 and with float32 for what is frozen."""

    def __init__(self, model: str, batch: int):
        self.chain = build_chain(model, {}, input_shape=SHAPE, num_classes=CLASSES)
        settings = ClientSettings(batch_size=batch, learning_rate=0.01)
        problem = Problem(chain=self.chain, splitting=Splitting.by_unit(self.chain.unit_names), num_clients=1, seed=0,
                          phases=settings.phases)
        self.strategies: dict[str, Strategy] = {
            frozen: STRATEGIES.get("cocofl")(problem, frozen=frozen) for frozen in ("int8", "fp32")}
        values = materialise(self.chain.skeleton(), rng.torch_generator(0, "init")).state_dict()
        self.values = {name: value.detach() for name, value in values.items() if value.is_floating_point()}
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        self.costs = {
            frozen: Costs(strategy, settings, Forms(strategy, strategy.splitting, shapes), torch.device("cpu"))
            for frozen, strategy in self.strategies.items()}
        generator = rng.torch_generator(0, "batch")
        self.x, self.y = torch.randn(batch, *SHAPE, generator=generator), torch.randint(CLASSES, (batch,), generator=generator)

    def plan(self, first: int, last: int) -> Plan:
        """Training of the units from ``first`` to ``last``."""
        return self.strategies["int8"].plans[first, last]  # type: ignore[attr-defined]

    def step(self, plan: Plan, frozen: str) -> Callable[[], None]:
        """A step of training by this plan."""
        model = self._model(plan, frozen)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-3, fused=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(self.x), self.y).backward()
            optimizer.step()

        return step

    def prefix(self, plan: Plan, frozen: str) -> Callable[[], Tensor]:
        """The forward pass of what lies before the plan's range."""
        model = self._model(plan, frozen)
        stop = plan.options["first"] - 1

        def run() -> Tensor:
            with torch.no_grad():
                return model.run(self.x, stop=stop)

        return run

    def search(self) -> None:
        """The choice of a range for a client with limits."""
        costs, strategy = self.costs["int8"], self.strategies["int8"]
        budget = costs.budget_bytes(strategy.full_plan()) // 2
        device = DeviceProfile(tier="half", budget_bytes=budget, flops=1e10, up=1e6, down=1e6, watts=1.0, radio_watts=1.0,
                               availability=1.0, dropout=0.0, time_share=0.5)
        limits = Limits.of(costs, device, 0, 100, deadline_s=None, upload_share=0.66)
        planner = ClientPlanner(costs, device, 100, {}, limits)
        state = strategy.init(self.values)
        assert strategy.plan(state, Candidate(0, 0, 100, device, planner)) is not None, "no range fits half of all"

    def _model(self, plan: Plan, frozen: str) -> Any:
        skeleton = Skeleton(self.strategies[frozen].build(plan))
        skeleton.load(self.values, torch.device("cpu"))
        skeleton.model.set_generator(rng.torch_generator(0, "layers"))
        for name, child in skeleton.model.named_children():
            child.train(name in plan.train)
        return skeleton.model


def ranges(names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """The ranges to look at, by name; both ends included."""
    last, middle = len(names) - 1, len(names) // 2
    return {
        "classifier": (last, last), "last block": (last - 1, last - 1), "last block and classifier": (last - 1, last),
        "middle block": (middle, middle), "first block": (0, 0), "first half": (0, middle - 1), "second half": (middle, last),
    }


def compare(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Medians of the times of all but the first, over that of the first just before them."""
    for function in functions:
        function()
    ratios: list[list[float]] = [[] for _ in functions[1:]]
    for _ in range(repeats):
        times = [_seconds(function) for function in functions]
        for found, seconds in zip(ratios, times[1:], strict=True):
            found.append(seconds / times[0])
    return [statistics.median(found) for found in ratios]


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Time the ranges of all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {"time": {}, "time_fp32": {}, "peak": {}, "peak_fp32": {}, "prefix": {},
                                        "search_ms": {}, "first_search_s": {}}
    print(f"{'model':13} {'trained':27} {'time int8':>9} {'time fp32':>9} {'peak int8':>9} {'peak fp32':>9}   of full training")
    for model in options.models:
        bench = Bench(model, options.batch)
        names = bench.chain.unit_names
        whole = bench.plan(0, len(names) - 1)
        full = bench.step(whole, "int8")
        for label, ends in ranges(names).items():
            plan = bench.plan(*ends)
            times = compare([full, bench.step(plan, "int8"), bench.step(plan, "fp32")], options.repeats)
            peaks = [bench.costs[frozen].peak_bytes_at(plan) / bench.costs[frozen].peak_bytes_at(whole)
                     for frozen in ("int8", "fp32")]
            for kind, value in zip(("time", "time_fp32", "peak", "peak_fp32"), (*times, *peaks), strict=True):
                found[kind].setdefault(model, {})[label.replace(" ", "_")] = round(value, 3)
            print(f"{model:13} {label:27} {times[0]:9.3f} {times[1]:9.3f} {peaks[0]:9.3f} {peaks[1]:9.3f}", flush=True)
        last = bench.plan(len(names) - 2, len(names) - 1)
        ratio = compare([bench.prefix(last, "fp32"), bench.prefix(last, "int8")], options.repeats)[0]
        found["prefix"][model] = round(ratio, 3)
        first = _seconds(bench.search)
        again = statistics.median(_seconds(bench.search) for _ in range(9))
        found["first_search_s"][model], found["search_ms"][model] = round(first, 1), round(1000 * again, 1)
        print(f"{model:13} choice of a range among {len(names)} units: {1000 * again:.1f} ms, the first time {first:.1f} s")
        print(f"{model:13} forward pass before the last block: int8 {ratio:.3f} of fp32", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
