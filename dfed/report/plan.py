"""The tables of ``dfed plan``, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console as Terminal
from rich.table import Table

from dfed.overview import Participation, TierRow
from dfed.planner import MOST_SAMPLES, UnitProfile, Way
from dfed.settings import format_bytes

__all__ = ["as_json", "show_fleet", "show_units", "show_ways"]

_MIB = 2**20


def as_json(title: dict[str, Any], strategies: Sequence[tuple[str, Sequence[TierRow], Participation]],
            ways: Sequence[Way] = (), units: Sequence[UnitProfile] = (),
            seconds: Sequence[tuple[float, float]] = ()) -> str:
    """Everything as one JSON object; bytes, seconds, joules and FLOPs as numbers in these units."""
    value = {
        **title,
        "strategies": [
            {"name": name, "tiers": [asdict(row) for row in rows], "participation": asdict(share)}
            for name, rows, share in strategies
        ],
        "ways": [asdict(way) for way in ways],
        "units": [asdict(unit) for unit in units],
        "unit_seconds": [list(pair) for pair in seconds],
    }
    return json.dumps(value, indent=2)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def show_fleet(strategies: Sequence[tuple[str, Sequence[TierRow], Participation]], terminal: Terminal) -> None:
    """One table for each strategy, a row for each tier, and what can take part."""
    for name, rows, share in strategies:
        table = _table(name, "clients", "fits", "budget\nMiB", "predicted\nMiB", "needs\nMiB", "largest\nbatch", "trained",
                       "down\nMiB", "up\nMiB", "GFLOP", "s", "J")
        for row in rows:
            fits = "yes" if row.able == row.clients else "no" if row.able == 0 else f"{row.able:,}"
            table.add_row(
                row.tier, f"{row.clients:,}", fits, _mib(row.budget_bytes), _mib(row.peak_bytes),
                _mib(row.smallest_bytes if row.peak_bytes is None else row.needed_bytes), _batch(row.largest_batch),
                _percent(row.trained_share), _mib(row.bytes_down), _mib(row.bytes_up), _number(row.flops, 1e9),
                _number(row.sim_time_s), _number(row.energy_j),
            )
        terminal.print(table)
        terminal.print(f"{name}: {_percent(share.clients)} of the clients can take part, with {_percent(share.data)} of the "
                       f"samples and {share.classes} of {share.num_classes} classes")
        for row in rows:
            if row.able == 0 and row.smallest_bytes is not None:
                terminal.print(f"  {row.tier}: a budget of {format_bytes(row.smallest_bytes)} would do")


def show_ways(ways: Sequence[Way], batch_size: int, budget_bytes: int | None, terminal: Terminal) -> None:
    """A row for each way to train the model."""
    table = _table(f"batch {batch_size}, budget {format_bytes(budget_bytes)}", "fits", "predicted\nMiB", "needs\nMiB",
                   "largest\nbatch", "trained", "MFLOP\na sample")
    for way in ways:
        verdict = "–" if budget_bytes is None else "yes" if way.fits else "no"
        table.add_row(way.name, verdict, _mib(way.peak_bytes), _mib(way.needed_bytes),
                      "–" if budget_bytes is None else _batch(way.largest_batch), _percent(way.trained_share),
                      _number(way.flops, 1e6))
    terminal.print(table)
    if budget_bytes is not None and not any(way.fits for way in ways):
        least = min(ways, key=lambda way: way.smallest_bytes)
        terminal.print(f"nothing fits {format_bytes(budget_bytes)} at batch {batch_size}; the least that is sure to do is "
                       f"{format_bytes(least.smallest_bytes)}, for '{least.name}' at a batch of 1")


def show_units(units: Sequence[UnitProfile], seconds: Sequence[tuple[float, float]], batch_size: int,
               terminal: Terminal) -> None:
    """A row for each unit of the model; ``seconds`` may be empty."""
    headings = ["unit", "output", "parameters", "bytes\nMiB", "forward\nMFLOP", "backward\nMFLOP", "kept\nKiB"]
    headings += ["forward\nms", "backward\nms"] if seconds else []
    table = _table(*headings)
    for number, unit in enumerate(units):
        times = [f"{1e3 * value:.2f}" for value in seconds[number]] if seconds else []
        table.add_row(unit.name, " × ".join(map(str, unit.output_shape)), f"{unit.num_params:,}", _mib(unit.state_bytes),
                      _number(unit.forward_flops, 1e6), _number(unit.backward_flops, 1e6),
                      f"{unit.activation_bytes / 1024:,.0f}", *times)
    terminal.print(table)
    measured = f"; times measured here on a mini-batch of {batch_size}" if seconds else ""
    terminal.print(f"FLOP and kept activations are for one sample{measured}")


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / _MIB:,.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %" if value in (0, 1) or value >= 0.1 else f"{100 * value:.1f} %"


def _number(value: float | None, unit: float = 1.0) -> str:
    if value is None:
        return "–"
    value /= unit
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _batch(value: int) -> str:
    return f"≥ {value:,}" if value == MOST_SAMPLES else f"{value:,}"
