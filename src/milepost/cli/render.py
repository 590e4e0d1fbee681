"""What commands print: tables for people, JSON for programs, progress for the impatient.

Results go to standard output, progress to standard error. Colour and moving bars appear on a terminal only;
``NO_COLOR`` is heeded.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from milepost.storage.base import format_nbytes

PLAIN_PROGRESS_S = 10.0
"""Where there is no terminal, a line of progress comes at most so often."""

STATE_STYLES = {"committed": "green", "foreign": "cyan", "partial": "yellow", "damaged": "bold red"}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to ``main``; rich would end the program with status 1."""
        raise BrokenPipeError


def console() -> Console:
    """Standard output. Lines are not wrapped or cut when it is not a terminal."""
    out = _Console(highlight=False, soft_wrap=True)
    return out if out.is_terminal else _Console(highlight=False, soft_wrap=True, width=10_000)


def printable(text: str) -> str:
    """``text`` as a terminal may show it: keys and names come from files that anybody may have written."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def print_json(value: Any) -> None:
    """A result for programs: one JSON document."""
    print(json.dumps(value, indent=2))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str | Text]], *, numeric: Sequence[str] = ()) -> None:
    """A table for people; columns named in ``numeric`` are aligned to the right. Trailing blanks are left out."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, justify="right" if header in numeric else "left", no_wrap=header != headers[-1])
    for row in rows:
        table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    out = console()
    if out.is_terminal:
        out.print(table, soft_wrap=False)
        return
    with out.capture() as captured:
        out.print(table)
    out.print("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")), markup=False)


def state_text(state: str) -> Text:
    """A checkpoint's state, coloured."""
    return Text(state, style=STATE_STYLES.get(state, ""))


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A callback ``(done_nbytes, total_nbytes)`` that shows how far a long read is."""
    shown = Console(stderr=True)
    if not shown.is_terminal:
        yield _plain_progress(title)
        return
    # Not above: 50 ms that only long reads need.
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=shown, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress(title: str) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_PROGRESS_S:
            last = now
            rate = format_nbytes(int(done / (now - started)))
            print(f"{title}: {format_nbytes(done)} of {format_nbytes(total)}, {rate}/s", file=sys.stderr, flush=True)

    return show
