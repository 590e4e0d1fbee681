"""The shards of a checkpoint in columns: the content of ``milepost.shards`` and of each rank's segment, in memory.

A tensor is stored by its *tiling*: its dtype, its shape and the boxes into which it is cut. Thousands of tensors share
a few tilings (layers are alike), so a check or plan for a tiling holds for all of them. Each shard adds only its
location and digest: file, offset and CRC-32, twenty bytes. ``shards_file`` defines the bytes.

No operation here takes Python time per shard, except access to individual shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.manifest import Manifest, ObjectEntry, Overlap, ShardEntry, TensorEntry, TiledShards

Ints = npt.NDArray[np.int64]
UInts = npt.NDArray[np.uint32]
Path = tuple[str | int, ...]


def starts_of(counts: Ints) -> Ints:
    """Return the start of each of several consecutive stretches, and the end of the last one."""
    found = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=found[1:])
    return found


def concatenated(arrays: Sequence[npt.NDArray[Any]], kind: type[Any] = np.int64) -> Any:
    """Concatenate arrays; without any, return an empty one of this kind."""
    return np.concatenate(arrays) if arrays else np.empty(0, kind)


@dataclass(frozen=True, eq=False)
class Tiling:
    """A way to store a tensor: its dtype, its shape, and the boxes into which it is cut, each a record.

    ``offsets`` and ``sizes`` have a row for each box and a column for each dim. ``header_nbytes`` is the size of the
    record's header before a box's raw data, ``record_nbytes`` that of the full record.
    """

    dtype: str
    shape: tuple[int, ...]
    offsets: Ints  # (boxes, dims)
    sizes: Ints  # (boxes, dims)
    header_nbytes: Ints  # (boxes,)
    record_nbytes: Ints  # (boxes,)

    def __len__(self) -> int:
        return len(self.record_nbytes)

    @cached_property
    def numel(self) -> Ints:
        """Number of elements of each box."""
        numel: Ints = np.prod(self.sizes, axis=1, dtype=np.int64)
        return numel

    @cached_property
    def data_nbytes(self) -> Ints:
        """Size of each box's raw data in bytes."""
        return self.numel * itemsize(self.dtype)

    def num_blocks(self, block_nbytes: int) -> Ints:
        """Number of blocks of each box's raw data; the last may be short."""
        return -(-self.data_nbytes // block_nbytes)

    def block_bounds(self, block_nbytes: int) -> Sequence[int]:
        """The index of each box's first block, counted over all boxes; one more entry than boxes."""
        bounds = self._bounds.get(block_nbytes)
        if bounds is None:
            bounds = self._bounds[block_nbytes] = [0, *np.cumsum(self.num_blocks(block_nbytes)).tolist()]
        return bounds

    @cached_property
    def _bounds(self) -> dict[int, Sequence[int]]:
        return {}

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes as ``Box`` values."""
        pairs = zip(self.offsets.tolist(), self.sizes.tolist(), strict=True)
        return tuple(Box(tuple(offsets), tuple(sizes)) for offsets, sizes in pairs)

    def overlaps(self, box: Box) -> Sequence[Overlap]:
        """Return all regions that the boxes have in common with ``box``; cached for tensors that are cut alike."""
        found = self._found.get(box)
        if found is None:
            found = self._found[box] = self._overlaps(box)
        return found

    @cached_property
    def _found(self) -> dict[Box, Sequence[Overlap]]:
        return {}

    def _overlaps(self, box: Box) -> Sequence[Overlap]:
        origin, stops = np.array(box.offsets, np.int64), np.array(box.stops, np.int64)
        low = np.maximum(self.offsets, origin)
        sizes = np.minimum(self.offsets + self.sizes, stops) - low
        hits = np.flatnonzero((sizes > 0).all(axis=1))
        columns = ((low - self.offsets)[hits], (low - origin)[hits], sizes[hits])
        return [
            Overlap(shard, Box(tuple(src), tuple(size)), Box(tuple(dst), tuple(size)))
            for shard, src, dst, size in zip(hits.tolist(), *(column.tolist() for column in columns), strict=True)
        ]

    @property
    def identity(self) -> tuple[object, ...]:
        """A value that is equal for two tilings if and only if they are the same."""
        arrays = (self.offsets, self.sizes, self.header_nbytes, self.record_nbytes)
        return (self.dtype, self.shape, *(array.tobytes() for array in arrays))


@dataclass(frozen=True, eq=False)
class ObjectColumns:
    """The records of values other than tensors."""

    keys: tuple[str, ...]  # sorted
    file: UInts
    record_offset: Ints
    record_nbytes: Ints
    crc32: UInts


@dataclass(frozen=True, eq=False)
class ShardTable:
    """All stored items, or one rank's part of them. Shards are rows, grouped by tensor, in the order of its tiling."""

    files: tuple[str, ...]
    keys: tuple[str, ...]  # keys of the tensors, sorted
    tilings: Sequence[Tiling]
    tiling: UInts  # (tensors,) index into tilings
    file: UInts  # (shards,) index into files
    record_offset: Ints  # (shards,)
    crc32: UInts  # (shards,) of the raw data
    objects: ObjectColumns
    paths: Mapping[str, Path]
    structure: bytes = b""

    def __len__(self) -> int:
        return len(self.file)

    @cached_property
    def num_boxes(self) -> Ints:
        """Number of boxes of each tiling."""
        return np.fromiter(map(len, self.tilings), np.int64, len(self.tilings))

    @cached_property
    def first(self) -> Ints:
        """The row of each tensor's first shard; one more entry than tensors."""
        return starts_of(self.num_boxes[self.tiling])

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The index of each tensor's key."""
        return {key: number for number, key in enumerate(self.keys)}

    def spread(self, of_tiling: Sequence[Ints], start: int = 0, stop: int | None = None) -> Ints:
        """Expand per-box values of each tiling to per-shard values of the tensors ``[start, stop)``."""
        stop = len(self.keys) if stop is None else stop
        if start == stop:
            return np.empty(0, np.int64)
        return np.concatenate(of_tiling)[self.box_numbers(start, stop)]

    def box_numbers(self, start: int, stop: int) -> Ints:
        """The box of each shard of the tensors ``[start, stop)``, counted over the boxes of all tilings."""
        tiling = self.tiling[start:stop]
        base = (np.cumsum(self.num_boxes) - self.num_boxes)[tiling] - self.first[start:stop]
        rows = np.arange(self.first[start], self.first[stop])
        return np.repeat(base, self.num_boxes[tiling]) + rows

    def first_blocks(self, block_nbytes: int) -> Ints:
        """The index of each tensor's first block in ``milepost.digests``; one more entry than tensors."""
        per_tiling = [int(tiling.num_blocks(block_nbytes).sum()) for tiling in self.tilings]
        return starts_of(np.array(per_tiling, np.int64)[self.tiling])


class Shards(TiledShards):
    """The shards of one tensor; entries are created on access."""

    __slots__ = ("_first", "_table", "tiling")

    def __init__(self, table: ShardTable, tensor: int):
        self.tiling: Tiling = table.tilings[table.tiling[tensor]]
        self._table = table
        self._first = int(table.first[tensor])

    @property
    def crc32(self) -> UInts:
        """The CRC-32 of each shard's raw data."""
        return self._table.crc32[self.rows]

    @property
    def rows(self) -> slice:
        """The rows of the table that hold the shards."""
        return slice(self._first, self._first + len(self))

    @property
    def boxes(self) -> tuple[Box, ...]:
        return self.tiling.boxes

    @property
    def files(self) -> list[str]:
        return sorted(self._table.files[number] for number in np.unique(self._table.file[self.rows]))

    def block_bounds(self, block_nbytes: int) -> Sequence[int]:
        return self.tiling.block_bounds(block_nbytes)

    def overlaps(self, box: Box) -> Sequence[Overlap]:
        return self.tiling.overlaps(box)

    def __len__(self) -> int:
        return len(self.tiling)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardEntry]: ...

    def __getitem__(self, index: int | slice) -> ShardEntry | Sequence[ShardEntry]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        table, tiling, row = self._table, self.tiling, self._first + number
        record_offset = table.record_offset.item(row)
        return ShardEntry(
            box=Box(tuple(tiling.offsets[number].tolist()), tuple(tiling.sizes[number].tolist())),
            file=table.files[table.file.item(row)],
            record_offset=record_offset,
            record_nbytes=tiling.record_nbytes.item(number),
            data_offset=record_offset + tiling.header_nbytes.item(number),
            data_nbytes=tiling.data_nbytes.item(number),
            crc32=table.crc32.item(row),
        )

    def __iter__(self) -> Iterator[ShardEntry]:
        table, tiling, rows = self._table, self.tiling, self.rows
        places = (table.file[rows], table.record_offset[rows], table.crc32[rows])
        lists = [
            column.tolist() for column in (*places, tiling.header_nbytes, tiling.record_nbytes, tiling.data_nbytes)
        ]
        for box, file, offset, crc, header, record, data in zip(tiling.boxes, *lists, strict=True):
            yield ShardEntry(box, table.files[file], offset, record, offset + header, data, crc)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} shards>"


