"""Segments: each rank's part of the table of shards, and their merge into the full table.

A rank's sign-off is its segment, so the committing rank only concatenates columns: its Python time grows with keys,
ranks and tilings, never with shards.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from milepost.errors import FormatError, SaveError, listed
from milepost.format.columns import Ints, ObjectColumns, Path, ShardTable, Tiling, UInts
from milepost.format.manifest import BLOCK_NBYTES, FileEntry
from milepost.format.shards_file import dump_shards, parse_shards


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The output of one rank: its shards, objects and files, and the CRC-32s of its shards' blocks, in order."""

    table: ShardTable
    files: Mapping[str, FileEntry]
    block_crcs: UInts


def empty_table() -> ShardTable:
    """Return the table of a rank that wrote nothing."""
    ints, uints = np.empty(0, np.int64), np.empty(0, np.uint32)
    return ShardTable((), (), (), uints, uints, ints, uints, ObjectColumns((), uints, ints, ints, uints), {})


def dump_segment(segment: Segment, save_id: str) -> bytes:
    """Return the bytes of a segment: those of ``milepost.shards``, the block CRCs, and their number."""
    crcs = segment.block_crcs.astype("<u4", copy=False).tobytes()
    return b"".join((dump_shards(segment.table, save_id), crcs, struct.pack("<Q", len(segment.block_crcs))))


def parse_segment(data: memoryview, files: Mapping[str, FileEntry], save_id: str, path: str) -> Segment:
    """Parse the output of ``dump_segment``. ``files`` are those written by its rank.

    Raises FormatError if it is damaged, belongs to another save, or its number of block CRCs does not match its shards.
    """
    count = struct.unpack("<Q", data[-8:])[0] if len(data) >= 8 else -1
    if not 0 <= 4 * count <= len(data) - 8:
        raise FormatError(f"{path}: its number of block CRCs is invalid", path=path)
    end = len(data) - 8 - 4 * count
    table, _ = parse_shards(data[:end], save_id, path, is_segment=True)
    crcs: UInts = np.frombuffer(data, "<u4", count, end)
    if int(table.first_blocks(BLOCK_NBYTES)[-1]) != count or set(table.files) != set(files):
        raise FormatError(f"{path}: its block CRCs or its files do not match its shards", path=path)
    return Segment(table, files, crcs)


# ---- merging ----


def merge_segments(
    segments: Sequence[Segment], ranks: Sequence[int], paths: Mapping[str, Path]
) -> tuple[ShardTable, UInts]:
    """Merge all segments into one table, ordered by box, and the block CRCs of its shards in that order.

    ``ranks`` of the segments are for messages; ``paths`` become the table's.

    Raises:
        SaveError: two ranks stored the same file or object, or one tensor with two dtypes or shapes.
    """
    tables = [segment.table for segment in segments]
    faults = _claimed_twice(segments, ranks)
    keys, numbers = _numbered(tables)
    kinds, faults_of_kind = _kinds(tables, numbers, keys)
    faults += faults_of_kind
    if faults:
        raise SaveError(f"the ranks contradict each other: {'; '.join(listed(faults))}")
    parts, part_numbers = _parts(tables)
    rows, entries = _placed(segments, numbers, part_numbers, len(keys))
    tilings, tiling = _tilings(parts, entries, kinds)
    first = np.zeros(len(keys) + 1, np.int64)
    np.cumsum([len(tilings[number]) for number in tiling], out=first[1:])
    _order_by_box(rows, tilings, tiling, first)
    objects = _objects(tables)
    table = ShardTable(
        files=tuple(name for one in tables for name in one.files),
        keys=keys,
        tilings=[by_box.tiling for by_box in tilings],
        tiling=np.array(tiling, np.uint32),
        file=rows.file,
        record_offset=rows.record_offset,
        crc32=rows.crc32,
        objects=objects,
        paths={key: paths[key] for key in (*keys, *objects.keys) if key in paths},
    )
    return table, _block_crcs(segments, table, rows.block)


