"""NeuLite: one block at a time is trained, with the tail of the one before and a stand-in for those to come.

Source: Wu, Li, Tian, Chen, Xu, "NeuLite: Memory-Efficient Federated Learning via Elastic Progressive Training", 2024
(arXiv 2408.10826), and the behaviour of the authors' release.

Symbols: blocks 1 … T of the model; θ_t, block t; stage t holds blocks 1 … t and an *output module*, which stands in for blocks
t + 1 … T, and trains block t, the output module, and the last convolution and norm of block t − 1; what stages are in full, and
the orders ``rotate`` (as the release) and ``elastic`` (as the text) are told in :mod:`dfed.strategies.progressive`.

Loss of stage t (*Curriculum Mentor*, and the harmonizer's proximal term):
L_t = CE − λ1_t · nHSIC(X; Z) − λ2_t · nHSIC(Y; P) + μ/2 · ‖θ − θ_global‖², with X the images, Z the features behind the output
module's layers, P those pooled (and projected), Y the classes one-hot. λ1_t falls from ``mentor_input`` to 0 over the stages,
λ2_t rises from 0 to ``mentor_label``.

Deviations: the paper's λ, μ and their schedule are not known to us, nor where the proximal term is taken: they are ours, as is
the mean by samples, over the tensors that were trained only. The release projects P by three linear layers of 2056, 1024 and
512 features; unless ``projection`` says so there is no projection, which would need more memory than many a block.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dfed.blocks.hsic import centred_kernel, nhsic
from dfed.errors import ConfigError, Fault
from dfed.models import Chain
from dfed.models.layers import Count
from dfed.plan import Phase, Plan
from dfed.strategies.base import Problem
from dfed.strategies.movement import Pace
from dfed.strategies.progressive import Progressive, Schedule, blocks_of

__all__ = ["NeuLite"]

Weight = Annotated[float, Field(ge=0)]


class NeuLite(Progressive):
    """One block at a time, with a curriculum loss and a harmonizer (Wu et al. 2024).

    Args:
        split: ``paper``: blocks end where the resolution changes, or are as equal in units as can be; ``auto``: where the
            largest stage needs the least memory; or the last unit of each block but the last.
        blocks: T, where ``split`` is no list; null, with ``auto``: as many as serve.
        order: ``rotate`` or ``elastic``.
        tail: What is trained of the block before: its last convolution and norm, or ``none``, or ``elastic``: as many of its
            units as fit the client, else its last convolution and norm, else nothing.
        mentor_input: λ1 in the first stage.
        mentor_label: λ2 in the last stage.
        proximal: μ.
        proximal_on: Parameters in the proximal term: the ``tail``, or all that are ``trained``.
        projection: Widths of the linear layers behind the pooled features; empty: none.
        window, threshold, patience: With ``elastic``, when a block has settled; see :class:`dfed.strategies.movement.Pace`.
        criterion: Likewise: ``slope`` or ``level``.
        shrink_rounds: With ``elastic``: rounds of each stage on the way from the last block to the second, before the turn of
            the first; 0: none.
        rollback: With ``elastic``: rounds without a smaller validation loss after which a stage takes back its best values
            and ends; null: never. Needs ``metrics.split: validation``.
    """

    def __init__(
        self, problem: Problem, *, split: Literal["paper", "auto"] | list[str] = "paper", blocks: Count | None = 4,
        order: Literal["rotate", "elastic"] = "rotate", tail: Literal["last_conv", "elastic", "none"] = "last_conv",
        mentor_input: Weight = 0.1, mentor_label: Weight = 0.1, proximal: Weight = 0.01,
        proximal_on: Literal["tail", "trained"] = "tail", projection: list[Count] = [],  # noqa: B006 - read only
        window: Annotated[int, Field(ge=2)] = 5, threshold: Annotated[float, Field(gt=0)] = 0.02, patience: Count = 3,
        criterion: Literal["slope", "level"] = "slope", shrink_rounds: Annotated[int, Field(ge=0)] = 0,
        rollback: Count | None = None,
    ):
        if order == "rotate" and (rollback is not None or shrink_rounds):
            name, wanted = ("rollback", "null") if rollback is not None else ("shrink_rounds", "0")
            message = f"must be {wanted} with `order: rotate`, in which no stage lasts, but is {rollback or shrink_rounds}."
            raise ConfigError([Fault(name, message)])
        found, pace = blocks_of(problem, split, blocks), Pace(window=window, threshold=threshold, patience=patience,
                                                              criterion=criterion)
        mentors: dict[str, nn.Module] = {}
        if projection:
            width = _pooled_width(problem.chain)
            mentors = {f"mentor_{name}": _projection(width, projection) for name in found.names}
        schedule = Schedule(order=order, pace=pace, shrink_rounds=shrink_rounds, rollback=rollback)
        super().__init__(problem, blocks=found, schedule=schedule, objective="neulite", tail=tail != "none", extras=mentors)
        self.tail, self.projects = tail, bool(projection)
        last = max(1, len(found.names) - 1)
        self.weights = [(mentor_input * (1 - t / last), mentor_label * t / last) for t in range(len(found.names))]
        self.proximal, self.proximal_on = proximal, proximal_on

    def training_key(self) -> list[Any]:
        terms = [(first > 0, second > 0) for first, second in self.weights]
        widths = [list(tensor.shape) for name in self.extras for tensor in self.extras[name].parameters() if "mentor" in name]
        return [*super().training_key(), self.tail, terms, self.proximal > 0, self.proximal_on, widths]

    def plans(self, number: int, client: int, *, shrinks: bool) -> list[Plan]:
        if self.tail != "elastic" or shrinks or not number:
            return super().plans(number, client, shrinks=shrinks)
        before = len(self.blocks.blocks[self.blocks.names[number - 1]])
        more = [self.plan_at(number, client, thawed=thawed) for thawed in range(before, -1, -1)]
        return [*more, self.plan_at(number, client, tail=False)]

    def own_extras(self, block: str) -> list[str]:
        return super().own_extras(block) + ([f"mentor_{block}"] if self.projects else [])

    def build(self, plan: Plan) -> nn.Module:
        model = super().build(plan)
        if self.projects and "stage" in plan.options:
            mentor = f"mentor_{self.blocks.names[self.number_of(plan)]}"
            model.add_module(mentor, copy.deepcopy(self.extras[mentor]))
        return model

    def receive(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> None:
        if "stage" not in plan.options:
            return
        assert isinstance(model, Chain)
        number = self.number_of(plan)
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
