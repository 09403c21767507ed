"""Splitting: where to cut a chain into blocks so that the stage that needs most memory needs as little as can be.

A stage is what :func:`dfed.blocks.stage` builds: the frozen blocks before it, the tail of the last of them, the block, and
an output module for the blocks to come. Its peak depends on all cuts from its own start on, but on those behind its block only
through what the output module holds, which a few figures tell (:class:`dfed.planner.stage_parts.Rest`), and a peak is no less
where one of them is more. So this is dynamic programming over cut points, from the last block to the first: of two choices of
blocks for the same last units one is dropped if the other is no worse in its largest stage peak and in every figure. The choice
with the smallest bound from below is taken up first, and the first complete one is the best.

Peaks are added up from records of single units, which agree with predictions of whole stages to the byte as long as units share
no memory but the tensors between them. The chosen stages, and full training, are predicted as well. Where a record or one of
these says otherwise, the peak of every stage that the search meets is predicted, and nothing is dropped but choices with the
same layers standing in: as exact, but the time doubles with each unit.
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dfed.blocks import Splitting, stage
from dfed.client import ClientSettings
from dfed.errors import ConfigError, Fault
from dfed.models import Chain
from dfed.planner.bare import chain_costs
from dfed.planner.stage_costs import StageCosts
from dfed.planner.stage_parts import Rest, step_between
from dfed.planner.store import Store, describe
from dfed.planner.unit_courses import NoSum

__all__ = ["Split", "split_chain", "stage_peaks"]

_CPU = torch.device("cpu")


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
            block), or cannot be cut into so many blocks for which layers can stand in.
    """
    body = _body(chain)
    if num_blocks is not None and not 1 <= num_blocks <= body:
        message = f"must be at least 1 and at most {body}, the units of '{chain.name}' before its last, but is {num_blocks}."
        raise ConfigError([Fault("num_blocks", message)])
    passable = _passable(chain)
    possible = _possible_numbers(body, passable)
    if num_blocks is not None and num_blocks not in possible:
        message = f"must be one of {', '.join(map(str, possible))}, for '{chain.name}' has no other cuts where layers can "
        message += f"stand in for all blocks, but is {num_blocks}."
        raise ConfigError([Fault("num_blocks", message)])
    store = store or Store(None)
    depends = ["split", describe(chain), settings.model_dump(mode="json"), num_blocks, tail]
    search = _Search(chain, settings, num_blocks, tail, store, passable)
    splitting = splitting_at(chain, store.get(depends, search.best))
    peaks, full = stage_peaks(chain, splitting, settings, tail=tail, store=store)
    return Split(splitting, peaks, full)


def _body(chain: Chain) -> int:
    """How many units there are to be cut: all but the last, which goes with the one before it."""
    return max(1, len(chain) - 1)


def _passable(chain: Chain) -> set[tuple[int, int]]:
    """Blocks (first unit, end) behind the chain's start for which a layer can stand in."""
    shapes = [chain.input_shape, *chain.output_shapes().values()]
    known: dict[tuple[tuple[int, ...], ...], bool] = {}
    found = set()
    for start, stop in itertools.combinations(range(1, _body(chain) + 1), 2):
        key = (shapes[start], shapes[stop])
        if key not in known:
            known[key] = step_between(*key) is not None
        if known[key]:
            found.add((start, stop))
    return found


def _possible_numbers(body: int, passable: set[tuple[int, int]]) -> list[int]:
    """Into how many blocks the units can be cut."""
    counts: list[set[int]] = [set() for _ in range(body)] + [{0}]  # of blocks from a unit to the end
    for start in range(body - 1, -1, -1):
        stops = [stop for stop in range(start + 1, body + 1) if start == 0 or (start, stop) in passable]
        counts[start] = {number + 1 for stop in stops for number in counts[stop]}
    return sorted(counts[0])


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


@dataclass(frozen=True)
class _Choice:
    """Some last blocks: ``cuts`` are where they begin and, last, where the chain's body ends."""

    bound: float
    cuts: tuple[int, ...]
    rests: tuple[Rest, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.cuts) - 1


def _gradients(rests: Sequence[Rest]) -> tuple[object, ...]:
    return tuple(rest.input_gradient for rest in rests)


