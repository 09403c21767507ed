"""Trains under hard caps in a process of its own and prints what happened as one JSON object.

Run as ``python memory_capped_training.py MODEL BATCH BUDGET …``, or with ``unrehearsed`` as the first budget. A budget is
``none``, a number of bytes, or a share of what surely suffices (``fits``) or of the predicted peak of the tensors
(``0.5T``). The first training counts for nothing, unless the first budget is ``cold``, which is ``fits`` for a process that
has met none of the kernels.
"""

from __future__ import annotations

import gc
import hashlib
import json
import resource
import sys
import traceback
import warnings

warnings.simplefilter("error")

import torch  # noqa: E402

from dfed import rng  # noqa: E402
from dfed.blocks import Splitting  # noqa: E402
from dfed.client import ClientSettings, Forms, Skeleton, run_plan  # noqa: E402
from dfed.client.thread import TrainingThread  # noqa: E402
from dfed.client.training import rehearse  # noqa: E402
from dfed.memory import CPU_OVERHEAD_BYTES, GREY_ZONE, MemorySettings, is_out_of_memory, make_cap, malloc, measure  # noqa: E402
from dfed.models import build_chain, materialise  # noqa: E402
from dfed.plan import Phase, Plan  # noqa: E402
from dfed.planner import Costs  # noqa: E402
from dfed.strategies import Problem  # noqa: E402
from dfed.strategies.fedavg import FedAvg  # noqa: E402

CPU = torch.device("cpu")
SHAPE = (3, 32, 32)


class Training:
    """One client's training, the same every time it is run."""

    def __init__(self, model: str, batch: int):
        torch.set_num_threads(1)
        self.chain = build_chain(model, {}, input_shape=SHAPE, num_classes=10)
        shapes = {name: tuple(t.shape) for name, t in self.chain.state_dict().items() if t.is_floating_point()}
        splitting, phases = Splitting.by_unit(self.chain.unit_names), (Phase(batch_size=batch, steps=2),)
        problem = Problem(chain=self.chain, splitting=splitting, phases=phases, num_clients=1, seed=0)
        self.strategy, self.settings = FedAvg(problem), ClientSettings(momentum=0.9)
        forms = Forms(self.strategy, splitting, shapes)
        self.plan = Plan(client=0, hold=splitting.names, train=splitting.names, phases=phases)
        self.regions = forms.of(self.plan).regions
        costs = Costs(self.strategy, self.settings, forms, CPU)
        self.tensor_bytes = costs.peak_bytes(self.plan)
        full = materialise(self.chain.skeleton(), rng.torch_generator(0, "init"))
        self.values = {name: value.detach() for name, value in full.state_dict().items() if name in shapes}
        self.skeleton = Skeleton(self.chain.skeleton())
        self.cap = make_cap(MemorySettings(), CPU, has_budgets=True)
        self.thread, self.tries, self.rehearses = TrainingThread(CPU, self._warm_up), 0, True

    def budget(self, text: str) -> int | None:
        if text == "none":
            return None
        if text in ("fits", "cold"):
            return int(self.tensor_bytes * (1 + GREY_ZONE)) + CPU_OVERHEAD_BYTES
        return int(float(text[:-1]) * self.tensor_bytes) if text.endswith("T") else int(text)

    def _batches(self, phase: Phase, size: int | None = None):
        generator = rng.torch_generator(0, "batches")
        for _ in range(phase.steps if size is None else 1):
            shape = (size or phase.batch_size,)
            yield torch.randn(*shape, *SHAPE, generator=generator), torch.randint(10, shape, generator=generator)

    def _run(self, batches):
        return run_plan(self.strategy, self.plan, self.skeleton, self.values, self.regions, batches, self.settings,
                        rate_factor=1.0, device=CPU, generator=rng.torch_generator(0, "layers"))

    def _warm_up(self) -> None:
        """A small step without a cap, as a worker takes it in each fresh thread."""
        try:
            self._run(lambda phase: self._batches(phase, 2))
        finally:
            self.skeleton.unload()

    def _capped(self, budget: int | None) -> dict:
        meter = None
        self.tries += 1
        self.skeleton.unload()
        (samples,) = (phase.batch_size for phase in self.plan.phases)
        if self.rehearses and self.thread.must_rehearse(
            self.plan, samples, peak_bytes=self.tensor_bytes, budget_bytes=budget
        ):
            rehearse(self.strategy, self.plan, self.skeleton, self.values, self.regions, self.settings, input_shape=SHAPE,
                     num_samples=samples, device=CPU)
            self.skeleton.unload()
        try:
            with self.cap.guard(budget) as meter:
                result = self._run(self._batches)
            digest = hashlib.sha256()
            for name in sorted(result.update):
                digest.update(name.encode() + result.update[name].numpy().tobytes())
            return {"hash": digest.hexdigest(), "peak": meter.peak_bytes}
        finally:
            self.skeleton.unload()

    def run(self, budget: int | None) -> dict:
        """Train once; after an error in a fresh thread next time, as a worker does."""
        before, self.tries = usage(), 0
        try:
            report = self.thread.run_under(self.cap, lambda: self._capped(budget))
        except Exception as error:
            report = {"error": type(error).__name__, "oom": is_out_of_memory(error), "text": str(error)[-200:]}
            traceback.clear_frames(error.__traceback__)
            del error
            self.thread.replace()
        return report | {"budget": budget, "tries": self.tries, "before": before, "after": usage(),
                         "limit": list(resource.getrlimit(resource.RLIMIT_DATA))}


def usage() -> dict:
    gc.collect()
    malloc.trim()
    return {"data": measure.data_segment_bytes(), "resident": measure.resident_bytes()}


def main(model: str, batch: str, *budgets: str) -> None:
    training = Training(model, int(batch))
    if budgets[0] == "unrehearsed":
        training.rehearses, budgets = False, budgets[1:]
    if budgets[0] != "cold":
        training.run(None)
    runs = []
    for text in budgets:
        runs.append(training.run(training.budget(text)))
    print(json.dumps({"tensors": training.tensor_bytes, "runs": runs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
