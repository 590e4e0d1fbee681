"""The commit protocol: old or new, never neither, never a mix; and nothing of a dead run is left."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from milepost.errors import ConfigError, MilepostError, PlanError, SaveError, StorageError
from milepost.format.box import Box
from milepost.run import catalog, checkpoint_record, commit, sweep
from milepost.run.assemble import SaveInfo, assemble
from milepost.run.attempts import abort_attempt, begin_attempt
from milepost.run.outcome import fail_attempt, wait_for_outcome
from milepost.run.owner import OWNERLESS_LIFETIME_S
from milepost.run.signoff import (
    SignOff,
    WrittenFile,
    WrittenObject,
    WrittenTensor,
    segment_of,
    sign_off,
    wait_for_sign_offs,
)
from milepost.run.step_names import ATTEMPT_PREFIX
from milepost.storage import LocalStorage, Storage
from milepost.tensors.plan import WriteItem
from milepost.testing.faulty import FaultyStorage
from milepost.testing.sample import save_arrays
from milepost.testing.wrap import Operation, TraceStorage, WrappedStorage
from milepost.verification.verify import verify_in

INFO = SaveInfo(step=5, kind="full")
NOW = 1_000_000.0


def arrays(value: int) -> dict[str, np.ndarray]:
    return {"w": np.full((8, 3), value, "float32"), "optimizer.m": np.full(5, value, "int64")}


def save(storage: Storage, path: str, value: int) -> None:
    save_arrays(storage, path, arrays(value), objects={"train_state.step": value}, num_ranks=2, now=float(value))


class NoExchange(WrappedStorage):
    """A file system without renameat2, such as NFS."""

    def exchange(self, one: str, other: str) -> bool:
        return False


WRAPPERS: Mapping[str, Callable[[Storage], Storage]] = {"exchange": lambda storage: storage, "renames": NoExchange}


def value_at(storage: Storage, folder: str, step: int) -> int | None:
    """Return the save that a scan shows for a step, every byte verified; None if there is none."""
    entry = next((entry for entry in catalog.scan(storage, folder) if entry.step == step), None)
    if entry is None:
        return None
    assert entry.state == "committed", entry
    report = verify_in(storage, entry.path)
    assert report.is_sound, report.problems
    return int(entry.created_s)


def test_a_commit_leaves_the_checkpoint_and_nothing_else(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5", 1)
    assert [entry.name for entry in storage.list("run")] == ["step-5"]
    assert [entry.name for entry in storage.list("run/step-5")] == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "milepost.digests",
        "milepost.json",
        "milepost.shards",
    ]
    manifest = checkpoint_record.read_manifest(storage, "run/step-5")
    assert manifest.world_size == 2
    assert manifest.created_s == 1.0
    assert {shard.box for shard in manifest.tensors["w"].shards} == {Box((0, 0), (4, 3)), Box((4, 0), (4, 3))}


def test_a_checkpoint_may_stand_at_the_root_of_its_storage(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "model", 1)
    save(storage, "model", 2)
    assert [entry.name for entry in storage.list("")] == ["model"]
    assert checkpoint_record.read_manifest(storage, "model").created_s == 2.0


# ---- a crash at every operation ----


def kill(_: Operation) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(act: Callable[[], None]) -> int:
    """Run ``act`` in a forked process; its wait status, 0 on success."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except MilepostError:
            status = 2
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def num_operations(storage: Storage, act: Callable[[Storage], None]) -> int:
    counting = FaultyStorage(storage)
    act(counting)
    return len(counting.operations)


