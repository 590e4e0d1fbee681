"""The commit in an object store: at every request, every fault, both kinds of readers see the old or the new step."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import obstore.store
import pytest

from milepost.errors import CheckpointNotFoundError, SaveError, StorageError
from milepost.format.dcp_metadata import manifest_from_metadata, parse_metadata
from milepost.format.manifest import MANIFEST_NAME, METADATA_NAME, Manifest
from milepost.format.tags import tag_of
from milepost.run import catalog, checkpoint_record, commit, marks, object_sweep, sweep
from milepost.run.lock import RunLock
from milepost.run.object_commit import aliases
from milepost.run.step_names import ATTEMPT_PREFIX
from milepost.storage import LocalStorage
from milepost.storage.base import split
from milepost.storage.objectstore import ObjectStorage
from milepost.storage.retry import Retry
from milepost.testing.faulty_client import CLIENT_FAULTS, ClientFault, FaultyClient, Killed
from milepost.testing.sample import save_arrays
from milepost.verification.external import locate_manifest
from milepost.verification.verify import verify_in

Tally = Callable[..., None]
Arrays = Mapping[str, npt.NDArray[np.float32]]
TARGET = "run/step-5"
OLD = {"a": np.arange(6, dtype=np.float32).reshape(3, 2), "b.c": np.full((4,), 7, np.float32)}
NEW = {"a": np.arange(6, dtype=np.float32).reshape(3, 2) + 100, "b.c": np.full((4,), 8, np.float32)}
EAGER = Retry(num_tries=3, first_wait_s=0.0)


def storage_on(client: object) -> ObjectStorage:
    return ObjectStorage("memory://bucket", store=client, retry=EAGER)


def save(storage: ObjectStorage, arrays: Arrays, num_ranks: int = 1) -> Manifest:
    return save_arrays(storage, TARGET, arrays, objects={"n": 3}, step=5, num_ranks=num_ranks, now=time.time())


def contents(storage: ObjectStorage, manifest: Manifest) -> dict[str, npt.NDArray[np.float32]]:
    found = {}
    for key, entry in manifest.tensors.items():
        found[key] = np.zeros(entry.shape, np.float32)
        for shard in entry.shards:
            assert shard.data_offset is not None
            data = bytearray(shard.data_nbytes)
            with storage.open_read(f"{TARGET}/{shard.file}") as handle:
                handle.read_into(shard.data_offset, [memoryview(data)])
            found[key][shard.box.index()] = np.frombuffer(data, np.float32).reshape(shard.box.sizes)
    return found


def seen_by_milepost(storage: ObjectStorage) -> str:
    """``old``, ``new``, ``nothing``, or a description of the content."""
    steps = catalog.scan(storage, "run")
    if not steps:
        return "nothing"
    if [(entry.step, entry.is_usable) for entry in steps] != [(5, True)]:
        return f"{steps}"
    manifest = checkpoint_record.read_manifest(storage, TARGET)
    if steps[0].state == "external":
        manifest = locate_manifest(storage, TARGET, manifest)
    return which(contents(storage, manifest))


def seen_by_stock(storage: ObjectStorage) -> str:
    """Return the checkpoint as found through ``.metadata``, like stock DCP does."""
    try:
        data = storage.read(f"{TARGET}/{METADATA_NAME}")
    except StorageError:
        return "nothing"
    sizes = {entry.name: entry.nbytes for entry in storage.list(TARGET)}
    manifest = locate_manifest(storage, TARGET, manifest_from_metadata(parse_metadata(data), sizes))
    return which(contents(storage, manifest))


def which(found: Arrays) -> str:
    for name, arrays in (("old", OLD), ("new", NEW)):
        if found.keys() == arrays.keys() and all(np.array_equal(found[key], arrays[key]) for key in arrays):
            return name
    return f"a mix: {found}"


def begin_with(client: object, before: str, folder: Path) -> None:
    """Fill an empty store before a save: nothing, a step of ours, or one that stock DCP has written."""
    if before == "own":
        save(storage_on(client), OLD)
    elif before == "external":
        save_arrays(LocalStorage(folder), TARGET, OLD, objects={"n": 3}, step=5, num_ranks=2)
        for path in (folder / TARGET).iterdir():
            if path.name == METADATA_NAME or path.suffix == ".distcp":
                storage_on(client).write(f"{TARGET}/{path.name}", path.read_bytes())


def finish(store: object) -> None:
    """Sweep like the next run, once dead runs are known to be dead and readers have finished."""
    storage = store if isinstance(store, ObjectStorage) else storage_on(store)
    with (
        patch.object(object_sweep, "READERS_S", -60.0),
        patch.object(object_sweep, "OWNERLESS_LIFETIME_S", -60.0),
        patch.object(object_sweep, "is_alive", lambda *_: False),
    ):
        sweep.sweep_leftovers(storage, "run", now=time.time())
        object_sweep.remove_orphans(storage, "run")


def leftovers(store: object) -> list[str]:
    """Return the objects in the store that belong to no checkpoint."""
    storage = store if isinstance(store, ObjectStorage) else storage_on(store)
    manifest = checkpoint_record.read_manifest(storage, TARGET) if storage.stat(f"{TARGET}/{MANIFEST_NAME}") else None
    known = {*manifest.files, *aliases(manifest), MANIFEST_NAME} if manifest else {METADATA_NAME}
    names = storage.list_files("run")
    return [name for name in names if (split(name)[1] not in known and tag_of(name)) or ATTEMPT_PREFIX in name]


BEFORE = pytest.mark.parametrize("before", ["nothing", "own", "external"])


@BEFORE
def test_a_fault_at_any_request_leaves_the_old_step_or_the_new_one(before: str, tmp_path: Path) -> None:
    """The faults that leave the most objects, on one rank."""
    try_all(before, ("lost", "killed", "killed after"), 1, tmp_path)


@pytest.mark.slow
@BEFORE
def test_every_fault_at_every_request_leaves_the_old_step_or_the_new_one(
    before: str, tmp_path: Path, tally: Tally
) -> None:
    tried = try_all(before, CLIENT_FAULTS, 2, tmp_path)
    tally(f"a fault at each request of a save to a store ({before} before)", tried=tried, lost=0)


def try_all(before: str, faults: Sequence[ClientFault], num_ranks: int, folder: Path) -> int:
    """Save with each fault at each request and check the store, before and after the next run; returns their number."""
    start = "nothing" if before == "nothing" else "old"
    begun = obstore.store.MemoryStore()
    begin_with(begun, before, folder)
    client = FaultyClient(copy_of(begun))
    save(storage_on(client), NEW, num_ranks)
    count = len(client.requests)
    wrong: list[str] = []
    logging.getLogger("milepost").setLevel(logging.ERROR)  # it would log hundreds of retries
    for fault, number in itertools.product(faults, range(count)):
        store = copy_of(begun)
        client = FaultyClient(store, fail_at=number, fault=fault)
        outcome = "done"
        try:
            save(storage_on(client), NEW, num_ranks)
        except Killed:
            outcome = "killed"
        except (SaveError, StorageError) as error:
            outcome = f"{error}"
        clean = storage_on(store)
        ours, stock = seen_by_milepost(clean), seen_by_stock(clean)
        finish(store)
        after = seen_by_milepost(clean), seen_by_stock(clean)
        left = leftovers(store)
        if number % 4 == 0:
            save(clean, NEW)
            again = seen_by_milepost(clean), seen_by_stock(clean)
        else:
            again = "new", "new"
        is_right = (
            ours in (start, "new")
            and stock in (start, "new")
            and after == (ours, ours)
            and (outcome == ("killed" if fault.startswith("killed") else "done"))
            and (outcome != "done" or (ours, stock) == ("new", "new"))
            and not left
            and again == ("new", "new")
        )
        if not is_right:
            wrong.append(f"{fault} at {client.requests[number]}: {outcome}; {ours}, {stock}, {after}, {left}, {again}")
    assert not wrong, "\n".join(wrong[:10])
    return len(faults) * count


def copy_of(begun: object) -> obstore.store.MemoryStore:
    """A store with the same objects."""
    store = obstore.store.MemoryStore()
    for meta in obstore.list(begun).collect():
        store.put(meta["path"], bytes(begun.get(meta["path"]).bytes()))
    return store


# ---- two processes at one step ----


def test_of_two_writers_at_one_step_one_wins_and_the_other_is_reported() -> None:
    storage = storage_on(obstore.store.MemoryStore())
    begun: list[str] = []

    def save_meanwhile(attempt_storage: ObjectStorage, path: str, data: bytes, tag: str | None) -> None:
        if not begun:
            begun.append(path)
            save(storage, NEW)
        real(attempt_storage, path, data, tag)

    real = ObjectStorage.put_if
    with patch.object(ObjectStorage, "put_if", save_meanwhile), pytest.raises(SaveError, match="another process has"):
        save(storage, OLD)
    assert (seen_by_milepost(storage), seen_by_stock(storage)) == ("new", "new")
    finish(storage)
    assert (seen_by_milepost(storage), seen_by_stock(storage)) == ("new", "new")
    assert leftovers(storage) == []


def test_a_writer_that_was_taken_for_dead_commits_nothing() -> None:
    storage = storage_on(obstore.store.MemoryStore())
    save(storage, OLD)

    def sweep_before(*args: object, **options: object) -> object:
        finish(storage)
        return real(*args, **options)  # type: ignore[arg-type]

    real = commit.publish
    with patch("milepost.testing.sample.publish", sweep_before), pytest.raises(SaveError):
        save(storage, NEW)
    assert (seen_by_milepost(storage), seen_by_stock(storage)) == ("old", "old")


def test_a_reader_of_the_old_step_finishes_while_it_is_replaced() -> None:
    storage = storage_on(obstore.store.MemoryStore())
    manifest = save(storage, OLD)
    save(storage, NEW)
    sweep.sweep_leftovers(storage, "run", now=time.time())
    assert which(contents(storage, manifest)) == "old"
    finish(storage)
    with pytest.raises(StorageError):
        contents(storage, manifest)


def test_a_step_is_gone_for_every_reader_at_once_when_it_is_deleted(tmp_path: Path) -> None:
    begun = obstore.store.MemoryStore()
    begin_with(begun, "own", tmp_path)
    client = FaultyClient(copy_of(begun))
    sweep.delete_checkpoint(storage_on(client), TARGET)
    assert storage_on(client).list_files("run") == {}
    for fault, number in itertools.product(("killed", "killed after"), range(len(client.requests))):
        store = copy_of(begun)
        with contextlib.suppress(Killed):
            sweep.delete_checkpoint(storage_on(FaultyClient(store, fail_at=number, fault=fault)), TARGET)
        clean = storage_on(store)
        ours, stock = seen_by_milepost(clean), seen_by_stock(clean)
        assert (ours, stock) in {("old", "old"), ("old", "nothing"), ("nothing", "nothing")}
        finish(store)
        assert seen_by_milepost(clean) == ours
        assert leftovers(store) == []


def test_a_step_that_is_pinned_while_it_is_deleted_stays_or_the_pin_is_refused(tmp_path: Path) -> None:
    """Whichever request of the deletion another process's pin comes after."""
    begun = obstore.store.MemoryStore()
    begin_with(begun, "own", tmp_path)
    counting = FaultyClient(copy_of(begun))
    sweep.delete_checkpoint(storage_on(counting), TARGET, unless="run/.pinned-step-5")
    outcomes = set()
    for number in range(len(counting.requests)):
        store = copy_of(begun)
        other = storage_on(store)
        said: list[str] = []

        def pin_now(other: ObjectStorage = other, said: list[str] = said) -> None:
            try:
                marks.pin(other, "run", 5)
                said.append("pinned")
            except CheckpointNotFoundError:
                said.append("refused")

        client = InterruptedClient(store, number, pin_now)
        is_deleted = sweep.delete_checkpoint(storage_on(client), TARGET, unless="run/.pinned-step-5")
        seen = seen_by_milepost(other), seen_by_stock(other)
        assert seen == (("nothing", "nothing") if is_deleted else ("old", "old")), (client.requests, number)
        assert said == ["refused"] or not is_deleted, (client.requests, number)
        outcomes.add((is_deleted, *said))
    assert outcomes >= {(True, "refused"), (False, "pinned")}


