"""One rank's file, written at the speed of the disk: headers, raw data and footers in one pass, digests on the way.

The whole layout is known before the first byte (``plan``), and a record's CRC stands behind its data, so data is
touched once: digested block by block, then written while it is still in the cache. Where the storage asks for aligned
writes (O_DIRECT), bytes go through one aligned buffer per thread; elsewhere straight from the caller's memory.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from milepost.collective.threads import map_in_threads
from milepost.format import digest, record
from milepost.format.manifest import BLOCK_NBYTES
from milepost.run.signoff import WrittenFile, WrittenObject, WrittenTensor
from milepost.storage.base import Bytes, Storage, WriteHandle
from milepost.tensors.plan import LARGE_ALIGNMENT, SMALL_ALIGNMENT, WriteItem, WritePlan, align

GROUP_NBYTES = 16 << 20
"""Threads take the file in groups of records of about this size."""
BUFFER_NBYTES = 8 << 20
"""Aligned buffer of each thread, used where the storage asks for aligned writes."""
PIECE_NBYTES = 512 << 10
"""Data is digested and handed on in pieces of this size, which stay in a core's second-level cache in between."""


class BlockSource(Protocol):
    """Where the bytes of planned items come from. Called from several threads, for different items."""

    def blocks(self, item: WriteItem) -> Iterator[memoryview]:
        """The item's raw row-major bytes in blocks of ``BLOCK_NBYTES`` (the last may be shorter).

        A block is valid until the next one is asked for.
        """


@dataclass(frozen=True, slots=True, eq=False)
class FileImage:
    """A whole file in memory: the raw data of every planned item stands at its offset. The rest is filled in here.

    ``memory`` is page-aligned and at least ``plan.objects_offset`` long.
    """

    memory: memoryview


@dataclass(frozen=True, slots=True)
class _Group:
    start: int
    items: tuple[WriteItem, ...]

    @property
    def nbytes(self) -> int:
        return self.items[-1].record_offset + self.items[-1].record_nbytes - self.start


def write_file(
    storage: Storage,
    folder: str,
    plan: WritePlan,
    source: BlockSource | FileImage,
    objects: Mapping[str, bytes],
    *,
    num_threads: int = 2,
    on_progress: Callable[[int], None] | None = None,
) -> WrittenFile:
    """Write and sync the file of ``plan`` in ``folder``; the folder's own sync is the caller's.

    Memory beside the source: ``BUFFER_NBYTES`` a thread. ``on_progress`` is told the bytes of each group that is
    written, from any thread.

    Raises:
        StorageError: the first failure on any thread. The file is left as it is, for the caller to sweep.
    """
    placed, end = _place_objects(plan, objects)
    nbytes = align(end, LARGE_ALIGNMENT)
    groups = _groups(plan.items)
    with storage.open_write(f"{folder}/{plan.file}", nbytes) as handle:
        tensors = _write_groups(handle, groups, source, num_threads, on_progress)
        stream = _open_stream(handle, plan.objects_offset, _aligned_buffer(handle))
        for written in placed:
            stream.skip_to(written.record_offset)
            stream.put(objects[written.key])
        stream.finish()
        handle.sync()
    return WrittenFile(plan.file, nbytes, tensors, placed)


def _place_objects(plan: WritePlan, objects: Mapping[str, bytes]) -> tuple[tuple[WrittenObject, ...], int]:
    """Where each object's record goes, and where the last one ends."""
    placed = []
    offset = plan.objects_offset
    for key in plan.objects:
        data = objects[key]
        offset = align(offset, SMALL_ALIGNMENT)
        placed.append(WrittenObject(key, offset, len(data), digest.crc32(data)))
        offset += len(data)
    return tuple(placed), offset


def _groups(items: Sequence[WriteItem]) -> list[_Group]:
    """Cut the file where a record starts on a disk block, every ``GROUP_NBYTES`` or so."""
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


def _write_groups(
    handle: WriteHandle,
    groups: Sequence[_Group],
    source: BlockSource | FileImage,
    num_threads: int,
    on_progress: Callable[[int], None] | None,
) -> tuple[WrittenTensor, ...]:
    local = threading.local()

    def work(group: _Group) -> list[WrittenTensor]:
        if isinstance(source, FileImage):
            written = _write_image(handle, group, source.memory)
        else:
            if not hasattr(local, "buffer"):
                local.buffer = _aligned_buffer(handle)
            written = _write_group(handle, group, source, local.buffer)
        if on_progress is not None:
            on_progress(group.nbytes)
        return written

    batches = map_in_threads(work, groups, num_threads, name="milepost-write")
    return tuple(written for batch in batches for written in batch)