class _Search:
    """See the module's docstring."""

    def __init__(self, chain: Chain, settings: ClientSettings, num_blocks: int | None, tail: bool, store: Store,
                 passable: set[tuple[int, int]]):
        self._chain, self._settings, self._num_blocks, self._tail, self._store = chain, settings, num_blocks, tail, store
        self._body, self._passable = _body(chain), passable

    def best(self) -> tuple[int, ...]:
        """The units at which the best blocks begin, and last the end of the body."""
        if self._body == 1 or self._num_blocks == 1:
            return (0, self._body)
        try:
            costs = StageCosts(self._chain, self._settings, tail=self._tail)
            cuts = self._best_by_sums(costs)
        except NoSum:
            return self._best_by_predictions()
        return cuts if self._agrees(costs, cuts) else self._best_by_predictions()

    def _agrees(self, costs: StageCosts, cuts: Sequence[int]) -> bool:
        """Whether the sums are what is predicted, for these blocks and for full training."""
        peaks, full = stage_peaks(self._chain, splitting_at(self._chain, cuts), self._settings, tail=self._tail,
                                  store=self._store)
        return costs.peaks(cuts) == peaks and costs.peaks((0, self._body)) == (full,)

    def _starts_anywhere(self, stop: int) -> list[int]:
        return [start for start in range(stop) if start == 0 or (start, stop) in self._passable]

    def _starts(self, stop: int, num_blocks: int) -> list[int]:
        """Where a block that ends at ``stop`` may begin, if ``num_blocks`` come after it."""
        starts = self._starts_anywhere(stop)
        if self._num_blocks is None:
            return starts
        left = self._num_blocks - num_blocks - 1  # blocks that must still find room before it
        return [start for start in starts if (start >= left if left else start == 0)]

    def _best_by_sums(self, costs: StageCosts) -> tuple[int, ...]:
        before = self._bounds_before(costs)
        least = before[self._body][self._left(0)]
        heap: list[tuple[float, int, int, _Choice]] = [(least, 0, 0, _Choice(least, (self._body,), costs.rests_at_end()))]
        seen: dict[tuple[object, ...], list[tuple[float, ...]]] = {}
        count = itertools.count(1)
        while heap:
            choice = heapq.heappop(heap)[-1]
            start, number = choice.cuts[0], choice.num_blocks
            if start == 0:
                return choice.cuts
            label = (choice.bound, number, *(figure for rest in choice.rests for figure in rest.figures()))
            others = seen.setdefault((start, 0 if self._num_blocks is None else number, _gradients(choice.rests)), [])
            if any(all(map(operator.le, other, label)) for other in others):
                continue
            others.append(label)
            for first in self._starts(start, number):
                own = costs.peak(first, start, choice.rests)
                bound = max(choice.bound, own, before[first][self._left(number + 1)])
                rests = costs.rests_before(first, start, choice.rests) if first else ()
                if bound < math.inf:
                    heapq.heappush(heap, (bound, number + 1, next(count), _Choice(bound, (first, *choice.cuts), rests)))
        raise AssertionError("some choice is complete")

    def _left(self, num_blocks: int) -> int:
        return 0 if self._num_blocks is None else self._num_blocks - num_blocks

    def _bounds_before(self, costs: StageCosts) -> list[list[float]]:
        """By where the blocks chosen begin, and how many blocks are left (0: any number): no choice of those before it has
        a smaller largest peak. Behind each is the least of each figure that anything there can have."""
        least: list[list[tuple[Rest, ...]]] = [[] for _ in range(self._body)] + [[costs.rests_at_end()]]
        for start in range(self._body - 1, 0, -1):
            alike: dict[tuple[object, ...], list[tuple[Rest, ...]]] = {}
            for stop in range(start + 1, self._body + 1):
                for behind in least[stop] if (start, stop) in self._passable else ():
                    rests = costs.rests_before(start, stop, behind)
                    alike.setdefault(_gradients(rests), []).append(rests)
            least[start] = [tuple(map(Rest.least, zip(*rests, strict=True))) for rests in alike.values()]
        most = self._num_blocks or 0
        table = [[0.0] + [math.inf] * most]
        for stop in range(1, self._body + 1):
            row = [math.inf] * (most + 1)
            for start in self._starts_anywhere(stop):
                peak = min((costs.peak(start, stop, rests) for rests in least[stop]), default=math.inf)
                for left in range(most + 1) if self._num_blocks is None else range(1, most + 1):
                    row[left] = min(row[left], max(peak, table[start][max(0, left - 1)]))
            table.append(row)
        return table

    def _best_by_predictions(self) -> tuple[int, ...]:
        shapes = [self._chain.input_shape, *self._chain.output_shapes().values()]
        heap: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, (self._body,))]
        done = set()
        while heap:
            peak, number, cuts = heapq.heappop(heap)
            if cuts[0] == 0:
                return cuts
            same = (cuts[0], *(shapes[stop] for stop in cuts[1:]))
            if same in done:
                continue
            done.add(same)
            for first in self._starts(cuts[0], number):
                more = (first, *cuts)
                model = stage(self._chain, splitting_at(self._chain, (0, *more) if first else more), 1 if first else 0,
                              tail=self._tail)
                own = float(_peak_bytes(model, self._settings, self._store))
                heapq.heappush(heap, (max(peak, own), number + 1, more))
        raise AssertionError("some choice is complete")
