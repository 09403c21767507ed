"""What a strategy is: one method of federated training, in one class.

State goes in, state comes out; nothing on a strategy changes after construction, so one object serves every rank, round
and client. The defaults are plain federated averaging; :meth:`Strategy.plan` alone must be written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfed.blocks import Splitting
from dfed.fleet import Cost, DeviceProfile
from dfed.models import Chain
from dfed.plan import Phase, Plan
from dfed.region import WHOLE, Region
from dfed.state import ServerState

__all__ = ["Candidate", "PlannerView", "Problem", "Strategy"]


class PlannerView(Protocol):
    """What a strategy may ask of the planner about one client; see :class:`dfed.planner.ClientPlanner`."""

    def fits(self, plan: Plan, *, time_s: float | None = None, upload_bytes: float | None = None) -> bool:
        """Whether the client can carry the plan out."""

    def best(self, plans: Iterable[Plan], *, time_s: float | None = None, upload_bytes: float | None = None) -> Plan | None:
        """The first of ``plans``, which stand in order of preference, that fits."""

    def largest_batch(self, plan: Plan, at_most: int, *, time_s: float | None = None) -> Plan | None:
        """The plan with the largest batch size that fits."""

    def cost(self, plan: Plan) -> Cost:
        """Simulated seconds and joules of a round with this plan."""


@dataclass(frozen=True)
class Candidate:
    """A client that might take part in a round, as a strategy sees it.

    Attributes:
        planner: What plans would cost this client, and which it can carry out. Plans that ran out of memory on a budget
            like its own do not fit.
    """

    client: int
    round_index: int
    num_samples: int
    profile: DeviceProfile
    planner: PlannerView


@dataclass(frozen=True)
class Problem:
    """What a strategy works on. The same on every rank.

    Attributes:
        chain: The full model, without storage (meta device).
        splitting: The chain's blocks.
        phases: Local training as configured.
        num_clients: Size of the fleet.
        seed: The run's seed.
    """

    chain: Chain
    splitting: Splitting
    phases: tuple[Phase, ...]
    num_clients: int
    seed: int


class Strategy(ABC):
    """One method of federated training.

    Subclasses take their settings as keyword-only parameters of ``__init__``, after ``problem``.

    Attributes:
        keeps_state: Whether its clients remember tensors from one turn to the next; see :meth:`remember`.
    """

    keeps_state = False

    def __init__(self, problem: Problem):
        self.problem = problem

    def init(self, params: Mapping[str, Tensor]) -> ServerState:
        """The server's state before the first round. ``params``: the initial global model, float32, by name."""
        return ServerState(round_index=0, params=params)

    @abstractmethod
    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        """What this client would do in this round; None: it cannot take part."""

    def region(self, name: str, shape: tuple[int, ...], plan: Plan) -> Region:
        """The part of the global tensor ``name`` (of shape ``shape``) that the plan's client holds."""
        return WHOLE

    def build(self, plan: Plan) -> nn.Module:
        """The sub-model of this plan, without storage (meta device); its tensors bear the global names.

        A pure function of the plan. The caller gives it storage, and the values that came down. The default is the full
        model, in which blocks that are not trained ask for no gradient.
        """
        splitting = self.problem.splitting
        assert set(plan.hold) == set(splitting.names), "a strategy whose clients do not hold all blocks must write `build`"
        chain = self.problem.chain.skeleton()
        for name, parameter in chain.named_parameters():
            parameter.requires_grad_(splitting.block_of(name) in plan.train)
        return chain

    def receive(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> None:
        """Called under the client's cap when the model holds its values, before training. May prepare ``model``.

        Args:
            client_state: What :meth:`remember` gave the last time that this client completed a round, on the CPU; empty
                before, and where ``keeps_state`` is false.
        """
        return None

    def remember(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> Mapping[str, Tensor]:
        """What the client keeps for its next turn, float32 by name. Called under its cap after training, if ``keeps_state``.

        A client that fails in the round keeps what it had. Arguments as for :meth:`receive`.
        """
        return client_state

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        """Loss (a scalar) of one mini-batch: ``x`` float32 ``(b, …)``, ``y`` int64 ``(b,)``."""
        assert phase.objective == "cross_entropy", f"a strategy with the objective '{phase.objective}' must write `loss`"
        scores = model(x)
        return F.cross_entropy(scores.float() if scores.dtype == torch.bfloat16 else scores, y)  # float32 under autocast too

    def upload(self, name: str, value: Tensor, region: Region, plan: Plan) -> Tensor | None:
        """What goes up for a tensor that the client holds: by default its value if its block is trained, else None."""
        return value if self.problem.splitting.block_of(name) in plan.train else None

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        """The state with which the next round starts. ``new`` holds the aggregated model; its round index is set."""
        return new

    def whole_plan(self, candidate: Candidate) -> Plan:
        """The plan that holds and trains every block: full training as configured."""
        names = self.problem.splitting.names
        return Plan(client=candidate.client, hold=names, train=names, phases=self.problem.phases)
