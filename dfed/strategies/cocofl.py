"""CoCoFL: each client trains a contiguous range of blocks, and holds the others frozen, as int8.

Source: Pfeiffer, Rapp, Khalili, Henkel, "CoCoFL: Communication- and Computation-Aware Federated Learning via Partial NN
Freezing and Quantization", TMLR 06/2023 (arXiv 2203.05468), and the behaviour of the authors' release.

Symbols: blocks 1 … n of the model; the range [i, j] that client c trains in round r; its limits T (time), M (memory) and S
(upload). Blocks before the range run forward in int8 and keep nothing; those after it run forward in int8 and pass the gradient
to their input; the range is trained in float32. A range is *maximal* if the client could not train one that contains it. One of
the maximal ranges is drawn, each with the same chance, anew each round; a client without any sits out.

Server: of the |C| clients that completed the round, those of U trained tensor k: w ← ρ · mean_U(w_c) + (1 − ρ) · w_old with
ρ = |U| / |C|: who froze it votes for the old value. The mean over U is weighted by samples.

T and S are the device's (``time_share``, ``upload_least`` and ``upload_most`` in the fleet), M its memory;
``server.deadline_s`` counts, too. All are kept by the planner, for every strategy that asks it.

Deviations: activations and gradients are quantised by their own range in each mini-batch, to 8 bits; the release uses 7 bits
and scales that trained blocks record and send along. Ours needs no first value and was off by 1 % where theirs was by 2 % and
more (docs/deviations.md). Frozen norms use the running statistics. The first and the last unit stay float32, as in the release.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from dfed import rng
from dfed.blocks import freeze_int8, train_only
from dfed.plan import Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["CoCoFL", "maximal_ranges"]


class CoCoFL(Strategy):
    """A range of blocks is trained, the others are frozen and held as int8 (Pfeiffer et al. 2023).

    Args:
        frozen: How frozen blocks are held and computed: ``int8``, or ``fp32``.
        int8_download: Whether blocks that a client will hold as int8 travel to it as int8: the same codes in the end.
    """

    def __init__(self, problem: Problem, *, frozen: Literal["int8", "fp32"] = "int8", int8_download: bool = True):
        super().__init__(problem)
        self.frozen, self.int8_download = frozen, int8_download
        units = range(len(problem.chain))
        self.plans = {(first, last): self._plan_of(first, last) for first in units for last in units[first:]}

    def training_key(self) -> list[Any]:
        return ["cocofl", self.frozen]

    def plan(self, state: ServerState, candidate: Candidate) -> Plan | None:
        client = candidate.client
        ranges = maximal_ranges(len(self.problem.chain),
                                lambda i, j: candidate.planner.fits(self.plans[i, j].for_client(client)))
        if not ranges:
            return None
        generator = rng.numpy_generator(self.problem.seed, "cocofl", candidate.round_index, client)
        return self.plans[ranges[int(generator.integers(len(ranges)))]].for_client(client)

    def _plan_of(self, first: int, last: int) -> Plan:
        """Training of the units from ``first`` to ``last``, both included."""
        names = self.problem.chain.unit_names
        train = names[first:last + 1]
        phases = tuple(replace(phase, train=train) for phase in self.problem.phases)
        down = {name: "int8" for name in self._quantised(first, last)} if self.int8_download else {}
        return Plan(client=0, hold=names, train=train, phases=phases, down=down, options={"first": first + 1, "last": last + 1})

    def _quantised(self, first: int, last: int) -> list[str]:
        """Units that are held as int8 around this range."""
        names = self.problem.chain.unit_names
        inner = range(1, len(names) - 1) if self.frozen == "int8" else range(0)
        return [names[number] for number in inner if not first <= number <= last]

    def build(self, plan: Plan) -> nn.Module:
        if "first" not in plan.options:
            return super().build(plan)
        first, last = plan.options["first"] - 1, plan.options["last"] - 1
        chain = self.problem.chain.skeleton()
        train_only(chain, plan.train)
        shapes = [chain.input_shape, *self.problem.chain.output_shapes().values()]
        quantised = self._quantised(first, last)
        for name in quantised:
            number = chain.index_of(name)
            before_another = chain.unit_names[number + 1] in quantised
            freeze_int8(chain.unit(name), shapes[number], passes_gradient=number > last, dense=not before_another)
        return chain

    def advance(self, old: ServerState, new: ServerState, metrics: Mapping[str, Any]) -> ServerState:
        return self.with_old_votes(old, new, metrics["senders"], metrics["clients"]["completed"])


def maximal_ranges(count: int, fits: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """The ranges [i, j] of 0 … count − 1 that fit and lie in no larger one that fits.

    Whatever lies in a range that fits is taken to fit as well, so that at most 2 · count ranges are looked at.

    Args:
        fits: Whether the range from the first to the second, both included, fits.
    """
    found: list[tuple[int, int]] = []
    end = 0  # of the longest range from here on, not included
    for start in range(count):
        reached = end = max(end, start)
        while reached < count and fits(start, reached):
            reached += 1
        if reached > end:
            found.append((start, reached - 1))
            end = reached
    return found
