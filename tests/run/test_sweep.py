"""Sweeps and deletions remove only files proven to be Milepost's and useless; the rest stays and is reported."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import milepost.saving.writer_process  # noqa: F401 - imported before the forks
from milepost.errors import CheckpointNotFoundError, MilepostError, StorageError
from milepost.run import catalog, marks, owner, sweep
from milepost.run.attempts import adopt_attempt, begin_attempt
from milepost.run.lock import RunLock
from milepost.run.step_names import ATTEMPT_PREFIX, DELETING_PREFIX, REPLACED_PREFIX, pin_mark
from milepost.run.sweep import Sweep, sweep_leftovers
from milepost.run.takeover import Attempts
from milepost.storage import LocalStorage, Storage
from milepost.testing.faulty import FaultyStorage
from milepost.testing.sample import save_arrays
from milepost.testing.wrap import WrappedStorage

NOW = 1_000_000.0
LATER = 2 * owner.OWNERLESS_LIFETIME_S
NOTHING = Sweep((), ())


def save(storage: Storage, path: str, value: int = 1) -> None:
    save_arrays(storage, path, {"w": np.full(3, value, "float32")}, now=float(value))


def full(short: str) -> str:
    """An id of 32 hex digits."""
    return short.ljust(32, "0")


def attempt_of(storage: Storage, short: str, **changes: object) -> str:
    """An attempt whose owner is this process, but for ``changes`` of its record."""
    path = f"run/{ATTEMPT_PREFIX}{full(short)}"
    storage.make_folder(f"{path}/data")
    record = replace(owner.this_process(NOW), **changes)  # type: ignore[arg-type]
    storage.write(f"{path}/{owner.OWNER_PREFIX}{0:08x}.json", record.dump())
    return path.rpartition("/")[2]


def names(storage: Storage, folder: str = "run") -> set[str]:
    return {entry.name for entry in storage.list(folder)}


# ---- whose a leftover is ----


def test_folders_of_other_programs_stay_and_are_named(memory_path: Path) -> None:
    """Folders that only look like ours: short ids, our prefix without our marker, our marker under another name."""
    storage = LocalStorage(memory_path)
    others = [
        ".deleting-2024",
        ".attempt-1",
        f".attempt-{full('a')}",
        f".deleting-{full('b')}",
        f"{ATTEMPT_PREFIX}1",
        f"{ATTEMPT_PREFIX}{full('c')}",
        f"{DELETING_PREFIX}2024",
        f"{DELETING_PREFIX}{full('d')}",
        f"{REPLACED_PREFIX}{full('e')}-step-7",
        f".damaged-step-7.json.{full('f')}.part",
    ]
    for name in others:
        storage.make_folder(f"run/{name}")
        storage.write(f"run/{name}/thesis.tex", b"of years")
    save(storage, "run/step-7")
    unknown = ["notes", ".git", "attempt-1", "wandb", ".cache"]
    for name in unknown:
        storage.make_folder(f"run/{name}")
    swept = sweep_leftovers(storage, "run", now=time.time() + LATER)
    assert swept.removed == ()
    assert set(swept.left) == set(others)
    assert names(storage) == {*others, *unknown, "step-7"}
    assert all(storage.read(f"run/{name}/thesis.tex") == b"of years" for name in others)
    assert sweep_leftovers(storage, "nowhere", now=NOW) == NOTHING


def test_a_file_or_a_link_with_such_a_name_stays(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    storage.make_folder("elsewhere")
    storage.write("elsewhere/owner-00000000.json", b"{}")
    storage.make_folder("run")
    storage.write(f"run/{ATTEMPT_PREFIX}{full('a')}", b"mine")
    storage.write(f"run/.damaged-step-7.json.{full('b')}.part", b"mine too")
    link = f"{ATTEMPT_PREFIX}{full('c')}"
    (memory_path / "run" / link).symlink_to("../elsewhere")
    before = names(storage)
    assert set(sweep_leftovers(storage, "run", now=time.time() + LATER).left) == before
    assert names(storage) == before


def test_what_a_save_finds_beside_it_is_named_once(memory_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = LocalStorage(memory_path)
    storage.make_folder(".deleting-2024/photos")
    for value in (1, 2):
        save(storage, "model", value)
    assert storage.stat(".deleting-2024/photos") is not None
    logged = [record.getMessage() for record in caplog.records if ".deleting-2024" in record.getMessage()]
    assert len(logged) == 1
    assert "not removed, since not recognised" in logged[0]


def test_a_draft_of_a_mark_is_removed(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5")
    for fail_at in range(12):
        with contextlib.suppress(StorageError):
            storage_that_fails = FaultyStorage(storage, fail_at=fail_at, tear=True)
            catalog.mark_damaged(storage_that_fails, "run/step-5", "bits flipped", now=NOW)
        sweep_leftovers(storage, "run", now=time.time())
        assert names(storage) <= {"step-5", ".damaged-step-5.json"}, fail_at


# ---- who lives ----


def test_only_attempts_whose_owner_is_dead_are_swept(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    dead_pid = os.fork()
    if dead_pid == 0:
        os._exit(0)
    os.waitpid(dead_pid, 0)
    kept = {
        attempt_of(storage, "a1"),
        attempt_of(storage, "a2", host="elsewhere", created_s=NOW - 3600),
        attempt_of(storage, "a3", pid_namespace="pid:[1]", pid=1, created_s=NOW - 3600),
        attempt_of(storage, "a4", machine_id="another machine of that name", boot_id="x", created_s=NOW - 3600),
    }
    dead = {
        attempt_of(storage, "b1", pid=dead_pid),
        attempt_of(storage, "b2", started="12345"),  # the pid was given to another process
        attempt_of(storage, "b3", boot_id="an earlier boot"),
        attempt_of(storage, "b4", host="elsewhere", created_s=NOW - 25 * 3600),
    }
    swept = sweep_leftovers(storage, "run", now=NOW)
    assert (set(swept.removed), swept.left) == (dead, ())
    assert names(storage) == kept


def test_a_killed_process_that_nobody_reaped_is_dead(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    pid = os.fork()
    if pid == 0:
        begin_attempt(storage, "run/step-9", full("ab"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    try:
        swept = sweep_leftovers(storage, "run", now=time.time())
        assert swept.removed == (ATTEMPT_PREFIX + full("ab"),)
    finally:
        os.waitpid(pid, 0)


def test_the_place_of_a_deletion_goes_at_once_when_its_process_died_before_the_rename(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)

    class DiesBeforeTheRename(WrappedStorage):
        def rename(self, src: str, dst: str) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    class SweptBeforeTheRename(WrappedStorage):
        def rename(self, src: str, dst: str) -> None:
            assert sweep_leftovers(storage, "run", now=time.time()) == NOTHING, "its process lives"
            super().rename(src, dst)

    for number in (5, 6):
        save(storage, f"run/step-{number}")
    pid = os.fork()
    if pid == 0:
        sweep.delete_checkpoint(DiesBeforeTheRename(storage), "run/step-5")
    os.waitpid(pid, 0)
    (place,) = names(storage) - {"step-5", "step-6"}
    assert sweep_leftovers(storage, "run", now=time.time()).removed == (place,)
    assert sweep.delete_checkpoint(SweptBeforeTheRename(storage), "run/step-6")
    assert names(storage) == {"step-5"}


def test_ctrl_c_before_the_marker_leaves_no_place_behind(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5")

    class InterruptedAtTheMarker(WrappedStorage):
        def write(self, path: str, data: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.delete_checkpoint(InterruptedAtTheMarker(storage), "run/step-5")
    assert names(storage) == {"step-5"}


def test_an_empty_place_of_a_deletion_goes_after_a_minute(memory_path: Path) -> None:
    """Its process was killed before it wrote the marker, or at the end, between the marker and the folder itself."""
    storage = LocalStorage(memory_path)
    place = DELETING_PREFIX + full("ab")
    storage.make_folder(f"run/{place}")
    now = time.time()
    assert sweep_leftovers(storage, "run", now=now + 30) == NOTHING
    assert sweep_leftovers(storage, "run", now=now + 90).removed == (place,)
    assert names(storage) == set()


def test_an_attempt_lives_while_any_of_its_owners_does(memory_path: Path) -> None:
    """The training process died; its writer process has adopted the attempt and is still writing."""
    storage = LocalStorage(memory_path)
    name = attempt_of(storage, "ab", pid=2**22 + 1)
    adopt_attempt(storage, f"run/{name}")
    assert sweep_leftovers(storage, "run", now=NOW) == NOTHING


def test_an_attempt_without_an_owner_is_swept_once_it_is_old(memory_path: Path) -> None:
    """It was cut short while being made, before there was anything in it; or its owner's record is torn."""
    storage = LocalStorage(memory_path)
    bare, torn = (ATTEMPT_PREFIX + full(short) for short in ("ab", "cd"))
    storage.make_folder(f"run/{bare}/data")
    storage.make_folder(f"run/{torn}/data")
    storage.write(f"run/{torn}/owner-00000000.json", b'{"host": "torn')
    now = time.time()
    assert sweep_leftovers(storage, "run", now=now) == NOTHING
    assert sweep_leftovers(storage, "run", now=now + 30 * 60) == NOTHING
    assert set(sweep_leftovers(storage, "run", now=now + 61 * 60).removed) == {bare, torn}
    assert names(storage) == set()


