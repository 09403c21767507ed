"""InclusiveFL: models of several depths, whose last layers are their own and learn from the next larger model's.

Source: Liu, Wu, Wu, Wang, Lyu, Chen, Xie, "No One Left Behind: Inclusive Federated Learning over Heterogeneous Devices",
KDD 2022 (arXiv 2202.08036), section 3; the formula below as their code has it.

Symbols: sizes s = 1 … S with L_1 < … < L_S layers. Size s has layers 1 … L_s and a classifier; its layer L_s and its
classifier are its own, the layers before are shared by all sizes that hold them, and each tensor becomes the mean over
these. Momentum distillation, β (``beta``): of what layer L_s of size s moved in the round, g_s, and what layers L_s …
L_{s+1} of size s + 1 moved, g_s ← (1 − β) g_s + β · 1/(L_{s+1} − L_s + 1) · Σ_{l=L_s}^{L_{s+1}} g_{s+1, l}. The largest
size is the full model.

Here a layer is a unit; sizes end where :func:`dfed.blocks.cut_points` says. Units differ in shape: each parameter takes the
mean over those of these units that have one of its name and shape and were sent in the round, and is left alone if there is
none.

Deviations: g is the change of the global tensor over the round (the authors aggregate gradients, and use the larger model's
of the round before); for layers that several sizes share it is the change of their common mean. A size nobody trained stays
as it is. The authors start all sizes from one pretrained model; here a size's own layer starts as the full model's layer in
its place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dfed.blocks import check_names, classifier, cut, cut_points
from dfed.models.layers import Count
from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["InclusiveFL"]


class InclusiveFL(Strategy):
    """Each client trains as large a prefix as fits; last layer and classifier are each size's own (Liu et al. 2022).

    Args:
        depths: How many sizes there are, the full model included.
        cuts: The last unit of each size but the last, instead; null: see :func:`dfed.blocks.cut_points`.
        beta: β, the share of the next larger size in what a size's own last layer learns.
    """

    def __init__(self, problem: Problem, *, depths: Count = 4, cuts: list[str] | None = None,
                 beta: Annotated[float, Field(ge=0, le=1)] = 0.2):
        chain = problem.chain
        self.stops, self.beta = cut_points(chain, depths, cuts), beta
        extras: dict[str, nn.Module] = {}
        for size, stop in enumerate(self.stops[:-1], start=1):
            extras[f"size{size}_last"] = copy.deepcopy(chain.skeleton().unit(chain.unit_names[stop - 1]))
            extras[f"size{size}_head"] = classifier(chain, stop)
        check_names(chain, extras)
        super().__init__(problem, extras)

    def training_key(self) -> list[Any]:
        return ["inclusivefl", list(self.stops)]

    def init(self, params: Mapping[str, Tensor]) -> ServerState:
        started = dict(params)
        for size, stop in enumerate(self.stops[:-1], start=1):
            for own, shared in self._places(f"size{size}_last", self.problem.chain.unit_names[stop - 1], params):
                started[own] = params[shared].clone()
        return super().init(started)

    def _places(self, own: str, unit: str, params: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        """Names of the tensors of the module ``own`` and of their counterparts in ``unit``."""
        start = len(own) + 1
        return [(name, f"{unit}.{name[start:]}") for name in params if name.startswith(f"{own}.")]

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        largest_first = range(len(self.stops), 0, -1)
        return candidate.planner.best(self.plan_at(size, candidate.client) for size in largest_first)

    def plan_at(self, size: int, client: int = 0) -> Plan:
        """Training of this size (from 1)."""
        if size == len(self.stops):
            return self.full_plan(client)
        hold = (*self.problem.chain.unit_names[: self.stops[size - 1] - 1], f"size{size}_last", f"size{size}_head")
        return Plan(client=client, hold=hold, train=hold, phases=self.problem.phases, options={"size": size})

    def build(self, plan: Plan) -> nn.Module:
        size = plan.options.get("size", len(self.stops))
        if size == len(self.stops):
            return super().build(plan)
        own = [(name, copy.deepcopy(self.extras[name])) for name in (f"size{size}_last", f"size{size}_head")]
        return cut(self.problem.chain, stop=self.stops[size - 1] - 1, end=own)

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        senders, params = metrics["senders"], dict(new.params)

        def moved(name: str) -> Tensor:
            return new.params[name] - old.params[name]

        for size in range(1, len(self.stops)):
            own = f"size{size}_last"
            teachers = [unit for unit in self._teachers(size) if senders.get(unit, 0)]
            if not senders.get(own, 0):
                continue
            for rest, parameter in self.extras[own].named_parameters():
                known = [moved(name) for name in (f"{unit}.{rest}" for unit in teachers)
                         if name in new.params and new.params[name].shape == parameter.shape]
                if known:
                    name, mean = f"{own}.{rest}", torch.stack(known).mean(dim=0)
                    params[name] = old.params[name] + (1 - self.beta) * moved(name) + self.beta * mean
        return replace(new, params=params)

    def _teachers(self, size: int) -> list[str]:
        """The next larger size's units from the place of this size's last one on, its own last one included."""
        names, first, last = self.problem.chain.unit_names, self.stops[size - 1] - 1, self.stops[size]
        if size + 1 == len(self.stops):
            return list(names[first : last - 1])  # without the full model's classifier
        return [*names[first : last - 1], f"size{size + 1}_last"]

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return {f"size{size}": self.plan_at(size) for size in range(1, len(self.stops) + 1)}

    def variant_of(self, plan: Plan) -> str | None:
        return f"size{plan.options.get('size', len(self.stops))}"