def test_a_step_whose_saver_died_before_metadata_is_no_damaged_one() -> None:
    storage = storage_on(obstore.store.MemoryStore())
    save(storage, OLD)
    old = storage.read(f"{TARGET}/{METADATA_NAME}")
    save(storage, NEW)
    for found in (None, old):  # between the two acts of a first save, and of a later one
        storage.remove(f"{TARGET}/{METADATA_NAME}")
        if found is not None:
            storage.write(f"{TARGET}/{METADATA_NAME}", found)
        report = verify_in(storage, TARGET)
        assert report.is_sound
        assert "other programs can't open it yet" in report.notes[-1]
    storage.replace(f"{TARGET}/{METADATA_NAME}", b"of nobody")
    assert [str(problem) for problem in verify_in(storage, TARGET).problems] == [
        ".metadata: it belongs to another save than milepost.json"
    ]


class InterruptedClient(FaultyClient):
    """Calls ``act`` before request ``number``."""

    def __init__(self, inner: object, number: int, act: Callable[[], None]):
        super().__init__(inner)
        self._number, self._act = number, act

    def __getattr__(self, name: str) -> Callable[..., object]:
        request = super().__getattr__(name)

        def interrupted(*args: object, **options: object) -> object:
            if len(self.requests) == self._number:
                self._act()
            return request(*args, **options)

        return interrupted


