"""Ways to train a model by itself, and what each needs; and whether what a plan needs is there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dfed.blocks import cut, stage, train_only
from dfed.client import ClientSettings
from dfed.errors import ConfigError, DfedError, Fault
from dfed.models import Chain
from dfed.plan import Plan
from dfed.planner.bare import chain_costs
from dfed.planner.costs import Costs, with_batch
from dfed.planner.split import Split
from dfed.planner.store import Store

__all__ = ["MOST_SAMPLES", "Verdict", "Way", "largest_batch", "stage_ways", "too_few_values", "verdict_of", "ways", "why_not"]

MOST_SAMPLES = 65_536
"""No larger batch is looked for."""

Verdict = Literal["yes", "maybe", "no"]

_CPU = torch.device("cpu")
_TOO_FEW_VALUES = "Expected more than 1 value per channel"  # torch's words
_REASON = "a batch norm wants more than one value a channel to train, and with a batch of 1 it gets one"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train a model by itself, held to the budget by a hard cap.

    Attributes:
        name: What it is, for people.
        peak_bytes, needed_bytes: Predicted peak of the tensors, and the smallest budget that is sure to do; None where it
            cannot run at this batch size.
        verdict: Whether the budget asked about does; see :func:`verdict_of`.
        fits: Whether it is sure to.
        reason: Why it cannot run at this batch size, whatever the budget; None if it can.
        largest_batch: The largest that fits; 0: none.
        smallest_batch: The smallest that can run: 1, or 2 where a batch norm would see one value a channel.
        smallest_bytes: The smallest budget that is sure to do at that batch.
        trained_share: Parameters trained, of the model's.
        flops: Of one sample's visit.
    """

    name: str
    peak_bytes: int | None
    needed_bytes: int | None
    verdict: Verdict
    fits: bool
    reason: str | None
    largest_batch: int
    smallest_batch: int
    smallest_bytes: int
    trained_share: float
    flops: float


def ways(chain: Chain, settings: ClientSettings, budget_bytes: int | None, *, train: str | None = None,
         store: Store | None = None) -> list[Way]:
    """Ways to train ``chain`` by itself: all of it, with recomputed activations, its last units, a range.

    What trains the same parameters as a way before it is left out.

    Args:
        train: ``FIRST:LAST``: also training these units only, the others frozen. Without FIRST from the first unit on,
            without LAST to the last.

    Raises:
        UnknownName: If a unit of ``train`` does not exist.
        ConfigError: If ``train`` names no units with parameters.
    """
    rows = [_way("full training", chain, chain, settings, budget_bytes, store)]
    if not settings.activation_checkpointing:
        thrifty = settings.model_copy(update={"activation_checkpointing": True})
        with contextlib.suppress(DfedError):  # a unit that works in place cannot be computed twice
            rows.append(_way("full, activations recomputed", chain, chain, thrifty, budget_bytes, store))
    seen = [_trained(chain)]
    if not rows[0].fits:  # else the longest range is the chain
        longest, way = _longest_range(chain, settings, budget_bytes, store)
        if _trained(longest) not in seen:
            seen.append(_trained(longest))
            rows.append(way)
    if train is not None:
        model = _training_only(chain, _range(chain, train))
        if not _trained(model):
            raise ConfigError([Fault("--train", f"must name units with parameters to train, but '{train}' has none.")])
        if _trained(model) not in seen:
            rows.append(_way(f"{train} trained", model, chain, settings, budget_bytes, store))
    return rows


def stage_ways(chain: Chain, split: Split, settings: ClientSettings, budget_bytes: int | None,
               store: Store | None = None) -> list[Way]:
    """The stages of ``split``, as NeuLite trains them, one after another."""
    stages = [stage(chain, split.splitting, number) for number in range(len(split.peak_bytes))]
    return [
        _way(f"stage {number} of {len(stages)}", model, chain, settings, budget_bytes, store)
        for number, model in enumerate(stages, start=1)
    ]


def verdict_of(peak_bytes: int, needed_bytes: int, budget_bytes: int | None, enforce: str = "hard") -> Verdict:
    """Whether training with this predicted peak, that needs so much to be sure, stays within the budget (None: no limit).

    Args:
        enforce: As ``memory.enforce``. ``hard``: ``yes`` from what is needed on; ``no`` below the predicted peak; ``maybe``
            between the two, where the kernel's verdict is not promised. ``predicted``: ``yes`` from the predicted peak on,
            else ``no``. ``off``: ``yes``.
    """
    if enforce == "off" or budget_bytes is None or needed_bytes <= budget_bytes:
        return "yes"
    if peak_bytes > budget_bytes:
        return "no"
    return "yes" if enforce == "predicted" else "maybe"


