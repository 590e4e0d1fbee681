"""Stream tensors through fixed memory: cut into slabs, read by a few threads, written as a file image.

Every thread owns one aligned buffer, into which slabs are read and from which they are written: memory is a product of
constants, independent of the model's size.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from milepost.collective.threads import map_in_threads
from milepost.errors import ConversionError
from milepost.format import digest
from milepost.format.box import Slab, cut_into_slabs
from milepost.format.dtype import itemsize
from milepost.format.manifest import BLOCK_NBYTES
from milepost.interop.weights.boxes import Array, Bytes, Readable, array_dtype, raw_bytes
from milepost.storage.base import WriteHandle

SLAB_NBYTES = 4 << 20
TASK_NBYTES = 64 << 20
BUFFER_NBYTES = 16 << 20
_PAGE_NBYTES = 4096
_DIRECT_NBYTES = 256 << 10
"""Data from this size on is written from where it is."""
_COPIES = 2
"""Maximum number of copies of a slab on its way into the buffer (to reorder rows or cast elements)."""
_MAX_THREADS = 4

Advance = Callable[[int], None]
"""Called with the number of further bytes done, from several threads."""
StageProgress = Callable[[str, int, int], None]
"""Called with the stage (``converting``, ``verifying``), bytes done and total bytes, from several threads."""


def stage(progress: StageProgress | None, doing: str, total_nbytes: int) -> Advance | None:
    """Return a thread-safe function that converts the bytes of one stage to progress."""
    if progress is None:
        return None
    done, lock = 0, threading.Lock()

    def advance(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            progress(doing, done, total_nbytes)

    return advance


class SlabReader:
    """Reads slabs of ``content``, and computes the number of threads that fit ``budget_nbytes``.

    Raises:
        ConversionError: the budget does not allow for one thread.
    """

    def __init__(self, content: Readable, budget_nbytes: int, progress: Advance | None = None):
        self.content = content
        self._progress = progress
        self._local = threading.local()
        self.slab_nbytes = max((self._largest(key) for key in content.tensors), default=0)
        """Maximum size of a slab."""
        self.buffer_nbytes = max(BUFFER_NBYTES, self.slab_nbytes + 2 * _PAGE_NBYTES)
        """Buffer size with which an ``ImageStream`` accepts any slab in one piece."""
        per_thread = self.buffer_nbytes + _COPIES * self.slab_nbytes
        if per_thread > budget_nbytes:
            raise ConversionError(
                f"a memory budget of {budget_nbytes:,} bytes is too small: this model needs {per_thread:,}"
            )
        self.num_threads = min(_MAX_THREADS, budget_nbytes // per_thread)
        self.peak_nbytes = self.num_threads * per_thread
        """The maximum number of bytes in buffers at once."""

    def slabs(self, key: str) -> Iterator[Slab]:
        """Yield the slabs of a tensor, in order."""
        info = self.content.tensors[key]
        return cut_into_slabs(info.shape, itemsize(info.dtype), SLAB_NBYTES, self.content.unit_rows(key))

    def _largest(self, key: str) -> int:
        first = next(self.slabs(key), None)
        return 0 if first is None else first.nbytes

    def read_into(self, key: str, slab: Slab, raw: Bytes) -> Array:
        """Fill ``raw`` (a flat array of ``slab.nbytes`` bytes) with a slab; returns its elements in the same memory."""
        array: Array = raw.view(array_dtype(self.content.tensors[key].dtype)).reshape(slab.box.sizes)
        self.content.read_into(key, slab.box, array)
        if self._progress is not None:
            self._progress(slab.nbytes)
        return array

    def read(self, key: str, slab: Slab) -> Array:
        """Read the elements of a slab, contiguous, into this thread's memory; valid until its next read."""
        buffer: Bytes | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = np.empty(self.slab_nbytes, np.uint8)
        return self.read_into(key, slab, buffer[: slab.nbytes])


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor and the offset of its first byte in a file."""

    key: str
    offset: int


class PassedBytes:
    """CRC-32s of the parts of one run of bytes, recorded in any order and split at block boundaries."""

    __slots__ = ("_lock", "_parts")

    def __init__(self) -> None:
        self._parts: dict[int, tuple[int, int]] = {}  # start -> (nbytes, crc32)
        self._lock = threading.Lock()

    def add(self, start: int, data: memoryview) -> None:
        """Record ``data`` at ``start``. A repeated part counts once."""
        found = {}
        position = 0
        while position < len(data):
            room = BLOCK_NBYTES - (start + position) % BLOCK_NBYTES
            part = data[position : position + room]
            found[start + position] = (len(part), digest.crc32(part))
            position += len(part)
        with self._lock:
            self._parts.update(found)

    def blocks(self, nbytes: int) -> list[int]:
        """Return the CRC-32 of each block of a run of ``nbytes`` tiled by the parts."""
        crcs = [0] * digest.num_blocks(nbytes)
        for start, (length, crc) in sorted(self._parts.items()):
            index = start // BLOCK_NBYTES
            crcs[index] = digest.combine(crcs[index], crc, length)
        return crcs

    def crc32(self) -> int:
        """Return the CRC-32 of all parts, which must tile a run of bytes."""
        value = 0
        for _, (length, crc) in sorted(self._parts.items()):
            value = digest.combine(value, crc, length)
        return value


def write_image(
    handle: WriteHandle,
    tensors: Sequence[PlacedTensor],
    reader: SlabReader,
    *,
    digests: bool = True,
    on_write: Callable[[int, memoryview], None] | None = None,
) -> dict[str, PassedBytes]:
    """Write tensors at their offsets in an open file, with several threads. Returns each tensor's ``digests``.

    ``tensors`` are sorted by offset. The caller writes the bytes between them afterwards: short gaps are filled with
    zeros if bytes can be written twice. ``on_write`` is called with the offset and bytes of each write, from several
    threads.

    Raises:
        StorageError: the first failure on any thread.
    """
    passed = {placed.key: PassedBytes() for placed in tensors} if digests else {}
    local = threading.local()

    def work(task: list[tuple[PlacedTensor, Slab]]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, reader.buffer_nbytes)
        stream = ImageStream(handle, local.buffer, fill_gaps=not handle.is_sequential, on_write=on_write)
        for placed, slab in task:
            raw = stream.place(placed.offset + slab.start, slab.nbytes)
            reader.read_into(placed.key, slab, raw)
            if digests:
                passed[placed.key].add(slab.start, raw_bytes(raw))
        stream.flush()

    map_in_threads(work, _tasks(tensors, reader), reader.num_threads, name="milepost-convert")
    return passed


def _tasks(tensors: Sequence[PlacedTensor], reader: SlabReader) -> Iterator[list[tuple[PlacedTensor, Slab]]]:
    """Yield groups of consecutive slabs of about ``TASK_NBYTES``."""
    task: list[tuple[PlacedTensor, Slab]] = []
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
    """Collects ranges of a file in ``buffer``, so that all except the outermost edges are written as aligned pages.

    With ``fill_gaps``, short gaps between ascending ranges are filled with zeros. ``on_write`` is called with the
    offset and bytes of each write.
    """

    def __init__(
        self,
        handle: WriteHandle,
        buffer: mmap.mmap,
        *,
        fill_gaps: bool = False,
        on_write: Callable[[int, memoryview], None] | None = None,
    ):
        self._handle = handle
        self._on_write = on_write
        self._fill_gaps = fill_gaps
        self._array = np.frombuffer(buffer, dtype=np.uint8)
        self._memory = memoryview(buffer)
        self._base = 0  # file offset of the buffer: a multiple of the page size
        self._begin = self._end = 0  # the occupied part of the buffer

    def place(self, offset: int, nbytes: int) -> Bytes:
        """Return memory for the ``nbytes`` at ``offset``, to be filled before the next call.

        ``nbytes`` is at most the buffer's size less two pages.
        """
        gap = offset - self._base - self._end
        if gap and self._fill_gaps and self._begin < self._end and 0 < gap <= _PAGE_NBYTES:
            self.place(offset - gap, gap).fill(0)
        elif gap:
            self.flush()
            self._base = offset - offset % _PAGE_NBYTES
            self._begin = self._end = offset - self._base
        if self._end + nbytes > len(self._array):
            self._write_pages()
        start, self._end = self._end, self._end + nbytes
        return self._array[start : self._end]

    def put_at(self, offset: int, data: memoryview) -> None:
        """Store ``data``, of any length, at ``offset``. It may be changed afterwards."""
        if len(data) >= _DIRECT_NBYTES and self._handle.alignment == 1:  # no need for a copy that is aligned
            self.flush()
            if self._on_write is not None:
                self._on_write(offset, data)
            self._handle.write(offset, [data])
            return
        source = np.frombuffer(data, dtype=np.uint8)
        step = len(self._array) - 2 * _PAGE_NBYTES
        for taken in range(0, len(source), step):
            part = source[taken : taken + step]
            np.copyto(self.place(offset + taken, len(part)), part)

    def flush(self) -> None:
        """Write all buffered bytes."""
        self._write_pages()
        self._write(self._begin, self._end)
        self._begin = self._end

    def _write_pages(self) -> None:
        """Write all buffered bytes except an incomplete page, which moves to the front."""
        first = -(-self._begin // _PAGE_NBYTES) * _PAGE_NBYTES
        last = self._end // _PAGE_NBYTES * _PAGE_NBYTES
        if first >= last:
            return
        self._write(self._begin, first)
        self._write(first, last)
        rest = self._end - last
        self._array[:rest] = self._array[last : self._end]
        self._base += last
        self._begin, self._end = 0, rest

    def _write(self, start: int, stop: int) -> None:
        if start < stop:
            if self._on_write is not None:
                self._on_write(self._base + start, self._memory[start:stop])
            self._handle.write(self._base + start, [self._memory[start:stop]])
