"""What commands print: tables for people, JSON for programs, progress for the impatient.

Results go to standard output, progress to standard error. Colour and moving bars appear on a terminal only;
``NO_COLOR`` is heeded.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from milepost.cli.table import lay_out
from milepost.storage.base import format_duration, format_nbytes

if TYPE_CHECKING:
    from rich.progress import Progress

BAR_AFTER_S = 0.5
"""Work that is done sooner shows no bar."""
FIRST_LINE_S, LINE_EVERY_S = 2.0, 10.0
"""Where there is no terminal, the first line of progress comes after the one time, more of them at most so often."""
MIN_WIDTH_OF_BAR = 72
"""A narrower terminal gets the numbers alone."""
BLOCK = "\u2587"

STATE_STYLES = {"committed": "green", "external": "cyan", "incomplete": "yellow", "damaged": "bold red"}


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
    """A table for people; columns named in ``numeric`` are aligned to the right."""
    out = console()
    cells = [[Text(printable(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows]
    out.print(Text("\n").join(lay_out(headers, cells, numeric=numeric, width=out.width if out.is_terminal else None)))


def bar(share: float, width: int) -> str:
    """A bar for ``share`` (0 to 1) of ``width`` cells, of blocks where the output can show them."""
    return (BLOCK if can_show(BLOCK) else "#") * round(width * share)


def can_show(text: str) -> bool:
    """Whether the encoding of standard output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def state_text(state: str) -> Text:
    """A checkpoint's state, coloured."""
    return Text(state, style=STATE_STYLES.get(state, ""))


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A callback ``(done_nbytes, total_nbytes)`` that shows how far a long work is, once it has taken a while.

    Lines of text where standard error is no terminal. It may be called from several threads.
    """
    started = time.monotonic()
    last = started + FIRST_LINE_S - LINE_EVERY_S
    bar: Progress | None = None
    shown = Console(stderr=True)
    lock = threading.Lock()

    def show(done: int, total: int) -> None:
        nonlocal bar, last
        now = time.monotonic()
        with lock:
            if not shown.is_terminal:
                if now - last >= LINE_EVERY_S:
                    last = now
                    print(f"{title}: {_how_far(done, total, now - started)}", file=sys.stderr, flush=True)
            elif bar is None and now - started >= BAR_AFTER_S:
                bar = _new_bar(shown)
                bar.start()
                bar.add_task(printable(title), total=total)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


def _how_far(done: int, total: int, elapsed_s: float) -> str:
    rate = done / elapsed_s
    text = f"{format_nbytes(done)} of {format_nbytes(total)}, {format_nbytes(int(rate))}/s"
    return f"{text}, {format_duration(max(total - done, 0) / rate)} left" if done else text


def _new_bar(shown: Console) -> Progress:
    # Not above: 50 ms that only long work needs.
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    columns += [BarColumn()] if shown.width >= MIN_WIDTH_OF_BAR else []
    columns += [DownloadColumn(binary_units=True)]
    columns += [TransferSpeedColumn(), TimeRemainingColumn()] if shown.width >= MIN_WIDTH_OF_BAR else []
    return Progress(*columns, console=shown, transient=True)
