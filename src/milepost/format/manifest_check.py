"""The checks that every manifest must pass, whether to be written, read, or built from ``.metadata``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice, pairwise

from milepost.errors import MAX_LISTED, Problem
from milepost.format.box import cover_faults
from milepost.format.dtype import DTYPES
from milepost.format.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    METADATA_NAME,
    SHARDS_NAME,
    FileEntry,
    Manifest,
    ObjectEntry,
    ShardEntry,
    TensorEntry,
)
from milepost.format.tags import untagged
from milepost.format.typed_json import MAX_COUNT

MAX_DIMS = 64
MAX_CRC32 = 0xFFFFFFFF
KINDS = ("full", "model", "state")
_MAX_NAME_NBYTES = 255
_CONTENT = re.compile(r"[0-9a-f]{32}")
RESERVED = (MANIFEST_NAME, METADATA_NAME, SHARDS_NAME, DIGESTS_NAME)
"""Files that hold no data."""


def manifest_faults(manifest: Manifest) -> list[Problem]:
    """Return the first faults that would mislead a reader of ``manifest``; empty if there are none.

    Checks names of files (plain, no folders), dtypes, numbers, that each record is inside its file and its data inside
    the record, that no two records share a byte, and that the shards cover each tensor exactly once.
    """
    return list(islice(_faults(manifest), MAX_LISTED))


def head_faults(manifest: Manifest) -> list[Problem]:
    """Return the faults outside tensors and objects, see :func:`manifest_faults`."""
    return list(islice(_head_faults(manifest), MAX_LISTED))


def is_plain_name(name: str) -> bool:
    """Return whether a checkpoint's file may have this name: printable, and directly in the folder."""
    if name in ("", ".", "..") or len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_NBYTES:
        return False
    return name.isprintable() and not set(name) & set("/\\")


def _head_faults(manifest: Manifest) -> Iterator[Problem]:
    yield from _header_faults(manifest)
    for name, file in manifest.files.items():
        yield from _file_faults(name, file)


def _faults(manifest: Manifest) -> Iterator[Problem]:
    yield from _head_faults(manifest)
    for key, tensor in manifest.tensors.items():
        yield from _tensor_faults(key, tensor, manifest)
    for key, entry in manifest.objects.items():
        if key in manifest.tensors:
            yield Problem(f"{key!r} is both a tensor and an object", key=key)
        yield from _place_faults(key, entry, manifest)
    for key in manifest.paths:
        if key not in manifest.tensors and key not in manifest.objects:
            yield Problem(f"a path is recorded for {key!r}, which is not stored", key=key)
    yield from _overlap_faults(manifest)


def _header_faults(manifest: Manifest) -> Iterator[Problem]:
    if manifest.kind not in KINDS:
        yield Problem(f"kind is {manifest.kind!r:.50}, not one of {', '.join(KINDS)}")
    if not 1 <= manifest.world_size <= MAX_COUNT:
        yield Problem(f"world_size is {manifest.world_size}")
    if manifest.step is not None and not 0 <= manifest.step <= MAX_COUNT:
        yield Problem(f"step is {manifest.step}")
    if not math.isfinite(manifest.created_s):
        yield Problem(f"created_s is {manifest.created_s}")


def _file_faults(name: str, file: FileEntry) -> Iterator[Problem]:
    if not is_plain_name(name):
        yield Problem(f"file name {name!r:.200} is not a plain name inside the checkpoint's folder")
    if name == MANIFEST_NAME:
        yield Problem(f"{MANIFEST_NAME} lists itself")
    if not 0 <= file.nbytes <= MAX_COUNT:
        yield Problem(f"file {name!r} is recorded with {file.nbytes} bytes")
    if file.crc32 is not None and not 0 <= file.crc32 <= MAX_CRC32:
        yield Problem(f"file {name!r} has an invalid CRC-32")
    if file.content and not _CONTENT.fullmatch(file.content):
        yield Problem(f"file {name!r} has an invalid content id")


def _tensor_faults(key: str, tensor: TensorEntry, manifest: Manifest) -> Iterator[Problem]:
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        yield Problem(f"{key!r} has dtype {tensor.dtype!r:.50}, which is unknown", key=key)
        return
    possible = len(tensor.shape) <= MAX_DIMS and min(tensor.shape, default=0) >= 0
    if not possible or math.prod(tensor.shape) * dtype.itemsize > MAX_COUNT:
        yield Problem(f"{key!r} has invalid shape {list(tensor.shape)!r:.200}", key=key)
        return
    for fault in cover_faults(tensor.shape, [shard.box for shard in tensor.shards]):
        yield Problem(f"{key!r}: {fault}", key=key)
    for shard in tensor.shards:
        yield from _place_faults(key, shard, manifest)
        yield from _data_faults(key, shard, dtype.itemsize)


def _place_faults(key: str, entry: ShardEntry | ObjectEntry, manifest: Manifest) -> Iterator[Problem]:
    file = manifest.files.get(entry.file)
    start, nbytes = entry.record_offset, entry.record_nbytes
    if file is None or untagged(entry.file) in RESERVED:
        what = f"{key!r} is recorded in {entry.file!r:.200}, which is not a data file of this checkpoint"
        yield Problem(what, key=key)
    elif start < 0 or nbytes <= 0 or start + nbytes > file.nbytes:
        where = f"bytes {start} to {start + nbytes} of {entry.file!r}"
        yield Problem(f"{key!r} is recorded in {where}, which has {file.nbytes} bytes", key=key)
    if entry.crc32 is not None and not 0 <= entry.crc32 <= MAX_CRC32:
        yield Problem(f"{key!r} has an invalid CRC-32", key=key)


def _data_faults(key: str, shard: ShardEntry, element_nbytes: int) -> Iterator[Problem]:
    wanted = shard.box.numel * element_nbytes
    if shard.data_nbytes != wanted:
        yield Problem(f"shard {shard.box} of {key!r} has {shard.data_nbytes} bytes of data, expected {wanted}", key=key)
    first = shard.record_offset if shard.data_offset is None else shard.data_offset
    if first < shard.record_offset or first + wanted > shard.record_offset + shard.record_nbytes:
        yield Problem(f"the data of shard {shard.box} of {key!r} is not inside its record", key=key)


def _overlap_faults(manifest: Manifest) -> Iterator[Problem]:
    places = [
        (shard.file, shard.record_offset, shard.record_nbytes, key)
        for key, tensor in manifest.tensors.items()
        for shard in tensor.shards
    ]
    places += [(e.file, e.record_offset, e.record_nbytes, key) for key, e in manifest.objects.items()]
    places.sort()
    for (file, start, nbytes, key), (next_file, next_start, _, next_key) in pairwise(places):
        if file == next_file and start + nbytes > next_start:
            what = f"the records of {key!r} and {next_key!r} overlap in {file!r} at byte {next_start}"
            yield Problem(what, key=next_key)
