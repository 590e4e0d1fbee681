"""Bytes to and from an object: parts in parallel, straight from the caller's memory, in bounded memory.

An object becomes visible whole, when its upload ends, or never. Parts that fail are repeated by obstore; ranges that
fail, and everything small, by ``retry``.
"""

from __future__ import annotations

import errno
import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from milepost.errors import StorageError
from milepost.storage.base import Bytes, ReadHandle, WriteHandle, byte_views, format_nbytes
from milepost.storage.ranges import Span, merge_ranges

if TYPE_CHECKING:
    from milepost.storage.objectstore import ObjectStorage

log = logging.getLogger("milepost")

MIN_PART_NBYTES = 16 << 20
"""Parts of an upload, and the requests of a large read, are of this size or larger."""
MAX_PARTS = 9_000
"""S3 takes 10,000 parts; what a file is announced as may be a little short."""
NUM_STREAMS = 8
"""Parts of one object on their way at the same time."""
MAX_HELD_NBYTES = 4 * MIN_PART_NBYTES
"""Copied bytes that wait for their upload, before writers wait too."""
SILENCE_S = 20.0
"""An upload that has taken no bytes for this long is told of in the log."""


class Aborted(Exception):
    """Raised inside an upload that is given up, so that obstore aborts it."""


class ObjectWriter(WriteHandle):
    """An object that is being written: ranges in any order, sent on in ascending order as they come.

    What is small is sent in one request, by ``sync``, and only if there is no such object yet. More is sent in parts
    while it is written: of an upload that has begun, nothing can be seen until ``sync`` has ended it.
    """

    is_sequential = True

    def __init__(self, storage: ObjectStorage, name: str, nbytes: int):
        self.path = storage.describe(name)
        self._storage = storage
        self._name = name
        self._part_nbytes = max(MIN_PART_NBYTES, -(-nbytes // MAX_PARTS))
        self._changed = threading.Condition()
        self._waiting: dict[int, memoryview] = {}  # by offset; each ends where the next may begin
        self._next = 0  # the offset up to which all bytes are there, or sent
        self._held_nbytes = 0  # copies that wait
        self._end = 0
        self._is_complete = False
        self._given_up = False
        self._upload: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._is_stored = False

    def write(self, offset: int, buffers: Sequence[Bytes], *, stable: bool = False) -> None:
        """See ``WriteHandle``. ``stable`` buffers are sent as they stand, without a copy."""
        for view in byte_views(buffers):
            nbytes = len(view)
            self._put(offset, view if stable else memoryview(bytes(view)), is_copy=not stable)
            offset += nbytes

    def _put(self, offset: int, view: memoryview, *, is_copy: bool) -> None:
        with self._changed:
            self._raise_failure()
            if offset < self._next or offset in self._waiting:
                raise StorageError(f"byte {offset} of {self.path} is written twice", operation="write", path=self.path)
            self._waiting[offset] = view
            self._end = max(self._end, offset + len(view))
            self._held_nbytes += len(view) if is_copy else 0
            self._changed.notify_all()
            if self._upload is None and self._end > MIN_PART_NBYTES and self._next in self._waiting:
                self._start()
            # Only as long as the upload has something to send: what is missing may come from this very thread.
            while is_copy and self._held_nbytes > MAX_HELD_NBYTES and self._next in self._waiting:
                self._raise_failure()
                if self._upload is None:
                    break
                self._changed.wait(1.0)
            self._raise_failure()

    def _start(self) -> None:
        self._upload = threading.Thread(target=self._run, name="milepost-upload", daemon=True)
        self._upload.start()

    def _run(self) -> None:
        try:
            self._storage.put_parts(self._name, self._pieces(), self._part_nbytes, NUM_STREAMS)
        except BaseException as error:  # noqa: BLE001 - the top of a thread: it is raised where the handle is used
            with self._changed:
                self._failure = error
                self._waiting.clear()
                self._changed.notify_all()

    def _pieces(self) -> Iterator[memoryview]:
        """The bytes of the object in ascending order, as they come. Pulled by the upload when it has room."""
        while True:
            with self._changed:
                while self._next not in self._waiting and not self._is_complete and not self._given_up:
                    self._changed.wait()
                if self._given_up:
                    raise Aborted
                view = self._take()
            if view is None:
                return
            yield view

    def _take(self) -> memoryview | None:
        """The next bytes: what was written there, zeros where nothing was, None at the end."""
        view = self._waiting.pop(self._next, None)
        if view is None:
            if self._next >= self._end:
                return None
            gap_end = min(self._waiting)
            view = memoryview(bytes(min(gap_end - self._next, MIN_PART_NBYTES)))
        else:
            self._held_nbytes = max(0, self._held_nbytes - len(view))
        self._next += len(view)
        self._changed.notify_all()
        return view

    def sync(self) -> None:
        """Send what is left, and return when the object is there, whole and durable."""
        with self._changed:
            self._raise_failure()
            self._is_complete = True
            self._changed.notify_all()
            if self._upload is None and self._end > MIN_PART_NBYTES:
                self._start()
        if self._upload is None:
            self._storage.create(self._name, b"".join(self._pieces()))
        else:
            self._await(self._upload)
        self._is_stored = True

    def _await(self, upload: threading.Thread) -> None:
        sent = -1
        while upload.is_alive():
            upload.join(SILENCE_S)
            if upload.is_alive() and sent == self._next:
                log.warning("%s: the store has taken no more of it for %.0f s; still trying", self.path, SILENCE_S)
            sent = self._next
        with self._changed:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Let go. What was not synced is not stored: an upload that has begun is aborted."""
        if self._upload is not None and not self._is_stored:
            with self._changed:
                self._given_up = True
                self._changed.notify_all()
            self._upload.join()
        self._waiting.clear()


class ObjectReader(ReadHandle):
    """An object that is open for reading. Every request asks for the version that was there when it was opened."""

    def __init__(self, storage: ObjectStorage, name: str, nbytes: int, tag: str | None):
        self.path = storage.describe(name)
        self.nbytes = nbytes
        self._storage = storage
        self._name = name
        self._tag = tag
        self._ahead: _ReadAhead | None = None

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See ``ReadHandle``. Neighbouring ranges are fetched together, and ahead of the reads."""
        self._drop_ahead()
        self._ahead = _ReadAhead(merge_ranges(ranges), self._fetch, self._storage)

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        views = byte_views(buffers)
        wanted = sum(map(len, views))
        if offset + wanted > self.nbytes:
            raise StorageError(
                f"{self.path} ends at byte {self.nbytes}, but bytes {offset} to {offset + wanted} are wanted; "
                "it was cut off",
                operation="read",
                path=self.path,
            )
        if not wanted:
            return
        if self._ahead is not None and self._ahead.serve(offset, views):
            return
        if wanted <= MIN_PART_NBYTES:
            _scatter(self._fetch(offset, offset + wanted), views)
            return
        self._read_large(offset, views)

    def _read_large(self, offset: int, views: Sequence[memoryview]) -> None:
        """In requests of part size, several at a time. Bytes land as they come."""
        jobs: list[Future[None]] = []
        for view in views:
            for begin in range(0, len(view), MIN_PART_NBYTES):
                piece = view[begin : begin + MIN_PART_NBYTES]
                jobs.append(self._storage.pool().submit(self._land, offset + begin, piece))
            offset += len(view)
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
            for job in jobs:  # nobody writes into the caller's memory any more once this has returned
                if not job.cancelled():
                    job.exception()

    def _land(self, offset: int, view: memoryview) -> None:
        _scatter(self._fetch(offset, offset + len(view)), [view])

    def _fetch(self, start: int, stop: int) -> Any:
        return self._storage.get_range(self._name, start, stop, self._tag)

    def _drop_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def close(self) -> None:
        self._drop_ahead()


def _scatter(data: Any, views: Sequence[memoryview]) -> None:
    """Copy ``data`` into ``views``, one after the other. numpy lets other threads run meanwhile; a slice does not."""
    source = np.frombuffer(data, dtype=np.uint8)
    position = 0
    for view in views:
        np.frombuffer(view, dtype=np.uint8)[:] = source[position : position + len(view)]
        position += len(view)


class Budget:
    """Bytes that may be fetched before they are asked for, shared by all that is read from one store."""

    def __init__(self, nbytes: int):
        self._left = nbytes
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Whether so many bytes are left; then they are the caller's until it gives them back."""
        with self._lock:
            fits = nbytes <= self._left
            self._left -= nbytes if fits else 0
        return fits

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self._left += nbytes


class _ReadAhead:
    """Merged spans of an object, fetched in their order, some ahead of the reads, and dropped when they are used up."""

    def __init__(self, spans: Sequence[Span], fetch: Callable[[int, int], Any], storage: ObjectStorage):
        self._spans = spans
        self._starts = [span.start for span in spans]
        self._left = [span.wanted_nbytes for span in spans]
        self._fetch = fetch
        self._pool = storage.pool()
        self._budget = storage.ahead
        self._jobs: dict[int, Future[Any]] = {}
        self._borrowed: set[int] = set()
        self._begun = 0  # spans before this one were asked for, or are used up
        self._lock = threading.Lock()

    def serve(self, offset: int, views: Sequence[memoryview]) -> bool:
        """Fill ``views`` from the spans that hold all of the range. False: they don't, read it yourself."""
        stop = offset + sum(map(len, views))
        with self._lock:
            indices = self._holding(offset, stop)
            jobs = [self._jobs.get(index) or self._submit(index) for index in indices]
            self._fill()
        if not jobs:
            return False
        for index, job in zip(indices, jobs, strict=True):
            span = self._spans[index]
            low, high = max(span.start, offset), min(span.stop, stop)
            data = memoryview(job.result())[low - span.start : high - span.start]
            _scatter(data, list(_cut(views, low - offset, high - offset)))
            with self._lock:
                self._use(index, high - low)
        return True

    def _holding(self, start: int, stop: int) -> range:
        """The spans that hold ``[start, stop)`` together and are not used up; none if there is a gap."""
        first = last = bisect_right(self._starts, start) - 1
        if first < 0:
            return range(0)
        while True:
            if self._left[last] <= 0 or self._spans[last].stop <= start:
                return range(0)  # read twice, or never announced
            if stop <= self._spans[last].stop:
                return range(first, last + 1)
            start = self._spans[last].stop
            last += 1
            if last == len(self._spans) or self._spans[last].start != start:
                return range(0)

    def _use(self, index: int, nbytes: int) -> None:
        self._left[index] -= nbytes
        if self._left[index] <= 0:
            self._jobs.pop(index, None)
            if index in self._borrowed:
                self._borrowed.discard(index)
                self._budget.give_back(self._spans[index].stop - self._spans[index].start)
            self._fill()

    def _fill(self) -> None:
        """Ask for what comes next, as far as the budget goes."""
        while self._begun < len(self._spans):
            index, span = self._begun, self._spans[self._begun]
            if index not in self._jobs and self._left[index] > 0:
                if not self._budget.take(span.stop - span.start):
                    return
                self._borrowed.add(index)
                self._submit(index)
            self._begun += 1

    def _submit(self, index: int) -> Future[Any]:
        span = self._spans[index]
        job = self._jobs[index] = self._pool.submit(self._fetch, span.start, span.stop)
        return job

    def close(self) -> None:
        with self._lock:
            for job in self._jobs.values():
                job.cancel()
            self._jobs.clear()
            self._begun = len(self._spans)
            for index in self._borrowed:
                self._budget.give_back(self._spans[index].stop - self._spans[index].start)
            self._borrowed.clear()


def _cut(views: Sequence[memoryview], start: int, stop: int) -> Iterator[memoryview]:
    """The bytes ``[start, stop)`` of buffers that stand one after the other."""
    position = 0
    for view in views:
        low, high = max(start - position, 0), min(stop - position, len(view))
        if low < high:
            yield view[low:high]
        position += len(view)


def unfinished(path: str, nbytes: int, expected: int) -> StorageError:
    """The error for an upload that left an object of another size than was sent."""
    return StorageError(
        f"{path} has {format_nbytes(nbytes)} after {format_nbytes(expected)} were sent; do not trust this store",
        operation="write",
        path=path,
        errno=errno.EIO,
    )
