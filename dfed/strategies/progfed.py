"""ProgFed: the model grows in the course of the run, block by block.

Source: Wang, Stich, He, Fritz, "ProgFed: Effective, Communication, and Computation Efficient Federated Learning by
Progressive Training", ICML 2022 (arXiv 2110.05323), section 3.

Symbols: the model is cut into blocks E_1 … E_S. Stage s trains M_s = G_s ∘ E_s ∘ … ∘ E_1 from end to end by federated
averaging, for T_s rounds (``stage_rounds``); G_s is a head of its own, thrown away when the model grows. The last stage is
the full model. After each growth a warm-up (``warmup_rounds``) trains the newest block and the head only. Clients that fit
what is trained in the round take part, so more of them in a warm-up.

Deviations: all stages but the last, which lasts to the end of the run, have the same T_s. The warm-up is 25 rounds in the
paper; unless said otherwise it is a tenth of a stage here, and at most 25. Frozen blocks normalise by their running
statistics and leave them as they are. Stages end where :func:`dfed.blocks.cut_points` says, and a head is what
:func:`dfed.blocks.classifier` makes. The global model is that of the stage last
trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from dfed.blocks import check_names, classifier, cut, cut_points, train_only
from dfed.models.layers import Count
from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["ProgFed"]

_MOST_WARMUP_ROUNDS = 25  # as in the paper


class ProgFed(Strategy):
    """The model grows by a block every so many rounds; all blocks so far are trained (Wang et al. 2022).

    Args:
        stage_rounds: Rounds of each stage but the last, warm-up included. The run should have more than
            (``depths`` − 1) times as many, or the full model is never trained.
        depths: S, the number of stages.
        cuts: The last unit of each stage but the last, instead; null: see :func:`dfed.blocks.cut_points`.
        warmup_rounds: Rounds after each growth that train the newest block and the head only; null: a tenth of
            ``stage_rounds``, at most 25.
    """

    def __init__(self, problem: Problem, *, stage_rounds: Count, depths: Count = 4, cuts: list[str] | None = None,
                 warmup_rounds: Annotated[int, Field(ge=0)] | None = None):
        self.stops = cut_points(problem.chain, depths, cuts)
        extras = {f"stage{stage}_head": classifier(problem.chain, stop) for stage, stop in enumerate(self.stops[:-1], start=1)}
        check_names(problem.chain, extras)
        super().__init__(problem, extras)
        self.stage_rounds = stage_rounds
        self.warmup_rounds = min(_MOST_WARMUP_ROUNDS, stage_rounds // 10) if warmup_rounds is None else warmup_rounds

    def training_key(self) -> list[Any]:
        return ["progfed", list(self.stops)]

    def init(self, params: Mapping[str, Tensor]) -> ServerState:
        return replace(super().init(params), facts={"stage": 1, "trained": 1})

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        stage = state.facts["stage"]
        warms_up = stage > 1 and state.round_index - (stage - 1) * self.stage_rounds < self.warmup_rounds
        return candidate.planner.best([self.plan_at(stage, candidate.client, warms_up=warms_up)])

    def plan_at(self, stage: int, client: int = 0, *, warms_up: bool = False) -> Plan:
        """Training of this stage (from 1), or of its newest block and head only."""
        is_last, names = stage == len(self.stops), self.problem.chain.unit_names
        if is_last and not warms_up:
            return self.full_plan(client)
        head = () if is_last else (f"stage{stage}_head",)
        hold, phases = (*names[: self.stops[stage - 1]], *head), self.problem.phases
        train = hold
        if warms_up:
            train = hold[self.stops[stage - 2] :]
            phases = tuple(replace(phase, train=train) for phase in phases)
        return Plan(client=client, hold=hold, train=train, phases=phases, options={"stage": stage})

    def build(self, plan: Plan) -> nn.Module:
        stage = plan.options.get("stage", len(self.stops))
        if stage == len(self.stops):
            return super().build(plan)
        head = f"stage{stage}_head"
        model = cut(self.problem.chain, stop=self.stops[stage - 1], end=[(head, copy.deepcopy(self.extras[head]))])
        train_only(model, plan.train)
        return model

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        stage = min(len(self.stops), 1 + new.round_index // self.stage_rounds)
        trained = old.facts["stage"] if metrics["senders"] else old.facts["trained"]
        return replace(new, facts={**new.facts, "stage": stage, "trained": trained})

    def evaluated(self, state: ServerState) -> Plan:
        return self.plan_at(state.facts["trained"])
