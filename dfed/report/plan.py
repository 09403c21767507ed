"""The tables of ``dfed plan``, and the same as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console as Terminal

from dfed.forecast import TierRow
from dfed.overview import Participation
from dfed.planner import MOST_SAMPLES, Split, UnitProfile, Way
from dfed.report.tables import add_row, make_table, say
from dfed.settings import format_bytes

__all__ = ["Findings", "as_json", "show"]

_MIB = 2**20
_LINE = 80


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that one ``dfed plan`` has to say.

    Attributes:
        model, num_params, batch_size: The model, its parameters, and the configured batch size.
        budget_bytes: The budget asked about; None: none was, or the config's fleet has its own.
        strategies: Name, rows and participation of each strategy looked at.
        ways, split: Ways to train the model by itself, and the splitting that was asked for.
        units: Profiles of the units; with ``seconds`` if they were measured, on mini-batches of ``measured_batch``.
    """

    model: str
    num_params: int
    batch_size: int
    budget_bytes: int | None
    strategies: Sequence[tuple[str, Sequence[TierRow], Participation]] = ()
    ways: Sequence[Way] = ()
    split: Split | None = None
    units: Sequence[UnitProfile] = ()
    seconds: Sequence[tuple[float, float]] = ()
    measured_batch: int | None = None


def as_json(findings: Findings) -> str:
    """Everything as one JSON object; bytes, seconds, joules and FLOPs as numbers in these units."""
    value = {
        "model": findings.model, "num_params": findings.num_params, "batch_size": findings.batch_size,
        "budget_bytes": findings.budget_bytes,
        "strategies": [
            {"name": name, "tiers": [asdict(row) for row in rows], "participation": asdict(share)}
            for name, rows, share in findings.strategies
        ],
        "ways": [asdict(way) for way in findings.ways],
        "splitting": [
            {"block": block, "units": list(units), "peak_bytes": peak} for block, units, peak in _blocks(findings.split)
        ],
        "units": [asdict(unit) for unit in findings.units],
        "unit_seconds": [list(pair) for pair in findings.seconds],
        "measured_batch_size": findings.measured_batch,
    }
    return json.dumps(value, indent=2)


def show(findings: Findings, terminal: Terminal) -> None:
    """Everything as tables, each with what there is to say about it."""
    if findings.units:
        _show_units(findings, terminal)
    if findings.ways:
        _show_ways(findings, terminal)
    for name, rows, share in findings.strategies:
        _show_strategy(name, rows, share, terminal)


def _blocks(split: Split | None) -> list[tuple[str, Sequence[str], int]]:
    """Name, units and predicted peak of each block's stage."""
    if split is None:
        return []
    return [(name, units, peak) for (name, units), peak in zip(split.splitting.blocks.items(), split.peak_bytes, strict=True)]


def _show_strategy(name: str, rows: Sequence[TierRow], share: Participation, terminal: Terminal) -> None:
    table = make_table(name, "clients", "fits", "budget\nMiB", "predicted\nMiB", "needs\nMiB", "largest\nbatch", "trained",
                       "down\nMiB", "up\nMiB", "GFLOP", "s", "J")
    for row in rows:
        add_row(table, [
            row.tier, f"{row.clients:,}", _fits(row), _budgets(row), _mib(row.peak_bytes),
            _mib(row.smallest_bytes if row.peak_bytes is None else row.needed_bytes), _batch(row.largest_batch),
            _percent(row.trained_share), _mib(row.bytes_down), _mib(row.bytes_up), _number(row.flops, 1e9),
            _number(row.sim_time_s), _number(row.energy_j),
        ])
    terminal.print(table)
    if any(row.budget_bytes != row.most_budget_bytes for row in rows):
        say(terminal, "budgets differ within a tier: its figures are those of the smallest")
    say(terminal, f"{name}: {_percent(share.clients)} of the clients can take part, with {_percent(share.data)} of the "
                  f"samples and {share.classes} of {share.num_classes} classes")
    for row in rows:
        if row.able == 0 and row.smallest_bytes is not None:
            say(terminal, f"  {row.tier}: a budget of {format_bytes(row.smallest_bytes)} would do")
        elif row.smallest_bytes is None:
            say(terminal, f"  {row.tier}: no budget would do: {row.reason}")


