"""SCAFFOLD: control variates against the drift of clients.

Source: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020 (arXiv 1910.06378), algorithm 1.

Symbols: global model x, the client's y_i; control variates c (the server's) and c_i (the client's), zero at first; gradient
g_i(y) of a mini-batch; K local steps; S of N clients take part. Each local step follows g_i(y) − c_i + c. Afterwards

    c_i⁺ = (1/K) · Σ g_i(y_i) over the steps taken,   c ← c + |S|/N · mean over S of (c_i⁺ − c_i).

That is the paper's option II: for plain SGD it equals c_i − c + (x − y_i) / (K · η_l), and unlike that it is right with
momentum too. Weight decay is no part of it. ``server.optimizer`` has the paper's η_g.

The server's c are buffers called ``control.<parameter>`` and are a block of their own: down and up a round carries about twice
what plain training's does. c_i is what a client remembers. It sends c + c_i⁺ − c_i, so that the mean over the senders, moved by
|S|/N, is the new c.

Deviations: means are weighted by samples, as everywhere in dfed. While it trains, a client holds c − c_i and the mean of its
gradients, two models' worth besides plain training's.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dfed.blocks import check_names
from dfed.models import Chain
from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["Scaffold"]

_CONTROL = "control"


class Scaffold(Strategy):
    """FedAvg with control variates, which correct each local step for the client's drift (Karimireddy et al. 2020)."""

    keeps_state = True

    def __init__(self, problem: Problem):
        check_names(problem.chain, [_CONTROL])
        super().__init__(problem, {_CONTROL: _Control.of(problem.chain)})

    def training_key(self) -> list[Any]:
        return ["scaffold"]

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        names = (*self.problem.splitting.names, _CONTROL)
        return Plan(client=candidate.client, hold=names, train=names, phases=self.problem.phases)

    def build(self, plan: Plan) -> nn.Module:
        model = super().build(plan)
        if _CONTROL in plan.hold:
            model.add_module(_CONTROL, _Control.of(self.problem.chain))
        return model

    def receive(self, model: nn.Module, client_state: MutableMapping[str, Tensor], plan: Plan) -> None:
        controls = dict(model.get_submodule(_CONTROL).named_buffers())
        means = {}
        for name, parameter in model.named_parameters():
            correction, own = controls[name], client_state.pop(f"{_CONTROL}.{name}", None)
            if own is not None:
                correction.sub_(own.to(correction.device))
            means[name] = torch.zeros_like(parameter, requires_grad=False)
            parameter.register_post_accumulate_grad_hook(_Corrected(correction, means[name]))
        model.gradient_means = means  # type: ignore[assignment]

    def remember(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> Mapping[str, Tensor]:
        means: Mapping[str, Tensor] = model.gradient_means  # type: ignore[assignment]
        for name, correction in model.get_submodule(_CONTROL).named_buffers():
            correction.add_(means[name])  # c − c_i + c_i⁺, which goes up
        return {f"{_CONTROL}.{name}": mean for name, mean in means.items()}

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        share = metrics["senders"].get(_CONTROL, 0) / self.problem.num_clients
        moved = {name: old.params[name].lerp(value, share) for name, value in new.params.items()
                 if name.startswith(f"{_CONTROL}.")}
        return replace(new, params={**new.params, **moved})


class _Corrected:
    """Hook of a parameter that has its gradient: takes it into the mean over the steps, and corrects it in place.

    Args:
        correction: c − c_i.
        mean: Of the gradients so far.
    """

    def __init__(self, correction: Tensor, mean: Tensor):
        self._correction, self._mean, self._steps = correction, mean, 0

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None, "it was just accumulated"
        self._steps += 1
        self._mean.lerp_(parameter.grad, 1 / self._steps)
        parameter.grad.add_(self._correction)


class _Control(nn.Module):
    """A control variate: a buffer for each parameter of a chain, of the same name and shape."""

    @classmethod
    def of(cls, chain: Chain) -> _Control:
        """Without storage (meta device)."""
        root = cls()
        for name, parameter in chain.named_parameters():
            *path, leaf = name.split(".")
            place: nn.Module = root
            for part in path:
                if part not in place._modules:
                    place.add_module(part, cls())
                place = place.get_submodule(part)
            place.register_buffer(leaf, torch.empty(parameter.shape, device="meta"))
        return root

    def keyed_init(self, generator: torch.Generator) -> None:
        """Zero."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
