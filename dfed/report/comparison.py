"""What the runs of a comparison come to: read from their folders, with mean and standard deviation over the seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dfed.comparison import Comparison, PlannedRun, progress_of
from dfed.report.comparison_plans import EntryPlans, PlanFigures, plans_of_entry, plans_of_run

__all__ = ["Outcome", "Point", "Results", "Spread", "gather", "read_run", "spread_of"]

State = Literal["finished", "failed", "unfinished", "not run"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """The run up to one evaluation: rounds completed, bytes in both directions, simulated seconds, joules; and the accuracy."""

    rounds: int
    num_bytes: int
    sim_time_s: float
    energy_j: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run.

    Attributes:
        state: ``finished``: ended in order; ``failed``: tried and not, or its folder is damaged; ``unfinished``: begun; or
            ``not run``.
        reason: Why it failed, or None.
        values: Its figures by name, those of finished runs only; None where there is none. See docs/compare.md.
        curve: Its evaluations, in order.
        tiers: Entries ``tiers`` of its summary.
        plans: What it comes to by its plans' options, as :func:`dfed.report.comparison_plans.plans_of_run` gives it.
        summary, environment: Its files of these names; empty if it is not finished.
    """

    label: str
    seed: int
    state: State
    reason: str | None = None
    values: Mapping[str, float | None] = field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    tiers: Sequence[Mapping[str, Any]] = ()
    plans: Mapping[str, PlanFigures] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """``count`` values: their mean, and their sample standard deviation (n − 1), None for fewer than two."""

    mean: float | None
    std: float | None
    count: int


