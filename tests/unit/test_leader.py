"""The loop over the rounds, on one rank: what an evaluation leaves behind, being stopped, and errors of the server's own."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

import pytest
import torch

from dfed import evaluation as evaluation_module
from dfed import leader as leader_module
from dfed.checkpoint import latest
from dfed.comm import join
from dfed.config import load_config
from dfed.errors import DataError, ExchangeFailed, RankLost
from dfed.evaluation import evaluate, evaluate_variants
from dfed.leader import EXIT_STOPPED, Leader
from dfed.report import folder as folder_module
from dfed.report.folder import RunFolder
from dfed.round import lead_round
from dfed.run import StopFlag, assemble, prepare

SMALL = {
    "rounds": 3,
    "cohort": 2,
    "seed": 5,
    "strategy": "heterofl",
    "model": {"name": "cnn", "channels": [4], "hidden": 8, "norm": "batch"},
    "data": {"dataset": "synthetic", "shape": [1, 8, 8], "classes": 4, "samples": 80, "test_samples": 40},
    "fleet": {"clients": 4, "tiers": [{"name": "all", "share": 1.0}]},
    "client": {"batch_size": 8, "learning_rate": 0.05},
    "memory": {"enforce": "off"},
    "metrics": {"tensorboard": False, "every": 2, "batch_size": 16},
}


@pytest.fixture
def make():
    """``make(*overrides)``: a run, and the flag that stops it."""
    def made(*overrides):
        config, device, stop = load_config(None, overrides, base=SMALL), torch.device("cpu"), StopFlag()
        return assemble(prepare(config, device), join(config.backend, device), stop), stop

    return made


def leader_of(run, path, state=None):
    folder = RunFolder(path)
    folder.create(run.config)
    return Leader(run, folder, state=state, start=0.0)


def rows_of(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "round"]


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


def test_statistics_that_are_worked_out_are_the_last_models_only(make):
    run, _ = make()
    state = run.job.strategy.init(run.planning.first_params(5))
    buffers = [name for name in state.params if name in run.job.buffers]
    assert buffers
    for round_index in range(3):
        trained = lead_round(run.job, state).state
        state, found = evaluate(run, trained)
        assert found.refused is None
        same = [torch.equal(state.params[name], trained.params[name]) for name in trained.params]
        if round_index < 2:
            assert all(same)
        else:
            assert [name for name, equal in zip(trained.params, same, strict=True) if not equal] == buffers
    # The figures are of the model with its statistics, as the variant of the same width says.
    again = evaluate_variants(run, trained)["width 1"]
    assert (again.accuracy, again.loss) == (found.accuracy, found.loss)
    run.evaluator.statistics_shapes = lambda plan: {}
    assert evaluate(run, state)[1].loss == found.loss != evaluate(run, trained)[1].loss


@pytest.fixture
def refusing(monkeypatch):
    """Evaluations in which no norm statistics can be worked out."""
    monkeypatch.setattr(evaluation_module, "_statistics", lambda *_: ({}, "tensor 'x' must be finite"))


@pytest.mark.parametrize("refused", [False, True])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(make, refused, request, tmp_path, monkeypatch, caplog):
    if refused:
        request.getfixturevalue("refusing")
    run, stop = make()
    with caplog.at_level(logging.WARNING):
        assert leader_of(run, tmp_path / "undisturbed").lead() == 0
    assert caplog.text.count("none can be worked out") == refused  # of two rounds and all variants
    stop.is_set = True
    with monkeypatch.context() as patch:
        patch.setattr(leader_module, "evaluate_variants", lambda *_: pytest.fail("takes time that there is not"))
        assert leader_of(run, tmp_path / "stopped").lead() == EXIT_STOPPED
    stopped = summary_of(tmp_path / "stopped")
    assert (stopped["rounds"], stopped["finished"], stopped["variants"]) == (1, False, {})
    assert stopped["accuracy"] is not None
    assert stopped["stale_statistics"] == 0  # the evaluation is not one of an undisturbed run
    assert ("statistics" in rows_of(tmp_path / "stopped")[0]) == refused
    stop.is_set = False
    state = latest(tmp_path / "stopped" / "checkpoint", run.config.fingerprint())
    assert leader_of(run, tmp_path / "stopped", state).lead() == 0
    first, second = summary_of(tmp_path / "undisturbed"), summary_of(tmp_path / "stopped")
    assert {**first, "time_s": 0} == {**second, "time_s": 0, "tiers": [
        {**tier, "peak_bytes": mine["peak_bytes"]} for tier, mine in zip(second["tiers"], first["tiers"], strict=True)]}
    assert first["stale_statistics"] == (2 if refused else 0)
    assert [row.get("statistics") for row in rows_of(tmp_path / "undisturbed")] == [None, *["stale" if refused else None] * 2]
    assert all(("statistics" in figures) == refused for figures in first["variants"].values())
    ends = [latest(tmp_path / name / "checkpoint", run.config.fingerprint()).params for name in ("undisturbed", "stopped")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("strategy", ["heterofl", "fedavg"])
def test_the_last_model_is_tested_once_and_nothing_else_changes(make, strategy, tmp_path, monkeypatch, capsys):
    """On the test set as it is, with the statistics of the model that was validated."""
    base = (f"strategy={strategy}", "metrics.split=validation", "data.validation_fraction=0.2", "rounds=2")
    plain, _ = make(*base)
    assert plain.test_evaluator is None
    assert leader_of(plain, tmp_path / "plain").lead() == 0
    assert summary_of(tmp_path / "plain")["test"] is None
    assert "of the last model" not in capsys.readouterr().out
    run, _ = make(*base, "metrics.test_at_end=true")
    assert run.config.fingerprint() == plain.config.fingerprint()
    calls, tested = [], run.test_evaluator.run
    monkeypatch.setattr(run.test_evaluator, "run", lambda *arguments: calls.append(1) or tested(*arguments))
    lead = leader_of(run, tmp_path / "tested")
    assert lead.lead() == 0
    assert len(calls) == 1 + sum(name != "global" for name in summary_of(tmp_path / "tested")["devices"]["using"])
    first, second = summary_of(tmp_path / "plain"), summary_of(tmp_path / "tested")
    test = second["test"]
    assert f"test accuracy {test['accuracy']:.4f}, loss {test['loss']:.4f}, of the last model" in capsys.readouterr().out
    assert {**second, "test": None, "time_s": 0, "tiers": []} == {**first, "time_s": 0, "tiers": []}
    assert test.keys() == {"accuracy", "loss", "device_accuracy", "personalised_accuracy"}
    assert test["loss"] != second["loss"]
    # The model as it is saved, on the test set of an ordinary run: the same model gives the same figures.
    other, _ = make(f"strategy={strategy}", "rounds=2")
    monkeypatch.setattr(evaluation_module, "_statistics", lambda *_: ({}, None))  # they are in the model
    _, found = evaluate(other, lead.state)
    assert (found.accuracy, found.loss) == (test["accuracy"], test["loss"])


def test_a_run_that_is_stopped_is_not_tested(make, tmp_path, monkeypatch):
    run, stop = make("metrics.split=validation", "data.validation_fraction=0.2", "metrics.test_at_end=true")
    monkeypatch.setattr(run.test_evaluator, "run", lambda *_: pytest.fail("takes time that there is not"))
    stop.is_set = True
    assert leader_of(run, tmp_path / "stopped").lead() == EXIT_STOPPED
    assert summary_of(tmp_path / "stopped")["test"] is None


def test_statistics_of_a_model_that_blew_up_are_refused(make):
    run, _ = make()
    state = run.job.strategy.init(run.planning.first_params(5))
    broken = {name: torch.full_like(value, float("nan")) for name, value in state.params.items()}
    _, found = evaluate(run, replace(state, params=broken))
    assert re.fullmatch(r"tensor '.+' must be finite, but has entries that are not\.", found.refused)


@pytest.mark.parametrize("step", ["run", "add_statistics"])
@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), DataError("a file is gone")])
def test_the_others_do_not_wait_for_a_server_that_fails_in_an_evaluation(make, step, error, tmp_path, monkeypatch):
    """They stand in a gather, where no message reaches them: the server must leave instead of telling them to stop."""
    run, _ = make("rounds=1")
    said = []

    def fails(*_):
        run.transport.size = 2  # alone, it has nobody to leave behind
        raise error

    monkeypatch.setattr(run.evaluator, step, fails)
    lead = leader_of(run, tmp_path / "run")
    monkeypatch.setattr(lead, "dismiss", lambda: said.append("stop"))
    with pytest.raises(ExchangeFailed, match=f"{type(error).__name__}: {error}") as caught:
        lead.lead()
    assert caught.value.__cause__ is error
    assert said == []
    monkeypatch.setattr(run.evaluator, step, lambda *_: (_ for _ in ()).throw(RankLost("rank 1 died")))
    with pytest.raises(RankLost):
        evaluate(run, lead.state)


def test_a_model_that_fails_in_plain_training_costs_no_summary(make, tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise KeyError("only my strategy's parts can be trained")

    run, _ = make("rounds=1", "strategy=fedavg")
    monkeypatch.setattr(folder_module, "Planning", fails)
    with caplog.at_level(logging.WARNING):
        assert leader_of(run, tmp_path / "run").lead() == 0
    summary = summary_of(tmp_path / "run")
    assert (summary["finished"], summary["full_peak_bytes"], summary["full_needed_bytes"]) == (True, None, None)
    assert "cannot be predicted: KeyError: " in caplog.text
