"""Federations as the tests start them: through torchrun, or in a process of their own; and what is left of them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "TIMEOUT_S", "Job", "enter", "in_child", "poll", "rounds_of", "rows", "run_cli", "run_several", "summary"]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400  # no test waits longer for any one process; far above what each takes, so that a loaded machine passes
_MARKER = "DFED_TEST_JOB"
_PRELOADED = ["pytest", "dfed.leader", "dfed.strategies.fedavg", "dfed.models.cnn", "dfed.data.synthetic", "torch._dynamo"]
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


class Job:
    """One launched federation; its processes are known by a variable in their environment.

    Args:
        arguments: Of ``python -m dfed``, or of ``script``.
        ranks: Processes that torchrun starts; 1: no launcher.
        log: Where its output goes.
        environment: Further variables.
        launcher: Further arguments of torchrun.
        script: Runs instead of ``-m dfed``.
        command: Runs with ``arguments``, and starts the ranks itself; instead of all of these.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        ranks: int = 1,
        log: Path,
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        script: Path | None = None,
        command: Sequence[str | Path] = (),
    ):
        self.log, self._marker = log, f"{_MARKER}={uuid.uuid4().hex}"
        name, _, value = self._marker.partition("=")
        variables = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
        variables |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(environment or {}), name: value}
        if not command:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher]
            command = [sys.executable, *(torchrun if ranks > 1 else []), *(["-m", "dfed"] if script is None else [script])]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*map(str, command), *map(str, arguments)], stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=ROOT
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        """Everything it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit status, when it ends."""
        return self.process.wait(timeout_s)

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that live."""
        found = {}
        for pid in self._processes():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                rank = [int(text[5:]) for text in variables if text.startswith(b"RANK=")]
                if rank and b"run" in command:  # not the helpers that a rank itself starts
                    found[rank[0]] = pid
        return found

    def kill(self) -> None:
        """SIGKILL to every process of the job, the launcher first."""
        if self.process.poll() is None:
            self.process.kill()
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(TIMEOUT_S)
        self.assert_gone()

    def assert_gone(self) -> None:
        """Fail if a process of the job is left (one that is just ending is given a moment)."""
        poll(lambda: not self._processes(), f"processes were left behind: {self._processes()}", 10)

    def _processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if self._marker.encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found


def poll(condition: Callable[[], Any], failure: str, timeout_s: float = TIMEOUT_S) -> Any:
    """What ``condition`` gives, as soon as it is true; fails after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, failure
        time.sleep(0.02)


def in_child(function: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Start ``function(*arguments)`` in a fresh process that has imported dfed already: much faster than ``python -m``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def run_cli(arguments: Sequence[str | Path], log: Path, *, path: Path | None = None) -> int:
    """Exit status of ``dfed`` with these arguments, on one rank; its output goes to ``log``.

    Args:
        path: A folder whose modules it can import.
    """
    process = in_child(_cli, list(map(str, arguments)), str(log), str(path) if path else None)
    process.join(TIMEOUT_S)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"dfed did not end in {TIMEOUT_S} s")
    return process.exitcode


def _cli(arguments: list[str], log: str, path: str | None) -> None:
    from dfed.cli import main

    enter(log, path)
    sys.exit(main(arguments))


def enter(log: str, path: str | None = None) -> None:
    """Make this process look like one that a shell started: output, folder, environment."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.chdir(ROOT)
    for name in _LAUNCHER:
        os.environ.pop(name, None)
    if path is not None:
        sys.path.insert(0, path)


def run_several(runs: Sequence[Sequence[str | Path]], folder: Path, ranks: int) -> None:
    """Run ``dfed run …`` with each of these arguments under one torchrun, one after another; all must succeed.

    Each is a run of its own, in processes and a process group of its own; what is saved is the imports, which cost most.
    With one rank there is no launcher.
    """
    plan = folder / "runs.json"
    plan.write_text(json.dumps([["run", *map(str, run)] for run in runs]), encoding="utf-8")
    with Job([plan], ranks=ranks, log=folder / "several.log", script=Path(__file__).with_name("several.py")) as job:
        assert job.wait() == 0, job.output
        job.assert_gone()


def rows(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def rounds_of(folder: Path) -> list[int]:
    """The rounds that have a line of their own, as they stand in the file."""
    return [row["round"] for row in rows(folder) if row["kind"] == "round"]


def summary(folder: Path) -> dict[str, Any]:
    """A run's summary."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
