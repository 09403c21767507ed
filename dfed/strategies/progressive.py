"""Progressive training: one block at a time, with a stand-in for those to come. What the methods of this kind share.

A model of T blocks is trained in stages. Stage t holds blocks 1 … t and an *output module*, which stands in for blocks
t + 1 … T, and trains block t, the output module, and perhaps a tail of block t − 1. Earlier layers are frozen: they keep no
activations, gradients or optimiser state, and their norms use and keep their running statistics. Only what is trained goes up.

Schedules: ``rotate``: one block a round, in turn, for ever; the global model is the full model. ``elastic``: the server goes on
to the next block when the one in training has settled (:mod:`dfed.strategies.movement`); the global model is that of the stage
last trained. Before it, with ``shrink_rounds``, stages run from the last to the second, so many rounds each, on a front that is
still as it was drawn: blocks and output modules then start from what they learned there (ProFL's shrinking).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfed.blocks import Splitting, check_names, cut_points, output_module, stage, tail_parameters, train_only
from dfed.errors import ConfigError, Fault
from dfed.plan import Plan
from dfed.region import Region
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy
from dfed.strategies.movement import Pace, effective_movement, sample_of

__all__ = ["Progressive", "Schedule", "blocks_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When which block is trained.

    Attributes:
        order: ``rotate`` or ``elastic``.
        pace: With ``elastic``: when a block has settled.
        shrink_rounds: With ``elastic``: rounds of each stage of the way from the last block to the second; 0: none.
        rollback: With ``elastic``: after so many rounds without a smaller validation loss a stage takes back its best values,
            and the next one begins; None: never. Rounds that no client completed do not count.
    """

    order: Literal["rotate", "elastic"]
    pace: Pace
    shrink_rounds: int = 0
    rollback: int | None = None


