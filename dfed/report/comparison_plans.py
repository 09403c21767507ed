"""Participation by plan: which clients took part with which sub-model, as the options of their plans tell it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfed.faults import shown

__all__ = ["MOST_PLANS", "EntryPlans", "PlanFigures", "PlanRow", "plans_of_entry", "plans_of_run"]

MOST_PLANS = 12
"""An entry with more different plans is not listed plan by plan."""


@dataclass(frozen=True, kw_only=True)
class PlanFigures:
    """What one run comes to with one plan.

    Attributes:
        options: Of the plan, as the clients' lines have them; empty for the full model.
        clients: Share of the fleet's clients that completed a round with it.
        turns: Clients' lines with it, completed or not.
        peak_share: Median measured peak of its completed turns, as a share of what training the full model needs; None: none
            was measured.
        bytes_up, time_s, sim_time_s: Medians over its completed turns; None: there is none.
    """

    options: Mapping[str, Any]
    clients: float
    turns: int
    peak_share: float | None
    bytes_up: float | None
    time_s: float | None
    sim_time_s: float | None


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What an entry comes to with one plan: means over its finished runs, of what may be None over those that have it.

    Attributes:
        plan: The options that vary within the entry, as text: ``rate=0.5``; or ``full model``, where there are none.
    """

    plan: str
    options: Mapping[str, Any]
    clients: float
    turns: float
    peak_share: float | None
    bytes_up: float | None
    time_s: float | None
    sim_time_s: float | None


@dataclass(frozen=True, kw_only=True)
class EntryPlans:
    """An entry's plans.

    Attributes:
        count: Different ones; 0 if no plan has options.
        rows: One each, by their options in ascending order, the full model last; empty if there are more than ``MOST_PLANS``.
    """

    count: int
    rows: tuple[PlanRow, ...]


def plans_of_run(clients: Sequence[Mapping[str, Any]], num_clients: int, needed_bytes: float | None) -> dict[str, PlanFigures]:
    """What a run comes to with each different plan, by the plan's options as JSON.

    Args:
        clients: The clients' lines of ``metrics.jsonl``.
        num_clients: Of the fleet.
        needed_bytes: What training the full model needs; None if that is not known.
    """
    turns: dict[str, list[Mapping[str, Any]]] = {}
    for line in clients:
        turns.setdefault(json.dumps(line.get("plan", {}), sort_keys=True), []).append(line)
    found = {}
    for key, lines in turns.items():
        completed = [line for line in lines if line["status"] == "completed"]
        peaks = [line["peak_bytes"] for line in completed if line["peak_bytes"] is not None]
        found[key] = PlanFigures(
            options=dict(lines[0].get("plan", {})), clients=len({line["client"] for line in completed}) / num_clients,
            turns=len(lines), peak_share=statistics.median(peaks) / needed_bytes if peaks and needed_bytes else None,
            **{name: _median([line.get(name) for line in completed]) for name in ("bytes_up", "time_s", "sim_time_s")},
        )
    return found


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def plans_of_entry(runs: Sequence[Mapping[str, PlanFigures]]) -> EntryPlans:
    """What an entry comes to with each different plan. ``runs``: of its finished runs, as :func:`plans_of_run` gives them."""
    options = {key: figures.options for run in runs for key, figures in run.items()}
    if not any(options.values()):
        return EntryPlans(count=0, rows=())
    if len(options) > MOST_PLANS:
        return EntryPlans(count=len(options), rows=())
    names = _that_vary(list(options.values()))
    rows = []
    for key in sorted(options, key=lambda key: _order(options[key])):
        there = [run[key] for run in runs if key in run]
        said = {name: f"{name}={shown(value)}" for name, value in options[key].items()}
        told = [text for name, text in said.items() if name in names] or list(said.values())
        rows.append(PlanRow(
            plan=", ".join(told) or "full model", options=options[key],
            clients=sum(figures.clients for figures in there) / len(runs),
            turns=sum(figures.turns for figures in there) / len(runs),
            **{name: _mean([getattr(figures, name) for figures in there])
               for name in ("peak_share", "bytes_up", "time_s", "sim_time_s")},
        ))
    return EntryPlans(count=len(rows), rows=tuple(rows))


def _that_vary(options: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the options that tell these plans apart; all of them if there is one plan only."""
    names = {name for each in options for name in each}
    vary = {name for name in names if len({json.dumps(each[name], sort_keys=True) if name in each else None
                                           for each in options}) > 1}
    return vary or names


def _order(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sorts numbers by value, anything else as text, and the plan without options behind all others."""
    values = [(name, 0, value, "") if isinstance(value, (int, float)) else (name, 1, 0, json.dumps(value, sort_keys=True))
              for name, value in options.items()]
    return not options, values
