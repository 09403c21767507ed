"""Federated averaging over the clients that can hold the full training; the others are left out.

The usual lower bound of the literature on memory-limited federated learning (e.g. Wu et al. 2024, arXiv 2408.10826,
"ExclusiveFL"). Eligibility is the planner's: a client whose budget is below the predicted peak, with the grey zone added,
is never chosen.
"""

from __future__ import annotations

from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Strategy

__all__ = ["ExclusiveFL"]


class ExclusiveFL(Strategy):
    """FedAvg over the clients whose memory holds the full training; the others never take part."""

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        return candidate.planner.best([self.full_plan(candidate.client)])
