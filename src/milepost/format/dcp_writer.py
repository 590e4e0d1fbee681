"""Write ``.metadata`` without torch: the pickle that stock ``torch.distributed.checkpoint`` reads.

Unpickled, it gives the same objects as DCP's own file: torch's classes with the same attributes. It is emitted opcode
by opcode, because pickling instances of torch's classes would require importing torch. Protocol 4; repeated text,
globals, sizes and boxes are fetched from the memo.

There is an entry for every shard, so numpy builds thousands of equal length at a time: Python's time grows with keys
and tilings only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from milepost.format.columns import Ints, ShardTable, Tiling, table_of
from milepost.format.dcp_metadata import FILESYSTEM_MODULE, METADATA_MODULE
from milepost.format.manifest import Manifest
from milepost.format.plain_pickle import STOP, int_opcodes
from milepost.format.remembered import Remembered
from milepost.storage.base import Bytes

DCP_VERSION = "1.0.0"
"""torch's ``Metadata.version`` (``CURRENT_DCP_VERSION``)."""

_PROTO_4, _MEMOIZE, _NONE, _FALSE = b"\x80\x04", b"\x94", b"N", b"\x89"
_NEW_INSTANCE, _BUILD = b")\x81", b"b"
_BATCH_SHARDS = 1 << 16
_Column = npt.NDArray[np.integer[Any]]
_MAX_KEPT_ITEMS = 16384
"""Number of shards and objects up to which the start of a file is kept for the next save."""


def dump_metadata(manifest: Manifest) -> bytes:
    """Return the bytes of ``.metadata`` for a manifest; the same manifest gives the same bytes.

    Keys without an entry in ``manifest.paths`` are at the top level of the state dict.
    """
    return b"".join(metadata_pieces(manifest))


def is_metadata_of(data: bytes, manifest: Manifest) -> bool:
    """Return True if ``data`` is the current output of :func:`dump_metadata`; other versions may write other bytes."""
    view, position = memoryview(data), 0
    for piece in metadata_pieces(manifest):
        if view[position : position + len(piece)] != piece:
            return False
        position += len(piece)
    return position == len(data)


def metadata_pieces(manifest: Manifest) -> Iterator[Bytes]:
    """Yield the output of :func:`dump_metadata` in pieces, so that it need not be in memory at once."""
    table = table_of(manifest, whole=False)  # an external checkpoint can be rewritten
    if len(table) + len(table.objects.keys) > _MAX_KEPT_ITEMS:
        opening, writer = _start(table)
    else:
        tilings = [tiling.identity for tiling in table.tilings]
        inputs = (table.keys, table.objects.keys, table.tiling.tolist(), tilings, dict(table.paths))
        opening, begun = _last_start.of(inputs, lambda: _start(table))
        writer = begun.continued(table)
    yield opening
    writer.text("storage_data")
    writer.put(b"}(")
    writer.begin_places()
    for start, stop in _batches(table):
        yield from writer.places(start, stop)
    writer.places_of_objects()
    writer.put(b"u")
    writer.text("storage_meta")
    writer.storage_meta(manifest.save_id)
    writer.text("version")
    writer.text(DCP_VERSION)
    writer.end()
    yield writer.take() + STOP


def _start(table: ShardTable) -> tuple[bytes, _Writer]:
    """Return the bytes before the shards' locations, which alone change from save to save, and the writer of them."""
    writer = _Writer(table)
    keys = sorted([*table.keys, *table.objects.keys])
    writer.begin(METADATA_MODULE, "Metadata")
    writer.text("state_dict_metadata")
    writer.index_of_keys(keys)
    writer.text("planner_data")
    writer.index_of_paths(keys)
    return _PROTO_4 + writer.take(), writer


def _batches(table: ShardTable) -> Iterator[tuple[int, int]]:
    """Yield ranges of tensors, each with about ``_BATCH_SHARDS`` shards or a single tensor."""
    start = 0
    while start < len(table.keys):
        most = int(table.first[start]) + _BATCH_SHARDS
        stop = max(start + 1, int(np.searchsorted(table.first, most, side="right")) - 1)
        yield start, stop
        start = stop


@dataclass(frozen=True, slots=True, eq=False)
class _Chunks:
    """A tiling as pickled: opcodes for its list of chunks, and each box's position in it, if it has one.

    Empty shards are left out: DCP finds a location by key and offsets, so an empty shard could hide a non-empty one
    with the same offsets. If there is no other, the first is kept.
    """

    opcodes: bytes
    number: Ints  # (boxes,) position in the list; -1 if left out
    offsets: Ints  # (boxes,) memo index of its offsets


