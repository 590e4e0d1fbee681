"""``milepost ls --watch``: saves in progress, live, read from the run's folder only.

On a terminal a table is refreshed; elsewhere a line is printed after each change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Group
from rich.live import Live
from rich.text import Text

from milepost.cli.render import console, live_table, print_line, printable
from milepost.run.step_names import ATTEMPT_PREFIX
from milepost.run.underway import FileState, Newest, SaveState, Watch, look
from milepost.storage import join_path
from milepost.storage.base import Storage, counted, format_duration, format_nbytes

MAX_FILES = 20
"""Maximum number of files listed per save: stuck ones first, then those being written."""
REPEAT_S = 10.0
"""Without a terminal, a save still in progress is reported again after this long."""


def watch(
    find: Callable[[], tuple[Storage, str]],
    *,
    every_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Poll and show saves in progress until Ctrl-C.

    ``find`` returns the run's storage and folder; it is called again at each poll until there is a run.
    """
    storage, folder = find()
    path = join_path(storage.root, folder) if folder else storage.root
    views = _views(find, every_s, clock, sleep)
    out = console()
    try:
        if out.is_terminal:
            with Live(console=out, auto_refresh=False, transient=False) as live:
                for states, newest in views:
                    live.update(_screen(path, states, newest), refresh=True)
        else:
            _print_changes(path, views, clock)
    except KeyboardInterrupt:
        pass  # Ctrl-C is the normal way to stop
    return 0


def _views(
    find: Callable[[], tuple[Storage, str]],
    every_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Iterator[tuple[list[SaveState], Newest | None]]:
    seen = Watch()
    storage, folder = find()
    while True:
        looks, newest = look(storage, folder, now=time.time()) if storage.stat(folder) is not None else ([], None)
        yield seen.update(looks, clock()), newest
        sleep(every_s)
        if not looks and newest is None:
            storage, folder = find()


# ---- a terminal ----


def _screen(path: str, states: Sequence[SaveState], newest: Newest | None) -> Group:
    parts: list[Text | object] = [Text(printable(f"{path}: {_newest_text(newest)}; press Ctrl-C to stop"))]
    if not states:
        parts.append(Text("no save in progress"))
    for state in states:
        parts += [Text(), Text(printable(summary(state)), style="bold")]
        if state.files:
            rows = [_row(file) for file in state.files[:MAX_FILES]]
            parts.append(live_table(("RANK", "WRITTEN", "RATE", "STATE", "FILE"), rows, ("RANK", "WRITTEN", "RATE")))
        if len(state.files) > MAX_FILES:
            rest = state.files[MAX_FILES:]
            complete = sum(file.is_signed for file in rest)
            parts.append(Text(f"... and {counted(len(rest), 'more file')}, {complete} of them complete"))
    return Group(*parts)  # type: ignore[arg-type]  # of Text and Table


def _row(file: FileState) -> tuple[str | Text, ...]:
    rate = f"{format_nbytes(round(file.rate))}/s" if file.rate else "-"
    style = "green" if file.is_signed else "red" if file.is_stuck else ""
    rank = str(file.rank) if file.rank is not None else "-"
    return rank, format_nbytes(file.nbytes), rate, Text(file_text(file), style=style), file.name


def file_text(file: FileState) -> str:
    """Describe a file's progress in a few words."""
    if file.is_signed:
        return "complete"
    return f"no bytes for {format_duration(file.still_s)}" if file.is_stuck else "writing"


# ---- a pipe or a file ----


def _print_changes(
    path: str, views: Iterator[tuple[list[SaveState], Newest | None]], clock: Callable[[], float]
) -> None:
    print_line(f"watching {path}: a line for each change, and every {REPEAT_S:g} s during a save")
    said: dict[str, tuple[str, float]] = {}
    step: int | None = None
    for states, newest in views:
        now = clock()
        if newest is not None and newest.step != step:
            step = newest.step
            _print_now(f"newest step: {step}")
        for state in states:
            before, when = said.get(state.look.name, ("", -REPEAT_S))
            if state.text != before or now - when >= REPEAT_S:
                _print_now(summary(state))
                said[state.look.name] = (state.text, now)
        for name in said.keys() - {state.look.name for state in states}:
            _print_now(f"{save_name(name)}: committed or removed")
            del said[name]


def _print_now(text: str) -> None:
    print_line(f"{time.strftime('%H:%M:%S')} {text}")
    console().file.flush()


# ---- both ----


def summary(state: SaveState) -> str:
    """Describe a save in one line."""
    complete = sum(file.is_signed for file in state.files)
    rate = f", {format_nbytes(round(state.rate))}/s" if state.rate else ""
    by = f" by {', '.join(state.look.owners[:2])}" if state.look.owners else ""
    return (
        f"{save_name(state.look.name)}: {state.text}; {format_nbytes(state.nbytes)}{rate}, "
        f"{complete} of {counted(len(state.files), 'file')} complete{by}"
    )


def save_name(name: str) -> str:
    """Shorten an attempt's name to ``save 0123abcd``."""
    return f"save {name.removeprefix(ATTEMPT_PREFIX)[:8]}"


def _newest_text(newest: Newest | None) -> str:
    if newest is None:
        return "no steps yet"
    return f"newest step {newest.step}, {format_duration(max(0.0, time.time() - newest.mtime_s))} ago"