class Progressive(Strategy):
    """One block at a time; see the module's text.

    Args:
        blocks: Of the model; the last one ends with the classifier.
        objective: Name of the loss of a stage's phases.
        extras: Modules beside the output modules.
        tail: Whether the last convolution and norm of the block before are trained too.

    Attributes:
        heeds_evaluation: As ``rollback``, with ``elastic``.
    """

    def __init__(self, problem: Problem, *, blocks: Splitting, schedule: Schedule, objective: str, tail: bool,
                 extras: Mapping[str, nn.Module] | None = None):
        self.blocks, self.schedule, self.objective, self.trains_tail = blocks, schedule, objective, tail
        units = list(blocks.blocks.values())
        outputs = {f"output_{name}": output_module(problem.chain, units[number:])
                   for number, name in enumerate(blocks.names[:-1])}
        check_names(problem.chain, [*outputs, *(extras or {})])
        super().__init__(problem, {**outputs, **(extras or {})})
        self.heeds_evaluation = schedule.rollback if schedule.order == "elastic" else None

    def training_key(self) -> list[Any]:
        return ["progressive", self.blocks.blocks, self.trains_tail, self.objective]

    def init(self, params: Mapping[str, Tensor]) -> ServerState:
        ends = ", ".join(units[-1] for units in self.blocks.blocks.values())
        logger.info("the model has %d blocks, which end with the units %s", len(self.blocks.names), ends)
        last = len(self.blocks.names) - 1
        shrinks = self.schedule.order == "elastic" and self.schedule.shrink_rounds > 0 and last > 0
        facts = {"stage": last if shrinks else 0, "trained": last if shrinks else 0, "movement": [],
                 "shrunk": 0 if shrinks else None, "best": None, "left": None}
        return replace(super().init(params), facts=facts)

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        return candidate.planner.best(self.plans(state.facts["stage"], candidate.client, shrinks=_shrinks(state)))

    def plans(self, number: int, client: int, *, shrinks: bool) -> list[Plan]:
        """What a client might do in stage ``number``, from 0, the best first."""
        return [self.plan_at(number, client, tail=not shrinks)]

    def plan_at(self, number: int, client: int = 0, *, thawed: int = 0, tail: bool = True) -> Plan:
        """Training of stage ``number``, from 0.

        Args:
            thawed: Units of the block before that are trained whole.
            tail: Whether of the block before the tail is trained, if the method does so; what is thawed is in any case.
        """
        name, units = list(self.blocks.blocks.items())[number]
        names, own = self.problem.chain.unit_names, self.own_extras(name)
        start, stop = names.index(units[0]), names.index(units[-1]) + 1
        first = start - max(thawed, 1 if number and self.trains_tail and tail else 0)
        train = (*names[first:stop], *own)
        phases = tuple(replace(phase, objective=self.objective, train=train) for phase in self.problem.phases)
        options = {"stage": number + 1, "thawed": thawed, **({} if tail else {"tail": False})}
        return Plan(client=client, hold=(*names[:stop], *own), train=train, phases=phases, options=options)

    def number_of(self, plan: Plan) -> int:
        """The stage of a plan of :meth:`plan_at`, from 0; its option ``stage`` counts from 1, as people do."""
        return int(plan.options["stage"]) - 1

    def own_extras(self, block: str) -> list[str]:
        """The extras that belong to the stage of ``block``."""
        return [f"output_{block}"] if f"output_{block}" in self.extras else []

    def build(self, plan: Plan) -> nn.Module:
        if "stage" not in plan.options:
            return super().build(plan)
        number = self.number_of(plan)
        tail = self.trains_tail and plan.options.get("tail", True)
        model = stage(self.problem.chain, self.blocks, number, tail=tail)
        if plan.options["thawed"]:
            start = model.index_of(self.blocks.blocks[self.blocks.names[number]][0])
            train_only(model, model.unit_names[start - plan.options["thawed"]:])
        return model

    def upload(self, name: str, value: Tensor, region: Region, plan: Plan) -> Tensor | None:
        if "stage" not in plan.options:
            return super().upload(name, value, region, plan)
        number, unit = self.number_of(plan), name.partition(".")[0]
        if unit not in plan.train:
            return None
        start = self.problem.chain.unit_names.index(self.blocks.blocks[self.blocks.names[number]][0])
        frozen = unit in self.problem.chain.unit_names[:start - plan.options["thawed"]]
        return value if not frozen or _is_of(name, tail_parameters(self.problem.chain, unit)) else None

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        number = old.facts["stage"]
        facts = {**new.facts, "trained": number if metrics["senders"] else old.facts["trained"], "left": None}
        if facts["best"] is not None and metrics["senders"]:
            facts["best"] = {**facts["best"], "since": facts["best"]["since"] + 1}
        if self.schedule.order == "rotate":
            return replace(new, facts={**facts, "stage": (number + 1) % len(self.blocks.names)})
        if _shrinks(old):
            return self._shrunk(replace(new, facts=facts))
        pace, seed, name = self.schedule.pace, self.problem.seed, self.blocks.names[number]
        held = [tensor for tensor in new.params if tensor.partition(".")[0] in self.blocks.blocks[name]]
        change = (sample_of(new.params, held, seed, name) - sample_of(old.params, held, seed, name))[None]
        changes = torch.cat([old.tensors["movement"], change])[-pace.window:] if "movement" in old.tensors else change
        series = list(old.facts["movement"])
        if len(changes) == pace.window:
            series = [*series, effective_movement(changes)][-pace.length:]
        new = replace(new, tensors={**new.tensors, "movement": changes}, facts={**facts, "movement": series})
        return self._next_stage(new, "settled") if pace.is_settled(series) and number + 1 < len(self.blocks.names) else new

    def _next_stage(self, state: ServerState, why: str) -> ServerState:
        """The state with which the next block's stage begins; of the one before only ``why`` it ended is kept, for a round."""
        facts = {**state.facts, "stage": state.facts["stage"] + 1, "movement": [], "best": None,
                 "left": {"stage": state.facts["stage"] + 1, "why": why, "movement": state.facts["movement"]}}
        return replace(state, tensors=_without(state.tensors, "movement", _BEST), facts=facts)

    def _shrunk(self, state: ServerState) -> ServerState:
        """After a round on the way back to the first block."""
        number, done = state.facts["stage"], state.facts["shrunk"] + 1
        if done < self.schedule.shrink_rounds:
            return replace(state, facts={**state.facts, "shrunk": done})
        params = {**state.params, **_handed_down(state.params, self.blocks, number)}
        again = 0 if number > 1 else None
        return replace(state, params=params, facts={**state.facts, "stage": number - 1, "shrunk": again})

    def judged(self, state: ServerState, loss: float) -> ServerState:
        facts = state.facts
        if self.heeds_evaluation is None or facts["trained"] != facts["stage"] or _shrinks(state) or not state.round_index:
            return state  # the figures are of another stage than the one in training
        best = facts["best"]
        if math.isfinite(loss) and (best is None or loss < best["loss"]):
            may_train = {block for plan in self.plans(facts["stage"], 0, shrinks=False) for block in plan.train}
            kept = {_BEST + name: value for name, value in state.params.items() if name.partition(".")[0] in may_train}
            new = {"loss": loss, "round": state.round_index, "since": 0}
            return replace(state, tensors={**_without(state.tensors, _BEST), **kept}, facts={**facts, "best": new})
        if best is None or best["since"] < self.heeds_evaluation:
            return state
        kept = {name.removeprefix(_BEST): value for name, value in state.tensors.items() if name.startswith(_BEST)}
        slots = {name: value for name, value in state.slots.items() if name not in kept}  # they led away from these values
        state = replace(state, params={**state.params, **kept}, slots=slots)
        logger.info("stage %d goes back to its best values, of round %d, after %d rounds without a smaller validation loss",
                    facts["stage"] + 1, best["round"], best["since"])
        back = {"stage": facts["stage"] + 1, "why": "rolled back", "to_round": best["round"], "movement": facts["movement"]}
        if facts["stage"] + 1 < len(self.blocks.names):
            state = self._next_stage(state, "rolled back")
            return replace(state, facts={**state.facts, "left": back})
        again = {**best, "round": state.round_index, "since": 0}
        return replace(state, tensors=_without(state.tensors, "movement"),
                       facts={**facts, "movement": [], "best": again, "left": back})

    def note(self, state: ServerState) -> Mapping[str, Any]:
        facts = state.facts
        left = facts["left"] or {}
        series = left.get("movement", facts["movement"]) or [None]
        said = {"stage": facts["trained"] + 1, "movement": series[-1]}
        if self.schedule.order == "elastic":
            said |= {"slope": self.schedule.pace.slope(series) if series[0] is not None else None}
        if left:
            said |= {"left": {name: left[name] for name in ("stage", "why", "to_round") if name in left}}
        return said

    def evaluated(self, state: ServerState) -> Plan:
        return self.full_plan() if self.schedule.order == "rotate" else self.plan_at(state.facts["trained"])

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return {f"stage {number + 1}": self.plan_at(number) for number in range(len(self.blocks.names))}


