"""Participation by plan: against counting by hand, and how it is told."""

from __future__ import annotations

import io
import json

import pytest
from compare_problem import load, write_run
from rich.console import Console

from dfed.report import comparison_files as files
from dfed.report import comparison_text as text
from dfed.report.comparison import gather, read_run
from dfed.report.comparison_plans import MOST_PLANS, EntryPlans, plans_of_entry, plans_of_run

ORIGIN = text.Origin(config="c.yaml", command="dfed", date="2026-01-02", figure=False)
HALF, WHOLE = {"rate": 0.5, "alone": False}, {"rate": 1.0, "alone": False}


def line(client, status="completed", peak=None, plan=None):
    return {"client": client, "status": status, "peak_bytes": peak, **({} if plan is None else {"plan": plan})}


def told(*plans):
    """How the rows of an entry whose run has these plans are called, in their order."""
    return [row.plan for row in plans_of_entry([plans_of_run([line(0, plan=plan) for plan in plans], 4, None)]).rows]


def test_the_figures_of_a_run():
    lines = [line(0, peak=300, plan=HALF), line(0, peak=500, plan=dict(reversed(HALF.items()))), line(1, peak=None, plan=HALF),
             line(2, "oom", 900, HALF), line(1, peak=700, plan=WHOLE), line(3, "failed", None, WHOLE)]
    half, whole = plans_of_run(lines, 5, 1000).values()
    assert (half.options, half.clients, half.turns, half.peak_share) == (HALF, 2 / 5, 4, 0.4)  # client 0 counts once
    assert (whole.options, whole.clients, whole.turns, whole.peak_share) == (WHOLE, 1 / 5, 2, 0.7)
    assert [figures.peak_share for figures in plans_of_run(lines, 5, None).values()] == [None, None]
    timed = [line(0, plan=HALF) | {"time_s": 1.0, "bytes_up": 6}, line(1, plan=HALF) | {"time_s": 4.0, "bytes_up": 8},
             line(1, "failed", plan=HALF) | {"time_s": 9.0, "bytes_up": 0}]
    (half,) = plans_of_run(timed, 5, 1000).values()
    assert (half.time_s, half.bytes_up, half.sim_time_s) == (2.5, 7, None)
    (plain,) = plans_of_run([line(0), line(1, plan={})], 2, 1).values()
    assert (plain.options, plain.turns) == ({}, 2)


def test_an_entry_is_the_mean_over_its_runs():
    runs = [plans_of_run([line(0, peak=200, plan=HALF), line(1, peak=600, plan=WHOLE)], 2, 1000),
            plans_of_run([line(0, peak=300, plan=HALF), line(1, peak=500, plan=HALF), line(1, plan=HALF)], 2, 1000)]
    found = plans_of_entry(runs)
    half, whole = found.rows
    assert found.count == 2
    assert (half.plan, half.clients, half.turns) == ("rate=0.5", (1 / 2 + 2 / 2) / 2, (1 + 3) / 2)
    assert half.peak_share == pytest.approx((0.2 + 0.4) / 2, rel=1e-15)  # a sum of two, rounded once
    assert (whole.plan, whole.clients, whole.turns, whole.peak_share) == ("rate=1.0", 1 / 4, 1 / 2, 0.6)  # no turn: no one
    assert plans_of_entry([]) == plans_of_entry([plans_of_run([line(0)], 2, 1)]) == EntryPlans(count=0, rows=())


def test_plans_are_called_by_what_varies():
    assert told({"stage": 10, "thawed": 0}, {"stage": 9, "thawed": 0}) == ["stage=9", "stage=10"]
    assert told({"stage": 1, "thawed": 0}, {"stage": 1, "thawed": 2}, {"stage": 0, "thawed": 2}) == [
        "stage=0, thawed=2", "stage=1, thawed=0", "stage=1, thawed=2"]
    assert told({"stage": 2}, {}) == ["stage=2", "full model"]
    assert told(HALF) == ["rate=0.5, alone=false"]  # nothing to tell it from
    assert told({"stage": 3, "shrinks": True}, {"stage": 3}) == ["stage=3", "shrinks=true"]
    assert told({"stage": 3, "shrinks": True}, {"stage": 2}, {"stage": 3}) == ["stage=2", "stage=3", "stage=3, shrinks=true"]
    assert told({"units": ["a", "b"]}, {"units": ["a"]}, {"units": None}, {"units": 2}) == [
        "units=2", "units=['a', 'b']", "units=['a']", "units=null"]


