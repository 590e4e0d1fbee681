"""What every byte of a checkpoint's files must be, told from its metadata alone: the plan of a verification.

A data file is tiled by *extents*: bytes that are known, bytes of which a CRC-32 is known, zeros, and, in
files that Milepost did not write, bytes and values of which nothing is known.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from milepost.errors import FormatError
from milepost.format.digest import BlockDigests
from milepost.format.manifest import Manifest, ObjectEntry, ShardEntry
from milepost.format.record import locate_tensor, record_footer, tensor_record
from milepost.format.zip_directory import ZipDirectory
from milepost.storage.base import ReadHandle


@dataclass(frozen=True, slots=True)
class Known:
    """Bytes that must be exactly ``expected``."""

    start: int
    expected: bytes
    key: str
    what: str

    @property
    def stop(self) -> int:
        return self.start + len(self.expected)


@dataclass(frozen=True, slots=True)
class Digested:
    """Bytes ``[start, stop)`` that must have this CRC-32."""

    start: int
    stop: int
    crc32: int
    key: str | None
    what: str


@dataclass(frozen=True, slots=True)
class Zeros:
    """Padding ``[start, stop)``."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """Bytes ``[start, stop)`` that nothing is recorded of."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Values:
    """Elements ``[start, stop)`` of a tensor of which no digest is known: only NaN can be told."""

    start: int
    stop: int
    dtype: str
    key: str


Extent = Known | Digested | Zeros | Unknown | Values


@dataclass(frozen=True, slots=True)
class Placed:
    """A record in a file: an object, or shard number ``shard`` of a tensor of ``dtype``."""

    key: str
    entry: ShardEntry | ObjectEntry
    dtype: str = ""
    shard: int = 0

    @property
    def start(self) -> int:
        return self.entry.record_offset

    @property
    def stop(self) -> int:
        return self.entry.record_offset + self.entry.record_nbytes


def records_of(manifest: Manifest) -> dict[str, list[Placed]]:
    """The records in each data file, by offset."""
    placed: dict[str, list[Placed]] = {}
    for key, tensor in manifest.tensors.items():
        for index, shard in enumerate(tensor.shards):
            placed.setdefault(shard.file, []).append(Placed(key, shard, tensor.dtype, index))
    for key, entry in manifest.objects.items():
        placed.setdefault(entry.file, []).append(Placed(key, entry))
    for records in placed.values():
        records.sort(key=lambda record: record.start)
    return placed


def own_record(record: Placed, digests: BlockDigests) -> Iterator[Extent]:
    """The extents of one record that Milepost wrote, in order, from its first byte to its last.

    Raises:
        FormatError: the offsets are not those that dtype and sizes imply.
    """
    entry, key = record.entry, record.key
    if isinstance(entry, ObjectEntry):
        if entry.crc32 is not None:
            yield Digested(record.start, record.stop, entry.crc32, key, "the record")
        return
    layout = tensor_record(record.dtype, entry.box.sizes)
    data_start = entry.record_offset + layout.data_offset
    if entry.crc32 is None or (entry.data_offset, entry.record_nbytes) != (data_start, layout.nbytes):
        raise FormatError(f"the manifest gives the record of '{key}' an impossible layout", key=key)
    yield Known(entry.record_offset, layout.header, key, "the record's header")
    data_stop = data_start + entry.data_nbytes
    crcs = digests.of_shard(key, record.shard)
    for start, crc in zip(range(data_start, data_stop, digests.block_nbytes), crcs, strict=True):
        yield Digested(start, min(start + digests.block_nbytes, data_stop), crc, key, "data")
    yield Known(data_stop, record_footer(layout, entry.crc32), key, "the record's footer")


def foreign_record(handle: ReadHandle, record: Placed) -> Iterator[Extent]:
    """The extents of one record that another program wrote: its zip entries, as far as they have CRCs.

    Raises:
        FormatError: the record is no zip archive of the form that ``torch.save`` writes, or holds another tensor than
            the metadata says.
    """

    def read_at(offset: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        handle.read_into(record.start + offset, [memoryview(buffer)])
        return bytes(buffer)

    if isinstance(record.entry, ShardEntry):
        found = locate_tensor(read_at, record.entry.record_nbytes)
        if (found.dtype, found.sizes) != (record.dtype, record.entry.box.sizes):
            raise FormatError(
                f"it holds {found.dtype} {list(found.sizes)}, but the metadata says "
                f"{record.dtype} {list(record.entry.box.sizes)}",
                key=record.key,
            )
    yield from zip_extents(ZipDirectory(read_at, record.entry.record_nbytes), record.start, record.stop, record.key)


def zip_extents(directory: ZipDirectory, start: int, stop: int, key: str | None) -> Iterator[Extent]:
    """The extents of an archive that is at ``[start, stop)`` of a file: its entries, as far as they have CRCs.

    Raises:
        FormatError: entries overlap.
    """
    position = start
    for entry in sorted(directory.entries.values(), key=lambda entry: entry.header_offset):
        begin = start + directory.data_offset(entry)
        if begin < position:
            raise FormatError(f"zip entry {entry.name!r:.100} overlaps the one before it", key=key)
        yield Unknown(position, begin)  # a zip header and padding: parsed, but without a CRC of its own
        position = begin + entry.nbytes
        # torch.serialization.set_crc32_options(False) leaves zero in place of a CRC.
        if entry.crc32 or not entry.nbytes:
            yield Digested(begin, position, entry.crc32, key, f"zip entry {entry.name}")
        else:
            yield Unknown(begin, position)
    yield Unknown(position, stop)


def sampled(
    placed: Mapping[str, list[Placed]], rng: random.Random, max_records: int, max_nbytes: int
) -> dict[str, list[Placed]]:
    """Some records at random: at most ``max_records``, and about ``max_nbytes`` together, but at least one."""
    pool = [(name, record) for name, records in sorted(placed.items()) for record in records]
    rng.shuffle(pool)
    chosen: dict[str, list[Placed]] = {}
    left = max_nbytes
    for name, record in pool[:max_records]:
        if left <= 0:
            break
        left -= record.stop - record.start
        chosen.setdefault(name, []).append(record)
    for records in chosen.values():
        records.sort(key=lambda record: record.start)
    return chosen


def batches(extents: Iterator[Extent], limit_nbytes: int) -> Iterator[list[Extent]]:
    """Neighbouring extents, together at most ``limit_nbytes`` (or a single one that is larger)."""
    batch: list[Extent] = []
    for extent in extents:
        if batch and (extent.stop - batch[0].start > limit_nbytes or extent.start != batch[-1].stop):
            yield batch
            batch = []
        batch.append(extent)
    if batch:
        yield batch
