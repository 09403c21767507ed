"""``launch/local.sh``: torchrun on one machine, and on two, which are one here."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT, Job, poll, run_cli

ENDS_S = 30  # a round, and torchrun's own patience of a few seconds


@pytest.fixture
def environment(tmp_path):
    """Variables under which the scripts use this Python, and install nothing."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    real = shlex.quote(sys.executable)
    for name, command in (("python", f'[ "$2" = pip ] && exit 0\nexec {real} "$@"'),
                          ("torchrun", f'exec {real} -m torch.distributed.run "$@"')):
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    return {"DFED_VENV": str(tmp_path / "venv"), "TMPDIR": str(tmp_path)}


def local(arguments, log, **environment):
    return Job(arguments, command=[ROOT / "launch" / "local.sh"], log=log, environment=environment)


def logs_of(folder):
    """What every rank said, by its number on its node."""
    return {path.parent.name: path.read_text() for path in Path(folder).rglob("stderr.log")}


def test_one_machine(environment, long_config, same_as_undisturbed, tmp_path):
    with local([], tmp_path / "usage", **environment) as job:
        assert job.wait() == 2
        assert job.output.startswith("usage: ")
    logs = tmp_path / "logs"
    arguments = [long_config, "metrics.test_at_end=false", "--out", tmp_path / "run"]  # an override and an option pass through
    with local(arguments, tmp_path / "log", **environment, RANKS="2", LOGS=str(logs)) as job:
        assert job.wait() == 0, job.output
        job.assert_gone()
        said = job.output
    assert "1 server and 1 client" in said
    assert "[default0]" in said
    assert "[default1]" not in said  # the console shows the server only
    assert sorted(logs_of(logs)) == ["0", "1"]
    same_as_undisturbed(tmp_path / "run")
    # No temporary files but torch's own cache.
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor_")}
    assert left == {"usage", "log", "logs", "run", "venv"}


def test_paths_are_seen_from_the_folder_it_is_called_in(environment, tmp_path):
    torchrun = tmp_path / "venv" / "bin" / "torchrun"
    torchrun.write_text('#!/bin/sh\npwd\necho "$@"\n')
    for variables, logs in (({"LOGS": "mine"}, "mine"), ({}, "runs/logs/my-*")):
        done = subprocess.run([ROOT / "launch" / "local.sh", "my.yaml", "--out", "there"], cwd=tmp_path, timeout=ENDS_S,
                              env={**os.environ, **environment, **variables}, capture_output=True, text=True, check=True)
        where, said = done.stdout.splitlines()[-2:]  # after the word about installing
        assert where == str(tmp_path)
        assert said.endswith("-m dfed run my.yaml --out there")
        assert len(list(tmp_path.glob(logs))) == 1


def two_machines(arguments, environment, tmp_path):
    """The two halves of one job of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {**environment, "NODES": "2", "RANKS": "1", "ENDPOINT": f"127.0.0.1:{port}"}
    return [local(arguments, tmp_path / f"log{n}", **variables, LOGS=str(tmp_path / f"logs{n}")) for n in (0, 1)]


def agents(job):
    """Process ids of the parents of a job's ranks."""
    return {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in job.ranks().values()}


@pytest.mark.slow
def test_a_machine_whose_torchrun_is_killed(environment, long_config, same_as_undisturbed, tmp_path):
    """Its ranks would go on as orphans; the kernel ends them, in order, and with them the job, which can be gone on with."""
    folder = tmp_path / "run"
    one, other = jobs = two_machines([long_config, "--out", folder], environment, tmp_path)
    with one, other:
        poll(lambda: any((folder / "checkpoint").glob("round_*")), "no checkpoint was written")
        victim = next(job for job in jobs if 0 not in job.ranks())
        (killed,), survivor = victim.ranks(), one if victim is other else other
        assert agents(victim) == {victim.process.pid}
        os.kill(victim.process.pid, signal.SIGKILL)
        assert survivor.wait(ENDS_S) != 0
        victim.assert_gone()
        survivor.assert_gone()
    said = "".join(logs_of(tmp_path / f"logs{jobs.index(victim)}").values())
    assert re.search(rf"r{killed} the launcher of this rank has died", said), said
    assert "stopped on request after round" in survivor.output
    assert not list((folder / "checkpoint").glob(".*"))

    done = max(int(path.name.removeprefix("round_")) for path in (folder / "checkpoint").iterdir())
    log = tmp_path / "resumed"
    assert run_cli(["run", "--resume", folder], log) == 0, log.read_text()
    assert f"going on after round {done}" in log.read_text()
    same_as_undisturbed(folder)
