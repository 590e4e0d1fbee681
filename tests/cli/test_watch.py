"""``milepost ls --watch``: saves in progress, from the folder alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from milepost.cli import watch as watching
from milepost.cli.ls_cmd import run_to_watch
from milepost.cli.main import main
from milepost.format.tags import tagged
from milepost.run.owner import this_process
from milepost.run.step_names import ATTEMPT_PREFIX
from milepost.run.underway import Watch, look
from milepost.storage import LocalStorage

MB = 1 << 20


@pytest.fixture
def attempt(memory_path: Path) -> Path:
    """A save by three ranks, none of which has signed off."""
    (memory_path / "step-10").mkdir()
    made = memory_path / f"{ATTEMPT_PREFIX}0123456789abcdef0123456789abcdef"
    (made / "data").mkdir(parents=True)
    (made / "owner-00000000.json").write_bytes(this_process(time.time()).dump())
    for rank in range(3):
        (made / "data" / f"__{rank}_0.distcp").write_bytes(bytes(MB))
    return made


def grow(attempt: Path, rank: int) -> None:
    with (attempt / "data" / f"__{rank}_0.distcp").open("ab") as file:
        file.write(bytes(MB))


def states_of(folder: Path, seen: Watch, now: float) -> list[object]:
    looks, _ = look(LocalStorage(folder), "", now=time.time())
    return list(seen.update(looks, now))


def test_rates_completion_and_what_is_stuck_are_reported(attempt: Path) -> None:
    folder, seen = attempt.parent, Watch()
    states_of(folder, seen, 0.0)
    for second in range(1, 13):
        grow(attempt, 0)
        (state,) = states_of(folder, seen, float(second))
    (attempt / "sign-off-1").write_bytes(b"")
    (state,) = states_of(folder, seen, 13.0)
    files = {file.rank: file for file in state.files}  # type: ignore[attr-defined]
    assert 0.5 * MB < files[0].rate < 1.1 * MB
    assert files[1].is_signed
    assert files[2].is_stuck
    assert state.files[0].rank == 2  # type: ignore[attr-defined]  # what is stuck comes first
    assert state.text == "stuck: __2_0.distcp"  # type: ignore[attr-defined]
    for rank in (0, 2):
        (attempt / f"sign-off-{rank}").write_bytes(b"")
    assert states_of(folder, seen, 14.0)[0].text == "written, to be committed"  # type: ignore[attr-defined]
    (attempt / "failed").write_text('{"message": "rank 2: no space left", "rank": 2}')
    assert states_of(folder, seen, 15.0)[0].text == "failed: rank 2: no space left"  # type: ignore[attr-defined]


def test_names_that_carry_the_id_of_the_save_are_of_a_rank_too(attempt: Path) -> None:
    """As in a store. A rank that has only reported a failure has not signed off."""
    for rank in range(3):
        name = f"__{rank}_0.distcp"
        (attempt / "data" / name).rename(attempt / "data" / tagged(name, "0123456789abcdef0123456789abcdef"))
    (attempt / "sign-off-1").write_bytes(b"")
    (attempt / "sign-off-2.failed").write_bytes(b"")
    (state,) = states_of(attempt.parent, Watch(), 0.0)
    assert {file.rank: file.is_signed for file in state.files} == {0: False, 1: True, 2: False}  # type: ignore[attr-defined]


def test_what_is_reserved_and_not_written_does_not_count(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * MB)
        storage = LocalStorage(tmp_path)
        assert storage.written_nbytes("file") < 2 * MB
        os.pwrite(file.fileno(), bytes(8 * MB), 16 * MB)
        assert 8 * MB <= storage.written_nbytes("file") < 10 * MB
    assert storage.stat("file").nbytes == 64 * MB  # type: ignore[union-attr]
    assert storage.written_nbytes("gone") == 0


def test_a_save_without_a_live_process_is_reported_stale(attempt: Path) -> None:
    (attempt / "owner-00000000.json").unlink()
    (state,) = states_of(attempt.parent, Watch(), 0.0)
    assert "stale: its run died" in state.text  # type: ignore[attr-defined]


def steps_of(attempt: Path, *acts: Callable[[], object]) -> Callable[[float], None]:
    """A ``sleep`` that does the acts one after another, and then is interrupted."""
    remaining = list(acts)

    def sleep(_: float) -> None:
        if not remaining:
            raise KeyboardInterrupt
        remaining.pop(0)()

    return sleep


def test_on_a_pipe_a_line_is_printed_for_each_change(attempt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def commit() -> None:
        attempt.rename(attempt.parent / "step-20")

    sign = [lambda rank=rank: (attempt / f"sign-off-{rank}").write_bytes(b"") for rank in range(3)]
    sleep = steps_of(attempt, lambda: None, *sign, commit)
    assert watching.watch(lambda: (LocalStorage(attempt.parent), ""), every_s=1, sleep=sleep) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("watching ")
    texts = [line[9:] for line in lines[1:]]
    assert texts[0] == "newest step: 10"
    assert texts[1].startswith("save 01234567: writing; 3.0 MiB, 0 of 3 files complete by process")
    assert texts[2].startswith("save 01234567: written, to be committed; 3.0 MiB, 3 of 3 files complete")
    assert texts[3:] == ["newest step: 20", "save 01234567: committed or removed"]


@pytest.mark.parametrize("width", [40, 120])
def test_on_a_terminal_a_table_is_drawn(
    attempt: Path, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", str(width)), ("LINES", "40"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    (attempt / "data" / "\x1b[31mevil").write_bytes(b"x")
    sleep = steps_of(attempt, lambda: grow(attempt, 0))
    assert watching.watch(lambda: (LocalStorage(attempt.parent), ""), every_s=1, sleep=sleep) == 0
    text = capsys.readouterr().out
    assert "RANK" in text
    assert "2.0 MiB" in text
    assert "\x1b[31mevil" not in text


def test_watch_goes_with_no_json(attempt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(attempt.parent), "--watch", "--json"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["ls", str(attempt.parent), "--watch", "0"])
    assert "0.1 to 3600" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["ls", str(attempt.parent), "--watch", "often"])
    assert "expected seconds from 0.1 to 3600, found often" in capsys.readouterr().err


def test_a_run_may_be_watched_before_its_first_save(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = memory_path / "outputs"
    acts = [
        lambda: outputs.mkdir(),
        lambda: (outputs / "checkpoint").mkdir(),
        lambda: (outputs / "checkpoint" / "step-5").mkdir(),
        lambda: None,
    ]
    found = partial(run_to_watch, str(outputs))
    assert watching.watch(found, every_s=1, sleep=steps_of(memory_path, *acts)) == 0
    assert "newest step: 5" in capsys.readouterr().out
