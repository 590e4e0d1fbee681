"""Read a checkpoint's files and compare them with their extents: in parallel, in bounded memory, each byte once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator

from milepost.collective.threads import map_in_threads
from milepost.errors import DigestMismatchError, Problem, StorageError
from milepost.storage.base import ReadHandle
from milepost.verification.extents import PIECE_NBYTES, Data, Extent, Known, Unknown, Values, batches

MAX_PROBLEMS = 1000
"""Number of problems kept; the rest are counted."""

Progress = Callable[[int, int], None]
"""``progress(done_nbytes, total_nbytes)``, called from any thread, one call at a time."""


class Findings:
    """The findings of a verification. Safe to use from several threads."""

    def __init__(self, progress: Progress | None = None, *, total_nbytes: int = 0):
        self.problems: list[Problem] = []
        self.num_problems = 0
        self.notes: list[str] = []
        """Oddities that are no problems."""
        self.read_nbytes = 0
        self.unchecked_nbytes = 0
        self.total_nbytes = total_nbytes
        """Total bytes to read, for ``progress``."""
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
        """Return the problems sorted by file and offset, with adjacent ranges of one key and kind merged."""
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
    """Threads that take batches of a file's extents until none are left."""

    def __init__(self, findings: Findings, num_threads: int):
        self._findings = findings
        self._num_threads = num_threads
        self._local = threading.local()

    def check(self, handle: ReadHandle, name: str, extents: Iterator[Extent]) -> None:
        """Compare ``extents`` (ascending) of the file ``name``. Errors raised by ``extents`` are passed on."""
        map_in_threads(
            lambda batch: self._check_batch(handle, name, batch),
            batches(self._inside(handle, name, extents), PIECE_NBYTES),
            self._num_threads,
            name="milepost-verify",
        )

    def _inside(self, handle: ReadHandle, name: str, extents: Iterator[Extent]) -> Iterator[Extent]:
        """Yield the extents inside the file; report the others as problems."""
        for extent in extents:
            if extent.stop <= handle.nbytes:
                yield extent
            else:
                where = (extent.start, extent.stop)
                self._findings.add(Problem("the file ends before or within it", name, _key(extent), where))

    def _check_batch(self, handle: ReadHandle, name: str, batch: list[Extent]) -> None:
        start, stop = batch[0].start, batch[-1].stop
        view = self._buffer()[: stop - start]
        try:
            handle.read_into(start, [view])
        except StorageError as error:
            self._findings.add(Problem(f"can't be read: {error.message}", name, _key(batch[0]), (start, stop)))
            return
        for extent in batch:
            problem = _compare(extent, view[extent.start - start : extent.stop - start], name)
            if problem is not None:
                self._findings.add(problem)
        unchecked = sum(extent.stop - extent.start for extent in batch if isinstance(extent, Unknown | Values))
        self._findings.count_read(stop - start, unchecked)

    def _buffer(self) -> memoryview:
        held: bytearray | None = getattr(self._local, "buffer", None)
        if held is None:
            held = self._local.buffer = bytearray(PIECE_NBYTES)
        return memoryview(held)


def _compare(extent: Extent, view: memoryview, name: str) -> Problem | None:
    """Compare the bytes ``view`` of the file ``name`` with ``extent``; returns the fault."""
    if isinstance(extent, Unknown):
        return None
    if isinstance(extent, Data):
        try:
            extent.reader.passed(extent.start - extent.reader.offset, view)
        except DigestMismatchError as error:
            return Problem(f"{extent.what} changed after it was written", name, extent.key, error.byte_range)
        return None
    if isinstance(extent, Values):
        message = extent.nan.passed(view)
        return Problem(message, name, extent.key, (extent.nan.start, extent.nan.stop)) if message else None
    expected = extent.expected if isinstance(extent, Known) else bytes(len(view))
    found = bytes(view)
    if found == expected:
        return None
    wrong = [index for index, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    where = (extent.start + wrong[0], extent.start + wrong[-1] + 1)
    if isinstance(extent, Known):
        return Problem(f"{extent.what} differs from what was written", name, extent.key, where)
    return Problem("padding is not zero", name, byte_range=where)


def _key(extent: Extent) -> str | None:
    return extent.key if isinstance(extent, Known | Data | Values) else None
