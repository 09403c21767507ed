"""NeuroFlux in a fleet: clients train the same block of the model by local losses, each with the mini-batch that fits it.

After Saikumar, Varghese, "NeuroFlux: Memory-Efficient CNN Training Using Adaptive Local Learning", EuroSys 2024 (arXiv
2402.14139), which trains one device (``dfed train`` with :mod:`dfed.central.neuroflux`, where the parts and their symbols are
explained). The federated form is ours: nobody has published one.

The model is cut into layers, each with a head of its own (:class:`dfed.blocks.local_net.LocalNet`), and these are joined into
blocks by what the weakest budget allows that holds every layer. Round by round all clients train block k, for R rounds
(``block_rounds``): in each mini-batch one layer after another takes its own cross-entropy backward, and hands its output on
without gradient. So a client needs the block's weights, gradients and optimiser state, and the activations of its largest
layer. Its mini-batch is the largest that fits, b ≤ B (``client.batch_size``), its learning rate b/B times the configured one.

Then block k is frozen everywhere. A client that takes part in block k + 1 for the first time passes its samples through what
lies between them and that block, in evaluation mode, and keeps the outcome (see :class:`dfed.strategies.Feed`): that is what
it trains on in all rounds of the block, for which it is sent nothing but the block and its heads. If it had features of an
earlier block, it starts from these. The newest features only are kept.

Deviations from the method on one device: the layers of a block take one step together, after all of them have gone backward,
so that ``client.clip_norm`` is of the whole block's gradient; the optimiser is new in each round, as everywhere in a fleet.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dfed.blocks.local_blocks import join_layers
from dfed.blocks.local_heads import Filters, Heads, filters_by
from dfed.blocks.local_net import LocalBlock, LocalNet, exit_name
from dfed.models.layers import Count
from dfed.plan import Phase, Plan
from dfed.state import ServerState
from dfed.strategies.base import PASS, Candidate, Feed, Problem, Strategy

__all__ = ["NeuroFlux"]

logger = logging.getLogger(__name__)


class NeuroFlux(Strategy):
    """Blocks learn one after another by local losses, from features that clients keep (after Saikumar and Varghese 2024).

    Args:
        block_rounds: R, rounds of each block but the last, which lasts to the end of the run; null: the run's rounds divided
            by the number of blocks, at least 1.
        heads: How wide the head of a layer is: ``scaled``: γ · channels; ``memory_matched``: as wide as it can be without
            keeping more activations than the layer; ``classic``: ``largest_filters``.
        gamma: γ, for ``scaled``.
        smallest_filters, largest_filters: No head has fewer or more.
        rho: ρ, by which share a layer's mini-batch may differ from that of its block's first layer.

    Attributes:
        net: The layers and their heads.
    """

    keeps_state = True  # nothing but the round in which a client's features were made

    def __init__(self, problem: Problem, *, block_rounds: Count | None = None, heads: Heads = "scaled",
                 gamma: Annotated[float, Field(gt=0, le=1000)] = 0.5, smallest_filters: Filters = 16,
                 largest_filters: Filters = 256, rho: Annotated[float, Field(ge=0)] = 0.4):
        self.net = LocalNet(problem.chain, filters_by(problem.chain, heads, gamma, smallest_filters, largest_filters))
        own = {layer.head: self.net.head(number) for number, layer in enumerate(self.net.layers[:-1])}
        super().__init__(problem, own)
        self.block_rounds, self.rho = block_rounds, rho
        self.batch_size = problem.phases[0].batch_size
        norms = any(isinstance(module, _NormBase) for part in (problem.chain, *own.values()) for module in part.modules())
        self._least = min(self.batch_size, 2 if norms else 1)  # a batch norm wants more than one value a channel

    def training_key(self) -> list[Any]:
        return ["neuroflux", [[layer.start, layer.stop, layer.filters] for layer in self.net.layers]]

    def init(self, params: Mapping[str, Tensor]) -> ServerState:
        blocks = self._boundaries()
        rounds = self.block_rounds or max(1, self.problem.rounds // len(blocks))
        names, layers = self.problem.chain.unit_names, self.net.layers
        said = ", ".join(" … ".join(dict.fromkeys((names[layers[first].start], names[layers[stop - 1].stop - 1])))
                         for first, stop in blocks)
        logger.info("the model has %d blocks of %d rounds, the last to the end: %s", len(blocks), rounds, said)
        last = rounds * (len(blocks) - 1)
        if last >= self.problem.rounds:
            logger.warning("the last blocks of the model are never trained: %d blocks of %d rounds (`strategy.block_rounds`) "
                           "do not fit into %d rounds (`rounds`)", len(blocks), rounds, self.problem.rounds)
        budgets = [budget for budget, _ in self.problem.budgets]
        for number, (first, stop) in enumerate(blocks):
            plan = self.plan_at(first, stop, batch=self._least)
            if budgets and not any(self.problem.fits(plan, budget) for budget in budgets):
                logger.warning("block %d of the model is trained by nobody: no budget of the fleet is sure to hold a step on "
                               "%d samples", number + 1, self._least)
        return replace(super().init(params), facts={"blocks": blocks, "block_rounds": rounds, "starts": [0], "trained": 0})

    def _boundaries(self) -> list[list[int]]:
        """First layer and end of each block, for the smallest budget with which every layer can be trained by itself.

        Where nobody has such a budget, for the smallest that would do.
        """
        def needed(first: int, stop: int, batch: int) -> int:
            return self.problem.budget_bytes(self.plan_at(first, stop, batch=batch))

        count, budgets = len(self.net.layers), [budget for budget, _ in self.problem.budgets]
        least = max(needed(layer, layer + 1, self._least) for layer in range(count))
        finite = [budget for budget in budgets if budget is not None]
        weakest = next((budget for budget in finite if budget >= least), least if finite else None)
        blocks = join_layers([self._least] * count, needed, lambda size: weakest is None or size <= weakest,
                             self.batch_size, self.rho)
        return [[block.first, block.stop] for block in blocks]

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        starts = state.facts["starts"]
        now, have = len(starts) - 1, _block_of(starts, state.clients.get(candidate.client))
        first, stop = state.facts["blocks"][now]
        plan = candidate.planner.largest_batch(self.plan_at(first, stop, candidate.client), self.batch_size)
        if plan is None or plan.phases[0].batch_size < self._least:
            return None
        size, count = plan.phases[0].batch_size, candidate.num_samples
        while size > self._least > 1 and count % size == 1:  # a batch norm would meet a last mini-batch of one sample
            size -= 1
        rate = min(size, count) / min(self.batch_size, count)
        phases = tuple(replace(phase, batch_size=size, rate=rate) for phase in plan.phases)
        plan = replace(plan, phases=phases, details={"features": starts[now], "source": starts[have] if have else None})
        if have == now:
            return plan
        source = self.net.layers[state.facts["blocks"][have][0]].start if have else 0
        between = self.problem.chain.unit_names[source:self.net.layers[first].start]
        sizes = []
        while size:  # a pass through a wide layer may want smaller mini-batches than the training of a narrow one
            sizes.append(size)
            size //= 2
        return candidate.planner.best(
            replace(plan, hold=(*between, *plan.hold),
                    phases=(Phase(batch_size=size, epochs=1, objective=PASS, train=()), *plan.phases))
            for size in sizes)

    def plan_at(self, first: int, stop: int, client: int = 0, *, batch: int | None = None) -> Plan:
        """Training of the layers from ``first`` up to ``stop`` on what they take, in mini-batches of ``batch`` (None: B)."""
        layers = self.net.layers[first:stop]
        hold = (*self.problem.chain.unit_names[layers[0].start:layers[-1].stop], *(layer.head for layer in layers))
        phases = tuple(replace(phase, batch_size=batch or phase.batch_size) for phase in self.problem.phases)
        return Plan(client=client, hold=hold, train=hold, phases=phases, options={"layers": [first, stop]})

    def exit_plan(self, layer: int) -> Plan:
        """The model up to a layer, from 0, and its head; that of the last layer is the full model."""
        if layer == len(self.net.layers) - 1:
            return self.full_plan()
        end = self.net.layers[layer]
        hold = (*self.problem.chain.unit_names[:end.stop], end.head)
        return Plan(client=0, hold=hold, train=hold, phases=self.problem.phases, options={"exit": layer})

    def build(self, plan: Plan) -> nn.Module:
        if "layers" in plan.options:
            return self.net.block_model(*plan.options["layers"])
        return self.net.exit_model(plan.options["exit"]) if "exit" in plan.options else super().build(plan)

    def feed(self, plan: Plan) -> Feed | None:
        if "layers" not in plan.options or plan.options["layers"][0] == 0:
            return None
        start = self.net.layers[plan.options["layers"][0]].start
        units = tuple(name for name in self.problem.chain.unit_names[:start] if name in plan.hold)
        before = self.problem.chain.index_of(units[0]) if units else start
        return Feed(shape=self.net.shape_before(start), version=plan.details.get("features", 0), units=units,
                    source_shape=self.net.shape_before(before), source=plan.details.get("source"))

    def feature_values(self, state: ServerState) -> int:
        """Of the present block and all to come."""
        blocks, now = state.facts["blocks"], len(state.facts["starts"]) - 1
        starts = [self.net.layers[first].start for first, _ in blocks[max(1, now):]]
        return sum(math.prod(self.net.shape_before(start)) for start in starts)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        """The sum over the layers' losses; all but the last have gone backward already."""
        if not isinstance(model, LocalBlock):
            return super().loss(model, x, y, phase)
        others = torch.zeros((), device=x.device)
        for number in range(model.num_layers):
            out = model.run_layer(x, number)
            scores = model.run_head(out, number)
            loss = F.cross_entropy(scores.float() if scores.dtype == torch.bfloat16 else scores, y)
            if number + 1 < model.num_layers:
                x = out.detach()
                del out, scores
                with torch.autocast(x.device.type, enabled=False):  # as where the caller goes backward
                    loss.backward()
                others += loss.detach()
        return loss + others

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        facts, starts = dict(new.facts), old.facts["starts"]
        if metrics["senders"]:
            facts["trained"] = facts["blocks"][len(starts) - 1][1]
        if new.round_index - starts[-1] >= facts["block_rounds"] and len(starts) < len(facts["blocks"]):
            facts["starts"] = [*starts, new.round_index]
        return replace(new, facts=facts)

    def note(self, state: ServerState) -> Mapping[str, Any]:
        block = _block_of(state.facts["starts"], state.round_index - 1)
        return {"block": block + 1, "blocks": len(state.facts["blocks"]), "exit": exit_name(self._newest(state))}

    def _newest(self, state: ServerState) -> int:
        """The deepest layer that some client has trained; before any has, that of the first block."""
        return (state.facts["trained"] or state.facts["blocks"][0][1]) - 1

    def evaluated(self, state: ServerState) -> Plan:
        return self.exit_plan(self._newest(state))

    def variants(self, state: ServerState) -> Mapping[str, Plan]:
        return {exit_name(layer): self.exit_plan(layer) for layer in range(state.facts["trained"])}


def _block_of(starts: list[int], round_index: int | None) -> int:
    """The block that was trained in a round, if they began in these; 0 for no round at all."""
    return 0 if round_index is None else bisect.bisect_right(starts, round_index) - 1
