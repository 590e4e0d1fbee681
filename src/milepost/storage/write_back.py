"""Early and bounded write-back, so that ``fsync`` finds little left to do.

Bytes that stay in the page cache make the most common resume (the process died, the machine lives) a copy in memory. By
default, though, the kernel begins to write late, and ``fsync`` then waits for all of it. So write-back of each stretch
of a file begins as soon as it is complete, while the next is being filled. (The idea is RocksDB's ``bytes_per_sync``
with ``strict_bytes_per_sync``; PostgreSQL's ``checkpoint_flush_after`` does the same.)

None of this makes bytes durable: only ``fsync`` does.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque

from milepost.storage import syscalls
from milepost.storage.base import PageCache

STRETCH_NBYTES = 8 << 20
"""Write-back of each thread's consecutive bytes begins in stretches of about this size."""
IN_FLIGHT_NBYTES = 128 << 20
"""Limit on a file's bytes under write-back: dirty pages never accumulate until training waits for memory."""


def page_cache_for(page_cache: PageCache, nbytes: int) -> PageCache:
    """Resolve ``auto`` for a file of ``nbytes``."""
    if page_cache != "auto":
        return page_cache
    import psutil  # imported here: 10 ms that only a writing process needs

    return "keep" if nbytes < psutil.virtual_memory().available // 2 else "drop"


class WriteBack:
    """Starts write-back of one file's written ranges. Used by several threads at once.

    ``drop``: free pages once the device has them. If the kernel or the file system does not support the call (NFS,
    FUSE), this has no effect and ``fsync`` does all the work.
    """

    def __init__(self, fd: int, *, drop: bool):
        self._fd = fd
        self._drop = drop
        self._lock = threading.Lock()
        self._filling: dict[int, tuple[int, int]] = {}  # thread id -> the stretch that it is filling
        self._flying: deque[tuple[int, int]] = deque()
        self._num_flying = 0
        self._is_known = True

    def wrote(self, start: int, stop: int) -> None:
        """Record that ``[start, stop)`` was written; starts write-back of complete stretches. May raise OSError."""
        thread = threading.get_ident()
        begun, end = self._filling.get(thread, (start, start))
        if end != start:  # this thread continues elsewhere in the file
            self._begin(begun, end)
            begun = start
        if stop - begun < STRETCH_NBYTES:
            self._filling[thread] = (begun, stop)
            return
        self._begin(begun, stop)
        self._filling[thread] = (stop, stop)

    def _begin(self, start: int, stop: int) -> None:
        if start == stop or not self._is_known:
            return
        self._is_known = syscalls.begin_write_back(self._fd, start, stop - start)
        late = []
        with self._lock:
            self._flying.append((start, stop))
            self._num_flying += stop - start
            while self._num_flying > IN_FLIGHT_NBYTES:
                late.append(self._flying.popleft())
                self._num_flying -= late[-1][1] - late[-1][0]
        # Outside the lock: waiting for the device must not keep the other thread from filling its stretch.
        for begun, end in late:
            self._finish(begun, end)

    def _finish(self, start: int, stop: int) -> None:
        if self._is_known:
            syscalls.finish_write_back(self._fd, start, stop - start)
        if self._drop:
            self._give_back(start, stop)

    def synced(self, nbytes: int) -> None:
        """Record that ``fsync`` has returned: with ``drop``, free all pages of the file."""
        self._filling.clear()
        self._flying.clear()
        self._num_flying = 0
        if self._drop:
            self._give_back(0, nbytes)

    def _give_back(self, start: int, stop: int) -> None:
        try:
            os.posix_fadvise(self._fd, start, stop - start, os.POSIX_FADV_DONTNEED)
        except OSError as error:  # advisory: a failure does no harm
            if error.errno not in syscalls.UNSUPPORTED and error.errno != errno.ESPIPE:
                raise
