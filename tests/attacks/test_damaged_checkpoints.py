"""Folders that were damaged: no damaged byte is ever loaded or overlooked.

Forged ones are in ``test_forged_checkpoints.py``; the parsers alone are attacked in ``test_hostile_formats.py``.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_checkpoint import DATA_FILES, blank, load_everything, state

import milepost
from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    DigestMismatchError,
    StorageError,
)
from milepost.format.box import Box
from milepost.format.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    METADATA_NAME,
    SHARDS_NAME,
)
from milepost.loading.reader import read_tensors
from milepost.run import catalog, checkpoint_record
from milepost.storage import LocalStorage
from milepost.tensors.layout import Piece, TensorLeaf
from milepost.tensors.read_plan import plan_load
from milepost.testing.world import run_world
from milepost.verification.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")


def check_found(step: Path, what: str) -> tuple[bool, bool]:
    """Damage must be found by ``verify``, and by a load of everything unless no load reads the place."""
    error = load_everything(step)
    try:
        report = verify(step)
    except CheckpointNotFoundError:
        return error is not None, True
    assert not report.is_sound, f"{what}: verify found nothing"
    return error is not None, any(problem.key for problem in report.problems)


def places(step: Path) -> Iterator[tuple[int, int, str, str | None]]:
    """Every stretch of the data files: start, stop, file, and the key whose record it is (None for padding)."""
    manifest = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name)
    records = [(s.file, s.record_offset, s.record_nbytes, key) for key, t in manifest.tensors.items() for s in t.shards]
    records += [(e.file, e.record_offset, e.record_nbytes, key) for key, e in manifest.objects.items()]
    for file in DATA_FILES:
        position = 0
        for _, start, nbytes, key in sorted(record for record in records if record[0] == file):
            if start > position:
                yield position, start, file, None
            yield start, start + nbytes, file, key
            position = start + nbytes
        if position < manifest.files[file].nbytes:
            yield position, manifest.files[file].nbytes, file, None


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


# ---- bits ----


def test_bit_flips_in_records_are_found_by_load_and_verify_and_named(intact: Path, step: Path) -> None:
    """In headers, data, footers and objects: at each end of every record, and in between."""
    rng = random.Random(5)
    count = 0
    for start, stop, file, key in places(intact):
        if key is None or key == "empty":
            continue
        for offset in (start, stop - 1, *[rng.randrange(start, stop) for _ in range(6)]):
            flip(step / file, offset, rng.randrange(8))
            error = load_everything(step)
            assert error is not None, (key, offset)
            assert error.key == key
            assert f"'{key}'" in error.message
            assert file in error.message
            report = verify(step)
            assert {problem.key for problem in report.problems} == {key}, (offset, report.problems)
            low, high = report.problems[0].byte_range or (0, 0)
            assert low <= offset < high
            assert report.problems[0].file == file
            if isinstance(error, DigestMismatchError):
                assert error.byte_range[0] <= offset < error.byte_range[1]
            shutil.copyfile(intact / file, step / file)
            count += 1
    assert count > 90


def test_bit_flips_where_no_load_looks_are_found_by_verify(intact: Path, step: Path) -> None:
    """Padding between records, a tensor without elements, DCP's own index."""
    rng = random.Random(6)
    stretches = [(start, stop, file) for start, stop, file, key in places(intact) if key is None or key == "empty"]
    stretches.append((0, (intact / METADATA_NAME).stat().st_size, METADATA_NAME))
    assert len(stretches) > 4
    for start, stop, file in stretches:
        for _ in range(4):
            flip(step / file, rng.randrange(start, stop), rng.randrange(8))
            found_by_load, _ = check_found(step, file)
            assert not found_by_load
            shutil.copyfile(intact / file, step / file)


