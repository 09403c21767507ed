"""Everybody trains the model that the weakest client can hold.

The other lower bound of the literature on memory-limited federated learning, beside ``exclusivefl`` (e.g. Wu et al. 2024,
arXiv 2408.10826, "AllSmall"): nobody is left out, and nobody's memory is used beyond what the smallest one has.

The width is the largest of ``rates`` that fits the smallest budget of the fleet; if none does, the smallest rate, and whoever
cannot hold that is left out. The global model is that sub-model: what lies outside it keeps its first values and is not
evaluated. It is a small model trained by FedAvg: no Scaler, norm statistics are sent and averaged.
"""

from __future__ import annotations

from collections.abc import Mapping

from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem
from dfed.strategies.width import RATES, Rates, WidthStrategy

__all__ = ["AllSmall"]


class AllSmall(WidthStrategy):
    """FedAvg with the widest model that the client with the least memory can train.

    Args:
        rates: Widths that the model may have.
    """

    def __init__(self, problem: Problem, *, rates: Rates = RATES):
        super().__init__(problem, rates, scaler=False, statistics=True)

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        return candidate.planner.best([self.plan_at(self._rate(), candidate.client)])

    def evaluated(self, state: ServerState) -> Plan:
        return self.plan_at(self._rate())

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return {}

    def variant_of(self, plan: Plan) -> str | None:
        return None

    def _rate(self) -> float:
        smallest = self.problem.budgets[0][0] if self.problem.budgets else None
        fitting = (rate for rate in self.rates if self.problem.fits(self.plan_at(rate), smallest))
        return next(fitting, self.rates[-1])
