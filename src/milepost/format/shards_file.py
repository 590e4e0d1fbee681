"""``milepost.shards``: the bytes of a :class:`~milepost.format.columns.ShardTable`, specified in ``docs/format.md``.

Each rank's sign-off holds the same form for its part of the shards. A header of fixed length holds all counts, so that
a reader knows the length of the file, and of each column in it, before it allocates anything.
"""

# No `from __future__ import annotations`: msgspec would have to compile the text of each annotation on first use.
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from operator import lt
from typing import Any, NamedTuple

import msgspec
import numpy as np

from milepost.errors import FormatError, NewerFormatError
from milepost.format.columns import ObjectColumns, Path, ShardTable, Tiling, concatenated
from milepost.format.digest import combine, crc32
from milepost.format.dtype import DTYPES
from milepost.format.manifest import MAX_SHARDS_NBYTES, SHARDS_NAME
from milepost.format.manifest_check import MAX_DIMS
from milepost.format.remembered import Remembered
from milepost.format.typed_json import parse_json, typed
from milepost.storage.base import Bytes

MAGIC = b"MILESHD\x01"
MAX_SAVE_ID_NBYTES = 256
_MAX_COUNT = 1 << 32  # tilings, boxes, tensors, shards and objects are numbered in 32 bits
_HEADER = struct.Struct("<8s2I11Q")
_CRC_OFFSET = 12  # not at the end: a file that ends with its own CRC-32 has a constant CRC-32
_ALIGNMENT = 8
_BETWEEN_KEYS = b'],"objects":['
"""In the JSON of keys as it is written here; no text in it can hold these bytes."""
_MAX_REMEMBERED = 32
_MAX_REMEMBERED_NBYTES = 1 << 20
"""Number and maximum size of cached lists of keys: each pipeline stage has one."""


_MAX_KEPT_KEYS = 16384
"""Number of keys up to which their JSON is kept for the next save."""


class OtherSaveError(FormatError):
    """The file is intact, but belongs to another save."""

    def __init__(self, message: str, save_id: str, path: str):
        super().__init__(message, path=path)
        self.save_id = save_id


class _Counts(NamedTuple):
    """The counts in the header, in its order."""

    files_nbytes: int
    keys_nbytes: int
    paths_nbytes: int
    structure_nbytes: int
    tilings: int
    dims: int
    boxes: int
    coordinates: int
    tensors: int
    shards: int
    objects: int


class _Files(msgspec.Struct, frozen=True):
    files: tuple[str, ...]
    dtypes: tuple[str, ...]


class _Tensors(msgspec.Struct, frozen=True):
    tensors: tuple[str, ...]


class _Objects(msgspec.Struct, frozen=True):
    objects: tuple[str, ...]


class _Keys(msgspec.Struct, frozen=True):
    tensors: tuple[str, ...]
    objects: tuple[str, ...]


def _columns(counts: _Counts, save_id_nbytes: int) -> list[tuple[str, int]]:
    """Return dtype and length of each section, in file order."""
    return [
        ("u1", save_id_nbytes),
        ("u1", counts.files_nbytes),
        ("u1", counts.keys_nbytes),
        ("u1", counts.paths_nbytes),
        ("u1", counts.structure_nbytes),
        ("u1", counts.tilings),  # dtype
        ("u1", counts.tilings),  # number of dims
        ("<u4", counts.tilings),  # number of boxes
        ("<i8", counts.dims),  # shapes
        ("<i8", counts.coordinates),  # offsets of boxes
        ("<i8", counts.coordinates),  # sizes of boxes
        ("<u4", counts.boxes),  # bytes of a record before its data
        ("<i8", counts.boxes),  # bytes of a record
        ("<u4", counts.tensors),  # tiling
        ("<u4", counts.shards),  # file
        ("<i8", counts.shards),  # where the record starts
        ("<u4", counts.shards),  # CRC-32 of the data
        ("<u4", counts.objects),  # file
        ("<i8", counts.objects),  # where the record starts
        ("<i8", counts.objects),  # bytes of the record
        ("<u4", counts.objects),  # CRC-32 of the record
    ]


