"""The report of a comparison, from run folders written by hand: figures against numpy, tables, files."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from compare_problem import load, write_run
from rich.console import Console

from dfed.report import comparison_files as files
from dfed.report import comparison_text as text
from dfed.report.comparison import Spread, gather, read_run, spread_of
from dfed.report.figures import curve_of, draw

ORIGIN = text.Origin(config="c.yaml rounds=3", command="python -m dfed compare c.yaml", date="2026-01-02T03:04:05", figure=True)
AVG = [(0.5, 0.75, 0.8), (0.4, 0.8, 0.9), (0.3, None, 0.7)]
PROX = [(0.6, 0.79, 0.81), (0.2, 0.3, 0.4)]


@pytest.fixture
def results(tmp_path):
    """`fedavg` with three finished runs, `fedprox` with two, and its third failed; `exclusivefl` not begun."""
    comparison = load(tmp_path, compare={"strategies": ["fedavg", "fedprox", "exclusivefl"], "seeds": 3, "reference": "fedavg"})
    configs = {(run.label, run.seed): run.config for run in comparison.runs}
    for label, runs in (("fedavg", AVG), ("fedprox", PROX)):
        for number, accuracies in enumerate(runs):
            seed = 5 + number
            write_run(tmp_path / "o" / "runs" / f"{label}-s{seed}", configs[label, seed], accuracies=accuracies, oom=number,
                      completed=((0, 10), (1, 12), (0, 10)) if label == "fedavg" else ((2, 4),))
    (tmp_path / "o" / "runs" / "fedprox-s7.failed").write_text("no | data\n")
    return gather(comparison, tmp_path / "o")


def test_mean_and_standard_deviation_are_numpys(results):
    values = [0.3, 0.7, 0.8, 0.1]
    spread = spread_of([*values, None])
    # Two ways of rounding a sum of four numbers below one: a few units in the last place.
    assert spread.mean == pytest.approx(np.mean(values), rel=1e-15)
    assert spread.std == pytest.approx(np.std(values, ddof=1), rel=1e-14)
    assert (spread.count, spread_of([2.0]), spread_of([None])) == (4, Spread(2.0, None, 1), Spread(None, None, 0))
    final = [run[-1] for run in AVG]
    assert results.spread("fedavg", "accuracy").mean == pytest.approx(np.mean(final), rel=1e-15)
    assert results.spread("fedavg", "accuracy").std == pytest.approx(np.std(final, ddof=1), rel=1e-14)
    assert results.spread("exclusivefl", "accuracy") == Spread(None, None, 0)


def test_the_figures_of_a_run(results):
    first = results.of("fedavg")[0].values
    assert (first["accuracy"], first["accuracy_strong"], first["accuracy_we|ak"]) == (0.8, 0.8 + 0.1, 0.8 - 0.1)
    assert (first["participation_clients"], first["participation_data"]) == (2 / 4, 22 / 40)  # client 0 counts once
    assert (first["peak_share"], first["peak_share_median"]) == (800 / 1000, 600 / 1000)
    assert (first["oom"], first["difference"]) == (0, 0)
    assert (first["bytes_up"], first["bytes_down"], first["sim_time_s"], first["energy_j"]) == (300, 600, 6, 9)
    prox = results.of("fedprox")
    assert [run.values["difference"] for run in prox] == [0.81 - 0.8, 0.4 - 0.9]
    assert [run.values["participation_clients"] for run in prox] == [1 / 4, 1 / 4]
    assert [(run.label, run.seed, run.state, run.reason) for run in results.outcomes if run.state != "finished"] == [
        ("exclusivefl", 5, "not run", None), ("exclusivefl", 6, "not run", None), ("fedprox", 7, "failed", "no | data"),
        ("exclusivefl", 7, "not run", None),
    ]


def test_what_it_takes_to_the_target(results, tmp_path):
    assert not results.target_is_given
    assert results.target == pytest.approx(0.95 * 0.8, rel=1e-15)
    taken = {run.seed: [run.values[f"target_{name}"] for name in ("rounds", "bytes", "time_s", "energy_j")]
             for run in results.of("fedavg")}
    assert taken == {5: [3, 900, 6, 9], 6: [2, 600, 4, 6], 7: [None] * 4}
    assert results.spread("fedprox", "target_time_s") == Spread(4.0, None, 1)
    given = load(tmp_path, compare={"strategies": ["fedavg"], "seeds": 3, "target_accuracy": 0.75})
    given_results = gather(given, tmp_path / "o")
    assert (given_results.target, given_results.target_is_given) == (0.75, True)
    assert json.loads(files.as_json(given_results, ORIGIN))["target_share"] is None
    above = load(tmp_path, compare={"strategies": ["fedavg"], "seeds": 3, "target_share": 1.015})
    above_results = gather(above, tmp_path / "o")
    assert above_results.target == pytest.approx(1.015 * 0.8, rel=1e-15)
    assert "- target accuracy 81.20 %, 101.5 % of the mean accuracy of fedavg;" in text.as_markdown(above_results, ORIGIN)
    assert json.loads(files.as_json(above_results, ORIGIN))["target_share"] == 1.015
    assert [run.values["target_rounds"] for run in given_results.of("fedavg")] == [2, 2, None]  # reached counts as reached


def test_tables_on_the_terminal(results):
    file = io.StringIO()
    text.show(results, Console(file=file, width=400, highlight=False))
    shown = file.getvalue()
    assert max(map(len, shown.splitlines())) <= 100
    assert "80.00 ± 10.00" in shown
    assert "5.00 ± 1.41 (2 of 3)" in shown  # 6 s and 4 s
    assert "3 of 3" in shown
    assert "0 of 3" in shown
    assert "fedprox, seed 7: failed: no | data" in shown
    assert "target accuracy 76.00 %, 95 % of the mean accuracy of fedavg" in shown


def test_the_markdown(results):
    lines = text.as_markdown(results, ORIGIN).splitlines()
    assert lines[0] == "# Comparison: c.yaml rounds=3"
    for line in ("- command: `python -m dfed compare c.yaml`", "- date: 2026-01-02T03:04:05", "- seeds: 5, 6, 7",
                 "- hardware: P, 2 CPUs; 1 rank(s) on cpu, 1 thread(s) each; Linux", "- model: mlp",
                 "| strong | 2 | 0.0 | 300.0 |", "| we\\|ak | 2 | – | – |", "- fedprox, seed 7: failed: no | data",
                 "- exclusivefl, seed 5: not run", "![accuracy over rounds, bytes and simulated time](comparison.png)"):
        assert line in lines
    assert any(line.startswith("- dfed: ") and line.endswith("commit abc") for line in lines)
    head, _, *rows = [line for line in lines if line.startswith("| ") and line.count(" | ") > 6]
    assert head == ("| strategy | seeds | accuracy % | against fedavg | strong % | we\\|ak % | clients % | data % "
                    "| median peak % of need | largest % of need | up MiB | down MiB | to target s | to target J "
                    "| out of memory |")
    assert rows[0].startswith("| fedavg | 3 of 3 | 80.00 ± 10.00 | +0.00 ± 0.00 | 90.00 ± 10.00 | 70.00 ± 10.00 | 50.0 ± 0.0 "
                              "| 55.0 ± 0.0 | 60.0 ± 0.0 | 80.0 ± 0.0 | ")
    assert rows[0].endswith(" | 5.00 ± 1.41 (2 of 3) | 7.50 ± 2.12 (2 of 3) | 1.0 ± 1.0 |")
    assert rows[1].startswith("| fedprox | 2 of 3 | 60.50 ± 28.99 | -24.50 ± 36.06 | ")
    assert rows[2] == "| exclusivefl | 0 of 3 |" + " – |" * 13


def test_an_entry_whose_runs_all_failed_says_so(tmp_path):
    comparison = load(tmp_path, seeds=1)
    (tmp_path / "o" / "runs").mkdir(parents=True)
    (tmp_path / "o" / "runs" / "fedprox-s5.failed").write_text("gone")
    empty = gather(comparison, tmp_path / "o")
    page = text.as_markdown(empty, ORIGIN)
    assert "| fedprox | 0 of 1 | failed | failed |" in page
    assert "no target accuracy: no run of the reference is finished" in page
    assert not draw(empty, tmp_path)
    assert [row[:5] for row in csv.reader(io.StringIO(files.runs_csv(empty)))][1:] == [
        ["fedavg", "fedavg", "5", "not run", ""], ["fedprox", "fedprox", "5", "failed", "gone"]]
    write_run(tmp_path / "o" / "runs" / "fedavg-s5", comparison.runs[0].config)
    (tmp_path / "o" / "runs" / "fedavg-s5" / "metrics.jsonl").write_text("{")
    damaged = read_run(tmp_path / "o" / "runs" / "fedavg-s5", comparison.runs[0])
    assert (damaged.state, damaged.reason.partition(":")[0]) == ("failed", "its folder cannot be used")


def test_a_finished_run_has_all_its_rounds_and_figures(tmp_path):
    run, folder = load(tmp_path).runs[0], tmp_path / "run"
    write_run(folder, run.config)
    assert read_run(folder, run).state == "finished"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    clients, rounds = [line for line in lines if "client" in line], [line for line in lines if "client" not in line]
    for kept, reason in [
        (rounds[1:], "1 of 3 rounds missing in metrics.jsonl, the first of them round 0; move "),
        (rounds[:1], "2 of 3 rounds missing in metrics.jsonl, the first of them round 1; move "),
        ([], "3 of 3 rounds missing in metrics.jsonl, the first of them round 0; move "),
        ([*rounds, rounds[2]], "metrics.jsonl does not have the 3 rounds once and in order; move "),
        (rounds[::-1], "metrics.jsonl does not have the 3 rounds once and in order; move "),
        ([*rounds, "3\n"], "TypeError: "), ([*rounds[:2], rounds[2][:20]], "JSONDecodeError: "),
    ]:
        (folder / "metrics.jsonl").write_text("".join([*clients, *kept]))
        found = read_run(folder, run)
        assert (found.state, found.values) == ("failed", {})
        assert found.reason.startswith(f"its folder cannot be used: {reason}")
    for changes in ({"accuracy": "high"}, {"tiers": []}, {"tiers": 3}, {"bytes": {}}, {"sim_time_s": [1]}):
        write_run(folder, run.config, **changes)
        assert read_run(folder, run).state == "failed"
    write_run(folder, run.config)
    (folder / "environment.json").write_text("[]")
    assert read_run(folder, run).state == "failed"


def test_budgets_that_differ_are_pointed_out(results, tmp_path):
    comparison = results.comparison
    assert "warning" not in text.as_markdown(results, ORIGIN)
    path = tmp_path / "o" / "runs" / "fedprox-s6" / "summary.json"
    summary = json.loads(path.read_text())
    summary["tiers"][0]["budget_bytes"] = 2**21
    path.write_text(json.dumps(summary))
    assert ("warning: the budgets of tier strong differ, as `settings` change what a share is of (MiB): fedavg 0.0, "
            "fedprox 2.0 and 0.0") in text.as_markdown(gather(comparison, tmp_path / "o"), ORIGIN)


def test_csv_and_json_hold_every_figure(results):
    rows = list(csv.DictReader(io.StringIO(files.runs_csv(results))))
    assert [(row["label"], row["seed"], row["state"]) for row in rows] == [
        (run.label, str(run.seed), run.state) for run in results.outcomes]
    assert float(rows[0]["accuracy"]) == 0.8
    assert (rows[0]["target_time_s"], rows[6]["target_time_s"]) == ("6.0", "")
    assert (rows[7]["accuracy"], rows[7]["reason"]) == ("", "no | data")
    means = {row["label"]: row for row in csv.DictReader(io.StringIO(files.summary_csv(results)))}
    assert float(means["fedavg"]["accuracy_std"]) == results.spread("fedavg", "accuracy").std
    assert (means["fedprox"]["accuracy_count"], means["exclusivefl"]["accuracy_mean"]) == ("2", "")
    everything = json.loads(files.as_json(results, ORIGIN))
    assert everything["entries"][0]["figures"]["accuracy"]["count"] == 3
    assert everything["runs"][0]["values"]["accuracy"] == 0.8
    assert everything["runs"][0]["config"]["seed"] == 5
    assert everything["runs"][0]["environment"]["git_commit"] == "abc"
    assert (everything["seeds"], everything["reference"]) == ([5, 6, 7], "fedavg")


def test_a_curve_has_the_rounds_that_all_runs_share(results):
    curve = curve_of(results.of("fedavg"))
    assert curve.rounds.tolist() == [1, 3]  # one of the three was not evaluated after the second round
    assert curve.mebibytes.tolist() == [300 / 2**20, 900 / 2**20]
    assert curve.sim_time_s.tolist() == [2, 6]
    values = 100 * np.array([[run[0], run[2]] for run in AVG])
    # The same reductions over an array of another shape: a few units in the last place.
    np.testing.assert_allclose(curve.mean, values.mean(0), rtol=1e-14)
    np.testing.assert_allclose(curve.std, values.std(0, ddof=1), rtol=1e-14)
    single = curve_of(results.of("fedprox")[:1])
    assert (single.seeds, single.std.tolist()) == (1, [0, 0, 0])
    assert curve_of([]) is None


def test_figures_are_the_same_to_the_byte(results, tmp_path):
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert draw(results, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {"comparison.svg", "comparison.png"}
        found.append([(tmp_path / name / f"comparison.{kind}").read_bytes() for kind in ("svg", "png")])
    assert found[0] == found[1]
    svg, png = found[0]
    assert png.startswith(b"\x89PNG")
    assert b"<dc:date>" not in svg
    for label in (b"fedavg", b"fedprox"):
        assert label in svg  # as a comment beside the drawn letters


def test_models_of_the_devices_own(tmp_path):
    """Columns for them stand where some device of some run has one; those of the others are the global model's."""
    comparison = load(tmp_path, compare={"strategies": ["fedavg", "fedprox"], "seeds": 1})
    for run in comparison.runs:
        folder = tmp_path / "o" / "runs" / run.name
        write_run(folder, run.config)
        summary = json.loads((folder / "summary.json").read_text())
        using = {"depth 1": 3, "global": 1} if run.label == "fedprox" else {"global": 5}
        summary |= {"devices": {"using": using, "without": 5 - sum(using.values())}, "device_accuracy": 0.625}
        (folder / "summary.json").write_text(json.dumps(summary))
    found = gather(comparison, tmp_path / "o")
    assert found.has_device_models
    assert [found.spread(label, "device_share").mean for label in ("fedavg", "fedprox")] == [1.0, 0.8]
    page = text.as_markdown(found, text.Origin(config="c", command="d", date="2026-01-02", figure=False))
    row = next(line for line in page.splitlines() if line.startswith("| fedprox |"))
    heading = next(line for line in page.splitlines() if line.startswith("| strategy |"))
    cells = dict(zip(heading.split(" | "), row.split(" | "), strict=True))
    assert (cells["devices %"], cells["have one %"]) == ("62.50", "80.0")
    assert "have one: their share" in page
    alone = load(tmp_path, compare={"strategies": ["fedavg"], "seeds": 1})
    assert "have one" not in text.as_markdown(gather(alone, tmp_path / "o"),
                                              text.Origin(config="c", command="d", date="2026-01-02", figure=False))