def spread_of(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation of the values that are there."""
    there = [value for value in values if value is not None]
    if not there:
        return Spread(None, None, 0)
    return Spread(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there))


@dataclass(frozen=True, kw_only=True)
class Results:
    """All runs of a comparison, finished or not.

    Attributes:
        target: Accuracy that time and energy are counted to; None if there is none.
        target_is_given: Whether the config names it, rather than it following from the reference.
    """

    comparison: Comparison
    outcomes: tuple[Outcome, ...]
    target: float | None
    target_is_given: bool

    def of(self, label: str, state: State | None = "finished") -> list[Outcome]:
        """An entry's runs in this state (None: any), in the order of the seeds."""
        return [run for run in self.outcomes if run.label == label and state in (None, run.state)]

    def spread(self, label: str, name: str) -> Spread:
        """Of one figure, over an entry's finished runs."""
        return spread_of([run.values.get(name) for run in self.of(label)])

    def plans(self, label: str) -> EntryPlans:
        """Who took part with which plan, means over an entry's finished runs."""
        return plans_of_entry([run.plans for run in self.of(label)])

    @property
    def personalised(self) -> str | None:
        """The figure of accuracy on the clients' own class mixes: on the test set if some finished run has it, else on
        ``metrics.split``; None if none has one."""
        names = ("test_personalised_accuracy", "personalised_accuracy")
        return next((name for name in names if any(run.values.get(name) is not None for run in self.finished)), None)

    @property
    def has_device_models(self) -> bool:
        """Whether some device of some finished run uses another model than the global one."""
        return any(name != "global" for run in self.finished for name in (run.summary.get("devices") or {}).get("using", ()))

    @property
    def finished(self) -> list[Outcome]:
        """All finished runs."""
        return [run for run in self.outcomes if run.state == "finished"]

    @property
    def tier_names(self) -> list[str]:
        """Of the fleet, in its order; empty while no run is finished."""
        return [tier["name"] for tier in self.finished[0].tiers] if self.finished else []


def gather(comparison: Comparison, folder: Path) -> Results:
    """Read all runs of a comparison from its folder."""
    read = [read_run(folder / "runs" / run.name, run) for run in comparison.runs]
    reached = spread_of([run.values.get("accuracy") for run in read if run.label == comparison.reference])
    given, target = comparison.target_accuracy is not None, comparison.target_accuracy
    if target is None and reached.mean is not None:
        target = comparison.target_share * reached.mean
    reference = {run.seed: run.values.get("accuracy") for run in read if run.label == comparison.reference}
    outcomes = tuple(_completed(run, target, reference.get(run.seed)) for run in read)
    return Results(comparison=comparison, outcomes=outcomes, target=target, target_is_given=given)


def read_run(folder: Path, run: PlannedRun) -> Outcome:
    """One run as its folder tells it. Beside it, ``FOLDER.failed`` holds why the last try failed.

    A run that calls itself finished has failed if its files cannot be read, or do not have every round once and in order.
    """
    label, seed, failed = run.label, run.seed, folder.with_name(f"{folder.name}.failed")
    progress = progress_of(folder)
    if progress != "finished":
        if failed.is_file():
            return Outcome(label=label, seed=seed, state="failed", reason=failed.read_text(encoding="utf-8").strip())
        return Outcome(label=label, seed=seed, state="not run" if progress == "new" else "unfinished")
    try:
        summary, environment = (json.loads((folder / name).read_text(encoding="utf-8"))
                                for name in ("summary.json", "environment.json"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        clients = [line for line in lines if line["kind"] == "client"]
        values = _values(summary, clients)
        plans = plans_of_run(clients, _num_clients(summary), summary.get("full_needed_bytes"))
        rounds = [line for line in lines if line["kind"] == "round"]
        _check_rounds([line["round"] for line in rounds], run.config.rounds)
        curve = _curve(rounds)
        if not isinstance(environment, dict) or any(isinstance(value, (str, list, dict)) for value in values.values()):
            raise TypeError("a value is not of its kind")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        what = str(error) if isinstance(error, _RoundsMissing) else f"{type(error).__name__}: {error}"
        reason = f"its folder cannot be used: {what}; move {folder} away, and the next call runs it anew"
        return Outcome(label=label, seed=seed, state="failed", reason=reason)
    return Outcome(label=label, seed=seed, state="finished", values=values, curve=curve, tiers=summary["tiers"],
                   plans=plans, summary=summary, environment=environment)


class _RoundsMissing(ValueError):
    """The lines of a finished run are not those of all its rounds."""


def _check_rounds(found: Sequence[Any], rounds: int) -> None:
    if list(found) == list(range(rounds)):
        return
    missing = sorted(set(range(rounds)) - set(found))
    raise _RoundsMissing(f"{len(missing)} of {rounds} rounds missing in metrics.jsonl, the first of them round {missing[0]}"
                         if missing else f"metrics.jsonl does not have the {rounds} rounds once and in order")


def _values(summary: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """A finished run's figures, but for those that depend on other runs."""
    samples = {line["client"]: line["num_samples"] for line in clients if line["status"] == "completed"}
    measured = [line for line in clients if line["status"] == "completed" and line["peak_bytes"] is not None]
    peaks = {tier["name"]: [line["peak_bytes"] for line in measured if line["tier"] == tier["name"]]
             for tier in summary["tiers"]}
    needed, test = summary.get("full_needed_bytes"), summary.get("test")
    return {
        "accuracy": summary["accuracy"],
        **({} if test is None else {"test_accuracy": test["accuracy"]}),
        **_personalised_accuracies(summary),
        **_device_accuracies(summary),
        **{f"accuracy_{tier['name']}": tier["accuracy"] for tier in summary["tiers"]},
        "participation_clients": len(samples) / _num_clients(summary),
        "participation_data": _ratio(sum(samples.values()), summary.get("num_samples")),
        "peak_share": _ratio(max((max(found) for found in peaks.values() if found), default=None), needed),
        "peak_share_median": _ratio(max((statistics.median(found) for found in peaks.values() if found), default=None), needed),
        "oom": summary["clients"]["oom"],
        "bytes_up": summary["bytes"]["up"],
        "bytes_down": summary["bytes"]["down"],
        "sim_time_s": summary["sim_time_s"],
        "energy_j": summary["energy_j"],
        "time_s": summary["time_s"],
    }


def _personalised_accuracies(summary: Mapping[str, Any]) -> dict[str, float]:
    """Mean over the clients of the accuracy on their own class mixes, where there is one."""
    found = {"personalised_accuracy": summary.get("personalised_accuracy"),
             "test_personalised_accuracy": (summary.get("test") or {}).get("personalised_accuracy")}
    return {name: value for name, value in found.items() if value is not None}


def _device_accuracies(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Mean over the devices of the accuracy of the model that each of them uses, and the share of devices that have one."""
    test, devices = summary.get("test"), summary.get("devices") or {"using": {}, "without": 0}
    using = sum(devices["using"].values())
    on_test = {} if test is None else {"test_device_accuracy": test.get("device_accuracy")}
    return {"device_accuracy": summary.get("device_accuracy"), **on_test,
            "device_share": _ratio(using, using + devices["without"])}


def _num_clients(summary: Mapping[str, Any]) -> int:
    return sum(tier["clients"] for tier in summary["tiers"])


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _curve(rounds: Sequence[Mapping[str, Any]]) -> tuple[Point, ...]:
    points, num_bytes, sim_time_s, energy_j = [], 0, 0.0, 0.0
    for row in rounds:
        num_bytes += row["bytes"]["up"] + row["bytes"]["down"]
        sim_time_s += row["sim_time_s"]
        energy_j += row["energy_j"]
        if row.get("accuracy") is not None:
            points.append(Point(rounds=row["round"] + 1, num_bytes=num_bytes, sim_time_s=sim_time_s, energy_j=energy_j,
                                accuracy=row["accuracy"]))
    return tuple(points)


def _completed(run: Outcome, target: float | None, reference: float | None) -> Outcome:
    """The run with the figures that depend on others: what it took to the target, and the difference to the reference."""
    if run.state != "finished":
        return run
    first = next((point for point in run.curve if target is not None and point.accuracy >= target), None)
    accuracy = run.values["accuracy"]
    both = accuracy is not None and reference is not None
    values = {
        **run.values,
        "difference": accuracy - reference if both else None,  # type: ignore[operator]
        "target_rounds": first.rounds if first else None,
        "target_bytes": first.num_bytes if first else None,
        "target_time_s": first.sim_time_s if first else None,
        "target_energy_j": first.energy_j if first else None,
    }
    return replace(run, values=values)
