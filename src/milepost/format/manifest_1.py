"""``milepost.json`` of format 1, which lists every shard: still read, no longer written.

``docs/format.md`` specifies it.
"""

# No `from __future__ import annotations`: msgspec would have to compile the text of each annotation on first use.
import base64
import math
from typing import Annotated, Any

import msgspec

from milepost.errors import FormatError
from milepost.format.box import Box
from milepost.format.dtype import DTYPES
from milepost.format.file_rows import FileRow, file_entries
from milepost.format.manifest import Lineage, Manifest, ObjectEntry, ShardEntry, TensorEntry
from milepost.format.manifest_check import MAX_DIMS
from milepost.format.typed_json import Count, Metric, Seconds, typed

STRUCTURE = "structure"
"""Key in ``extra`` for the content of ``Manifest.structure``."""

Sizes = Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DIMS)]
PathRow = Annotated[tuple[str | int, ...], msgspec.Meta(min_length=1)]


class _ShardRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    file: Count
    record_offset: Count
    record_nbytes: Count
    data_offset: Count
    crc32: Count
    offsets: Sizes | None = None
    sizes: Sizes | None = None


class _TensorRow(msgspec.Struct, frozen=True):
    dtype: str
    shape: Sizes
    shards: list[_ShardRow]
    path: PathRow | None = None


class _ObjectRow(msgspec.Struct, frozen=True):
    record: tuple[Count, Count, Count, Count]
    path: PathRow | None = None


class _Document(msgspec.Struct, frozen=True):
    save_id: str
    created_s: Seconds
    kind: str
    world_size: Count
    layout: dict[str, Count]
    producer: dict[str, str]
    files: list[FileRow]
    tensors: dict[str, _TensorRow]
    objects: dict[str, _ObjectRow]
    extra: dict[str, Any]
    step: Count | None = None
    lineage: Lineage | None = None
    metrics: dict[str, Metric | None] = {}


def manifest_of_format_1(document: object, path: str) -> Manifest:
    """Convert a parsed document to a manifest, with types checked; the caller calls ``manifest_faults``."""
    said = typed(document, _Document, path)
    files = file_entries(said.files, path)
    names = list(files)
    rows: dict[str, _TensorRow | _ObjectRow] = {**said.tensors, **said.objects}
    return Manifest(
        step=said.step,
        save_id=said.save_id,
        created_s=said.created_s,
        kind=said.kind,
        world_size=said.world_size,
        layout=said.layout,
        producer=said.producer,
        tensors={key: _tensor(key, row, names, path) for key, row in said.tensors.items()},
        objects={key: _object(key, row, names, path) for key, row in said.objects.items()},
        files=files,
        paths={key: row.path for key, row in rows.items() if row.path is not None},
        structure=_structure(said.extra.get(STRUCTURE), path),
        extra={name: value for name, value in said.extra.items() if name != STRUCTURE},
        lineage=said.lineage,
        metrics={name: math.nan if value is None else value for name, value in said.metrics.items()},
    )


def _structure(text: object, path: str) -> bytes:
    """Return the structure that format 1 keeps in ``extra``, as text; empty if there is none."""
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError as error:
        raise FormatError(f"{path}: its structure is malformed: {error}", path=path) from error


def _tensor(key: str, row: _TensorRow, names: list[str], path: str) -> TensorEntry:
    whole = Box.whole(row.shape)
    nbytes = DTYPES[row.dtype].itemsize if row.dtype in DTYPES else 0  # manifest_faults reports an unknown one
    return TensorEntry(row.dtype, row.shape, tuple(_shard(key, one, names, whole, nbytes, path) for one in row.shards))


def _shard(key: str, row: _ShardRow, names: list[str], whole: Box, element_nbytes: int, path: str) -> ShardEntry:
    if (row.offsets is None) != (row.sizes is None):
        raise FormatError(f"{path}: a shard of {key!r} has offsets but no sizes", path=path, key=key)
    box = whole if row.offsets is None or row.sizes is None else Box(row.offsets, row.sizes)
    name = _file_name(names, row.file, key, path)
    data_nbytes = box.numel * element_nbytes
    return ShardEntry(box, name, row.record_offset, row.record_nbytes, row.data_offset, data_nbytes, row.crc32)


def _object(key: str, row: _ObjectRow, names: list[str], path: str) -> ObjectEntry:
    file, offset, nbytes, crc = row.record
    return ObjectEntry(_file_name(names, file, key, path), offset, nbytes, crc)


def _file_name(names: list[str], number: int, key: str, path: str) -> str:
    if number >= len(names):
        raise FormatError(f"{path}: {key!r} is recorded in file number {number} of {len(names)}", path=path, key=key)
    return names[number]
