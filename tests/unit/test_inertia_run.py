"""Inertia and effectiveness of whole runs on one rank: exchanges, parts of tensors, codecs, resuming; and no bit is changed."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from dfed.checkpoint import latest, params_sha256
from dfed.client import evaluation as client_evaluation
from dfed.client import worker as worker_module
from dfed.client.worker import Worker
from dfed.comm import join
from dfed.config import load_config
from dfed.inertia_record import REFERENCE
from dfed.leader import Leader
from dfed.report.folder import RunFolder
from dfed.round import lead_round
from dfed.run import StopFlag, assemble, prepare

torch.set_num_threads(1)

VALUES = ("cosine", "l1", "l2", "displacement", "relative", "step", "diversity")
SMALL = {
    "rounds": 3,
    "cohort": 3,
    "seed": 5,
    "model": {"name": "cnn", "channels": [4, 6], "hidden": 8, "norm": "batch"},
    "data": {"dataset": "synthetic", "shape": [1, 8, 8], "classes": 4, "samples": 90, "test_samples": 60,
             "partition": {"name": "dirichlet", "alpha": 0.5}},
    "fleet": {"clients": 6, "tiers": [{"name": "strong", "count": 3}, {"name": "weak", "count": 3, "memory": "1 MiB"}]},
    "client": {"batch_size": 8, "learning_rate": 0.05},
    "memory": {"enforce": "off"},
    "metrics": {"tensorboard": False, "every": 2, "batch_size": 16},
}
MEASURED = ["metrics.inertia=true", "metrics.inertia_reference=1", "metrics.effectiveness=true",
            "metrics.effectiveness_samples=40"]
CODED = ["codecs.down=int8", "codecs.up={name: top_k, density: 0.3}", "codecs.error_feedback=true"]
WIDTHS = ["strategy={name: heterofl, rates: [1.0, 0.5]}", "memory.enforce=predicted",
          "fleet.tiers.1.memory=0.6", "model.hidden=12000", "metrics.every=1"]
NEULITE = ["strategy={name: neulite, blocks: 2}", "metrics.every=1"]


def run_of(*overrides, base=SMALL):
    config, device = load_config(None, overrides, base=base), torch.device("cpu")
    return assemble(prepare(config, device), join(config.backend, device), StopFlag())


def carried_out(path, *overrides, state=None, run=None):
    run = run or run_of(*overrides)
    folder = RunFolder(path)
    folder.create(run.config)
    leader = Leader(run, folder, state=state, start=0.0)
    assert leader.lead() == 0
    return leader


def rows_of(path, kind="round"):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


def plain(rows):
    """Rows without times, memory, and what is measured here."""
    left_out = {"time_s", "evaluation_s", "peak_bytes", "inertia", "effectiveness"}
    return [{name: value for name, value in row.items() if name not in left_out} for row in rows]


@pytest.mark.parametrize("options", [(), CODED, WIDTHS, NEULITE, ["server.optimizer=adam"]],
                         ids=["plain", "coded", "widths", "neulite", "adam"])
def test_measuring_changes_no_bit_and_exchanges_agree(options, tmp_path):
    """Training, evaluation and client lines are those of a run that is not measured; both exchanges give the same figures."""
    carried_out(tmp_path / "off", *options)
    carried_out(tmp_path / "fused", *options, *MEASURED)
    carried_out(tmp_path / "per_client", *options, *MEASURED, "exchange=per_client")
    off, fused, single = (summary_of(tmp_path / name) for name in ("off", "fused", "per_client"))
    assert off["params_sha256"] == fused["params_sha256"] == single["params_sha256"]
    assert off["inertia"] is None
    assert fused["inertia"] == single["inertia"]
    for kind in ("round", "client"):
        assert plain(rows_of(tmp_path / "off", kind)) == plain(rows_of(tmp_path / "fused", kind))
    rows = rows_of(tmp_path / "fused")
    for row, other in zip(rows, rows_of(tmp_path / "per_client"), strict=True):
        assert row["inertia"] == other["inertia"]
        assert row.get("effectiveness") == other.get("effectiveness")
        assert ("effectiveness" in row) == ("accuracy" in row)
        # Rows name exactly the units that somebody sent; those after the reference have all figures.
        assert row["inertia"].keys() == row["bytes"]["by_block"]["up"].keys()
        for values in row["inertia"].values():
            assert set(values) == (set(VALUES) if row["round"] >= 1 else {"step", "diversity"})
            # A mean of squares is not below the square of the mean but for rounding of the mean to float32.
            assert values["diversity"] > 1 - 1e-6
            assert values["step"] > 0
    assert not (tmp_path / "off" / "inertia.png").exists()
    assert (tmp_path / "fused" / "inertia.png").is_file()
    assert fused["inertia"]["middle_to_outer"] > 0
    if options == NEULITE:
        assert len({tuple(row["inertia"]) for row in rows}) == 2  # stages take turns
        counts = [(row["effectiveness"]["clients"], row["effectiveness"]["left_out"]) for row in rows]
        assert counts == [(0, 3), (3, 0), (0, 3)]  # a stage that is not the whole model is none to be compared
        assert rows[0]["effectiveness"]["mean"] is None
    else:
        partition = run_of(*options).job.partition
        masked = {client for client in range(6) if options == WIDTHS and (partition.label_counts([client]) == 0).any()}
        completed = [[row["client"] for row in rows_of(tmp_path / "fused", "client") if row["round"] == n] for n in range(3)]
        for row in (row for row in rows if "effectiveness" in row):  # HeteroFL has no scores of what a client lacks
            assert row["effectiveness"]["left_out"] == len(masked.intersection(completed[row["round"]]))
            assert row["effectiveness"]["clients"] == 3 - row["effectiveness"]["left_out"]
        assert (len(masked) in range(1, 6)) == (options == WIDTHS)


@pytest.mark.parametrize("options", [(), CODED, WIDTHS], ids=["plain", "coded", "widths"])
def test_diversity_entry_by_entry(options, monkeypatch):
    """From every client's own update and region, in numpy; with the server's Adam, which comes after the mean."""
    run = run_of(*options, *MEASURED, "server.optimizer=adam", "cohort=5")
    taken, measure = [], worker_module.change_squares
    monkeypatch.setattr(worker_module, "change_squares", lambda new, old, units: taken.append(
        ({name: value.double().numpy() for name, value in new.items()}, {name: old[name].double().numpy() for name in new})
    ) or measure(new, old, units))
    state = run.job.strategy.init(run.planning.first_params(5))
    result = lead_round(run.job, state)
    assert len(taken) == len(result.completed) == 5
    assert run.job.units.keys() == {name for name in state.params if "running" not in name}
    if options == WIDTHS:
        assert len({plan.options["rate"] for plan, _ in result.completed.values()}) == 2
    by_client = {client: pair for client, pair in zip(played(run, result), taken, strict=True)}
    top, bottom = dict.fromkeys(result.diversity, 0.0), dict.fromkeys(result.diversity, 0.0)
    for name, unit in run.job.units.items():
        weights, sums = (torch.zeros(state.params[name].shape, dtype=torch.float64) for _ in range(2))
        for client, (new, old) in by_client.items():
            region = run.job.forms.of(result.completed[client][0]).regions[name]
            num_samples, change = run.job.partition.num_samples(client), new[name] - old[name]
            region.add_(weights, float(num_samples))
            region.add_(sums, torch.from_numpy(num_samples * change))
            top[unit] += num_samples * (change**2).sum()
        bottom[unit] += float((sums**2 / weights.clamp(min=1)).sum())
    # The server's mean is rounded to float32, at 2⁻²⁴ of values some 20 times as large as their changes.
    assert result.diversity == pytest.approx({unit: top[unit] / bottom[unit] for unit in top}, rel=1e-4)
    assert max(result.diversity.values()) > 1.1


def played(run, result):
    """The completed clients in the order in which one rank plays them: the costliest first."""
    costs = {client: run.job.costs.flops(plan, run.job.partition.num_samples(client))
             for client, (plan, _) in result.completed.items()}
    return sorted(costs, key=lambda client: (-costs[client], client))


def test_a_run_goes_on_with_its_reference(tmp_path, caplog):
    whole = carried_out(tmp_path / "whole", *MEASURED, "rounds=4", "checkpoint.every=1")
    rows, picture = rows_of(tmp_path / "whole"), (tmp_path / "whole" / "inertia.png").read_bytes()

    def resumed(path, rounds):
        carried_out(path, *MEASURED, f"rounds={rounds}", "checkpoint.every=1")
        state = latest(path / "checkpoint", whole._config.fingerprint())
        assert state.round_index == rounds
        return state

    for rounds in (1, 2):
        state = resumed(tmp_path / str(rounds), rounds)
        carried_out(tmp_path / str(rounds), *MEASURED, "rounds=4", "checkpoint.every=1", state=state)
        again = rows_of(tmp_path / str(rounds))
        assert [row["inertia"] for row in again] == [row["inertia"] for row in rows]
        assert summary_of(tmp_path / str(rounds))["inertia"] == summary_of(tmp_path / "whole")["inertia"]
        assert (tmp_path / str(rounds) / "inertia.png").read_bytes() == picture
    assert caplog.messages == []
    state = resumed(tmp_path / "lost", 2)
    (tmp_path / "lost" / REFERENCE).unlink()
    with caplog.at_level(logging.WARNING):
        carried_out(tmp_path / "lost", *MEASURED, "rounds=4", "checkpoint.every=1", state=state)
    assert sum("no values against the reference" in message for message in caplog.messages) == 1
    again = rows_of(tmp_path / "lost")
    assert [set(row["inertia"]["head"]) for row in again] == [{"step", "diversity"}, set(VALUES), *[{"step", "diversity"}] * 2]
    assert [row["inertia"]["head"]["step"] for row in again] == [row["inertia"]["head"]["step"] for row in rows]
    # What is left of a row that was cut short is no reason for a run to fail, and its cells are empty.
    final = summary_of(tmp_path / "lost")["inertia"]["units"]["head"]["relative"]
    assert final == again[1]["inertia"]["head"]["relative"]


@pytest.mark.parametrize("rate", ["0.05", "1e30"], ids=["trained by nobody", "updates refused"])
def test_rounds_that_nobody_completes_have_no_figures(rate, tmp_path, monkeypatch):
    if rate == "0.05":
        monkeypatch.setattr(Worker, "_train", lambda *_: (_ for _ in ()).throw(MemoryError("no more")))
    run = run_of(*MEASURED, "rounds=2", "server.max_failed_fraction=1.0", f"client.learning_rate={rate}")
    reports, work = [], run.job.worker.work
    monkeypatch.setattr(run.job.worker, "work", lambda *arguments: reports.extend(work(*arguments)) or reports[-3:])
    carried_out(tmp_path, run=run)
    assert len(reports) == 6
    assert all((report["change_squares"], report["own_correct"]) == ({}, None) for report in reports)
    rows = rows_of(tmp_path)
    assert [row["inertia"] for row in rows] == [{}, {}]
    assert rows[1]["effectiveness"] == {"mean": None, "clients": 0, "left_out": 0, "before": None, "after": None}
    summary = summary_of(tmp_path)
    assert summary["inertia"]["units"]["head"] == dict.fromkeys(("relative", "displacement", "cosine"))
    assert summary["inertia"]["middle_to_outer"] is None
    assert not (tmp_path / "inertia.png").exists()


def test_a_client_alone_is_its_own_aggregate(tmp_path):
    """Then the global model is the client's, and both accuracies are that of the row, on the client's mix."""
    leader = carried_out(tmp_path, *MEASURED, "cohort=1", "metrics.effectiveness_samples=1000", "metrics.every=1")
    for row in rows_of(tmp_path):
        found = row["effectiveness"]
        assert (found["mean"], found["clients"], found["left_out"]) == (0, 1, 0)
        assert found["before"] == found["after"]
    [client] = [row["client"] for row in rows_of(tmp_path, "client") if row["round"] == 2]
    run = leader._run
    assert run.sample_evaluator._dataset.num_samples == 60  # all that there are
    mix = run.job.partition.label_counts([client])
    # The same right and wrong answers, added up by class.
    assert found["after"] == pytest.approx(leader._evaluation.accuracy_on(mix), rel=1e-12)
    assert leader._evaluation.sampled.count.tolist() == leader._evaluation.count.tolist()


def test_what_a_clients_own_model_is_tried_for_counts_for_nothing(tmp_path, monkeypatch):
    """Not as its time, nor when it fails; and only rounds with an evaluation are tried."""
    rounds, tried = [], Worker._try_own_model

    def slow(worker, plan, round_index, report):
        rounds.append(round_index)
        return 1e6 + tried(worker, plan, round_index, report)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_try_own_model", slow)
        carried_out(tmp_path / "slow", *MEASURED)
    assert all(-1e6 < row["time_s"] < -1e6 + 1e3 for row in rows_of(tmp_path / "slow", "client"))
    assert [("effectiveness" in row) for row in rows_of(tmp_path / "slow")] == [False, True, True]
    assert rounds == [0] * 3 + [1] * 3 + [2] * 3
    used, batch = [], client_evaluation.evaluate_batch

    def failing(model, dataset, number, **options):
        used.append(dataset.num_samples)
        return 1 / 0 if len(used) <= 3 else batch(model, dataset, number, **options)

    with monkeypatch.context() as patch:
        patch.setattr(client_evaluation, "evaluate_batch", failing)
        broken = carried_out(tmp_path / "broken", *MEASURED)
    # The three clients of the second round fail at once, those of the last take three mini-batches each, as the server does.
    assert used.count(40) == 3 + 3 + 3 * 3 + 3
    rows = rows_of(tmp_path / "broken")
    assert rows[1]["effectiveness"] == {"mean": None, "clients": 0, "left_out": 3, "before": None, "after": None}
    assert rows[2]["effectiveness"]["clients"] == 3
    assert params_sha256(broken.state.params) == summary_of(tmp_path / "slow")["params_sha256"]


@pytest.mark.filterwarnings("default")  # TensorBoard's and protobuf's own
def test_curves_of_every_unit(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    carried_out(tmp_path, *MEASURED, "rounds=2", "metrics.tensorboard=true")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {f"inertia/{unit}/{name}" for unit in ("conv0", "conv1", "hidden", "head") for name in VALUES}
    assert names | {"effectiveness/mean", "effectiveness/before", "personalised_accuracy"} <= set(events.Tags()["scalars"])
    values = [row["inertia"]["conv1"]["step"] for row in rows_of(tmp_path)]
    assert [event.value for event in events.Scalars("inertia/conv1/step")] == np.float32(values).tolist()
