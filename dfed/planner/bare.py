"""Costs of a chain by itself, outside any method: all that asks for a gradient is trained, and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from dfed.blocks import Splitting
from dfed.client import ClientSettings, Forms
from dfed.models import Chain
from dfed.plan import Plan
from dfed.planner.costs import Costs
from dfed.planner.store import Store
from dfed.state import ServerState
from dfed.strategies import Candidate, Problem, Strategy

__all__ = ["chain_costs"]


class _Bare(Strategy):
    """Trains the problem's chain as it is."""

    def plan(self, state: ServerState, candidate: Candidate) -> Plan:
        return self.plan_of(candidate.client)

    def plan_of(self, client: int) -> Plan:
        """Training of every unit in which something asks for a gradient."""
        chain, names = self.problem.chain, self.problem.splitting.names
        trained = tuple(name for name in names if any(p.requires_grad for p in chain.unit(name).parameters()))
        return Plan(client=client, hold=names, train=trained, phases=self.problem.phases)

    def build(self, plan: Plan) -> nn.Module:
        return self.problem.chain.skeleton()


def chain_costs(chain: Chain, settings: ClientSettings, device: torch.device, store: Store | None = None, *,
                by_prediction: bool = False) -> tuple[Costs, Plan]:
    """Costs of training ``chain`` with cross-entropy, and the plan of doing so as ``settings`` say.

    Args:
        chain: On any device; its parameters' ``requires_grad`` say what is trained.
        by_prediction: As for :class:`Costs`.
    """
    splitting = Splitting.by_unit(chain.unit_names)
    problem = Problem(chain=chain, splitting=splitting, phases=settings.phases, num_clients=1, seed=0)
    strategy = _Bare(problem)
    shapes = {name: tuple(tensor.shape) for name, tensor in chain.state_dict().items() if tensor.is_floating_point()}
    costs = Costs(strategy, settings, Forms(strategy, splitting, shapes), device, store=store, identity="bare",
                  by_prediction=by_prediction)
    return costs, strategy.plan_of(0)
