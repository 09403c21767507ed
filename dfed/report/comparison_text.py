"""A comparison as text: tables for the terminal, and Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console as Terminal

import dfed
from dfed.config import Config
from dfed.faults import shown
from dfed.report import tables
from dfed.report.comparison import Results, Spread
from dfed.report.comparison_plans import MOST_PLANS
from dfed.report.numbers import MIB, both, mib, number, percent, ratio

__all__ = ["Origin", "as_markdown", "show"]

_TERMINAL_WIDTH = 100
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a comparison comes from.

    Attributes:
        config: The config file and its overrides, as they were given.
        command: The command line.
        date: ISO 8601.
        figure: Whether ``comparison.png`` lies beside the tables.
    """

    config: str
    command: str
    date: str
    figure: bool


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: list[str]


def show(results: Results, terminal: Terminal) -> None:
    """The results as tables of at most 100 columns, as far as that can be, and what is to be said about them."""
    first, *rest = _columns(results)
    table: list[_Column] = [first]
    for column in rest:
        if len(table) > 1 and _width([*table, column]) > _TERMINAL_WIDTH:
            _print(table, terminal)
            table = [first]
        table.append(column)
    _print(table, terminal)
    if plans := _plan_columns(results):
        _print(plans, terminal)
    for note in [*_plan_notes(results), *_notes(results), *_unfinished(results)]:
        tables.say(terminal, textwrap.fill(note, _TERMINAL_WIDTH, subsequent_indent="  ", break_long_words=False))


def _width(columns: Sequence[_Column]) -> int:
    """Of the table as it is shown: two spaces part the columns, and one stands at either end."""
    return sum(2 + max(map(len, [*column.heading.split("\n"), *column.cells])) for column in columns)


def _print(columns: Sequence[_Column], terminal: Terminal) -> None:
    table = tables.make_table(*(column.heading for column in columns))
    for row in zip(*(column.cells for column in columns), strict=True):
        tables.add_row(table, row)
    terminal.print(table)


def as_markdown(results: Results, origin: Origin) -> str:
    """The whole report."""
    form = " --quick" if results.comparison.quick is not None else ""
    parts = [
        f"# Comparison: {origin.config}{form}", _origin(results, origin), "## Fleet", _fleet(results), "## Results",
        "Mean ± sample standard deviation over the seeds.",
        _md_columns(_columns(results)), _md_list(_notes(results)),
    ]
    if notes := _plan_notes(results):
        table = ["Means over the seeds.", _md_columns(plans)] if (plans := _plan_columns(results)) else []
        parts += ["## Participation by plan", *table, _md_list(notes)]
    if _unfinished(results):
        parts += ["## Runs that are not finished", _md_list(_unfinished(results))]
    if origin.figure:
        parts.append("![accuracy over rounds, bytes and simulated time](comparison.png)")
    return "\n\n".join(parts) + "\n"


def _origin(results: Results, origin: Origin) -> str:
    configs, finished = [run.config for run in results.comparison.runs], results.finished
    said = [
        ("command", f"`{origin.command}`"), ("date", origin.date),
        ("dfed", f"{dfed.__version__}, commit " + _all(finished, lambda run: run.environment.get("git_commit") or "unknown")),
        ("software", _all(finished, lambda run: _software(run.environment))),
        ("hardware", _all(finished, lambda run: _hardware(run.environment))),
        ("model", _all(configs, lambda each: each.model.name)),
        ("data", _all(configs, lambda each: f"{each.data.dataset}, {each.partition.name} partition")),
        ("runs", _all(configs, _length)),
        ("memory.enforce", _all(configs, lambda each: each.memory.enforce)),
        ("seeds", ", ".join(map(str, results.comparison.seeds))),
    ]
    return _md_list([f"{name}: {text}" for name, text in said])


def _length(config: Config) -> str:
    return f"{config.rounds} rounds, cohort {config.cohort}, evaluated on the {config.metrics.split} set"


def _quick(results: Results) -> str:
    """What was made short; empty if nothing was."""
    quick = results.comparison.quick
    if quick is None:
        return ""
    options = [f"{label}: {name} {shown(value)}" for label, group in quick.entries.items() if label in results.comparison.labels
               for name, value in group.items()]
    changes = [*(f"{key} {shown(value)}" for key, value in quick.settings.items()), *options]
    return "--quick, the short form" + (f", with {', '.join(changes)}" if changes else "")


