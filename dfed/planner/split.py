"""Splitting: where to cut a chain into blocks so that the stage that needs most memory needs as little as can be.

A stage is what :func:`dfed.blocks.stage` builds: the frozen blocks before it, the tail of the last of them, the block, and
an output module for the blocks to come. Its peak depends on all cuts from its own start on. The search goes from the last
block to the first: it takes up the most promising choice of last blocks first; a choice is judged by the
peaks of its stages and by a bound from below on those that are still to be cut; and a stage's peak is predicted, which
takes a fraction of a second, only when its choice is the most promising. The first complete choice taken up is the best. Of
two choices for the same last units, one is dropped that is nowhere better; this takes for granted that a stage needs no more
where what stands in for the blocks to come has fewer weights and smaller outputs.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dfed.blocks import Splitting, stage
from dfed.client import ClientSettings
from dfed.errors import ConfigError, Fault
from dfed.models import Chain
from dfed.planner.bare import chain_costs
from dfed.planner.profile import profile_chain
from dfed.planner.store import Store

__all__ = ["Split", "split_chain", "stage_peaks"]

_CPU = torch.device("cpu")
_BYTES = 4
_SLOTS = {"adam": 2, "adamw": 2}


@dataclass(frozen=True)
class Split:
    """A chain cut into blocks.

    Attributes:
        splitting: The blocks, ``b0`` … in the order of the chain.
        peak_bytes: Predicted peak of the tensors of each stage's training.
        full_peak_bytes: The same for training the whole chain.
    """

    splitting: Splitting
    peak_bytes: tuple[int, ...]
    full_peak_bytes: int

    @property
    def reduction(self) -> float:
        """By which share the largest stage's peak is below that of full training."""
        return 1 - max(self.peak_bytes) / self.full_peak_bytes


@dataclass(order=True)
class _Choice:
    """Some last blocks: ``cuts`` are where they begin and, last, where the chain's body ends."""

    bound: float
    start: int
    num_blocks: int
    cuts: tuple[int, ...] = field(compare=False)
    peak: float = field(compare=False)
    is_predicted: bool = field(compare=False)
    output: tuple[float, float] = field(compare=False)


def split_chain(chain: Chain, settings: ClientSettings, *, num_blocks: int | None = None, tail: bool = True,
                store: Store | None = None) -> Split:
    """Cut ``chain`` into the blocks with the smallest largest stage peak; among equals into the fewest.

    Args:
        settings: Batch size, optimiser and the like of local training.
        num_blocks: How many; None: as many as serve.
        tail: Whether a stage also trains the tail of the block before; see :func:`dfed.blocks.stage`.
        store: Keeps the answer.

    Raises:
        ConfigError: If the chain has fewer units before its last one than blocks are asked for (a chain of one unit is one
            block), or a block changes the shape of tokens.
    """
    body = _body(chain)
    if num_blocks is not None and not 1 <= num_blocks <= body:
        message = f"must be at least 1 and at most {body}, the units of '{chain.name}' before its last, but is {num_blocks}."
        raise ConfigError([Fault("num_blocks", message)])
    cuts = _Search(chain, settings, num_blocks, tail, store or Store(None)).best()
    splitting = splitting_at(chain, cuts)
    peaks, full = stage_peaks(chain, splitting, settings, tail=tail, store=store)
    return Split(splitting, peaks, full)


def _body(chain: Chain) -> int:
    """How many units there are to be cut: all but the last, which goes with the one before it."""
    return max(1, len(chain) - 1)


def splitting_at(chain: Chain, cuts: Sequence[int]) -> Splitting:
    """Blocks ``b0`` … that begin at the units ``cuts[:-1]``; the chain's last unit goes with the last block."""
    names = chain.unit_names
    ends = [*cuts[1:-1], len(names)]
    return Splitting({f"b{i}": names[start:end] for i, (start, end) in enumerate(zip(cuts[:-1], ends, strict=True))})


def stage_peaks(chain: Chain, splitting: Splitting, settings: ClientSettings, *, tail: bool = True,
                store: Store | None = None) -> tuple[tuple[int, ...], int]:
    """Predicted peaks of the tensors of every stage's training, and of full training, in bytes."""
    models = [stage(chain, splitting, index, tail=tail) for index in range(len(splitting.names))]
    whole = chain.skeleton().requires_grad_(True)
    peaks = [_peak_bytes(model, settings, store) for model in [*models, whole]]
    return tuple(peaks[:-1]), peaks[-1]


def _peak_bytes(model: Chain, settings: ClientSettings, store: Store | None) -> int:
    costs, plan = chain_costs(model, settings, _CPU, store)
    return costs.peak_bytes_at(plan)


