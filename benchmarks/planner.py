"""The planner's predictions against what happens: peaks of many plans, verdicts under the hard cap, and splittings.

Each plan (architecture × way to train × batch size) is trained for two steps in a process of its own, which has met no kernel
yet: first on the budget that the planner calls enough, where its peak is measured; then on one that the predicted peak
exceeds by 15 %. Predictions are made by `dfed.planner`, training by the client's own code under the client's own cap.

    python benchmarks/planner.py [--batches 16 48] [--architectures cnn resnet18 …] [--markdown FILE]

Last line: one JSON object. `worst_error` is the largest |predicted − measured| beyond the stated constant, as a share of the
measured peak; `worst_raw_error` is the same without the constant.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dfed import rng
from dfed.blocks import Splitting, cut, hold_int8, stage, train_only
from dfed.client import ClientSettings, Forms, Skeleton, run_plan
from dfed.client.thread import TrainingThread
from dfed.client.training import rehearse
from dfed.memory import MemoryMeter, MemorySettings, is_out_of_memory, make_cap
from dfed.models import Chain, build_chain
from dfed.plan import Phase, Plan
from dfed.planner import Store, chain_costs, split_chain, stage_peaks

MIB = 2**20
SHAPE, CLASSES = (3, 32, 32), 10
OVER = 1.15
NARROW = {
    "cnn": {"channels": [16, 32], "hidden": 256},
    "vit_tiny": {"width": 96},
}
ARCHITECTURES = ("cnn", "resnet18", "mobilenet_v2", "vgg11_bn", "vit_tiny", "densenet40", "resnet20")
WAYS = ("full", "full adam", "recomputed", "bf16", "last third", "middle third", "last third, int8 before",
        "middle third, int8 around", "narrow", "first half and head", "one unit, local loss")
PAPER_SPLITS = {
    "resnet18": (3, 5, 7),
    "resnet34": (4, 8, 14),
    "vgg11_bn": (2, 4, 6),
    "vit_tiny": (3, 4, 6),
}
"""Where the papers' hand-made stages 2 to 4 begin, in units: stem and first layer, then a layer each; ViT in equal groups,
with the patch embedding in the first."""


@dataclass(frozen=True)
class Result:
    """One plan: what was predicted, and what was seen."""

    architecture: str
    way: str
    batch: int
    predicted: int
    measured: int
    ran_when_fit: bool
    failed_when_over: bool

    constant: int

    @property
    def error(self) -> float:
        """Relative error of the prediction, signed."""
        return (self.predicted - self.measured) / self.measured


def chain_for(architecture: str, way: str) -> Chain:
    """The model of one way to train, on the meta device; what asks for a gradient is trained."""
    if way == "narrow" and architecture in NARROW:
        return build_chain(architecture, NARROW[architecture], input_shape=SHAPE, num_classes=CLASSES)
    chain = build_chain(architecture, {}, input_shape=SHAPE, num_classes=CLASSES)
    names = chain.unit_names
    third = max(1, len(names) // 3)
    if way.startswith("last third"):
        train_only(chain, names[-third:])
    elif way.startswith("middle third"):
        train_only(chain, names[third:2 * third])
    elif way == "first half and head":
        half = len(names) // 2
        return stage(chain, Splitting({"first": names[:half], "rest": names[half:]}), 0)
    elif way == "one unit, local loss":
        unit = len(names) // 2
        return cut(chain, unit, unit + 1, end=[("local", _local_head(chain.output_shapes()[names[unit]]))])
    if "int8" in way:
        hold_int8(chain)
    return chain


def _local_head(shape: tuple[int, ...]) -> nn.Module:
    with torch.device("meta"):
        if len(shape) != 3:
            return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), CLASSES))
        layers = [nn.Conv2d(shape[0], 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(256, CLASSES))


def settings_for(way: str, batch: int) -> ClientSettings:
    """Local training of one way."""
    if way == "full adam":
        return ClientSettings(batch_size=batch, steps=2, optimizer="adam", learning_rate=1e-3)
    return ClientSettings(batch_size=batch, steps=2, momentum=0.9, learning_rate=1e-3,
                          activation_checkpointing=way == "recomputed", precision="bf16" if way == "bf16" else "fp32")


class Bench:
    """Trains plans under caps, as a rank does."""

    def __init__(self, device: torch.device):
        torch.set_num_threads(1)
        self.device = device
        self.cap = make_cap(MemorySettings(), device, has_budgets=True)

    def run(
        self, chain: Chain, settings: ClientSettings, budget: int | None, thread: TrainingThread
    ) -> tuple[bool, int | None]:
        """Whether the training ran on this budget, and its measured peak."""
        costs, plan = chain_costs(chain, settings, self.device)
        splitting = Splitting.by_unit(chain.unit_names)
        floats = {name: tensor for name, tensor in chain.state_dict().items() if tensor.is_floating_point()}
        forms = Forms(costs.strategy, splitting, {name: tuple(tensor.shape) for name, tensor in floats.items()})
        skeleton, regions = Skeleton(costs.strategy.build(plan)), forms.of(plan).regions
        generator = rng.torch_generator(0, "values")
        values = {name: 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in floats.items()}
        values |= {name: value.abs() + 0.5 for name, value in values.items() if name.endswith("running_var")}
        meters: list[MemoryMeter] = []

        def train() -> None:
            skeleton.unload()  # what a try before this one left there
            if thread.must_rehearse(plan, settings.batch_size, peak_bytes=costs.peak_bytes(plan), budget_bytes=budget):
                rehearse(costs.strategy, plan, skeleton, values, regions, settings, input_shape=chain.input_shape,
                         num_samples=settings.batch_size, device=self.device)
                skeleton.unload()
            with self.cap.guard(budget) as meter:
                meters.append(meter)
                self._train(costs.strategy, plan, skeleton, values, regions, settings, chain)

        try:
            thread.run_under(self.cap, train)
            return True, meters[-1].peak_bytes
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            thread.replace()
            return False, None
        finally:
            skeleton.unload()

    def warm_up(self, chain: Chain, settings: ClientSettings) -> None:
        """A small step without a limit, as a worker takes it in each fresh thread."""
        model = chain.skeleton().to_empty(device=self.device)
        for tensor in model.state_dict().values():
            tensor.zero_()
        model.set_generator(torch.Generator(device=self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            out = model.train()(torch.zeros(2, *chain.input_shape, device=self.device))
        out.float().sum().backward()

    def _train(self, strategy, plan: Plan, skeleton: Skeleton, values, regions, settings: ClientSettings, chain: Chain) -> None:
        def batches(phase: Phase) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            generator = rng.torch_generator(0, "batches")
            for _ in range(phase.steps or 1):
                yield (torch.randn(phase.batch_size, *chain.input_shape, generator=generator),
                       torch.randint(CLASSES, (phase.batch_size,), generator=generator))

        generator = torch.Generator(device=self.device)
        run_plan(strategy, plan, skeleton, values, regions, batches, settings, rate_factor=1.0, device=self.device,
                 generator=generator)


def look_at(architecture: str, way: str, batch: int) -> Result:
    """Predict one plan and try it, in a process that has met no kernel yet."""
    bench = Bench(_device())
    chain, settings = chain_for(architecture, way), settings_for(way, batch)
    costs, plan = chain_costs(chain, settings, bench.device)
    predicted, enough = costs.peak_bytes(plan), costs.budget_bytes(plan)
    thread = TrainingThread(bench.device, lambda: bench.warm_up(chain, settings))
    fits, measured = bench.run(chain, settings, enough, thread)
    over, _ = bench.run(chain, settings, int(predicted / OVER) - 1, thread)
    if not fits:
        ran, measured = bench.run(chain, settings, None, thread)
        assert ran, f"{architecture} {way} {batch}: not even without a limit"
    assert measured is not None, "this system does not measure"
    return Result(architecture, way, batch, predicted, measured, fits, not over, costs.overhead_bytes)


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def splits(architectures: list[str]) -> dict[str, float]:
    """Reductions of the largest stage's peak against full training at batch 64: the papers' splits and the planner's."""
    print(f"\n{'model':10} {'blocks':>8} {'cut before units':20} {'stage peaks MiB':44} {'full':>6} {'reduction':>9} {'s':>6}")
    settings, found = ClientSettings(batch_size=64, momentum=0.9), {}
    for name in architectures:
        chain = build_chain(name, {}, input_shape=SHAPE, num_classes=CLASSES)
        cuts = (0, *PAPER_SPLITS[name], len(chain))
        names = chain.unit_names
        paper = Splitting({f"b{i}": names[a:b] for i, (a, b) in enumerate(itertools.pairwise(cuts))})
        peaks, full = stage_peaks(chain, paper, settings)
        _split_row(name, "paper", paper, peaks, full, 0.0)
        found[f"{name}_paper"] = round(1 - max(peaks) / full, 4)
        for blocks, label in ((4, name), (None, f"{name}_free")):
            start = time.perf_counter()
            split = split_chain(chain, settings, num_blocks=blocks, store=Store(None))
            _split_row(name, str(blocks or "free"), split.splitting, split.peak_bytes, full, time.perf_counter() - start)
            found[label] = round(split.reduction, 4)
    return found


