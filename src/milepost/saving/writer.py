"""Write one rank's file at the speed of the disk: headers, raw data and footers in one pass, with digests.

The layout is known before the first byte (``plan``), and a record's CRC follows its data, so data is touched once:
digested piece by piece, gathered, and written by few large calls. If the storage prefers aligned writes (O_DIRECT),
bytes go through one aligned buffer per thread; otherwise directly from the caller's memory.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS
from milepost.format import digest, record
from milepost.format.manifest import BLOCK_NBYTES
from milepost.run.place import Place
from milepost.run.signoff import WrittenFile, WrittenObject, WrittenTensor
from milepost.storage.base import Bytes, Storage, WriteHandle
from milepost.tensors.plan import (
    LARGE_ALIGNMENT,
    LARGE_RECORD_NBYTES,
    SMALL_ALIGNMENT,
    WriteItem,
    WritePlan,
    align,
)

GROUP_NBYTES = 16 << 20
"""Approximate size of the groups of records taken by threads."""
BUFFER_NBYTES = 8 << 20
"""Size of each thread's aligned buffer, used if the storage prefers aligned writes."""
GATHER_NBYTES = 16 << 20
"""Otherwise, approximate number of bytes gathered for one call."""
PIECE_NBYTES = 512 << 10
"""Size of the pieces in which data is digested and passed on, which stay in a core's second-level cache."""


class BlockSource(Protocol):
    """The source of the bytes of planned items. Called from several threads, for different items."""

    def blocks(self, item: WriteItem) -> Iterator[memoryview]:
        """The item's raw row-major bytes, in order and in blocks of any size.

        A block keeps its bytes as long as it is referenced; the writer references at most about ``GATHER_NBYTES`` at
        once.
        """


@dataclass(frozen=True, slots=True, eq=False)
class FileImage:
    """A file in memory, with the raw data of every planned item at its offset. The rest is filled in here.

    ``memory`` is page-aligned and at least ``plan.objects_offset`` long.
    """

    memory: memoryview


def parts_of(plan: WritePlan, source: BlockSource | FileImage) -> Iterator[tuple[WritePlan, BlockSource | FileImage]]:
    """Return the plan of each file written by a rank, with its source of bytes; for memory, that file's image."""
    for file, start in plan.images:
        if file.has_file:
            stop = start + file.objects_offset
            yield file, FileImage(source.memory[start:stop]) if isinstance(source, FileImage) else source


@dataclass(frozen=True, slots=True)
class _Group:
    start: int
    items: tuple[WriteItem, ...]

    @property
    def nbytes(self) -> int:
        return self.items[-1].record_offset + self.items[-1].record_nbytes - self.start

    @property
    def is_of_small_records(self) -> bool:
        return self.nbytes < len(self.items) * LARGE_RECORD_NBYTES


def write_file(
    storage: Storage,
    place: Place,
    plan: WritePlan,
    source: BlockSource | FileImage,
    objects: Mapping[str, bytes],
    *,
    num_threads: int = NUM_IO_THREADS,
    on_progress: Callable[[int], None] | None = None,
) -> WrittenFile:
    """Write and sync the file of ``plan`` at ``place``; the caller syncs the folder.

    Memory besides the source: ``BUFFER_NBYTES`` per thread, or ``GATHER_NBYTES`` if the source has to copy.
    ``on_progress`` is called from any thread with the bytes of each group written.

    Raises:
        StorageError: the first failure on any thread. The file is left for the caller to remove.
    """
    placed, end = place_objects(plan, objects)
    nbytes = align(end, LARGE_ALIGNMENT)
    with storage.open_write(place.path(plan.file), nbytes) as handle:
        writer = _GroupWriter(handle, source, on_progress)
        threads = 1 if handle.is_sequential and not isinstance(source, FileImage) else num_threads
        batches = map_in_threads(writer.write, _groups(plan.items), threads, name="milepost-write")
        pieces: Iterable[Bytes] = object_pieces(plan.objects_offset, placed, objects)
        if end - plan.objects_offset < GROUP_NBYTES:
            pieces = (_objects_image(plan.objects_offset, placed, objects),)
        write_stream(handle, plan.objects_offset, pieces, writer.buffer())
        handle.sync()
    return WrittenFile(place.name(plan.file), nbytes, tuple(tensor for batch in batches for tensor in batch), placed)