class Tensors(Mapping[str, TensorEntry]):
    """The tensors of a table by key."""

    def __init__(self, table: ShardTable):
        self.table = table

    def __getitem__(self, key: str) -> TensorEntry:
        shards = Shards(self.table, self.table.index[key])
        return TensorEntry(shards.tiling.dtype, shards.tiling.shape, shards)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.keys)

    def __len__(self) -> int:
        return len(self.table.keys)

    def __contains__(self, key: object) -> bool:
        return key in self.table.index


class Objects(Mapping[str, ObjectEntry]):
    """The values of a table other than tensors, by key."""

    def __init__(self, table: ShardTable):
        self._columns = table.objects
        self._files = table.files
        self._index = {key: number for number, key in enumerate(table.objects.keys)}

    def __getitem__(self, key: str) -> ObjectEntry:
        columns, row = self._columns, self._index[key]
        file = self._files[columns.file[row]]
        return ObjectEntry(
            file, int(columns.record_offset[row]), int(columns.record_nbytes[row]), int(columns.crc32[row])
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.keys)

    def __len__(self) -> int:
        return len(self._columns.keys)


# ---- to and from entries ----


def table_of(manifest: Manifest, *, whole: bool = True) -> ShardTable:
    """Return the shards of a manifest in columns.

    With ``whole``, as for a commit record, raises ValueError if an item has no offsets or digest; otherwise zeros stand
    for unknown values.
    """
    if isinstance(manifest.tensors, Tensors):
        return manifest.tensors.table
    files = tuple(sorted({*_files_of(manifest)}))
    number = {name: index for index, name in enumerate(files)}
    keys = tuple(sorted(manifest.tensors))
    tilings: dict[object, int] = {}
    found: list[Tiling] = []
    tiling_of: list[int] = []
    rows: list[tuple[int, int, int]] = []
    for key in keys:
        entry = manifest.tensors[key]
        tiling = _tiling_of(key, entry, whole=whole)
        tiling_of.append(tilings.setdefault(tiling.identity, len(tilings)))
        if len(tilings) > len(found):
            found.append(tiling)
        rows.extend((number[shard.file], shard.record_offset, shard.crc32 or 0) for shard in entry.shards)
    return ShardTable(
        files=files,
        keys=keys,
        tilings=tuple(found),
        tiling=np.array(tiling_of, np.uint32),
        file=np.array([row[0] for row in rows], np.uint32),
        record_offset=np.array([row[1] for row in rows], np.int64),
        crc32=np.array([row[2] for row in rows], np.uint32),
        objects=object_columns(manifest.objects, number, whole=whole),
        paths=manifest.paths,
        structure=manifest.structure,
    )