@pytest.mark.parametrize(("kind", "before"), [("exchange", None), ("exchange", 1), ("renames", 1)])
def test_a_kill_at_any_operation_leaves_the_old_state_or_the_new(
    memory_path: Path, kind: str, before: int | None
) -> None:
    count = num_operations(LocalStorage(memory_path / "rehearsal"), lambda s: save(WRAPPERS[kind](s), "run/step-5", 1))
    if before is not None:
        rehearsal = LocalStorage(memory_path / "rehearsal")
        count = num_operations(rehearsal, lambda s: save(WRAPPERS[kind](s), "run/step-5", 2))
    assert count > 15
    seen = []
    for k in range(count):
        storage = LocalStorage(memory_path / str(k))
        save(storage, "run/step-4", 0)
        if before is not None:
            save(storage, "run/step-5", before)
        status = in_a_child(
            lambda k=k, s=storage: save(WRAPPERS[kind](FaultyStorage(s, fail_at=k, hook=kill)), "run/step-5", 2)
        )
        assert os.WIFSIGNALED(status), (k, status)
        found = value_at(storage, "run", 5)
        assert found in (before, 2), k
        assert value_at(storage, "run", 4) == 0
        seen.append(found)
        # The next run sweeps, sees the same, and saves.
        sweep.sweep_leftovers(storage, "run", now=time.time() + 2 * OWNERLESS_LIFETIME_S)
        assert [entry.name for entry in storage.list("run")] == ["step-4"] + (["step-5"] if found else []), k
        assert value_at(storage, "run", 5) == found
        save(storage, "run/step-5", 3)
        assert value_at(storage, "run", 5) == 3
        storage.remove_tree("")
    assert seen[0] == before
    assert seen[-1] == 2


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("tear", [False, True], ids=["error", "torn write"])
def test_an_error_at_any_operation_leaves_the_old_state_or_the_new(memory_path: Path, kind: str, tear: bool) -> None:
    rehearsal = LocalStorage(memory_path / "rehearsal")
    save(rehearsal, "run/step-5", 1)
    count = num_operations(rehearsal, lambda s: save(WRAPPERS[kind](s), "run/step-5", 2))
    for k in range(count):
        storage = LocalStorage(memory_path / str(k))
        save(storage, "run/step-5", 1)
        faulty = FaultyStorage(storage, fail_at=k, number=errno.ENOSPC, tear=tear)
        try:
            save(WRAPPERS[kind](faulty), "run/step-5", 2)
            returned = True
        except MilepostError:
            returned = False
        assert faulty.has_failed
        found = value_at(storage, "run", 5)
        assert found in (1, 2), k
        assert found == 2 or not returned, f"operation {k}: the save returned, but was not committed"
        storage.remove_tree("")


def test_a_kill_while_deleting_shows_the_step_whole_or_not_at_all(memory_path: Path) -> None:
    rehearsal = LocalStorage(memory_path / "rehearsal")
    save(rehearsal, "run/step-5", 1)
    count = num_operations(rehearsal, lambda s: sweep.delete_checkpoint(s, "run/step-5"))
    seen: list[int | None] = []
    for k in range(count):
        storage = LocalStorage(memory_path / str(k))
        save(storage, "run/step-5", 1)
        in_a_child(lambda k=k, s=storage: sweep.delete_checkpoint(FaultyStorage(s, fail_at=k, hook=kill), "run/step-5"))
        found = value_at(storage, "run", 5)
        seen.append(found)
        sweep.sweep_leftovers(storage, "run", now=time.time() + 2 * OWNERLESS_LIFETIME_S)
        assert [entry.name for entry in storage.list("run")] == ([] if found is None else ["step-5"])
    assert seen == sorted(seen, key=lambda value: value is None)
    assert {1, None} == set(seen)


# ---- what publish refuses ----


def written(key: str, box: Box, shape: tuple[int, ...], offset: int = 0, dtype: str = "float32") -> WrittenTensor:
    nbytes = 4 * box.numel
    item = WriteItem(key, dtype, shape, box, offset, nbytes + 100, offset + 50, nbytes)
    return WrittenTensor(item, 7, (1,))


def file_of(rank: int, *tensors: WrittenTensor, objects: tuple[WrittenObject, ...] = ()) -> SignOff:
    return SignOff(rank, "ab", segment_of([WrittenFile(f"__{rank}_0.distcp", 4096, tensors, objects)]))


def test_a_gap_between_shards_names_key_and_region() -> None:
    signed = [file_of(0, written("w", Box((0,), (4,)), (12,))), file_of(1, written("w", Box((8,), (4,)), (12,)))]
    with pytest.raises(PlanError, match=r"4:8") as caught:
        assemble(signed, INFO, now=NOW)
    assert caught.value.key == "w"


