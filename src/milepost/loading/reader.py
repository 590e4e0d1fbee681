"""Stored shards into tensors: ranged reads in parallel, and every byte that lands is digested first or on the way.

Data is digested in blocks of 4 MiB, so only whole blocks are read. Where the wanted region is one run in the file and
one in memory, blocks go straight into the destination; blocks that stick out of the region, and regions that are
strided or of another dtype, go through a bounded buffer.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS
from milepost.errors import DigestMismatchError, FormatError
from milepost.format import digest, record
from milepost.format.box import Box, contiguous_runs, cut_into_slabs
from milepost.format.digest import BlockDigests
from milepost.format.manifest import BLOCK_NBYTES, Manifest, ObjectEntry, ShardEntry
from milepost.saving.stage import tensor_bytes
from milepost.storage.base import ReadHandle, Storage
from milepost.tensors.layout import TensorLeaf, dtype_name
from milepost.tensors.plan import ReadItem
from milepost.tensors.state import decode_object

TASK_NBYTES = 32 << 20
"""Straight reads are cut into tasks of this size for the threads."""
SLAB_NBYTES = 8 << 20
"""Regions that go through the buffer are taken in slabs of at most about this size (and the blocks they touch)."""
MERGE_GAP_NBYTES = 64 << 10
MERGE_NBYTES = 8 << 20
"""Small records with gaps of at most the first between them are read at once, up to the second."""


def digest_mismatch(path: str, key: str, byte_range: tuple[int, int], expected: int, found: int) -> DigestMismatchError:
    return DigestMismatchError(
        f"{path}: bytes {byte_range[0]} to {byte_range[1]}, of '{key}', changed after they were written "
        f"(CRC-32 {found:08x}, recorded {expected:08x}); run `milepost verify` on the checkpoint",
        path=path,
        key=key,
        byte_range=byte_range,
        expected=expected,
        found=found,
    )


@dataclass(frozen=True, slots=True)
class ReadStats:
    """What a read moved. ``wanted_nbytes`` landed in tensors; ``read_nbytes`` came from the storage."""

    wanted_nbytes: int
    read_nbytes: int


def read_tensors(
    storage: Storage,
    folder: str,
    items: Sequence[ReadItem],
    leaves: Mapping[str, TensorLeaf],
    digests: BlockDigests | None,
    *,
    num_threads: int = NUM_IO_THREADS,
    on_progress: Callable[[int], None] | None = None,
) -> ReadStats:
    """Fill the leaves' tensors with the planned regions, checking digests.

    ``digests`` is None for a checkpoint that stock DCP wrote: then a shard that is read whole is checked against the
    CRC-32 of its zip record, where it has one, and partial reads are not checked. ``on_progress`` is told the bytes
    read so far, by one thread at a time.

    Raises:
        DigestMismatchError: stored bytes changed; names file, key and byte range. Some tensors may be filled already.
        FormatError: a record's header or footer is not what its manifest entry implies.
        StorageError: a read failed or came short.
    """
    session = _Session(digests.block_nbytes if digests is not None else BLOCK_NBYTES, on_progress)
    with ExitStack() as stack:
        handles = {
            file: stack.enter_context(storage.open_read(f"{folder}/{file}" if folder else file))
            for file in sorted({item.shard.file for item in items})
        }
        tasks = [
            task
            for item in items
            for task in _tasks(item, handles[item.shard.file], leaves[item.leaf], digests, session)
        ]
        map_in_threads(lambda task: task.run(), tasks, num_threads, name="milepost-read")
    wanted = sum(item.src.numel * leaves[item.leaf].local.element_size() for item in items)
    return ReadStats(wanted, session.read_nbytes)


class _Session:
    """What the tasks of one read share: the count of bytes read, and one buffer for each thread."""

    def __init__(self, block_nbytes: int, on_progress: Callable[[int], None] | None) -> None:
        self.block_nbytes = block_nbytes
        self._on_progress = on_progress
        self.read_nbytes = 0
        self._lock = threading.Lock()
        self._local = threading.local()

    def count(self, nbytes: int) -> None:
        with self._lock:
            self.read_nbytes += nbytes
            if self._on_progress is not None:
                self._on_progress(self.read_nbytes)

    def buffer(self, nbytes: int) -> memoryview:
        """This thread's buffer, at least ``nbytes`` long. Kept: memory that is touched for the first time is slow."""
        held: bytearray | None = getattr(self._local, "buffer", None)
        if held is None or len(held) < nbytes:
            held = self._local.buffer = bytearray(max(nbytes, SLAB_NBYTES + 2 * self.block_nbytes))
        return memoryview(held)


