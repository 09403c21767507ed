"""Ways to train a model by itself, and what each needs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dfed.blocks import Splitting, cut, stage, train_only
from dfed.client import ClientSettings
from dfed.errors import ConfigError, DfedError, Fault
from dfed.models import Chain
from dfed.plan import Plan
from dfed.planner.bare import chain_costs
from dfed.planner.costs import Costs, with_batch
from dfed.planner.split import split_chain
from dfed.planner.store import Store

__all__ = ["MOST_SAMPLES", "Way", "ways"]

MOST_SAMPLES = 65_536
"""No larger batch is looked for."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train a model by itself.

    Attributes:
        name: What it is, for people.
        peak_bytes, needed_bytes: Predicted peak of the tensors, and the smallest budget that is sure to do.
        fits: Whether that is within the budget asked about.
        largest_batch: The largest that fits; 0: none.
        smallest_bytes: The smallest budget that is sure to do at a batch of one.
        trained_share: Parameters trained, of the model's.
        flops: Of one sample's visit.
    """

    name: str
    peak_bytes: int
    needed_bytes: int
    fits: bool
    largest_batch: int
    smallest_bytes: int
    trained_share: float
    flops: float


def ways(chain: Chain, settings: ClientSettings, budget_bytes: int | None, *, train: str | None = None,
         split: int | None = None, any_split: bool = False, store: Store | None = None) -> list[Way]:
    """Ways to train ``chain`` by itself: all of it, with recomputed activations, its last units, a range, cut into blocks.

    Args:
        train: ``FIRST:LAST``: also training these units only, the others frozen.
        split: Also the best splitting into so many blocks, as NeuLite trains them; ``any_split``: into any number.

    Raises:
        UnknownName: If a unit of ``train`` does not exist.
        ConfigError: If the chain cannot be cut into so many blocks.
    """
    rows = [_way("full training", chain, chain, settings, budget_bytes, store)]
    if not settings.activation_checkpointing:
        thrifty = settings.model_copy(update={"activation_checkpointing": True})
        with contextlib.suppress(DfedError):  # a unit that works in place cannot be computed twice
            rows.append(_way("full, activations recomputed", chain, chain, thrifty, budget_bytes, store))
    rows.append(_longest_range(chain, settings, budget_bytes, store))
    if train is not None:
        first, _, last = train.partition(":")
        names = chain.unit_names[chain.index_of(first):chain.index_of(last or first) + 1]
        if not names:
            raise ConfigError([Fault("--train", f"must name units in the order of the chain, but is '{train}'.")])
        rows.append(_way(f"{train} trained", _training_only(chain, names), chain, settings, budget_bytes, store))
    if split is not None or any_split:
        found = split_chain(chain, settings, num_blocks=split, store=store)
        blocks = " | ".join("…".join(dict.fromkeys((units[0], units[-1]))) for units in found.splitting.blocks.values())
        rows += [
            _stage_way(f"stage {number + 1} of {blocks}", chain, found.splitting, number, settings, budget_bytes, store)
            for number in range(len(found.peak_bytes))
        ]
    return rows


def _training_only(chain: Chain, units: Sequence[str]) -> Chain:
    model = cut(chain)
    train_only(model, units)
    return model


def _longest_range(chain: Chain, settings: ClientSettings, budget_bytes: int | None, store: Store | None) -> Way:
    """Training of as many of the last units as fit; of the last one alone if none do.

    Each unit more needs more, so the first that fits is found by halving.
    """
    names = chain.unit_names

    def trained_from(start: int) -> Way:
        model = _training_only(chain, names[start:])
        return _way(f"{names[start]} to the end trained", model, chain, settings, budget_bytes, store)

    low, high = -1, len(names) - 1  # nothing before or at low fits
    best = trained_from(high)
    while best.fits and high - low > 1:
        middle = (low + high) // 2
        way = trained_from(middle)
        low, high, best = (low, middle, way) if way.fits else (middle, high, best)
    return best


def _stage_way(name: str, chain: Chain, splitting: Splitting, number: int, settings: ClientSettings, budget_bytes: int | None,
               store: Store | None) -> Way:
    return _way(name, stage(chain, splitting, number), chain, settings, budget_bytes, store)


def _way(
    name: str, model: Chain, whole: Chain, settings: ClientSettings, budget_bytes: int | None, store: Store | None
) -> Way:
    costs, plan = chain_costs(model, settings, _CPU, store)
    return Way(
        name=name, peak_bytes=costs.peak_bytes(plan), needed_bytes=costs.budget_bytes(plan),
        fits=costs.fits(plan, budget_bytes), largest_batch=costs.largest_batch(plan, budget_bytes, MOST_SAMPLES),
        smallest_bytes=costs.budget_bytes(with_batch(plan, 1)), trained_share=_share(model, whole),
        flops=_per_visit(costs, plan),
    )


def _share(model: Chain, whole: Chain) -> float:
    sizes = {name: parameter.numel() for name, parameter in whole.named_parameters()}
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return sum(sizes.get(name, 0) for name in trained) / sum(sizes.values())


def _per_visit(costs: Costs, plan: Plan) -> float:
    once = replace(plan, phases=tuple(replace(phase, batch_size=1, epochs=None, steps=1) for phase in plan.phases[:1]))
    return costs.flops(once, 1)