def test_what_the_user_has_put_into_a_step_is_not_deleted_with_it() -> None:
    storage = storage_on(obstore.store.MemoryStore())
    save(storage, OLD)
    save(storage, NEW)
    storage.write(f"{TARGET}/eval.json", b"mine")
    storage.write(f"{TARGET}/plots/loss.png", b"mine too")
    assert sweep.delete_checkpoint(storage, TARGET)
    assert catalog.scan(storage, "run") == []
    finish(storage)
    found = storage.list_files("run")
    assert {split(name)[1] for name in found} == {"eval.json", "loss.png"}
    assert all(name.startswith("step-5.aside-") for name in found)


def test_the_sweep_of_a_run_leaves_the_uploads_of_another_below_it() -> None:
    storage = storage_on(obstore.store.MemoryStore())
    dead, alive = "0" * 32, "1" * 32
    storage.write(f"run/{ATTEMPT_PREFIX}{alive}/target", b"{}")
    uploads = [
        f"step-1/__0_0.{dead}.distcp",
        f"step-1/__0_0.{alive}.distcp",
        f"inner/step-1/__0_0.{dead}.distcp",
        "a.bin",
    ]
    with patch.object(
        ObjectStorage, "abort_uploads", lambda self, path, is_dead: aborted.extend(filter(is_dead, uploads))
    ):
        aborted: list[str] = []
        object_sweep.remove_orphans(storage, "run")
    assert aborted == uploads[:1]


