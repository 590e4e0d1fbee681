"""A run that dies, or gets an error, at any operation on its storage, from its start to the end of its save.

Whatever happens: a scan shows the state before or the state after, never a mix; the next run resumes from it, leaves
nothing behind, and saves. (``tests/run/test_commit.py`` does the same to the commit protocol alone.)
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from small_runs import Progress
from torch import nn
from two_ranks import in_a_child

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import MilepostError
from milepost.run import catalog, takeover
from milepost.run.lock import RunLock
from milepost.run.owner import OWNERLESS_LIFETIME_S
from milepost.run.step_names import ATTEMPT_PREFIX, DELETING_PREFIX
from milepost.run.sweep import MARKER_NAME, sweep_leftovers
from milepost.saving import writer
from milepost.storage import LocalStorage, Storage
from milepost.testing.faulty import FaultyStorage
from milepost.testing.wrap import Operation
from milepost.training import manager as manager_module

WIDTH = 20_000
"""Numbers in each tensor: enough for a record of its own disk blocks, so that several threads write."""


FROZEN = 0.125
"""The value of a tensor that is frozen, so that its file is shared from step to step."""


class Model(nn.Module):
    """All weights have one value, so that a mixture of two saves shows; but for one that never changes."""

    def __init__(self, value: float):
        super().__init__()
        self.frozen = nn.Parameter(torch.full((WIDTH,), FROZEN), requires_grad=False)
        self.layers = nn.ParameterList(nn.Parameter(torch.full((WIDTH,), value)) for _ in range(3))

    @property
    def value(self) -> float:
        values = {float(v) for p in self.layers for v in p.detach().unique()}
        assert len(values) == 1, values
        assert bool((self.frozen == FROZEN).all())
        return values.pop()


def manager_in(
    folder: Path, storage: Storage, value: float, keep_latest_k: int = 1
) -> tuple[CheckpointManager, Model, Progress]:
    """A manager whose every operation goes through ``storage``."""
    model, progress = Model(value), Progress()
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=keep_latest_k, last_save_model_only=False)
    with mock.patch.object(manager_module, "open_storage", return_value=(storage, "run")):
        manager = CheckpointManager(
            folder / "run", config, model=model, optimizer=torch.optim.SGD(model.parameters()), train_state=progress
        )
    return manager, model, progress


@dataclass(frozen=True)
class Case:
    """The steps before, with the value of their weights; the save; and the states that a scan may show afterwards."""

    before: dict[int, float]
    step: int
    value: float
    after: dict[int, float]
    between: tuple[dict[int, float], ...] = ()


CASES = {
    "first save": Case({}, 2, 7.0, {2: 7.0}),
    # Step 1 is pruned; step 2 is not, since the run resumed from it.
    "later save": Case({1: 0.5, 2: 1.0}, 4, 7.0, {2: 1.0, 4: 7.0}, between=({1: 0.5, 2: 1.0, 4: 7.0},)),
    "the same step again": Case({2: 1.0, 4: 3.0}, 4, 7.0, {4: 7.0}, between=({2: 1.0, 4: 7.0},)),
}


def act(folder: Path, storage: Storage, case: Case) -> None:
    """Run: lock the folder, sweep, resume, save, release."""
    manager, model, progress = manager_in(folder, storage, 0.0)
    manager.load()
    for parameter in model.layers:
        nn.init.constant_(parameter, case.value)
    progress.step = case.step
    manager.save(case.step)
    manager.close()


def prepare(folder: Path, case: Case) -> LocalStorage:
    """A fresh folder with the steps that are there before; a copy, once they have been saved beside it."""
    storage, template = LocalStorage(folder), folder.with_name("template")
    if template.exists():
        shutil.copytree(template, folder)
        return storage
    for step, value in case.before.items():
        manager, _, progress = manager_in(folder, storage, value, keep_latest_k=0)
        progress.step = step
        manager.save(step)
        manager.close()
    storage.make_folder("run")
    shutil.copytree(folder, template)
    return storage


def shown(storage: LocalStorage) -> dict[int, float]:
    """Return the steps of a scan with the value of their weights, every byte of them verified."""
    found = {}
    for entry in catalog.scan(storage, "run"):
        assert entry.state == "committed", entry
        model = Model(0.0)
        nn.init.zeros_(model.frozen)
        into = {**model.state_dict(), "train_state": {"step": None}}
        milepost.load(f"{storage.root}/{entry.path}", into, allow_unexpected=["optimizer", "rng"])
        assert into["train_state"] == {"step": entry.step}
        found[entry.step] = model.value
    return found


def check_the_next_run(
    folder: Path, storage: LocalStorage, found: dict[int, float], where: object, *, killed: bool
) -> None:
    """It resumes from the newest step that was there, saves, and leaves nothing of the dead run."""
    manager, model, progress = manager_in(folder, storage, 0.0)
    report = manager.load()
    assert (report.step if report is not None else None) == max(found, default=None), where
    assert model.value == (found[max(found)] if found else 0.0), where
    progress.step = 9
    manager.save(9)
    manager.close()
    assert any(entry.step == 9 and entry.state == "committed" for entry in catalog.scan(storage, "run")), where
    if not killed:  # a place for a deletion that holds nothing may be another process's that is about to use it
        left = {entry.name for entry in storage.list("run") if not entry.name.startswith(("step-", "events.jsonl"))}
        assert all(name.startswith(DELETING_PREFIX) for name in left), (where, left)
        assert all({found.name for found in storage.list(f"run/{name}")} <= {MARKER_NAME} for name in left), where
    # Such a place, and an attempt that was killed before it had an owner, is swept when it is old.
    sweep_leftovers(storage, "run", now=time.time() + 2 * OWNERLESS_LIFETIME_S)
    names = {entry.name for entry in storage.list("run")} - {"events.jsonl"}
    assert all(name.startswith("step-") for name in names), (where, names)


def count_operations(folder: Path, case: Case) -> int:
    counting = FaultyStorage(prepare(folder, case))
    act(folder, counting, case)
    assert shown(LocalStorage(folder)) == case.after
    assert len({operation.name for operation in counting.operations}) >= 7
    assert ("share" in {operation.name for operation in counting.operations}) is bool(case.before)
    return len(counting.operations)


@pytest.fixture(autouse=True)
def quick_but_threaded() -> Iterator[None]:
    """Each large record is a group of its own; a lock that a crash left half-written is not watched for its lease."""
    impatient = partial(RunLock, lease_s=0.0)
    with mock.patch.object(writer, "GROUP_NBYTES", 1), mock.patch.object(takeover, "RunLock", impatient):
        yield


def meet_error(folder: Path, storage: FaultyStorage, case: Case, said: Path) -> None:
    """Record the operation that failed, and the error that the run got."""
    message = ""
    try:
        act(folder, storage, case)
    except MilepostError as error:
        message = error.message
    assert storage.has_failed
    said.write_text(f"{[*storage.operations][storage._fail_at or 0]}\n{message}")


def kill(_: Operation) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_operation(memory_path: Path, name: str) -> None:
    case = CASES[name]
    count = count_operations(memory_path / "rehearsal", case)
    assert count > 25
    seen = []
    for k in range(count):
        folder = memory_path / str(k)
        storage = prepare(folder, case)
        status = in_a_child(partial(act, folder, FaultyStorage(storage, fail_at=k, tear=True, hook=kill), case))
        assert os.WIFSIGNALED(status), (k, status)
        found = shown(storage)
        assert found in (case.before, *case.between, case.after), (k, found)
        check_the_next_run(folder, storage, found, k, killed=True)
        seen.append(found)
        storage.remove_tree("")
    assert seen[0] == case.before
    assert seen[-1] == case.after


@pytest.mark.parametrize("name", CASES)
def test_error_at_any_operation(memory_path: Path, name: str) -> None:
    """Either it is raised and the old state is there (or the new one, if the error came after the commit), or the save
    went through in spite of it: what can fail without harm must not stop training."""
    case = CASES[name]
    count = count_operations(memory_path / "rehearsal", case)
    raised = 0
    for k in range(count):
        folder = memory_path / str(k)
        storage = prepare(folder, case)
        said = memory_path / f"{k}.txt"
        faulty = FaultyStorage(storage, fail_at=k, number=(errno.ENOSPC, errno.EIO, errno.EDQUOT)[k % 3], tear=True)
        status = in_a_child(partial(meet_error, folder, faulty, case, said))
        assert status == 0, (k, status)
        operation, _, message = said.read_text().partition("\n")
        assert not message or os.strerror(faulty._number).lower() in message.lower(), message
        raised += bool(message)
        found = shown(storage)
        assert found in (case.before, *case.between, case.after), (operation, found)
        assert message or found.get(case.step) == case.value, operation
        check_the_next_run(folder, storage, found, operation, killed=False)
        storage.remove_tree("")
    assert raised > 10


def test_leftovers_of_a_killed_save_are_swept_by_the_next(memory_path: Path) -> None:
    """Of ``save()`` too, which no manager cleans up after."""
    status = in_a_child(partial(killed_save, memory_path))
    assert os.WIFSIGNALED(status)
    assert any(path.name.startswith(ATTEMPT_PREFIX) for path in memory_path.iterdir())
    (memory_path / ".attempt-notes").mkdir()
    milepost.save(memory_path / "other", {"w": torch.ones(3)})
    assert sorted(path.name for path in memory_path.iterdir()) == [".attempt-notes", "other"]


def killed_save(folder: Path) -> None:
    storage = FaultyStorage(LocalStorage(folder), fail_at=8, tear=True, hook=kill)
    with mock.patch("milepost.saving.request.open_storage", return_value=(storage, "model")):
        milepost.save(folder / "model", {"w": torch.ones(3)})