def _all(runs: Sequence[T], ask: Callable[[T], str]) -> str:
    """What the runs, or their configs, say, each answer once: a sweep may be over anything."""
    return "; ".join(dict.fromkeys(map(ask, runs))) or "not known, as no run is finished"


def _software(environment: Mapping[str, Any]) -> str:
    packages = [f"{name} {version}" for name, version in environment.get("packages", {}).items()]
    return ", ".join([f"Python {environment.get('python')}", *packages])


def _hardware(environment: Mapping[str, Any]) -> str:
    gpu = f", {environment['gpu']}" if environment.get("gpu") else ""
    return (f"{environment.get('processor')}, {environment.get('cpus')} CPUs{gpu}; {environment.get('ranks')} rank(s) on "
            f"{environment.get('device')}, {environment.get('threads')} thread(s) each; {environment.get('system')}")


def _fleet(results: Results) -> str:
    if not results.finished:
        return "No run is finished."
    run = next(iter(results.of(results.comparison.reference)), results.finished[0])
    needed = run.summary.get("full_needed_bytes")
    rows = [[tier["name"], f"{tier['clients']:,}", *_budgets(tier, needed)] for tier in run.tiers]
    said = f"Training the full model needs {mib(needed)} MiB by prediction."
    fleets = [planned.config.fleet for planned in results.comparison.runs]
    if any(fleet != fleets[0] for fleet in fleets):
        said += f" The runs have different fleets; this is that of {run.label}."
    return f"{said}\n\n" + _md_table(["tier", "clients", "budget, MiB", "budget, % of the full model's need"], rows)


def _budgets(tier: Mapping[str, Any], needed: float | None) -> tuple[str, str]:
    """The smallest and the largest budget of a tier, if they differ, in MiB and in per cent of what full training needs."""
    ends = list(dict.fromkeys((tier["budget_bytes"], tier.get("most_budget_bytes", tier["budget_bytes"]))))
    words = [("no limit", "–") if end is None and len(ends) > 1 else (mib(end), percent(ratio(end, needed), 1))
             for end in ends]
    return " to ".join(word for word, _ in words), " to ".join(word for _, word in words)


def _columns(results: Results) -> list[_Column]:
    labels = list(results.comparison.labels)

    def column(heading: str, name: str, shown: Callable[[Spread], str]) -> _Column:
        cells = []
        for label in labels:
            spread = results.spread(label, name)
            cells.append("failed" if spread.count == 0 and not results.of(label) and results.of(label, "failed")
                         else shown(spread) + _partly(spread, len(results.of(label))))
        return _Column(heading, cells)

    counts = [f"{len(results.of(label))} of {len(results.comparison.seeds)}" for label in labels]
    return [
        _Column("strategy", labels), _Column("seeds", counts),
        column("accuracy\n%", "accuracy", lambda spread: both(spread, 100, 2)),
        *([column("test\n%", "test_accuracy", lambda spread: both(spread, 100, 2))] if _has_test(results) else []),
        *_personalised_columns(results, column),
        *_device_columns(results, column),
        column(f"against\n{results.comparison.reference}", "difference", lambda spread: both(spread, 100, 2, "+")),
        *(column(f"{name}\n%", f"accuracy_{name}", lambda spread: both(spread, 100, 2)) for name in results.tier_names),
        column("clients\n%", "participation_clients", lambda spread: both(spread, 100, 1)),
        column("data\n%", "participation_data", lambda spread: both(spread, 100, 1)),
        column("median peak\n% of need", "peak_share_median", lambda spread: both(spread, 100, 1)),
        column("largest\n% of need", "peak_share", lambda spread: both(spread, 100, 1)),
        column("up\nMiB", "bytes_up", lambda spread: both(spread, 1 / MIB)),
        column("down\nMiB", "bytes_down", lambda spread: both(spread, 1 / MIB)),
        column("to target\ns", "target_time_s", both),
        column("to target\nJ", "target_energy_j", both),
        column("out of\nmemory", "oom", lambda spread: both(spread, 1, 1)),
    ]


def _personalised_columns(results: Results, column: Callable[[str, str, Callable[[Spread], str]], _Column]) -> list[_Column]:
    """Mean accuracy on the clients' own class mixes, where that is known."""
    heading = "personal, test\n%" if results.personalised == "test_personalised_accuracy" else "personal\n%"
    return [column(heading, results.personalised, lambda spread: both(spread, 100, 2))] if results.personalised else []


