"""Reading the values of a checkpoint that are not tensors, without torch: step, losses, learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from milepost.collective.threads import map_in_threads
from milepost.errors import FormatError, StorageError
from milepost.format.digest import crc32
from milepost.format.manifest import Manifest, ObjectEntry
from milepost.format.record_reader import read_object
from milepost.storage.base import Storage, join

MAX_VALUE_NBYTES = 1 << 20
"""Larger records are not read: they hold no values for people."""
NUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The placeholder for a value that can't be read, with the reason."""

    reason: str


def read_values(
    storage: Storage,
    folder: str,
    manifest: Manifest,
    keys: Iterable[str],
    *,
    max_nbytes: int = MAX_VALUE_NBYTES,
) -> dict[str, object]:
    """The values of ``keys``, checked against their digests. One that can't be read becomes an :class:`Unreadable`."""
    wanted = list(keys)

    def read(key: str) -> object:
        return _read(storage, folder, manifest.objects[key], max_nbytes)

    # Concurrent, since an object store has a long latency and an optimizer hundreds of values.
    found = map_in_threads(read, wanted, NUM_THREADS, name="milepost-values")
    return dict(zip(wanted, found, strict=True))


def _read(storage: Storage, folder: str, entry: ObjectEntry, max_nbytes: int) -> object:
    if entry.record_nbytes > max_nbytes:
        return Unreadable("too large to show")
    data = bytearray(entry.record_nbytes)
    try:
        with storage.open_read(join(folder, entry.file)) as handle:
            handle.read_into(entry.record_offset, [memoryview(data)])
        if entry.crc32 is not None and crc32(data) != entry.crc32:
            return Unreadable("digest mismatch")
        return read_object(bytes(data))
    except (FormatError, StorageError) as error:
        return Unreadable(error.message)
