"""What a run shows on the terminal: how it starts, live progress, and a table per tier at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dfed.cohort import Job
from dfed.comm import Link
from dfed.config import Config
from dfed.settings import format_bytes

__all__ = ["Console", "causes"]

_CAUSES = {
    "oom": "out of memory",
    "dropout": "dropped out",
    "exception": "raised an exception",
    "host_memory": "met a machine out of memory",
    "non_finite": "had an update that is not finite",
    "out_of_range": "had an update out of range",
}


class Console:
    """Writes to standard output: a live bar on a terminal, a line a round elsewhere.

    The bar is redrawn between rounds, never by a thread of its own: on one rank such a thread would allocate under a
    client's cap.
    """

    def __init__(self, config: Config, job: Job, link: Link, terminal: Terminal | None = None):
        self._config, self._job, self._link = config, job, link
        self._terminal = terminal or Terminal(soft_wrap=True, highlight=False)
        self._progress: Progress | None = None
        self._task: Any = None

    def started(self, path: Path, round_index: int, seconds: float) -> None:
        """Say what is about to run."""
        config, transport, fleet = self._config, self._link.transport, self._job.fleet
        say = self._terminal.print
        num_params = sum(_size(shape) for name, shape in self._job.shapes.items() if name not in self._job.buffers)
        say(f"dfed: {config.strategy.name}, {config.model.name} ({num_params:,} parameters), {config.data.dataset}, "
            f"{fleet.num_clients:,} clients, cohort {config.cohort}, rounds {config.rounds}")
        say(f"ranks: 1 server and {len(transport.client_ranks)} client, on {self._link.device}; backend "
            f"{self._link.backend}: {self._link.reason}; memory.enforce: {config.memory.enforce}")
        if config.memory.enforce == "off" and fleet.has_budgets:
            say("warning: memory.enforce is off: no client is held to its budget")
        say(f"run folder: {path}")
        say(f"ready in {seconds:.1f} s" + (f", going on after round {round_index}" if round_index else ""))
        if self._terminal.is_terminal:
            self._progress = Progress(
                TextColumn("round"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
                console=self._terminal, auto_refresh=False,
            )
            self._task = self._progress.add_task("", total=config.rounds, completed=round_index)
            self._progress.start()

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
            self._progress.refresh()
        else:
            self._terminal.print(f"round {row['round'] + 1}/{self._config.rounds} | {text}")

    def close(self) -> None:
        """Take the live bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def finished(self, summary: Mapping[str, Any], path: Path) -> None:
        """Show the table per tier, the totals and where everything lies."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("tier", no_wrap=True)
        headings = ("clients", "took\npart", "out of\nmemory", "budget\nMiB", "peak\nMiB", "up\nMiB", "down\nMiB", "accuracy")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for tier in summary["tiers"]:
            accuracy = tier["accuracy"]
            table.add_row(
                tier["name"], f"{tier['clients']:,}", f"{tier['completed']} of {tier['selected']}", str(tier["oom"]),
                *(_mebibytes(tier[name]) for name in ("budget_bytes", "peak_bytes", "bytes_up", "bytes_down")),
                "–" if accuracy is None else f"{accuracy:.3f}",
            )
        say = self._terminal.print
        say(table)
        if summary["accuracy"] is not None:
            say(f"{summary['split']} accuracy {summary['accuracy']:.4f}, loss {summary['loss']:.4f} "
                f"after {summary['rounds']} rounds")
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
