"""The catalog: one definition of committed, one scanner."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, FormatError, StorageError
from milepost.run import catalog, checkpoint_record, marks, sweep
from milepost.run.catalog import StepEntry
from milepost.run.step_names import find_run, step_name, step_of
from milepost.storage import LocalStorage, Storage
from milepost.storage.base import Bytes, Entry
from milepost.testing.sample import save_arrays
from milepost.testing.wrap import Operation, TraceStorage, WrappedStorage
from milepost.verification.external import locate_manifest

T = TypeVar("T")


@pytest.fixture
def storage(memory_path: Path) -> LocalStorage:
    return LocalStorage(memory_path)


def save(storage: Storage, path: str, *, kind: str = "full", now: float = 0.0) -> None:
    arrays = {"w": np.arange(12, dtype="float32").reshape(4, 3), "optimizer.m": np.arange(5, dtype="int64")}
    save_arrays(storage, path, arrays, objects={"train_state.n": 1}, kind=kind, num_ranks=2, now=now)


def make_external(storage: Storage, path: str) -> None:
    """A checkpoint as stock DCP leaves it: no manifest, no digests."""
    save(storage, path)
    storage.remove(f"{path}/milepost.json")
    storage.remove(f"{path}/milepost.digests")
    storage.remove(f"{path}/milepost.shards")


def only(storage: Storage, folder: str = "run") -> StepEntry:
    (entry,) = catalog.scan(storage, folder)
    return entry


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-0", 0),
        ("step-7", 7),
        ("step-100000000000000000", 10**17),
        ("step-007", None),
        ("step-", None),
        ("step--1", None),
        ("step-+1", None),
        ("step-1_000", None),
        ("step-7_old", None),
        ("step-7 ", None),
        ("step-٣", None),
        ("Step-7", None),
        ("step-" + "9" * 19, None),
        ("step-" + "9" * 5000, None),
        (".attempt-step-7", None),
    ],
)
def test_names_of_steps(name: str, step: int | None) -> None:
    assert step_of(name) == step
    assert step is None or step_name(step) == name


def test_a_run_is_listed_oldest_first_by_number_not_by_name(storage: LocalStorage) -> None:
    for step in (10, 9, 100):
        save(storage, f"run/step-{step}", now=1000.0 + step)
    entries = catalog.scan(storage, "run")
    assert [(e.step, e.path, e.state, e.created_s, e.kind, e.world_size) for e in entries] == [
        (9, "run/step-9", "committed", 1009.0, "full", 2),
        (10, "run/step-10", "committed", 1010.0, "full", 2),
        (100, "run/step-100", "committed", 1100.0, "full", 2),
    ]
    sizes = sum(entry.nbytes for entry in storage.list("run/step-9"))
    assert entries[0].nbytes == sizes


def test_a_folder_that_is_not_there_holds_nothing(storage: LocalStorage) -> None:
    assert catalog.scan(storage, "nowhere") == []
    assert catalog.examine(storage, "nowhere") is None


def test_a_scan_reads_metadata_only(storage: LocalStorage) -> None:
    save(storage, "run/step-1")
    trace = TraceStorage(storage)
    catalog.scan(trace, "run")
    assert {str(operation) for operation in trace.operations} == {
        "list run",
        "list run/step-1",
        "read run/step-1/milepost.json",
    }


def test_what_else_lies_in_a_run_is_not_a_step(storage: LocalStorage) -> None:
    save(storage, "run/step-1")
    for name in (
        ".attempt-ab/data",
        ".milepost-attempt-ab/data",
        ".deleting-cd",
        ".milepost-deleting-cd",
        "step-2.tmp",
        "tensorboard",
    ):
        storage.make_folder(f"run/{name}")
    storage.write("run/step-3", b"a file")
    assert only(storage).step == 1


def test_a_folder_without_a_commit_record_is_partial(storage: LocalStorage) -> None:
    save(storage, "run/step-1")
    storage.remove("run/step-1/milepost.json")
    storage.remove("run/step-1/.metadata")
    entry = only(storage)
    assert (entry.state, entry.is_usable) == ("incomplete", False)
    assert "never committed" in entry.reason
    storage.remove_tree("run/step-1")
    storage.make_folder("run/step-1")
    assert only(storage).state == "incomplete"


def test_any_changed_byte_of_the_commit_record_is_damage(storage: LocalStorage) -> None:
    save(storage, "run/step-1")
    data = storage.read("run/step-1/milepost.json")
    for position in range(0, len(data), 37):
        storage.remove("run/step-1/milepost.json")
        storage.write("run/step-1/milepost.json", data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        entry = only(storage)
        assert (entry.state, entry.is_usable) == ("damaged", False), position
        assert "milepost.json" in entry.reason


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "milepost.digests", "milepost.shards"])
def test_files_that_are_missing_short_long_or_links_are_damage(storage: LocalStorage, name: str) -> None:
    save(storage, "run/step-1")
    path = Path(storage.root, "run/step-1", name)
    data = path.read_bytes()
    for content in (data[:-1], data + b"\0", b""):
        path.write_bytes(content)
        assert only(storage).state == "damaged"
        assert f"{name}: expected {len(data)} bytes, found {len(content)}" in only(storage).reason
    path.unlink()
    assert f"{name}: missing" in only(storage).reason
    Path(storage.root, "copy").write_bytes(data)
    path.symlink_to(Path(storage.root, "copy"))
    assert f"{name}: a link" in only(storage).reason
    path.unlink()
    path.write_bytes(data)
    assert only(storage).state == "committed"


def test_files_that_the_commit_record_does_not_name_are_no_damage(storage: LocalStorage) -> None:
    save(storage, "run/step-1")
    storage.write("run/step-1/README.txt", b"my best run")
    storage.make_folder("run/step-1/plots")
    assert only(storage).state == "committed"


def test_a_checkpoint_of_another_program_is_external(storage: LocalStorage) -> None:
    make_external(storage, "run/step-8")
    entry = only(storage)
    assert (entry.state, entry.kind, entry.step, entry.is_usable) == ("external", "full", 8, True)
    assert abs(entry.created_s - os.stat(f"{storage.root}/run/step-8/.metadata").st_mtime) < 1


@pytest.mark.parametrize("harm", ["torn", "missing", "short"])
def test_an_external_checkpoint_that_lost_something_is_damaged(storage: LocalStorage, harm: str) -> None:
    """It was committed once: reporting it as incomplete would let a new run start over it."""
    make_external(storage, "run/step-8")
    metadata, file = Path(storage.root, "run/step-8/.metadata"), Path(storage.root, "run/step-8/__1_0.distcp")
    if harm == "torn":
        metadata.write_bytes(metadata.read_bytes()[:-20])
    elif harm == "missing":
        file.unlink()
    else:
        os.truncate(file, 100)
    entry = only(storage)
    assert entry.state == "damaged"
    assert (".metadata" if harm == "torn" else "__1_0.distcp") in entry.reason


def test_storage_that_cannot_be_read_is_an_error_not_damage(storage: LocalStorage) -> None:
    """Otherwise a server that is down for a second would make a run fall back to an old step."""
    save(storage, "run/step-1")

    class Down(WrappedStorage):
        def read(self, path: str, limit: int = 1 << 30) -> bytes:
            raise StorageError("down", operation="read", path=path, errno=errno.EIO)

    with pytest.raises(StorageError):
        catalog.scan(Down(storage), "run")


def test_a_link_to_a_checkpoint_is_a_step(storage: LocalStorage) -> None:
    save(storage, "archive/step-3")
    storage.make_folder("run")
    Path(storage.root, "run/step-3").symlink_to("../archive/step-3")
    entry = only(storage)
    assert (entry.state, entry.is_link) == ("committed", True)


def test_a_link_that_leads_nowhere_hides_no_other_step(storage: LocalStorage) -> None:
    save_arrays(storage, "run/step-1", {"w": np.zeros(3, "float32")}, step=1)
    Path(storage.root, "run/step-2").symlink_to("step-2")
    Path(storage.root, "run/step-3").symlink_to("/nowhere/at/all")
    states = {entry.step: (entry.state, entry.is_link) for entry in catalog.scan(storage, "run")}
    assert states == {1: ("committed", False), 2: ("incomplete", True), 3: ("incomplete", True)}


# ---- while others write ----


def test_a_step_under_replacement_is_found_by_its_other_name(storage: LocalStorage) -> None:
    save(storage, "run/step-5", now=1.0)
    storage.make_folder("run/.attempt-ab/data")
    storage.rename("run/step-5", "run/.replaced-ab-step-5")
    entry = only(storage)
    assert (entry.step, entry.state, entry.path, entry.created_s) == (5, "committed", "run/.replaced-ab-step-5", 1.0)
    save(storage, "run/step-5", now=2.0)
    assert only(storage).created_s == 2.0


def test_a_listing_that_missed_a_rename_is_repeated(storage: LocalStorage) -> None:
    save(storage, "run/step-5")
    storage.make_folder("run/.attempt-ab")

    class Racing(WrappedStorage):
        """The first listing falls between two renames and sees the step under neither name."""

        calls = 0

        def list(self, path: str) -> list[Entry]:
            found = self.inner.list(path)
            if path == "run":
                self.calls += 1
                if self.calls == 1:
                    return [entry for entry in found if entry.name != "step-5"]
            return found

    assert only(Racing(storage)).step == 5


def test_a_step_that_is_replaced_between_two_reads_is_not_called_damaged(storage: LocalStorage) -> None:
    save(storage, "run/step-5")
    save_arrays(storage, "other", {"v": np.zeros(9999, "float32")}, now=7.0)

    class Racing(WrappedStorage):
        done = False

        def read(self, path: str, limit: int = 1 << 30) -> bytes:
            if not self.done:
                self.done = True
                assert self.inner.exchange("other", "run/step-5")
            return self.inner.read(path, limit)

    entry = only(Racing(storage))
    assert (entry.state, entry.created_s) == ("committed", 7.0)


def test_a_step_that_is_deleted_while_we_look_is_left_out(storage: LocalStorage) -> None:
    save(storage, "run/step-4")
    save(storage, "run/step-5")

    class Racing(WrappedStorage):
        def list(self, path: str) -> list[Entry]:
            if path == "run/step-4":
                self.inner.remove_tree(path)
            return self.inner.list(path)

    assert only(Racing(storage)).step == 5


# ---- marks ----


def test_a_valid_mark_of_damage_is_never_gone_for_a_moment(storage: LocalStorage) -> None:
    """Nor while another one replaces it."""
    save(storage, "run/step-5")
    catalog.mark_damaged(storage, "run/step-5", "bits flipped", now=1.0)

    class Watched(WrappedStorage):
        def around(self, operation: Operation, act: Callable[[], T], half: Callable[[], None] | None = None) -> T:
            result = act()
            assert only(storage).state == "damaged", operation
            return result

    catalog.mark_damaged(Watched(storage), "run/step-5", "seen again", now=2.0)
    assert only(storage).reason == "seen again"
    assert {entry.name for entry in storage.list("run")} == {"step-5", ".damaged-step-5.json"}


def test_a_mark_of_damage_holds_for_that_save_only(storage: LocalStorage) -> None:
    save(storage, "run/step-5")
    save(storage, "run/step-6")
    catalog.mark_damaged(storage, "run/step-5", "bytes 0 to 4096 of 'w' changed", now=1.0)
    catalog.mark_damaged(storage, "run/step-5", "seen again", now=2.0)
    assert [(e.step, e.state, e.reason) for e in catalog.scan(storage, "run")] == [
        (5, "damaged", "seen again"),
        (6, "committed", ""),
    ]
    save(storage, "run/step-5", now=3.0)
    assert [e.state for e in catalog.scan(storage, "run")] == ["committed", "committed"]


def test_an_external_step_can_be_marked_too(storage: LocalStorage) -> None:
    make_external(storage, "run/step-5")
    catalog.mark_damaged(storage, "run/step-5", "cut off", now=1.0)
    assert (only(storage).state, only(storage).reason) == ("damaged", "cut off")


def test_marking_what_is_gone_does_nothing(storage: LocalStorage) -> None:
    storage.make_folder("run")
    catalog.mark_damaged(storage, "run/step-5", "?", now=1.0)
    assert storage.list("run") == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"record_id": 1, "reason": "x"}', b"\xff"])
def test_a_mark_that_says_nothing_is_ignored(storage: LocalStorage, content: bytes) -> None:
    save(storage, "run/step-5")
    storage.write("run/.damaged-step-5.json", content)
    assert only(storage).state == "committed"


def test_pins(storage: LocalStorage) -> None:
    save(storage, "run/step-5")
    marks.pin(storage, "run", 5)
    marks.pin(storage, "run", 5)
    assert only(storage).pinned
    marks.unpin(storage, "run", 5)
    marks.unpin(storage, "run", 5)
    assert not only(storage).pinned


def test_two_pins_at_once_are_one(storage: LocalStorage) -> None:
    save(storage, "run/step-5")

    class Slower(WrappedStorage):
        def write(self, path: str, data: Bytes) -> None:
            marks.pin(storage, "run", 5)
            super().write(path, data)

    marks.pin(Slower(storage), "run", 5)
    assert only(storage).pinned


def test_a_pin_that_comes_too_late_says_so(storage: LocalStorage) -> None:
    save(storage, "run/step-5")

    class DeletedMeanwhile(WrappedStorage):
        def write(self, path: str, data: Bytes) -> None:
            sweep.delete_checkpoint(storage, "run/step-5")
            super().write(path, data)

    with pytest.raises(CheckpointNotFoundError, match="was deleted before it could be pinned"):
        marks.pin(DeletedMeanwhile(storage), "run", 5)
    assert storage.list("run") == []


# ---- finding ----


def test_the_folder_of_a_run_is_found_from_its_dump_folder(storage: LocalStorage) -> None:
    save(storage, "outputs/checkpoint/step-5")
    assert find_run(storage, "outputs") == "outputs/checkpoint"
    assert find_run(storage, "outputs/checkpoint") == "outputs/checkpoint"
    assert find_run(storage, "") is None


# ---- manifests ----


def test_a_manifest_of_a_damaged_or_absent_checkpoint_is_an_error(storage: LocalStorage) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no such folder"):
        checkpoint_record.read_manifest(storage, "run/step-5")
    save(storage, "run/step-5")
    assert set(checkpoint_record.read_manifest(storage, "run/step-5").tensors) == {"w", "optimizer.m"}
    storage.remove("run/step-5/__0_0.distcp")
    with pytest.raises(CheckpointDamagedError, match=r"__0_0\.distcp: missing"):
        checkpoint_record.read_manifest(storage, "run/step-5")
    Path(storage.root, "run/step-5/milepost.json").write_text("{}")
    with pytest.raises(FormatError):
        checkpoint_record.read_manifest(storage, "run/step-5")


def test_an_external_manifest_is_located_to_the_same_bytes_as_our_own(storage: LocalStorage) -> None:
    save(storage, "run/step-5")
    own = checkpoint_record.read_manifest(storage, "run/step-5")
    make_external(storage, "run/step-6")
    external = checkpoint_record.read_manifest(storage, "run/step-6")
    assert all(shard.data_offset is None for tensor in external.tensors.values() for shard in tensor.shards)
    located = locate_manifest(storage, "run/step-6", external)
    assert located.tensors == own.tensors


def test_an_external_record_of_another_shape_or_form_is_refused(storage: LocalStorage) -> None:
    make_external(storage, "run/step-6")
    manifest = checkpoint_record.read_manifest(storage, "run/step-6")
    entry = manifest.tensors["w"]
    file = Path(storage.root, "run/step-6", entry.shards[0].file)
    data = bytearray(file.read_bytes())
    start = entry.shards[0].record_offset
    at = data.index(b"FloatStorage", start)
    data[at : at + 12] = b"FloatStoragf"
    file.write_bytes(data)
    with pytest.raises(FormatError, match="'w' at byte"):
        locate_manifest(storage, "run/step-6", manifest)


def test_a_folder_of_safetensors_in_place_of_a_checkpoint_says_which_option_reads_it(storage: LocalStorage) -> None:
    storage.make_folder("hf")
    storage.write("hf/model.safetensors", b"")
    with pytest.raises(CheckpointNotFoundError, match=r"set checkpoint\.initial_load_in_hf"):
        checkpoint_record.read_record(storage, "hf")
