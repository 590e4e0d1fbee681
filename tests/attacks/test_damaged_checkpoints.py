"""Whole folders that were damaged or forged: nothing wrong is ever loaded, run, followed or overlooked.

The parsers alone are attacked in ``test_hostile_formats.py``.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    DigestMismatchError,
    FormatError,
    MilepostError,
    StorageError,
)
from milepost.format import manifest_json
from milepost.format.box import Box
from milepost.format.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    METADATA_NAME,
    SHARDS_NAME,
    FileEntry,
    Manifest,
    ShardEntry,
)
from milepost.format.summary import totals_by_part
from milepost.loading.reader import read_tensors
from milepost.run import catalog, checkpoint_record
from milepost.storage import LocalStorage
from milepost.tensors.layout import Piece, TensorLeaf
from milepost.tensors.read_plan import plan_load
from milepost.testing.manifests import record_files
from milepost.testing.world import run_world
from milepost.verification.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")

DATA_FILES = ("__0_0.distcp", "__1_0.distcp")


def state() -> dict[str, Any]:
    """The same on every rank, so that both write a part of it."""
    generator = torch.Generator().manual_seed(1)
    return {
        **{f"w{n}": torch.rand(20 + n, 7, generator=generator) for n in range(6)},
        "half": torch.rand(33, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "loop": {"step": 7, "text": "ünï", "list": [1, 2.5, None], "raw": bytes(range(40))},
    }


def blank() -> dict[str, Any]:
    into = {key: torch.zeros_like(value) for key, value in state().items() if isinstance(value, torch.Tensor)}
    return {**into, "loop": dict.fromkeys(state()["loop"])}


def is_sound(found: dict[str, Any]) -> bool:
    expected = state()
    tensors = [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
    return found["loop"] == expected["loop"] and all(torch.equal(found[key], expected[key]) for key in tensors)


def save_state(path: Path) -> None:
    milepost.save(path, state())


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "step-5"
    run_world(save_state, 2, path, timeout_s=60)
    assert sorted(entry.name for entry in path.iterdir()) == sorted(
        [METADATA_NAME, *DATA_FILES, SHARDS_NAME, DIGESTS_NAME, MANIFEST_NAME]
    )
    return path


@pytest.fixture
def step(intact: Path, memory_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(intact, memory_path / "step-5"))


def load_everything(step: Path) -> MilepostError | None:
    """The error of loading all of it; None if there is none, and then every value must be right."""
    into = blank()
    try:
        milepost.load(step, into)
    except (CheckpointDamagedError, CheckpointNotFoundError) as error:
        return error
    assert is_sound(into), "something wrong was loaded"
    return None


def check_found(step: Path, what: str) -> tuple[bool, bool]:
    """Damage must be found by ``verify``, and by a load of everything unless it lies where a load has no business."""
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


# ---- code ----


class Evil:
    """A pickle of this makes a file when it is loaded carelessly."""

    def __init__(self, proof: Path):
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._proof),)


@pytest.fixture
def external(memory_path: Path) -> Path:
    """A checkpoint of stock DCP."""
    step = memory_path / "step-5"
    dcp.save(state(), checkpoint_id=step)
    return step


def readers(step: Path) -> dict[str, Callable[[], object]]:
    """Every way to read a folder."""
    model = torch.nn.Linear(7, 20)
    config = CheckpointConfig(enable=True, initial_load_path=str(step))

    def start_a_run() -> None:
        CheckpointManager(step.parent / "run", config, model=model).load()

    return {
        "load": lambda: milepost.load(step, blank()),
        "plugin": lambda: dcp.load(blank(), storage_reader=milepost.StorageReader(step)),
        "manager": start_a_run,
    }


def test_metadata_that_runs_code_is_refused_by_every_reader(external: Path, memory_path: Path) -> None:
    proof = memory_path / "proof"
    honest = pickle.loads((external / METADATA_NAME).read_bytes())
    for where in ("planner_data", "storage_data", "state_dict_metadata"):
        forged = dataclasses.replace(honest, **{where: {**getattr(honest, where), "evil": Evil(proof)}})
        (external / METADATA_NAME).write_bytes(pickle.dumps(forged))
        for name, read in readers(external).items():
            with pytest.raises((FormatError, dcp.api.CheckpointException), match=r"mkdir"):
                read()
            assert not proof.exists(), name
        info = catalog.examine(LocalStorage(memory_path), "step-5")
        assert info is not None
        assert info.state == "damaged"
        assert not verify(external).is_sound
    (external / METADATA_NAME).write_bytes(pickle.dumps(Evil(proof)))
    assert catalog.scan(LocalStorage(memory_path.parent), memory_path.name)[0].state == "damaged"
    assert not proof.exists()
    pickle.loads((external / METADATA_NAME).read_bytes())
    assert proof.exists(), "the attack itself must work, or it proves nothing"


@pytest.mark.parametrize("key", ["loop.text", "w0"])
def test_records_that_run_code_are_refused_by_every_reader(external: Path, memory_path: Path, key: str) -> None:
    """An object, or a tensor whose place holds another pickle."""
    proof = memory_path / "proof"
    honest = pickle.loads((external / METADATA_NAME).read_bytes())
    (index,) = [index for index in honest.storage_data if index.fqn == key]
    torch.save(Evil(proof), external / "__9_0.distcp")
    size = (external / "__9_0.distcp").stat().st_size
    honest.storage_data[index] = _StorageInfo("__9_0.distcp", 0, size)
    (external / METADATA_NAME).write_bytes(pickle.dumps(honest))
    for name in ("load", "plugin"):
        with pytest.raises((FormatError, dcp.api.CheckpointException), match=key):
            readers(external)[name]()
        assert not proof.exists(), name
    torch.load(external / "__9_0.distcp", weights_only=False)
    assert proof.exists()


# ---- forged places ----


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/../../secret", "a\\b", "..", "", "\0", "x" * 300, "\n"]
)
def test_file_names_that_leave_the_folder_are_refused(
    intact: Path, step: Path, external_copy: Path, memory_path: Path, name: str
) -> None:
    shutil.copyfile(intact / DATA_FILES[0], memory_path / "secret")

    def renamed(manifest: Manifest) -> Manifest:
        def of(file: str) -> str:
            return name if file == DATA_FILES[0] else file

        return dataclasses.replace(
            manifest,
            tensors={
                key: dataclasses.replace(t, shards=tuple(dataclasses.replace(s, file=of(s.file)) for s in t.shards))
                for key, t in manifest.tensors.items()
            },
            objects={key: dataclasses.replace(e, file=of(e.file)) for key, e in manifest.objects.items()},
            files={of(file): entry for file, entry in manifest.files.items()},
        )

    forge(step, renamed)
    refused(step, "damaged")

    metadata = pickle.loads((external_copy / METADATA_NAME).read_bytes())
    index = MetadataIndex("w0", torch.Size([0, 0]), 0)
    place = metadata.storage_data[index]
    metadata.storage_data[index] = _StorageInfo(name, place.offset, place.length)
    (external_copy / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    refused(external_copy, "damaged")


@pytest.fixture
def external_copy(memory_path: Path) -> Path:
    dcp.save(state(), checkpoint_id=memory_path / "step-6")
    return memory_path / "step-6"


def forge(step: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Write a commit record that no honest writer would, with right CRCs."""
    honest = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name)
    manifest = dataclasses.replace(change(honest), parts=tuple(totals_by_part(honest)))
    with mock.patch.object(manifest_json, "head_faults", return_value=[]):
        for name, content in record_files(manifest).items():
            (step / name).write_bytes(content)


