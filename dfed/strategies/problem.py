"""What a strategy works on, and what it may ask about a client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dfed.blocks import Splitting
from dfed.fleet import Cost, DeviceProfile
from dfed.models import Chain
from dfed.plan import Phase, Plan

__all__ = ["Candidate", "PlannerView", "Problem"]


class PlannerView(Protocol):
    """What a strategy may ask of the planner about one client; see :class:`dfed.planner.ClientPlanner`."""

    def fits(self, plan: Plan, *, time_s: float | None = None, upload_bytes: float | None = None) -> bool:
        """Whether the client can carry the plan out."""

    def best(self, plans: Iterable[Plan], *, time_s: float | None = None, upload_bytes: float | None = None) -> Plan | None:
        """The first of ``plans``, which stand in order of preference, that fits."""

    def largest_batch(self, plan: Plan, at_most: int, *, time_s: float | None = None) -> Plan | None:
        """The plan with the largest batch size that fits."""

    def cost(self, plan: Plan) -> Cost:
        """Simulated seconds and joules of a round with this plan."""


@dataclass(frozen=True)
class Candidate:
    """A client that might take part in a round, as a strategy sees it.

    Attributes:
        planner: What plans would cost this client, and which it can carry out. Plans that ran out of memory on a budget
            like its own do not fit.
        label_counts: Gives the client's samples of each class, int64 (num_classes,); None where the data were dealt out without
            regard to labels.
    """

    client: int
    round_index: int
    num_samples: int
    profile: DeviceProfile
    planner: PlannerView
    label_counts: Callable[[], np.ndarray | None] = lambda: None


def _fits_all(plan: Plan, budget_bytes: int | None) -> bool:
    return True


def _no_split(num_blocks: int | None) -> Splitting:
    raise AssertionError("this problem has no planner that splits its chain")


def _nothing_needed(plan: Plan) -> int:
    return 0


@dataclass(frozen=True)
class Problem:
    """What a strategy works on. The same on every rank.

    Attributes:
        chain: The full model, without storage (meta device).
        splitting: The chain's blocks.
        phases: Local training as configured.
        num_clients: Size of the fleet.
        seed: The run's seed.
        budgets: The different budgets of the fleet in bytes, ascending, None (no limit) last, and how many clients have each.
        tiers: Names of the fleet's tiers.
        rounds: How many rounds the run has.
        fits: Whether a plan of this strategy is sure to fit a budget in bytes (None: no limit), whoever has it.
        budget_bytes: The smallest budget that is sure to do for a plan of this strategy.
    """

    chain: Chain
    splitting: Splitting
    phases: tuple[Phase, ...]
    num_clients: int
    seed: int
    budgets: tuple[tuple[int | None, int], ...] = ()
    tiers: tuple[str, ...] = ()
    rounds: int = 1
    fits: Callable[[Plan, int | None], bool] = _fits_all
    split: Callable[[int | None], Splitting] = _no_split
    budget_bytes: Callable[[Plan], int] = _nothing_needed
