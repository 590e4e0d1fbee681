"""The plan of a verification: the expected content of every byte of a checkpoint's files, from its metadata.

A data file is tiled by *extents*: known bytes, bytes with a digest, zeros and, in external files, bytes and values
without any record.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from milepost.errors import FormatError
from milepost.format.digest import BlockDigests
from milepost.format.dtype import itemsize
from milepost.format.manifest import Manifest, ObjectEntry, ShardEntry
from milepost.format.nan import count_nan, has_nan
from milepost.format.record import record_footer, tensor_record
from milepost.format.value_names import check_value
from milepost.format.zip_directory import ZipDirectory
from milepost.storage.base import ReadHandle, counted
from milepost.verification.block_reader import BlockReader, shard_reader
from milepost.verification.external import locate_shard

Level = Literal["metadata", "sizes", "sample", "full"]
"""The scope of a verification: see ``verify``."""
SAMPLE_RECORDS = 256
"""Maximum number of records in a sample, or of blocks in files without records."""
PIECE_NBYTES = 8 << 20
"""Maximum size of an extent; larger ones are split."""


@dataclass(frozen=True, slots=True)
class Known:
    """Bytes that must equal ``expected``."""

    start: int
    expected: bytes
    key: str
    what: str

    @property
    def stop(self) -> int:
        return self.start + len(self.expected)


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Bytes ``[start, stop)`` of the file that are covered, completely or in part, by a digest of ``reader``."""

    start: int
    stop: int
    reader: BlockReader
    what: str

    @property
    def key(self) -> str | None:
        return self.reader.key or None


@dataclass(frozen=True, slots=True)
class Zeros:
    """Padding ``[start, stop)``."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """Bytes ``[start, stop)`` without any record."""

    start: int
    stop: int


class NanCount:
    """Counts NaN in a tensor's values, which are read in any order by several threads."""

    def __init__(self, start: int, stop: int, dtype: str, key: str):
        self.start = start
        self.stop = stop
        self.key = key
        self._dtype = dtype
        self._passed_nbytes = self._count = 0
        self._lock = threading.Lock()

    def passed(self, data: memoryview) -> str | None:
        """Count some of the values; with the last ones, returns the fault of all."""
        count = count_nan(data, self._dtype) if has_nan(self._dtype) else 0
        with self._lock:
            self._count += count
            self._passed_nbytes += len(data)
            if not self._count or self._passed_nbytes < self.stop - self.start:
                return None
        return f"NaN in {self._count} of {counted(self._passed_nbytes // itemsize(self._dtype), 'value')}"


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Bytes ``[start, stop)`` of a tensor without a digest: only NaN can be detected."""

    start: int
    stop: int
    nan: NanCount

    @property
    def key(self) -> str:
        return self.nan.key


Extent = Known | Data | Zeros | Unknown | Values


@dataclass(frozen=True, slots=True)
class PlacedRecord:
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


def records_of(manifest: Manifest) -> dict[str, list[PlacedRecord]]:
    """Return the records in each data file, by offset."""
    placed: dict[str, list[PlacedRecord]] = {}
    for key, tensor in manifest.tensors.items():
        for index, shard in enumerate(tensor.shards):
            placed.setdefault(shard.file, []).append(PlacedRecord(key, shard, tensor.dtype, index))
    for key, entry in manifest.objects.items():
        placed.setdefault(entry.file, []).append(PlacedRecord(key, entry))
    for records in placed.values():
        records.sort(key=lambda record: record.start)
    return placed


def own_record(handle: ReadHandle, record: PlacedRecord, digests: BlockDigests) -> Iterator[Extent]:
    """Return the extents of one record written by Milepost, in order, from its first byte to its last.

    Raises:
        FormatError: the offsets are not those that dtype and sizes imply.
    """
    entry, key = record.entry, record.key
    if isinstance(entry, ObjectEntry):
        yield from _data(BlockReader(handle, key, record.start, entry.record_nbytes, entry.crc32), "the record")
        return
    reader = shard_reader(handle, key, record.dtype, entry, record.shard, digests)
    layout = tensor_record(record.dtype, entry.box.sizes)
    assert entry.crc32 is not None, "shard_reader has refused it"
    yield Known(record.start, layout.header, key, "the record's header")
    yield from _data(reader, "data")
    yield Known(reader.offset + reader.nbytes, record_footer(layout, entry.crc32), key, "the record's footer")


def _data(reader: BlockReader, what: str) -> Iterator[Data]:
    for low, high in reader.digested():
        for start, stop in _pieces(reader.offset + low, reader.offset + high):
            yield Data(start, stop, reader, what)


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, PIECE_NBYTES):
        yield low, min(low + PIECE_NBYTES, stop)


def zeros(start: int, stop: int) -> Iterator[Extent]:
    """Yield the padding ``[start, stop)``."""
    return (Zeros(*piece) for piece in _pieces(start, stop))


def unknown(start: int, stop: int) -> Iterator[Extent]:
    """Yield the bytes ``[start, stop)`` without any record."""
    return (Unknown(*piece) for piece in _pieces(start, stop))


def values(start: int, stop: int, dtype: str, key: str) -> Iterator[Extent]:
    """Yield a tensor's values without a digest."""
    nan = NanCount(start, stop, dtype, key)
    return (Values(*piece, nan) for piece in _pieces(start, stop))


