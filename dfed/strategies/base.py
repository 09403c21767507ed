"""What a strategy is: one method of federated training, in one class.

State goes in, state comes out; nothing on a strategy changes after construction, so one object serves every rank, round
and client. The defaults are plain federated averaging; :meth:`Strategy.plan` alone must be written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfed.blocks import Splitting
from dfed.plan import Phase, Plan
from dfed.region import WHOLE, Region
from dfed.state import ServerState
from dfed.strategies.problem import Candidate, PlannerView, Problem

__all__ = ["PASS", "Candidate", "Feed", "PlannerView", "Problem", "Strategy"]

PASS = "pass"
"""The objective of a phase that trains nothing: it passes the client's samples once through the units of its :class:`Feed`."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Features that a client trains on in the place of its samples: what frozen units make of these, in evaluation mode.

    They lie in a file in the client's home, outside of its memory, and are read row by row. A phase with the objective
    :data:`PASS` makes them.

    Attributes:
        shape, source_shape: Of one sample's features, and of what they are made of.
        version: The round from which on its features have been these; the file is called after it.
        units: Of the chain, in order: those that ``source`` passes to become the features.
        source: The version of the features that they are made of; None: they are made of the samples themselves.
    """

    shape: tuple[int, ...]
    version: int
    units: tuple[str, ...] = ()
    source_shape: tuple[int, ...] = ()
    source: int | None = None


class Strategy(ABC):
    """One method of federated training.

    Subclasses take their settings as keyword-only parameters of ``__init__``, after ``problem``.

    Args:
        extras: Modules that the method has beside the chain, such as classifiers on the way, by name; on the meta device. Their
            tensors are called ``<name>.<rest>``, belong to the global model, and each module is a block of its own.

    Attributes:
        keeps_state: Whether its clients remember tensors from one turn to the next; see :meth:`remember`.
        heeds_evaluation: If evaluations decide what it does next (see :meth:`judged`): after how many rounds the next one must
            come at the latest. Needs ``metrics.split: validation``. None: they do not.
        statistics_samples: Training samples from which the running statistics of norms are worked out anew before each
            evaluation, for methods whose clients keep none; None: they are what the clients sent; 0: from all samples.
        splitting: The problem's blocks, and those of ``extras``.
    """

    keeps_state = False
    heeds_evaluation: int | None = None
    statistics_samples: int | None = None

    def __init__(self, problem: Problem, extras: Mapping[str, nn.Module] | None = None):
        self.problem = problem
        self.extras: Mapping[str, nn.Module] = dict(extras or {})
        own = {name: (name,) for name in self.extras}
        self.splitting = Splitting({**problem.splitting.blocks, **own}) if own else problem.splitting

    def init(self, params: Mapping[str, Tensor]) -> ServerState:
        """The server's state before the first round. ``params``: the initial global model, float32, by name."""
        return ServerState(round_index=0, params=params)

    @abstractmethod
    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        """What this client would do in this round; None: it cannot take part."""

    def sent(self, state: ServerState, name: str, codec: str) -> Tensor:
        """What goes down in the next round for the global tensor ``name``, to the clients whose plans have it in ``codec``.

        float32, of the tensor's shape; by default its value.
        """
        return state.params[name]

    def region(self, name: str, shape: tuple[int, ...], plan: Plan) -> Region:
        """The part of the global tensor ``name`` (of shape ``shape``) that the plan's client holds."""
        return WHOLE

    def build(self, plan: Plan) -> nn.Module:
        """The sub-model of this plan, without storage (meta device); its tensors bear the global names.

        A pure function of the plan. The caller gives it storage, and the values that came down. The default is the full
        model, in which blocks that are not trained ask for no gradient.
        """
        splitting = self.problem.splitting
        assert set(plan.hold) >= set(splitting.names), "a strategy whose clients do not hold all blocks must write `build`"
        chain = self.problem.chain.skeleton()
        for name, parameter in chain.named_parameters():
            parameter.requires_grad_(splitting.block_of(name) in plan.train)
        return chain

    def feed(self, plan: Plan) -> Feed | None:
        """What the plan's client trains on in the place of its samples; None: its samples.

        A strategy that says something needs ``keeps_state``. Of a client's files the newest is sure to be there that is not of
        a version after the last round that the client completed.
        """
        return None

    def feature_values(self, state: ServerState) -> int:
        """The most values that features of one sample may come to from here on, those counted that are there and still used.

        The older ones go when checkpoints need them no more: count on it that all of a run are there together.
        """
        return 0

    def receive(self, model: nn.Module, client_state: MutableMapping[str, Tensor], plan: Plan) -> None:
        """Called under the client's cap when the model holds its values, before training. May prepare ``model``.

        Args:
            client_state: What :meth:`remember` gave the last time that this client completed a round, on the CPU; empty
                before, and where ``keeps_state`` is false. Without what bears the name of a global tensor that the plan does
                not hold, or ``<anything>/`` and the name of one that it does not send, which are kept as they are. It counts
                against the client's memory until the client is done; what is taken out of it does not.
        """
        return None

    def remember(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> Mapping[str, Tensor]:
        """What the client keeps for its next turn, float32 by name. Called under its cap after training, if ``keeps_state``.

        Parameters still have the gradients of the last step. What is sent is taken from the model afterwards, and may be
        prepared here. A client that fails in the round keeps what it had. Arguments as for :meth:`receive`.
        """
        return client_state

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        """Loss (a scalar) of one mini-batch: ``x`` float32 ``(b, …)``, ``y`` int64 ``(b,)``."""
        assert phase.objective == "cross_entropy", f"a strategy with the objective '{phase.objective}' must write `loss`"
        scores = model(x)
        return F.cross_entropy(scores.float() if scores.dtype == torch.bfloat16 else scores, y)  # float32 under autocast too

    def upload(self, name: str, value: Tensor, region: Region, plan: Plan) -> Tensor | None:
        """What goes up for a tensor that the client holds: by default its value if its block is trained, else None."""
        return value if self.splitting.block_of(name) in plan.train else None

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        """The state with which the next round starts. ``new`` holds the aggregated model; its round index is set.

        Args:
            metrics: The round's line; ``senders``: of each block that came up, how many clients sent it; and
                ``sender_weights``: how many samples these have.
        """
        return new

    def with_old_votes(self, old: ServerState, new: ServerState, held: Mapping[str, float], everybody: float) -> ServerState:
        """``new``, in which who did not send a block votes for its old value: w ← ρ · w + (1 − ρ) · w_old.

        Args:
            held: Of each block, how many votes those have who sent it; blocks of which none came are left alone.
            everybody: How many votes there are, so that ρ = held / everybody.
        """
        params = dict(new.params)
        for name, value in new.params.items():
            votes = held.get(self.splitting.block_of(name), 0)
            if 0 < votes < everybody:
                params[name] = old.params[name].lerp(value, votes / everybody)
        return replace(new, params=params)

    def judged(self, state: ServerState, loss: float) -> ServerState:
        """The state with which the next round starts, now that the global model was evaluated on validation data.

        Called after every round divisible by ``metrics.every``, if ``heeds_evaluation`` is set. May change the model, which is
        then evaluated again.

        Args:
            loss: Mean cross-entropy; NaN or infinite where the model is lost.
        """
        return state

    @property
    def parts(self) -> tuple[Strategy, ...]:
        """The strategy, and what it is wrapped around."""
        return (self,)

    def training_key(self) -> list[Any] | None:
        """JSON values on which, together with the plan, the memory and arithmetic of a client's training depend.

        Strategies with the same key share predictions. None: on the strategy's name and options, the fleet's size, the seed.
        """
        return None

    def num_draws(self, plan: Plan) -> int:
        """Of how many equally likely courses each training step takes one, which ``model.draw(n)`` draws in :meth:`loss`.

        ``draw`` is set on the model; it returns 0 … n − 1, keyed by seed, round and client. Memory is predicted for n − 2 and
        n − 1, one of which must be the course that needs most.
        """
        return 1

    def note(self, state: ServerState) -> Mapping[str, Any]:
        """What the round's line of metrics says of the strategy (``strategy``), after :meth:`advance`; JSON values."""
        return {}

    def evaluated(self, state: ServerState) -> Plan:
        """The plan whose sub-model, in evaluation mode, is the global model after ``state``: by default all of the chain."""
        return self.full_plan()

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        """Further sub-models to evaluate at the end of a run, such as each width or depth, by name."""
        return {}

    def variant_of(self, plan: Plan) -> str | None:
        """Which of :meth:`variants` a device with this plan would use after the run; None: the global model."""
        return None

    def full_plan(self, client: int = 0) -> Plan:
        """The plan that holds and trains every block of the chain: full training as configured."""
        names = self.problem.splitting.names
        return Plan(client=client, hold=names, train=names, phases=self.problem.phases)
