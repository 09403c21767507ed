"""FjORD: ordered dropout; each step trains a width drawn from those that the client can hold.

Source: Horváth, Laskaridis, Almeida, Leontiadis, Venieris, Lane, "FjORD: Fair and Accurate Federated Learning under
heterogeneous targets with Ordered Dropout", NeurIPS 2021 (arXiv 2102.13451), algorithm 1, sections 3.2 to 3.4.

Symbols: p, a width, out of P (``rates``); p_max, the largest that fits the client. Each local step draws
p ~ U{p ∈ P : p ≤ p_max} and trains the first ⌈p·d⌉ of each layer's d outputs. Aggregation: every entry is the mean over the
clients whose p_max covers it, weighted by samples. Distillation (``distillation`` = α): each step trains p_max too, and a
smaller width learns from it: CE(p_max) + α · KL(p_max ‖ p) + (1 − α) · CE(p).

Norm statistics: each width has its own. Clients normalise by the mini-batch and keep none; a width's are worked out from
training data before it is evaluated.

Deviations: the optimiser steps over all of p_max, so that momentum and weight decay go on moving entries outside p, whose
gradient is 0. The authors keep statistics of each width while training; those of another width would be of no use here, and
those worked out afterwards fit the weights that are evaluated. With distillation p is drawn below p_max, and the weights of
the terms are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from dfed.blocks.width import inside
from dfed.models import Chain
from dfed.models.layers import KeyedRandom
from dfed.models.recompute import recomputed
from dfed.plan import Phase, Plan
from dfed.region import Region
from dfed.strategies.base import Problem
from dfed.strategies.heterofl import Samples
from dfed.strategies.width import RATES, Rates, WidthStrategy

__all__ = ["Fjord"]


class Fjord(WidthStrategy):
    """Each step trains a width drawn from those the client can hold, nested in one model (Horváth et al. 2021).

    Args:
        rates: Widths in P.
        distillation: α, the weight of what smaller widths learn from the client's largest; null: none.
        statistics_samples: Training samples from which the norms' statistics are worked out before evaluation; 0: all.
    """

    def __init__(self, problem: Problem, *, rates: Rates = RATES,
                 distillation: Annotated[float, Field(ge=0, le=1)] | None = None,
                 statistics_samples: Samples = 10_000):
        super().__init__(problem, rates, scaler=False, statistics=False, statistics_samples=statistics_samples)
        self.distillation = distillation

    def training_key(self) -> list[Any]:
        return ["fjord", self.rates, self.distillation]

    def num_draws(self, plan: Plan) -> int:
        narrower = sum(rate < plan.options.get("rate", 1.0) for rate in self.rates)
        return narrower + 1 if self.distillation is None else max(1, narrower)

    def build(self, plan: Plan) -> nn.Module:
        model, outer = super().build(plan), self.sub_model(plan)
        narrower = [self.sub_model(self.plan_at(rate)) for rate in reversed(self.rates) if rate < plan.options.get("rate", 1.0)]
        # No modules of the model: they have no tensors of their own.
        model.narrower = [(inner.chain.skeleton(), inside(inner, outer)) for inner in narrower]  # type: ignore[assignment]
        return model

    def receive(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> None:
        generator = next((layer.generator for layer in model.modules() if isinstance(layer, KeyedRandom)), None)
        for inner, _ in model.narrower:  # type: ignore[union-attr]
            inner.set_generator(generator)
            inner.train()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        narrower: list[tuple[Chain, dict[str, Region]]] = model.narrower  # type: ignore[assignment]
        if self.distillation is None:
            drawn = model.draw(len(narrower) + 1)  # type: ignore[operator]
            scores = model(x) if drawn == len(narrower) else _through(model, *narrower[drawn], x)  # type: ignore[arg-type]
            return F.cross_entropy(_float(scores), y)
        teacher = _float(model(x))
        loss = F.cross_entropy(teacher, y)
        if not narrower:
            return loss
        drawn = model.draw(len(narrower))  # type: ignore[operator]
        student = _float(_through(model, *narrower[drawn], x))  # type: ignore[arg-type]
        taught = F.kl_div(student.log_softmax(1), teacher.detach().softmax(1), reduction="batchmean")
        return loss + self.distillation * taught + (1 - self.distillation) * F.cross_entropy(student, y)


def _float(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype == torch.bfloat16 else scores


class _Bound(nn.Module):
    """A unit without values, and the values that it is to have."""

    def __init__(self, unit: nn.Module, values: dict[str, Tensor]):
        super().__init__()
        self.unit = unit
        self._values = values

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.unit, self._values, (x,))


def _through(model: Chain, inner: Chain, regions: Mapping[str, Region], x: Tensor) -> Tensor:
    """The narrower chain ``inner`` with the values that ``model`` has there; gradients go to the model's own tensors."""
    values: dict[str, dict[str, Tensor]] = {name: {} for name in inner.unit_names}
    for name, tensor in model.state_dict(keep_vars=True).items():
        unit, _, rest = name.partition(".")
        values[unit][rest] = regions[name].view(tensor) if name in regions else tensor
    for number, name in enumerate(inner.unit_names):
        unit = _Bound(inner.unit(name), values[name])
        keeps = model.recompute and number < len(inner) - 1
        x = recomputed(unit, x) if keeps else unit(x)
    return x
