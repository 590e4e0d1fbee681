"""``verify``: every changed byte of every file is found, and located."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from manifests import record_files

from milepost import verify
from milepost.errors import CheckpointNotFoundError, ConfigError, StorageError
from milepost.format.digest import crc32, dump_digests, parse_digests
from milepost.format.manifest import BLOCK_NBYTES, FileEntry, Manifest
from milepost.run import catalog, checkpoint_record, sweep
from milepost.storage import LocalStorage, Storage
from milepost.storage.base import ReadHandle
from milepost.testing.sample import save_arrays
from milepost.testing.wrap import Operation, TraceStorage, WrappedStorage
from milepost.verification.external import locate_manifest
from milepost.verification.verify import LEVELS, VerifyReport, verify_in, verify_run

STEP = "run/step-5"


@pytest.fixture
def storage(memory_path: Path) -> LocalStorage:
    return LocalStorage(memory_path)


def save(storage: Storage, path: str = STEP) -> Manifest:
    arrays = {
        "w": np.arange(300, dtype="float32").reshape(20, 15),
        "b": np.arange(7, dtype="int16"),
        "scalar": np.float64(3.5),
        "empty": np.zeros((0, 4), "float32"),
        "large": np.random.default_rng(0).integers(0, 255, 2 * BLOCK_NBYTES + 4321, dtype="uint8"),
    }
    return save_arrays(
        storage, path, arrays, objects={"train_state.n": {"a": [1, 2]}, "rng.r": b"x" * 100}, num_ranks=2
    )


def make_external(storage: Storage) -> None:
    save(storage)
    storage.remove(f"{STEP}/milepost.json")
    storage.remove(f"{STEP}/milepost.digests")
    storage.remove(f"{STEP}/milepost.shards")


def data_file(storage: Storage, name: str) -> Path:
    return Path(storage.root, STEP, name)


def flip(file: Path, offset: int, mask: int = 1) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ mask]))


def owner_at(manifest: Manifest, name: str, offset: int) -> str | None:
    """The key whose record holds a byte; None for padding and for files of the commit."""
    places = [(key, shard) for key, tensor in manifest.tensors.items() for shard in tensor.shards]
    places += list(manifest.objects.items())  # type: ignore[arg-type]
    for key, place in places:
        if place.file == name and place.record_offset <= offset < place.record_offset + place.record_nbytes:
            return key
    return None


# ---- undamaged checkpoints ----


@pytest.mark.parametrize("level", LEVELS)
def test_what_was_saved_is_sound_at_every_level(storage: LocalStorage, level: str) -> None:
    save(storage)
    report = verify(f"{storage.root}/{STEP}", level)  # type: ignore[arg-type]
    assert report.is_sound, report.problems
    assert (report.state, report.level, report.notes) == ("committed", level, ())
    assert report.num_items == 10


def test_a_full_verification_reads_every_byte_of_every_file_once(storage: LocalStorage) -> None:
    save(storage)
    trace = TraceStorage(storage)
    seen: list[tuple[int, int]] = []
    report = verify_in(trace, STEP, progress=lambda done, total: seen.append((done, total)))
    total = sum(entry.nbytes for entry in storage.list(STEP))
    assert (report.nbytes, report.read_nbytes, report.unchecked_nbytes) == (total, total, 0)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    data = sum(entry.nbytes for entry in storage.list(STEP) if entry.name.endswith(".distcp"))
    assert trace.nbytes("read_into") == data


def test_cheap_levels_do_not_read_the_data(storage: LocalStorage) -> None:
    save(storage)
    for level in ("metadata", "sizes"):
        trace = TraceStorage(storage)
        verify_in(trace, STEP, level)  # type: ignore[arg-type]
        assert not any(".distcp" in operation.path for operation in trace.operations)


def test_verifying_changes_nothing(storage: LocalStorage) -> None:
    save(storage)
    trace = TraceStorage(storage)
    verify_in(trace, STEP)
    assert not any(operation.changes for operation in trace.operations)


# ---- every byte ----


@pytest.mark.parametrize(
    "name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "milepost.digests", "milepost.shards", "milepost.json"]
)
def test_a_flipped_bit_anywhere_is_found_and_named(storage: LocalStorage, name: str) -> None:
    manifest = save(storage)
    file = data_file(storage, name)
    size = file.stat().st_size
    rng = random.Random(name)
    # Headers, footers and small records are at the front and at the end.
    offsets = {
        0,
        size - 1,
        *rng.sample(range(min(size, 20_000)), min(size, 40)),
        *rng.sample(range(size), min(size, 20)),
    }
    for offset in sorted(offsets):
        mask = 1 << rng.randrange(8)
        flip(file, offset, mask)
        report = verify_in(storage, STEP)
        assert not report.is_sound, offset
        (problem,) = report.problems
        assert problem.file == name
        if name.endswith(".distcp"):
            assert problem.key == owner_at(manifest, name, offset)
            assert problem.byte_range is not None
            start, stop = problem.byte_range
            assert start <= offset < stop <= start + BLOCK_NBYTES
        flip(file, offset, mask)
    assert verify_in(storage, STEP).is_sound


def test_damage_to_one_block_is_distinguished_from_its_neighbours(storage: LocalStorage) -> None:
    manifest = save(storage)
    (shard, _) = manifest.tensors["large"].shards
    assert shard.data_offset is not None
    flip(data_file(storage, shard.file), shard.data_offset + BLOCK_NBYTES + 17)
    (problem,) = verify_in(storage, STEP).problems
    assert problem.byte_range == (shard.data_offset + BLOCK_NBYTES, shard.data_offset + shard.data_nbytes)
    assert str(problem).startswith(f"{shard.file} bytes {problem.byte_range[0]}-{problem.byte_range[1]} (large): data")


def test_neighbouring_damage_is_reported_as_one_range(storage: LocalStorage) -> None:
    manifest = save(storage)
    (shard, _) = manifest.tensors["large"].shards
    assert shard.data_offset is not None
    for block in (0, 1):
        flip(data_file(storage, shard.file), shard.data_offset + block * BLOCK_NBYTES)
    report = verify_in(storage, STEP)
    (problem,) = report.problems
    assert problem.byte_range == (shard.data_offset, shard.data_offset + shard.data_nbytes)
    assert report.num_problems == 2


def test_padding_must_be_zero(storage: LocalStorage) -> None:
    save(storage)
    file = data_file(storage, "__1_0.distcp")
    flip(file, file.stat().st_size - 5)
    (problem,) = verify_in(storage, STEP).problems
    assert (problem.key, problem.message) == (None, "padding is not zero")
    assert problem.byte_range == (file.stat().st_size - 5, file.stat().st_size - 4)


# ---- coarse damage ----


def zero_a_page(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.seek(4096)
        handle.write(bytes(4096))


HARMS: dict[str, Callable[[Path], None]] = {
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: os.truncate(file, 0),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "extended": lambda file: os.truncate(file, file.stat().st_size + 1),
    "zeroed": zero_a_page,
    "swapped": lambda file: os.rename(file.parent / "__1_0.distcp", file),
    "linked": lambda file: (os.rename(file, file.parent.parent / "x"), file.symlink_to("../x"))[0],
}


@pytest.mark.parametrize("harm", HARMS)
def test_coarse_damage_to_a_data_file_is_found(storage: LocalStorage, harm: str) -> None:
    save(storage)
    HARMS[harm](data_file(storage, "__0_0.distcp"))
    report = verify_in(storage, STEP)
    assert not report.is_sound
    assert {problem.file for problem in report.problems} <= {"__0_0.distcp", "__1_0.distcp"}
    assert "__0_0.distcp" in {problem.file for problem in report.problems}
    if harm == "zeroed":
        assert report.state == "committed"  # metadata does not show it
        assert verify_in(storage, STEP, "sizes").is_sound
    else:
        assert report.state == "damaged"
        assert not verify_in(storage, STEP, "sizes").is_sound


def test_a_cut_file_names_the_keys_that_are_lost(storage: LocalStorage) -> None:
    manifest = save(storage)
    os.truncate(data_file(storage, "__0_0.distcp"), 100)
    (problem,) = verify_in(storage, STEP).problems
    assert (problem.file, problem.byte_range) == ("__0_0.distcp", None)
    lost = [key for key, t in manifest.tensors.items() if any(s.file == "__0_0.distcp" for s in t.shards)]
    assert f"found 100; {len(lost) + len(manifest.objects)} records lost: {lost[0]}, " in problem.message


def test_what_is_left_of_a_cut_file_is_checked_too(storage: LocalStorage) -> None:
    manifest = save(storage)
    shards = [shard for t in manifest.tensors.values() for shard in t.shards if shard.file == "__0_0.distcp"]
    first = min((shard for shard in shards if shard.data_nbytes), key=lambda shard: shard.record_offset)
    last = max(shards, key=lambda shard: shard.record_offset)
    os.truncate(data_file(storage, "__0_0.distcp"), last.record_offset + 10)
    assert first.data_offset is not None
    flip(data_file(storage, "__0_0.distcp"), first.data_offset)
    assert len(verify_in(storage, STEP).problems) == 2


def test_a_cut_file_with_thousands_of_records_is_one_problem(storage: LocalStorage) -> None:
    save_arrays(storage, STEP, {f"k{i}": np.ones(1, "int8") for i in range(2000)})
    os.truncate(data_file(storage, "__0_0.distcp"), 0)
    (problem,) = verify_in(storage, STEP).problems
    assert problem.message.endswith("2000 records lost: k0, k1, k10, k100, k1000, ... and 1995 more")


@pytest.mark.parametrize("name", [".metadata", "milepost.digests", "milepost.shards"])
def test_small_files_that_are_gone_are_named(storage: LocalStorage, name: str) -> None:
    save(storage)
    data_file(storage, name).unlink()
    for level in LEVELS[1:]:
        problems = verify_in(storage, STEP, level).problems
        assert [problem.file for problem in problems] == [name]


def test_a_data_file_that_belongs_to_nothing_is_reported(storage: LocalStorage) -> None:
    save(storage)
    data_file(storage, "__9_0.distcp").write_bytes(b"x")
    data_file(storage, "notes.txt").write_bytes(b"x")
    (problem,) = verify_in(storage, STEP).problems
    assert (problem.file, problem.message) == ("__9_0.distcp", "it is not part of this checkpoint")


def test_metadata_of_another_save_is_found_though_it_is_whole(storage: LocalStorage) -> None:
    """Both files have their right CRC-32s, but stock DCP would read other bytes than we do."""
    save(storage)
    save_arrays(storage, "other", {"w": np.zeros((20, 15), "int32"), "new": np.zeros(3, "int8")}, num_ranks=2)
    stranger = storage.read("other/.metadata")
    manifest = checkpoint_record.read_manifest(storage, STEP)
    forged = replace(manifest, files={**manifest.files, ".metadata": FileEntry(len(stranger), crc32(stranger))})
    data_file(storage, ".metadata").write_bytes(stranger)
    for name, content in record_files(forged).items():
        data_file(storage, name).write_bytes(content)
    problems = verify_in(storage, STEP, "metadata").problems
    assert {problem.file for problem in problems} == {".metadata"}
    assert "new" in {problem.key for problem in problems}
    assert "w" in {problem.key for problem in problems}


def test_metadata_in_other_words_is_no_fault(storage: LocalStorage) -> None:
    """Another version, or torch itself, writes other bytes for the same metadata: then the contents are compared."""
    manifest = save(storage)
    # Protocol 5 begins like 4, and each of its opcodes is in it.
    again = b"\x80\x05" + storage.read(f"{STEP}/.metadata")[2:]
    same = replace(manifest, files={**manifest.files, ".metadata": FileEntry(len(again), crc32(again))})
    data_file(storage, ".metadata").write_bytes(again)
    for name, content in record_files(same).items():
        data_file(storage, name).write_bytes(content)
    assert verify_in(storage, STEP, "metadata").verdict == "ok"


def test_digests_that_are_not_the_shards_are_named(storage: LocalStorage) -> None:
    """Both files have their right CRC-32s; the digest of one block is another."""
    manifest = save(storage)
    digests = parse_digests(storage.read(f"{STEP}/milepost.digests"), manifest)
    crcs = list(digests.crcs)
    start, bounds = digests.starts["large"]
    crcs[start + bounds[0] + 1] ^= 1 << 20
    forged = dump_digests(manifest.save_id, [crcs])
    other = replace(manifest, files={**manifest.files, "milepost.digests": FileEntry(len(forged), crc32(forged))})
    data_file(storage, "milepost.digests").write_bytes(forged)
    for name, content in record_files(other).items():
        data_file(storage, name).write_bytes(content)
    (problem,) = verify_in(storage, STEP, "metadata").problems
    assert (problem.file, problem.key) == ("milepost.digests", "large")
    assert str(manifest.tensors["large"].shards[0].box) in problem.message


def test_a_sample_finds_gross_damage(storage: LocalStorage) -> None:
    save(storage)
    for name in ("__0_0.distcp", "__1_0.distcp"):
        file = data_file(storage, name)
        file.write_bytes(bytes(file.stat().st_size))
    assert verify_in(storage, STEP, "sizes").is_sound
    report = verify_in(storage, STEP, "sample")
    assert {problem.key for problem in report.problems} == {
        "w",
        "b",
        "scalar",
        "empty",
        "large",
        "train_state.n",
        "rng.r",
    }


def test_a_disk_that_fails_in_one_place_does_not_end_the_verification(storage: LocalStorage) -> None:
    save(storage)

    class BadSector(WrappedStorage):
        def around(self, operation: Operation, act: Callable, half: object = None):  # type: ignore[no-untyped-def, type-arg]
            if operation.name == "read_into" and operation.path.endswith("__1_0.distcp") and operation.offset == 0:
                raise StorageError("input/output error", operation="read", path="x", errno=errno.EIO)
            return act()

    problems = verify_in(BadSector(storage), STEP).problems
    assert {problem.file for problem in problems} == {"__1_0.distcp"}
    assert all("input/output error" in problem.message for problem in problems)


def test_many_problems_are_counted_but_not_all_kept(storage: LocalStorage) -> None:
    count = 1100
    save_arrays(storage, STEP, {f"k{i}": np.ones(1, "int8") for i in range(count)})
    file = data_file(storage, "__0_0.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    report = verify_in(storage, STEP)
    assert report.num_problems >= count
    assert len(report.problems) == 1000


# ---- external ones ----


def test_an_external_checkpoint_is_verified_as_far_as_its_crcs_go(storage: LocalStorage) -> None:
    make_external(storage)
    report = verify_in(storage, STEP)
    assert (report.problems, report.verdict, report.is_sound) == ((), "not_verified", False)
    assert report.state == "external"
    assert report.read_nbytes == report.nbytes
    assert 0 < report.unchecked_nbytes < report.nbytes / 100


def test_a_flipped_bit_in_external_data_is_found(storage: LocalStorage) -> None:
    """``large`` is one zip entry, larger than the buffer of a thread."""
    manifest = save(storage)
    storage.remove(f"{STEP}/milepost.json")
    storage.remove(f"{STEP}/milepost.digests")
    storage.remove(f"{STEP}/milepost.shards")
    for key in ("w", "large", "scalar"):
        for shard in manifest.tensors[key].shards:
            assert shard.data_offset is not None
            flip(data_file(storage, shard.file), shard.data_offset + shard.data_nbytes // 2)
            (problem,) = verify_in(storage, STEP).problems
            assert (problem.key, problem.file) == (key, shard.file)
            assert problem.byte_range == (shard.data_offset, shard.data_offset + shard.data_nbytes)
            flip(data_file(storage, shard.file), shard.data_offset + shard.data_nbytes // 2)


@pytest.mark.parametrize("level", ["sample", "full"])
def test_an_external_record_that_is_no_record_is_named(storage: LocalStorage, level: str) -> None:
    manifest = save(storage)
    storage.remove(f"{STEP}/milepost.json")
    storage.remove(f"{STEP}/milepost.digests")
    storage.remove(f"{STEP}/milepost.shards")
    (shard, _) = manifest.tensors["w"].shards
    flip(data_file(storage, shard.file), shard.record_offset + shard.record_nbytes - 20)
    (problem,) = verify_in(storage, STEP, level).problems  # type: ignore[arg-type]
    assert problem.key == "w"


def test_a_checkpoint_of_stock_dcp_is_verified(storage: LocalStorage) -> None:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    state = {
        "model": {"w": torch.randn(300, 40), "b": torch.zeros(3, dtype=torch.bfloat16)},
        "step": 7,
        "t": torch.tensor(1),
    }
    dcp.save(state, checkpoint_id=f"{storage.root}/{STEP}", no_dist=True)
    report = verify_in(storage, STEP)
    assert (report.problems, report.verdict) == ((), "not_verified")
    assert (report.state, report.num_items) == ("external", 4)
    manifest = locate_manifest(storage, STEP, checkpoint_record.read_manifest(storage, STEP))
    (shard,) = manifest.tensors["model.w"].shards
    assert shard.data_offset is not None
    flip(data_file(storage, shard.file), shard.data_offset + 1234)
    (problem,) = verify_in(storage, STEP).problems
    assert problem.key == "model.w"


# ---- missing checkpoints, marks, runs ----


def test_nothing_to_verify_is_an_error(storage: LocalStorage) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        verify(f"{storage.root}/nowhere")
    storage.make_folder(STEP)
    with pytest.raises(CheckpointNotFoundError, match="never committed"):
        verify_in(storage, STEP)
    with pytest.raises(ConfigError, match="metadata, sizes, sample, full"):
        verify_in(storage, STEP, "quick")  # type: ignore[arg-type]


def test_a_loaders_mark_counts_until_every_byte_is_found_sound(storage: LocalStorage) -> None:
    save(storage)
    catalog.mark_damaged(storage, STEP, "bytes 0 to 9 of 'w' changed", now=1.0)
    report = verify_in(storage, STEP, "sizes")
    assert [problem.message for problem in report.problems] == [
        "a loader found it damaged: bytes 0 to 9 of 'w' changed"
    ]
    report = verify_in(storage, STEP, "full")
    assert report.is_sound
    assert f"remove {storage.root}/run/.damaged-step-5.json" in report.notes[0]


def test_a_whole_run_is_verified_step_by_step(storage: LocalStorage) -> None:
    for step in (5, 10, 15):
        save(storage, f"run/step-{step}")
    storage.make_folder("run/step-20")
    flip(Path(storage.root, "run/step-10/__0_0.distcp"), 5000)
    seen: list[int] = []
    reports = verify_run(storage, "run", on_step=seen.append)  # type: ignore[arg-type]
    assert [(report.path.rpartition("/")[2], report.is_sound) for report in reports] == [
        ("step-5", True),
        ("step-10", False),
        ("step-15", True),
    ]
    assert seen == [5, 10, 15]


def test_a_run_without_a_committed_step_is_an_error(storage: LocalStorage) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no steps"):
        verify_run(storage, "run")
    storage.make_folder("run/step-20")
    with pytest.raises(CheckpointNotFoundError, match="never committed"):
        verify_run(storage, "run")


def test_a_step_that_goes_while_it_is_verified_is_no_damage(storage: LocalStorage) -> None:
    save(storage, "run/step-5")
    save(storage, "run/step-6")

    class Racing(WrappedStorage):
        def open_read(self, path: str) -> ReadHandle:
            if path.startswith("run/step-5/"):
                sweep.delete_checkpoint(self.inner, "run/step-5")
            return self.inner.open_read(path)

    reports: list[VerifyReport] = verify_run(Racing(storage), "run")
    assert [(report.path.rpartition("/")[2], report.is_sound) for report in reports] == [("step-6", True)]