def test_a_region_stored_twice_is_refused() -> None:
    signed = [file_of(0, written("w", Box((0,), (4,)), (4,))), file_of(1, written("w", Box((2,), (2,)), (4,)))]
    with pytest.raises(PlanError, match="more than once"):
        assemble(signed, INFO, now=NOW)


def test_records_that_overlap_in_a_file_are_refused() -> None:
    tensors = (written("a", Box((0,), (4,)), (4,)), written("b", Box((0,), (4,)), (4,), offset=64))
    with pytest.raises(PlanError, match="overlap"):
        assemble([file_of(0, *tensors)], INFO, now=NOW)


def test_ranks_that_contradict_each_other_are_named() -> None:
    one = file_of(0, written("w", Box((0,), (4,)), (8,)), objects=(WrittenObject("o", 1000, 10, 1),))
    other = SignOff(
        1,
        "ab",
        segment_of(
            [
                WrittenFile(
                    "__0_0.distcp",
                    4096,
                    (written("w", Box((4,), (4,)), (8,), dtype="int32"),),
                    (WrittenObject("o", 1000, 10, 1),),
                )
            ]
        ),
    )
    with pytest.raises(SaveError) as caught:
        assemble([one, other], INFO, now=NOW)
    message = str(caught.value)
    assert "'w' was stored as float32 [8] and as int32 [8]" in message
    assert "file __0_0.distcp was stored by rank 0 and by rank 1" in message
    assert "'o' was stored by rank 0 and by rank 1" in message


def begin(storage: Storage, name: str = "__0_0.distcp", nbytes: int = 4096) -> tuple[str, SignOff]:
    attempt = begin_attempt(storage, "run/step-5", "ab")
    storage.write(f"{attempt}/data/{name}", bytes(nbytes))
    return attempt, file_of(0, written("w", Box((0,), (4,)), (4,)))


@pytest.mark.parametrize(
    ("name", "nbytes", "message"),
    [
        ("__0_0.distcp", 4000, r"__0_0.distcp: expected 4096 bytes, as its rank recorded, found 4000"),
        ("__7_0.distcp", 4096, r"__0_0.distcp: expected .* found no file.*unexpected file __7_0.distcp"),
    ],
)
def test_storage_that_does_not_hold_what_was_signed_for_is_not_published(
    memory_path: Path, name: str, nbytes: int, message: str
) -> None:
    storage = LocalStorage(memory_path)
    attempt, signed = begin(storage, name, nbytes)
    with pytest.raises(SaveError, match=message):
        commit.publish(storage, attempt, "run/step-5", [signed], INFO, now=NOW, visibility_s=0)
    assert catalog.scan(storage, "run") == []