def test_marks_pins_and_the_lock_mean_the_same_as_on_a_disk() -> None:
    storage = storage_on(obstore.store.MemoryStore())
    save(storage, OLD)
    marks.pin(storage, "run", 5)
    marks.pin(storage, "run", 5)
    assert [entry.pinned for entry in catalog.scan(storage, "run")] == [True]
    marks.unpin(storage, "run", 5)
    for reason in ("first", "second"):
        catalog.mark_damaged(storage, TARGET, reason, now=0.0)
        assert [(entry.state, entry.reason) for entry in catalog.scan(storage, "run")] == [("damaged", reason)]
    save(storage, NEW)
    assert [entry.state for entry in catalog.scan(storage, "run")] == ["committed"]
    lock = RunLock(storage, "run", beat_s=0.01)
    deadline = time.monotonic() + 30
    while not storage.read("run/.lock").endswith(b"."):
        assert time.monotonic() < deadline, "the lock's holder has not written to it"
        time.sleep(0.01)
    lock.release()
    assert storage.stat("run/.lock") is None


def test_a_scan_is_one_listing_and_one_small_get_a_step() -> None:
    client = FaultyClient(obstore.store.MemoryStore())
    storage = storage_on(client)
    for step in range(4):
        save_arrays(storage, f"run/step-{step}", OLD, step=step, num_ranks=2)
    client.requests.clear()
    assert [entry.step for entry in catalog.scan(storage, "run")] == [0, 1, 2, 3]
    assert [request.split()[0] for request in client.requests] == ["list", *["get"] * 4]