def digest_file(
    plan: WritePlan, source: BlockSource | FileImage, *, num_threads: int = NUM_IO_THREADS
) -> tuple[str, tuple[WrittenTensor, ...]]:
    """Compute an identifier of the bytes of ``plan``'s file, which holds no objects, and its tensors' digests.

    Files with the same identifier (XXH3, 128 bits, over all bytes) are equal. A CRC-32 is for damage, and too short to
    show that none of millions of tensors has changed.
    """

    def digested(group: _Group) -> tuple[bytes, list[WrittenTensor]]:
        written: list[WrittenTensor] = []
        passed = xxhash.xxh3_128()
        if isinstance(source, FileImage):
            stop = _complete_image(group, source.memory, written)
            passed.update(source.memory[group.start : stop])
        else:
            for piece in _record_pieces(group, source, written):
                passed.update(piece)
        return passed.digest(), written

    batches = map_in_threads(digested, _groups(plan.items), num_threads, name="milepost-digest")
    whole = xxhash.xxh3_128(b"".join(content for content, _ in batches))
    return whole.hexdigest(), tuple(tensor for _, batch in batches for tensor in batch)


def write_stream(handle: WriteHandle, offset: int, pieces: Iterable[Bytes], buffer: mmap.mmap | None) -> None:
    """Write consecutive ``pieces`` at ``offset`` by few large calls.

    With a ``buffer`` they are copied into it, so that all writes except the last are full disk blocks. Without one they
    are written in place, and referenced until then.
    """
    if buffer is None:
        gathered: list[Bytes] = []
        nbytes = 0
        for piece in pieces:
            gathered.append(piece)
            nbytes += len(piece)
            if nbytes >= GATHER_NBYTES:
                handle.write(offset, gathered, stable=True)
                gathered, offset, nbytes = [], offset + nbytes, 0
        if nbytes:
            handle.write(offset, gathered, stable=True)
        return
    memory, array = memoryview(buffer), np.frombuffer(buffer, dtype=np.uint8)
    fill = 0
    for piece in pieces:
        src = np.frombuffer(piece, dtype=np.uint8) if len(piece) else array[:0]
        while len(src):
            count = min(len(src), len(array) - fill)
            # numpy copies without the GIL; slice assignment of a memoryview would hold it.
            np.copyto(array[fill : fill + count], src[:count])
            src, fill = src[count:], fill + count
            if fill == len(array):
                handle.write(offset, [memory])
                offset, fill = offset + fill, 0
    if fill:
        handle.write(offset, [memory[:fill]])


class _GroupWriter:
    """Writes groups of records into an open file, each by one thread."""

    def __init__(self, handle: WriteHandle, source: BlockSource | FileImage, on_progress: Callable[[int], None] | None):
        self._handle = handle
        self._source = source
        self._on_progress = on_progress
        self._local = threading.local()

    def write(self, group: _Group) -> list[WrittenTensor]:
        """Write a group; returns the written records with digests."""
        written: list[WrittenTensor] = []
        if isinstance(self._source, FileImage):
            stop = _complete_image(group, self._source.memory, written)
            self._handle.write(group.start, [self._source.memory[group.start : stop]], stable=True)
        elif group.is_of_small_records and self._handle.alignment == 1:
            self._handle.write(group.start, [_image_of(group, self._source, written)], stable=True)
        else:
            write_stream(self._handle, group.start, _record_pieces(group, self._source, written), self.buffer())
        if self._on_progress is not None:
            self._on_progress(group.nbytes)
        return written

    def buffer(self) -> mmap.mmap | None:
        """This thread's aligned buffer, if the storage prefers aligned writes."""
        if self._handle.alignment == 1:
            return None
        if not hasattr(self._local, "buffer"):
            self._local.buffer = mmap.mmap(-1, BUFFER_NBYTES)
        found: mmap.mmap = self._local.buffer
        return found


def place_objects(plan: WritePlan, objects: Mapping[str, bytes]) -> tuple[tuple[WrittenObject, ...], int]:
    """Place each object's record; returns the offsets and the end of the last one."""
    placed = []
    offset = plan.objects_offset
    for key in plan.objects:
        data = objects[key]
        offset = align(offset, SMALL_ALIGNMENT)
        placed.append(WrittenObject(key, offset, len(data), digest.crc32(data)))
        offset += len(data)
    return tuple(placed), offset