def _claimed_twice(segments: Sequence[Segment], ranks: Sequence[int]) -> list[str]:
    faults = []
    writers: dict[str, int] = {}
    for rank, segment in zip(ranks, segments, strict=True):
        names = [f"file {name}" for name in segment.files]
        names += [f"'{key}'" for key in segment.table.objects.keys]
        for name in names:
            if name in writers:
                faults.append(f"{name} was stored by rank {writers[name]} and by rank {rank}")
            writers[name] = rank
    return faults


def _numbered(tables: Sequence[ShardTable]) -> tuple[tuple[str, ...], list[Ints]]:
    """Return all keys, sorted, and each table's indices into them. Ranks of one model part have the same keys."""
    distinct = {table.keys: table for table in tables}
    keys = tuple(sorted(set().union(*distinct)))
    number = {key: index for index, key in enumerate(keys)}
    numbers = {names: np.fromiter(map(number.__getitem__, names), np.int64, len(names)) for names in distinct}
    return keys, [numbers[table.keys] for table in tables]


_Kind = tuple[str, tuple[int, ...]]


def _kinds(
    tables: Sequence[ShardTable], numbers: Sequence[Ints], keys: tuple[str, ...]
) -> tuple[list[_Kind], list[str]]:
    """Return the dtype and shape of each key, and faults if ranks disagree."""
    known: dict[_Kind, int] = {}
    kind_of = np.full(len(keys), -1, np.int64)
    clashes: dict[int, set[int]] = {}
    for table, number in zip(tables, numbers, strict=True):
        local = [known.setdefault((tiling.dtype, tiling.shape), len(known)) for tiling in table.tilings]
        if not local:
            continue
        said = np.array(local, np.int64)[table.tiling]
        before = kind_of[number]
        for place in np.flatnonzero((before != said) & (before >= 0)):
            clashes.setdefault(int(number[place]), {int(before[place])}).add(int(said[place]))
        kind_of[number] = np.where(before >= 0, before, said)
    kinds = list(known)
    faults = [
        f"'{keys[key]}' was stored as " + " and as ".join(f"{d} {list(s)}" for d, s in sorted(kinds[k] for k in found))
        for key, found in sorted(clashes.items())
    ]
    return [kinds[kind] for kind in kind_of], faults


def _parts(tables: Sequence[ShardTable]) -> tuple[list[Tiling], list[Ints]]:
    """Return the distinct (partial) tilings of all tables, and each table's indices into them."""
    known: dict[object, int] = {}
    parts: list[Tiling] = []
    numbers = []
    for table in tables:
        local = []
        for tiling in table.tilings:
            number = known.setdefault(tiling.identity, len(parts))
            if number == len(parts):
                parts.append(tiling)
            local.append(number)
        numbers.append(np.array(local, np.int64))
    return parts, numbers


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Columns of all shards, by key. ``block`` is the index of a shard's first block among all segments' blocks."""

    file: UInts
    record_offset: Ints
    crc32: UInts
    block: Ints


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """The parts of each key: those of key ``k`` are ``part[first[k] : first[k + 1]]``, by rank."""

    part: Ints
    first: Ints


def _placed(
    segments: Sequence[Segment], numbers: Sequence[Ints], part_numbers: Sequence[Ints], num_keys: int
) -> tuple[_Rows, _Entries]:
    """Place all rows by key and rank: count first, then copy each segment's rows."""
    num_rows, num_entries = np.zeros(num_keys, np.int64), np.zeros(num_keys, np.int64)
    for segment, number in zip(segments, numbers, strict=True):
        num_rows[number] += np.diff(segment.table.first)
        num_entries[number] += 1
    next_row, next_entry = np.cumsum(num_rows) - num_rows, np.cumsum(num_entries) - num_entries
    entries = _Entries(np.empty(int(num_entries.sum()), np.int64), np.append(next_entry, num_entries.sum()))
    total = int(num_rows.sum())
    rows = _Rows(
        np.empty(total, np.uint32), np.empty(total, np.int64), np.empty(total, np.uint32), np.empty(total, np.int64)
    )
    file_base = block_base = 0
    for segment, number, part_number in zip(segments, numbers, part_numbers, strict=True):
        table = segment.table
        if len(number):
            counts = np.diff(table.first)
            entries.part[next_entry[number]] = part_number[table.tiling]
            target = np.repeat(next_row[number] - table.first[:-1], counts) + np.arange(len(table))
            rows.file[target] = table.file + np.uint32(file_base)
            rows.record_offset[target] = table.record_offset
            rows.crc32[target] = table.crc32
            blocks = table.spread([tiling.num_blocks(BLOCK_NBYTES) for tiling in table.tilings])
            rows.block[target] = block_base + np.cumsum(blocks) - blocks
            next_entry[number] += 1
            next_row[number] += counts
        file_base += len(table.files)
        block_base += len(segment.block_crcs)
    return rows, entries