def _device_columns(results: Results, column: Callable[[str, str, Callable[[Spread], str]], _Column]) -> list[_Column]:
    """Mean accuracy of the devices' own models, where they have any."""
    name, heading = ("test_device_accuracy", "devices, test\n%") if _has_test(results) else ("device_accuracy", "devices\n%")
    return [column(heading, name, lambda spread: both(spread, 100, 2)),
            column("have one\n%", "device_share", lambda spread: both(spread, 100, 1))] if results.has_device_models else []


def _has_test(results: Results) -> bool:
    return any(run.values.get("test_accuracy") is not None for run in results.finished)


def _plan_columns(results: Results) -> list[_Column]:
    """Who took part with which plan; empty where there is nothing to tell."""
    rows = [(label, row) for label in results.comparison.labels for row in results.plans(label).rows]
    if not rows:
        return []
    return [
        _Column("strategy", [label for label, _ in rows]), _Column("plan", [row.plan for _, row in rows]),
        _Column("clients\n%", [percent(row.clients, 1) for _, row in rows]),
        _Column("turns", [f"{row.turns:,.1f}" for _, row in rows]),
        _Column("median peak\n% of need", [percent(row.peak_share, 1) for _, row in rows]),
        _Column("up\nMiB", [number(row.bytes_up, 1 / MIB) for _, row in rows]),
        _Column("wall\ns", [number(row.time_s) for _, row in rows]),
        _Column("simulated\ns", [number(row.sim_time_s) for _, row in rows]),
    ]


def _plan_notes(results: Results) -> list[str]:
    counts = {label: results.plans(label).count for label in results.comparison.labels}
    notes = [f"plans of {label}: {count:,} different ones, which are listed up to {MOST_PLANS} only"
             for label, count in counts.items() if count > MOST_PLANS]
    if any(0 < count <= MOST_PLANS for count in counts.values()):
        notes.append("by plan: the options are those in metrics.jsonl; clients: share of the fleet that completed a round with "
                     "it; turns: completed or not; peak, up, wall, simulated: medians of a completed turn")
    return notes


def _partly(spread: Spread, finished: int) -> str:
    """How many seeds a figure is from, where it is not from all."""
    return f" ({spread.count} of {finished})" if 0 < spread.count < finished else ""


def _notes(results: Results) -> list[str]:
    """What belongs to the tables."""
    comparison = results.comparison
    share = f"{100 * comparison.target_share:g} % of the mean accuracy of {comparison.reference}"
    target = ("no target accuracy: no run of the reference is finished" if results.target is None else
              f"target accuracy {100 * results.target:.2f} %, " + ("as configured" if results.target_is_given else share))
    notes = [quick] if (quick := _quick(results)) else []
    notes.append(f"{target}; time and energy are simulated, up to the first evaluation that reaches it")
    if _has_test(results):
        notes.append("test: accuracy on the test set, of the last model, evaluated once; all other accuracies are those of "
                     "metrics.split")
    if results.personalised:
        notes.append("personal: mean over the fleet's clients of the global model's accuracy on each client's own class mix")
    if results.has_device_models:
        notes.append("devices: mean, over those of the fleet that have one, of the accuracy of the model that each can use, "
                     "its own width, depth or size, or else the global one; have one: their share")
    notes.append("clients, data: share of the fleet that completed a round, and of the training samples that these own; "
                 "peak: measured peaks, median of a tier (the largest such) and largest, of what training the full model needs")
    for name in results.tier_names:
        budgets = {label: {tier["budget_bytes"] for run in results.of(label) for tier in run.tiers if tier["name"] == name}
                   for label in comparison.labels}
        if len(set().union(*budgets.values())) > 1:
            said = ", ".join(f"{label} {' and '.join(map(mib, sorted(found, key=str)))}" for label, found in budgets.items()
                             if found)
            notes.append(f"warning: the budgets of tier {name} differ, as `settings` change what a share is of (MiB): {said}")
    return notes


def _unfinished(results: Results) -> list[str]:
    return [f"{run.label}, seed {run.seed}: {run.state}" + (f": {run.reason}" if run.reason else "")
            for run in results.outcomes if run.state != "finished"]


def _md_columns(columns: Sequence[_Column]) -> str:
    rows = [list(row) for row in zip(*(column.cells for column in columns), strict=True)]
    return _md_table([column.heading.replace("\n", " ") for column in columns], rows)


def _md_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _md_list(items: Sequence[str]) -> str:
    return "\n".join("- " + " ".join(item.split()) for item in items)
