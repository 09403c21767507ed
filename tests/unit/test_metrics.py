from __future__ import annotations

import copy
import json
import logging
import math

import numpy as np
import pytest

from dfed.metrics import MetricsSettings, MetricsWriter, add_totals, empty_totals


def _client(client=0, tier="weak", status="completed", reason=None, peak_bytes=100, **more):
    return {
        "round": 0, "client": client, "tier": tier, "status": status, "reason": reason, "peak_bytes": peak_bytes,
        "predicted_bytes": 1000 + client,
        "bytes_up": 10 + client, "bytes_down": 20 + client, **more,
    }


def _row(round_index, clients, **more):
    counts = {status: sum(c["status"] == status for c in clients) for status in ("completed", "oom", "failed")}
    return {
        "round": round_index, "train_loss": 0.5,
        "clients": {"selected": len(clients), **counts, "ineligible": 2, "unavailable": 1},
        "bytes": {"up": sum(c["bytes_up"] for c in clients), "down": sum(c["bytes_down"] for c in clients), "fabric": 7},
        "time_s": 0.25, "sim_time_s": 3.0, "energy_j": 1.5, **more,
    }


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _write(folder, rounds, next_round=0, tensorboard=False):
    writer = MetricsWriter(folder, next_round=next_round, tensorboard=tensorboard)
    for round_index in rounds:
        clients = [_client(client, round=round_index) for client in range(2)]
        writer.write(_row(round_index, clients), [c | {"round": round_index} for c in clients])
    writer.close()


def test_totals_add_up():
    rounds = [
        [_client(0), _client(1, "strong", peak_bytes=300), _client(2, status="oom", reason="oom", peak_bytes=900)],
        [_client(3, peak_bytes=50), _client(4, status="failed", reason="dropout", peak_bytes=None)],
        [_client(5, "strong", peak_bytes=200), _client(6, "strong", peak_bytes=None), _client(7, "weak", "failed", "oom")],
    ]
    totals = empty_totals(["weak", "strong", "idle"])
    for number, clients in enumerate(rounds):
        before = copy.deepcopy(totals)
        new = add_totals(totals, _row(number, clients), clients)
        assert totals == before  # the old ones stay
        totals = json.loads(json.dumps(new))  # as through a checkpoint
        assert totals == new
    everyone = [client for clients in rounds for client in clients]
    assert totals["clients"] == {"selected": 8, "completed": 5, "oom": 1, "failed": 2, "ineligible": 6, "unavailable": 3}
    assert totals["reasons"] == {"oom": 2, "dropout": 1}
    assert totals["bytes"] == {
        "up": sum(c["bytes_up"] for c in everyone), "down": sum(c["bytes_down"] for c in everyone), "fabric": 21,
    }
    assert totals["stale_statistics"] == 0
    stale = add_totals(totals, _row(3, []) | {"statistics": "stale"}, [])
    assert (stale["stale_statistics"], add_totals(stale, _row(4, []), [])["stale_statistics"]) == (1, 1)
    assert (totals["time_s"], totals["sim_time_s"], totals["energy_j"]) == (0.75, 9.0, 4.5)
    assert totals["tiers"]["idle"] == empty_totals(["idle"])["tiers"]["idle"]
    assert totals["tiers"]["weak"]["peak_bytes"] == 100  # of those that completed
    assert totals["tiers"]["strong"]["peak_bytes"] == 300
    assert {name: tier["predicted_bytes"] for name, tier in totals["tiers"].items()} == {
        "weak": 1007, "strong": 1006, "idle": None,  # of all that were chosen
    }
    for name in ("selected", "completed", "oom", "failed"):
        assert sum(tier[name] for tier in totals["tiers"].values()) == totals["clients"][name]
    for name in ("up", "down"):
        assert sum(tier[f"bytes_{name}"] for tier in totals["tiers"].values()) == totals["bytes"][name]


