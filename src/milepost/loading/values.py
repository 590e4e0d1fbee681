"""The values of a checkpoint that are not tensors: records that rank 0 reads for all, or that a rank reads itself.

Options and scalars are the same for all ranks, and all need them. Values of one rank (random generators, the position
of a data loader) and large values are read by the rank that needs them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from milepost.errors import FormatError
from milepost.format.manifest import Manifest, ObjectEntry
from milepost.storage.base import ReadHandle, Storage, join
from milepost.tensors.value_reader import decode_object
from milepost.verification.block_reader import BlockReader

MERGE_GAP_NBYTES = 64 << 10
MERGE_NBYTES = 8 << 20
"""Records with smaller gaps than the first are read at once, up to the second in total."""
MAX_COMMON_NBYTES = 256 << 10
MAX_ALL_COMMON_NBYTES = 32 << 20
"""Records up to the first size are read by rank 0 for all, up to the second in total."""
_OF_ONE_RANK = re.compile(r"(^|\.)rank\d+(\.|$)")


def read_objects(
    storage: Storage, folder: str, manifest: Manifest, keys: Iterable[str], common: Mapping[str, bytes] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield the values of ``keys`` that are not tensors. Adjacent records are read at once.

    ``common`` are records that are read already, by location; see :func:`read_common`.

    Raises:
        DigestMismatchError: a record changed after it was written.
        FormatError: a record is malformed, or would run code.
    """
    common = {} if common is None else common
    left = []
    for key in keys:
        entry = manifest.objects[key]
        known = common.get(place_of(entry))
        if known is None:
            left.append(key)
        else:  # a copy, since decoded values may share its memory
            yield key, decode_object(key, bytearray(known), f"{storage.root}/{join(folder, entry.file)}")
    for handle, names, entry, raw in _records(storage, folder, manifest, left):
        _check(handle, names[0], entry, raw)
        for key in names:
            yield key, decode_object(key, raw, handle.path)


def place_of(entry: ObjectEntry) -> str:
    """The location of a record, independent of its key."""
    return f"{entry.file}:{entry.record_offset}"


def read_common(storage: Storage, folder: str, manifest: Manifest) -> dict[str, bytes]:
    """Read and check the records that all ranks are likely to need, by location. Damaged ones are left out.

    Raises:
        StorageError: a file can't be read.
    """
    room = MAX_ALL_COMMON_NBYTES
    keys = []
    for key, entry in manifest.objects.items():
        fits = entry.record_nbytes <= min(room, MAX_COMMON_NBYTES)
        if fits and entry.crc32 is not None and not _OF_ONE_RANK.search(key):
            keys.append(key)
            room -= entry.record_nbytes
    found = {}
    for handle, names, entry, raw in _records(storage, folder, manifest, keys):
        try:
            _check(handle, names[0], entry, raw)
        except FormatError:
            continue  # a rank that needs it reads it itself, and reports the damage
        found[place_of(entry)] = bytes(raw)
    return found


_Record = tuple[ReadHandle, Sequence[str], ObjectEntry, memoryview]


def _records(storage: Storage, folder: str, manifest: Manifest, keys: Iterable[str]) -> Iterator[_Record]:
    entries = sorted((manifest.objects[key].file, manifest.objects[key].record_offset, key) for key in keys)
    for file, group in itertools.groupby(entries, key=lambda entry: entry[0]):
        keys_at: dict[int, list[str]] = {}  # several for a value of several keys
        for _, offset, key in group:
            keys_at.setdefault(offset, []).append(key)
        with storage.open_read(join(folder, file)) as handle:
            for run in _merged([manifest.objects[names[0]] for names in keys_at.values()]):
                base = run[0].record_offset
                data = memoryview(bytearray(run[-1].record_offset + run[-1].record_nbytes - base))
                handle.read_into(base, [data])
                for entry in run:
                    start = entry.record_offset - base
                    yield handle, keys_at[entry.record_offset], entry, data[start : start + entry.record_nbytes]


def _check(handle: ReadHandle, key: str, entry: ObjectEntry, raw: memoryview) -> None:
    BlockReader(handle, key, entry.record_offset, entry.record_nbytes, entry.crc32).passed(0, raw)


def _merged(entries: Sequence[ObjectEntry]) -> Iterator[list[ObjectEntry]]:
    """Cut a file's records, sorted by offset, into runs without large gaps."""
    run: list[ObjectEntry] = []
    for entry in entries:
        if run:
            end = run[-1].record_offset + run[-1].record_nbytes
            reach = entry.record_offset + entry.record_nbytes - run[0].record_offset
            if entry.record_offset - end > MERGE_GAP_NBYTES or reach > MERGE_NBYTES:
                yield run
                run = []
        run.append(entry)
    if run:
        yield run