@pytest.mark.parametrize("file", [MANIFEST_NAME, SHARDS_NAME, DIGESTS_NAME])
def test_bit_flips_in_the_commit_record_are_found(intact: Path, step: Path, file: str) -> None:
    rng = random.Random(7)
    size = (intact / file).stat().st_size
    for offset in (0, 1, size - 2, size - 1, *[rng.randrange(size) for _ in range(60)]):
        flip(step / file, offset, rng.randrange(8))
        found_by_load, _ = check_found(step, f"{file} at {offset}")
        assert found_by_load, offset
        shutil.copyfile(intact / file, step / file)


def test_runs_of_garbage_are_found(intact: Path, step: Path) -> None:
    """A lost disk block, a page of zeros, a stretch of another file."""
    rng = random.Random(8)
    for file in DATA_FILES:
        size = (intact / file).stat().st_size
        for kind in range(12):
            start = rng.randrange(size - 600)
            nbytes = rng.choice((64, 512))
            garbage = (bytes(nbytes), rng.randbytes(nbytes), (intact / MANIFEST_NAME).read_bytes()[:nbytes])[kind % 3]
            data = bytearray((intact / file).read_bytes())
            if data[start : start + nbytes] == garbage:
                continue
            data[start : start + nbytes] = garbage
            (step / file).write_bytes(data)
            check_found(step, f"{file} from {start}")
            shutil.copyfile(intact / file, step / file)


# ---- files ----