def object_pieces(position: int, placed: Sequence[WrittenObject], objects: Mapping[str, bytes]) -> Iterator[bytes]:
    """Yield the objects' records, and the zeros between and after them, from ``position`` on."""
    for written in placed:
        yield bytes(written.record_offset - position)
        yield objects[written.key]
        position = written.record_offset + written.record_nbytes
    yield bytes(align(position, LARGE_ALIGNMENT) - position)


def _objects_image(position: int, placed: Sequence[WrittenObject], objects: Mapping[str, bytes]) -> bytearray:
    """Return the ``object_pieces`` as one: there may be thousands, each followed by zeros."""
    end = placed[-1].record_offset + placed[-1].record_nbytes if placed else position
    image = bytearray(align(end, LARGE_ALIGNMENT) - position)
    for written in placed:
        start = written.record_offset - position
        image[start : start + written.record_nbytes] = objects[written.key]
    return image


def _groups(items: Sequence[WriteItem]) -> list[_Group]:
    """Cut the file at records that start on a disk block, about every ``GROUP_NBYTES``."""
    groups: list[_Group] = []
    current: list[WriteItem] = []
    for item in items:
        at_block = item.record_offset % LARGE_ALIGNMENT == 0
        if current and at_block and item.record_offset - current[0].record_offset >= GROUP_NBYTES:
            groups.append(_Group(current[0].record_offset, tuple(current)))
            current = []
        current.append(item)
    if current:
        groups.append(_Group(current[0].record_offset, tuple(current)))
    return groups


def _record_pieces(group: _Group, source: BlockSource, written: list[WrittenTensor]) -> Iterator[Bytes]:
    """Yield the bytes of a group with headers, footers and zeros; appends each finished tensor to ``written``."""
    position = group.start
    for item in group.items:
        layout = record.tensor_record(item.dtype, item.box.sizes)
        yield bytes(item.record_offset - position)
        yield layout.header
        block_crcs: list[int] = []
        crc = block_crc = block_nbytes = 0
        for data in source.blocks(item):
            start = 0
            while start < len(data):
                piece = data[start : start + min(PIECE_NBYTES, BLOCK_NBYTES - block_nbytes)]
                block_crc = digest.crc32(piece, block_crc)
                yield piece
                start, block_nbytes = start + len(piece), block_nbytes + len(piece)
                if block_nbytes == BLOCK_NBYTES:
                    crc = digest.combine(crc, block_crc, block_nbytes) if block_crcs else block_crc
                    block_crcs.append(block_crc)
                    block_crc = block_nbytes = 0
        if block_nbytes:
            crc = digest.combine(crc, block_crc, block_nbytes) if block_crcs else block_crc
            block_crcs.append(block_crc)
        yield record.record_footer(layout, crc)
        position = item.record_offset + item.record_nbytes
        written.append(WrittenTensor(item, crc, tuple(block_crcs)))
    yield bytes(align(position, LARGE_ALIGNMENT) - position)


def _image_of(group: _Group, source: BlockSource, written: list[WrittenTensor]) -> memoryview:
    """Return the bytes of a group of small records as one piece, since passing on four per record takes longer."""
    image = memoryview(bytearray(align(group.nbytes, LARGE_ALIGNMENT)))
    for item in group.items:
        position = item.data_offset - group.start
        for data in source.blocks(item):
            image[position : position + len(data)] = data
            position += len(data)
    _complete_image(group, image, written, group.start)
    return image


def _complete_image(group: _Group, image: memoryview, written: list[WrittenTensor], base: int = 0) -> int:
    """Fill headers, footers and zeros around data in place; returns the end of the group in the file.

    ``base`` is the offset in the file at which ``image`` begins.
    """
    position = group.start - base
    for item in group.items:
        layout = record.tensor_record(item.dtype, item.box.sizes)
        record_start, data_start = item.record_offset - base, item.data_offset - base
        if position < record_start:
            image[position:record_start] = bytes(record_start - position)
        image[record_start:data_start] = layout.header
        end = data_start + item.data_nbytes
        crc, block_crcs = 0, []
        for start in range(data_start, end, BLOCK_NBYTES):
            block = image[start : min(start + BLOCK_NBYTES, end)]
            block_crcs.append(digest.crc32(block))
            crc = digest.combine(crc, block_crcs[-1], block.nbytes) if start > data_start else block_crcs[-1]
        position = record_start + item.record_nbytes
        image[end:position] = record.record_footer(layout, crc)
        written.append(WrittenTensor(item, crc, tuple(block_crcs)))
    stop = align(position, LARGE_ALIGNMENT)
    image[position:stop] = bytes(stop - position)
    return base + stop