def test_rows_are_written_at_once_and_in_order(tmp_path):
    writer = MetricsWriter(tmp_path, next_round=0, tensorboard=False)
    writer.write(_row(0, []), [_client(4), _client(2)])
    lines = _lines(tmp_path)  # before it is closed
    writer.close()
    assert [line["kind"] for line in lines] == ["client", "client", "round"]
    assert [line.get("client") for line in lines] == [4, 2, None]
    assert lines[2] == {"kind": "round", **_row(0, [])}
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_what_is_no_number_becomes_null(tmp_path):
    writer = MetricsWriter(tmp_path, next_round=0, tensorboard=False)
    row = _row(0, [], accuracy=math.nan, loss=math.inf, nested={"a": [1.0, -math.inf, {"b": math.nan}], "t": (math.nan, 2)})
    writer.write(row, [_client(loss=np.float64("nan"))])
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert not any(word in text for word in ("NaN", "Infinity"))
    client, read = _lines(tmp_path)
    assert client["loss"] is None
    assert (read["accuracy"], read["loss"], read["nested"]) == (None, None, {"a": [1.0, None, {"b": None}], "t": [None, 2]})
    assert math.isnan(row["accuracy"])


def test_rows_of_rounds_that_are_run_again_are_dropped(tmp_path):
    _write(tmp_path, range(5))
    whole = (tmp_path / "metrics.jsonl").read_text()
    _write(tmp_path, range(3, 5), next_round=3)
    assert (tmp_path / "metrics.jsonl").read_text() == whole  # resumed = uninterrupted
    _write(tmp_path, [], next_round=2)
    assert {line["round"] for line in _lines(tmp_path)} == {0, 1}
    assert len(_lines(tmp_path)) == 6
    _write(tmp_path, [], next_round=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_rounds_that_are_missing_are_warned_of(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="dfed.metrics")
    _write(tmp_path, range(3))
    _write(tmp_path, [3], next_round=3)
    _write(tmp_path, [], next_round=4)
    assert caplog.messages == []
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"round": 1,' not in line))
    _write(tmp_path, [], next_round=4)
    path.unlink()
    _write(tmp_path, [2], next_round=2)
    _write(tmp_path, [], next_round=0)
    assert caplog.messages == [
        f"{path} lacks {missing} of the {before} rounds before round {before}, the first of them round {first}: figures that "
        "are made of it will be wrong" for missing, before, first in ((1, 4, 1), (2, 2, 0))]


@pytest.mark.parametrize(
    "tail",
    ["{", '{"kind": "round", "round": 1, "train_lo', '{"kind": "client", "round": 0, "a": "b', "\x00\x00\x00\n", "3\n",
     "[]\n",
             '{"kind": "round"}\n', "\n\n", "null", "\ufffd"]
)
def test_a_line_that_was_cut_short_is_dropped(tail, tmp_path):
    _write(tmp_path, range(2))
    whole = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    _write(tmp_path, [], next_round=2)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_odd_ends_of_a_file(tmp_path):
    _write(tmp_path, range(2))
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole.rstrip("\n"))  # the last line is whole, but for its end
    _write(tmp_path, [], next_round=2)
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 1, "text": "\xff\xfe')  # bytes that are no text
    _write(tmp_path, [2], next_round=2)
    assert [line["round"] for line in _lines(tmp_path)] == [0] * 3 + [1] * 3 + [2] * 3


def test_dropping_rows_never_leaves_half_a_file(tmp_path, monkeypatch):
    _write(tmp_path, range(3))
    whole = (tmp_path / "metrics.jsonl").read_text()
    original = type(tmp_path).write_text

    def cut(path, text, **keywords):
        original(path, text[: len(text) // 2], **keywords)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", cut)
    with pytest.raises(OSError, match="No space"):
        MetricsWriter(tmp_path, next_round=2, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


@pytest.mark.filterwarnings("default")  # TensorBoard's and protobuf's own
def test_tensorboard_gets_every_number_of_a_round(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _write(tmp_path, range(3), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train_loss", "time_s", "clients/completed", "bytes/up", "bytes/fabric"} <= set(events.Tags()["scalars"])
    assert "round" not in events.Tags()["scalars"]
    assert [(event.step, event.value) for event in events.Scalars("clients/completed")] == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_settings():
    assert MetricsSettings().model_dump() == {"every": 1, "batch_size": 500, "split": "test", "test_at_end": False,
                                              "tensorboard": True, "bytes_by_block": False, "inertia": False,
                                              "inertia_reference": 3, "effectiveness": False, "effectiveness_samples": 500}
    assert [done for done in range(1, 8) if MetricsSettings(every=3).is_due(done, 7)] == [3, 6, 7]
    with pytest.raises(ValueError, match="split"):
        MetricsSettings(split="train")
