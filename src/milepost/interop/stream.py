"""Tensors through fixed memory: cut into slabs, read by a few threads, written as a file image.

Every thread owns one slab and one aligned buffer, so memory is a product of constants, whatever the model's size.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from milepost.checkpoint.plan import WriteItem
from milepost.errors import ConversionError
from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.manifest import BLOCK_NBYTES
from milepost.interop.source import Array, PassedBytes, Readable, array_dtype, as_bytes, raw_bytes
from milepost.storage.base import WriteHandle

SLAB_NBYTES = 8 << 20
TASK_NBYTES = 32 << 20
BUFFER_NBYTES = 8 << 20
_PAGE_NBYTES = 4096
_SLABS_PER_THREAD = 3
"""The slab itself, and at most two copies on the way into it (rows being reordered, elements being cast)."""
_MAX_THREADS = 4

T = TypeVar("T")

Progress = Callable[[int], None]
"""Told how many further bytes have been produced; called from several threads, one at a time."""


@dataclass(frozen=True, slots=True)
class Slab:
    """A box of a tensor that is contiguous in row-major order: ``nbytes`` from byte ``start`` of the tensor's data."""

    box: Box
    start: int
    nbytes: int


def cut_into_slabs(shape: Sequence[int], element_nbytes: int, unit_rows: int = 1) -> Iterator[Slab]:
    """Cut a tensor into slabs of at most ``SLAB_NBYTES``, in order; none is larger than the first.

    ``unit_rows`` rows (of the last dim but one) are never separated, even where they are more than that.
    """
    if 0 in shape:
        return
    dim, inner = len(shape), element_nbytes
    while dim > 0 and inner * shape[dim - 1] <= SLAB_NBYTES:
        dim -= 1
        inner *= shape[dim]
    if unit_rows > 1 and dim >= len(shape) - 1:
        # The cut would fall among the rows of a unit, or inside one row.
        dim, inner = len(shape) - 1, element_nbytes * shape[-1]
    if dim == 0:
        yield Slab(Box.whole(shape), 0, inner)
        return
    unit = unit_rows if dim == len(shape) - 1 else 1
    step = max(unit, SLAB_NBYTES // inner // unit * unit)
    start = 0
    for outer in np.ndindex(*shape[: dim - 1]):
        for first in range(0, shape[dim - 1], step):
            count = min(step, shape[dim - 1] - first)
            box = Box((*outer, first, *(0 for _ in shape[dim:])), (*(1 for _ in outer), count, *shape[dim:]))
            yield Slab(box, start, count * inner)
            start += count * inner


class SlabReader:
    """Reads slabs of ``content`` into one buffer for each thread."""

    def __init__(self, content: Readable, budget_nbytes: int, progress: Progress | None = None):
        self.content = content
        self._progress = progress
        self._lock = threading.Lock()
        self._local = threading.local()
        self._slab_nbytes = max((self._largest(key) for key in content.tensors), default=0)
        per_thread = BUFFER_NBYTES + BLOCK_NBYTES + _SLABS_PER_THREAD * self._slab_nbytes
        if per_thread > budget_nbytes:
            raise ConversionError(
                f"a memory budget of {budget_nbytes:,} bytes is too small: this model needs {per_thread:,}"
            )
        self.num_threads = min(_MAX_THREADS, budget_nbytes // per_thread)
        self.peak_nbytes = self.num_threads * per_thread
        """At most so many bytes of buffers are held at once."""

    def slabs(self, key: str) -> Iterator[Slab]:
        """The slabs of a tensor, in order."""
        info = self.content.tensors[key]
        return cut_into_slabs(info.shape, itemsize(info.dtype), self.content.unit_rows(key))

    def _largest(self, key: str) -> int:
        first = next(self.slabs(key), None)
        return 0 if first is None else first.nbytes

    def read(self, key: str, slab: Slab) -> Array:
        """The elements of a slab, contiguous; valid until this thread reads the next one."""
        buffer: Array | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = np.empty(self._slab_nbytes, np.uint8)
        dtype = array_dtype(self.content.tensors[key].dtype)
        array: Array = buffer[: slab.nbytes].view(dtype).reshape(slab.box.sizes)
        self.content.read_into(key, slab.box, array)
        if self._progress is not None:
            with self._lock:
                self._progress(slab.nbytes)
        return array


class ContentBlocks:
    """The ``BlockSource`` of ``checkpoint.writer`` over a ``SlabReader``: slabs recut into digest blocks."""

    def __init__(self, reader: SlabReader):
        self._reader = reader

    def blocks(self, item: WriteItem) -> Iterator[memoryview]:
        """See ``BlockSource``. Whole tensors only: the item's box is not looked at."""
        carry = np.empty(BLOCK_NBYTES, np.uint8)
        fill = 0
        for slab in self._reader.slabs(item.key):
            data = as_bytes(self._reader.read(item.key, slab))
            taken = 0
            while taken < len(data):
                if fill == 0 and len(data) - taken >= BLOCK_NBYTES:
                    yield raw_bytes(data[taken : taken + BLOCK_NBYTES])
                    taken += BLOCK_NBYTES
                    continue
                count = min(BLOCK_NBYTES - fill, len(data) - taken)
                np.copyto(carry[fill : fill + count], data[taken : taken + count])
                fill, taken = fill + count, taken + count
                if fill == BLOCK_NBYTES:
                    yield raw_bytes(carry)
                    fill = 0
        if fill:
            yield raw_bytes(carry[:fill])


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and the offset of its first byte in a file."""

    key: str
    offset: int


def write_image(
    handle: WriteHandle, tensors: Sequence[Placed], reader: SlabReader, *, digests: bool = False
) -> dict[str, int]:
    """Write tensors at their places in an open file, several threads at once.

    What lies between them is the caller's, to be written afterwards: short gaps are filled with zeros.

    ``tensors`` are in the order of their offsets. Returns the CRC-32 of each one's bytes if ``digests``.

    Raises:
        StorageError: the first failure on any thread.
    """
    passed = {placed.key: PassedBytes() for placed in tensors} if digests else {}
    local = threading.local()

    def work(task: list[tuple[Placed, Slab]]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, BUFFER_NBYTES)
        stream = ImageStream(handle, task[0][0].offset + task[0][1].start, local.buffer, fill_gaps=True)
        for placed, slab in task:
            data = raw_bytes(reader.read(placed.key, slab))
            if digests:
                passed[placed.key].add(slab.start, data)
            stream.put_at(placed.offset + slab.start, data)
        stream.flush()

    run_threads(work, _tasks(tensors, reader), reader.num_threads)
    return {key: found.crc32() for key, found in passed.items()}


def run_threads(work: Callable[[T], None], tasks: Iterable[T], num_threads: int) -> None:
    """Do ``work`` on each task in a few threads. After the first failure no further task is begun, and it is raised."""
    failed = threading.Event()

    def guarded(task: T) -> None:
        if failed.is_set():
            return
        try:
            work(task)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(num_threads, thread_name_prefix="milepost-convert") as pool:
        try:
            for _ in pool.map(guarded, tasks):
                pass
        except BaseException:  # an interrupt reaches only this thread
            failed.set()
            raise


def _tasks(tensors: Sequence[Placed], reader: SlabReader) -> Iterator[list[tuple[Placed, Slab]]]:
    """Consecutive slabs of about ``TASK_NBYTES`` together."""
    task: list[tuple[Placed, Slab]] = []
    nbytes = 0
    for placed in tensors:
        for slab in reader.slabs(placed.key):
            task.append((placed, slab))
            nbytes += slab.nbytes
            if nbytes >= TASK_NBYTES:
                yield task
                task, nbytes = [], 0
    if task:
        yield task


class ImageStream:
    """Writes of ranges of a file, gathered so that all but the edges are whole, aligned pages.

    ``buffer`` has ``BUFFER_NBYTES``. With ``fill_gaps``, short gaps between ranges are filled with zeros.
    """

    def __init__(self, handle: WriteHandle, offset: int, buffer: mmap.mmap, *, fill_gaps: bool = False):
        self._handle = handle
        self._fill_gaps = fill_gaps
        self._array = np.frombuffer(buffer, dtype=np.uint8)
        self._memory = memoryview(buffer)
        self._restart(offset)

    def _restart(self, offset: int) -> None:
        """Begin at ``offset``: memory and file have the same place within a page."""
        self._base = offset - offset % _PAGE_NBYTES
        self._begin = self._end = offset - self._base

    def put_at(self, offset: int, data: memoryview) -> None:
        """Store ``data`` at ``offset``."""
        gap = offset - self._base - self._end
        if self._fill_gaps and 0 < gap <= min(_PAGE_NBYTES, BUFFER_NBYTES - self._end):
            self._array[self._end : self._end + gap] = 0
            self._end += gap
        elif gap:
            self.flush()
            self._restart(offset)
        source = np.frombuffer(data, dtype=np.uint8)
        taken = 0
        while taken < len(source):
            count = min(len(source) - taken, BUFFER_NBYTES - self._end)
            np.copyto(self._array[self._end : self._end + count], source[taken : taken + count])
            taken += count
            self._end += count
            if self._end == BUFFER_NBYTES:
                self.flush()

    def flush(self) -> None:
        """Write what is held. An unaligned beginning goes by itself, so that the rest can be direct."""
        first = min(-(-self._begin // _PAGE_NBYTES) * _PAGE_NBYTES, self._end)
        for start, stop in ((self._begin, first), (first, self._end)):
            if start < stop:
                self._handle.write(self._base + start, [self._memory[start:stop]])
        self._restart(self._base + self._end)
