"""A comparison as text: tables for the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console as Terminal

import dfed
from dfed.metrics import finite
from dfed.report import tables
from dfed.report.comparison import TARGET_SHARE, Outcome, Results, Spread

__all__ = ["Origin", "as_json", "as_markdown", "runs_csv", "show", "summary_csv"]

_TERMINAL_WIDTH = 100
_MIB = 2**20


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
    for note in [*_notes(results), *_unfinished(results)]:
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
    columns = _columns(results)
    rows = [[column.cells[number] for column in columns] for number in range(len(columns[0].cells))]
    parts = [
        f"# Comparison: {origin.config}", _origin(results, origin), "## Fleet", _fleet(results), "## Results",
        "Mean ± sample standard deviation over the seeds.",
        _md_table([column.heading.replace("\n", " ") for column in columns], rows),
        _md_list(_notes(results)),
    ]
    if _unfinished(results):
        parts += ["## Runs that are not finished", _md_list(_unfinished(results))]
    if origin.figure:
        parts.append("![accuracy over rounds, bytes and simulated time](comparison.png)")
    return "\n\n".join(parts) + "\n"


def _origin(results: Results, origin: Origin) -> str:
    config, finished = results.comparison.runs[0].config, results.finished
    said = [
        ("command", f"`{origin.command}`"), ("date", origin.date),
        ("dfed", f"{dfed.__version__}, commit " + _all(finished, lambda run: run.environment.get("git_commit") or "unknown")),
        ("software", _all(finished, lambda run: _software(run.environment))),
        ("hardware", _all(finished, lambda run: _hardware(run.environment))),
        ("model", config.model.name), ("data", f"{config.data.dataset}, {config.partition.name} partition"),
        ("runs", f"{config.rounds} rounds, cohort {config.cohort}, evaluated on the {config.metrics.split} set"),
        ("memory.enforce", config.memory.enforce), ("seeds", ", ".join(map(str, results.comparison.seeds))),
    ]
    return _md_list([f"{name}: {text}" for name, text in said])


def _all(runs: Sequence[Outcome], ask: Callable[[Outcome], str]) -> str:
    """What the runs say, each answer once."""
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
    rows = [[tier["name"], f"{tier['clients']:,}", _mib(tier["budget_bytes"]), _percent(_over(tier["budget_bytes"], needed), 1)]
            for tier in run.tiers]
    said = f"Training the full model needs {_mib(needed)} MiB by prediction."
    return f"{said}\n\n" + _md_table(["tier", "clients", "budget, MiB", "budget, % of the full model's need"], rows)


def _columns(results: Results) -> list[_Column]:
    labels = list(results.comparison.labels)

    def column(heading: str, name: str, shown: Callable[[Spread], str]) -> _Column:
        cells = []
        for label in labels:
            spread = results.spread(label, name)
            cells.append("failed" if spread.count == 0 and not results.of(label) and results.of(label, "failed")
                         else shown(spread) + _partly(spread, len(results.of(label))))
        return _Column(heading, cells)

    def difference(spread: Spread) -> str:
        return _both(spread, 100, 2, "+")

    counts = [f"{len(results.of(label))} of {len(results.comparison.seeds)}" for label in labels]
    return [
        _Column("strategy", labels), _Column("seeds", counts),
        column("accuracy\n%", "accuracy", lambda spread: _both(spread, 100, 2)),
        column(f"against\n{results.comparison.reference}", "difference", difference),
        *(column(f"{name}\n%", f"accuracy_{name}", lambda spread: _both(spread, 100, 2)) for name in results.tier_names),
        column("clients\n%", "participation_clients", lambda spread: _both(spread, 100, 1)),
        column("data\n%", "participation_data", lambda spread: _both(spread, 100, 1)),
        column("median peak\n% of need", "peak_share_median", lambda spread: _both(spread, 100, 1)),
        column("largest\n% of need", "peak_share", lambda spread: _both(spread, 100, 1)),
        column("up\nMiB", "bytes_up", lambda spread: _both(spread, 1 / _MIB)),
        column("down\nMiB", "bytes_down", lambda spread: _both(spread, 1 / _MIB)),
        column("to target\ns", "target_time_s", _both),
        column("to target\nJ", "target_energy_j", _both),
        column("out of\nmemory", "oom", lambda spread: _both(spread, 1, 1)),
    ]


def _partly(spread: Spread, finished: int) -> str:
    """How many seeds a figure is from, where it is not from all."""
    return f" ({spread.count} of {finished})" if 0 < spread.count < finished else ""


def _both(spread: Spread, scale: float = 1.0, digits: int | None = None, sign: str = "") -> str:
    """``mean ± deviation`` in a unit; three digits that count, if none are said."""
    if spread.mean is None:
        return "–"
    mean = spread.mean * scale
    if digits is None:
        digits = max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 0
    text = f"{mean:{sign},.{digits}f}"
    return text if spread.std is None else f"{text} ± {spread.std * scale:,.{digits}f}"


def _notes(results: Results) -> list[str]:
    """What belongs to the tables."""
    comparison = results.comparison
    share = f"{100 * TARGET_SHARE:.0f} % of the mean accuracy of {comparison.reference}"
    target = ("no target accuracy: no run of the reference is finished" if results.target is None else
              f"target accuracy {100 * results.target:.2f} %, " + ("as configured" if results.target_is_given else share))
    notes = [f"{target}; time and energy are simulated, up to the first evaluation that reaches it"]
    notes.append("clients, data: share of the fleet that completed a round, and of the training samples that these own; "
                 "peak: measured peaks, median of a tier (the largest such) and largest, of what training the full model needs")
    for name in results.tier_names:
        budgets = {label: {tier["budget_bytes"] for run in results.of(label) for tier in run.tiers if tier["name"] == name}
                   for label in comparison.labels}
        if len(set().union(*budgets.values())) > 1:
            said = ", ".join(f"{label} {' and '.join(map(_mib, sorted(found, key=str)))}" for label, found in budgets.items()
                             if found)
            notes.append(f"warning: the budgets of tier {name} differ, as `settings` change what a share is of (MiB): {said}")
    return notes


def _unfinished(results: Results) -> list[str]:
    return [f"{run.label}, seed {run.seed}: {run.state}" + (f": {run.reason}" if run.reason else "")
            for run in results.outcomes if run.state != "finished"]


def _names(results: Results) -> list[str]:
    """All figures that a run has."""
    return list(dict.fromkeys(name for run in results.finished for name in run.values))


def runs_csv(results: Results) -> str:
    """One row a run, finished or not; shares and accuracies from 0 to 1, bytes, seconds, joules; empty: there is none."""
    names = _names(results)
    rows = [["label", "strategy", "seed", "state", "reason", *names, "params_sha256"]]
    configs = {run.label: run.config for run in results.comparison.runs}
    for run in results.outcomes:
        figures = [_plain(run.values.get(name)) for name in names]
        rows.append([run.label, configs[run.label].strategy.name, str(run.seed), run.state, run.reason or "", *figures,
                     run.summary.get("params_sha256", "")])
    return _csv(rows)


def summary_csv(results: Results) -> str:
    """One row an entry: mean, sample standard deviation and number of values of every figure."""
    names = _names(results)
    rows = [["label", "seeds", *(f"{name}_{what}" for name in names for what in ("mean", "std", "count"))]]
    for label in results.comparison.labels:
        spreads = [results.spread(label, name) for name in names]
        figures = [text for spread in spreads for text in (_plain(spread.mean), _plain(spread.std), str(spread.count))]
        rows.append([label, str(len(results.comparison.seeds)), *figures])
    return _csv(rows)


def _plain(value: float | None) -> str:
    return "" if value is None else repr(value)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def as_json(results: Results, origin: Origin) -> str:
    """Everything: where it comes from, the figures of entries and runs, configs, summaries and environments."""
    comparison, names = results.comparison, _names(results)
    value = {
        "config": origin.config, "command": origin.command, "date": origin.date, "dfed": dfed.__version__,
        "seeds": comparison.seeds, "reference": comparison.reference, "target_accuracy": results.target,
        "target_is_given": results.target_is_given,
        "entries": [
            {"label": label, "figures": {name: asdict(results.spread(label, name)) for name in names}}
            for label in comparison.labels
        ],
        "runs": [
            {**asdict(run), "config": planned.config.to_dict()}
            for run, planned in zip(results.outcomes, comparison.runs, strict=True)
        ],
    }
    return json.dumps(finite(value), indent=1) + "\n"


def _md_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _md_list(items: Sequence[str]) -> str:
    return "\n".join("- " + " ".join(item.split()) for item in items)


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / _MIB:,.1f}"


def _over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _percent(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"