def _split_row(name: str, blocks: str, splitting: Splitting, peaks: tuple[int, ...], full: int, seconds: float) -> None:
    begins = " ".join(units[0] for units in list(splitting.blocks.values())[1:4])
    shown = " ".join(f"{peak / MIB:.0f}" for peak in peaks)
    print(f"{name:10} {blocks:>8} {begins:20} {shown:44} {full / MIB:6.0f} {1 - max(peaks) / full:9.3f} {seconds:6.1f}",
          flush=True)


def main() -> None:
    """Try all plans, cut the chains, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 48])
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--splits", nargs="*", default=list(PAPER_SPLITS), choices=list(PAPER_SPLITS))
    parser.add_argument("--markdown", type=Path, help="also write the table of plans to this file")
    options = parser.parse_args()
    workplace = multiprocessing.get_context("forkserver")
    workplace.set_forkserver_preload(["torch", "dfed.planner", "dfed.client"])
    results = []
    print(f"{'architecture':13} {'way':26} {'batch':>5} {'predicted':>9} {'measured':>9} {'error':>7} {'fits ran':>8} "
          f"{'over failed':>11}")
    for architecture in options.architectures:
        for way in WAYS:
            if way == "narrow" and architecture not in NARROW:
                continue
            for batch in options.batches:
                with workplace.Pool(1) as pool:
                    r = pool.apply(look_at, (architecture, way, batch))
                results.append(r)
                print(f"{r.architecture:13} {r.way:26} {r.batch:5} {r.predicted / MIB:9.1f} {r.measured / MIB:9.1f} "
                      f"{r.error:7.1%} {r.ran_when_fit!s:>8} {r.failed_when_over!s:>11}", flush=True)
    beyond = [max(0.0, abs(r.predicted - r.measured) - r.constant) / r.measured for r in results]
    worst = results[beyond.index(max(beyond))] if max(beyond) else max(results, key=lambda r: abs(r.error))
    print(f"\nworst: {worst.architecture}, {worst.way}, batch {worst.batch}; constant {worst.constant / MIB:.0f} MiB")
    start = time.perf_counter()
    large = build_chain("resnet50", {}, input_shape=(3, 224, 224), num_classes=1000)
    costs, plan = chain_costs(large, ClientSettings(batch_size=128, momentum=0.9), _device())
    peak = costs.peak_bytes(plan)
    print(f"ResNet-50, 224 × 224, batch 128: {peak / 2**30:.1f} GiB, planned in {time.perf_counter() - start:.1f} s")
    if options.markdown is not None:
        options.markdown.write_text(_markdown(results), encoding="utf-8")
    print(json.dumps({
        "num_plans": len(results), "worst_error": round(max(beyond), 4),
        "worst_raw_error": round(max(abs(r.error) for r in results), 4), "constant_mib": min(r.constant for r in results) / MIB,
        "fits_right": sum(r.ran_when_fit for r in results) / len(results),
        "misfits_right": sum(r.failed_when_over for r in results) / len(results),
        "split_reduction": splits(options.splits),
    }))


def _markdown(results: list[Result]) -> str:
    lines = ["| model | way | batch | predicted MiB | measured MiB | error | ran on enough | failed on 15 % less |",
             "|---|---|--:|--:|--:|--:|:-:|:-:|"]
    for r in results:
        verdicts = ("yes" if r.ran_when_fit else "**no**", "yes" if r.failed_when_over else "**no**")
        lines.append(f"| {r.architecture} | {r.way} | {r.batch} | {r.predicted / MIB:.1f} | {r.measured / MIB:.1f} | "
                     f"{r.error:+.1%} | {verdicts[0]} | {verdicts[1]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
