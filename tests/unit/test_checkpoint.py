from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfed import checkpoint
from dfed.checkpoint import CheckpointSettings, client_versions, latest, params_sha256, save
from dfed.errors import CheckpointError
from dfed.metrics import empty_totals
from dfed.state import ServerState


def _state(round_index=1, fill=0.0):
    generator = torch.Generator().manual_seed(round_index)
    weight = torch.randn(3, 4, generator=generator) + fill
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 1 / 3])
    return ServerState(
        round_index=round_index,
        params={"head.fc.weight": weight, "a/b.weight": special, "conv.count": torch.tensor(2.5), "none": torch.empty(0, 3)},
        slots={"head.fc.weight": {"m": weight * 2, "v": weight.square()}, "a/b.weight": {"m": special.clone()}},
        tensors={"mean/a": weight + 1, "h": special},
        sampler={"credits": [3, 0], "seen": {"7": 0.5}},
        facts={"stage": 2, "history": [0.1, None, True], "by round": {"10": 1, "9": 2}, "name": "ä"},
        totals=empty_totals(["weak", "strong"]) | {"time_s": 0.1 + 0.2},
        clients={7: 3, 123_456_789: 12},
        infeasible={"0123456789abcdef": 2**40 + 1},
    )


def _bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


def _assert_same(read, written):
    assert read.round_index == written.round_index
    assert list(read.params) == list(written.params)
    assert {name: _bits(value) for name, value in read.params.items()} == {n: _bits(v) for n, v in written.params.items()}
    assert {n: {s: _bits(v) for s, v in slots.items()} for n, slots in read.slots.items()} == \
           {n: {s: _bits(v) for s, v in slots.items()} for n, slots in written.slots.items()}
    assert {name: _bits(value) for name, value in read.tensors.items()} == {n: _bits(v) for n, v in written.tensors.items()}
    assert read.sampler == written.sampler
    assert read.facts == written.facts
    assert read.totals == written.totals
    assert read.clients == written.clients
    assert read.infeasible == written.infeasible


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_read_is_what_was_written_to_the_bit(tmp_path):
    state = _state(42)
    path = save(tmp_path / "made" / "here", state, "print", 2)
    assert path == tmp_path / "made" / "here" / "round_000042"
    assert _names(path.parent) == ["round_000042"]
    assert _names(path) == ["state.json", "state.safetensors"]
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1
    read = latest(path.parent, "print")
    _assert_same(read, state)
    assert params_sha256(read.params) == params_sha256(state.params)
    # What was read can be written again, and outlives its file.
    save(tmp_path / "again", read, "print", 1)
    shutil.rmtree(path.parent)
    _assert_same(latest(tmp_path / "again", "print"), state)
    _assert_same(read, state)


def test_tensors_of_any_layout(tmp_path):
    flat = torch.arange(12.0)
    params = {
        "b": flat[:6], "a": flat[6:], "overlap": flat[3:9], "all": flat, "again": flat, "transposed": flat.view(3, 4).t(),
        "expanded": torch.ones(1).expand(5), "gradient": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.bfloat16), "counter": torch.tensor(7),
    }
    expected = {name: value.detach().clone() for name, value in params.items()}
    save(tmp_path, ServerState(round_index=1, params=params, slots={"all": {"m": flat}}), "print", 1)
    read = latest(tmp_path, "print")
    assert list(read.params) == list(params)
    for name, value in expected.items():
        assert torch.equal(read.params[name], value), name
        assert read.params[name].dtype == value.dtype
    assert torch.equal(read.slots["all"]["m"], flat)
    assert flat.tolist() == list(range(12))  # nothing that was given is changed


def test_every_checkpoint_says_which_states_of_clients_it_needs(tmp_path):
    for number, clients in ((1, {}), (2, {4: 0}), (3, {4: 2, 9: 1})):
        save(tmp_path, replace(_state(number), clients=clients), "print", 2)
    assert client_versions(tmp_path) == [{4: 2, 9: 1}, {4: 0}]
    (tmp_path / "round_000003" / "state.safetensors").write_bytes(b"cut short")
    assert client_versions(tmp_path) == [{4: 0}]
    assert client_versions(tmp_path / "none") == []


def test_the_fingerprint_of_parameters():
    params = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    digest = params_sha256(params)
    assert digest == params_sha256(dict(reversed(params.items())))
    assert digest == params_sha256({"a": params["a"].t().contiguous().t(), "b": torch.nn.Parameter(torch.ones(2))})
    others = [
        {"a": params["a"].view(3, 2), "b": params["b"]}, {"a": params["a"] + 1, "b": params["b"]}, {"a": params["a"]},
        {"c": params["a"], "b": params["b"]}, {"a": params["a"], "b": params["b"].double()},
        {"a": params["a"], "b": torch.tensor([1.0, 1.0000001])},
    ]
    assert len({digest, *map(params_sha256, others)}) == len(others) + 1