def _placed(counts: _Counts, save_id_nbytes: int) -> tuple[list[tuple[str, int, int]], int]:
    """Return dtype, length and start of each section, and the length of the file."""
    columns = _columns(counts, save_id_nbytes)
    sizes = [-(-np.dtype(kind).itemsize * count // _ALIGNMENT) * _ALIGNMENT for kind, count in columns]
    *starts, end = accumulate(sizes, initial=_HEADER.size)
    return [(kind, count, start) for (kind, count), start in zip(columns, starts, strict=True)], end


# ---- writing ----


def dump_shards(table: ShardTable, save_id: str) -> bytes:
    """Return the bytes of ``milepost.shards``; the same table gives the same bytes.

    Raises ValueError if there would be too many, or if the save id is too long.
    """
    return b"".join(shards_pieces(table, save_id))


def shards_pieces(table: ShardTable, save_id: str) -> list[Bytes]:
    """Return the bytes of :func:`dump_shards` in pieces: views of the shards' columns, not copied.

    Raises: as :func:`dump_shards`.
    """
    dtypes = sorted({tiling.dtype for tiling in table.tilings})
    files = _dump({"files": table.files, "dtypes": dtypes})
    keys, paths = _keys_json(table), _paths_json(table)
    tilings = table.tilings
    counts = _Counts(
        files_nbytes=len(files),
        keys_nbytes=len(keys),
        paths_nbytes=len(paths),
        structure_nbytes=len(table.structure),
        tilings=len(tilings),
        dims=sum(len(tiling.shape) for tiling in tilings),
        boxes=sum(map(len, tilings)),
        coordinates=sum(tiling.offsets.size for tiling in tilings),
        tensors=len(table.keys),
        shards=len(table),
        objects=len(table.objects.keys),
    )
    name = save_id.encode()
    columns = _columns(counts, len(name))
    _, nbytes = _placed(counts, len(name))
    if nbytes > MAX_SHARDS_NBYTES or len(name) > MAX_SAVE_ID_NBYTES:
        raise ValueError(f"{SHARDS_NAME} would have {nbytes} bytes: at most {MAX_SHARDS_NBYTES} are allowed")
    values: list[Any] = [
        *(np.frombuffer(text, np.uint8) for text in (name, files, keys, paths, table.structure)),
        [dtypes.index(tiling.dtype) for tiling in tilings],
        [len(tiling.shape) for tiling in tilings],
        [len(tiling) for tiling in tilings],
        [size for tiling in tilings for size in tiling.shape],
        concatenated([tiling.offsets.reshape(-1) for tiling in tilings]),
        concatenated([tiling.sizes.reshape(-1) for tiling in tilings]),
        concatenated([tiling.header_nbytes for tiling in tilings]),
        concatenated([tiling.record_nbytes for tiling in tilings]),
        *(table.tiling, table.file, table.record_offset, table.crc32),
        *(table.objects.file, table.objects.record_offset, table.objects.record_nbytes, table.objects.crc32),
    ]
    pieces: list[Bytes] = [_HEADER.pack(MAGIC, len(name), 0, *counts)]
    for (kind, _), column in zip(columns, values, strict=True):
        data = np.ascontiguousarray(column, kind).view(np.uint8).data
        pieces += [data, bytes(-len(data) % _ALIGNMENT)]
    own_crc = reduce(lambda crc, piece: crc32(piece, crc), pieces, 0)
    return [_HEADER.pack(MAGIC, len(name), own_crc, *counts), *pieces[1:]]


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _keys_json(table: ShardTable) -> bytes:
    keys = {"tensors": table.keys, "objects": table.objects.keys}
    is_large = len(table.keys) + len(table.objects.keys) > _MAX_KEPT_KEYS
    return _dump(keys) if is_large else _last_keys.of(keys, lambda: _dump(keys))


def _paths_json(table: ShardTable) -> bytes:
    keys = (*table.keys, *table.objects.keys)
    if not table.paths:
        return _dump([None] * len(keys))

    def make() -> bytes:
        return _dump([_path_json(key, table.paths.get(key)) for key in keys])

    return make() if len(keys) > _MAX_KEPT_KEYS else _last_paths.of((keys, dict(table.paths)), make)


_last_keys, _last_paths = Remembered[bytes](), Remembered[bytes]()


def _path_json(key: str, path: Path | None) -> object:
    """Return a path as JSON: ``null`` for none, ``true`` for a key at the top level under its own name."""
    return True if path == (key,) else path


# ---- reading ----


def parse_shards(
    data: bytes | bytearray | memoryview, save_id: str, path: str = SHARDS_NAME, *, is_segment: bool = False
) -> tuple[ShardTable, int]:
    """Parse ``milepost.shards`` or a segment of it, without reference to other files; also returns its CRC-32.

    ``columns_check.table_faults`` compares it with other files. Columns are views of ``data``, which must not change.

    Raises FormatError if it is damaged, belongs to another save, or holds impossible numbers; ``NewerFormatError`` if
    it has a later version.
    """

    def fault(what: str) -> FormatError:
        advice = "do all ranks run the same Milepost?" if is_segment else "the checkpoint is damaged, use another step"
        return FormatError(f"{path}: {what}; {advice}", path=path)

    counts, placed, crc = _read_header(data, path, fault)
    sections = [np.frombuffer(data, kind, count, start) for kind, count, start in placed]
    said = sections[0].tobytes().decode("utf-8", "replace")
    if said != save_id:
        raise OtherSaveError(f"{path}: it belongs to save {said!r}, not to save {save_id!r}", said, path)
    names = typed(parse_json(sections[1].tobytes(), path, "a list of files"), _Files, path)
    of_tensors, of_objects = _keys_in(sections[2].tobytes(), path)
    problem = _names_problem(names, of_tensors, of_objects, counts)
    if problem:
        raise fault(problem)
    tilings = _tilings(names.dtypes, sections[5:13], counts)
    if tilings is None or _largest(sections[13]) >= len(tilings):
        raise fault("its tilings are inconsistent")
    if max(_largest(sections[14]), _largest(sections[17])) >= len(names.files):
        raise fault("a record is in a file that is not listed")
    table = ShardTable(
        files=names.files,
        keys=of_tensors.keys,
        tilings=tilings,
        tiling=sections[13],
        file=sections[14],
        record_offset=sections[15],
        crc32=sections[16],
        objects=ObjectColumns(of_objects, *sections[17:21]),
        paths=LazyPaths(sections[3].tobytes(), of_tensors.keys, of_objects, path),
        structure=sections[4].tobytes(),
    )
    if int(table.first[-1]) != counts.shards:
        raise fault(f"its tensors have {int(table.first[-1])} shards, its header says {counts.shards}")
    return table, crc


def _read_header(
    data: bytes | bytearray | memoryview, path: str, fault: Callable[[str], FormatError]
) -> tuple[_Counts, Sequence[tuple[Any, int, int]], int]:
    """Check the header, the length and the CRC-32; returns the counts, the place of each section, and the CRC-32."""
    if len(data) < _HEADER.size:
        raise fault(f"{len(data)} bytes are too few")
    magic, save_id_nbytes, own_crc, *numbers = _HEADER.unpack_from(data)
    view = memoryview(data)
    end = _CRC_OFFSET + 4
    rest = crc32(view[end:]), len(data) - end
    is_intact = own_crc == combine(crc32(bytes(view[:_CRC_OFFSET]) + bytes(4)), *rest)
    if magic[:7] == MAGIC[:7] and magic[7] > MAGIC[7] and is_intact:
        raise NewerFormatError(
            f"{path} was written by a newer Milepost (version {magic[7]}): upgrade Milepost", path=path
        )
    if magic != MAGIC:
        raise fault("it does not begin with the expected bytes")
    counts = _Counts(*numbers)
    if max(counts) > MAX_SHARDS_NBYTES or max(counts[4:]) >= _MAX_COUNT or save_id_nbytes > MAX_SAVE_ID_NBYTES:
        raise fault("a number in its header is too large")
    placed, nbytes = _placed(counts, save_id_nbytes)
    if len(data) != nbytes:
        raise fault(f"it has {len(data)} bytes, its header says {nbytes}")
    if not is_intact:
        raise fault("its own CRC-32 does not match")
    return counts, placed, combine(crc32(view[:end]), *rest)


def _largest(column: Any) -> int:
    return int(column.max()) if len(column) else -1


class _TensorKeys:
    """The keys of tensors, as they are encoded, decoded, and whether they ascend."""

    def __init__(self, encoded: bytes, keys: tuple[str, ...]) -> None:
        self.encoded = encoded
        self.keys = keys
        self.distinct = frozenset(keys)
        self.ascend = all(map(lt, keys, keys[1:]))


_known_keys: dict[tuple[int, int], _TensorKeys] = {}


def _keys_in(data: bytes, path: str) -> tuple[_TensorKeys, tuple[str, ...]]:
    """Decode the keys of tensors and of objects. Each rank has its own objects, but most have the same tensors.

    So those are decoded and checked once. A long list is found again by its CRC-32, which costs less than its hash.
    """
    # From the end, because the keys of a rank's objects are few.
    end = data.rfind(_BETWEEN_KEYS)
    if end < 0 or end > _MAX_REMEMBERED_NBYTES or not data.startswith(b'{"tensors":['):
        found = typed(parse_json(data, path, "a list of keys"), _Keys, path)
        return _TensorKeys(b"", found.tensors), found.objects
    encoded, following = data[:end], data[end + len(_BETWEEN_KEYS) :]
    place = end, crc32(encoded)
    known = _known_keys.get(place)
    if known is None or known.encoded != encoded:
        tensors = typed(parse_json(encoded + b"]}", path, "a list of keys"), _Tensors, path).tensors
        known = _TensorKeys(encoded, tensors)
        if len(_known_keys) >= _MAX_REMEMBERED:
            _known_keys.clear()
        _known_keys[place] = known
    objects = typed(parse_json(b'{"objects":[' + following, path, "a list of keys"), _Objects, path)
    return known, objects.objects


def _names_problem(names: _Files, tensors: _TensorKeys, objects: Sequence[str], counts: _Counts) -> str:
    if (len(tensors.keys), len(objects)) != (counts.tensors, counts.objects):
        return "its number of keys differs from its header"
    if not tensors.ascend or not all(all(map(lt, some, some[1:])) for some in (objects, names.dtypes)):
        return "its keys are not sorted, or one is repeated"
    if len(set(names.files)) != len(names.files):
        return "a file is listed twice"
    unknown = [name for name in names.dtypes if name not in DTYPES]
    if unknown:
        return f"dtype {unknown[0]!r:.50} is unknown"
    both = tensors.distinct.intersection(objects)
    return f"{min(both)!r} is both a tensor and an object" if both else ""


def _tilings(dtypes: Sequence[str], sections: Sequence[Any], counts: _Counts) -> tuple[Tiling, ...] | None:
    """Decode the tilings; None if the sections' counts are inconsistent."""
    dtype, num_dims, num_boxes, shapes, offsets, sizes, header, record = sections
    dims, boxes = num_dims.astype(np.int64), num_boxes.astype(np.int64)
    if counts.tilings and (int(dtype.max()) >= len(dtypes) or int(dims.max()) > MAX_DIMS):
        return None
    sums = (int(dims.sum()), int(boxes.sum()), int((dims * boxes).sum()))
    if sums != (counts.dims, counts.boxes, counts.coordinates):
        return None
    header = header.astype(np.int64)
    found, dim, box, coordinate = [], 0, 0, 0
    for kind, d, m in zip(dtype.tolist(), dims.tolist(), boxes.tolist(), strict=True):
        shape = tuple(shapes[dim : dim + d].tolist())
        corner = slice(coordinate, coordinate + d * m)
        columns = (offsets[corner].reshape(m, d), sizes[corner].reshape(m, d))
        found.append(Tiling(dtypes[kind], shape, *columns, header[box : box + m], record[box : box + m]))
        dim, box, coordinate = dim + d, box + m, coordinate + d * m
    return tuple(found)


_PATH_ROWS = list[bool | tuple[str | int, ...] | None]


class LazyPaths(Mapping[str, Path]):
    """The paths of keys in the nested state dict, decoded on first use."""

    def __init__(self, data: bytes, tensors: Sequence[str], objects: Sequence[str], path: str):
        self._data = data
        self._keys = tensors, objects
        self._path = path
        self._found: dict[str, Path] | None = None

    def _decoded(self) -> dict[str, Path]:
        if self._found is None:
            rows = typed(parse_json(self._data, self._path, "its paths"), _PATH_ROWS, self._path, "paths")
            keys = [*self._keys[0], *self._keys[1]]
            if len(rows) != len(keys) or any(row in (False, ()) for row in rows):
                raise FormatError(f"{self._path}: its paths do not match its keys", path=self._path)
            pairs = zip(keys, rows, strict=True)
            self._found = {key: (key,) if row is True else row for key, row in pairs if row is not None and row}  # type: ignore[misc]
        return self._found

    def __getitem__(self, key: str) -> Path:
        return self._decoded()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def __len__(self) -> int:
        return len(self._decoded())
