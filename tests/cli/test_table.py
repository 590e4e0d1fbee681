"""Tables on terminals of every width: nothing is lost, and no line is longer than the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.text import Text
from zoo import make_zoo

from milepost.cli.render import print_table

HEADERS = ("STEP", "STATE", "SIZE", "NOTES")
ROWS = [
    ("100", "committed", "1.5 GiB", ""),
    ("2000", "damaged", "87 bytes", "__1_0.distcp is missing and so is all that anybody ever wrote of it"),
    ("3000", "incomplete", "1.0 TiB", "never committed"),
]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def lines(capsys: pytest.CaptureFixture[str], rows: list[tuple[str, ...]] = ROWS) -> list[str]:
    print_table(HEADERS, rows, numeric=("STEP", "SIZE"))
    return Text.from_ansi(capsys.readouterr().out).plain.splitlines()


WIDE = [
    "STEP  STATE           SIZE  NOTES",
    " 100  committed    1.5 GiB",
    "2000  damaged     87 bytes  __1_0.distcp is missing and so is all that anybody ever wrote of it",
    "3000  incomplete   1.0 TiB  never committed",
]


def test_a_table_with_room_is_a_line_for_each_row(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "95")
    assert lines(capsys) == WIDE


def test_where_there_is_no_terminal_the_width_does_not_matter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert lines(capsys) == WIDE


def test_a_wide_last_column_is_folded_below_itself(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert lines(capsys) == [
        "STEP  STATE           SIZE  NOTES",
        " 100  committed    1.5 GiB",
        "2000  damaged     87 bytes  __1_0.distcp is missing and so",
        "                            is all that anybody ever wrote",
        "                            of it",
        "3000  incomplete   1.0 TiB  never committed",
    ]


def test_a_table_that_is_too_wide_for_that_becomes_a_list(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "32")
    assert lines(capsys, ROWS[1:]) == [
        "STEP     2000",
        "  STATE  damaged",
        "  SIZE   87 bytes",
        "  NOTES  __1_0.distcp is missing",
        "         and so is all that",
        "         anybody ever wrote of",
        "         it",
        "STEP     3000",
        "  STATE  incomplete",
        "  SIZE   1.0 TiB",
        "  NOTES  never committed",
    ]


def test_a_column_without_a_value_gives_way(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "26")
    assert lines(capsys, ROWS[:1]) == ["STEP  STATE         SIZE", " 100  committed  1.5 GiB"]


@pytest.mark.parametrize("width", range(30, 100, 3))
def test_every_word_is_there_and_no_line_is_too_long(
    width: int, terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = lines(capsys)
    assert all(len(line) <= width and line == line.rstrip() for line in shown)
    words = " ".join(shown).split()
    assert all(word in words for row in ROWS for cell in row for word in cell.split())


@pytest.mark.parametrize("key", ["a\nb", "a\r\x1b[2Jb", "a\u202eb", "a\ud800b", "[bold]a[/]", "x" * 100_000])
def test_a_key_breaks_neither_the_table_nor_the_terminal(
    key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = lines(capsys, [(key, "committed", "1 byte", key)])
    assert len(shown) == 2
    assert all(len(line) < 6000 and line.isprintable() for line in shown)
    assert ("[bold]a[/]" in shown[1]) == (key == "[bold]a[/]")


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
    for value in ("committed", "pinned", "damaged", "upgrade Milepost", "34.9 KiB"):
        assert value in " ".join(plain.split())


def test_one_long_key_does_not_widen_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("KEY", "SHAPE", "NOTES"), [("k" * 10_000, "[2]", "x" * 500), ("w", "[3]", "")])
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert len(second) < 250
    assert "characters left out" in first
    assert first.endswith("x" * 500)  # what stands last pushes nothing aside
