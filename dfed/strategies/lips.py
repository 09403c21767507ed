"""LIPS: transient sparsity against layer-wise inertia, around any strategy.

Source: Xiao, Wu, Poddubnyy, Mocanu, Nguyen, Pechenizkiy, Mocanu, 2025 (arXiv 2506.00932): its abstract, and how the
authors' release behaves. Its tables and formulas are not known to us.

With little data per client the middle layers of the global model hardly move after the first rounds. Now and then clients
therefore start from a model of which, for a moment, only a part is there; what was dropped grows again in plain training.

Symbols: after t rounds the next one is sparse if t > 0 and t mod F = 0 (``period``). Its density is
d = min(1, d₀ + (1 − d₀) · t/T), with d₀ = ``density`` and T = ``rounds``. Client c starts from M_c ⊙ W̄, where W̄ is the global
model and M_c keeps, of each eligible tensor of n entries, the ⌊d · n⌋ with the largest score: |g_c ⊙ W̄| with the gradient g_c
of the last mini-batch that it took (``gradient``), |W̄| (``magnitude``), −|W̄| (``low``), or one drawn (``random``). Of equal
scores the first entry counts.

Eligible are the matrices of the units between the first that has any and the last: if some of these units hold convolutions, of
those only. Of these a client masks what it trains: what is frozen could not grow again.

Ours: ``masks: shared``: all clients start from one mask, made by the server; a sparse round's download then is sparse on the
wire (values, and a bit for each entry). Its ``gradient`` is the last round's change of the global model; what did not change is
not masked. ``fill: initial``: what is dropped takes its first value instead of 0. ``norms: local``: clients keep norms
(parameters and statistics) for themselves; the server's mean is what newcomers and evaluations take. ``control``: instead of
masking, ``noise`` adds Gaussian noise, and ``shrink`` multiplies by a factor s, each tensor by as much as masking would change
it: ‖noise‖ = ‖W̄ − M ⊙ W̄‖, ‖s · W̄‖ = ‖M ⊙ W̄‖.

Deviations: who has no gradient yet, as it takes part for the first time, starts from W̄. Gradients are as the optimiser took
them, after clipping. T is by default the number of rounds of the run. Terms that hold clients to the global model (FedProx,
NeuLite) hold them to W̄, as it was before masking.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dfed import rng
from dfed.blocks import inner_matrices, norm_tensors, top_mask
from dfed.errors import ConfigError, Fault
from dfed.models import materialise
from dfed.models.layers import Count
from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, PlannerView, Strategy
from dfed.strategies.wrapper import Wrapper

__all__ = ["Lips"]

logger = logging.getLogger(__name__)

_OWN = "lips/"


class Lips(Wrapper):
    """Clients start now and then from a model that is sparse for a moment (Xiao et al. 2025).

    Args:
        density: d₀, the share of entries kept in the first sparse rounds.
        period: F, rounds from one sparse round to the next.
        rounds: T, after how many rounds nothing is masked any more; null: those of the run.
        score: By what entries are kept: ``gradient``, ``magnitude``, ``low`` or ``random``.
        masks: Whether each ``client`` makes its own, or all have one (``shared``).
        fill: What dropped entries become: ``zero``, or their ``initial`` value.
        norms: Whether norms are the ``global`` model's, or each client's own (``local``).
        control: ``noise`` or ``shrink`` in the place of masks; ``none``: masks.
    """

    def __init__(self, inner: Strategy, *, density: Annotated[float, Field(gt=0, le=1)] = 0.5, period: Count = 5,
                 rounds: Count | None = None, score: Literal["gradient", "magnitude", "low", "random"] = "gradient",
                 masks: Literal["client", "shared"] = "client", fill: Literal["zero", "initial"] = "zero",
                 norms: Literal["global", "local"] = "global", control: Literal["none", "noise", "shrink"] = "none"):
        super().__init__(inner)
        self.density, self.period, self.rounds = density, period, rounds or inner.problem.rounds
        self.score, self.masks, self.fill, self.norms, self.control = score, masks, fill, norms, control
        self.eligible = inner_matrices(inner.problem.chain)
        self._blocks = {inner.splitting.block_of(name) for name in self.eligible}
        self._tensors = dict(inner.problem.chain.named_parameters())
        self._norms = norm_tensors(inner.problem.chain) if norms == "local" else frozenset()
        self._keeps_gradient = score == "gradient" and masks == "client"
        self.keeps_state = inner.keeps_state or self._keeps_gradient or bool(self._norms)
        self._check()

    def _check(self) -> None:
        faults = []
        if not self.eligible:
            message = ("must be left out for this model, which has neither a convolution but the first, nor a linear layer "
                       "between the first and the last.")
            faults.append(Fault("wrap.lips", message))
        for name, value, plain in (("fill", self.fill, "zero"), ("control", self.control, "none")):
            if self.masks == "shared" and value != plain:
                message = f"must be '{plain}' with `masks: shared`, where the server sends what is kept, but is '{value}'."
                faults.append(Fault(name, message))
        if self.control != "none" and self.fill != "zero":
            faults.append(Fault("fill", f"must be 'zero' with `control: {self.control}`, which drops nothing, but is "
                                        f"'{self.fill}'."))
        if (self._keeps_gradient or self._norms) and not _holds_whole_tensors(self.inner):
            why = "around a strategy whose clients hold parts of tensors, which differ from turn to turn, but is"
            faults += [Fault("score", f"must be magnitude, low or random {why} 'gradient'.")] * self._keeps_gradient
            faults += [Fault("norms", f"must be 'global' {why} 'local'.")] * bool(self._norms)
        if self._norms and type(self.inner.parts[-1]).feed is not Strategy.feed:
            why = "around a strategy whose clients keep features, which are made with the model's own norms"
            faults.append(Fault("norms", f"must be 'global' {why}, but is 'local'."))
        if faults:
            raise ConfigError(faults)

    def init(self, params: Mapping[str, Tensor]) -> ServerState:
        share = sum(self._tensors[name].numel() for name in self.eligible) / sum(map(Tensor.numel, self._tensors.values()))
        is_sparse = any(self.density_at(done) < 1 for done in range(self.inner.problem.rounds))
        logger.info("lips masks %d tensors with %.1f %% of the parameters, in units %s to %s", len(self.eligible), 100 * share,
                    self.eligible[0].partition(".")[0], self.eligible[-1].partition(".")[0])
        if not is_sparse:
            logger.warning("lips masks nothing in this run, as no round of it is sparse (`wrap.lips.period` %d, `rounds` %d)",
                           self.period, self.inner.problem.rounds)
        return super().init(params)

    def density_at(self, round_index: int) -> float:
        """d of the round that begins when so many are done."""
        if round_index == 0 or round_index % self.period:
            return 1.0
        return min(1.0, self.density + (1 - self.density) * round_index / self.rounds)

    def training_key(self) -> list[Any] | None:
        return None

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        dress = functools.partial(self._dressed, state=state)
        plan = self.inner.plan(state, replace(candidate, planner=_Dressing(candidate.planner, dress)))
        return None if plan is None else dress(plan)

    def _dressed(self, plan: Plan, *, state: ServerState) -> Plan:
        """The plan, with what is different in this round."""
        round_index, density = state.round_index, self.density_at(state.round_index)
        if self.masks == "shared" and density < 1:
            whole = set(plan.train) - {self.splitting.block_of(name) for name in self.eligible
                                       if not (self._goes_up(name, plan) and self._is_scored(name, state))}
            plan = replace(plan, down={**{block: _codec(density) for block in plan.train if block in self._blocks & whole},
                                       **plan.down})
        if self.masks == "shared":
            return plan
        return replace(plan, details={**plan.details, "lips": {"density": density, "round": round_index if density < 1 else 0}})

    def _is_scored(self, name: str, state: ServerState) -> bool:
        """Whether there is something to choose its entries by: with ``gradient``, if it moved in the last round."""
        return self.score != "gradient" or _OWN + name in state.tensors

    def _goes_up(self, name: str, plan: Plan) -> bool:
        """Whether the client trains this tensor of the chain: of a block it may be that only a part is trained."""
        if self.splitting.block_of(name) not in plan.train:
            return False
        value = self._tensors[name]
        return self.inner.upload(name, value, self.inner.region(name, tuple(value.shape), plan), plan) is not None

    def sent(self, state: ServerState, name: str, codec: str) -> Tensor:
        value, density = self.inner.sent(state, name, codec), self.density_at(state.round_index)
        if (self.masks == "client" or density == 1 or name not in self.eligible or codec != _codec(density)
                or not self._is_scored(name, state)):
            return value
        gradient = state.tensors.get(_OWN + name)
        generator = rng.torch_generator(self.problem.seed, "lips", state.round_index, name)
        return _masked(value, self._mask(value, gradient, density, generator), 0.0)

    def build(self, plan: Plan) -> nn.Module:
        if self.fill == "initial":
            _ = self._initial  # now, as this is outside of the client's memory
        return self.inner.build(plan)

    @functools.cached_property
    def _initial(self) -> dict[str, Tensor]:
        """First values of what is eligible, as every device makes them from the seed."""
        first = materialise(self.problem.chain.skeleton(), rng.torch_generator(self.problem.seed, "init")).state_dict()
        return {name: first[name].detach() for name in self.eligible}

    def receive(self, model: nn.Module, client_state: MutableMapping[str, Tensor], plan: Plan) -> None:
        own = {name.removeprefix(_OWN): client_state.pop(name) for name in list(client_state) if name.startswith(_OWN)}
        self.inner.receive(model, client_state, plan)  # first: what it holds on to is the global model
        self._prepare(model, own, plan)

    @torch.no_grad()
    def _prepare(self, model: nn.Module, own: MutableMapping[str, Tensor], plan: Plan) -> None:
        """Let the model's tensors be what the client starts from. ``own``: its gradients and norms; used up."""
        tensors = dict(model.state_dict(keep_vars=True))
        for name in self._norms & own.keys():
            tensors[name].copy_(own.pop(name))
        if self.masks == "shared":
            return
        names = [name for name in self.eligible if name in tensors and tensors[name].requires_grad]
        told = plan.details.get("lips")
        if told is None:  # the plan's memory is predicted: with gradients, in a sparse round
            told = {"density": self.density, "round": 0}
            if self._keeps_gradient:
                own = {name: torch.zeros_like(tensors[name], requires_grad=False) for name in names}
        if told["density"] == 1:
            return
        for name in names:
            value, gradient = tensors[name], own.pop(name, None)
            if self.score == "gradient" and gradient is None:
                continue
            generator = rng.device_generator(value.device, self.problem.seed, "lips", told["round"], plan.client, name)
            mask = self._mask(value, gradient, told["density"], generator)
            value.copy_(self._changed(name, value, mask, generator, plan))

    def _changed(self, name: str, value: Tensor, mask: Tensor, generator: torch.Generator, plan: Plan) -> Tensor:
        """What masking, or the control, makes of the value."""
        if self.control == "none":
            if self.fill == "zero":
                return _masked(value, mask, 0.0)
            if "lips" not in plan.details:  # predicted: the first values would be as large as these
                return _masked(value, mask, torch.empty_like(value))
            first = self._initial[name]
            return _masked(value, mask, self.region(name, tuple(first.shape), plan).view(first).to(value.device))
        kept = _masked(value, mask, 0.0)
        if self.control == "shrink":
            return value * (kept.norm() / value.norm().clamp_min(torch.finfo(value.dtype).tiny))
        noise = torch.empty_like(value).normal_(generator=generator)
        return value + noise * ((value - kept).norm() / noise.norm())

    def _mask(self, value: Tensor, gradient: Tensor | None, density: float, generator: torch.Generator) -> Tensor:
        """Which entries are kept, bool, of the value's shape."""
        if self.score == "gradient" and gradient is not None:
            score = (value * gradient.to(value.device)).abs_()
        elif self.score == "random":
            score = torch.empty_like(value).uniform_(generator=generator)
        else:
            score = value.abs().neg_() if self.score == "low" else value.abs()
        return top_mask(score, min(value.numel(), int(density * value.numel() + 1e-9)))  # whatever the product's rounding

    def remember(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> Mapping[str, Tensor]:
        kept = dict(self.inner.remember(model, client_state, plan)) if self.inner.keeps_state else {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if self._keeps_gradient and name in self.eligible and tensor.grad is not None:
                kept[_OWN + name] = tensor.grad
            elif name in self._norms and self.splitting.block_of(name) in plan.train:
                kept[_OWN + name] = tensor.detach()
        return kept

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        new = self.inner.advance(old, new, metrics)
        others = {name: value for name, value in new.tensors.items() if not name.startswith(_OWN)}
        if self.masks == "client" or self.score != "gradient" or self.density_at(new.round_index) == 1:
            return new if len(others) == len(new.tensors) else replace(new, tensors=others)
        changes = {_OWN + name: new.params[name] - old.params[name] for name in self.eligible}
        return replace(new, tensors={**others, **{name: change for name, change in changes.items() if change.any()}})

    def note(self, state: ServerState) -> Mapping[str, Any]:
        return {**self.inner.note(state), "density": self.density_at(state.round_index - 1) if state.round_index else 1.0}


class _Dressing(PlannerView):
    """A planner to which plans are shown as they will be carried out."""

    def __init__(self, planner: PlannerView, dress: Any):
        self._planner, self._dress = planner, dress

    def fits(self, plan: Plan, **limits: Any) -> bool:
        return self._planner.fits(self._dress(plan), **limits)

    def best(self, plans: Iterable[Plan], **limits: Any) -> Plan | None:
        return next((plan for plan in plans if self.fits(plan, **limits)), None)

    def largest_batch(self, plan: Plan, at_most: int, **limits: Any) -> Plan | None:
        found = self._planner.largest_batch(self._dress(plan), at_most, **limits)
        return None if found is None else replace(plan, phases=found.phases)

    def cost(self, plan: Plan) -> Any:
        return self._planner.cost(self._dress(plan))


def _masked(value: Tensor, mask: Tensor, other: Tensor | float) -> Tensor:
    return torch.where(mask, value, other)


def _codec(density: float) -> str:
    return f"bitmask(density={density!r})"


def _holds_whole_tensors(strategy: Strategy) -> bool:
    return type(strategy.parts[-1]).region is Strategy.region
