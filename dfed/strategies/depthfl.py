"""DepthFL: clients train prefixes of the model, with a classifier at every depth, which learn from each other.

Source: Kim, Yu, Kim, Moon, "DepthFL: Depthwise Federated Learning for Heterogeneous Clients", ICLR 2023. The regulariser is
that of FedDyn: Acar, Zhao, Matas, Mattina, Whatmough, Saligrama, "Federated Learning Based on Dynamic Regularization", ICLR
2021 (arXiv 2111.04263), algorithm 1.

Symbols: client k trains the d_k first depths, as deep as fits, and the classifiers at depths 1 … d_k. With p_i the
probabilities at depth i (temperature 1), F_k = Σ_i CE_i + w(r) · Σ_i Σ_{j≠i} KL(p_j ‖ p_i) / (d_k − 1), where p_j is taken
as given, and w(r) = exp(−5 (1 − min(r, T)/T)²) after r rounds, T = 300 (``ramp_rounds``). FedDyn, α (``alpha``): a client
minimises F_k(θ) − ⟨∇L_k, θ⟩ + α/2 ‖θ − θ^t‖² over parameters (not norm statistics), then ∇L_k ← ∇L_k − α (θ_k − θ^t); the
server, of m clients in all (``fleet.clients``), h ← h − α/m · Σ_k (θ_k − θ^t) and θ ← mean_k θ_k − h/α, each tensor over
the clients of the round that hold it. The model is evaluated by the mean of the scores of all depths.

Deviations: the means are weighted by samples, and Σ_k (θ_k − θ^t) is taken as the number of holders times what the mean
moved (for clients of equal size the same). With a server optimiser other than plain ``sgd``, its result stands for the
mean. Depths end where :func:`dfed.blocks.cut_points` says. The authors write classifiers with bottlenecks by hand, for one
residual network; here a classifier is what :func:`dfed.blocks.classifier` makes, or with ``exits: bottleneck``, closer to
theirs, what :func:`dfed.blocks.output_module` makes: a light layer for each depth that is missing, then the model's own head.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dfed.blocks import ExitChain, check_names, classifier, cut_points, output_module
from dfed.models import Chain
from dfed.models.layers import Count
from dfed.plan import Phase, Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["DepthFL"]


class DepthFL(Strategy):
    """Each client trains as deep a prefix as fits, a classifier at every depth (Kim et al. 2023).

    Args:
        depths: How many prefixes there are, the full model included.
        cuts: The last unit of each prefix but the last, instead; null: see :func:`dfed.blocks.cut_points`.
        alpha: α of FedDyn; 0: without.
        ramp_rounds: T, rounds after which depths learn from each other in full.
        exits: The classifiers on the way: ``linear``: an average over the image and a linear layer; ``bottleneck``: one 3 × 3
            convolution (or what there is for tokens and vectors) for each depth that is missing, then a copy of the head.
    """

    def __init__(self, problem: Problem, *, depths: Count = 4, cuts: list[str] | None = None,
                 alpha: Annotated[float, Field(ge=0)] = 0.1, ramp_rounds: Count = 300,
                 exits: Literal["linear", "bottleneck"] = "linear"):
        self.stops = cut_points(problem.chain, depths, cuts)
        make = {"linear": classifier, "bottleneck": functools.partial(_bottleneck, stops=self.stops)}[exits]
        extras = {f"exit{depth}": make(problem.chain, stop) for depth, stop in enumerate(self.stops[:-1], start=1)}
        check_names(problem.chain, extras)
        super().__init__(problem, extras)
        self.alpha, self.ramp_rounds, self.exits = alpha, ramp_rounds, exits
        self.keeps_state = alpha > 0
        self._parameters = frozenset(self._parameter_names())

    def _parameter_names(self) -> list[str]:
        own = [f"{name}.{rest}" for name, module in self.extras.items() for rest, _ in module.named_parameters()]
        return [*(name for name, _ in self.problem.chain.named_parameters()), *own]

    def training_key(self) -> list[Any]:
        return ["depthfl", list(self.stops), self.alpha > 0, self.exits]

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        progress = min(candidate.round_index, self.ramp_rounds) / self.ramp_rounds
        details = {"consistency": math.exp(-5 * (1 - progress) ** 2)}
        deepest_first = range(len(self.stops), 0, -1)
        return candidate.planner.best(self.plan_at(depth, candidate.client, details) for depth in deepest_first)

    def plan_at(self, depth: int, client: int = 0, details: Mapping[str, Any] | None = None, *, alone: bool = False) -> Plan:
        """Training of the first ``depth`` depths, with the classifiers of all; ``alone``: with that of the last only."""
        exits = range(depth if alone else 1, min(depth + 1, len(self.stops)))
        hold = (*self.problem.chain.unit_names[: self.stops[depth - 1]], *(f"exit{number}" for number in exits))
        return Plan(client=client, hold=hold, train=hold, phases=self.problem.phases, options={"depth": depth, "alone": alone},
                    details=details or {})

    def build(self, plan: Plan) -> ExitChain:
        depth = plan.options["depth"]
        exits = [(name, self.stops[int(name.removeprefix("exit")) - 1], self.extras[name])
                 for name in plan.hold if name in self.extras]
        return ExitChain(self.problem.chain, self.stops[depth - 1], exits)

    def receive(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> None:
        model.consistency = plan.details.get("consistency", 1.0)  # type: ignore[assignment]
        if self.alpha:
            model.anchors = {name: p.detach().clone() for name, p in model.named_parameters()}  # type: ignore[assignment]
            model.gradients = {  # type: ignore[assignment]
                name: client_state[name].to(p.device) if name in client_state else torch.zeros_like(p)
                for name, p in model.named_parameters()
            }

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        scores = [each.float() if each.dtype == torch.bfloat16 else each for each in model(x)]
        loss = torch.stack([F.cross_entropy(each, y) for each in scores]).sum()
        if len(scores) > 1:
            loss = loss + model.consistency / (len(scores) - 1) * _disagreement(scores)  # type: ignore[operator]
        if self.alpha:
            for name, parameter in model.named_parameters():
                gradient, anchor = model.gradients[name], model.anchors[name]  # type: ignore[index]
                loss = loss - (gradient * parameter).sum() + self.alpha / 2 * (parameter - anchor).square().sum()
        return loss

    def remember(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> Mapping[str, Tensor]:
        gradients, anchors = model.gradients, model.anchors
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # in place: there may be no room for a copy
                gradients[name].add_(anchors[name].sub_(parameter), alpha=self.alpha)  # type: ignore[index]
        return {**client_state, **gradients}  # type: ignore[dict-item]

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        reached = [depth for depth in range(1, len(self.stops) + 1) if metrics["senders"].get(self._last_block(depth))]
        new = replace(new, facts={**new.facts, "deepest": max([*reached, old.facts.get("deepest", 0)])})
        if not self.alpha:
            return new
        params, tensors = dict(new.params), dict(new.tensors)
        for name in (name for name in new.params if name in self._parameters):
            holders = metrics["senders"].get(self.splitting.block_of(name), 0)
            if holders:
                share = self.alpha * holders / self.problem.num_clients
                h = tensors.get(name, torch.zeros_like(params[name])) - share * (params[name] - old.params[name])
                tensors[name], params[name] = h, params[name] - h / self.alpha
        return replace(new, params=params, tensors=tensors)

    def _last_block(self, depth: int) -> str:
        """The block that clients of this depth and deeper ones train, and no others."""
        return f"exit{depth}" if depth < len(self.stops) else self.problem.chain.unit_names[-1]

    def evaluated(self, state: ServerState) -> Plan:
        return self.plan_at(state.facts.get("deepest") or len(self.stops))

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return {f"exit{depth}": self.plan_at(depth, alone=True) for depth in range(1, len(self.stops) + 1)}

    def variant_of(self, plan: Plan) -> str | None:
        return f"exit{plan.options.get('depth', len(self.stops))}"


def _bottleneck(chain: Chain, stop: int, stops: Sequence[int]) -> nn.Module:
    """The output module behind the first ``stop`` units of a chain, of which depths end with ``stops``."""
    names = chain.unit_names
    later = [names[start:end] for start, end in itertools.pairwise(stops) if start >= stop]
    return output_module(chain, [names[:stop], *later])


def _disagreement(scores: list[Tensor]) -> Tensor:
    """Σ_i Σ_{j≠i} KL(p_j ‖ p_i), mean over the mini-batch; p_j is taken as given. ``scores``: (b, classes) each."""
    log_p = [F.log_softmax(each, dim=1) for each in scores]
    return torch.stack([
        F.kl_div(learner, teacher.detach(), reduction="batchmean", log_target=True)
        for learner in log_p for teacher in log_p if teacher is not learner
    ]).sum()
