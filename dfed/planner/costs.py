"""What a plan costs: its predicted peak memory, its arithmetic and its bytes, found without running or allocating it."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dfed.client import ClientSettings, Skeleton, TrainingSettings, run_plan
from dfed.client.features import Blank, units_of
from dfed.client.forms import Forms
from dfed.memory import CPU_OVERHEAD_BYTES, GREY_ZONE, PROBE_BATCH, Counter, predict_course, predict_lines
from dfed.plan import Phase, Plan
from dfed.planner.flops import OperatorCounter, attention_in_parts, flops_by_type
from dfed.planner.line import PeakLine
from dfed.planner.store import Store, describe, own_code
from dfed.strategies import Strategy

__all__ = ["Costs", "margins", "what_counts", "with_batch"]

_LOGGER = logging.getLogger(__name__)
Level = TypeVar("Level")
Predict = Callable[[Callable[[], Any], Callable[[Any], None], Counter | None], list[Level]]

_STEPS = 2  # the second meets the optimiser's state, which the first one makes
_FLOP_BATCH = 2  # batch norm in training wants more than one value a channel
_BATCHES = (8, 16, 24)


class Costs:
    """Predicted costs of plans; each shape of plan is worked out once, and kept on disk if the store says so.

    Args:
        forms: The wire form of each plan's messages.
        device: What clients train on; decides the memory that libraries take beside tensors.
        store: Where predictions are kept; None: in memory.
        identity: JSON values by which the store tells this strategy's plans from another's, e.g. its name and options.
        by_prediction: Whether clients are held to their budgets by prediction (``memory.enforce: predicted``): then a plan fits
            from its predicted peak on, and nothing is added for what a kernel might see besides.

    Attributes:
        strategy: Whose plans they are.
        overhead_bytes: What libraries may take beside tensors, if that counts.
    """

    def __init__(
        self,
        strategy: Strategy,
        settings: ClientSettings,
        forms: Forms,
        device: torch.device,
        *,
        store: Store | None = None,
        identity: Any = None,
        by_prediction: bool = False,
    ):
        self.strategy, self._forms = strategy, forms
        # What convolutions in parts save are copies that no prediction sees; in parts peaks would not be lines any more.
        self._settings = settings.model_copy(update={"conv_parts": 1})
        self._margin, self.overhead_bytes = margins(device, by_prediction)
        self._store = store or Store(None)
        chain = strategy.problem.chain
        self._input_shape = chain.input_shape
        self._attends = any(isinstance(module, nn.MultiheadAttention) for module in chain.modules())
        # What the user's own code does with a batch of millions is not known, and perhaps not what it does with a small one.
        self._probes = not own_code(*chain.modules(), strategy, *strategy.parts)
        problem = strategy.problem
        # Strategies that differ in whom they ask only, such as fedavg and exclusivefl, share their predictions.
        own = [] if _trains_plainly(strategy) else strategy.training_key()
        if own is None:
            own = [identity, problem.num_clients, problem.seed]
        if own:
            own = [describe(chain, *strategy.parts), *own]
        self._depends = [describe(chain), what_counts(settings), own]
        self._lines: dict[str, PeakLine | None] = {}
        self._peaks: dict[str, int] = {}
        self._flops: dict[str, list[list[float]]] = {}

    def peak_bytes(self, plan: Plan) -> int:
        """Predicted peak, in bytes, of the tensors that the plan's training holds at its full batch size."""
        plan, key = plan.without_details(), plan.cost_key()
        if key not in self._peaks:
            line = self._line(plan)
            self._peaks[key] = self.peak_bytes_at(plan) if line is None else line.at(plan.phases[0].batch_size)
        return self._peaks[key]

    def budget_bytes(self, plan: Plan) -> int:
        """The smallest budget that is sure to do: the peak, and unless it counts by prediction the grey zone and what libraries
        take beside tensors."""
        return self.budget_of(self.peak_bytes(plan))

    def budget_of(self, peak_bytes: int) -> int:
        """As :meth:`budget_bytes`, of a plan with this predicted peak."""
        return math.ceil(peak_bytes * (1 + self._margin)) + self.overhead_bytes

    def fits(self, plan: Plan, budget_bytes: int | None) -> bool:
        """Whether the budget (None: without limit) is at least :meth:`budget_bytes`."""
        return budget_bytes is None or self.budget_bytes(plan) <= budget_bytes

    def largest_batch(self, plan: Plan, budget_bytes: int | None, at_most: int) -> int:
        """The largest batch size, up to ``at_most``, at which the plan fits the budget; 0 if it fits at none."""
        if budget_bytes is None:
            return at_most
        line = self._line(plan)
        limit = (budget_bytes - self.overhead_bytes) / (1 + self._margin)
        guess = 0 if line is None else int(max(0, min(at_most, line.largest_batch(limit))))
        low, high = 0, at_most + 1  # low fits, high does not
        for middle in (guess, guess + 1):  # as a rule this is all, and nothing is left to search
            if low < middle < high:
                fits = self.fits(with_batch(plan, middle), budget_bytes)
                low, high = (middle, high) if fits else (low, middle)
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.fits(with_batch(plan, middle), budget_bytes)
            low, high = (middle, high) if fits else (low, middle)
        return low

    def flops(self, plan: Plan, num_samples: int) -> float:
        """Floating-point operations of the plan's training on ``num_samples`` samples (a product and a sum are two)."""
        return self._work(plan, num_samples)[0]

    def int8_flops(self, plan: Plan, num_samples: int) -> float:
        """Operations in int8, likewise; :meth:`flops` does not count them."""
        return self._work(plan, num_samples)[1]

    def _work(self, plan: Plan, num_samples: int) -> tuple[float, float]:
        """Floating-point and int8 operations."""
        plan = plan.without_details()
        key = with_batch(plan, 1).cost_key()
        if key not in self._flops:
            depends = ["flops by type", *self._depends, key]
            self._flops[key] = self._store.get(depends, lambda: [
                self._flops_per_visit(replace(plan, phases=(phase,))) for phase in plan.phases
            ])
        visits = [phase.num_visits(num_samples) for phase in plan.phases]
        plain, int8 = (sum(per_visit[kind] * count for per_visit, count in zip(self._flops[key], visits, strict=True))
                       for kind in (0, 1))
        return plain, int8

    def message_bytes(self, plan: Plan) -> tuple[int, int]:
        """Bytes that this plan's client receives and sends in a round, header included."""
        form = self._forms.of(plan)
        return sum(form.down_bytes(0, plan.client).values()), sum(form.up_bytes(0, plan.client).values())

    def _line(self, plan: Plan) -> PeakLine | None:
        """The peak over batch sizes; None where phases differ in theirs, or batches of other sizes work otherwise."""
        plan = plan.without_details()
        if len({phase.batch_size for phase in plan.phases}) != 1:
            return None
        key = with_batch(plan, 1).cost_key()
        if key not in self._lines:
            lines = self._store.get(["line", *self._depends, key], lambda: self._work_out_line(plan))
            self._lines[key] = PeakLine.from_json(lines)
        return self._lines[key]

    def _work_out_line(self, plan: Plan) -> list[list[float]]:
        """A :class:`PeakLine` as JSON values; nothing if there is none.

        One prediction tells what depends on the batch by the sizes. Where it cannot, and for classes of the user's own, three
        at small batches do.
        """
        return (self._probe(plan) if self._probes else None) or self._through_small_batches(plan)

    def _probe(self, plan: Plan) -> list[list[float]] | None:
        """Likewise from one prediction; None if that is not to be had."""
        # Where every step takes the same course, its arithmetic is counted on the way.
        alike = len(plan.phases) == self.strategy.num_draws(plan) == 1 and not self._attends
        counter = OperatorCounter(PROBE_BATCH) if alike else None
        try:
            lines = PeakLine.over(self._each_course(with_batch(plan, PROBE_BATCH), predict_lines, counter))
        except Exception:  # not for the plan, but for the size of the batch; the plan's own faults are met below
            _LOGGER.debug("no prediction for a batch of %d samples", PROBE_BATCH, exc_info=True)
            return None
        if counter is not None and counter.proportional:
            self._note_flops(plan, counter)
        return lines.to_json()

    def _through_small_batches(self, plan: Plan) -> list[list[float]]:
        line = PeakLine.through(*(part for size in _BATCHES for part in (self._course(with_batch(plan, size)), size)))
        return [] if line is None else line.to_json()

    def peak_bytes_at(self, plan: Plan) -> int:
        """As :meth:`peak_bytes`, from a prediction at this very batch size."""
        plan = plan.without_details()
        return self._store.get(["peak", *self._depends, plan.cost_key()], lambda: max(self._course(plan)))

    def _course(self, plan: Plan) -> list[int]:
        return self._each_course(plan, predict_course)

    def _each_course(self, plan: Plan, predict: Predict[Level], counter: OperatorCounter | None = None) -> list[Level]:
        """What ``predict`` finds, for each of the courses that the training may take; ``counter`` sees their operators."""
        levels: list[Level] = []
        num_draws = self.strategy.num_draws(plan)
        for number in range(max(0, num_draws - 2), num_draws):
            skeleton = Skeleton(self.strategy.build(plan))
            train = functools.partial(self._train, plan, skeleton, self._features(plan), draw=lambda n, number=number: number)

            levels += predict(lambda: self._payload(plan), train, counter)
        return levels

    def _note_flops(self, plan: Plan, counter: OperatorCounter) -> None:
        """Keep what was counted in a prediction for :data:`PROBE_BATCH`, for :meth:`_work`."""
        visits = PROBE_BATCH * min(_STEPS, plan.phases[0].steps or _STEPS)
        key, per_visit = with_batch(plan, 1).cost_key(), [count / visits for count in flops_by_type(counter.counts)]
        self._flops[key] = self._store.get(["flops by type", *self._depends, key], lambda: [per_visit])

    def _payload(self, plan: Plan) -> dict[str, Tensor]:
        return {entry.name: torch.empty(entry.shape) for entry in self._forms.of(plan).down}

    def _features(self, plan: Plan) -> Blank | None:
        feed = self.strategy.feed(plan)
        return None if feed is None else Blank(units_of(self.strategy.problem.chain, feed), feed.source_shape, torch.empty)

    def _train(self, plan: Plan, skeleton: Skeleton, features: Blank | None, values: dict[str, Tensor], steps: int = _STEPS,
               draw: Callable[[int], int] = lambda n: n - 1) -> None:
        """The client's own training code, on tensors without storage."""
        feed = self.strategy.feed(plan)
        shape = self._input_shape if feed is None else feed.shape

        def batches(phase: Phase) -> Iterable[tuple[Tensor, Tensor]]:
            for _ in range(min(steps, phase.steps or steps)):
                yield torch.empty(phase.batch_size, *shape), torch.zeros(phase.batch_size, dtype=torch.int64)

        run_plan(
            self.strategy, plan, skeleton, values, self._forms.of(plan).regions, batches, self._settings,
            rate_factor=1.0, device=torch.device("cpu"), generator=torch.Generator(), draw=draw,
            features=features,
        )

    def _flops_per_visit(self, plan: Plan) -> list[float]:
        """Floating-point and int8 operations of one phase; the mean over the courses among which its steps draw."""
        if self._probes:
            counter = OperatorCounter(PROBE_BATCH)
            try:  # the operators of such a batch have been seen before
                found = self._count_flops(with_batch(plan, PROBE_BATCH), counter, predict_lines)
                if counter.proportional:
                    return found
            except Exception:  # as in _probe
                _LOGGER.debug("no count for a batch of %d samples", PROBE_BATCH, exc_info=True)
        return self._count_flops(with_batch(plan, _FLOP_BATCH), OperatorCounter(), predict_course)

    def _count_flops(self, plan: Plan, counter: OperatorCounter, predict: Predict[Any]) -> list[float]:
        skeleton, num_draws = Skeleton(self.strategy.build(plan)), self.strategy.num_draws(plan)
        features, turns = self._features(plan), itertools.count()

        def work(values: dict[str, Tensor]) -> None:
            with attention_in_parts():
                for _ in range(num_draws):
                    self._train(plan, skeleton, features, values, steps=1, draw=lambda n: next(turns) % n)

        predict(lambda: self._payload(plan), work, counter)
        return [count / (plan.phases[0].batch_size * num_draws) for count in flops_by_type(counter.counts)]


def margins(device: torch.device, by_prediction: bool) -> tuple[float, int]:
    """What a budget that is sure to do has above the predicted peak of the tensors: a share of it, and bytes."""
    if by_prediction:
        return 0.0, 0
    return GREY_ZONE, CPU_OVERHEAD_BYTES if device.type == "cpu" else 0


def what_counts(settings: TrainingSettings) -> list[Any]:
    """The settings of local training on which memory and arithmetic of a step depend."""
    clips, momentum = settings.clip_norm is not None, settings.momentum > 0
    return [settings.optimizer, momentum, settings.nesterov, settings.weight_decay > 0, clips,
            settings.activation_checkpointing, settings.precision]


def _trains_plainly(strategy: Strategy) -> bool:
    """Whether the strategy's clients do what those of every strategy do that says nothing else."""
    methods = ("region", "build", "feed", "receive", "loss", "upload", "remember", "num_draws")
    plain = all(getattr(type(strategy), name) is getattr(Strategy, name) for name in methods)
    return plain and not strategy.keeps_state and not strategy.extras


def with_batch(plan: Plan, batch_size: int) -> Plan:
    """The plan with this batch size in every phase."""
    return replace(plan, phases=tuple(replace(phase, batch_size=batch_size) for phase in plan.phases))