class _Search:
    """The best-first search; see the module's docstring."""

    def __init__(self, chain: Chain, settings: ClientSettings, num_blocks: int | None, tail: bool, store: Store):
        self._chain, self._settings, self._num_blocks, self._tail, self._store = chain, settings, num_blocks, tail, store
        self._body = _body(chain)
        units = profile_chain(chain, store)
        recompute, half = settings.activation_checkpointing, settings.precision == "bf16"
        share = 0.0 if recompute else 0.5 if half else 1.0  # of the activations that are kept; a bound from below
        self._kept = [share * settings.batch_size * unit.activation_bytes for unit in units]
        self._outputs = [share * settings.batch_size * _BYTES * math.prod(unit.output_shape) for unit in units]
        self._weights = [_BYTES * unit.num_params for unit in units]
        dims = [len(unit.output_shape) for unit in units[:self._body]]
        # The layer behind a block holds the block's output while it makes its gradient, unless it averages over it.
        self._meets_gradient = [stop < self._body and len({*dims[stop - 1:]}) == 1 for stop in range(self._body + 1)]
        self._slots = _SLOTS.get(settings.optimizer, 1 if settings.momentum > 0 else 0)
        self._before = self._bounds_before()
        self._found: dict[tuple[int, ...], list[tuple[tuple[float, float], float]]] = {}

    def best(self) -> tuple[int, ...]:
        """The units at which the best blocks begin, and last the end of the body."""
        heap = [_Choice(0.0, self._body, 0, (self._body,), 0.0, True, (0.0, 0.0))]
        done: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
        while heap:
            choice = heapq.heappop(heap)
            if not choice.is_predicted:
                heapq.heappush(heap, self._predicted(choice))
                continue
            if choice.start == 0:
                return choice.cuts
            label = (choice.peak, *choice.output)
            seen = done.setdefault((choice.start, choice.num_blocks if self._num_blocks else 0), [])
            if any(all(a <= b for a, b in zip(other, label, strict=True)) for other in seen):
                continue
            seen.append(label)
            for start in self._starts(choice):
                heapq.heappush(heap, self._with_block(choice, start))
        raise AssertionError("some choice is complete")

    def _starts(self, choice: _Choice) -> range:
        """Where one more block may begin, before those chosen."""
        if self._num_blocks is None:
            return range(choice.start)
        left = self._num_blocks - choice.num_blocks - 1  # blocks that must still find room before it
        return range(1) if left == 0 else range(left, choice.start)

    def _with_block(self, choice: _Choice, start: int) -> _Choice:
        cuts = (start, *choice.cuts)
        peak = max(choice.peak, self._stage_bound(start, choice))
        bound = max(peak, self._before[start][self._left(choice.num_blocks + 1)])
        return _Choice(bound, start, choice.num_blocks + 1, cuts, choice.peak, False, self._output(cuts))

    def _predicted(self, choice: _Choice) -> _Choice:
        model = stage(self._chain, splitting_at(self._chain, (0, *choice.cuts) if choice.start else choice.cuts),
                      1 if choice.start else 0, tail=self._tail)
        own = float(_peak_bytes(model, self._settings, self._store))
        self._found.setdefault(choice.cuts[:2], []).append((self._output(choice.cuts[1:]), own))
        peak = max(choice.peak, own)
        bound = max(peak, self._before[choice.start][self._left(choice.num_blocks)])
        return _Choice(bound, choice.start, choice.num_blocks, choice.cuts, peak, True, choice.output)

    def _left(self, num_blocks: int) -> int:
        return 0 if self._num_blocks is None else self._num_blocks - num_blocks

    def _bound(self, start: int, stop: int) -> float:
        """No stage of these units needs less: weights, the optimiser's state, what their forward pass keeps, and the first
        gradient of the backward pass."""
        trained = sum(self._weights[start:stop])
        first = next((unit for unit in range(start, stop) if self._weights[unit]), stop)  # before it nothing is kept
        gradient = self._outputs[stop - 1] if first < stop and self._meets_gradient[stop] else 0.0
        return sum(self._weights[:stop]) + self._slots * trained + sum(self._kept[first:stop]) + gradient

    def _stage_bound(self, start: int, choice: _Choice) -> float:
        """The same for the stage whose block goes from ``start`` to the blocks chosen, with what stands in for these.

        Where a stage of the same units was predicted with less behind it, the additional weights come on top of its peak.
        """
        weights, outputs = choice.output
        bounds = [self._bound(start, choice.start) + (1 + self._slots) * weights]
        for (other_weights, other_outputs), peak in self._found.get((start, choice.start), []):
            if other_weights <= weights and other_outputs <= outputs:
                bounds.append(peak + (1 + self._slots) * (weights - other_weights))
        return max(bounds)

    def _output(self, cuts: tuple[int, ...]) -> tuple[float, float]:
        """Weights in bytes, and outputs in entries a sample, of the layers that stand in for these blocks, the first
        one's input apart."""
        shapes, names = self._chain.output_shapes(), self._chain.unit_names
        weights = outputs = 0.0
        for start, stop in itertools.pairwise(cuts):
            there = shapes[names[stop - 1]]
            here = shapes[names[start - 1]] if start else self._chain.input_shape
            entries = 9 if len(here) == len(there) == 3 else 6 if len(here) == 2 else 1  # for each two channels
            weights += _BYTES * entries * (here[-1] * there[-1] if len(here) == 2 else here[0] * there[0])
            outputs += math.prod(there)
        return weights, outputs

    def _bounds_before(self) -> list[dict[int, float]]:
        """By where the blocks chosen begin, and how many blocks are left (0: any number): the bound on what comes before."""
        most = self._num_blocks or 0
        table: list[dict[int, float]] = [dict.fromkeys(range(most + 1), 0.0)]
        for stop in range(1, self._body + 1):
            row = {}
            for left in range(most + 1):
                if self._num_blocks is None:
                    row[0] = min(max(table[start][0], self._bound(start, stop)) for start in range(stop))
                elif left == 0:
                    row[0] = math.inf  # units are left over, and no block to put them in
                else:
                    starts = [0] if left == 1 else list(range(left - 1, stop))
                    row[left] = min((max(table[s][left - 1], self._bound(s, stop)) for s in starts), default=math.inf)
            table.append(row)
        return table
