"""What the methods on width share: each client trains a narrower copy of the model, as wide as its memory allows."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from dfed.blocks.narrowing import Picker
from dfed.blocks.width import SubModel, narrow, prefix, scale_activations
from dfed.plan import Plan
from dfed.region import Region
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["RATES", "Rates", "WidthStrategy", "rate_name"]

RATES = [1.0, 0.5, 0.25, 0.125, 0.0625]
"""The widths of HeteroFL (Diao et al. 2021): each half of the one before."""

Rates = Annotated[list[Annotated[float, Field(ge=0.001, le=1)]], Field(min_length=1)]
"""Widths as shares of the full model's."""

_KEPT_SUB_MODELS = 64


class WidthStrategy(Strategy):
    """Base of the methods whose clients train sub-models of some of the channels.

    A plan says the ``rate`` in its options, and in its details whatever else decides the channels; see :meth:`picker`.

    Args:
        rates: Widths that a client may get; the widest that fits is taken.
        scaler: Whether outputs of layers are divided by the rate in training (HeteroFL's Scaler).
        statistics: Whether clients send the norms' running statistics. If not, they keep none, and those of the global model
            are worked out anew, from ``statistics_samples`` training samples, before each evaluation.

    Raises:
        ConfigError: If a layer of the model cannot be narrowed; names it.
    """

    def __init__(self, problem: Problem, rates: list[float], *, scaler: bool, statistics: bool,
                 statistics_samples: int | None = None):
        super().__init__(problem)
        self.rates = sorted(set(rates), reverse=True)
        self.scaler, self.sends_statistics = scaler, statistics
        if not statistics:
            self.statistics_samples = statistics_samples or 0
        self._parameters = frozenset(name for name, _ in problem.chain.named_parameters())
        self._sub_models = functools.lru_cache(_KEPT_SUB_MODELS)(self._make)
        for rate in (rate for rate in self.rates if rate < 1):  # what cannot be narrowed is said before anything else is done
            for details in self.examples():
                narrow(problem.chain, rate, self.picker(rate, details))

    def training_key(self) -> list[Any]:
        return ["width", self.scaler]

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        plans = (self.plan_at(rate, candidate.client, self.details(rate, state, candidate)) for rate in self.rates)
        return candidate.planner.best(plans)

    def plan_at(self, rate: float, client: int = 0, details: Mapping[str, Any] | None = None) -> Plan:
        """Training of the sub-model of this rate."""
        names = self.problem.splitting.names
        return Plan(client=client, hold=names, train=names, phases=self.problem.phases, options={"rate": rate},
                    details=details or {})

    def details(self, rate: float, state: ServerState, candidate: Candidate) -> Mapping[str, Any]:
        """What else decides the channels of this client in this round; JSON values."""
        return {}

    def examples(self) -> list[Mapping[str, Any]]:
        """Details of each kind that :meth:`details` may give."""
        return [{}]

    def picker(self, rate: float, details: Mapping[str, Any]) -> Picker:
        """Which channels a sub-model keeps. Without details: any choice."""
        return prefix

    def sub_model(self, plan: Plan) -> SubModel:
        """The plan's sub-model; shared, and not to be changed."""
        return self._sub_models(plan.options.get("rate", 1.0), json.dumps(dict(plan.details), sort_keys=True))

    def _make(self, rate: float, details: str) -> SubModel:
        known = json.loads(details)
        classes = np.array(known["classes"]) if "classes" in known else None
        return narrow(self.problem.chain, rate, self.picker(rate, known), classes=classes)

    def region(self, name: str, shape: tuple[int, ...], plan: Plan) -> Region:
        return self.sub_model(plan).regions[name]

    def build(self, plan: Plan) -> nn.Module:
        chain = self.sub_model(plan).chain.skeleton()
        if self.scaler:
            scale_activations(chain, plan.options.get("rate", 1.0))
        return chain

    def upload(self, name: str, value: Tensor, region: Region, plan: Plan) -> Tensor | None:
        return value if self.sends_statistics or name in self._parameters else None

    def evaluated(self, state: ServerState) -> Plan:
        return self.plan_at(self.rates[0])

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return {rate_name(rate): self.plan_at(rate) for rate in self.rates}

    def variant_of(self, plan: Plan) -> str | None:
        return rate_name(plan.options.get("rate", 1.0))


def rate_name(rate: float) -> str:
    """What the sub-model of this rate is called in results."""
    return f"width {rate:g}"