class _Writer:
    """Emits opcodes into ``out``; keeps the opcodes that fetch each memoized value."""

    def __init__(self, table: ShardTable) -> None:
        self.table = table
        self.out: list[Bytes] = []
        self.put = self.out.append
        self.memo_count = 0
        self.texts: dict[str, int] = {}
        self.globals: dict[tuple[str, str], int] = {}
        self.sizes: dict[tuple[int, ...], int] = {}
        self.boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        self.chunks: dict[int, _Chunks] = {}
        self.tensors: dict[int, bytes] = {}
        self.of_boxes: list[Ints] = []
        """Of each tiling's boxes: number among the chunks, memo index of the offsets, bytes of the record."""
        self.file_texts: Ints = np.empty(0, np.int64)
        """Memo index of the name of each file; -1 if it is not there yet."""

    def continued(self, table: ShardTable) -> _Writer:
        """Return a writer for ``table``, which is equal so far, with the same memo."""
        other = _Writer(table)
        other.memo_count = self.memo_count
        other.texts, other.globals, other.sizes = self.texts.copy(), self.globals.copy(), self.sizes.copy()
        other.boxes, other.chunks, other.tensors = self.boxes.copy(), self.chunks.copy(), self.tensors.copy()
        return other

    def take(self) -> bytes:
        """Return the opcodes emitted since the last call."""
        taken = b"".join(self.out)
        self.out.clear()
        return taken

    # ---- values ----

    def memoize(self) -> int:
        """Memoize the top of the stack; returns its memo index."""
        self.put(_MEMOIZE)
        self.memo_count += 1
        return self.memo_count - 1

    def text(self, value: str) -> int:
        """Push a text; returns its memo index."""
        index = self.texts.get(value)
        if index is not None:
            self.put(_fetch(index))
            return index
        encoded = value.encode("utf-8", "surrogatepass")
        if len(encoded) < 256:
            self.put(b"\x8c%c" % len(encoded) + encoded)
        else:
            self.put(b"X" + len(encoded).to_bytes(4, "little") + encoded)
        index = self.texts[value] = self.memoize()
        return index

    def number(self, value: int) -> None:
        self.put(int_opcodes(value))

    def global_(self, module: str, name: str) -> int:
        index = self.globals.get((module, name))
        if index is not None:
            self.put(_fetch(index))
            return index
        self.text(module)
        self.text(name)
        self.put(b"\x93")
        index = self.globals[module, name] = self.memoize()
        return index

    def tuple_(self, values: tuple[str | int, ...]) -> None:
        if len(values) > 3:
            self.put(b"(")
        for value in values:
            if isinstance(value, str):
                self.text(value)
            else:
                self.number(value)
        self.put((b")", b"\x85", b"\x86", b"\x87")[len(values)] if len(values) <= 3 else b"t")

    def size(self, values: tuple[int, ...]) -> int:
        """Push a ``torch.Size``; returns its memo index."""
        index = self.sizes.get(values)
        if index is not None:
            self.put(_fetch(index))
            return index
        self.global_("torch", "Size")
        self.tuple_(values)
        self.put(b"\x85R")
        index = self.sizes[values] = self.memoize()
        return index

    def begin(self, module: str, name: str) -> None:
        """Begin an instance; its attributes follow as pairs of text and value, until ``end``."""
        self.global_(module, name)
        self.put(_NEW_INSTANCE + b"}(")

    def end(self) -> None:
        self.put(b"u" + _BUILD)

    # ---- keys ----

    def index_of_keys(self, keys: list[str]) -> None:
        self.put(b"}(")
        for key in keys:
            self.text(key)
            tensor = self.table.index.get(key)
            if tensor is None:
                self.global_(METADATA_MODULE, "BytesStorageMetadata")
                self.put(_NEW_INSTANCE)
            else:
                self.tensor(int(self.table.tiling[tensor]))
        self.put(b"u")

    def tensor(self, number: int) -> None:
        known = self.tensors.get(number)
        if known is not None:
            self.put(known)
            return
        is_first = number not in self.chunks
        started = len(self.out)
        self._tensor(number)
        if not is_first:  # everything is in the memo, so it is the same each time
            self.tensors[number] = b"".join(self.out[started:])

    def _tensor(self, number: int) -> None:
        tiling = self.table.tilings[number]
        self.begin(METADATA_MODULE, "TensorStorageMetadata")
        self.text("properties")
        self.properties(tiling.dtype)
        self.text("size")
        self.size(tiling.shape)
        self.text("chunks")
        known = self.chunks.get(number)
        if known is not None:
            self.put(known.opcodes)
        else:
            self.chunks[number] = self.chunks_of(tiling)
        self.end()

    def chunks_of(self, tiling: Tiling) -> _Chunks:
        """Push the list of a tiling's chunks; later ones fetch its items from the memo."""
        number, offsets = np.full(len(tiling), -1, np.int64), np.zeros(len(tiling), np.int64)
        stored = np.flatnonzero(tiling.numel) if tiling.numel.any() else np.arange(len(tiling))[:1]
        fetches = []
        self.put(b"](")
        for place, box in enumerate(stored.tolist()):
            corner = tuple(tiling.offsets[box].tolist()), tuple(tiling.sizes[box].tolist())
            known = self.boxes.get(corner)
            if known is None:
                self.begin(METADATA_MODULE, "ChunkStorageMetadata")
                self.text("offsets")
                self.size(corner[0])
                self.text("sizes")
                self.size(corner[1])
                self.end()
                known = self.boxes[corner] = self.memoize()
            else:
                self.put(_fetch(known))
            fetches.append(_fetch(known))
            number[box], offsets[box] = place, self.sizes[corner[0]]
        self.put(b"e")
        return _Chunks(b"](" + b"".join(fetches) + b"e", number, offsets)

    def properties(self, dtype: str) -> None:
        """Push ``TensorProperties``, whose state is (dtype, layout, requires_grad, memory format, pin_memory)."""
        self.global_(METADATA_MODULE, "TensorProperties")
        self.put(_NEW_INSTANCE + b"(")
        self.global_("torch", dtype)
        self.global_("torch.serialization", "_get_layout")
        self.text("torch.strided")
        self.put(b"\x85R" + _FALSE)
        self.global_(METADATA_MODULE, "_MEM_FORMAT_ENCODING")
        self.put(b"K\x00\x85R" + _FALSE)
        self.put(b"t" + _BUILD)

    def index_of_paths(self, keys: list[str]) -> None:
        self.put(b"}(")
        for key in keys:
            self.text(key)
            self.tuple_(self.table.paths.get(key, (key,)))
        self.put(b"u")

    # ---- locations ----

    def begin_places(self) -> None:
        """Put what the items of ``storage_data`` take from the memo into columns."""
        tilings, files = self.table.tilings, self.table.files
        self.file_texts = np.array([self.texts.get(name, -1) for name in files], np.int64)
        chunks = [self.chunks.get(number, _unused(tiling)) for number, tiling in enumerate(tilings)]
        columns = zip(
            *((one.number, one.offsets, tiling.record_nbytes) for one, tiling in zip(chunks, tilings, strict=True)),
            strict=True,
        )
        self.of_boxes = [np.concatenate(column) for column in columns]

    def places(self, start: int, stop: int) -> Iterator[Bytes]:
        """Push the items of ``storage_data`` for the shards of the tensors ``[start, stop)``."""
        table = self.table
        box = table.box_numbers(start, stop)
        place, offsets, nbytes = (values[box] for values in self.of_boxes)
        here = slice(int(table.first[start]), int(table.first[stop]))
        tensor = np.repeat(np.arange(start, stop), np.diff(table.first[start : stop + 1]))
        columns: Sequence[_Column] = [tensor, place, offsets, table.file[here], table.record_offset[here], nbytes]
        if (place < 0).any():
            columns = [column[place >= 0] for column in columns]
        fresh = self.new_files(columns[3])
        for row in fresh:
            first, *others = (int(column[row]) for column in columns)
            self.place(table.keys[first], *others)
        yield self.take()
        key, number, corner, file, offset, length = _without(columns, fresh)
        texts = np.array([self.texts[key] for key in table.keys[start:stop]], np.int64)
        yield self.rows(texts[key - start], (number, corner), (self.file_texts[file], offset, length))

    def new_files(self, file: _Column) -> list[int]:
        """The first row of each file that is not in the memo, ascending; its name will be.

        Texts and classes are put into the memo where they come first: by these rows, one at a time.
        """
        rows = np.flatnonzero(self.file_texts[file] < 0)
        _, where = np.unique(file[rows], return_index=True)
        found: list[int] = np.sort(rows[where]).tolist()
        return found

    def rows(self, key: _Column, box: tuple[_Column, _Column] | None, place: tuple[_Column, ...]) -> Bytes:
        """Return items like those of :meth:`place`, all of one length, by filling numbers into a pattern.

        ``box`` is number and corner of each, None for objects; ``place`` is file, offset and length.
        """
        if not len(key):
            return b""
        index, info = self.globals[METADATA_MODULE, "MetadataIndex"], self.globals[FILESYSTEM_MODULE, "_StorageInfo"]
        gap4, gap8 = b"\0" * 4, b"\0" * 8
        text = {name: _fetch_long(self.texts[name]) for name in _ITEM_TEXTS}
        of_box = (text["index"] + b"J", gap4, text["offset"] + b"j", gap4) if box is not None else ()
        pattern = [
            *(_fetch_long(index) + _NEW_INSTANCE + b"}(", text["fqn"] + b"j", gap4),
            *(of_box or (text["index"] + _NONE,)),
            *(b"u" + _BUILD + _fetch_long(info) + _NEW_INSTANCE + b"}(", text["relative_path"] + b"j", gap4),
            *(text["offset"] + b"\x8a\x08", gap8, text["length"] + b"\x8a\x08", gap8, b"u" + _BUILD),
        ]
        starts = accumulate(map(len, pattern), initial=0)
        gaps = [
            (start, "<u4" if part == gap4 else "<i8")
            for start, part in zip(starts, pattern, strict=False)
            if part in (gap4, gap8)
        ]
        item = b"".join(pattern)
        out = np.empty((len(key), len(item)), np.uint8)
        out[:] = np.frombuffer(item, np.uint8)
        for (start, kind), column in zip(gaps, (key, *(box or ()), *place), strict=True):
            field = np.dtype({"names": ["gap"], "formats": [kind], "offsets": [start], "itemsize": len(item)})
            out.view(field)["gap"][:, 0] = column
        return out.reshape(-1).data

    def place(self, key: str, number: int | None, corner: int | None, file: int, offset: int, length: int) -> None:
        """Push one item of ``storage_data``: a ``MetadataIndex`` and its ``_StorageInfo``.

        ``number`` is the box's index among the chunks, ``corner`` the memo index of its offsets; None for an object.
        """
        self.begin(METADATA_MODULE, "MetadataIndex")
        self.text("fqn")
        self.text(key)
        self.text("index")
        if number is None:
            self.put(_NONE)
        else:
            self.number(number)
        if corner is not None:
            self.text("offset")
            self.put(_fetch(corner))
        self.end()
        self.begin(FILESYSTEM_MODULE, "_StorageInfo")
        self.text("relative_path")
        self.file_texts[file] = self.text(self.table.files[file])
        self.text("offset")
        self.number(offset)
        self.text("length")
        self.number(length)
        self.end()

    def places_of_objects(self) -> None:
        objects = self.table.objects
        if not len(objects.keys):
            return
        fresh = self.new_files(objects.file)
        if (METADATA_MODULE, "MetadataIndex") not in self.globals:
            fresh = sorted({0, *fresh})
        for row in fresh:
            place = (int(column[row]) for column in (objects.file, objects.record_offset, objects.record_nbytes))
            self.place(objects.keys[row], None, None, *place)
        keys = np.array([self.texts[key] for key in objects.keys], np.int64)
        columns: Sequence[_Column] = [keys, objects.file, objects.record_offset, objects.record_nbytes]
        key, file, offset, length = _without(columns, fresh)
        self.put(self.rows(key, None, (self.file_texts[file], offset, length)))

    def storage_meta(self, save_id: str) -> None:
        self.begin(METADATA_MODULE, "StorageMeta")
        self.text("checkpoint_id")
        self.put(_NONE)
        self.text("save_id")
        self.text(save_id)
        self.text("load_id")
        self.put(_NONE)
        self.text("modules")
        self.put(b"]")
        self.end()


def _without(columns: Sequence[_Column], rows: list[int]) -> Sequence[_Column]:
    """The columns without a few of their rows."""
    return [np.delete(column, rows) for column in columns] if rows else columns


_last_start = Remembered[tuple[bytes, _Writer]]()


def _unused(tiling: Tiling) -> _Chunks:
    return _Chunks(b"", np.full(len(tiling), -1, np.int64), np.zeros(len(tiling), np.int64))


_ITEM_TEXTS = ("fqn", "index", "offset", "relative_path", "length")


def _fetch(index: int) -> bytes:
    """Return the opcode that fetches a value from the memo."""
    return b"h%c" % index if index < 256 else _fetch_long(index)


def _fetch_long(index: int) -> bytes:
    return b"j" + index.to_bytes(4, "little")
