"""Open files of a POSIX file system: reads, and writes that are on the device soon, possibly past the page cache."""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_modes
import threading
from collections.abc import Iterable, Sequence

from milepost.errors import StorageError
from milepost.storage import syscalls
from milepost.storage.base import Bytes, PageCache, ReadHandle, WriteHandle, byte_views, format_nbytes
from milepost.storage.system_errors import explained
from milepost.storage.write_back import STRETCH_NBYTES, WriteBack, page_cache_for

PAGE_NBYTES = 4096
"""O_DIRECT requires offsets, lengths and addresses that are multiples of the device's block size, at most this."""
LARGE_NBYTES = 4 << 20
"""Smaller files are written without early write-back: ``fsync`` is fast for them."""
_MAX_CALL_NBYTES = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call
_MAX_CALL_BUFFERS = 1024  # IOV_MAX


def leading(views: Sequence[memoryview]) -> list[memoryview]:
    """Return as many leading buffers as one call can transfer."""
    batch: list[memoryview] = []
    room = _MAX_CALL_NBYTES
    for view in views[:_MAX_CALL_BUFFERS]:
        if room == 0:
            break
        batch.append(view[:room])
        room -= len(batch[-1])
    return batch


def without_first(views: list[memoryview], nbytes: int) -> list[memoryview]:
    """Return the buffers without the first ``nbytes``."""
    for index, view in enumerate(views):
        if nbytes < len(view):
            return [view[nbytes:], *views[index + 1 :]]
        nbytes -= len(view)
    return []


class LocalRead(ReadHandle):
    def __init__(self, path: str):
        self.path = path
        # O_NONBLOCK: opening a FIFO must not wait for its other end. It has no effect on a regular file.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with explained("open", path, f"opening {path}"):
            try:
                self._fd = os.open(path, flags)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise StorageError(
                        f"{path} is a symbolic link; checkpoints contain none, so it is not followed",
                        operation="open",
                        path=path,
                        errno=errno.ELOOP,
                    ) from error
                raise
            found = os.fstat(self._fd)
        if not stat_modes.S_ISREG(found.st_mode):
            self.close()
            raise StorageError(f"{path} is not a regular file", operation="open", path=path, errno=errno.EINVAL)
        self.nbytes = found.st_size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        views = byte_views(buffers)
        wanted = sum(map(len, views))
        start = offset
        while views:
            with explained("read", self.path, f"reading {format_nbytes(wanted)} at offset {start} of {self.path}"):
                count = os.preadv(self._fd, leading(views), offset)
            if count == 0:
                raise StorageError(
                    f"{self.path} ends at byte {offset}, but bytes {start} to {start + wanted} are expected; it was "
                    f"truncated",
                    operation="read",
                    path=self.path,
                )
            offset += count
            views = without_first(views, count)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _reserve(fd: int, nbytes: int) -> bool:
    """Reserve space for a file, or only check the free space (returns False). OSError if there is not enough."""
    if not syscalls.lives_in_memory(fd):
        return syscalls.reserve(fd, nbytes)
    # In memory, reserving would zero every page before it is written: the work of a complete save.
    found = os.fstatvfs(fd)
    if nbytes > found.f_bavail * found.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return False


