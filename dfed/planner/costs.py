"""What a plan costs: its predicted peak memory and its arithmetic, found without running or allocating it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dfed.client import ClientSettings, Skeleton, run_plan
from dfed.client.forms import Forms
from dfed.memory import CPU_OVERHEAD_BYTES, GREY_ZONE, predict_peak
from dfed.plan import Phase, Plan
from dfed.strategies import Strategy

__all__ = ["Costs"]

_FLOP_BATCH = 2  # batch norm in training wants more than one value a channel


class Costs:
    """Predicted costs of plans; each shape of plan is worked out once.

    Args:
        input_shape: Of one sample.
        device: What clients train on; decides the memory that libraries take beside tensors.
    """

    def __init__(
        self,
        strategy: Strategy,
        settings: ClientSettings,
        forms: Forms,
        input_shape: tuple[int, ...],
        device: torch.device,
    ):
        self._strategy, self._settings, self._forms, self._input_shape = strategy, settings, forms, input_shape
        self._overhead_bytes = CPU_OVERHEAD_BYTES if device.type == "cpu" else 0
        self._peaks: dict[str, int] = {}
        self._flops: dict[str, list[float]] = {}

    def peak_bytes(self, plan: Plan) -> int:
        """Predicted peak of the plan's training at its full batch size, in bytes, libraries' overhead included."""
        return self._tensor_peak_bytes(plan) + self._overhead_bytes

    def _tensor_peak_bytes(self, plan: Plan) -> int:
        key = plan.shape_key()
        if key not in self._peaks:
            skeleton = Skeleton(self._strategy.build(plan))
            self._peaks[key] = predict_peak(lambda: self._payload(plan), lambda values: self._train(plan, skeleton, values))
        return self._peaks[key]

    def fits(self, plan: Plan, budget_bytes: int | None) -> bool:
        """Whether the plan is expected to run on this budget, with the grey zone to spare."""
        return (
            budget_bytes is None
            or self._tensor_peak_bytes(plan) * (1 + GREY_ZONE) + self._overhead_bytes <= budget_bytes
        )

    def flops(self, plan: Plan, num_samples: int) -> float:
        """Floating-point operations of the plan's training on ``num_samples`` samples (a product and a sum are two)."""
        key = plan.shape_key()
        if key not in self._flops:
            self._flops[key] = [self._flops_per_visit(replace(plan, phases=(phase,))) for phase in plan.phases]
        visits = (phase.num_visits(num_samples) for phase in plan.phases)
        return sum(per_visit * count for per_visit, count in zip(self._flops[key], visits, strict=True))

    def _payload(self, plan: Plan) -> dict[str, Tensor]:
        return {entry.name: torch.empty(entry.shape) for entry in self._forms.of(plan).down}

    def _train(
        self, plan: Plan, skeleton: Skeleton, values: dict[str, Tensor], batch_size: int | None = None, steps: int = 2
    ) -> None:
        """The client's own training code, on tensors without storage."""

        def batches(phase: Phase) -> Iterable[tuple[Tensor, Tensor]]:
            # Two steps: the second meets the optimiser's state, which the first one makes.
            for _ in range(steps):
                size = batch_size or phase.batch_size
                yield torch.empty(size, *self._input_shape), torch.zeros(size, dtype=torch.int64)

        run_plan(
            self._strategy, plan, skeleton, values, self._forms.of(plan).regions, batches, self._settings,
            rate_factor=1.0, device=torch.device("cpu"), generator=torch.Generator(),
        )

    def _flops_per_visit(self, plan: Plan) -> float:
        counter, skeleton = FlopCounterMode(display=False), Skeleton(self._strategy.build(plan))

        def work(values: dict[str, Tensor]) -> None:
            with counter:
                self._train(plan, skeleton, values, batch_size=_FLOP_BATCH, steps=1)

        predict_peak(lambda: self._payload(plan), work)
        return counter.get_total_flops() / _FLOP_BATCH