@pytest.fixture
def results(tmp_path):
    """`fedavg` without options, `fedprox` with three plans, and `exclusivefl` with one more than are listed."""
    many = [{"window": number} for number in range(MOST_PLANS + 1)]
    comparison = load(tmp_path, compare={"strategies": ["fedavg", "fedprox", "exclusivefl"], "seeds": 2})
    for run in comparison.runs:
        plans = {"fedavg": [], "fedprox": [{"stage": 2}, {"stage": 1}, {}], "exclusivefl": many}[run.label]
        completed = [(number % 4, 10) for number in range(MOST_PLANS)] if run.label == "exclusivefl" else [(0, 10), (1, 10)]
        write_run(tmp_path / "o" / "runs" / run.name, run.config, completed=completed, plans=plans)
    return gather(comparison, tmp_path / "o")


def test_the_report_has_the_plans(results):
    lines = text.as_markdown(results, ORIGIN).splitlines()
    start = lines.index("## Participation by plan")
    assert lines[start:start + 9] == [
        "## Participation by plan", "", "Means over the seeds.", "",
        "| strategy | plan | clients % | turns | median peak % of need | up MiB | wall s | simulated s |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
        "| fedprox | stage=1 | 25.0 | 1.0 | 80.0 | 1.50 | 0.250 | 12.0 |",
        "| fedprox | stage=2 | 25.0 | 1.0 | 60.0 | 1.50 | 0.250 | 12.0 |",
        "| fedprox | full model | 0.0 | 1.0 | – | – | – | – |",  # a turn that ran out of memory
    ]
    assert lines[start + 10] == "- plans of exclusivefl: 13 different ones, which are listed up to 12 only"
    assert lines[start + 11].startswith("- by plan: the options are those in metrics.jsonl")
    file = io.StringIO()
    text.show(results, Console(file=file, width=400, highlight=False))
    shown = file.getvalue()
    assert max(map(len, shown.splitlines())) <= 100
    assert [row.split() for row in shown.splitlines() if "stage=2" in row] == [
        ["fedprox", "stage=2", "25.0", "1.0", "60.0", "1.50", "0.250", "12.0"]]
    places = [shown.index(part) for part in ("accuracy", "stage=1", "plans of exclusivefl: 13", "target accuracy")]
    assert places == sorted(places)
    everything = json.loads(files.as_json(results, ORIGIN))
    plans = {entry["label"]: entry["plans"] for entry in everything["entries"]}
    assert plans["fedavg"] == {"count": 0, "rows": []}
    assert plans["fedprox"]["rows"][0] == {
        "plan": "stage=1", "options": {"stage": 1}, "clients": 0.25, "turns": 1.0, "peak_share": 0.8, "bytes_up": 1.5 * 2**20,
        "time_s": 0.25, "sim_time_s": 12.0}
    assert plans["exclusivefl"] == {"count": 13, "rows": []}
    assert "plans" not in everything["runs"][0]


def test_what_there_is_nothing_to_tell_of_is_left_out(results, tmp_path):
    comparison = load(tmp_path, compare={"strategies": ["fedavg"], "seeds": 2})
    assert "by plan" not in text.as_markdown(gather(comparison, tmp_path / "o"), ORIGIN)
    comparison = load(tmp_path, compare={"strategies": ["exclusivefl"], "seeds": 2})
    page = text.as_markdown(gather(comparison, tmp_path / "o"), ORIGIN)
    assert "## Participation by plan\n\n- plans of exclusivefl: 13 different ones, which are listed up to 12 only\n" in page
    run = comparison.runs[0]
    write_run(tmp_path / "bad", run.config, plans=[3])
    assert read_run(tmp_path / "bad", run).state == "failed"


def test_the_test_set_has_a_column_if_any_run_has_it(results, tmp_path):
    assert "| test % |" not in text.as_markdown(results, ORIGIN)
    assert "test_accuracy" not in files.runs_csv(results)
    comparison = results.comparison
    run = comparison.runs[0]
    write_run(tmp_path / "o" / "runs" / run.name, run.config, test={"accuracy": 0.625, "loss": 1.0})
    found = gather(comparison, tmp_path / "o")
    assert found.outcomes[0].values["test_accuracy"] == 0.625
    page = text.as_markdown(found, ORIGIN)
    assert "| accuracy % | test % | against fedavg |" in page
    assert f"| {run.label} | 2 of 2 | 80.00 ± 0.00 | 62.50 (1 of 2) |" in page
    assert "- test: accuracy on the test set, of the last model, evaluated once; all other accuracies are those of" in page
    assert files.runs_csv(found).splitlines()[0].split(",")[5:7] == ["accuracy", "test_accuracy"]
    write_run(tmp_path / "bad", run.config, test=3)
    assert read_run(tmp_path / "bad", run).state == "failed"