def external_record(handle: ReadHandle, record: PlacedRecord) -> Iterator[Extent]:
    """Return the extents of one record written by another program.

    Raises:
        FormatError: the record is not a zip archive like ``torch.save``'s, does not hold the tensor in the metadata, or
        holds a value that a load refuses.
    """
    if isinstance(record.entry, ShardEntry):
        locate_shard(handle, record.key, record.dtype, record.entry)
    else:
        try:
            check_value(lambda at, nbytes: handle.read(record.start + at, nbytes), record.entry.record_nbytes)
        except FormatError as error:
            raise FormatError(f"a load refuses this value: {error.message}", key=record.key) from error
    yield from zip_extents(handle, record.start, record.stop, record.key)


def zip_extents(
    handle: ReadHandle, start: int, stop: int, key: str = "", *, max_entries: int = 1024
) -> Iterator[Extent]:
    """Yield the extents of an archive at ``[start, stop)`` of a file: its entries, as far as they have CRCs.

    Raises:
        FormatError: entries overlap, or are not like ``torch.save``'s.
    """
    directory = ZipDirectory(lambda at, n: handle.read(start + at, n), stop - start, max_entries=max_entries)
    position = start
    for entry in sorted(directory.entries.values(), key=lambda entry: entry.header_offset):
        begin = start + directory.data_offset(entry)
        if begin < position:
            raise FormatError(f"zip entry {entry.name!r:.100} overlaps the one before it", key=key or None)
        yield from unknown(position, begin)  # a zip header and padding: parsed, but not covered by a CRC
        position = begin + entry.nbytes
        # torch.serialization.set_crc32_options(False) writes zero for a CRC.
        if entry.crc32 or not entry.nbytes:
            yield from _data(BlockReader(handle, key, begin, entry.nbytes, entry.crc32), f"zip entry {entry.name}")
        else:
            yield from unknown(begin, position)
    yield from unknown(position, stop)


def sampled(
    placed: Mapping[str, list[PlacedRecord]], rng: random.Random, max_records: int, max_nbytes: int
) -> dict[str, list[PlacedRecord]]:
    """Choose records at random: at most ``max_records``, about ``max_nbytes`` in total, and at least one."""
    pool = [(name, record) for name, records in sorted(placed.items()) for record in records]
    rng.shuffle(pool)
    chosen: dict[str, list[PlacedRecord]] = {}
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
    """Group adjacent extents, up to ``limit_nbytes`` in total (or a single larger one)."""
    batch: list[Extent] = []
    for extent in extents:
        if batch and (extent.stop - batch[0].start > limit_nbytes or extent.start != batch[-1].stop):
            yield batch
            batch = []
        batch.append(extent)
    if batch:
        yield batch
