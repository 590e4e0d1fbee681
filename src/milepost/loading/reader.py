"""Stored shards into tensors: ranged reads in parallel, and every byte that lands is digested on the way.

Data is digested in blocks of 4 MiB, and whole blocks are read. Where the wanted region is one run in the file and in
memory, it is read straight into its place; regions that are strided, on another device or of another dtype go block
by block through a buffer.
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
from typing import Any, Self

import torch

from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS
from milepost.errors import FormatError
from milepost.format.box import boxes_of_run
from milepost.format.digest import BlockDigests
from milepost.format.manifest import BLOCK_NBYTES, Manifest, ObjectEntry
from milepost.saving.stage import tensor_bytes
from milepost.storage.base import ReadHandle, Storage, join
from milepost.storage.open_files import OpenFiles
from milepost.tensors.layout import TensorLeaf, dtype_name
from milepost.tensors.plan import ReadItem
from milepost.tensors.values import decode_object
from milepost.verification.block_reader import BlockReader, shard_reader
from milepost.verification.external import locate_shards

TASK_NBYTES = 32 << 20
"""Reads are cut into tasks of about this size for the threads."""
MERGE_GAP_NBYTES = 64 << 10
MERGE_NBYTES = 8 << 20
"""Small records with gaps of at most the first between them are read at once, up to the second."""

Task = Callable[[], None]


@dataclass(frozen=True, slots=True)
class ReadStats:
    """What reads move. ``wanted_nbytes`` land in tensors; ``read_nbytes`` come from the storage, in whole blocks."""

    wanted_nbytes: int = 0
    read_nbytes: int = 0

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(self.wanted_nbytes + other.wanted_nbytes, self.read_nbytes + other.read_nbytes)


class TensorReads:
    """The reads that fill planned regions: tasks for threads, each of which checks what it reads. A context manager.

    ``digests`` is None for a checkpoint that stock DCP wrote: then a shard of which this rank reads everything is
    checked against the CRC-32 of its zip record, where it has one, and one that is read in part is not. ``on_read`` is
    told the bytes of each read, from any thread. The tasks raise what :func:`read_tensors` does.
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
    ):
        self._leaves = leaves
        self._digests = digests
        self._block_nbytes = digests.block_nbytes if digests is not None else BLOCK_NBYTES
        self._on_read = on_read
        self._lock = threading.Lock()
        self._local = threading.local()
        self._readers: dict[tuple[str, int], BlockReader] = {}
        self._wanted_nbytes = sum(item.src.numel * leaves[item.leaf].local.element_size() for item in items)
        self._read_nbytes = 0
        if digests is None:  # of another program: planned first, so that only what is read is looked into
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
        handle = self._files.open(name)
        ranges: list[tuple[int, int]] = []
        for item in items:
            if item.src.numel:
                yield from self._tasks(item, handle, ranges)
        handle.will_read(ranges)

    def _tasks(self, item: ReadItem, handle: ReadHandle, ranges: list[tuple[int, int]]) -> Iterator[Task]:
        """The tasks that fill one region. The file's ranges that they read are added to ``ranges``."""
        leaf, shard = self._leaves[item.leaf], item.shard
        target = leaf.view(item.piece)[item.dst.index()]
        if item.is_transposed:
            target = target.transpose(-1, -2)
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
        for low, high in _batches(item.blocks(self._block_nbytes)):
            first, last = max(low, start), min(high, stop)
            ranges.append(reader.file_range(low, high) if self._digests is not None else reader.file_range(first, last))
            if memory is not None:
                yield partial(reader.read, first, memory[first - start : last - start], self._buffer)
            else:
                yield partial(reader.read_through, low, high, self._buffer, partial(_scatter, item, target))

    @property
    def stats(self) -> ReadStats:
        """What the tasks have moved so far."""
        return ReadStats(self._wanted_nbytes, self._read_nbytes)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._read_nbytes += nbytes
        if self._on_read is not None:
            self._on_read(nbytes)

    def _buffer(self) -> memoryview:
        """This thread's memory of a block. Kept: memory that is touched for the first time is slow."""
        held: bytearray | None = getattr(self._local, "buffer", None)
        if held is None:
            held = self._local.buffer = bytearray(self._block_nbytes)
        return memoryview(held)

    def _unpickle(self, item: ReadItem, handle: ReadHandle, target: torch.Tensor) -> None:
        """Load a record of another program whose storage is not row-major, by torch's restricted unpickler."""
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


def _batches(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbouring blocks, of about ``TASK_NBYTES`` together."""
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
    """Copy what is wanted of the shard's data from byte ``low`` on to where it belongs."""
    dtype = getattr(torch, item.dtype)
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
        StorageError: a read failed or came short.
    """
    with TensorReads(storage, folder, items, leaves, digests) as reads:
        map_in_threads(call, reads.tasks, num_threads, name="milepost-read")
    return reads.stats


def read_objects(storage: Storage, folder: str, manifest: Manifest, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The values of ``keys`` that are not tensors. Records that lie close together are read at once.

    Raises:
        DigestMismatchError: a record changed after it was written.
        FormatError: a record is malformed, or would run code.
    """
    entries = sorted((manifest.objects[key].file, manifest.objects[key].record_offset, key) for key in keys)
    for file, group in itertools.groupby(entries, key=lambda entry: entry[0]):
        keys_at: dict[int, list[str]] = {}  # several, where a value stands for each of them
        for _, offset, key in group:
            keys_at.setdefault(offset, []).append(key)
        with storage.open_read(join(folder, file)) as handle:
            for run in _merged([manifest.objects[names[0]] for names in keys_at.values()]):
                yield from _read_run(handle, run, keys_at)


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


def _read_run(
    handle: ReadHandle, run: Sequence[ObjectEntry], keys_at: Mapping[int, Sequence[str]]
) -> Iterator[tuple[str, Any]]:
    base = run[0].record_offset
    data = memoryview(bytearray(run[-1].record_offset + run[-1].record_nbytes - base))
    handle.read_into(base, [data])
    for entry in run:
        keys = keys_at[entry.record_offset]
        raw = data[entry.record_offset - base : entry.record_offset - base + entry.record_nbytes]
        BlockReader(handle, keys[0], entry.record_offset, entry.record_nbytes, entry.crc32).passed(0, raw)
        for key in keys:
            yield key, decode_object(key, raw, handle.path)
