"""Build a checkpoint folder's bytes in memory from arrays, without torch, storage or ranks, for format tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from milepost.format import record
from milepost.format.box import Box
from milepost.format.columns import table_of
from milepost.format.digest import block_crcs, combine_blocks, crc32
from milepost.format.manifest import (
    MANIFEST_NAME,
    SHARDS_NAME,
    FileEntry,
    Manifest,
    ObjectEntry,
    ShardEntry,
    TensorEntry,
)
from milepost.format.manifest_json import from_json, to_json
from milepost.format.shards_file import dump_shards


@dataclass(frozen=True, slots=True)
class StoredBox:
    """One shard to store: ``data`` are the row-major bytes of ``box``."""

    box: Box
    data: bytes
    file: str = "__0_0.distcp"


@dataclass(frozen=True, slots=True)
class Layout:
    """A manifest, the data files it describes, and the block CRCs of all shards in the manifest's order."""

    manifest: Manifest
    files: Mapping[str, bytes]
    crcs: Sequence[Sequence[int]]


def record_files(manifest: Manifest) -> dict[str, bytes]:
    """Return ``milepost.shards`` and ``milepost.json`` of a manifest, even of one that could not be committed."""
    shards = bytes(dump_shards(table_of(manifest), manifest.save_id))
    files = {**manifest.files, SHARDS_NAME: FileEntry(len(shards), crc32(shards))}
    return {SHARDS_NAME: shards, MANIFEST_NAME: to_json(replace(manifest, files=files))}


def read_back(files: Mapping[str, bytes]) -> Manifest:
    """Read ``milepost.json`` and ``milepost.shards`` back like a reader."""
    return from_json(files[MANIFEST_NAME], read_shards=lambda name, _: files[name])


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...], Sequence[StoredBox]]],
    objects: Mapping[str, object] | None = None,
    *,
    paths: Mapping[str, tuple[str | int, ...]] | None = None,
    save_id: str = "0123456789abcdef",
    step: int | None = 500,
) -> Layout:
    """Store ``{key: (dtype, shape, pieces)}`` and plain values as consecutive records in their files."""
    files: dict[str, bytearray] = {}
    crcs: list[Sequence[int]] = []
    entries = {
        key: _store(dtype, shape, pieces, files, crcs) for key, (dtype, shape, pieces) in sorted(tensors.items())
    }
    stored = {key: _store_object(value, files) for key, value in sorted((objects or {}).items())}
    manifest = Manifest(
        step=step,
        save_id=save_id,
        created_s=1_700_000_000.0,
        kind="full",
        world_size=1,
        layout={"dp_shard": 1},
        producer={"milepost": "0.1.0"},
        tensors=entries,
        objects=stored,
        files={name: FileEntry(len(content)) for name, content in files.items()},
        paths={key: (key,) for key in (*entries, *stored)} | dict(paths or {}),
    )
    return Layout(manifest, {name: bytes(content) for name, content in files.items()}, crcs)


def _store(
    dtype: str,
    shape: tuple[int, ...],
    pieces: Sequence[StoredBox],
    files: dict[str, bytearray],
    crcs: list[Sequence[int]],
) -> TensorEntry:
    shards = []
    for piece in pieces:
        layout = record.tensor_record(dtype, piece.box.sizes)
        crcs.append(block_crcs(piece.data))
        crc = combine_blocks(crcs[-1], len(piece.data))
        content = files.setdefault(piece.file, bytearray())
        start = len(content)
        content += layout.header + piece.data + record.record_footer(layout, crc)
        data_offset = start + layout.data_offset
        shards.append(ShardEntry(piece.box, piece.file, start, layout.nbytes, data_offset, layout.data_nbytes, crc))
    return TensorEntry(dtype, shape, tuple(shards))


def _store_object(value: object, files: dict[str, bytearray]) -> ObjectEntry:
    content = files.setdefault("__0_0.distcp", bytearray())
    start, stored = len(content), record.object_record(value)
    content += stored
    return ObjectEntry("__0_0.distcp", start, len(stored), crc32(stored))