@pytest.mark.parametrize("tested", [False, True])
def test_accuracy_on_the_clients_own_mixes(tmp_path, tested):
    """One column, of the test set where there is one; none where no run has a figure."""
    comparison = load(tmp_path, compare={"strategies": ["fedavg", "fedprox"], "seeds": 2})
    for number, run in enumerate(comparison.runs):
        folder = tmp_path / "o" / "runs" / run.name
        write_run(folder, run.config)
        summary = json.loads((folder / "summary.json").read_text())
        if run.label == "fedprox":
            summary["personalised_accuracy"] = (0.25, 0.75)[number // 2]
        test = {"accuracy": 0.5, "loss": 1.0, "personalised_accuracy": 0.875 if run.label == "fedprox" else None}
        (folder / "summary.json").write_text(json.dumps({**summary, "test": test if tested else None}))
    found = gather(comparison, tmp_path / "o")
    page = text.as_markdown(found, ORIGIN)
    rows = {line.split(" | ")[0]: line.split(" | ") for line in page.splitlines() if line.count(" | ") > 9}
    place = rows["| strategy"].index("personal, test %" if tested else "personal %")
    # 25 and 75 per cent: their deviation is 50 / √2.
    assert (rows["| fedavg"][place], rows["| fedprox"][place]) == ("–", "87.50 ± 0.00" if tested else "50.00 ± 35.36")
    assert "- personal: mean over the fleet's clients" in page
    header = files.runs_csv(found).splitlines()[0].split(",")
    assert "personalised_accuracy" in header
    assert ("test_personalised_accuracy" in header) == tested
    alone = load(tmp_path, compare={"strategies": ["fedavg"], "seeds": 2})
    assert "personal" not in text.as_markdown(gather(alone, tmp_path / "o"), ORIGIN)
