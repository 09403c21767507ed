"""What all tables on the terminal have in common: their looks, and that text is shown as it is written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console as Terminal
from rich.table import Table
from rich.text import Text

__all__ = ["add_row", "drop_output", "make_table", "say"]


def make_table(*headings: str) -> Table:
    """A table with these headings; the first column is flushed left, the others right. Headings are no markup."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if number else "left", no_wrap=True)
    return table


def add_row(table: Table, cells: Sequence[str]) -> None:
    """One more row; cells are no markup."""
    table.add_row(*map(Text, cells))


def say(terminal: Terminal, text: str) -> None:
    """A line of text, which is no markup."""
    terminal.print(Text(text))


def drop_output() -> None:
    """Send standard output nowhere from now on, as it takes no more; what is left of it is flushed when the program ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
