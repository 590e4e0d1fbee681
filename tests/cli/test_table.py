"""Tables on terminals of every width: nothing is lost, and no line is longer than the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.text import Text
from zoo import make_zoo

from milepost.cli.table import lay_out

HEADERS = ("STEP", "STATE", "SIZE", "NOTES")
ROWS = [
    ("100", "committed", "1.5 GiB", ""),
    ("2000", "damaged", "87 bytes", "__1_0.distcp is missing and so is all that anybody ever wrote of it"),
    ("3000", "partial", "1.0 TiB", "never finished"),
]


def lines(width: int | None, rows: list[tuple[str, ...]] = ROWS) -> list[str]:
    cells = [[Text(cell) for cell in row] for row in rows]
    return [line.plain for line in lay_out(HEADERS, cells, numeric=("STEP", "SIZE"), width=width)]


def test_a_table_with_room_is_a_line_for_each_row() -> None:
    expected = [
        "STEP  STATE          SIZE  NOTES",
        " 100  committed   1.5 GiB",
        "2000  damaged    87 bytes  __1_0.distcp is missing and so is all that anybody ever wrote of it",
        "3000  partial     1.0 TiB  never finished",
    ]
    assert lines(None) == lines(94) == expected


def test_a_wide_last_column_is_folded_below_itself() -> None:
    assert lines(60) == [
        "STEP  STATE          SIZE  NOTES",
        " 100  committed   1.5 GiB",
        "2000  damaged    87 bytes  __1_0.distcp is missing and so is",
        "                           all that anybody ever wrote of it",
        "3000  partial     1.0 TiB  never finished",
    ]


def test_without_room_for_that_it_gets_lines_of_its_own() -> None:
    assert lines(40) == [
        "STEP  STATE          SIZE  NOTES",
        " 100  committed   1.5 GiB",
        "2000  damaged    87 bytes",
        "    __1_0.distcp is missing and so is",
        "    all that anybody ever wrote of it",
        "3000  partial     1.0 TiB",
        "    never finished",
    ]


def test_a_table_that_is_far_too_wide_becomes_a_list() -> None:
    assert lines(20, ROWS[1:]) == [
        "STEP 2000",
        "  STATE  damaged",
        "  SIZE   87 bytes",
        "  NOTES  __1_0.distcp is missing",
        "         and so is all that",
        "         anybody ever wrote of it",
        "STEP 3000",
        "  STATE  partial",
        "  SIZE   1.0 TiB",
        "  NOTES  never finished",
    ]


def test_a_column_without_a_value_gives_way() -> None:
    assert lines(26, ROWS[:1]) == ["STEP  STATE         SIZE", " 100  committed  1.5 GiB"]


@pytest.mark.parametrize("width", range(34, 100, 3))
def test_every_word_is_there_and_no_line_is_too_long(width: int) -> None:
    shown = lines(width)
    assert all(len(line) <= width and line == line.rstrip() for line in shown)
    words = " ".join(shown).split()
    assert all(word in words for row in ROWS for cell in row for word in cell.split())


@pytest.mark.parametrize("width", [40, 80])
def test_a_command_heeds_the_width_of_its_terminal(width: int, memory_path: Path) -> None:
    make_zoo(memory_path)
    done = subprocess.run(
        [sys.executable, "-m", "milepost", "ls", "run"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=memory_path,
        env={**os.environ, "FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": str(width)},
    )
    plain = Text.from_ansi(done.stdout).plain
    assert max(map(len, plain.splitlines())) <= width
    for value in ("committed", "pinned", "damaged", "upgrade Milepost", "34.1 KiB"):
        assert value in " ".join(plain.split())
