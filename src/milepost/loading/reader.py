"""Read stored shards into tensors: parallel ranged reads, with a digest of every byte.

Digests cover blocks of 4 MiB, and complete blocks are read. A region that is contiguous in the file and in memory is
read directly into its place; regions that are strided, on another device or of another dtype are copied block by block
through a buffer.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import call
from types import TracebackType
from typing import Self

import numpy as np
import torch

from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS
from milepost.errors import FormatError
from milepost.format.box import boxes_of_run
from milepost.format.digest import BlockDigests
from milepost.format.manifest import BLOCK_NBYTES
from milepost.saving.stage import tensor_bytes
from milepost.storage.base import ReadHandle, Storage, join
from milepost.storage.open_files import OpenFiles
from milepost.storage.syscalls import map_pages
from milepost.tensors.devices import devices_of, wait_for_devices
from milepost.tensors.layout import TensorLeaf, dtype_name, torch_dtype
from milepost.tensors.read_plan import ReadItem
from milepost.tensors.value_reader import decode_object
from milepost.verification.block_reader import BlockReader, shard_reader
from milepost.verification.external import locate_shards

TASK_NBYTES = 32 << 20
"""Approximate size of a thread's task in bytes."""
SMALL_NBYTES = 64 << 10
"""Maximum size of shards that are read together with their neighbours."""
GROUP_NBYTES = 1 << 20
GAP_NBYTES = 4 << 10
"""Maximum gap between neighbours, which is read unnecessarily."""

Task = Callable[[], None]


