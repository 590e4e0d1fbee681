"""Folders that were forged: none of their code runs, no file outside is read, and no false size is believed."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from manifests import record_files
from small_checkpoint import DATA_FILES, blank, load_everything, state
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import (
    CheckpointDamagedError,
    DigestMismatchError,
    FormatError,
)
from milepost.format import manifest_json
from milepost.format.manifest import (
    METADATA_NAME,
    FileEntry,
    Manifest,
    ShardEntry,
)
from milepost.format.summary import totals_by_part
from milepost.run import catalog, checkpoint_record
from milepost.storage import LocalStorage
from milepost.verification.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")

# ---- code ----


class Evil:
    """Unpickling this without restriction creates a folder."""

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
    """Its header is valid, and its digests belong to another tensor."""
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
