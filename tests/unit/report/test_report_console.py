from __future__ import annotations

import errno
import io
import logging
from pathlib import Path

from rich.console import Console as Terminal

from dfed.report.console import Console, causes

COUNTS = {"selected": 9, "completed": 0, "oom": 3, "failed": 6, "ineligible": 4, "unavailable": 1}
REASONS = {"oom": 3, "dropout": 2, "exception": 1, "host_memory": 1, "non_finite": 1, "out_of_range": 1}
SUMMARY = {
    "tiers": [], "split": "test", "accuracy": 0.25, "loss": 1.5, "test": None, "rounds": 3, "finished": True, "clients": COUNTS,
    "reasons": REASONS, "bytes": {"up": 0, "down": 2048}, "time_s": 1.0, "sim_time_s": 0.0, "energy_j": 0.0,
}


def _shown(summary):
    file = io.StringIO()
    Console(None, None, None, Terminal(file=file, soft_wrap=True, highlight=False, width=200)).finished(summary, Path("runs/x"))
    return file.getvalue()


def test_causes_are_counted_in_words():
    everything = causes(COUNTS, REASONS)
    assert everything == (
        "3 out of memory, 2 dropped out, 1 raised an exception, 1 met a machine out of memory, 1 had an update that is not "
        "finite, 1 had an update out of range, 4 had no plan, 1 not available"
    )
    assert causes(COUNTS | {"ineligible": 0, "unavailable": 0}, {"oom": 3}) == "3 out of memory"
    assert causes(dict.fromkeys(COUNTS, 0), {}) == "nobody was asked"


def test_a_run_that_nobody_took_part_in_says_so_at_the_end():
    line = f"no client completed in any round: the model is the initial one ({causes(COUNTS, REASONS)})\n"
    assert line in _shown(SUMMARY)
    assert "no client completed" not in _shown(SUMMARY | {"clients": COUNTS | {"completed": 1}})


def test_a_test_at_the_end_is_said():
    assert "test accuracy 0.2500, loss 1.5000 after 3 rounds\n" in _shown(SUMMARY)
    assert "of the last model" not in _shown(SUMMARY)
    shown = _shown(SUMMARY | {"split": "validation", "test": {"accuracy": 0.125, "loss": 2.25}})
    assert ("validation accuracy 0.2500, loss 1.5000 after 3 rounds\n"
            "test accuracy 0.1250, loss 2.2500, of the last model\n") in shown


def test_names_are_shown_as_they_are_written(monkeypatch):
    tier = {"clients": 1, "completed": 1, "selected": 1, "oom": 0, "budget_bytes": None, "peak_bytes": None, "bytes_up": 0,
            "bytes_down": 0, "accuracy": None}
    shown = _shown(SUMMARY | {"tiers": [{"name": name, **tier} for name in ("[/x]", "[red]", ":fire:", "a\\[b]")]})
    lines = [line.split()[0] for line in shown.splitlines() if line.strip().endswith("–")]
    assert lines == ["[/x]", "[red]", ":fire:", "a\\[b]"]
    file = io.StringIO()
    Console(None, None, None, Terminal(file=file, width=200)).finished(SUMMARY, Path("runs/[/x]"))
    assert file.getvalue().endswith("run folder: runs/[/x]\n")


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text):
        self.tries += 1
        raise self.error


def test_output_that_is_lost_is_said_once_and_ends_no_run(caplog, monkeypatch):
    monkeypatch.setattr("dfed.report.tables.drop_output", lambda: None)
    gone = ((OSError(errno.ENOSPC, "No space left on device"), "No space left"), (BrokenPipeError(), "its reader has gone"))
    monkeypatch.setattr(Terminal, "on_broken_pipe", lambda self: (_ for _ in ()).throw(SystemExit(1)))  # without its dup2
    for error, said in gone:
        caplog.clear()
        file = Broken(error)
        with caplog.at_level(logging.WARNING):
            Console(None, None, None, Terminal(file=file, width=80)).finished(SUMMARY, Path("runs/x"))
        assert file.tries == len(caplog.records) == 1
        assert said in caplog.text
        assert "the run goes on" in caplog.text
