"""The files of a comparison: Markdown, JSON, CSV and the figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import dfed
from dfed.metrics import finite
from dfed.report.comparison import Outcome, Results
from dfed.report.comparison_text import Origin, as_markdown
from dfed.report.figures import draw

__all__ = ["as_json", "runs_csv", "summary_csv", "write_report"]


def write_report(results: Results, folder: Path, *, config: str, command: str) -> Path:
    """Write all files into the folder of a comparison; returns the report's.

    Args:
        config: The config file and its overrides, as they were given.
        command: The command line.
    """
    origin = Origin(config=config, command=command, date=datetime.now().astimezone().isoformat(timespec="seconds"),
                    figure=draw(results, folder))
    for name, content in {
        "comparison.md": as_markdown(results, origin), "comparison.json": as_json(results, origin),
        "comparison.csv": runs_csv(results), "comparison_mean.csv": summary_csv(results),
    }.items():
        partial = folder / f".{name}.partial"
        partial.write_text(content, encoding="utf-8")
        partial.replace(folder / name)
    return folder / "comparison.md"


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
        "target_share": None if results.target_is_given else comparison.target_share,
        "quick": None if comparison.quick is None else asdict(comparison.quick),
        "entries": [
            {"label": label, "figures": {name: asdict(results.spread(label, name)) for name in names},
             "plans": asdict(results.plans(label))}
            for label in comparison.labels
        ],
        "runs": [
            {**_plain_run(run), "config": planned.config.to_dict()}
            for run, planned in zip(results.outcomes, comparison.runs, strict=True)
        ],
    }
    return json.dumps(finite(value), indent=1) + "\n"


def _plain_run(run: Outcome) -> dict[str, Any]:
    """A run as JSON values; who took part with which plan stands with the entries, where it is kept short."""
    return {name: value for name, value in asdict(run).items() if name != "plans"}
