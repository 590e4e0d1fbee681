"""Output of the commands: tables for people, JSON for programs, progress bars.

Results go to standard output, progress to standard error. Colour and moving bars appear on a terminal only;
``NO_COLOR`` is respected.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from milepost.errors import listed, shortened
from milepost.storage.base import format_duration, format_nbytes

if TYPE_CHECKING:
    from rich.progress import Progress

DIFFERENT = 9
"""Exit status if the two differ."""
MIN_RATE_S = 0.5
"""Time after which a rate is known."""
BAR_AFTER_S = 0.5
"""Work that finishes sooner shows no bar."""
FIRST_LINE_S, LINE_EVERY_S = 2.0, 10.0
"""Without a terminal: time until the first line of progress, and between two lines."""
MIN_WIDTH_OF_RATE = 60
"""A narrower terminal has no room for rate and time beside the bar and the amounts."""
MAX_TITLE_LENGTH = 24
BLOCK = "\u2587"
GAP = 2
"""Number of blanks between two columns of a table."""
MIN_LAST_WIDTH = 24
"""Minimum width to which the last column of a table may be folded."""
MAX_CELL_LENGTH = 160
"""Maximum number of characters shown in a column that is not the last."""
MAX_TEXT_LENGTH = 2000
"""Maximum number of characters shown of a key or another text from a file."""

STATE_STYLES = {
    "committed": "green",
    "external": "cyan",
    "incomplete": "yellow",
    "newer": "yellow",
    "damaged": "bold red",
    "unreadable": "red",
}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let ``main`` handle it; rich would exit with status 1."""
        raise BrokenPipeError


def console() -> Console:
    """Standard output. Lines are not wrapped or cut when it is not a terminal."""
    out = _Console(highlight=False, soft_wrap=True)
    return out if out.is_terminal else _Console(highlight=False, soft_wrap=True, width=10_000)


def printable(text: str) -> str:
    """Make ``text`` safe to print on one line of a terminal: keys and names come from untrusted files."""
    text = shortened(text, MAX_TEXT_LENGTH)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Apply :func:`printable` to each line of a text."""
    return "\n".join(map(printable, text.split("\n")))


def print_line(text: str | Text) -> None:
    """Print one line for people."""
    console().print(Text(printable(text)) if isinstance(text, str) else text)


def print_list(title: str, lines: Sequence[str], *, limit: int) -> None:
    """Print a title with the number of ``lines``, and the first of them; nothing if there are none."""
    if not lines:
        return
    print_line(f"{title} ({len(lines)}):")
    for line in listed(lines, limit, hint="; --json lists them"):
        print_line(f"  {line}")


def page_path(text: str) -> str:
    """Check the path of a page to write before the work for it begins; the type of an argument of argparse."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL: give the path of a local file, and copy it there")
    path = pathlib.Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give the path of a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write {path.name} to: create it first")
    from milepost.run.beside import enclosing_checkpoint  # imports the readers, which --help does not need
    from milepost.storage import open_storage

    if (checkpoint := enclosing_checkpoint(text, open_storage(path.parent)[0])) is not None:
        raise argparse.ArgumentTypeError(f"{text} is inside the checkpoint {checkpoint}: give a path outside of it")
    return text


def write_page(path: str, document: str) -> int:
    """Write an HTML page to ``path``, escaping what UTF-8 can't encode; returns its size in bytes.

    A page that is there already is replaced once the new one is complete.

    Raises:
        StorageError: it can't be written.
    """
    from milepost.storage.system_errors import storage_error  # only commands that write pages need the storage

    data = document.encode("utf-8", "backslashreplace")
    target = pathlib.Path(path).resolve()
    is_special = target.exists() and not target.is_file()  # /dev/stdout
    draft = target if is_special else target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        if draft != target:
            draft.replace(target)
    except OSError as error:
        if draft != target:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        raise storage_error(error, "write", path, f"writing {path}") from error
    return len(data)


def print_json(value: Any) -> None:
    """Print a result for programs as one JSON document. NaN and infinity, which JSON lacks, become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str | Text]], *, numeric: Sequence[str] = ()) -> None:
    """Print a table for people, one line per row; columns named in ``numeric`` are right-aligned.

    On a terminal that is too narrow the last column is folded, or each row becomes a list of its values. Only an empty
    last column is left out.
    """
    out = console()
    cells = _cells(rows)
    if out.is_terminal and not _fits(headers, cells, out.width):
        if any(row[-1].plain for row in cells):
            _print_lines(out, _value_lists(headers, cells))
            return
        headers, cells = headers[:-1], [row[:-1] for row in cells]
    _print_lines(out, _table(headers, cells, numeric))


def live_table(headers: Sequence[str], rows: Sequence[Sequence[str | Text]], numeric: Sequence[str]) -> Table:
    """Return a table like :func:`print_table`'s for a live view; the last column is folded if it does not fit."""
    return _table(headers, _cells(rows), numeric)


