"""What methods of local learning share: layers with a loss of their own, trained block by block.

An epoch of the method is an epoch of one block. Within a mini-batch each layer takes a step by its own loss, and hands its
output on without gradient: what the layers of a block need at the same time is their tensors and the optimiser's, not their
activations.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dfed import rng
from dfed.blocks.local_blocks import Block
from dfed.blocks.local_net import LocalNet, exit_name
from dfed.central.clock import StepClock
from dfed.central.exits import choose_exit
from dfed.central.local_costs import LocalCosts
from dfed.central.local_feed import Feed
from dfed.central.local_step import layer_session, local_step
from dfed.central.method import Method, Outcome, Problem, VariantCosts
from dfed.central.session import Session
from dfed.central.state import Tally, TrainState
from dfed.central.watch import LossWatch
from dfed.errors import TrainingFailed
from dfed.models import materialise

__all__ = ["LocalMethod"]


class LocalMethod(Method):
    """Layers with heads, in blocks that are trained one after another.

    Subclasses set :attr:`blocks`.

    Args:
        filters_of: See :class:`LocalNet`.
        cache: Where the output of trained blocks comes from; see :class:`Feed`.
        exit_tolerance: See :func:`choose_exit`; None: no exit is chosen.

    Attributes:
        net: The layers.
        blocks: Front to back.
    """

    blocks: Sequence[Block]

    def __init__(self, problem: Problem, *, filters_of: Callable[[int, int], int | None],
                 cache: Literal["fp32", "fp16", "none"], exit_tolerance: float | None):
        super().__init__(problem)
        self.net, self._cache, self._exit_tolerance = LocalNet(problem.chain, filters_of), cache, exit_tolerance
        self.needs_validation = exit_tolerance is not None
        self._figures = LocalCosts(self.net, problem.settings, problem.store, recomputes=cache == "none",
                                   samples=problem.data.num_samples)

    @classmethod
    def keyed_by(cls, options: Mapping[str, object]) -> frozenset[str]:
        return frozenset({"memory", "epochs"})

    def check_smallest(self, blocks: Sequence[tuple[int, int]]) -> list[int]:
        """The smallest mini-batch of each layer, if each of ``blocks`` (first layer and end) fits at its own.

        Raises:
            ConfigError: If one does not; names the unit that needs most, and the smallest budget that does.
        """
        smallest = [self._figures.smallest(layer) for layer in range(len(self.net.layers))]
        peaks = {bound: self._figures.peak_bytes(*bound, max(smallest[slice(*bound)])) for bound in blocks}
        (first, stop), most = max(peaks.items(), key=lambda item: item[1])
        if not self.problem.fits(most):
            batch, names = max(smallest[first:stop]), self._units(first, stop)
            what = f"unit '{names[0]}'" if len(names) == 1 else f"units '{names[0]}' to '{names[-1]}'"
            raise self.problem.too_small(most, f"training {what} on {batch} sample{'s' * (batch > 1)} at a time")
        return smallest

    def _units(self, first: int, stop: int) -> tuple[str, ...]:
        return self.problem.chain.unit_names[self.net.layers[first].start:self.net.layers[stop - 1].stop]

    @property
    def num_epochs(self) -> int:
        return len(self.blocks) * self.problem.settings.epochs

    def block_at(self, epoch: int) -> Block:
        """The block that an epoch trains; after the last epoch, the last block."""
        return self.blocks[min(epoch // self.problem.settings.epochs, len(self.blocks) - 1)]

    def rate_factor(self, epoch: int) -> float:
        """Factor on the learning rate: the schedule's, which begins anew with each block, times batch / B_max."""
        settings = self.problem.settings
        return settings.schedule.at(epoch % settings.epochs, settings.epochs) * self.block_at(epoch).batch / settings.batch_size

    def learning_rate_at(self, epoch: int) -> float:
        return self.problem.settings.learning_rate * self.rate_factor(epoch)

    @functools.cached_property
    def _sessions(self) -> list[Session]:
        return [layer_session(self.net, number, self.problem.settings, self.problem.device)
                for number in range(len(self.net.layers))]

    @functools.cached_property
    def _feed(self) -> Feed:
        return Feed(self.problem, self.net, self.blocks, self._cache)

    def first_tensors(self) -> dict[str, Tensor]:
        seed = self.problem.seed
        full = materialise(self.problem.chain.skeleton(), rng.torch_generator(seed, "init")).state_dict()
        heads = self.net.first_heads(lambda name: rng.torch_generator(seed, "init", name))
        return {name: value.detach() for name, value in full.items()} | heads

    def _facts(self) -> dict[str, object]:
        return {"blocks": [[block.first, block.stop, block.batch] for block in self.blocks]}

    def work_in(self, folder: Path, epoch: int) -> None:
        self._feed.work_in(folder, self.block_at(epoch) if epoch < self.num_epochs else None)

    def epoch(self, state: TrainState, stopped: Callable[[], bool]) -> Outcome:
        if state.facts and state.facts != self._facts():
            raise TrainingFailed(f"the blocks must be those that the training began with ({state.facts['blocks']}), but by the "
                                 f"planner's prediction they are {self._facts()['blocks']}: begin anew.")
        block, device, tally = self.block_at(state.epoch), self.problem.device, Tally()
        if not self._feed.prepare(block, state.tensors, stopped, tally, self._forward_flops):
            return Outcome(state=state, tally=tally)
        sessions = [self._sessions[number] for number in range(block.first, block.stop)]
        for session in sessions:
            names = set(session.model.state_dict(keep_vars=True))
            session.load({name: state.tensors[name] for name in names},
                         {name: own for name, own in state.slots.items() if name in names}, self.rate_factor(state.epoch))
        clock, watch, step = StepClock(device), LossWatch(device), state.step
        for x, y in self._feed.batches(block, state):
            for number, session in zip(range(block.first, block.stop), sessions, strict=True):
                if session.draws:
                    keys = (state.epoch, step, number)
                    session.model.set_generator(rng.device_generator(device, self.problem.seed, "layers", *keys))
                with clock.step(exit_name(number)):
                    loss, x = local_step(session, x, y)
                tally.add(exit_name(number), len(y))
                watch.add(loss, len(y), state.epoch, step)
            step += 1
            del x, y, loss
            if stopped():
                break
        tally.loss_sum, tally.seconds = watch.sum(state.epoch), clock.seconds()
        return Outcome(state=self._after(state, block, step, sessions), tally=tally)

    def _after(self, state: TrainState, block: Block, step: int, sessions: Sequence[Session]) -> TrainState:
        tensors, slots = dict(state.tensors), dict[str, Mapping[str, Tensor]]()
        for session in sessions:
            mine, own = session.take()
            tensors |= mine
            slots |= own
        done, rest = divmod(step, self._feed.num_steps(block))
        epoch = state.epoch + done
        if epoch == self.num_epochs or self.block_at(epoch) != block:
            slots = {}  # the next block has optimisers of its own
        return TrainState(epoch=epoch, step=rest, tensors=tensors, slots=slots, totals=state.totals, facts=self._facts())

    def release(self) -> None:
        for session in self._sessions:
            session.unload()
        self._feed.release()

    def rehearse(self, num_samples: int) -> None:
        self._feed.start()
        device = self.problem.device
        for block in self.blocks:
            size = min(num_samples, block.batch)
            with contextlib.suppress(Exception):
                self._feed.rehearse(block, size)
            for number in range(block.first, block.stop):
                session = self._sessions[number]
                state = session.model.state_dict(keep_vars=True)
                with contextlib.suppress(Exception):
                    session.load({name: torch.zeros(value.shape, dtype=value.dtype) for name, value in state.items()}, {}, 1.0)
                    session.model.set_generator(torch.Generator(device=device))
                    x = torch.zeros(size, *session.model.input_shape, device=device)
                    local_step(session, x, torch.zeros(size, dtype=torch.int64, device=device))
                session.unload()

    def variants(self) -> Mapping[str, Callable[[], nn.Module]]:
        return {exit_name(number): functools.partial(self.net.exit_model, number) for number in range(len(self.net.layers))}

    def variant_after(self, epoch: int) -> str:
        return exit_name(self.block_at(epoch).stop - 1)

    def choose(self, accuracies: Mapping[str, float]) -> str | None:
        return None if self._exit_tolerance is None else choose_exit(accuracies, self._exit_tolerance)

    def costs(self) -> Mapping[str, VariantCosts]:
        return self._costs

    @functools.cached_property
    def _costs(self) -> Mapping[str, VariantCosts]:
        steps = {block.index: self._feed.num_steps(block) for block in self.blocks}
        total = sum(steps[block.index] * (block.stop - block.first) for block in self.blocks)
        found = {}
        for block in self.blocks:
            for number in range(block.first, block.stop):
                layer, model = self._figures.layer(number), self.net.exit_model(number)
                again = number == block.first and self._cache == "none"
                found[exit_name(number)] = VariantCosts(
                    num_params=sum(parameter.numel() for parameter in model.parameters()),
                    num_bytes=4 * sum(value.numel() for value in model.state_dict().values() if value.is_floating_point()),
                    forward_flops=self._forward_flops(0, number + 1) + layer.head_flops,
                    training_flops=layer.training_flops + (self._forward_flops(0, number) if again else 0.0),
                    int8_flops=layer.int8_flops, peak_bytes=block.peak_bytes, share=steps[block.index] / total,
                )
        return found

    def _forward_flops(self, first: int, stop: int) -> float:
        """Of a forward pass through these layers, heads left out, per sample."""
        return math.fsum(self._figures.layer(number).forward_flops for number in range(first, stop))

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        rows = []
        for block, after in itertools.zip_longest(self.blocks, self.blocks[1:]):
            names = self._units(block.first, block.stop)
            filters = [layer.filters for layer in self.net.layers[block.first:block.stop]]
            rows.append([
                str(block.index + 1), names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}",
                ", ".join("–" if count is None else str(count) for count in filters), str(block.batch),
                f"{block.peak_bytes / 2**20:,.1f}",
                "–" if after is None or self._cache == "none" else f"{self._feed.cache_bytes(after) / 2**20:,.1f}",
            ])
        return ("block", "units", "filters", "batch", "predicted\nMiB", "cache\nMiB"), rows

    def close(self, finished: bool) -> None:
        self._feed.close(finished)