def _fits(row: TierRow) -> str:
    """``yes``, ``maybe`` or ``no`` where that goes for the whole tier, else how many: ``3``, or ``3–5`` if 2 are unsure."""
    for word, count in (("yes", row.able), ("maybe", row.unsure), ("no", row.clients - row.able - row.unsure)):
        if count == row.clients:
            return word
    return f"{row.able:,}" + (f"–{row.able + row.unsure:,}" if row.unsure else "")


def _budgets(row: TierRow) -> str:
    if row.budget_bytes == row.most_budget_bytes:
        return _mib(row.budget_bytes)
    return f"{_mib(row.budget_bytes)} to {'no limit' if row.most_budget_bytes is None else _mib(row.most_budget_bytes)}"


def _show_ways(findings: Findings, terminal: Terminal) -> None:
    ways, budget, batch = findings.ways, findings.budget_bytes, findings.batch_size
    table = make_table(f"batch {batch}, budget {format_bytes(budget)}", "fits", "predicted\nMiB", "needs\nMiB",
                       "largest\nbatch", "trained", "MFLOP\na sample")
    for way in ways:
        verdict = "–" if budget is None and way.reason is None else way.verdict
        add_row(table, [
            way.name, verdict, _mib(way.peak_bytes), _mib(way.needed_bytes),
            "–" if budget is None else _batch(way.largest_batch), _percent(way.trained_share), _number(way.flops, 1e6),
        ])
    terminal.print(table)
    for reason, names in _reasons(ways).items():
        say(terminal, f"does not run, on any budget: {', '.join(names)}: {reason}")
    if budget is not None and not any(way.fits for way in ways):
        least = min(ways, key=lambda way: way.smallest_bytes)
        sure = "is sure to fit" if any(way.verdict == "maybe" for way in ways) else "fits"
        say(terminal, f"nothing {sure} {format_bytes(budget)} at batch {batch}; the least that is sure to do is "
                      f"{format_bytes(least.smallest_bytes)}, for '{least.name}' at a batch of {least.smallest_batch}")
    for block, units, peak in _blocks(findings.split):
        text = f"{block}: peak {_mib(peak)} MiB: {', '.join(units)}"
        say(terminal, textwrap.fill(text, _LINE, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))


def _reasons(ways: Sequence[Way]) -> dict[str, list[str]]:
    """Names of the ways that cannot run, by the reason."""
    found: dict[str, list[str]] = {}
    for way in ways:
        if way.reason is not None:
            found.setdefault(way.reason, []).append(way.name)
    return found


def _show_units(findings: Findings, terminal: Terminal) -> None:
    seconds = findings.seconds
    headings = ["unit", "output", "parameters", "bytes\nMiB", "forward\nMFLOP", "backward\nMFLOP", "kept\nKiB"]
    headings += ["forward\nms", "backward\nms"] if seconds else []
    table = make_table(*headings)
    for number, unit in enumerate(findings.units):
        times = [f"{1e3 * value:.2f}" for value in seconds[number]] if seconds else []
        add_row(table, [
            unit.name, " × ".join(map(str, unit.output_shape)), f"{unit.num_params:,}", _mib(unit.state_bytes),
            _number(unit.forward_flops, 1e6), _number(unit.backward_flops, 1e6), f"{unit.activation_bytes / 1024:,.0f}", *times,
        ])
    terminal.print(table)
    measured = ""
    if seconds:
        measured = f"; times measured here on a mini-batch of {findings.measured_batch}"
        if findings.measured_batch != findings.batch_size:
            measured += f", not {findings.batch_size}, which might take more than half of the memory that is free here"
    say(terminal, f"FLOP and kept activations are for one sample{measured}")


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
