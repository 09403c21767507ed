"""``dfed compare``: runs every entry of a comparison under every seed, each in processes of its own, and reports."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rich.console import Console as Terminal

from dfed.comm import without_launcher
from dfed.compare_settings import LARGEST_SEED, MOST_SEEDS
from dfed.comparison import Comparison, PlannedRun, check_folder, load_comparison, progress_of
from dfed.errors import ConfigError, Fault
from dfed.faults import shown
from dfed.report import tables
from dfed.report.comparison import gather, read_run
from dfed.report.comparison_files import write_report
from dfed.report.comparison_text import show
from dfed.yaml_io import dump_yaml

__all__ = ["compare"]

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
_TABLE_WIDTH = 400  # a table made narrow would lose digits
_TAIL_LINES = 20


def compare(words: Sequence[str], options: argparse.Namespace) -> int:
    """Carry out ``dfed compare``; returns the exit status: 0; 1 if a run failed, now or before; 130 or 143 if it was asked
    to stop.

    Args:
        words: A config file, and overrides ``key.sub=value``.
        options: Of the command line.

    Raises:
        ConfigError: If the command line, a config or the folder is not as it must be; then nothing was run or written.
    """
    file, folder, names, seeds, ranks = _checked(words, options)
    overrides = [word for word in words if "=" in word]
    comparison = load_comparison(file, overrides, strategies=names, seeds=seeds, quick=options.quick)
    only, output = _only(options.only, comparison), _Output()
    if options.list:
        output.say("\n".join(f"{number} {run.name}" for number, run in enumerate(comparison.runs, start=1)))
        return 0
    check_folder(folder, comparison)
    command = _command(words, options)
    failed = False
    if options.report:
        if not folder.is_dir():
            raise ConfigError([Fault("--out", f"must be the folder of a comparison, but {folder} does not exist.")])
    else:
        with _locked(folder, only) as locks, _Stop() as stop:
            _write_configs(folder, comparison.runs if only is None else [only])
            failed = _run_all(comparison, only, folder, ranks, locks, stop, output)
            if stop.number is not None:
                output.say(f"stopped on request; go on with: {command}")
                return 128 + stop.number
        if only is not None:
            return EXIT_FAILED if failed or read_run(folder / "runs" / only.name, only).state == "failed" else 0
    results = gather(comparison, folder)
    report = write_report(results, folder, config=shlex.join([file, *overrides]), command=command)
    output.attempt(lambda: show(results, Terminal(width=_TABLE_WIDTH, highlight=False)))
    output.say(f"tables and figures: {report}")
    return EXIT_FAILED if failed or any(run.state == "failed" for run in results.outcomes) else 0


def _checked(words: Sequence[str], options: argparse.Namespace) -> tuple[
        str, Path, list[str] | None, int | tuple[int, ...] | None, int]:
    """Config file, folder, names, seeds and ranks of a command line without faults."""
    faults, files = [], [word for word in words if "=" not in word]
    if "RANK" in os.environ:
        faults.append(Fault("RANK", "must not be set, as by a launcher: `dfed compare` starts the ranks of its runs itself "
                                    f"(--ranks N), but it is {os.environ['RANK']}."))
    if len(files) != 1:
        faults.append(Fault("CONFIG", f"must be one YAML file, but {len(files)} are given."))
    names = None if options.strategies is None else [name.strip() for name in options.strategies.split(",")]
    if names is not None and (not all(names) or len(set(names)) < len(names)):
        faults.append(Fault("--strategies", "must be different names with commas between them, none of them empty, but is "
                                            f"'{options.strategies}'."))
    seeds: int | tuple[int, ...] | None = None
    if options.seeds is not None:
        seeds = _seeds(options.seeds)
        if seeds is None:
            message = (f"must be a number of seeds of at least 1 and at most {MOST_SEEDS}, or as many different seeds of "
                       f"at most {LARGEST_SEED} with commas between them (0,1,2)")
            faults.append(Fault("--seeds", f"{message}, but is {shown(options.seeds)}."))
    if not re.fullmatch(r"[1-9]\d{0,5}", options.ranks):
        faults.append(Fault("--ranks", f"must be a whole number of at least 1, but is '{options.ranks}'."))
    if options.out is not None and not options.out.strip():
        faults.append(Fault("--out", f"must name a folder, but is {options.out!r}."))
    if faults:
        raise ConfigError(faults)
    default = Path("runs") / f"{Path(files[0]).stem}-compare{'-quick' if options.quick else ''}"
    folder = Path(options.out) if options.out else default
    return files[0], folder, names, seeds, int(options.ranks)


def _only(text: str | None, comparison: Comparison) -> PlannedRun | None:
    """The run of that number, as ``--list`` counts them."""
    if text is None:
        return None
    total = len(comparison.runs)
    if not re.fullmatch(r"[1-9]\d{0,8}", text) or int(text) > total:
        message = f"must be the number of a run, at least 1 and at most {total} (see --list), but is {shown(text)}."
        raise ConfigError([Fault("--only", message)])
    return comparison.runs[int(text) - 1]


def _seeds(text: str) -> int | tuple[int, ...] | None:
    """A number of seeds, or the seeds; None if it is neither."""
    if not re.fullmatch(r"[0-9]{1,19}(,[0-9]{1,19})*", text):
        return None
    numbers = tuple(map(int, text.split(",")))
    if len(numbers) == 1:
        return numbers[0] if 1 <= numbers[0] <= MOST_SEEDS else None
    fits = len(numbers) <= MOST_SEEDS and len(set(numbers)) == len(numbers) and max(numbers) <= LARGEST_SEED
    return numbers if fits else None


def _command(words: Sequence[str], options: argparse.Namespace) -> str:
    """The command line that goes on with this comparison."""
    given = [("--strategies", options.strategies), ("--seeds", options.seeds),
             ("--ranks", None if options.ranks == "1" else options.ranks), ("--out", options.out), ("--only", options.only)]
    quick = ["--quick"] if options.quick else []
    return shlex.join(["python", "-m", "dfed", "compare", *words, *quick,
                       *(word for name, value in given if value is not None for word in (name, value))])


class _Output:
    """Standard output. Where it takes no more, that is said once, and the comparison goes on without."""

    def __init__(self) -> None:
        self._is_lost = False

    def say(self, line: str) -> None:
        """One line."""
        self.attempt(lambda: print(line, flush=True))

    def attempt(self, show: Callable[[], Any]) -> None:
        """Call ``show``, which writes, unless output is lost."""
        if self._is_lost:
            return
        try:
            show()
            sys.stdout.flush()
        except (OSError, SystemExit):  # by SystemExit rich would end the program when the reader has gone
            self._is_lost = True
            tables.drop_output()
            logger.warning("standard output cannot be written: the comparison goes on, and its folder says how")


class _Stop:
    """SIGINT and SIGTERM while runs are carried out: noted, and passed on to the run as SIGTERM, which checkpoints."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self._child is not None:
            self._child.terminate()

    def wait_for(self, child: subprocess.Popen[bytes]) -> int:
        """The child's exit status, when it ends."""
        self._child = child
        if self.number is not None:  # it came before there was a child to tell
            child.terminate()
        status = child.wait()
        self._child = None
        return status


