"""Locate shards' data in records written by other programs, without loading them or running code.

Stock DCP's ``.metadata`` holds the file and record of a shard, but not the offset of its data: that takes two to four
small reads of the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from milepost.collective.threads import map_in_threads
from milepost.errors import FormatError
from milepost.format.manifest import Manifest, ShardEntry
from milepost.format.record_reader import locate_tensor
from milepost.storage.base import ReadHandle, Storage, join
from milepost.storage.open_files import OpenFiles

NUM_THREADS = 8
"""Number of threads: small reads wait for the disk or the network, not for the processor."""

Shard = tuple[str, str, ShardEntry]
"""The key and the dtype of a tensor, and one of its shards."""


def locate_manifest(storage: Storage, folder: str, manifest: Manifest) -> Manifest:
    """Return ``manifest`` with the locations of all shards' data, see :func:`locate_shards`."""
    wanted = [(key, entry.dtype, shard) for key, entry in manifest.tensors.items() for shard in entry.shards]
    found = iter(locate_shards(storage, folder, wanted))
    tensors = {
        key: replace(entry, shards=tuple(next(found) for _ in entry.shards)) for key, entry in manifest.tensors.items()
    }
    return replace(manifest, tensors=tensors)


def locate_shards(storage: Storage, folder: str, shards: Sequence[Shard]) -> list[ShardEntry]:
    """Return the shards with the location of their data, and its CRC-32 if any, from the records' headers.

    A shard whose record is not a plain row-major tensor keeps ``data_offset`` None: it can only be loaded completely.

    Raises:
        FormatError: a record is malformed, or its dtype or shape does not match the commit record.
    """
    with OpenFiles(storage) as files:
        names = {shard.file for _, _, shard in shards if shard.data_offset is None}
        handles = {name: files.open(join(folder, name)) for name in sorted(names)}

        def located(one: Shard) -> ShardEntry:
            return one[2] if one[2].data_offset is not None else locate_shard(handles[one[2].file], *one)

        return map_in_threads(located, shards, NUM_THREADS, name="milepost-locate")


def locate_shard(handle: ReadHandle, key: str, dtype: str, shard: ShardEntry) -> ShardEntry:
    """Locate one shard in an open file, see :func:`locate_shards`."""
    start = shard.record_offset
    try:
        found = locate_tensor(lambda offset, nbytes: handle.read(start + offset, nbytes), shard.record_nbytes)
    except FormatError as error:
        message = f"{handle.path}: the record of '{key}' at byte {start}: {error.message}"
        raise FormatError(message, path=handle.path, key=key) from error
    if (found.dtype, found.sizes) != (dtype, shard.box.sizes):
        raise FormatError(
            f"{handle.path}: the record of '{key}' at byte {start}: expected {dtype} {list(shard.box.sizes)}from the "
            f"checkpoint's metadata, found {found.dtype} {list(found.sizes)}",
            path=handle.path,
            key=key,
        )
    if not found.is_plain:
        return shard
    return replace(shard, data_offset=start + found.data_offset, data_nbytes=found.data_nbytes, crc32=found.crc32)
