"""Federated averaging with a proximal term.

Source: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020
(arXiv 1812.06127), algorithm 2.

Symbols: μ (``mu``), global model w^t. Local objective: F_k(w) + μ/2 · ‖w − w^t‖², over parameters (not norm statistics).

Deviations: local work is fixed by ``client.epochs`` instead of the paper's γ-inexact solutions. The copy of w^t that the
term needs is held under the client's cap, as on a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from dfed.plan import Phase, Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["FedProx"]


class FedProx(Strategy):
    """FedAvg with μ/2·‖w − w_global‖² added to each client's loss (Li et al. 2020)."""

    def __init__(self, problem: Problem, *, mu: Annotated[float, Field(ge=0)] = 0.01):
        super().__init__(problem)
        self.mu = mu

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        return self.full_plan(candidate.client)

    def receive(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> None:
        model.anchor = [parameter.detach().clone() for parameter in model.parameters()]  # type: ignore[assignment]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        loss = super().loss(model, x, y, phase)
        for parameter, anchor in zip(model.parameters(), model.anchor, strict=True):  # type: ignore[arg-type]
            loss = loss + self.mu / 2 * (parameter - anchor).square().sum()
        return loss
