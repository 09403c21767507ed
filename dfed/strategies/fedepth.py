"""FeDepth: clients of little memory train the parts of the model one after another, each through the shared classifier.

Source: Zhang, Dai, Wang, Xing, Chen, Sun, "Memory-adaptive Depth-wise Heterogenous Federated Learning", 2023 (arXiv
2303.04887), section 3.

Symbols: client k cuts the body of the model into J_k parts θ_1 … θ_J, as its memory asks for, and holds all of it. Part j
is trained with the classifier φ for the configured epochs, with the parts before it frozen: (θ_j, φ) ← argmin F_k. The
output of part j comes to φ by a shortcut without parameters, zero-padded to the shape that φ takes; the parts behind are
not computed. The whole model goes up, and becomes the mean. J_k = 1 is full training.

Here J_k is the smallest number with which every part fits; parts are runs of units, with the smallest largest predicted
peak that bisection finds (peaks grow with each unit of a part), the same for all clients of one J_k. A client that not even
the finest parts fit does not take part.

Deviations: the authors cut at residual blocks by a memory estimate of their own, and we by the planner's. The shortcut also
averages over pixels where the classifier takes fewer, and over the image where it takes a vector; see
:func:`dfed.blocks.pad_to`. Frozen parts normalise by their running statistics and leave them as they are. The optimiser
starts anew with each part. Left out: the variant (m-FeDepth) in which rich clients train several models.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfed.blocks import pad_to, paddable
from dfed.models import Chain
from dfed.plan import Phase, Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["FeDepth"]

_PART = "part"


class FeDepth(Strategy):
    """Each client trains the model in as many parts, one after another, as its memory asks for (Zhang et al. 2023)."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        body = problem.chain.unit_names[:-1]
        shapes = [problem.chain.output_shapes()[name] for name in body]
        self._head_input = shapes[-1] if shapes else problem.chain.input_shape
        self._places = (0, *(end for end, shape in enumerate(shapes, start=1) if paddable(shape, self._head_input)))
        self._best = functools.cache(self._find)

    def training_key(self) -> list[Any]:
        return ["fedepth"]

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        return candidate.planner.best(self._plans(candidate.client))

    def _plans(self, client: int) -> Iterator[Plan]:
        yield self.full_plan(client)
        for num_parts in range(2, len(self._places)):
            yield self.plan_of(self.ends(num_parts), client)

    def ends(self, num_parts: int) -> tuple[int, ...]:
        """Where each of so many parts ends, as numbers of units; the most even choice.

        Args:
            num_parts: At least 1, and at most the places where the body can be cut, its end included.
        """
        return self._best(num_parts, len(self._places) - 1)[1]

    def plan_of(self, ends: tuple[int, ...], client: int = 0) -> Plan:
        """Training of the parts that end after so many units, one after another."""
        whole, names = self.full_plan(client), self.problem.chain.unit_names
        if len(ends) <= 1:
            return whole
        parts = [(*names[start:end], names[-1]) for start, end in zip((0, *ends[:-1]), ends, strict=True)]
        return replace(whole, phases=tuple(self._phase(phase, part) for part in parts for phase in whole.phases))

    def _phase(self, phase: Phase, part: tuple[str, ...]) -> Phase:
        return replace(phase, train=part, objective=_PART)

    def _find(self, num_parts: int, place: int) -> tuple[int, tuple[int, ...]]:
        """The smallest largest budget with which so many parts up to this place fit, and where they end.

        The more units come before the last part, the more those need, and the less it does itself: the best is where one
        overtakes the other.
        """
        if num_parts == 1:
            return self._needed(0, place), self._places[1 : place + 1][-1:]
        low, high = num_parts - 1, place - 1  # where the last part begins
        while low < high:
            middle = (low + high) // 2
            if self._best(num_parts - 1, middle)[0] >= self._needed(middle, place):
                high = middle
            else:
                low = middle + 1
        choices = []
        for begin in {low, max(low - 1, num_parts - 1)}:
            before, ends = self._best(num_parts - 1, begin)
            choices.append((max(before, self._needed(begin, place)), (*ends, self._places[place])))
        return min(choices)

    def _needed(self, begin: int, place: int) -> int:
        """The smallest budget that is sure to do for the part between these places."""
        whole, names = self.full_plan(), self.problem.chain.unit_names
        part = (*names[self._places[begin] : self._places[place]], names[-1])
        return self.problem.budget_bytes(replace(whole, phases=tuple(self._phase(phase, part) for phase in whole.phases)))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        if phase.objective != _PART:
            return super().loss(model, x, y, phase)
        assert isinstance(model, Chain)
        assert phase.train is not None
        start, stop = model.index_of(phase.train[0]), model.index_of(phase.train[-2]) + 1
        with torch.no_grad():
            x = model.run(x, 0, start)
        x = model.run(x, start, stop)
        scores = model.run(pad_to(x, self._head_input), len(model) - 1)
        return F.cross_entropy(scores.float() if scores.dtype == torch.bfloat16 else scores, y)