def test_a_folder_that_is_no_checkpoint_is_never_replaced(memory_path: Path) -> None:
    home = memory_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    storage = LocalStorage(memory_path)
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        begin_attempt(storage, "home", "ab")
    (home / "thesis.tex").rename(home / ".metadata")
    (home / "work").mkdir()
    with pytest.raises(ConfigError, match="other folders"):
        begin_attempt(storage, "home", "ab")
    (memory_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a folder"):
        begin_attempt(storage, "file", "ab")
    assert sorted(path.name for path in memory_path.iterdir()) == ["file", "home"]


def test_an_empty_folder_and_a_half_written_stock_checkpoint_may_be_replaced(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    (memory_path / "step-1").mkdir()
    (memory_path / "step-2").mkdir()
    (memory_path / "step-2" / "__0_0.distcp").write_text("torn")
    (memory_path / "step-2" / ".metadata.tmp").write_text("torn")
    for step in (1, 2):
        save(storage, f"step-{step}", 1)
        assert value_at(storage, "", step) == 1


def test_what_could_not_be_cleaned_up_after_the_commit_does_not_fail_the_save(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5", 1)

    class CantRemove(WrappedStorage):
        def remove_tree(self, path: str) -> None:
            raise StorageError("no", operation="remove", path=path, errno=errno.EACCES)

    save(CantRemove(storage), "run/step-5", 2)
    assert value_at(storage, "run", 5) == 2
    assert len(storage.list("run")) == 2
    sweep.sweep_leftovers(storage, "run", now=time.time())
    assert [entry.name for entry in storage.list("run")] == ["step-5"]


# ---- the outcome, for ranks that do not publish ----


def test_the_outcome_of_a_commit_is_seen_in_storage_alone(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save(storage, "run/step-5", 1)
    save_id = checkpoint_record.read_manifest(storage, "run/step-5").save_id
    wait_for_outcome(storage, f"run/{ATTEMPT_PREFIX}{save_id}", "run/step-5", save_id, timeout_s=0)


def test_the_outcome_of_a_failure_carries_its_message(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt, _ = begin(storage)
    fail_attempt(storage, attempt, "the save failed on rank 3: no space left on device")
    with pytest.raises(SaveError, match="rank 3: no space left"):
        wait_for_outcome(storage, attempt, "run/step-5", "ab", timeout_s=0)


@pytest.mark.parametrize("before", [None, 1])
def test_an_attempt_that_vanished_is_a_failure_even_if_an_older_step_is_there(
    memory_path: Path, before: int | None
) -> None:
    storage = LocalStorage(memory_path)
    if before is not None:
        save(storage, "run/step-5", before)
    with pytest.raises(SaveError, match="aborted before it was committed"):
        wait_for_outcome(storage, f"run/{ATTEMPT_PREFIX}ab", "run/step-5", "ab", timeout_s=0)


def test_waiting_costs_the_same_however_many_ranks_have_signed_off(memory_path: Path) -> None:
    """Each of N ranks looks many times: to list N sign-offs each time, with a look at each, would be N**2."""
    storage = TraceStorage(LocalStorage(memory_path))
    attempt, _ = begin(storage)
    for rank in range(100):
        sign_off(storage, attempt, SignOff(rank, "ab", error="no space left" if rank == 99 else None))
    storage.operations.clear()
    polls = iter(range(5))
    generator = random.getstate()
    with pytest.raises(SaveError, match="the training has ended"):
        wait_for_outcome(
            *(storage, attempt, "run/step-5", "ab"),
            timeout_s=60,
            give_up=lambda: None if next(polls) < 4 else "the training has ended",
            sleep=lambda _: None,
        )
    assert {operation.name for operation in storage.operations} == {"stat"}
    assert len(storage.operations) <= 3 * 5
    assert random.getstate() == generator, "the pauses drew from the generator that is part of the training state"
    storage.operations.clear()
    with pytest.raises(SaveError, match="rank 99: no space left"):
        wait_for_sign_offs(storage, attempt, 100, "ab", timeout_s=60)
    counts = Counter(operation.name for operation in storage.operations)
    assert counts == {"names": 1, "read": 100}


@pytest.mark.parametrize(("world_size", "longest_s"), [(1, 0.5), (512, 0.5), (2048, 2.0), (16384, 5.0)])
def test_ranks_look_for_the_outcome_less_often_the_more_they_are_and_not_all_at_once(
    memory_path: Path, world_size: int, longest_s: float
) -> None:
    storage = LocalStorage(memory_path)
    attempt, _ = begin(storage)
    pauses: list[float] = []
    with pytest.raises(SaveError, match="within 500 s"):
        wait_for_outcome(
            *(storage, attempt, "run/step-5", "ab"),
            timeout_s=500,
            world_size=world_size,
            clock=lambda: sum(pauses),
            sleep=pauses.append,
        )
    assert pauses[0] < 0.01
    settled = pauses[len(pauses) // 2 :]
    assert 0.7 * longest_s <= min(settled) < max(settled) <= 1.3 * longest_s
    assert len(set(settled)) > len(settled) // 2


def test_waiting_for_an_outcome_ends(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt, _ = begin(storage)
    with pytest.raises(SaveError, match="within 0 s"):
        wait_for_outcome(storage, attempt, "run/step-5", "ab", timeout_s=0)


def test_aborting_never_fails(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt, signed = begin(storage)
    sign_off(storage, attempt, signed)
    abort_attempt(FaultyStorage(storage, fail_at=0), attempt)
    abort_attempt(storage, attempt)
    abort_attempt(storage, attempt)
    assert storage.list("run") == []