@pytest.mark.parametrize("file", [*DATA_FILES, METADATA_NAME, SHARDS_NAME, DIGESTS_NAME, MANIFEST_NAME])
def test_truncated_and_grown_files_are_found_before_a_byte_is_loaded(intact: Path, step: Path, file: str) -> None:
    rng = random.Random(9)
    data = (intact / file).read_bytes()
    for cut in (0, 1, len(data) // 2, len(data) - 1, rng.randrange(len(data)), len(data) + 1):
        (step / file).write_bytes((data + b"\0")[:cut])
        error = load_everything(step)
        assert isinstance(error, CheckpointDamagedError), cut
        assert file in error.message
        if file != MANIFEST_NAME:
            assert f"{file}: expected {len(data)} bytes, found {cut}" in error.message
        info = catalog.examine(LocalStorage(step.parent), step.name)
        assert info is not None
        assert info.state == "damaged"
        assert not verify(step, "sizes").is_sound


@pytest.mark.parametrize("file", [*DATA_FILES, METADATA_NAME, SHARDS_NAME, DIGESTS_NAME])
def test_missing_files_are_found(step: Path, file: str) -> None:
    (step / file).unlink()
    error = load_everything(step)
    assert isinstance(error, CheckpointDamagedError)
    assert f"{file}: missing" in error.message


def test_without_its_commit_record_it_is_external_and_still_checked(intact: Path, step: Path) -> None:
    """The rest is a folder as stock DCP would have written it, with the CRC-32s of its records."""
    (step / MANIFEST_NAME).unlink()
    (step / DIGESTS_NAME).unlink()
    (step / SHARDS_NAME).unlink()
    assert load_everything(step) is None
    for start, stop, file, key in places(intact):
        manifest = checkpoint_record.read_manifest(LocalStorage(intact.parent), intact.name)
        if key in manifest.tensors and key != "empty":
            (shard,) = manifest.tensors[key].shards
            flip(step / file, (shard.data_offset or 0) + shard.data_nbytes // 2, 3)
            error = load_everything(step)
            assert isinstance(error, DigestMismatchError), key
            assert error.key == key
            shutil.copyfile(intact / file, step / file)
        elif key in manifest.objects:
            flip(step / file, (start + stop) // 2, 3)
            found = load_everything(step)
            assert found is None or found.key == key
            shutil.copyfile(intact / file, step / file)


@pytest.mark.parametrize("file", [*DATA_FILES, SHARDS_NAME, DIGESTS_NAME, METADATA_NAME])
def test_files_of_another_save_are_found(step: Path, memory_path: Path, file: str) -> None:
    """Of the same structure and size, as a backup that was restored in part would leave them."""
    run_world(save_other_values, 2, memory_path / "step-6", timeout_s=60)
    assert (memory_path / "step-6" / file).stat().st_size == (step / file).stat().st_size
    shutil.copyfile(memory_path / "step-6" / file, step / file)
    found_by_load, _ = check_found(step, file)
    assert found_by_load or file == METADATA_NAME


def save_other_values(path: Path) -> None:
    other = {key: value + 1 if isinstance(value, torch.Tensor) else value for key, value in state().items()}
    milepost.save(path, {**other, "loop": {**other["loop"], "step": 8}})


@pytest.mark.parametrize("file", [*DATA_FILES, METADATA_NAME, SHARDS_NAME, DIGESTS_NAME, MANIFEST_NAME])
def test_links_are_not_followed(step: Path, memory_path: Path, file: str) -> None:
    (step / file).rename(memory_path / "elsewhere")
    (step / file).symlink_to(memory_path / "elsewhere")
    into = blank()
    with pytest.raises((CheckpointDamagedError, StorageError), match="link"):
        milepost.load(step, into)
    assert not into["w0"].any()
    assert catalog.scan(LocalStorage(step.parent.parent), step.parent.name)[0].state == "damaged"


@pytest.mark.parametrize("file", [*DATA_FILES, METADATA_NAME, SHARDS_NAME, DIGESTS_NAME, MANIFEST_NAME])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_anything_but_a_file_is_refused_and_not_waited_for(step: Path, file: str, make: Callable[[Path], None]) -> None:
    (step / file).unlink()
    make(step / file)
    with pytest.raises((CheckpointDamagedError, StorageError)):
        milepost.load(step, blank())
    assert catalog.scan(LocalStorage(step.parent.parent), step.parent.name)[0].state == "damaged"


# ---- partial reads ----


def test_partial_reads_check_every_block_they_touch(memory_path: Path) -> None:
    """Damage in a block is detected by a read of that block, and only then; ``verify`` always detects it."""
    rows, row_nbytes = 3000, 4096
    step = memory_path / "step-1"
    milepost.save(step, {"w": torch.arange(rows * 1024.0).reshape(rows, 1024)})
    shard = checkpoint_record.read_manifest(LocalStorage(memory_path), "step-1").tensors["w"].shards[0]
    flip(step / shard.file, (shard.data_offset or 0) + 1500 * row_nbytes, 0)  # in the second of three blocks

    storage = LocalStorage(memory_path)
    manifest = checkpoint_record.read_manifest(storage, "step-1")
    digests = checkpoint_record.read_digests(storage, "step-1", manifest)

    def read(first: int, stop: int, columns: tuple[int, int] = (0, 1024)) -> torch.Tensor:
        box = Box((first, columns[0]), (stop - first, columns[1] - columns[0]))
        piece = Piece(box, Box.whole(box.sizes))
        leaf = TensorLeaf("w", torch.float32, (rows, 1024), (piece,), torch.zeros(box.sizes))
        read_tensors(storage, "step-1", plan_load(manifest, [leaf.spec]), {"w": leaf}, digests)
        return leaf.local

    whole = torch.arange(rows * 1024.0).reshape(rows, 1024)
    assert torch.equal(read(0, 1024), whole[:1024])
    assert torch.equal(read(2048, 3000), whole[2048:])
    assert torch.equal(read(0, 1000, (5, 17)), whole[:1000, 5:17])
    for wanted in ((1024, 1030), (1000, 1025), (2047, 2048), (0, 3000)):  # not the damaged row itself, but its block
        with pytest.raises(DigestMismatchError, match="digest mismatch in 'w'") as caught:
            read(*wanted)
        low, high = caught.value.byte_range
        assert (low - (shard.data_offset or 0), high - low) == (1024 * row_nbytes, 4 << 20)
    with pytest.raises(DigestMismatchError):
        read(2000, 2020, (5, 17))
    assert not verify(step).is_sound