def test_the_newest_few_are_kept(tmp_path):
    for round_index in range(1, 13):
        save(tmp_path, _state(round_index), "print", 3)
    assert _names(tmp_path) == ["round_000010", "round_000011", "round_000012"]
    assert latest(tmp_path, "print").round_index == 12
    save(tmp_path, _state(1_000_000), "print", 2)  # seven digits sort above six
    assert _names(tmp_path) == ["round_000012", "round_1000000"]
    assert latest(tmp_path, "print").round_index == 1_000_000


def test_no_checkpoint_is_no_error(tmp_path):
    assert latest(tmp_path / "nowhere", "print") is None
    assert latest(tmp_path, "print") is None
    (tmp_path / ".round_000001.partial").mkdir()
    (tmp_path / "round_1").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest(tmp_path, "print") is None
    save(tmp_path, _state(2), "print", 1)
    assert _names(tmp_path) == ["notes.txt", "round_000002", "round_1"]  # only what is ours is cleared away


def _cut(path, share, tail=b""):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)] + tail)


def _flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _change_json(path, **changes):
    header = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({k: v for k, v in (header | changes).items() if v is not None}))


DAMAGES = {
    "empty folder": lambda path: [file.unlink() for file in path.iterdir()],
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "no json": lambda path: (path / "state.json").unlink(),
    "empty tensors": lambda path: (path / "state.safetensors").write_bytes(b""),
    "empty json": lambda path: (path / "state.json").write_bytes(b""),
    "half the tensors": lambda path: _cut(path / "state.safetensors", 0.5),
    "half the json": lambda path: _cut(path / "state.json", 0.5),
    "a bit of the tensors": lambda path: _flip(path / "state.safetensors", -1),
    "a bit of their header": lambda path: _flip(path / "state.safetensors", 9),
    "a longer file": lambda path: _cut(path / "state.safetensors", 1.0, b"x"),
    "not json": lambda path: (path / "state.json").write_text("not json"),
    "not text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: (path / "state.json").write_text("[1]"),
    "null": lambda path: (path / "state.json").write_text("null"),
    "another round": lambda path: _change_json(path, round_index=7),
    "other facts": lambda path: _change_json(path, facts={"stage": 3}),
    "no totals": lambda path: _change_json(path, totals=None),
    "no checksum": lambda path: _change_json(path, sha256=None),
    "a file": lambda path: (shutil.rmtree(path), path.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tmp_path, caplog):
    written = {round_index: _state(round_index) for round_index in (1, 2, 3)}
    for state in written.values():
        save(tmp_path, state, "print", 3)
    DAMAGES[damage](tmp_path / "round_000003")
    with caplog.at_level(logging.WARNING):
        _assert_same(latest(tmp_path, "print"), written[2])
    assert len(caplog.records) == 1
    assert "round_000003 is damaged" in caplog.text

    DAMAGES[damage](tmp_path / "round_000002")
    _assert_same(latest(tmp_path, "print"), written[1])
    DAMAGES[damage](tmp_path / "round_000001")
    with pytest.raises(CheckpointError,
                       match=r"no checkpoint in .* can be read: round_000003: .*round_000002: .*round_000001: "):
        latest(tmp_path, "print")


def test_the_run_goes_on_over_a_damaged_checkpoint(tmp_path):
    for keep in (1, 2):
        folder = tmp_path / str(keep)
        save(folder, _state(30), "print", 2)
        save(folder, _state(40), "print", 2)
        _cut(folder / "round_000040" / "state.safetensors", 0.5)
        assert latest(folder, "print").round_index == 30
        save(folder, _state(35), "print", keep)  # the damaged one is of a later round, and must not count as the newest
        assert _names(folder) == ["round_000030", "round_000035"][-keep:]
        save(folder, _state(40, fill=1.0), "print", keep)
        _assert_same(latest(folder, "print"), _state(40, fill=1.0))
    save(folder, _state(40, fill=2.0), "print", 2)  # written over
    _assert_same(latest(folder, "print"), _state(40, fill=2.0))


def test_the_documents_name_the_format():
    text = (Path(__file__).parents[2] / "docs" / "run_folder.md").read_text(encoding="utf-8")
    assert f"`format` ({checkpoint._FORMAT})" in text


def test_a_checkpoint_of_another_configuration_or_format_is_refused(tmp_path):
    save(tmp_path, _state(1), "print", 2)
    save(tmp_path, _state(2), "other", 2)
    with pytest.raises(CheckpointError, match=r"round_000002 was written by another configuration .*: resume with"):
        latest(tmp_path, "print")
    assert latest(tmp_path, "other").round_index == 2
    _change_json(tmp_path / "round_000002", format=1)
    with pytest.raises(CheckpointError, match="round_000002 must have format 4, but has 1"):
        latest(tmp_path, "other")


class _Killed(BaseException):
    """Stands for SIGKILL: nothing may be cleaned up after it but by the next save."""


STEPS = {
    "mkdir": (Path, "mkdir"),
    "tensors": (checkpoint, "save_file"),
    "checksum": (checkpoint, "_file_sha256"),
    "json": (Path, "write_text"),
    "fsync": (os, "fsync"),
    "rename": (Path, "rename"),
}


def _fail_at(monkeypatch, step, call, error):
    """Make the ``call``-th use of a step raise; file contents are written by half first."""
    owner, name = STEPS[step]
    original, calls = getattr(owner, name), []

    def broken(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) < call:
            return original(*arguments, **keywords)
        if step == "tensors":
            original(*arguments, **keywords)
            _cut(Path(arguments[1]), 0.5)
        elif step == "json":
            original(arguments[0], arguments[1][: len(arguments[1]) // 2], **keywords)
        raise error

    monkeypatch.setattr(owner, name, broken)
    return calls


@pytest.mark.parametrize(("step", "calls"),
                         [("mkdir", 2), ("tensors", 1), ("checksum", 1), ("json", 1), ("fsync", 4), ("rename", 1)])
@pytest.mark.parametrize("killed", [False, True])
def test_a_failure_at_any_step_leaves_no_half_checkpoint(step, calls, killed, tmp_path, monkeypatch):
    for call in range(1, calls + 1):
        folder = tmp_path / str(call)
        save(folder, _state(1), "print", 2)
        with monkeypatch.context() as patch:
            error = _Killed() if killed else OSError(28, "No space left on device")
            counted = _fail_at(patch, step, call, error)
            expected = _Killed if killed else CheckpointError
            with pytest.raises(expected) as caught:
                save(folder, _state(2), "print", 1)
            assert len(counted) == call
        if not killed:
            assert "cannot write a checkpoint to" in str(caught.value)
            assert "No space left on device" in str(caught.value)
            assert not list(folder.glob(".*"))
        whole = latest(folder, "print")
        is_last_step = step == "fsync" and call == 4  # of the folder: by then the new one is in place
        _assert_same(whole, _state(2 if is_last_step else 1))
        save(folder, _state(2, fill=1.0), "print", 2)  # whatever was left lying about is no obstacle
        _assert_same(latest(folder, "print"), _state(2, fill=1.0))
        assert _names(folder) == ["round_000001", "round_000002"]


def test_a_checkpoint_that_is_written_over_survives_a_failure(tmp_path, monkeypatch):
    save(tmp_path, _state(1), "print", 1)
    for call in (1, 2):
        with monkeypatch.context() as patch:
            original, calls = Path.rename, []

            def rename(path, target, original=original, calls=calls, call=call):
                calls.append(path)
                if len(calls) == call:
                    raise OSError(5, "Input/output error")
                return original(path, target)

            patch.setattr(Path, "rename", rename)
            with pytest.raises(CheckpointError, match="Input/output error"):
                save(tmp_path, _state(1, fill=1.0), "print", 1)
        _assert_same(latest(tmp_path, "print"), _state(1))
        assert _names(tmp_path) == ["round_000001"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    save(tmp_path, _state(2, fill=1.0), "f", keep=1)
    (tmp_path / "round_000002").rename(tmp_path / ".round_000002.replaced")
    _assert_same(latest(tmp_path, "f"), _state(2, fill=1.0))
    (tmp_path / "round_000002").rename(tmp_path / ".round_000002.replaced")
    save(tmp_path, _state(3, fill=2.0), "f", keep=2)
    assert _names(tmp_path) == ["round_000002", "round_000003"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*file"):
        save(tmp_path / "file", _state(1), "print", 1)


def test_an_old_one_that_cannot_be_removed_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
    save(tmp_path, _state(1), "print", 1)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, _state(2), "print", 1)
    assert "round_000001 should go, but cannot be removed: [Errno 16] Device or resource busy" in caplog.text
    assert latest(tmp_path, "print").round_index == 2


def test_settings():
    assert CheckpointSettings().model_dump() == {"every": 10, "keep": 2}
