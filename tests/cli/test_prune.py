"""``milepost prune`` deletes what its dry run lists, and nothing that it can't identify."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo import HOUR, NOW, make_zoo, save

from milepost.cli.main import main
from milepost.run import marks, retention, sweep
from milepost.run.step_names import DELETING_PREFIX, step_of
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays

LEFTOVER = f"{DELETING_PREFIX}{0:032x}"
NEVER = {"step-200", "step-300", "step-400", "step-500", "step-600", "step-700", "step-800"}
"""Pinned, external, damaged, of a newer version, newest to resume from, newest, incomplete."""


@pytest.fixture
def zoo(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    monkeypatch.chdir(memory_path)
    monkeypatch.setattr(time, "time", lambda: NOW)
    storage = make_zoo(memory_path)
    for step, age in ((110, 80.5), (120, 80.2), (130, 55), (140, 54.9), (150, 30)):
        save(storage, f"run/step-{step}", step, NOW - HOUR * age)
    storage.make_folder(f"run/{LEFTOVER}/step-90")
    storage.write(f"run/{LEFTOVER}/{sweep.MARKER_NAME}", b"")
    storage.make_folder("run/.deleting-2024")
    return storage


def names(storage: LocalStorage) -> set[str]:
    return {entry.name for entry in storage.list("run")}


def prune(capsys: pytest.CaptureFixture[str], *rules: str) -> dict[str, object]:
    assert main(["prune", "run", *rules, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (("--keep-latest", "1"), set()),
        (("--keep-latest", "4"), {"step-150"}),
        (("--keep-every", "50"), {"step-100", "step-150"}),
        (("--keep-within", "60h"), {"step-130", "step-140", "step-150"}),
        (("--keep-hourly", "5"), {"step-150", "step-140"}),
        (("--keep-daily", "3"), {"step-140"}),  # of the second day it is the pinned step 200
        (("--keep-daily", "100"), {"step-120", "step-140"}),
        (("--keep-latest", "9999"), {"step-100", "step-110", "step-120", "step-130", "step-140", "step-150"}),
    ],
)
def test_the_dry_run_says_exactly_what_is_deleted(
    zoo: LocalStorage, capsys: pytest.CaptureFixture[str], rules: tuple[str, ...], kept: set[str]
) -> None:
    before = names(zoo)
    planned = prune(capsys, *rules, "--dry-run")
    assert names(zoo) == before
    done = prune(capsys, *rules)
    assert (done["steps"], done["freed_nbytes"]) == (planned["steps"], planned["freed_nbytes"])
    gone = before - names(zoo)
    assert gone == {step["name"] for step in planned["steps"] if not step["keep"]} | {LEFTOVER}  # type: ignore[attr-defined]
    steps = {name for name in names(zoo) if step_of(name) is not None and name != "step-900"}
    assert steps == NEVER | kept
    assert {"step-900", "step-0100", "notes", ".pinned-step-200", ".deleting-2024"} <= names(zoo)
    assert (done["swept"], done["left_alone"]) == ([LEFTOVER], [".deleting-2024"])
    assert (planned["swept"], planned["left_alone"]) == (done["swept"], done["left_alone"])


def test_what_another_process_pins_or_deletes_meanwhile_is_not_reported_as_deleted(
    zoo: LocalStorage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = retention.plan

    def plan_slowly(*args: Any, **options: Any) -> list[retention.Decision]:
        decisions = plan(*args, **options)
        marks.pin(zoo, "run", 100)
        return decisions

    monkeypatch.setattr(retention, "plan", plan_slowly)
    assert main(["prune", "run", "--keep-latest", "4"]) == 0
    out = capsys.readouterr().out
    assert "deleted 4 steps of 13" in out
    assert "not deleted, because another process deleted or pinned them meanwhile: step-100" in out
    assert "step-100" in names(zoo)


def test_every_step_that_stays_is_left_untouched(zoo: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    def contents() -> dict[str, bytes]:
        files = [path for path in Path("run").rglob("*") if path.is_file() and path.parts[1] in NEVER]
        return {str(path): path.read_bytes() for path in files}

    before = contents()
    prune(capsys, "--keep-latest", "1")
    assert contents() == before


def test_an_unpinned_step_goes_with_the_next_pruning(zoo: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unpin", "run/step-200"]) == 0
    capsys.readouterr()
    prune(capsys, "--keep-latest", "1")
    assert "step-200" not in names(zoo)


def test_pinning_a_step_keeps_it(zoo: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pin", "run/step-110", "run/step-120"]) == 0
    capsys.readouterr()
    prune(capsys, "--keep-latest", "1")
    assert {"step-110", "step-120"} <= names(zoo)
    assert "step-100" not in names(zoo)


def test_nothing_is_pinned_when_one_of_the_steps_is_not_there(
    zoo: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pin", "run/step-110", "run/step-111"]) == 3
    assert "step-111 does not exist; steps that do: 100, 110," in capsys.readouterr().err
    assert ".pinned-step-110" not in names(zoo)


def test_best_by_a_metric_that_no_step_has_deletes_nothing(
    zoo: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    save_arrays(zoo, "run/step-650", {"w": np.ones(2)}, step=650, metrics={"loss": 1.0})
    before = names(zoo)
    for metric, hint in (("losss", "did you mean loss?"), ("accuracy", "recorded are: loss")):
        assert main(["prune", "run", "--keep-best", "1", "--metric", metric]) == 2
        assert hint in capsys.readouterr().err
    assert names(zoo) == before