@contextlib.contextmanager
def _locked(folder: Path, only: PlannedRun | None) -> Iterator[list[TextIO]]:
    """The folder, made if need be, for this command alone, or shared, and in it that run alone. Its runs hold the locks, too,
    should it be killed."""
    kinds = [(".lock", fcntl.LOCK_EX)] if only is None else [(".lock", fcntl.LOCK_SH), (f".lock.{only.name}", fcntl.LOCK_EX)]
    with contextlib.ExitStack() as stack:
        try:
            for part in ("runs", "configs"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            locks = [stack.enter_context((folder / name).open("w", encoding="utf-8")) for name, _ in kinds]
        except OSError as error:
            message = f"must be a folder that can be written, but {folder} is not: {error.strerror}."
            raise ConfigError([Fault("--out", message)]) from error
        try:
            for lock, (_, kind) in zip(locks, kinds, strict=True):
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except OSError as error:
            message = f"must be a folder that no other `dfed compare`, or run of one, is using, but {folder} is in use."
            raise ConfigError([Fault("--out", message)]) from error
        yield locks


def _write_configs(folder: Path, runs: Sequence[PlannedRun]) -> None:
    for run in runs:
        (folder / "configs" / f"{run.name}.yaml").write_text(dump_yaml(run.config.to_dict()), encoding="utf-8")


def _run_all(comparison: Comparison, only: PlannedRun | None, folder: Path, ranks: int, locks: Sequence[TextIO], stop: _Stop,
             output: _Output) -> bool:
    """Carry out what is not finished, or ``only`` that one, one run after another; returns whether one failed."""
    any_failed, total = False, len(comparison.runs)
    form = " --quick" if comparison.quick is not None else ""
    seeds = ", ".join(map(str, comparison.seeds))
    output.say(f"dfed compare{form}: {', '.join(comparison.labels)}; seeds {seeds}; runs {total}")
    output.say(f"folder: {folder}")
    for number, run in enumerate(comparison.runs, start=1):
        if stop.number is not None:
            break
        if only not in (None, run):
            continue
        where, begun = f"[{number}/{total}] {run.label}, seed {run.seed}:", time.perf_counter()
        path = folder / "runs" / run.name
        before = progress_of(path)
        if before == "finished":
            output.say(f"{where} {_ending(path, run, 'finished before, ')}")
            continue
        output.say(f"{where} " + ("started" if before == "new" else "going on"))
        reason = _run(run, folder, ranks, before == "unfinished", locks, stop)
        seconds = f"{time.perf_counter() - begun:.1f} s"
        if progress_of(path) == "finished":
            output.say(f"{where} {_ending(path, run)}, {seconds}")
        elif stop.number is None:
            any_failed = True
            output.say(f"{where} failed after {seconds}: {reason}")
    return any_failed


def _run(run: PlannedRun, folder: Path, ranks: int, resume: bool, locks: Sequence[TextIO], stop: _Stop) -> str:
    """Start or resume a run and wait for it. Returns why it failed; if it was not stopped, its last lines are shown then."""
    path, note = folder / "runs" / run.name, folder / "runs" / f"{run.name}.failed"
    log = folder / "runs" / f"{run.name}.log"
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    command = [sys.executable, "-m", *launcher, "dfed", "run", str(folder / "configs" / f"{run.name}.yaml"),
               "--resume" if resume else "--out", str(path)]
    note.unlink(missing_ok=True)
    with log.open("ab") as file, log.with_name(f"{run.name}.out").open("ab") as out:
        start = file.tell()
        # A session of its own: Ctrl-C on a terminal goes to this process only, which asks the run to stop in order.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=file, env=without_launcher(os.environ),
                                 start_new_session=True, pass_fds=[lock.fileno() for lock in locks])
        status = stop.wait_for(child)
    if status == 0 or stop.number is not None:
        return ""
    with log.open("rb") as written:
        written.seek(start)
        lines = written.read().decode(errors="replace").splitlines()
    reason = _reason(lines, status)
    note.write_text(reason + "\n", encoding="utf-8")
    print("\n".join([*(f"  {line}" for line in lines[-_TAIL_LINES:]), f"  (all of it: {log})"]), file=sys.stderr, flush=True)
    return reason


def _reason(lines: Sequence[str], status: int) -> str:
    """What a run said last of why it failed, on one line; else how it ended."""
    said = [number for number, line in enumerate(lines) if line.startswith("dfed: ")]
    if said:
        first, *rest = lines[said[-1]:]
        indented = [line.strip() for line in rest[:next((n for n, line in enumerate(rest) if line[:2] != "  "), len(rest))]]
        return " ".join([first.removeprefix("dfed: "), *indented])
    how = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{how}: {last}" if last else how


def _ending(path: Path, run: PlannedRun, before: str = "") -> str:
    """How a run that calls itself finished ended: ``before`` and its accuracy, or why its folder is of no use."""
    outcome = read_run(path, run)
    if outcome.state == "failed":
        return f"failed: {outcome.reason}"
    accuracy = outcome.values["accuracy"]
    return before + ("no accuracy" if accuracy is None else f"accuracy {accuracy:.4f}")