_BEST = "best/"


def _without(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith(prefixes)}


def _shrinks(state: ServerState) -> bool:
    return state.facts.get("shrunk") is not None


def _is_of(name: str, parameters: tuple[str, ...]) -> bool:
    """Whether a tensor belongs to a layer of which one of ``parameters`` is."""
    return name.rpartition(".")[0] in {parameter.rpartition(".")[0] for parameter in parameters}


def _handed_down(params: Mapping[str, Tensor], blocks: Splitting, number: int) -> dict[str, Tensor]:
    """What the output module of block ``number`` (or the classifier, for the last) has learned, under the names that it has in
    the output module of the block before: there one more layer, for block ``number``, comes first."""
    names = blocks.names
    here, there = f"output_{names[number]}.", f"output_{names[number - 1]}."
    if number == len(names) - 1:
        head = blocks.blocks[names[-1]][-1]
        moved = {f"{there}head.{rest}": value for name, value in params.items()
                 for unit, _, rest in [name.partition(".")] if unit == head}
    else:
        moved = {}
        for name, value in params.items():
            if name.startswith(here):
                layer, _, rest = name.removeprefix(here).partition(".")
                layer = f"step{int(layer.removeprefix('step')) + 1}" if layer.startswith("step") else layer
                moved[f"{there}{layer}.{rest}"] = value
    return {name: value.clone() for name, value in moved.items() if name in params and params[name].shape == value.shape}


def blocks_of(problem: Problem, split: Literal["paper", "auto"] | list[str], count: int | None) -> Splitting:
    """The blocks that the settings ``split`` and ``blocks`` ask for.

    Raises:
        ConfigError: If there are none; names the setting.
    """
    if split == "auto":
        most = max(1, len(problem.chain) - 1)
        try:
            return problem.split(None if count is None else min(count, most))
        except ConfigError as error:
            raise ConfigError([Fault("blocks", fault.message) for fault in error.faults]) from error
    try:
        stops = cut_points(problem.chain, count or 4, None if split == "paper" else list(split))
    except ConfigError as error:
        raise ConfigError([Fault("split", fault.message) for fault in error.faults]) from error
    names = problem.chain.unit_names
    return Splitting({f"b{i}": names[start:stop] for i, (start, stop) in enumerate(zip((0, *stops), stops, strict=False))})
