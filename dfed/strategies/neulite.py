"""NeuLite: one block at a time is trained, with the tail of the one before and a stand-in for those to come.

Source: Wu, Li, Tian, Chen, Xu, "NeuLite: Memory-Efficient Federated Learning via Elastic Progressive Training", 2024
(arXiv 2408.10826), and the behaviour of the authors' release.

Symbols: blocks 1 … T of the model; θ_t, block t; stage t holds blocks 1 … t and an *output module*, which stands in for blocks
t + 1 … T, and trains block t, the output module, and the last convolution and norm of block t − 1. Earlier layers are frozen:
they keep no activations, gradients or optimiser state, and their norms use and keep their running statistics.

Loss of stage t (*Curriculum Mentor*, and the harmonizer's proximal term):
L_t = CE − λ1_t · nHSIC(X; Z) − λ2_t · nHSIC(Y; P) + μ/2 · ‖θ − θ_global‖², with X the images, Z the features behind the output
module's layers, P those pooled (and projected), Y the classes one-hot. λ1_t falls from ``mentor_input`` to 0 over the stages,
λ2_t rises from 0 to ``mentor_label``.

Orders: ``rotate``, as the release: one block a round, in turn, for ever; the global model is the full model. ``elastic``, as
the text: the server goes on to the next block when the one in training has settled (:mod:`dfed.strategies.movement`); the
global model is that of the stage last trained.

Deviations: the paper's λ, μ and their schedule are not known to us, nor where the proximal term is taken: they are ours, as is
the mean by samples, over the tensors that were trained only. The release projects P by three linear layers of 2056, 1024 and
512 features; unless ``projection`` says so there is no projection, which would need more memory than many a block.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dfed.blocks import Splitting, check_names, cut_points, output_module, stage, tail_parameters, train_only
from dfed.blocks.hsic import centred_kernel, nhsic
from dfed.errors import ConfigError, Fault
from dfed.models import Chain
from dfed.models.layers import Count
from dfed.plan import Phase, Plan
from dfed.region import Region
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy
from dfed.strategies.movement import effective_movement, is_settled, sample_of

__all__ = ["NeuLite"]

Weight = Annotated[float, Field(ge=0)]


class NeuLite(Strategy):
    """One block at a time, with a curriculum loss and a harmonizer (Wu et al. 2024).

    Args:
        split: ``paper``: blocks end where the resolution changes, or are as equal in units as can be; ``auto``: where the
            largest stage needs the least memory; or the last unit of each block but the last.
        blocks: T, where ``split`` is no list; null, with ``auto``: as many as serve.
        order: ``rotate`` or ``elastic``.
        tail: What is trained of the block before: its last convolution and norm, or ``elastic``: as many of its units as fit
            the client, or ``none``.
        mentor_input: λ1 in the first stage.
        mentor_label: λ2 in the last stage.
        proximal: μ.
        proximal_on: Parameters in the proximal term: the ``tail``, or all that are ``trained``.
        projection: Widths of the linear layers behind the pooled features; empty: none.
        window: Rounds over which movement is measured, with ``elastic``; and through so many measurements a line is drawn.
        threshold, patience: The block has settled when the slope of movement stays below ``threshold`` so many rounds.
    """

    def __init__(
        self, problem: Problem, *, split: Literal["paper", "auto"] | list[str] = "paper", blocks: Count | None = 4,
        order: Literal["rotate", "elastic"] = "rotate", tail: Literal["last_conv", "elastic", "none"] = "last_conv",
        mentor_input: Weight = 0.1, mentor_label: Weight = 0.1, proximal: Weight = 0.01,
        proximal_on: Literal["tail", "trained"] = "tail", projection: list[Count] = [],  # noqa: B006 - read only
        window: Annotated[int, Field(ge=2)] = 5, threshold: Annotated[float, Field(gt=0)] = 0.02, patience: Count = 3,
    ):
        self.blocks = _blocks(problem, split, blocks)
        names = self.blocks.names
        extras = {f"output_{name}": _output(problem.chain, self.blocks, number) for number, name in enumerate(names[:-1])}
        if projection:
            width = _pooled_width(problem.chain)
            extras |= {f"mentor_{name}": _projection(width, projection) for name in names}
        check_names(problem.chain, extras)
        super().__init__(problem, extras)
        self.order, self.tail, self.projects = order, tail, bool(projection)
        last = max(1, len(names) - 1)
        self.weights = [(mentor_input * (1 - t / last), mentor_label * t / last) for t in range(len(names))]
        self.proximal, self.proximal_on = proximal, proximal_on
        self.window, self.threshold, self.patience = window, threshold, patience

    def training_key(self) -> list[Any]:
        terms = [(first > 0, second > 0) for first, second in self.weights]
        widths = [list(tensor.shape) for name in self.extras for tensor in self.extras[name].parameters() if "mentor" in name]
        return ["neulite", self.blocks.blocks, self.tail, terms, self.proximal > 0, self.proximal_on, widths]

    def init(self, params: Mapping[str, Tensor]) -> ServerState:
        return replace(super().init(params), facts={"stage": 0, "trained": 0, "movement": []})

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        number = state.facts["stage"]
        before = len(self.blocks.blocks[self.blocks.names[number - 1]]) if number else 0
        more = range(before, -1, -1) if self.tail == "elastic" else [0]
        return candidate.planner.best(self.plan_at(number, candidate.client, thawed=thawed) for thawed in more)

    def plan_at(self, number: int, client: int = 0, *, thawed: int = 0) -> Plan:
        """Training of stage ``number``, from 0, with the last ``thawed`` units of the block before trained whole."""
        name, units = list(self.blocks.blocks.items())[number]
        names = self.problem.chain.unit_names
        own = [extra for extra in (f"output_{name}", f"mentor_{name}") if extra in self.extras]
        start, stop = names.index(units[0]), names.index(units[-1]) + 1
        first = start - max(thawed, 1 if number and self.tail != "none" else 0)
        train = (*names[first:stop], *own)
        phases = tuple(replace(phase, objective="neulite", train=train) for phase in self.problem.phases)
        return Plan(client=client, hold=(*names[:stop], *own), train=train, phases=phases,
                    options={"stage": number, "thawed": thawed})

    def build(self, plan: Plan) -> nn.Module:
        if "stage" not in plan.options:
            return super().build(plan)
        number = plan.options["stage"]
        model = stage(self.problem.chain, self.blocks, number, tail=self.tail != "none")
        if plan.options["thawed"]:
            start = model.index_of(self.blocks.blocks[self.blocks.names[number]][0])
            train_only(model, model.unit_names[start - plan.options["thawed"]:])
        mentor = f"mentor_{self.blocks.names[number]}"
        if mentor in self.extras:
            model.add_module(mentor, copy.deepcopy(self.extras[mentor]))
        return model

    def receive(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> None:
        if "stage" not in plan.options:
            return
        assert isinstance(model, Chain)
        number = plan.options["stage"]
        name = self.blocks.names[number]
        model.number, model.mentor = number, f"mentor_{name}" if self.projects else None  # type: ignore[assignment]
        block = set(self.blocks.blocks[name]) | {f"output_{name}", f"mentor_{name}"}
        model.anchors = [  # type: ignore[assignment]
            (parameter, parameter.detach().clone()) for tensor, parameter in model.named_parameters()
            if self.proximal and parameter.requires_grad
            and (self.proximal_on == "trained" or tensor.partition(".")[0] not in block)
        ]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        if phase.objective != "neulite":
            return super().loss(model, x, y, phase)
        assert isinstance(model, Chain)
        features, scores = _features_and_scores(model, x)
        loss = F.cross_entropy(scores.float(), y)
        of_input, of_label = self.weights[model.number]  # type: ignore[index]
        if of_input:
            loss = loss - of_input * nhsic(centred_kernel(x), centred_kernel(features))
        if of_label:
            pooled = _pooled(features)
            if model.mentor is not None:
                pooled = model.get_submodule(model.mentor)(pooled)  # type: ignore[arg-type]
            labels = F.one_hot(y, self.problem.chain.num_classes).float()
            loss = loss - of_label * nhsic(centred_kernel(labels), centred_kernel(pooled))
        for parameter, anchor in model.anchors:  # type: ignore[union-attr]
            loss = loss + self.proximal / 2 * (parameter - anchor).square().sum()
        return loss

    def upload(self, name: str, value: Tensor, region: Region, plan: Plan) -> Tensor | None:
        if "stage" not in plan.options:
            return super().upload(name, value, region, plan)
        number, unit = plan.options["stage"], name.partition(".")[0]
        if unit not in plan.train:
            return None
        start = self.problem.chain.unit_names.index(self.blocks.blocks[self.blocks.names[number]][0])
        frozen = unit in self.problem.chain.unit_names[:start - plan.options["thawed"]]
        return value if not frozen or _is_of(name, tail_parameters(self.problem.chain, unit)) else None

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        number = old.facts["stage"]
        facts = {**new.facts, "trained": number if metrics["senders"] else old.facts["trained"]}
        if self.order == "rotate":
            return replace(new, facts={**facts, "stage": (number + 1) % len(self.blocks.names)})
        name = self.blocks.names[number]
        held = [tensor for tensor in new.params if tensor.partition(".")[0] in self.blocks.blocks[name]]
        seed = self.problem.seed
        change = (sample_of(new.params, held, seed, name) - sample_of(old.params, held, seed, name))[None]
        changes = torch.cat([old.tensors["movement"], change])[-self.window:] if "movement" in old.tensors else change
        series = list(old.facts["movement"])
        if len(changes) == self.window:
            series = [*series, effective_movement(changes)][-(self.window + self.patience - 1):]
        tensors = {**new.tensors, "movement": changes}
        settled = is_settled(series, threshold=self.threshold, patience=self.patience, length=self.window)
        if settled and number + 1 < len(self.blocks.names):
            number, series = number + 1, []
            del tensors["movement"]
        return replace(new, tensors=tensors, facts={**facts, "stage": number, "movement": series})

    def note(self, state: ServerState) -> Mapping[str, Any]:
        return {"stage": state.facts["trained"] + 1, "movement": (state.facts["movement"] or [None])[-1]}

    def evaluated(self, state: ServerState) -> Plan:
        return self.full_plan() if self.order == "rotate" else self.plan_at(state.facts["trained"])

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return {f"stage {number + 1}": self.plan_at(number) for number in range(len(self.blocks.names))}


def _blocks(problem: Problem, split: Literal["paper", "auto"] | list[str], count: int | None) -> Splitting:
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


def _output(chain: Chain, blocks: Splitting, number: int) -> nn.Module:
    return output_module(chain, list(blocks.blocks.values())[number:])


def _projection(width: int, widths: list[int]) -> nn.Module:
    with torch.device("meta"):
        pairs = zip([width, *widths], widths, strict=False)
        return nn.Sequential(*(nn.Linear(before, after) for before, after in pairs))


def _pooled_width(chain: Chain) -> int:
    """Features of one sample behind the last unit before the classifier, pooled."""
    shape = [chain.input_shape, *chain.output_shapes().values()][len(chain) - 1]
    return shape[-1] if len(shape) == 2 else shape[0]


def _pooled(features: Tensor) -> Tensor:
    """(batch, …) to (batch, channels): means over the image, the class token, or vectors as they are."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features[:, 0] if features.ndim == 3 else features


def _features_and_scores(model: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
    """What comes to the classifier, and what it makes of it."""
    last = model.unit_names[-1]
    x = model.run(x, stop=last)
    head = model.unit(last)
    if last.startswith("output_"):
        for name, layer in head.named_children():
            if name == "head":
                return x, layer(x)
            x = layer(x)
    return x, head(x)


def _is_of(name: str, parameters: tuple[str, ...]) -> bool:
    """Whether a tensor belongs to a layer of which one of ``parameters`` is."""
    return name.rpartition(".")[0] in {parameter.rpartition(".")[0] for parameter in parameters}
