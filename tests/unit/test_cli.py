from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfed import __version__
from dfed.cli import main
from dfed.errors import ConfigError
from dfed.registry import ALL, STRATEGIES
from dfed.report.folder import RunFolder

pytestmark = pytest.mark.usefixtures("own_process_state")

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke" / "fedavg.yaml")


def _says(capsys, *arguments):
    """Exit status 2 and what was written to stderr; nothing on stdout, nothing left behind."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(Path.cwd().rglob("*")) == before
    assert "Traceback" not in err
    return err


def test_version_and_help(capsys):
    cases = [(["--version"], f"dfed {__version__}"), (["--help"], "usage: dfed"), (["run", "--help"], "--resume DIR")]
    for arguments, shown in cases:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert shown in capsys.readouterr().out


def test_list_shows_every_name_with_its_summary(capsys):
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    for title, registry in ALL.items():
        start = lines.index(f"{title}:")
        for offset, name in enumerate(registry, start=1):
            assert lines[start + offset] == f"  {name:18} {registry.summary(name)}"
    assert len(lines) == len(ALL) + sum(len(list(registry)) for registry in ALL.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"), (["fit"], "invalid choice"), (["run", SMOKE, "--fast"], "unknown argument: --fast"),
        (["list", "models"],
         "unknown argument: models"), (["list", "--all"], "unknown argument: --all"), (["run", "--out"], "--out"),
        (["run", SMOKE, "-x=1"], "unknown argument: -x=1"),
    ],
)
def test_a_wrong_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "1 fault in the config:\n  `CONFIG` must be given: a YAML file, or --resume DIR."),
        (["run", "rounds=1"], "`CONFIG` must be given: a YAML file, or --resume DIR."),
        (["run", "absent.yaml"], "`absent.yaml` must be a readable file, but is not: No such file or directory."),
        (["run", SMOKE, "other.yaml"], "`other.yaml` must have the form key.sub=value (one config file is enough)."),
        (["run", "--resume", "nowhere"], "`--resume` must be the folder of a run, but nowhere holds no config.yaml."),
        (["run", SMOKE, "--resume", "a", "--out", "b"], "`--out` must be left out with --resume, or be a too, but is b."),
        (["run", SMOKE, "rounds=0", "clients=3", "--out", "x"],
         "2 faults in the config:\n  `clients` is not a setting; known here: "),
        (["run", "strategy=nope", SMOKE, "--out", "x"],
         f"`strategy` must be one of {', '.join(STRATEGIES)}, but is 'nope'."),
        (["run", SMOKE, "--out", ""], "`--out` must name a folder, but is ''."),
        (["run", SMOKE, "--out="], "`--out` must name a folder, but is ''."),
        (["run", "--resume", " "], "`--resume` must name a folder, but is ' '."),
        (["run", SMOKE, "cohort=9"], "`cohort` must be at most `fleet.clients` (8), but is 9."),
    ],
)
def test_a_wrong_config_is_exit_status_2(arguments, message, capsys):
    err = _says(capsys, *arguments)
    assert err.startswith("dfed: ")
    assert message in err


def test_other_ranks_let_rank_0_speak_first_and_say_who_they_are(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("dfed.cli.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    assert _says(capsys, "run", SMOKE, "rounds=0").startswith("dfed: rank 3: 1 fault in the config")
    assert len(waited) == 1


def test_a_wrong_config_is_found_before_a_process_group_is_joined(capsys, monkeypatch):
    def joined(*arguments, **keywords):
        raise AssertionError("joined the process group")

    import torch.distributed as dist

    monkeypatch.setattr(dist, "init_process_group", joined)
    monkeypatch.setattr(dist, "rendezvous", joined)
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert "3 faults" in _says(capsys, "run", SMOKE, "rounds=0", "model.hidden=0", "client.epochs=x", "--out", "x")


def test_a_folder_that_holds_a_run_is_not_written_over(capsys, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("mine")
    err = _says(capsys, "run", SMOKE, "--out", "old")
    assert "`--out` must be a new folder, or be continued with --resume, but old holds a run." in err
    assert (tmp_path / "old" / "config.yaml").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    assert "`--out` must be a folder that can be written, but file is not: " in _says(capsys, "run", SMOKE, "--out", "file")


def test_a_folder_that_holds_something_else_is_not_written_into(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine" / "sub.log").mkdir(parents=True)
    said = "`--out` must be a new or empty folder, but mine holds "
    assert f"{said}'sub.log'." in _says(capsys, "run", SMOKE, "--out", "mine")
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    assert f"{said}'sub.log' and 1 more." in _says(capsys, "run", SMOKE, "--out", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # which resumes runs only
    assert said in _says(capsys, "run", SMOKE, "--out", "mine")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("dfed.cli.time.sleep", lambda seconds: None)
    monkeypatch.setattr("dfed.leader.execute", lambda config, folder, state: 0)
    assert main(["run", SMOKE, "--out", "mine"]) == 0  # rank 0 looks


def test_a_folder_that_may_be_written_into(tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr("dfed.leader.execute", lambda config, folder, state: began.append((folder.path, state)) or 0)
    for name, files in {"new": None, "empty": [], "logs": ["slurm-7.out", "a.err", "b.log", ".config.yaml.partial"]}.items():
        if files is not None:
            (tmp_path / name).mkdir()
        for file in files or []:
            (tmp_path / name / file).touch()
        assert main(["run", SMOKE, "--out", name]) == 0
    # Started again by the launcher: before the run had a config.yaml, and after.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["run", SMOKE, "--out", "logs"]) == 0
    (tmp_path / "logs" / "config.yaml").touch()
    (tmp_path / "logs" / "metrics.jsonl").touch()
    assert main(["run", SMOKE, "--out", "logs"]) == 0
    assert began == [(Path(name), None) for name in ("new", "empty", "logs", "logs", "logs")]


def test_a_folder_of_the_other_kind_is_left_as_it_is(capsys, tmp_path):
    train = SMOKE.replace("smoke/fedavg", "train/bp")
    said = "`--resume` must be the folder of a `dfed {}`, but {} is that of a `dfed {}`."
    cases = {"run": (SMOKE, "model: {}\nmethod: bp\n", "train", "epoch_000001"),
             "train": (train, "rounds: 3\n", "run", "round_000001")}
    for command, (file, theirs, other, checkpoint) in cases.items():
        for name, config, folder in (("whole", theirs, "empty"), ("damaged", ": [", checkpoint)):
            place = f"{command}_{name}"
            (tmp_path / place / "checkpoint" / folder).mkdir(parents=True)
            (tmp_path / place / "config.yaml").write_text(config)
            assert said.format(command, place, other) in _says(capsys, command, file, "--resume", place)
        err = _says(capsys, command, train if command == "run" else SMOKE)
        assert "1 fault in the config" in err
        assert f"which `dfed {other}` runs" in err


def test_two_runs_in_one_folder(capsys, tmp_path, monkeypatch):
    """The second is refused while the first is at work, and when it has begun in between."""
    folder = RunFolder(tmp_path / "run")
    folder.check_new()
    late = RunFolder(tmp_path / "run")
    late.check_new()
    with folder.held():
        (tmp_path / "run" / "config.yaml").write_text("x")
        with pytest.raises(ConfigError, match="that no other process writes, but"), RunFolder(folder.path).held():
            pass
    with pytest.raises(ConfigError, match="holds a run"), late.held():
        pass
    with RunFolder(folder.path).held():  # a run that is gone on with
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_full_disk_is_said_in_a_line(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".summary.json.partial").symlink_to("/dev/full")
    assert main(["run", SMOKE, "rounds=1", "metrics.tensorboard=false", "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert "dfed: rank 0: a file cannot be read or written: [Errno 28] No space left on device" in err
    assert "Traceback" not in err


def test_a_list_whose_reader_has_gone_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-m", "dfed", "list"], stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_list_that_cannot_be_written_is_said_once():
    for redirect, said in ((">&-", b"is closed"), (">/dev/full", b"cannot be written: No space left on device")):
        done = subprocess.run(["sh", "-c", f'exec "$0" -m dfed list {redirect}', sys.executable], stderr=subprocess.PIPE,
                              stdout=subprocess.DEVNULL, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(b"dfed: standard output " + said)
        assert done.stderr.count(b"\n") == 1


def test_listing_needs_no_torch_distributed_and_no_run(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["list"]) == 0
    assert re.search(r"^  fedavg +\S", capsys.readouterr().out, re.MULTILINE)
    assert not os.listdir(".")


def test_the_module_runs_the_command_line(capsys, monkeypatch):
    import runpy

    monkeypatch.setattr(sys, "argv", ["dfed", "list"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("dfed", run_name="__main__")
    assert caught.value.code == 0
    assert "strategies:" in capsys.readouterr().out
