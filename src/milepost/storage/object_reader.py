"""Read from an object: concurrent requests for large reads, one request for neighbours, and read-ahead."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from milepost.errors import StorageError
from milepost.storage.base import ReadHandle, byte_views
from milepost.storage.ranges import MAX_SPAN_NBYTES, Span, merge_ranges
from milepost.storage.store_requests import StoreRequests


class ObjectReader(ReadHandle):
    """An object open for reading. Every request is for the version that existed when it was opened."""

    def __init__(self, requests: StoreRequests, name: str, nbytes: int, tag: str | None):
        self.path = requests.describe(name)
        self.nbytes = nbytes
        self._requests = requests
        self._name = name
        self._tag = tag
        self._ahead: _ReadAhead | None = None

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See ``ReadHandle``. Neighbouring ranges are fetched together, and ahead of the reads."""
        self._drop_ahead()
        self._ahead = _ReadAhead(merge_ranges(ranges), self._fetch, self._requests)

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        views = byte_views(buffers)
        wanted = sum(map(len, views))
        if offset + wanted > self.nbytes:
            raise StorageError(
                f"{self.path} ends at byte {self.nbytes}, but bytes {offset} to {offset + wanted} are expected; it was "
                f"truncated",
                operation="read",
                path=self.path,
            )
        if not wanted:
            return
        if self._ahead is not None and self._ahead.serve(offset, views):
            return
        if wanted <= MAX_SPAN_NBYTES:
            _scatter(self._fetch(offset, offset + wanted), views)
            return
        self._read_large(offset, views)

    def _read_large(self, offset: int, views: Sequence[memoryview]) -> None:
        """Read in requests of part size, several at a time, storing bytes as they arrive."""
        jobs: list[Future[None]] = []
        for view in views:
            for begin in range(0, len(view), MAX_SPAN_NBYTES):
                piece = view[begin : begin + MAX_SPAN_NBYTES]
                jobs.append(self._requests.pool().submit(self._land, offset + begin, piece))
            offset += len(view)
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
            for job in jobs:  # no thread may write into the caller's memory after this has returned
                if not job.cancelled():
                    job.exception()

    def _land(self, offset: int, view: memoryview) -> None:
        _scatter(self._fetch(offset, offset + len(view)), [view])

    def _fetch(self, start: int, stop: int) -> Any:
        return self._requests.get_range(self._name, start, stop, self._tag)

    def _drop_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def close(self) -> None:
        self._drop_ahead()


def _scatter(data: Any, views: Sequence[memoryview]) -> None:
    """Copy ``data`` into ``views`` in order. numpy lets other threads run meanwhile; a slice assignment does not."""
    source = np.frombuffer(data, dtype=np.uint8)
    position = 0
    for view in views:
        np.frombuffer(view, dtype=np.uint8)[:] = source[position : position + len(view)]
        position += len(view)


class _ReadAhead:
    """Merged spans of an object, fetched in order, some ahead of the reads, and dropped once fully read."""

    def __init__(self, spans: Sequence[Span], fetch: Callable[[int, int], Any], requests: StoreRequests):
        self._spans = spans
        self._starts = [span.start for span in spans]
        self._left = [span.wanted_nbytes for span in spans]
        self._fetch = fetch
        self._pool = requests.pool()
        self._budget = requests.ahead
        self._jobs: dict[int, Future[Any]] = {}
        self._borrowed: set[int] = set()
        self._begun = 0  # spans before this one were requested or fully read
        self._lock = threading.Lock()

    def serve(self, offset: int, views: Sequence[memoryview]) -> bool:
        """Fill ``views`` from the spans that hold the range; returns False if they don't."""
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
        """Return the spans that together hold ``[start, stop)`` and are not fully read; none if there is a gap."""
        first = last = bisect_right(self._starts, start) - 1
        if first < 0:
            return range(0)
        while True:
            if self._left[last] <= 0 or self._spans[last].stop <= start:
                return range(0)  # read twice, or not announced
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
        """Request the next spans, as far as the budget allows."""
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
    """Return the bytes ``[start, stop)`` of consecutive buffers."""
    position = 0
    for view in views:
        low, high = max(start - position, 0), min(stop - position, len(view))
        if low < high:
            yield view[low:high]
        position += len(view)
