"""What a run shows on the terminal: how it starts, live progress, and a table per tier at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dfed.cohort import Job
from dfed.comm import Link
from dfed.config import Config
from dfed.report import tables
from dfed.settings import format_bytes

__all__ = ["Console", "Screen", "causes"]

logger = logging.getLogger(__name__)

_CAUSES = {
    "oom": "out of memory",
    "dropout": "dropped out",
    "exception": "raised an exception",
    "late": "came too late",
    "host_memory": "met a machine out of memory",
    "features_lost": "lost what they kept of their samples",
    "non_finite": "had an update that is not finite",
    "out_of_range": "had an update out of range",
}


class Screen:
    """Standard output. Where it takes no more, that is said once, and the run goes on without."""

    def __init__(self, terminal: Terminal | None = None):
        self._terminal = terminal or Terminal(soft_wrap=True, highlight=False)
        self._is_lost = False

    def _say(self, text: str) -> None:
        self._try(lambda: tables.say(self._terminal, text))

    def _try(self, show: Callable[[], None]) -> None:
        if self._is_lost:
            return
        try:
            show()
        except (OSError, SystemExit) as error:  # by SystemExit rich would end the program when the reader has gone
            self._is_lost = True
            tables.drop_output()
            why = error.strerror if isinstance(error, OSError) else "its reader has gone"
            logger.warning("standard output cannot be written (%s): the run goes on, and its folder says how", why)


class Console(Screen):
    """Writes to standard output: a live bar on a terminal, a line a round elsewhere.

    The bar is redrawn between rounds, never by a thread of its own: on one rank such a thread would allocate under a
    client's cap.
    """

    def __init__(self, config: Config, job: Job, link: Link, terminal: Terminal | None = None):
        super().__init__(terminal)
        self._config, self._job, self._link = config, job, link
        self._progress: Progress | None = None
        self._task: Any = None

    def started(self, path: Path, round_index: int, seconds: float) -> None:
        """Say what is about to run."""
        say = self._say
        config, transport, fleet = self._config, self._link.transport, self._job.fleet
        num_params = sum(_size(shape) for name, shape in self._job.shapes.items() if name not in self._job.buffers)
        strategy = " in ".join([config.strategy.name, *(wrap.name for wrap in config.wrap)])
        say(f"dfed: {strategy}, {config.model.name} ({num_params:,} parameters), {config.data.dataset}, "
            f"{fleet.num_clients:,} clients, cohort {config.cohort}, rounds {config.rounds}")
        say(f"ranks: 1 server and {len(transport.client_ranks)} client, on {self._link.device}; backend "
            f"{self._link.backend}: {self._link.reason}; memory.enforce: {config.memory.enforce}")
        if config.memory.enforce == "off" and fleet.has_budgets:
            say("warning: memory.enforce is off: no client is held to its budget")
        say(f"run folder: {path}")
        say(f"ready in {seconds:.1f} s" + (f", going on after round {round_index}" if round_index else ""))
        if self._terminal.is_terminal:
            self._progress = Progress(
                TextColumn("round"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=self._terminal, auto_refresh=False,
            )
            self._task = self._progress.add_task("", total=config.rounds, completed=round_index)
            self._try(self._progress.start)

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Show a round's figures."""
        counts = row["clients"]
        parts = [f"{counts['completed']}/{counts['selected']} clients"]
        parts += [f"{counts[name]} {name}" for name in ("oom", "failed") if counts[name]]
        if row["train_loss"] is not None:
            parts.append(f"train loss {row['train_loss']:.3f}")
        if row.get("accuracy") is not None:
            parts.append(f"accuracy {row['accuracy']:.3f}")
        parts.append(f"up {format_bytes(row['bytes']['up'])}")
        parts.append(f"{row['time_s']:.2f} s")
        text = " | ".join(parts)
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=text)
            self._try(self._progress.refresh)
        else:
            self._say(f"round {row['round'] + 1}/{self._config.rounds} | {text}")

    def close(self) -> None:
        """Take the live bar away."""
        if self._progress is not None:
            self._try(self._progress.stop)
            self._progress = None

    def finished(self, summary: Mapping[str, Any], path: Path) -> None:
        """Show the table per tier, the totals and where everything lies."""
        table = tables.make_table("tier", "clients", "took\npart", "out of\nmemory", "budget\nMiB", "peak\nMiB", "up\nMiB",
                                  "down\nMiB", "accuracy")
        for tier in summary["tiers"]:
            accuracy = tier["accuracy"]
            tables.add_row(table, [
                tier["name"], f"{tier['clients']:,}", f"{tier['completed']} of {tier['selected']}", str(tier["oom"]),
                *(_mebibytes(tier[name]) for name in ("budget_bytes", "peak_bytes", "bytes_up", "bytes_down")),
                "–" if accuracy is None else f"{accuracy:.3f}",
            ])
        self._try(lambda: self._terminal.print(table))
        say = self._say
        if summary["accuracy"] is not None:
            say(f"{summary['split']} accuracy {summary['accuracy']:.4f}, loss {summary['loss']:.4f} "
                f"after {summary['rounds']} rounds")
        if summary["test"] is not None:
            say(f"test accuracy {summary['test']['accuracy']:.4f}, loss {summary['test']['loss']:.4f}, of the last model")
        if not summary["clients"]["completed"]:
            say("no client completed in any round: the model is the initial one "
                f"({causes(summary['clients'], summary['reasons'])})")
        say(f"time {summary['time_s']:.1f} s, simulated {summary['sim_time_s']:.0f} s, energy {summary['energy_j']:.0f} J, "
            f"up {format_bytes(summary['bytes']['up'])}, down {format_bytes(summary['bytes']['down'])}")
        if not summary["finished"]:
            say(f"stopped on request after round {summary['rounds']}; go on with: python -m dfed run --resume {path}")
        say(f"run folder: {path}")


def causes(counts: Mapping[str, int], reasons: Mapping[str, int]) -> str:
    """Why clients did not complete, with numbers: ``3 out of memory, 2 dropped out, 4 had no plan, 1 not available``.

    Args:
        counts: ``clients`` of a round's row or of the summary.
        reasons: How often each reason occurred.
    """
    parts = [f"{number} {_CAUSES.get(reason, reason)}" for reason, number in reasons.items() if number]
    parts += [f"{counts['ineligible']} had no plan"] if counts["ineligible"] else []
    parts += [f"{counts['unavailable']} not available"] if counts["unavailable"] else []
    return ", ".join(parts) or "nobody was asked"


def _mebibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.1f}"


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