def _write_group(
    handle: WriteHandle, group: _Group, source: BlockSource, buffer: mmap.mmap | None
) -> list[WrittenTensor]:
    stream = _open_stream(handle, group.start, buffer)
    written = []
    for item in group.items:
        layout = record.tensor_record(item.dtype, item.box.sizes)
        stream.skip_to(item.record_offset)
        stream.put(layout.header)
        crc = 0
        block_crcs: list[int] = []
        for block in source.blocks(item):
            block_crc = 0
            for start in range(0, len(block), PIECE_NBYTES):
                piece = block[start : start + PIECE_NBYTES]
                block_crc = digest.crc32(piece, block_crc)
                stream.put(piece)
            crc = digest.combine(crc, block_crc, block.nbytes) if block_crcs else block_crc
            block_crcs.append(block_crc)
        stream.put(record.record_footer(layout, crc))
        written.append(WrittenTensor(item, crc, tuple(block_crcs)))
    stream.finish()
    return written


def _write_image(handle: WriteHandle, group: _Group, image: memoryview) -> list[WrittenTensor]:
    """Put headers, footers and zeros around the data that is in place, and write the group as it stands."""
    written = []
    position = group.start
    for item in group.items:
        layout = record.tensor_record(item.dtype, item.box.sizes)
        image[position : item.record_offset] = bytes(item.record_offset - position)
        image[item.record_offset : item.data_offset] = layout.header
        end = item.data_offset + item.data_nbytes
        crc, block_crcs = 0, []
        for start in range(item.data_offset, end, BLOCK_NBYTES):
            block = image[start : min(start + BLOCK_NBYTES, end)]
            block_crcs.append(digest.crc32(block))
            crc = digest.combine(crc, block_crcs[-1], block.nbytes) if start > item.data_offset else block_crcs[-1]
        position = item.record_offset + item.record_nbytes
        image[end:position] = record.record_footer(layout, crc)
        written.append(WrittenTensor(item, crc, tuple(block_crcs)))
    stop = align(position, LARGE_ALIGNMENT)
    image[position:stop] = bytes(stop - position)
    for start in range(group.start, stop, BUFFER_NBYTES):
        handle.write(start, [image[start : min(start + BUFFER_NBYTES, stop)]])
    return written


def _aligned_buffer(handle: WriteHandle) -> mmap.mmap | None:
    return mmap.mmap(-1, BUFFER_NBYTES) if handle.alignment > 1 else None


def _open_stream(handle: WriteHandle, offset: int, buffer: mmap.mmap | None) -> _PlainStream | _AlignedStream:
    if buffer is None:
        return _PlainStream(handle, offset)
    return _AlignedStream(handle, offset, buffer)


class _PlainStream:
    """Consecutive writes from the caller's memory: small pieces are held back and go out with the next large one."""

    HOLD_NBYTES = 256 << 10

    def __init__(self, handle: WriteHandle, offset: int):
        self._handle = handle
        self._offset = offset  # where the first held piece goes
        self._held: list[Bytes] = []
        self._held_nbytes = 0

    def put(self, data: Bytes) -> None:
        self._held.append(data)
        self._held_nbytes += len(data)
        # A block of the source is only valid now, so anything large is written at once.
        if isinstance(data, memoryview) or self._held_nbytes > self.HOLD_NBYTES:
            self._flush()

    def skip_to(self, offset: int) -> None:
        gap = offset - self._offset - self._held_nbytes
        if gap:
            self.put(bytes(gap))

    def finish(self) -> None:
        self.skip_to(align(self._offset + self._held_nbytes, LARGE_ALIGNMENT))
        self._flush()

    def _flush(self) -> None:
        if self._held:
            self._handle.write(self._offset, self._held)
            self._offset += self._held_nbytes
            self._held, self._held_nbytes = [], 0


class _AlignedStream:
    """Consecutive writes through one aligned buffer, so that every one is whole disk blocks."""

    def __init__(self, handle: WriteHandle, offset: int, buffer: mmap.mmap):
        self._handle = handle
        self._offset = offset  # of the start of the buffer
        self._memory = memoryview(buffer)
        self._array = np.frombuffer(buffer, dtype=np.uint8)
        self._fill = 0

    def put(self, data: Bytes) -> None:
        src = np.frombuffer(data, dtype=np.uint8)
        taken = 0
        while taken < len(src):
            count = min(len(src) - taken, len(self._array) - self._fill)
            # numpy copies without the GIL; slice assignment of a memoryview would hold it.
            np.copyto(self._array[self._fill : self._fill + count], src[taken : taken + count])
            self._fill += count
            taken += count
            if self._fill == len(self._array):
                self._flush()

    def skip_to(self, offset: int) -> None:
        gap = offset - self._offset - self._fill
        if gap:
            self.put(bytes(gap))

    def finish(self) -> None:
        self.skip_to(align(self._offset + self._fill, LARGE_ALIGNMENT))
        self._flush()

    def _flush(self) -> None:
        if self._fill:
            self._handle.write(self._offset, [self._memory[: self._fill]])
            self._offset += self._fill
            self._fill = 0