def _cells(rows: Sequence[Sequence[str | Text]]) -> list[list[Text]]:
    """Shorten cells: a column is as wide as its widest cell, and one long key must not widen every line."""
    return [
        [
            Text(printable(cell if cell is row[-1] else shortened(cell, MAX_CELL_LENGTH)))
            if isinstance(cell, str)
            else cell
            for cell in row
        ]
        for row in rows
    ]


def _fits(headers: Sequence[str], rows: Sequence[Sequence[Text]], width: int) -> bool:
    """Return True if one line per row fits; the last column may be folded to ``MIN_LAST_WIDTH``."""
    widths = [max(cell_len(header), *(row[i].cell_len for row in rows), 0) for i, header in enumerate(headers)]
    return sum(widths[:-1]) + min(widths[-1], MIN_LAST_WIDTH) + GAP * (len(widths) - 1) <= width


def _table(headers: Sequence[str], rows: Sequence[Sequence[Text]], numeric: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for header in headers:
        is_last = header == headers[-1]
        table.add_column(header, justify="right" if header in numeric else "left", no_wrap=not is_last, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _value_lists(headers: Sequence[str], rows: Sequence[Sequence[Text]]) -> Table:
    """Print each row's values on separate lines below its first (as psql shows wide rows)."""
    table = Table.grid(padding=(0, GAP, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(headers[0], row[0])
        for header, cell in zip(headers[1:], row[1:], strict=True):
            if cell.plain:
                table.add_row(" " * GAP + header, cell)
    return table


def _print_lines(out: Console, table: Table) -> None:
    """Print without the trailing blanks that rich adds."""
    for segments in out.render_lines(table, pad=False):
        line = Text.assemble(*((segment.text, segment.style or "") for segment in segments))
        line.rstrip()
        out.print(line)


def bar(share: float, width: int) -> str:
    """Return a bar for ``share`` (0 to 1) of ``width`` cells, drawn with blocks if the output can show them."""
    return (BLOCK if can_show(BLOCK) else "#") * round(width * share)


def can_show(text: str) -> bool:
    """Return True if standard output's encoding has these characters."""
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
    """Yield a callback ``(done_nbytes, total_nbytes)`` that shows the progress of work that takes a while.

    Prints lines of text if standard error is not a terminal. The rate is that since the first call: what precedes it,
    such as a look at all steps, moves no bytes. The callback is thread-safe.
    """
    started = time.monotonic()
    first: tuple[int, float] | None = None
    last = started + FIRST_LINE_S - LINE_EVERY_S
    bar: Progress | None = None
    shown = Console(stderr=True)
    lock = threading.Lock()

    def show(done: int, total: int) -> None:
        nonlocal bar, last, first
        now = time.monotonic()
        with lock:
            first = first or (done, now)
            amounts = _how_far(done, total, done - first[0], now - first[1])
            if not shown.is_terminal:
                if now - last >= LINE_EVERY_S:
                    last = now
                    print(f"{printable(title)}: {amounts}", file=sys.stderr, flush=True)
            elif bar is None and now - started >= BAR_AFTER_S:
                bar = _new_bar(shown)
                bar.start()
                bar.add_task(_fitted(title), total=total, amounts="")
            if bar is not None:
                amounts = amounts if shown.width >= MIN_WIDTH_OF_RATE else amounts.partition(",")[0]
                bar.update(bar.task_ids[0], completed=done, total=total, amounts=amounts)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


def _how_far(done: int, total: int, moved: int, elapsed_s: float) -> str:
    """Describe progress; with the rate of the last ``moved`` bytes, once it can be known."""
    text = f"{format_nbytes(done)} of {format_nbytes(total)}"
    if not moved or elapsed_s < MIN_RATE_S:
        return text
    rate = moved / elapsed_s
    return f"{text}, {format_nbytes(int(rate))}/s, {format_duration(max(total - done, 0) / rate)} left"


def _fitted(title: str) -> str:
    title = printable(title)
    return title if len(title) <= MAX_TITLE_LENGTH else f"...{title[3 - MAX_TITLE_LENGTH :]}"


def _new_bar(shown: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn  # imported here: 50 ms that only long work needs

    title = TextColumn("{task.description}", markup=False)
    amounts = TextColumn("{task.fields[amounts]}", markup=False)
    return Progress(title, BarColumn(bar_width=None), amounts, console=shown, transient=True, expand=True)
