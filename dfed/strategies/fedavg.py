"""Federated averaging.

Source: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017 (arXiv 1602.05629), algorithm 1.

Symbols: cohort S_t of m clients (``cohort``), E local epochs (``client.epochs``), minibatch B (``client.batch_size``),
learning rate η (``client.learning_rate``), n_k samples of client k. w_{t+1} = Σ_k n_k / Σ_j n_j · w^k_{t+1}.

Deviation: none. A client whose memory does not hold the full training fails; that is the point of the cap.
"""

from __future__ import annotations

from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Strategy

__all__ = ["FedAvg"]


class FedAvg(Strategy):
    """Federated averaging: everyone trains the full model; sample-weighted mean (McMahan et al. 2017)."""

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        return self.full_plan(candidate.client)