@dataclass(frozen=True, slots=True, eq=False)
class _ByBox:
    """A full tiling with its boxes in order, and the index of each among its parts' boxes; None if unchanged."""

    tiling: Tiling
    order: Ints | None

    def __len__(self) -> int:
        return len(self.tiling)


def _tilings(parts: Sequence[Tiling], entries: _Entries, kinds: Sequence[_Kind]) -> tuple[list[_ByBox], list[int]]:
    """Return the distinct tilings composed of keys' parts, and each key's index into them."""
    known: dict[tuple[_Kind, bytes], int] = {}
    found: list[_ByBox] = []
    tiling_of = []
    bounds = entries.first.tolist()
    for key, kind in enumerate(kinds):
        made_of = entries.part[bounds[key] : bounds[key + 1]]
        number = known.setdefault((kind, made_of.tobytes()), len(found))
        if number == len(found):
            found.append(_joined(kind, [parts[part] for part in made_of]))
        tiling_of.append(number)
    return found, tiling_of


def _joined(kind: _Kind, parts: Sequence[Tiling]) -> _ByBox:
    offsets = np.concatenate([part.offsets for part in parts])
    sizes = np.concatenate([part.sizes for part in parts])
    header = np.concatenate([part.header_nbytes for part in parts])
    record = np.concatenate([part.record_nbytes for part in parts])
    order = np.lexsort((*sizes.T[::-1], *offsets.T[::-1])) if offsets.shape[1] else np.arange(len(offsets))
    dtype, shape = kind
    tiling = Tiling(dtype, shape, offsets[order], sizes[order], header[order], record[order])
    return _ByBox(tiling, None if (order == np.arange(len(order))).all() else order)


def _order_by_box(rows: _Rows, tilings: Sequence[_ByBox], tiling: Sequence[int], first: Ints) -> None:
    """Sort each key's rows by its tiling's boxes, in place."""
    bounds = first.tolist()
    for key, number in enumerate(tiling):
        order = tilings[number].order
        if order is not None:
            mine = slice(bounds[key], bounds[key + 1])
            for column in (rows.file, rows.record_offset, rows.crc32, rows.block):
                column[mine] = column[mine][order]


def _objects(tables: Sequence[ShardTable]) -> ObjectColumns:
    keys: list[str] = []
    file_base, files = 0, []
    for table in tables:
        keys += table.objects.keys
        files.append(table.objects.file + np.uint32(file_base))
        file_base += len(table.files)
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    columns = [
        np.concatenate([getattr(table.objects, name) for table in tables])[order]
        for name in ("record_offset", "record_nbytes", "crc32")
    ]
    return ObjectColumns(tuple(keys[place] for place in order), np.concatenate(files)[order], *columns)


def _block_crcs(segments: Sequence[Segment], table: ShardTable, block: Ints) -> UInts:
    """Return the block CRCs of all shards in table order; ``block`` is each one's first among all segments' blocks."""
    crcs = np.concatenate([segment.block_crcs for segment in segments])
    counts = table.spread([tiling.num_blocks(BLOCK_NBYTES) for tiling in table.tilings])
    found: UInts = crcs[np.repeat(block - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))]
    return found