def object_columns(
    objects: Mapping[str, ObjectEntry], number: Mapping[str, int], *, whole: bool = True
) -> ObjectColumns:
    """Return the records of ``objects`` in columns; ``number`` is the index of each file.

    Raises ValueError for one without a digest, unless ``whole`` is False.
    """
    bare = next((key for key, entry in objects.items() if entry.crc32 is None), None)
    if whole and bare is not None:
        raise ValueError(f"object {bare!r} has no digest: it can't be committed")
    keys = tuple(sorted(objects))
    entries = [objects[key] for key in keys]
    return ObjectColumns(
        keys,
        np.array([number[entry.file] for entry in entries], np.uint32),
        np.array([entry.record_offset for entry in entries], np.int64),
        np.array([entry.record_nbytes for entry in entries], np.int64),
        np.array([entry.crc32 or 0 for entry in entries], np.uint32),
    )


def _files_of(manifest: Manifest) -> Iterator[str]:
    for tensor in manifest.tensors.values():
        yield from (shard.file for shard in tensor.shards)
    yield from (entry.file for entry in manifest.objects.values())


def _tiling_of(key: str, entry: TensorEntry, *, whole: bool) -> Tiling:
    header = []
    for shard in entry.shards:
        if whole and (shard.data_offset is None or shard.crc32 is None):
            raise ValueError(f"shard {shard.box} of {key!r} has no data offset or no digest: it can't be committed")
        header.append(0 if shard.data_offset is None else shard.data_offset - shard.record_offset)
    return Tiling(
        entry.dtype,
        entry.shape,
        coordinates([shard.box.offsets for shard in entry.shards], len(entry.shape)),
        coordinates([shard.box.sizes for shard in entry.shards], len(entry.shape)),
        np.array(header, np.int64),
        np.array([shard.record_nbytes for shard in entry.shards], np.int64),
    )


def coordinates(rows: Sequence[Sequence[int]], num_dims: int) -> Ints:
    """Return offsets or sizes of boxes as an array with one row per box."""
    return np.array(rows, np.int64).reshape(len(rows), num_dims)


def with_table(manifest: Manifest, table: ShardTable) -> Manifest:
    """Return ``manifest`` with the tensors and objects of ``table``."""
    found = replace(manifest, tensors=Tensors(table), objects=Objects(table), parts=())
    return replace(found, paths=table.paths, structure=table.structure)