def why_not(costs: Costs, plan: Plan) -> str | None:
    """Why training by ``plan`` cannot run at its batch size, whatever the budget; None if it can.

    That is so for a batch of 1 where a batch norm sees one value a channel. It does not follow from predictions at other
    batch sizes, so this one is made.
    """
    if min(phase.batch_size for phase in plan.phases) > 1:
        return None
    try:
        costs.peak_bytes_at(plan)
    except ValueError as error:
        reason = too_few_values(error)
        if reason is None:
            raise
        return reason
    return None


def too_few_values(error: ValueError) -> str | None:
    """What torch's refusal to train a batch norm on one value a channel means here; None for any other error."""
    return _REASON if _TOO_FEW_VALUES in str(error) else None


def largest_batch(costs: Costs, plan: Plan, budget_bytes: int | None) -> int:
    """The largest batch size, up to :data:`MOST_SAMPLES`, at which the plan runs and fits the budget; 0: none."""
    try:
        size = costs.largest_batch(plan, budget_bytes, MOST_SAMPLES)
    except ValueError as error:  # the search tried a batch of 1
        if too_few_values(error) is None:
            raise
        size = 1
    if size != 1 or why_not(costs, with_batch(plan, 1)) is None:
        return size
    return 2 if costs.fits(with_batch(plan, 2), budget_bytes) else 0


def _range(chain: Chain, text: str) -> tuple[str, ...]:
    """The units that ``FIRST:LAST``, ``FIRST:``, ``:LAST`` or the name of one unit stands for."""
    names = chain.unit_names
    if text in names:
        return (text,)
    first, colon, last = text.partition(":")
    if not first and not last:
        raise ConfigError([Fault("--train", f"must be FIRST:LAST, FIRST: or :LAST, but is '{text}'.")])
    start = chain.index_of(first) if first or not colon else 0
    found = names[start:chain.index_of(last) + 1 if last else len(names)]
    if not found:
        raise ConfigError([Fault("--train", f"must name units in the order of the chain, but is '{text}'.")])
    return found


def _training_only(chain: Chain, units: Sequence[str]) -> Chain:
    model = cut(chain)
    train_only(model, units)
    return model


def _trained(model: Chain) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _longest_range(chain: Chain, settings: ClientSettings, budget_bytes: int | None, store: Store | None) -> tuple[Chain, Way]:
    """Training of as many of the last units as fit; of the last one that has parameters if none do.

    Each unit more needs more, so the first that fits is found by halving.
    """
    names = chain.unit_names

    def fits_from(start: int) -> bool:
        costs, plan = chain_costs(_training_only(chain, names[start:]), settings, _CPU, store)
        return why_not(costs, plan) is None and (
            budget_bytes is None or costs.budget_of(costs.peak_bytes_at(plan)) <= budget_bytes)

    last = max(place for place, name in enumerate(names) if any(True for _ in chain.unit(name).parameters()))
    low, high = -1, last  # nothing before or at low fits
    if fits_from(high):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits_from(middle) else (middle, high)
    model = _training_only(chain, names[high:])
    return model, _way(f"{names[high]} to the end trained", model, chain, settings, budget_bytes, store)


def _way(
    name: str, model: Chain, whole: Chain, settings: ClientSettings, budget_bytes: int | None, store: Store | None
) -> Way:
    costs, plan = chain_costs(model, settings, _CPU, store)
    reason = why_not(costs, plan)
    smallest = 1 if why_not(costs, with_batch(plan, 1)) is None else 2
    peak, needed = (None, None) if reason else (costs.peak_bytes(plan), costs.budget_bytes(plan))
    verdict = "no" if peak is None or needed is None else verdict_of(peak, needed, budget_bytes)
    return Way(
        name=name, peak_bytes=peak, needed_bytes=needed, verdict=verdict, fits=verdict == "yes", reason=reason,
        largest_batch=largest_batch(costs, plan, budget_bytes), smallest_batch=smallest,
        smallest_bytes=costs.budget_bytes(with_batch(plan, smallest)), trained_share=_share(model, whole),
        flops=_per_visit(costs, plan),
    )


def _share(model: Chain, whole: Chain) -> float:
    sizes = {name: parameter.numel() for name, parameter in whole.named_parameters()}
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return sum(sizes.get(name, 0) for name in trained) / sum(sizes.values())


def _per_visit(costs: Costs, plan: Plan) -> float:
    once = replace(plan, phases=tuple(replace(phase, batch_size=1, epochs=None, steps=1) for phase in plan.phases[:1]))
    return costs.flops(once, 1)
