"""What can be put around any strategy, and is a strategy itself."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from dfed.plan import Phase, Plan
from dfed.region import Region
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Feed, Strategy

__all__ = ["Wrapper"]


class Wrapper(Strategy):
    """The strategy ``inner``: whatever a subclass does not write is answered by it.

    Subclasses take their settings as keyword-only parameters of ``__init__``, after ``inner``.
    """

    def __init__(self, inner: Strategy):
        super().__init__(inner.problem, inner.extras)
        self.inner, self.splitting = inner, inner.splitting
        self.keeps_state, self.heeds_evaluation = inner.keeps_state, inner.heeds_evaluation
        self.statistics_samples = inner.statistics_samples

    @property
    def parts(self) -> tuple[Strategy, ...]:
        return (self, *self.inner.parts)

    def init(self, params: Mapping[str, Tensor]) -> ServerState:
        return self.inner.init(params)

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        return self.inner.plan(state, candidate)

    def sent(self, state: ServerState, name: str, codec: str) -> Tensor:
        return self.inner.sent(state, name, codec)

    def region(self, name: str, shape: tuple[int, ...], plan: Plan) -> Region:
        return self.inner.region(name, shape, plan)

    def build(self, plan: Plan) -> nn.Module:
        return self.inner.build(plan)

    def feed(self, plan: Plan) -> Feed | None:
        return self.inner.feed(plan)

    def feature_values(self, state: ServerState) -> int:
        return self.inner.feature_values(state)

    def receive(self, model: nn.Module, client_state: MutableMapping[str, Tensor], plan: Plan) -> None:
        self.inner.receive(model, client_state, plan)

    def remember(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> Mapping[str, Tensor]:
        return self.inner.remember(model, client_state, plan)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        return self.inner.loss(model, x, y, phase)

    def upload(self, name: str, value: Tensor, region: Region, plan: Plan) -> Tensor | None:
        return self.inner.upload(name, value, region, plan)

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        return self.inner.advance(old, new, metrics)

    def with_old_votes(self, old: ServerState, new: ServerState, held: Mapping[str, float], everybody: float) -> ServerState:
        return self.inner.with_old_votes(old, new, held, everybody)

    def judged(self, state: ServerState, loss: float) -> ServerState:
        return self.inner.judged(state, loss)

    def training_key(self) -> list[Any] | None:
        return self.inner.training_key()

    def num_draws(self, plan: Plan) -> int:
        return self.inner.num_draws(plan)

    def note(self, state: ServerState) -> Mapping[str, Any]:
        return self.inner.note(state)

    def evaluated(self, state: ServerState) -> Plan:
        return self.inner.evaluated(state)

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return self.inner.variants(state)

    def variant_of(self, plan: Plan) -> str | None:
        return self.inner.variant_of(plan)

    def full_plan(self, client: int = 0) -> Plan:
        return self.inner.full_plan(client)
