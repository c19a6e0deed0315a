"""How values and tables of runs are written for people, in a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import IO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.record import State

STATE_STYLES = {
    State.PENDING: "dim",
    State.STARTING: "cyan",
    State.RUNNING: "bold cyan",
    State.RECOVERING: "bold yellow",
    State.STOPPING: "yellow",
    State.SUCCEEDED: "bold green",
    State.STOPPED: "yellow",
    State.PRUNED: "dim",
    State.FAILED_USER: "bold red",
    State.FAILED_SPEC: "bold red",
    State.FAILED_RESOURCES: "bold red",
    State.FAILED_INFRA: "bold red",
}

_WIDTH_OF_FILES = 200
"""Columns where the output is no terminal: enough that no cell is cut."""


def console_for(stream: IO[str]) -> Console:
    """A console on stdout or stderr: colors only on a terminal, nothing cut elsewhere."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, width=_WIDTH_OF_FILES, no_color=True)


def print_to(stream: IO[str], *renderables: RenderableType) -> None:
    """Print to stdout or stderr, without the blanks at the ends of lines where it is a file."""
    console = console_for(stream)
    if console.is_terminal:
        console.print(*renderables, sep="\n")
        return
    with console.capture() as capture:
        console.print(*renderables, sep="\n")
    text = capture.get()
    stream.write("".join(line.rstrip() + "\n" for line in text.splitlines()))


def show_warnings(problems: Iterable[str]) -> None:
    """Warnings on stderr, beside the data on stdout."""
    for problem in problems:
        print_to(sys.stderr, Text(f"warning: {problem}", style="yellow"))


def print_table(columns: list[str], rows: list[list[str | Text]], *, right: set[str]) -> None:
    """A table on stdout; the columns in `right` are numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", no_wrap=sys.stdout.isatty()
        )
    for row in rows:
        table.add_row(*row)
    print_to(sys.stdout, table)


def state_text(state: State) -> Text:
    return Text(state, style=STATE_STYLES[state])


def format_number(value: object) -> str:
    """`0.8421`, `12,300`, `2.9e-05`: at most four significant digits; `-` for what is absent."""
    if not isinstance(value, int | float):
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_percent(share: object) -> str:
    return f"{share:.0%}" if isinstance(share, int | float) and math.isfinite(share) else "-"