@dataclass(frozen=True, slots=True)
class _Stored:
    """One stored shard, and how its blocks are read and checked."""

    key: str
    dtype: str
    shard: ShardEntry
    handle: ReadHandle
    data_offset: int
    block_crcs: Sequence[int] | None
    session: _Session

    def block_range(self, start: int, stop: int) -> range:
        """The blocks that hold the data bytes ``[start, stop)`` of the shard."""
        return range(start // self.session.block_nbytes, -(-stop // self.session.block_nbytes))

    def bounds(self, block: int) -> tuple[int, int]:
        """The data bytes of a block, half-open, within the shard's data."""
        start = block * self.session.block_nbytes
        return start, min(start + self.session.block_nbytes, self.shard.data_nbytes)

    def read(self, start: int, into: memoryview) -> None:
        """Read data bytes from ``start`` on, unchecked."""
        self.handle.read_into(self.data_offset + start, [into])
        self.session.count(len(into))

    def read_block(self, block: int, into: memoryview) -> None:
        """Read one whole block and check it. ``into`` is exactly as long as the block."""
        start, stop = self.bounds(block)
        self.read(start, into)
        if self.block_crcs is not None:
            self.check(start, stop, self.block_crcs[block], digest.crc32(into))

    def check(self, start: int, stop: int, expected: int, found: int) -> None:
        """Compare a digest of the data bytes ``[start, stop)``."""
        if expected != found:
            low, high = self.data_offset + start, self.data_offset + stop
            raise digest_mismatch(self.handle.path, self.key, (low, high), expected, found)

    def check_frame(self) -> None:
        """Compare the record's header and footer with what its entry implies. Only for records of our own layout."""
        if self.block_crcs is None or self.shard.crc32 is None:
            return
        layout = record.tensor_record(self.dtype, self.shard.box.sizes)
        footer = record.record_footer(layout, self.shard.crc32)
        found = bytearray(len(layout.header) + len(footer))
        view = memoryview(found)
        self.handle.read_into(self.shard.record_offset, [view[: len(layout.header)]])
        self.handle.read_into(
            self.shard.record_offset + layout.data_offset + layout.data_nbytes, [view[len(layout.header) :]]
        )
        self.session.count(len(found))
        if found != layout.header + footer:
            raise FormatError(
                f"{self.handle.path}: the record of '{self.key}' at byte {self.shard.record_offset} has a damaged "
                "header or footer; run `milepost verify` on the checkpoint",
                path=self.handle.path,
                key=self.key,
            )


def _tasks(
    item: ReadItem, handle: ReadHandle, leaf: TensorLeaf, digests: BlockDigests | None, session: _Session
) -> Iterator[_Task]:
    target = leaf.view(item.piece)[item.dst.index()]
    if item.shard.data_offset is None:
        yield _Unpickled(item, handle, target, session)
        return
    crcs = digests.of_shard(item.key, item.shard_index) if digests is not None else None
    stored = _Stored(item.key, item.dtype, item.shard, handle, item.shard.data_offset, crcs, session)
    runs = contiguous_runs(item.src, item.shard.box.sizes)
    start, stop = next(runs, (0, 0))
    is_one_run = next(runs, None) is None
    if not is_one_run or not _is_plain_memory(target, item.dtype):
        yield _Buffered(stored, item, target)
        return
    memory = tensor_bytes(target)
    itemsize = target.element_size()
    low, high = start * itemsize, stop * itemsize
    # The CRC of a foreign record is of all its data, so it can only be checked by one task.
    step = TASK_NBYTES if crcs is not None else max(high - low, 1)
    first = low - low % session.block_nbytes if crcs is not None else low
    for begin in range(first, high, step):
        cut, end = max(low, begin), min(high, begin + step)
        yield _Direct(stored, memory[cut - low : end - low], cut, check_frame=begin == first)


def _is_plain_memory(target: torch.Tensor, stored_dtype: str) -> bool:
    return target.device.type == "cpu" and target.is_contiguous() and dtype_name(target.dtype) == stored_dtype


@dataclass(frozen=True, slots=True)
class _Direct:
    """Data bytes ``[start, start + len(memory))`` of a shard go straight into ``memory``."""

    stored: _Stored
    memory: memoryview
    start: int
    check_frame: bool

    def run(self) -> None:
        if self.stored.block_crcs is None:
            self._read_foreign()
            return
        if self.check_frame:
            self.stored.check_frame()
        stop = self.start + len(self.memory)
        for block in self.stored.block_range(self.start, stop):
            low, high = self.stored.bounds(block)
            if self.start <= low and high <= stop:
                self.stored.read_block(block, self.memory[low - self.start : high - self.start])
                continue
            # A block that sticks out of the region: all of it is checked, the common part lands.
            first, last = max(low, self.start), min(high, stop)
            bounce = self.stored.session.buffer(high - low)[: high - low]
            self.stored.read_block(block, bounce)
            self.memory[first - self.start : last - self.start] = bounce[first - low : last - low]

    def _read_foreign(self) -> None:
        crc = 0
        for begin in range(0, len(self.memory), BLOCK_NBYTES):
            view = self.memory[begin : begin + BLOCK_NBYTES]
            self.stored.read(self.start + begin, view)
            crc = digest.crc32(view, crc)
        shard = self.stored.shard
        if shard.crc32 is not None and len(self.memory) == shard.data_nbytes:
            self.stored.check(0, shard.data_nbytes, shard.crc32, crc)


@dataclass(frozen=True, slots=True)
class _Buffered:
    """A region that is strided, of another dtype or on another device: slab by slab through a buffer."""

    stored: _Stored
    item: ReadItem
    target: torch.Tensor

    def run(self) -> None:
        self.stored.check_frame()
        sizes = self.item.shard.box.sizes
        dtype = getattr(torch, self.item.dtype)
        blocks = _SlidingBlocks(self.stored)
        # Slabs are whole rows of the stored shard: what lies between two wanted columns is read anyway.
        for slab in cut_into_slabs(sizes, dtype.itemsize, SLAB_NBYTES):
            common = slab.box.intersect(self.item.src)
            if common is None:
                continue
            rows = _rows(slab.box, common)
            start, stop = next(contiguous_runs(rows, sizes))
            data = blocks.read(start * dtype.itemsize, stop * dtype.itemsize)
            src = torch.frombuffer(data, dtype=dtype).view(rows.sizes)
            self.target[common.relative_to(self.item.src).index()].copy_(src[common.relative_to(rows).index()])


@dataclass(frozen=True, slots=True)
class _Unpickled:
    """A foreign record whose storage is not row-major: torch's restricted unpickler loads it whole."""

    item: ReadItem
    handle: ReadHandle
    target: torch.Tensor
    session: _Session

    def run(self) -> None:
        data = bytearray(self.item.shard.record_nbytes)
        self.handle.read_into(self.item.shard.record_offset, [memoryview(data)])
        self.session.count(len(data))
        tensor = decode_object(self.item.key, data, self.handle.path)
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != self.item.shard.box.sizes:
            raise FormatError(
                f"{self.handle.path}: the record of '{self.item.key}' does not hold a tensor of shape "
                f"{list(self.item.shard.box.sizes)}",
                path=self.handle.path,
                key=self.item.key,
            )
        self.target.copy_(tensor[self.item.src.index()])


_Task = _Direct | _Buffered | _Unpickled


def _rows(slab: Box, common: Box) -> Box:
    """The smallest run of whole rows of ``slab`` that contains ``common``: contiguous in row-major order.

    ``slab`` is cut along one dim: those before it have size 1, those after it are whole.
    """
    cut = next((dim for dim, size in enumerate(slab.sizes) if size > 1), len(slab.sizes))
    if cut == len(slab.sizes):
        return slab
    return Box(
        (*slab.offsets[:cut], common.offsets[cut], *slab.offsets[cut + 1 :]),
        (*slab.sizes[:cut], common.sizes[cut], *slab.sizes[cut + 1 :]),
    )


class _SlidingBlocks:
    """Whole checked blocks of one shard; a block that two consecutive reads share is read once."""

    def __init__(self, stored: _Stored):
        self._stored = stored
        self._held = range(0)

    def read(self, start: int, stop: int) -> memoryview:
        """The data bytes ``[start, stop)`` of the shard, valid until the next call. Reads must ascend."""
        stored = self._stored
        blocks = stored.block_range(start, stop)
        base = stored.bounds(blocks.start)[0]
        memory = stored.session.buffer(stored.bounds(blocks[-1])[1] - base)
        for block in blocks:
            low, high = stored.bounds(block)
            if block in self._held:  # it was the last one: move it to the front
                old = low - stored.bounds(self._held.start)[0]
                memory[low - base : high - base] = memory[old : old + high - low]
            else:
                stored.read_block(block, memory[low - base : high - base])
        self._held = blocks
        return memory[start - base : stop - base]


def read_objects(storage: Storage, folder: str, manifest: Manifest, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The values of ``keys`` that are not tensors. Records that lie close together are read at once.

    Raises:
        DigestMismatchError: a record changed after it was written.
        FormatError: a record is malformed, or would run code.
    """
    entries = sorted((manifest.objects[key].file, manifest.objects[key].record_offset, key) for key in keys)
    for file, group in itertools.groupby(entries, key=lambda entry: entry[0]):
        key_at = {offset: key for _, offset, key in group}
        with storage.open_read(f"{folder}/{file}" if folder else file) as handle:
            for run in _merged([manifest.objects[key] for key in key_at.values()]):
                yield from _read_run(handle, run, key_at)


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


def _read_run(handle: ReadHandle, run: Sequence[ObjectEntry], key_at: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    base = run[0].record_offset
    data = memoryview(bytearray(run[-1].record_offset + run[-1].record_nbytes - base))
    handle.read_into(base, [data])
    for entry in run:
        key = key_at[entry.record_offset]
        raw = data[entry.record_offset - base : entry.record_offset - base + entry.record_nbytes]
        if entry.crc32 is not None and (found := digest.crc32(raw)) != entry.crc32:
            stop = entry.record_offset + entry.record_nbytes
            raise digest_mismatch(handle.path, key, (entry.record_offset, stop), entry.crc32, found)
        yield key, decode_object(key, raw, handle.path)