def refused(step: Path, state: str = "committed") -> str:
    """Refused by load and verify, before any data is read; the message. A scan (of heads) says ``state``."""
    into = blank()
    with pytest.raises(FormatError) as caught:
        milepost.load(step, into)
    assert not into["w1"].any()
    info = catalog.examine(LocalStorage(step.parent), step.name)
    assert info is not None
    assert info.state == state
    assert not verify(step).is_sound
    return caught.value.message


def with_shard(key: str, **changes: Any) -> Callable[[Manifest], Manifest]:
    """A manifest in which the only shard of a tensor has other fields."""

    def change(manifest: Manifest) -> Manifest:
        (shard,) = manifest.tensors[key].shards
        forged = dataclasses.replace(manifest.tensors[key], shards=(dataclasses.replace(shard, **changes),))
        return dataclasses.replace(manifest, tensors={**manifest.tensors, key: forged})

    return change


def shard_of(step: Path, key: str) -> ShardEntry:
    return checkpoint_record.read_manifest(LocalStorage(step.parent), step.name).tensors[key].shards[0]


def test_overlapping_records_are_refused(step: Path) -> None:
    """Two tensors that claim the same bytes."""
    mine = shard_of(step, "w0")
    other = next(s for s in (shard_of(step, f"w{n}") for n in range(1, 6)) if s.file == mine.file)
    assert mine.data_offset is not None
    shift = other.record_offset + 64 - mine.record_offset
    forge(step, with_shard("w0", record_offset=mine.record_offset + shift, data_offset=mine.data_offset + shift))
    assert "overlap in '" in refused(step)


@pytest.mark.parametrize("where", [-1, 1 << 40, (1 << 63) - 1])
def test_places_outside_of_the_file_are_refused(step: Path, where: int) -> None:
    mine = shard_of(step, "w0")
    assert mine.data_offset is not None
    head = mine.data_offset - mine.record_offset
    forge(step, with_shard("w0", record_offset=where, data_offset=where + head))
    assert "w0" in refused(step)


def test_absurd_shapes_are_refused(step: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        huge = dataclasses.replace(manifest.tensors["w0"], shape=(1 << 40, 1 << 40))
        return dataclasses.replace(manifest, tensors={**manifest.tensors, "w0": huge})

    forge(step, change)
    assert "w0" in refused(step)


def test_place_of_another_tensor_is_refused(step: Path) -> None:
    """Its header says what it is, and its digests are others."""
    theirs = shard_of(step, "half")
    scalar = shard_of(step, "scalar")
    assert theirs.data_offset is not None

    def change(manifest: Manifest) -> Manifest:
        tensors = dict(manifest.tensors)
        tensors["scalar"] = dataclasses.replace(
            tensors["scalar"],
            shards=(
                dataclasses.replace(
                    scalar, file=theirs.file, record_offset=theirs.record_offset, data_offset=theirs.data_offset
                ),
            ),
        )
        del tensors["half"]
        return dataclasses.replace(
            manifest, tensors=tensors, paths={k: p for k, p in manifest.paths.items() if k != "half"}
        )

    forge(step, change)
    with pytest.raises((FormatError, DigestMismatchError)):
        milepost.load(step, {"scalar": torch.zeros(())}, allow_unexpected=["*"])


def test_manifest_that_claims_files_it_does_not_describe(step: Path) -> None:
    forge(step, lambda m: dataclasses.replace(m, files={**m.files, "__7_0.distcp": FileEntry(10)}))
    error = load_everything(step)
    assert isinstance(error, CheckpointDamagedError)
    assert "__7_0.distcp: missing" in error.message