@dataclass(frozen=True, slots=True)
class ReadStats:
    """Bytes moved by reads: ``wanted_nbytes`` into tensors, ``read_nbytes`` from the storage in whole blocks."""

    wanted_nbytes: int = 0
    read_nbytes: int = 0

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(self.wanted_nbytes + other.wanted_nbytes, self.read_nbytes + other.read_nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class HandedBlocks:
    """This rank's blocks in a shared read, by their numbers in the order of ``milepost.digests``."""

    digests: BlockDigests
    numbers: frozenset[int]
    mine: frozenset[int] = frozenset()
    """The blocks that this rank reads, for itself and others."""

    def number(self, item: ReadItem, low: int) -> int:
        """Return the number of the block that begins at byte ``low`` of an item's shard."""
        start, bounds = self.digests.starts[item.key]
        return start + bounds[item.shard_index] + low // self.digests.block_nbytes

    def reads(self, item: ReadItem, low: int) -> bool:
        """Return whether this rank reads that block."""
        return self.number(item, low) in self.mine


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """An item's part of block ``[low, high)``. ``memory`` is the target's, if copying bytes suffices."""

    item: ReadItem
    target: torch.Tensor
    memory: memoryview | None
    low: int
    high: int


class TensorReads:
    """The reads that fill planned regions, as tasks for threads that also check the data. A context manager.

    ``digests`` is None for a checkpoint that stock DCP wrote: then a shard is checked against the CRC-32 of its zip
    record, if any, only if this rank reads it completely. ``on_read`` is called with the bytes of each read, from any
    thread. The tasks raise what :func:`read_tensors` does.

    Shared blocks (``handed``) are in no task: :meth:`read_block` reads one that is assigned to this rank, and
    :meth:`take_block` copies the bytes of one to their targets. Files that are not read here are not opened.
    ``is_new`` tells that the tensors were created for this load, so that nothing was written into them yet.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        items: Sequence[ReadItem],
        leaves: Mapping[str, TensorLeaf],
        digests: BlockDigests | None,
        *,
        on_read: Callable[[int], None] | None = None,
        handed: HandedBlocks | None = None,
        is_new: bool = False,
    ):
        self._leaves = leaves
        self._is_new = is_new
        self._handed = handed
        self._wanted_at: dict[int, list[_Wanted]] = {}  # by the number of a shared block
        self._digests = digests
        self._block_nbytes = digests.block_nbytes if digests is not None else BLOCK_NBYTES
        self._on_read = on_read
        self._lock = threading.Lock()
        self._local = threading.local()
        self._readers: dict[tuple[str, int], BlockReader] = {}
        self._wanted_nbytes = sum(item.src.numel * leaves[item.leaf].local.element_size() for item in items)
        self._read_nbytes = 0
        if digests is None:  # external: planned first, so that only records to be read are located
            shards = locate_shards(storage, folder, [(item.key, item.dtype, item.shard) for item in items])
            items = [replace(item, shard=shard) for item, shard in zip(items, shards, strict=True)]
        with ExitStack() as closing:
            self._files = closing.enter_context(OpenFiles(storage))
            by_file = itertools.groupby(sorted(items, key=lambda item: item.shard.file), lambda item: item.shard.file)
            self.tasks = [task for file, group in by_file for task in self._open(join(folder, file), group)]
            closing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._files.close()

    def _open(self, name: str, items: Iterable[ReadItem]) -> Iterator[Task]:
        items = [item for item in items if item.src.numel]
        if self._handed is not None and not self._note_handed(items, self._handed):
            return
        handle = self._files.open(name)
        ranges: list[tuple[int, int]] = []
        rest = items
        if self._digests is not None and self._handed is None:
            rest = [item for item in items if not self._is_small(item)]
            for group in _neighbours(item for item in items if self._is_small(item)):
                ranges.append((group[0].shard.record_offset, _end(group[-1])))
                yield partial(self._read_neighbours, handle, group)
        for item in rest:
            yield from self._tasks(item, handle, ranges)
        handle.will_read(sorted(ranges))

    def _is_small(self, item: ReadItem) -> bool:
        return item.is_whole and item.shard.data_nbytes <= min(SMALL_NBYTES, self._block_nbytes)

    def _read_neighbours(self, handle: ReadHandle, items: Sequence[ReadItem]) -> None:
        """Read small adjacent shards of a file at once, and check and copy each."""
        begin = items[0].shard.record_offset
        data = self._buffer()[: _end(items[-1]) - begin]
        handle.read_into(begin, [data])
        for item in items:
            shard = item.shard
            reader = shard_reader(handle, item.key, item.dtype, shard, item.shard_index, self._digests, self._count)
            stored = reader.check_record(data[shard.record_offset - begin : _end(item) - begin])
            values = torch.frombuffer(stored, dtype=torch_dtype(item.dtype)).view(shard.box.sizes)
            self._target_of(item).copy_(values)

    def _note_handed(self, items: Sequence[ReadItem], handed: HandedBlocks) -> bool:
        """Record the items' parts of shared blocks; return whether this rank reads anything of the items' file."""
        reads_any = False
        for item in items:
            target = self._target_of(item)
            memory = tensor_bytes(target) if item.is_one_run and _is_plain_memory(target, item.dtype) else None
            for low, high in item.blocks(self._block_nbytes):
                number = handed.number(item, low)
                if number in handed.numbers:
                    self._wanted_at.setdefault(number, []).append(_Wanted(item, target, memory, low, high))
                reads_any = reads_any or number not in handed.numbers or number in handed.mine
        return reads_any

    def read_block(self, number: int, into: memoryview) -> None:
        """Read and check a block that is assigned to this rank."""
        wanted = self._wanted_at[number][0]
        self._readers[wanted.item.key, wanted.item.shard_index].read(wanted.low, into, self._buffer)

    def take_block(self, number: int, data: memoryview) -> None:
        """Copy a block, read here or by another rank, to its targets."""
        for wanted in self._wanted_at[number]:
            if wanted.memory is None:
                _scatter(wanted.item, wanted.target, wanted.low, data)
                continue
            start, stop = wanted.item.run
            first, last = max(wanted.low, start), min(wanted.high, stop)
            src = np.frombuffer(data, np.uint8)[first - wanted.low : last - wanted.low]
            np.copyto(np.frombuffer(wanted.memory, np.uint8)[first - start : last - start], src)

    def _target_of(self, item: ReadItem) -> torch.Tensor:
        """The memory of one region, with its dims in the stored order."""
        target = self._leaves[item.leaf].view(item.piece)[item.dst.index()]
        return target.transpose(-1, -2) if item.is_transposed else target

    def _tasks(self, item: ReadItem, handle: ReadHandle, ranges: list[tuple[int, int]]) -> Iterator[Task]:
        """Return the tasks that fill one region, and add the ranges of the file that they read to ``ranges``."""
        target, shard = self._target_of(item), item.shard
        if shard.data_offset is None:
            ranges.append((shard.record_offset, shard.record_offset + shard.record_nbytes))
            yield partial(self._unpickle, item, handle, target)
            return
        reader = self._readers.get((item.key, item.shard_index))
        if reader is None:
            reader = shard_reader(handle, item.key, item.dtype, shard, item.shard_index, self._digests, self._count)
            self._readers[item.key, item.shard_index] = reader
        start, stop = item.run
        is_straight = item.is_one_run and _is_plain_memory(target, item.dtype)
        memory = tensor_bytes(target) if is_straight else None
        if self._handed is not None:
            mine = (block for block in item.blocks(self._block_nbytes) if self._handed.reads(item, block[0]))
            ranges.extend(reader.file_range(low, high) for low, high in mine)
        for low, high in _batches(self._own_blocks(item)):
            first, last = max(low, start), min(high, stop)
            ranges.append(reader.file_range(low, high) if self._digests is not None else reader.file_range(first, last))
            if memory is not None:
                read = (
                    partial(self._read_into_new, reader) if self._is_new else partial(reader.read, spare=self._buffer)
                )
                yield partial(read, first, memory[first - start : last - start])
            else:
                yield partial(reader.read_through, low, high, self._buffer, partial(_scatter, item, target))

    def _read_into_new(self, reader: BlockReader, start: int, into: memoryview) -> None:
        """Read into new memory. Its pages are mapped just before the block that they hold is read."""
        stop, low = start + len(into), start
        while low < stop:
            high = min(low - low % self._block_nbytes + self._block_nbytes, stop)
            part = into[low - start : high - start]
            map_pages(part)
            reader.read(low, part, self._buffer)
            low = high

    def _own_blocks(self, item: ReadItem) -> Iterator[tuple[int, int]]:
        """The blocks of an item that this rank reads only for itself."""
        for low, high in item.blocks(self._block_nbytes):
            if self._handed is None or self._handed.number(item, low) not in self._handed.numbers:
                yield low, high

    @property
    def stats(self) -> ReadStats:
        """The bytes that the tasks have moved so far."""
        return ReadStats(self._wanted_nbytes, self._read_nbytes)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._read_nbytes += nbytes
        if self._on_read is not None:
            self._on_read(nbytes)

    def _buffer(self) -> memoryview:
        """This thread's buffer for a block or a group of small ones, reused because touching fresh memory is slow."""
        held: bytearray | None = getattr(self._local, "buffer", None)
        if held is None:
            held = self._local.buffer = bytearray(max(self._block_nbytes, GROUP_NBYTES))
        return memoryview(held)

    def _unpickle(self, item: ReadItem, handle: ReadHandle, target: torch.Tensor) -> None:
        """Load an external record whose storage is not row-major with torch's restricted unpickler."""
        data = bytearray(item.shard.record_nbytes)
        handle.read_into(item.shard.record_offset, [memoryview(data)])
        self._count(len(data))
        tensor = decode_object(item.key, data, handle.path)
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != item.shard.box.sizes:
            raise FormatError(
                f"{handle.path}: expected a tensor of shape {list(item.shard.box.sizes)} in the record of "
                f"'{item.key}', found something else",
                path=handle.path,
                key=item.key,
            )
        target.copy_(tensor[item.src.index()])


def _end(item: ReadItem) -> int:
    return item.shard.record_offset + item.shard.record_nbytes


def _neighbours(items: Iterable[ReadItem]) -> Iterator[list[ReadItem]]:
    """Group items to read at once: ascending, with small gaps and a bounded total."""
    group: list[ReadItem] = []
    for item in items:
        start = item.shard.record_offset
        if group and not (
            0 <= start - _end(group[-1]) <= GAP_NBYTES and _end(item) - group[0].shard.record_offset <= GROUP_NBYTES
        ):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _batches(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Group adjacent blocks to about ``TASK_NBYTES``."""
    start = stop = 0
    for low, high in blocks:
        if low != stop or stop - start >= TASK_NBYTES:
            if start < stop:
                yield start, stop
            start = low
        stop = high
    if start < stop:
        yield start, stop


def _scatter(item: ReadItem, target: torch.Tensor, low: int, data: memoryview) -> None:
    """Copy the requested part of the shard's data, which begins at byte ``low``, to its place."""
    dtype = torch_dtype(item.dtype)
    start, position = low // dtype.itemsize, 0
    for box in boxes_of_run(start, start + len(data) // dtype.itemsize, item.shard.box.sizes):
        common = box.intersect(item.src)
        if common is not None:
            values = torch.frombuffer(data, dtype=dtype, count=box.numel, offset=position).view(box.sizes)
            target[common.relative_to(item.src).index()].copy_(values[common.relative_to(box).index()])
        position += box.numel * dtype.itemsize


def _is_plain_memory(target: torch.Tensor, stored_dtype: str) -> bool:
    return target.device.type == "cpu" and target.is_contiguous() and dtype_name(target.dtype) == stored_dtype


def read_tensors(
    storage: Storage,
    folder: str,
    items: Sequence[ReadItem],
    leaves: Mapping[str, TensorLeaf],
    digests: BlockDigests | None,
    *,
    num_threads: int = NUM_IO_THREADS,
) -> ReadStats:
    """Fill the leaves' tensors with the planned regions, checking digests: see :class:`TensorReads`.

    Raises:
        DigestMismatchError: stored bytes changed; names file, key and byte range. Some tensors may be filled already.
        FormatError: a record's header or footer is not what its manifest entry implies.
        StorageError: a read failed or was short.
    """
    devices = devices_of(leaf.local for leaf in leaves.values())
    wait_for_devices(devices)
    with TensorReads(storage, folder, items, leaves, digests) as reads:
        map_in_threads(call, reads.tasks, num_threads, name="milepost-read")
    wait_for_devices(devices)
    return reads.stats
