"""A step number of an abandoned branch is saved again, by a run that dies at any operation on its storage.

At every moment the old step or the new one is there, whole; and whoever resumes does it on the branch that the run was
on: from the new step, or from the one before it, never from one of the abandoned branch.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from test_every_operation import kill, manager_in, quick_but_threaded, shown
from torch import nn
from two_ranks import in_a_child

from milepost.storage import LocalStorage, Storage
from milepost.testing.faulty import FaultyStorage

__all__ = ["quick_but_threaded"]  # a fixture that every test here uses

BEFORE = {2: 1.0, 3: 2.0, 4: 3.0, 6: 5.0}
"""Steps with the value of their weights: 2, 4 and 6 of the first branch, and 3 of one that begins at 2."""
AFTER = {**BEFORE, 4: 7.0}


def save(folder: Path, storage: Storage, step: int, value: float, *, load_step: int | None = None) -> int | None:
    """Resume, save a step and end; returns the step that was resumed from."""
    manager, model, progress = manager_in(folder, storage, 0.0, keep_latest_k=0)
    report = manager.load(step=load_step)
    resumed = report.step if report is not None else None
    assert report is None or (model.value, progress.step) == (shown_value(storage, resumed), resumed)
    for parameter in model.layers:
        nn.init.constant_(parameter, value)
    progress.step = step
    manager.save(step)
    manager.close()
    return resumed


def shown_value(storage: Storage, step: int | None) -> float:
    return shown(storage)[step] if isinstance(storage, LocalStorage) else BEFORE[3]  # type: ignore[index]


def prepare(folder: Path) -> LocalStorage:
    storage, template = LocalStorage(folder), folder.with_name("template")
    if not template.exists():
        first = LocalStorage(template)
        for step in (2, 4, 6):
            save(template, first, step, BEFORE[step])
        assert save(template, first, 3, BEFORE[3], load_step=2) == 2
        assert shown(first) == BEFORE
    shutil.copytree(template, folder)
    return storage


def test_killed_at_any_operation_of_a_save_over_an_abandoned_step(memory_path: Path) -> None:
    counting = FaultyStorage(prepare(memory_path / "rehearsal"))
    assert save(memory_path / "rehearsal", counting, 4, AFTER[4]) == 3
    assert shown(LocalStorage(memory_path / "rehearsal")) == AFTER
    count, seen = len(counting.operations), []
    assert count > 25
    for k in range(count):
        folder = memory_path / str(k)
        storage = prepare(folder)
        dying = FaultyStorage(storage, fail_at=k, tear=True, hook=kill)
        assert os.WIFSIGNALED(in_a_child(partial(save, folder, dying, 4, AFTER[4]))), k
        found = shown(storage)
        assert found in (BEFORE, AFTER), (k, found)
        assert save(folder, storage, 5, 8.0) == (4 if found == AFTER else 3), k
        assert shown(storage) == {**found, 5: 8.0}, k
        seen.append(found)
        storage.remove_tree("")
    assert seen[0] == BEFORE
    assert seen[-1] == AFTER
