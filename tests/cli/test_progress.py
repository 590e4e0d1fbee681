"""Long work reports its progress: a bar on a terminal, lines elsewhere, nothing if it is short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.text import Text
from zoo import save_model

from milepost.cli import render
from milepost.cli.main import main
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays

COMMANDS = {
    "verify": "verify run/step-1",
    "diff": "diff run/step-1 run/step-1 --values",
    "convert": "convert model/step-7 out.pt --to pt --model llama3 --flavor debugmodel --verify",
    "export": "export model out --model llama3 --flavor debugmodel --verify",
}


@pytest.fixture
def folder(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(memory_path)
    storage = LocalStorage(memory_path)
    arrays = {f"w{i}": np.full(1 << 20, i, "float32") for i in range(4)}
    save_arrays(storage, "run/step-1", arrays, step=1, num_ranks=2)
    save_model(storage, "model/step-7")


@pytest.mark.parametrize("name", COMMANDS)
def test_where_there_is_no_terminal_lines_tell_how_far_it_is(
    folder: None, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(render, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(render, "MIN_RATE_S", 0.0)
    assert main(COMMANDS[name].split()) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(" of " in line and "\x1b" not in line for line in lines)
    assert "/s" not in lines[0]  # what precedes the first bytes would count as if it had moved some
    assert "/s" in lines[-1]
    assert lines[-1].endswith("0 s left")


def test_what_is_soon_done_is_done_in_silence(folder: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMANDS["verify"].split()) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("width", "has_rate"), [(100, True), (60, True), (40, False)])
def test_a_terminal_gets_a_bar_with_rate_and_time_left_if_it_is_wide_enough(
    folder: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, has_rate: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(render, "BAR_AFTER_S", 0.0)
    monkeypatch.setattr(render, "MIN_RATE_S", 0.0)
    assert main(COMMANDS["verify"].split()) == 0
    err = capsys.readouterr().err
    assert "step-1" in err
    assert "━" in err
    assert "16.0 MiB of 16.0 MiB" in Text.from_ansi(err).plain
    assert all(len(line) <= width for line in Text.from_ansi(err.replace("\r", "\n")).plain.splitlines())
    assert ("/s" in err) == has_rate
    assert "\n\n" not in err