def test_a_leftover_that_cannot_be_removed_is_no_error(memory_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = LocalStorage(memory_path)
    name = attempt_of(storage, "ab", boot_id="an earlier boot")

    class Stubborn(WrappedStorage):
        def rename(self, src: str, dst: str) -> None:
            raise StorageError("permission denied", operation="rename", path=src, errno=errno.EACCES)

    assert sweep_leftovers(Stubborn(storage), "run", now=NOW) == NOTHING
    assert "permission denied" in caplog.text
    assert sweep_leftovers(storage, "run", now=NOW).removed == (name,)
    assert names(storage) == set()


class Clock:
    """A clock that each sleep advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1.0)


def test_an_attempt_of_another_machine_is_dead_when_nothing_in_it_changes_for_a_lease(memory_path: Path) -> None:
    storage, clock = LocalStorage(memory_path), Clock()
    gone = attempt_of(storage, "ab", host="elsewhere", machine_id="x", created_s=time.time())
    attempts = Attempts(storage, "run", lease_s=90.0, clock=clock)
    assert attempts.dead() == set()
    assert attempts.wait(600.0, sleep=clock.sleep) == []
    assert 90 <= clock.now <= 92
    assert attempts.dead() == {gone}
    assert sweep_leftovers(storage, "run", now=time.time(), dead=attempts.dead()).removed == (gone,)


def test_the_wait_for_the_lock_counts_as_watching(memory_path: Path) -> None:
    storage, clock = LocalStorage(memory_path), Clock()
    gone = attempt_of(storage, "ab", host="elsewhere", machine_id="x", created_s=time.time())
    elsewhere = replace(owner.this_process(time.time()), host="elsewhere", machine_id="x")
    storage.write("run/.lock", elsewhere.dump())
    attempts = Attempts(storage, "run", lease_s=90.0, clock=clock)
    lock = RunLock(storage, "run", lease_s=90.0, sleep=clock.sleep)
    locked = clock.now
    assert locked >= 90
    assert attempts.wait(600.0, sleep=clock.sleep) == []
    assert clock.now == locked
    assert attempts.dead() == {gone}
    lock.release()


def test_an_attempt_of_another_machine_that_grows_lives(memory_path: Path) -> None:
    storage, clock = LocalStorage(memory_path), Clock()
    name = attempt_of(storage, "ab", host="elsewhere", machine_id="x", created_s=time.time())

    def sleep_while_it_writes(seconds: float) -> None:
        clock.sleep(seconds)
        storage.append(f"run/{name}/data/__0_0.distcp", b"more")

    attempts = Attempts(storage, "run", lease_s=90.0, clock=clock)
    (still,) = attempts.wait(200.0, sleep=sleep_while_it_writes)
    assert still.host == "elsewhere"
    assert attempts.dead() == set()


def test_an_attempt_of_a_process_here_is_never_dead_for_being_still(memory_path: Path) -> None:
    storage, clock = LocalStorage(memory_path), Clock()
    attempt_of(storage, "ab")
    attempts = Attempts(storage, "run", lease_s=90.0, clock=clock)
    assert len(attempts.wait(200.0, sleep=clock.sleep)) == 1
    assert attempts.dead() == set()


def test_owner_records_are_readable_and_checked() -> None:
    record = owner.this_process(NOW)
    assert owner.parse_owner(record.dump(), "x") == record
    assert str(record) == f"process {os.getpid()} on {socket.gethostname()}"
    for torn in (b"", b"{}", b"[1]", record.dump()[:-5], json.dumps({"pid": 1}).encode()):
        with pytest.raises(MilepostError):
            owner.parse_owner(torn, "x")


# ---- a replacement that was cut short ----


@pytest.mark.parametrize("prefix", [REPLACED_PREFIX, ".replaced-"])
def test_a_replacement_that_was_cut_short_is_undone_also_of_an_older_version(memory_path: Path, prefix: str) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5", 1)
    aside = f"{prefix}{full('ab')}-step-5"
    storage.rename("run/step-5", f"run/{aside}")
    assert [entry.step for entry in catalog.scan(storage, "run")] == [5]
    assert sweep_leftovers(storage, "run", now=NOW) == Sweep((aside,), ())
    assert names(storage) == {"step-5"}


def test_what_a_committed_step_has_replaced_is_removed(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5", 1)
    aside, external = (f"{REPLACED_PREFIX}{full(short)}-step-5" for short in ("ab", "cd"))
    storage.rename("run/step-5", f"run/{aside}")
    storage.make_folder(f"run/{external}")
    storage.write(f"run/{external}/.metadata", b"of another program")
    save(storage, "run/step-5", 2)
    swept = sweep_leftovers(storage, "run", now=NOW)
    assert names(storage) == {"step-5", external}
    assert swept.left == (external,)


# ---- deleting ----


def test_deleting_a_link_leaves_what_it_points_to(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "archive/step-5")
    (memory_path / "run").mkdir()
    (memory_path / "run" / "step-5").symlink_to("../archive/step-5")
    assert sweep.delete_checkpoint(storage, "run/step-5")
    assert storage.list("run") == []
    assert [entry.state for entry in catalog.scan(storage, "archive")] == ["committed"]


def test_deleting_what_is_not_there_is_an_error(memory_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        sweep.delete_checkpoint(LocalStorage(memory_path), "run/step-5")


def test_deleting_a_step_takes_its_mark_of_damage_along(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5")
    catalog.mark_damaged(storage, "run/step-5", "bits flipped", now=NOW)
    sweep.delete_checkpoint(storage, "run/step-5")
    assert storage.list("run") == []


def test_a_full_disk_does_not_keep_a_step_from_being_deleted(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)

    class Full(WrappedStorage):
        def make_folder(self, path: str, *, synced: bool = True) -> None:
            raise StorageError("no space left", operation="make folder", path=path, errno=errno.ENOSPC)

    save(storage, "run/step-5")
    assert sweep.delete_checkpoint(Full(storage), "run/step-5")
    assert storage.list("run") == []


@pytest.mark.parametrize("moment", ["rename", "make_folder"])
def test_a_pin_that_comes_while_a_step_is_being_deleted_keeps_it(memory_path: Path, moment: str) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5")

    class PinnedMeanwhile(WrappedStorage):
        def rename(self, src: str, dst: str) -> None:
            if moment == "rename" and src == "run/step-5":
                marks.pin(storage, "run", 5)
            super().rename(src, dst)

        def make_folder(self, path: str, *, synced: bool = True) -> None:
            super().make_folder(path, synced=synced)
            if moment == "make_folder":
                marks.pin(storage, "run", 5)

    assert not sweep.delete_checkpoint(PinnedMeanwhile(storage), "run/step-5", unless=pin_mark("run/step-5"))
    assert names(storage) == {"step-5", ".pinned-step-5"}
    assert [(entry.state, entry.pinned) for entry in catalog.scan(storage, "run")] == [("committed", True)]


def test_two_that_delete_one_step_do_not_fail(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5")

    class Quicker(WrappedStorage):
        def make_folder(self, path: str, *, synced: bool = True) -> None:
            super().make_folder(path, synced=synced)
            if storage.stat("run/step-5") is not None:
                sweep.delete_checkpoint(storage, "run/step-5")

    with pytest.raises(CheckpointNotFoundError, match="another process has deleted"):
        sweep.delete_checkpoint(Quicker(storage), "run/step-5")
    assert storage.list("run") == []
