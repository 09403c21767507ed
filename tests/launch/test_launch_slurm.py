"""The batch scripts on a real SLURM: two nodes, which are both this machine (``cluster.sh``)."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from jobs import ROOT, TIMEOUT_S, poll, rounds_of, run_cli, summary

from dfed.comm import adopt

SLURM = ROOT / "launch" / "slurm"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
MISSING = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
VARIABLES = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge")]

COMPARISON = """
seed: 3
rounds: 2
cohort: 3
model: {name: mlp, hidden: [16]}
data: {dataset: synthetic, shape: [1, 8, 8], classes: 4, samples: 120, test_samples: 40, partition: dirichlet}
fleet: {clients: 6, tiers: [{name: all, share: 1.0}]}
client: {learning_rate: 0.05, batch_size: 8}
metrics: {tensorboard: false}
compare: {strategies: [fedavg], seeds: 1}
"""


class Cluster:
    """How its commands are called."""

    def __init__(self, folder):
        self._variables = {**VARIABLES, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1",
                           "DFED_VENV": sys.prefix, "STOP_S": "60"}

    def __call__(self, *command, **variables):
        """Standard output of a command."""
        done = subprocess.run(list(map(str, command)), env=self._variables | variables, cwd=ROOT, capture_output=True,
                              text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments, **variables):
        """Number of the job."""
        return self("sbatch", "--parsable", *arguments, **variables).strip()

    def state(self, job):
        """Of a job: as ``scontrol show job`` has it, by name."""
        time.sleep(0.2)  # who asks all the time takes the processor from the job
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", job)))

    def wait(self, job, log):
        """Until a job is over; it must have succeeded."""
        state = poll(lambda: (found := self.state(job))["JobState"] not in ("PENDING", "RUNNING", "COMPLETING") and found,
                     f"job {job} does not end")
        assert state["JobState"] == "COMPLETED", log.read_text(errors="replace")
        return state


@pytest.fixture(scope="module")
def cluster():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] % 2_700 + 30_000  # below those of outgoing connections; the next ones are needed, too
    # Not under pytest's own folder: paths of sockets are short.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    script, variables = ROOT / "tests" / "launch" / "cluster.sh", {**VARIABLES, "PATH": PATH}
    try:
        started = subprocess.run([script, "start", folder, str(port)], env=variables, capture_output=True, text=True,
                                 timeout=TIMEOUT_S, check=False)
        assert started.returncode == 0, started.stderr[-2000:]
        yield Cluster(folder)
    finally:
        subprocess.run([script, "stop", folder], env=variables, timeout=TIMEOUT_S, check=False)
        shutil.rmtree(folder)


def rank_of(folder, rank):
    """Process id of a rank of the run in ``folder``; None: it does not live."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            words, variables = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            if b"run" in words and str(folder).encode() in words and f"RANK={rank}".encode() in variables:
                return int(process.name)
    return None


def test_a_job_on_two_nodes_is_stopped_before_its_time_is_up_loses_a_rank_and_goes_on_by_itself(
        cluster, long_config, same_as_undisturbed, tmp_path, monkeypatch):
    """Beside it, on the same head node, one whose ranks srun starts itself: their ports differ."""
    folder, direct, log, shell = (tmp_path / name for name in ("run", "srun", "log", "shell"))
    job = cluster.submit("--cpus-per-task=1", f"--output={log}", SLURM / "multi_node.sbatch", long_config,
                         "checkpoint.every=29", OUT=str(folder), RANKS="1")
    script = tmp_path / "direct.sbatch"
    python = f"{sys.executable} -m dfed run {long_config} checkpoint.every=1 --out {direct}"
    script.write_text(f"#!/bin/sh\nenv -0 >{shell}\nexec srun --kill-on-bad-exit=1 {python}\n")
    poll(lambda: (folder / "metrics.jsonl").exists() and rounds_of(folder), "no round was completed")
    cluster("scancel", "--signal=USR1", "--batch", job)  # as SLURM itself does, with --signal=B:USR1@300
    beside = cluster.submit("--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path / 'beside'}", script)
    said = poll(lambda: (text := log.read_text(errors="replace")).count("back into the queue") and text, "it was not requeued")
    assert "stopped on request after round" in said
    assert not (folder / "summary.json").exists() or not summary(folder)["finished"]
    before = len(rounds_of(folder))
    poll(lambda: len(rounds_of(folder)) > before, "it does not go on")
    # The one retry is still to be had: a stop before the time limit is no failure.
    os.kill(poll(lambda: rank_of(folder, 1), "rank 1 does not live"), signal.SIGKILL)
    assert cluster.wait(job, log)["Restarts"] == "2"
    said = log.read_text(errors="replace")
    assert said.count("failed with status") == 1
    assert said.count("going on after round") == 2
    assert len(list((tmp_path / "run-logs").rglob("stderr.log"))) == 6  # of both ranks, three times
    cluster.wait(beside, tmp_path / "beside")
    same_as_undisturbed(folder)
    same_as_undisturbed(direct)
    assert summary(direct)["bytes"]["fabric"] > 0
    # In the shell of a job there are SLURM's variables as well: a command there is one process for all that.
    variables = dict(item.split("=", 1) for item in shell.read_text().split("\0") if item)
    assert (variables["SLURM_PROCID"], variables["SLURM_NTASKS"]) == ("0", "2")
    monkeypatch.setattr(os, "environ", variables)
    adopt()
    assert "RANK" not in variables


def test_an_array_fills_the_folder_of_one_comparison(cluster, tmp_path):
    """Of its jobs one is stopped before its time is up, and it alone goes back into the queue."""
    config, out = tmp_path / "c.yaml", tmp_path / "out"
    config.write_text(COMPARISON, encoding="utf-8")
    words = [config, "rounds=600", "checkpoint.every=200", "--seeds", "2"]
    command = ["compare", *words]
    assert run_cli([*command, "--list"], tmp_path / "list") == 0
    assert (tmp_path / "list").read_text().splitlines() == ["1 fedavg-s3", "2 fedavg-s4"]
    job = cluster.submit("--array=1-2", f"--output={tmp_path}/%a.log", SLURM / "array.sbatch", *words, OUT=str(out))
    poll(lambda: (out / "runs" / "fedavg-s4" / "metrics.jsonl").exists(), "the second run does not begin")
    cluster("scancel", "--signal=USR1", "--batch", f"{job}_2")
    states = [cluster.wait(f"{job}_{task}", tmp_path / f"{task}.log") for task in (1, 2)]
    assert [state["Restarts"] for state in states] == ["0", "1"]
    assert run_cli([*command, "--out", out, "--report"], tmp_path / "report") == 0, (tmp_path / "report").read_text()
    rows = list(csv.DictReader((out / "comparison.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["seed"], row["state"]) for row in rows] == [("3", "finished"), ("4", "finished")]


def test_a_script_says_what_it_lacks(cluster, tmp_path):
    for variables, arguments, message in [
        ({"DFED_VENV": str(tmp_path)}, ["c.yaml"], f"there is no environment with dfed in {tmp_path}: make one before"),
        ({}, [], "the first argument must be a config"),
    ]:
        log = tmp_path / f"log{len(arguments)}"
        job = cluster.submit(f"--output={log}", SLURM / "one_node.sbatch", *arguments, **variables)
        poll(lambda job=job: cluster.state(job)["JobState"] == "FAILED", "it does not fail")
        assert message in log.read_text()
