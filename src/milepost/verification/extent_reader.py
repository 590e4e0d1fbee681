"""Reads a checkpoint's files and compares them with their extents: in parallel, in bounded memory, each byte once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator

from milepost.collective.threads import map_in_threads
from milepost.errors import Problem, StorageError
from milepost.format.digest import crc32
from milepost.format.dtype import itemsize
from milepost.format.nan import count_nan, has_nan
from milepost.storage.base import ReadHandle, counted
from milepost.verification.extents import Digested, Extent, Known, Unknown, Values, batches

BUFFER_NBYTES = 8 << 20
"""What each thread reads at once, and all the memory it holds."""
MAX_PROBLEMS = 1000
"""So many problems are kept; the rest is counted."""

Progress = Callable[[int, int], None]
"""``progress(done_nbytes, total_nbytes)``, called from any thread, one call at a time."""


class Findings:
    """What a verification has found so far. Safe to use from several threads."""

    def __init__(self, progress: Progress | None = None, *, total_nbytes: int = 0):
        self.problems: list[Problem] = []
        self.num_problems = 0
        self.read_nbytes = 0
        self.unchecked_nbytes = 0
        self.total_nbytes = total_nbytes
        """What there is to read in all, for ``progress``."""
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, problem: Problem) -> None:
        with self._lock:
            self.num_problems += 1
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(problem)

    def count_read(self, nbytes: int, unchecked_nbytes: int = 0) -> None:
        with self._lock:
            self.read_nbytes += nbytes
            self.unchecked_nbytes += unchecked_nbytes
            if self._progress is not None:
                self._progress(self.read_nbytes, max(self.total_nbytes, self.read_nbytes))

    def merged(self) -> tuple[Problem, ...]:
        """The problems in order of files and offsets; neighbouring ranges of one key and kind become one."""
        result: list[Problem] = []
        for problem in sorted(self.problems, key=lambda p: (p.file, p.byte_range or (-1, -1), p.key or "")):
            last = result[-1] if result else problem
            same = (last.file, last.key, last.message) == (problem.file, problem.key, problem.message)
            if (
                result
                and same
                and last.byte_range
                and problem.byte_range
                and last.byte_range[1] == problem.byte_range[0]
            ):
                result[-1] = dataclasses.replace(last, byte_range=(last.byte_range[0], problem.byte_range[1]))
            else:
                result.append(problem)
        return tuple(result)


class ExtentReader:
    """Threads that take batches of extents from a file until there are none left."""

    def __init__(self, findings: Findings, num_threads: int):
        self._findings = findings
        self._num_threads = num_threads
        self._local = threading.local()

    def check(self, handle: ReadHandle, name: str, extents: Iterator[Extent]) -> None:
        """Compare ``extents`` (ascending) of the file ``name``. Errors of ``extents`` itself are raised."""
        map_in_threads(
            lambda batch: self._check_batch(handle, name, batch),
            batches(self._inside(handle, name, extents), BUFFER_NBYTES),
            self._num_threads,
            name="milepost-verify",
        )

    def _inside(self, handle: ReadHandle, name: str, extents: Iterator[Extent]) -> Iterator[Extent]:
        """The extents that the file is long enough for. The others are problems."""
        for extent in extents:
            if extent.stop <= handle.nbytes:
                yield extent
            else:
                where = (extent.start, extent.stop)
                self._findings.add(Problem("the file ends before or inside it", name, _key(extent), where))

    def _check_batch(self, handle: ReadHandle, name: str, batch: list[Extent]) -> None:
        start, stop = batch[0].start, batch[-1].stop
        if stop - start > BUFFER_NBYTES:
            self._check_large(handle, name, batch[0])
            return
        view = memoryview(self._buffer())[: stop - start]
        try:
            handle.read_into(start, [view])
        except StorageError as error:
            self._findings.add(Problem(f"can't be read: {error.message}", name, _key(batch[0]), (start, stop)))
            return
        for extent in batch:
            problem = compare(extent, view[extent.start - start : extent.stop - start], name)
            if problem is not None:
                self._findings.add(problem)
        self._findings.count_read(stop - start, sum(_unchecked(extent) for extent in batch))

    def _check_large(self, handle: ReadHandle, name: str, extent: Extent) -> None:
        """One extent that does not fit the buffer: digested piece by piece."""
        view = memoryview(self._buffer())
        value = num_nan = 0
        for start in range(extent.start, extent.stop, BUFFER_NBYTES):
            piece = view[: min(BUFFER_NBYTES, extent.stop - start)]
            try:
                handle.read_into(start, [piece])
            except StorageError as error:
                where = (start, start + len(piece))
                self._findings.add(Problem(f"can't be read: {error.message}", name, _key(extent), where))
                return
            if isinstance(extent, Digested):
                value = crc32(piece, value)
            elif isinstance(extent, Values):
                num_nan += count_nan(piece, extent.dtype) if has_nan(extent.dtype) else 0
            else:
                problem = compare(_cut(extent, start, start + len(piece)), piece, name)
                if problem is not None:
                    self._findings.add(problem)
            self._findings.count_read(len(piece), len(piece) if isinstance(extent, Unknown | Values) else 0)
        if isinstance(extent, Digested) and value != extent.crc32:
            self._findings.add(_changed(extent, name))
        elif isinstance(extent, Values) and num_nan:
            self._findings.add(_nan(extent, num_nan, name))

    def _buffer(self) -> bytearray:
        held: bytearray | None = getattr(self._local, "buffer", None)
        if held is None:
            held = self._local.buffer = bytearray(BUFFER_NBYTES)
        return held


def compare(extent: Extent, view: memoryview, name: str) -> Problem | None:
    """What is wrong with the bytes ``view`` of the file ``name``, which are those of ``extent``."""
    if isinstance(extent, Digested):
        return _changed(extent, name) if crc32(view) != extent.crc32 else None
    if isinstance(extent, Unknown):
        return None
    if isinstance(extent, Values):
        num_nan = count_nan(view, extent.dtype) if has_nan(extent.dtype) else 0
        return _nan(extent, num_nan, name) if num_nan else None
    expected = extent.expected if isinstance(extent, Known) else bytes(len(view))
    found = bytes(view)
    if found == expected:
        return None
    wrong = [index for index, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    where = (extent.start + wrong[0], extent.start + wrong[-1] + 1)
    if isinstance(extent, Known):
        return Problem(f"{extent.what} is not as it was written", name, extent.key, where)
    return Problem("padding is not zero", name, byte_range=where)


def _changed(extent: Digested, name: str) -> Problem:
    return Problem(f"{extent.what} changed after it was written", name, extent.key, (extent.start, extent.stop))


def _nan(extent: Values, num_nan: int, name: str) -> Problem:
    total = (extent.stop - extent.start) // itemsize(extent.dtype)
    return Problem(f"NaN in {num_nan} of {counted(total, 'value')}", name, extent.key, (extent.start, extent.stop))


def _cut(extent: Extent, start: int, stop: int) -> Extent:
    if isinstance(extent, Known):
        return dataclasses.replace(
            extent, start=start, expected=extent.expected[start - extent.start : stop - extent.start]
        )
    return dataclasses.replace(extent, start=start, stop=stop)


def _key(extent: Extent) -> str | None:
    return extent.key if isinstance(extent, Known | Digested | Values) else None


def _unchecked(extent: Extent) -> int:
    return extent.stop - extent.start if isinstance(extent, Unknown | Values) else 0