class LocalWrite(WriteHandle):
    """A file that is reserved, written in pieces, and written back long before ``sync`` is called.

    With ``page_cache = "direct"`` the file has two descriptors: one bypasses the page cache for aligned data, one uses
    it for the rest. The file system keeps the two views coherent.
    """

    def __init__(self, path: str, nbytes: int, *, shared: bool = False, page_cache: PageCache = "auto"):
        self.path = path
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._end = 0
        self._direct_fd = -1
        self._write_back: WriteBack | None = None
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if shared else os.O_EXCL)
        with explained("create", path, f"creating {path}"):
            self._fd = os.open(path, flags, 0o666)
        self._reserved = 0
        reserved = False
        try:
            with explained("reserve", path, f"reserving {format_nbytes(nbytes)} for {path}"):
                reserved = nbytes > 0 and _reserve(self._fd, nbytes)
                if shared:
                    os.ftruncate(self._fd, nbytes)  # the same for all processes that open it, so no write is truncated
                elif reserved:
                    self._reserved = nbytes
        except StorageError:
            os.close(self._fd)
            if not shared:
                os.unlink(path)
            raise
        if nbytes < LARGE_NBYTES or syscalls.lives_in_memory(self._fd):
            return
        mode = page_cache_for(page_cache, nbytes)
        if mode == "direct":
            self._open_direct()
        elif reserved:
            # Without a reservation, blocks are allocated at write-back: two threads that write far apart then fragment
            # the file, which was measured to cost four times what the early start gains.
            self._write_back = WriteBack(self._fd, drop=mode == "drop")

    def _open_direct(self) -> None:
        # A refusal is not an error: everything then goes through the page cache.
        with contextlib.suppress(OSError):
            self._direct_fd = os.open(self.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.alignment = PAGE_NBYTES

    def write(self, offset: int, buffers: Sequence[Bytes], *, stable: bool = False) -> None:
        views = byte_views(buffers)
        nbytes = sum(map(len, views))
        with explained("write", self.path, f"writing {format_nbytes(nbytes)} at offset {offset} of {self.path}"):
            while views:
                aligned = _aligned_head(offset, views) if self.alignment > 1 else []
                try:
                    if aligned:
                        count = os.pwritev(self._direct_fd, leading(aligned), offset)
                    else:
                        # The kernel lets only one thread at a time write into a file's cache; others spin.
                        with self._turn:
                            count = os.pwritev(self._fd, leading(views), offset)
                except OSError as error:
                    if not aligned or error.errno != errno.EINVAL:
                        raise
                    # Opened with O_DIRECT, but this range is refused: the device requires more than a page.
                    self.alignment = 1
                    continue
                if count <= 0:
                    raise OSError(errno.EIO, "the system call wrote 0 bytes")
                offset += count
                views = without_first(views, count)
            if self._write_back is not None:
                self._write_back.wrote(offset - nbytes, offset)
        with self._lock:
            self._end = max(self._end, offset)

    def write_on(self, pieces: Iterable[Bytes]) -> None:
        """Write ``pieces`` one after the other; write-back of each stretch starts while the next is being made."""
        if isinstance(pieces, Sequence):
            self.write(0, pieces)
            return
        begun = offset = 0
        for piece in pieces:
            self.write(offset, [piece])
            offset += memoryview(piece).nbytes
            if offset - begun >= STRETCH_NBYTES:
                self._begin(begun, offset)
                begun = offset

    def begin(self) -> None:
        """Start write-back of all that was written. Makes no promise; only ``sync`` does."""
        self._begin(0, self._end)

    def _begin(self, start: int, stop: int) -> None:
        with explained("sync", self.path, f"syncing {self.path}"):
            syscalls.begin_write_back(self._fd, start, stop - start)

    def sync(self) -> None:
        with explained("sync", self.path, f"syncing {self.path}"):
            if self._end < self._reserved:
                os.ftruncate(self._fd, self._end)
                self._reserved = self._end
            os.fsync(self._fd)
            if self._write_back is not None:
                self._write_back.synced(self._end)

    def close(self) -> None:
        fds = (self._direct_fd, self._fd)
        self._direct_fd = self._fd = -1
        with explained("close", self.path, f"closing {self.path}"), contextlib.ExitStack() as stack:
            for fd in fds:
                if fd >= 0:
                    stack.callback(os.close, fd)


def _aligned_head(offset: int, views: Sequence[memoryview]) -> list[memoryview]:
    """Return the leading part that O_DIRECT accepts: full pages in the file, in memory and in length."""
    head: list[memoryview] = []
    if offset % PAGE_NBYTES:
        return head
    for view in views:
        address = syscalls.address_of(view)
        whole = len(view) // PAGE_NBYTES * PAGE_NBYTES
        if address is None or address % PAGE_NBYTES or whole == 0:
            break
        head.append(view[:whole])
        if whole < len(view):
            break
    return head
