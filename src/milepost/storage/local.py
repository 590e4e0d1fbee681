"""``LocalStorage``: a folder of a POSIX file system, on a disk, on NFS or in memory."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat as stat_modes
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence

from milepost.errors import StorageError
from milepost.storage import syscalls
from milepost.storage.base import (
    Bytes,
    Content,
    Entry,
    PageCache,
    ReadHandle,
    Storage,
    WriteHandle,
    byte_views,
    check_name,
    format_nbytes,
    pieces_of,
)
from milepost.storage.mounts import why_fixed
from milepost.storage.write_back import STRETCH_NBYTES, WriteBack, page_cache_for

PAGE_NBYTES = 4096
"""O_DIRECT requires offsets, lengths and addresses that are multiples of the device's block size, at most this."""
LARGE_NBYTES = 4 << 20
"""Smaller files are written without early write-back: ``fsync`` is fast for them."""
_MAX_CALL_NBYTES = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call
_MAX_CALL_BUFFERS = 1024  # IOV_MAX

_ADVICE = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some of the quota, or write elsewhere",
    errno.EACCES: "check the owner and the mode of the folder",
    errno.EPERM: "check the owner and the mode of the folder",
    errno.EROFS: "mount it writable, or write elsewhere",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the device is failing: see the kernel's log, and do not trust this disk",
    errno.ESTALE: "the file server has lost the file; mount it again",
}
_NO_LINKS = {*syscalls.UNSUPPORTED, errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOTDIR}
"""Errors of a file system that can't hard-link at all, this file, or any more."""
_NETWORK_ADVICE = "the network file system or its server failed: see their logs, and try again when it answers"
_NETWORK_TYPES = ("nfs", "cifs", "smb", "ceph", "lustre", "gluster", "beegfs", "gpfs", "9p", "afs", "fuse", "virtiofs")
"""Prefixes of the names of network file systems."""


def storage_error(error: OSError, operation: str, path: str, doing: str) -> StorageError:
    """Build the StorageError for a system error: cause, operation, place and advice."""
    cause = (error.strerror or "unknown error").lower()
    advice = _ADVICE.get(error.errno or 0)
    if error.errno == errno.EIO and is_on_network(path):
        advice = _NETWORK_ADVICE
    message = f"{cause} while {doing}" + (f"; {advice}" if advice else "")
    return StorageError(message, operation=operation, path=path, errno=error.errno)


def is_on_network(path: str) -> bool:
    """Return True if ``path`` is on a network file system. The path itself is not accessed."""
    import psutil  # imported here: 20 ms that only a failure costs

    full = os.path.abspath(path)
    mounts = [
        (len(part.mountpoint), part.fstype)
        for part in psutil.disk_partitions(all=True)
        if os.path.commonpath((full, part.mountpoint)) == part.mountpoint
    ]
    return max(mounts, default=(0, ""))[1].startswith(_NETWORK_TYPES)


@contextlib.contextmanager
def _explained(operation: str, path: str, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, operation, path, doing) from error


def _head(views: Sequence[memoryview]) -> list[memoryview]:
    """Return as many leading buffers as one call can transfer."""
    batch: list[memoryview] = []
    room = _MAX_CALL_NBYTES
    for view in views[:_MAX_CALL_BUFFERS]:
        if room == 0:
            break
        batch.append(view[:room])
        room -= len(batch[-1])
    return batch


def _tail(views: list[memoryview], nbytes: int) -> list[memoryview]:
    """Return the buffers without the first ``nbytes``."""
    for index, view in enumerate(views):
        if nbytes < len(view):
            return [view[nbytes:], *views[index + 1 :]]
        nbytes -= len(view)
    return []


_MAX_STRETCHES = 100_000
"""Maximum number of data ranges between holes that are counted in a file being written."""


class _LocalRead(ReadHandle):
    def __init__(self, path: str):
        self.path = path
        # O_NONBLOCK: opening a FIFO must not wait for its other end. It has no effect on a regular file.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with _explained("open", path, f"opening {path}"):
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
            with _explained("read", self.path, f"reading {format_nbytes(wanted)} at offset {start} of {self.path}"):
                count = os.preadv(self._fd, _head(views), offset)
            if count == 0:
                raise StorageError(
                    f"{self.path} ends at byte {offset}, but bytes {start} to {start + wanted} are expected; it was "
                    f"truncated",
                    operation="read",
                    path=self.path,
                )
            offset += count
            views = _tail(views, count)

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


class _LocalWrite(WriteHandle):
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
        with _explained("create", path, f"creating {path}"):
            self._fd = os.open(path, flags, 0o666)
        self._reserved = 0
        reserved = False
        try:
            with _explained("reserve", path, f"reserving {format_nbytes(nbytes)} for {path}"):
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
        with _explained("write", self.path, f"writing {format_nbytes(nbytes)} at offset {offset} of {self.path}"):
            while views:
                aligned = _aligned_head(offset, views) if self.alignment > 1 else []
                try:
                    if aligned:
                        count = os.pwritev(self._direct_fd, _head(aligned), offset)
                    else:
                        # The kernel lets only one thread at a time write into a file's cache; others spin.
                        with self._turn:
                            count = os.pwritev(self._fd, _head(views), offset)
                except OSError as error:
                    if not aligned or error.errno != errno.EINVAL:
                        raise
                    # Opened with O_DIRECT, but this range is refused: the device requires more than a page.
                    self.alignment = 1
                    continue
                if count <= 0:
                    raise OSError(errno.EIO, "the system call wrote 0 bytes")
                offset += count
                views = _tail(views, count)
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
        with _explained("sync", self.path, f"syncing {self.path}"):
            syscalls.begin_write_back(self._fd, start, stop - start)

    def sync(self) -> None:
        with _explained("sync", self.path, f"syncing {self.path}"):
            if self._end < self._reserved:
                os.ftruncate(self._fd, self._end)
                self._reserved = self._end
            os.fsync(self._fd)
            if self._write_back is not None:
                self._write_back.synced(self._end)

    def close(self) -> None:
        fds = (self._direct_fd, self._fd)
        self._direct_fd = self._fd = -1
        with _explained("close", self.path, f"closing {self.path}"), contextlib.ExitStack() as stack:
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


class LocalStorage(Storage):
    """The folder ``root``, which need not exist yet, and everything below it."""

    can_rename = True

    def __init__(self, root: str | os.PathLike[str], *, page_cache: PageCache = "auto"):
        self.root = os.path.abspath(os.fspath(root))
        self.page_cache = page_cache

    @functools.cached_property
    def is_remote(self) -> bool:
        return is_on_network(self.root)

    def _full(self, path: str) -> str:
        if path == "":
            return self.root
        return os.path.join(self.root, check_name(self.root, path))

    def list(self, path: str) -> list[Entry]:
        full = self._full(path)
        entries = []
        with _explained("list", full, f"listing {full}"):
            try:
                with os.scandir(full) as found:
                    for item in found:
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            entries.append(_entry(item.name, item.stat(follow_symlinks=False)))
            except FileNotFoundError:
                return []
        return sorted(entries, key=lambda entry: entry.name)

    def names(self, path: str) -> Sequence[str]:
        full = self._full(path)
        with _explained("names", full, f"listing {full}"):
            try:
                return sorted(os.listdir(full))
            except FileNotFoundError:
                return []

    def stat(self, path: str) -> Entry | None:
        full = self._full(path)
        with _explained("stat", full, f"reading the status of {full}"):
            try:
                return _entry(os.path.basename(full), os.lstat(full))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def open_read(self, path: str) -> ReadHandle:
        return _LocalRead(self._full(path))

    def open_write(self, path: str, nbytes: int, *, shared: bool = False) -> WriteHandle:
        return _LocalWrite(self._full(path), nbytes, shared=shared, page_cache=self.page_cache)

    def read(self, path: str, limit: int = 1 << 30) -> bytes:
        with self.open_read(path) as handle:
            if handle.nbytes > limit:
                raise StorageError(
                    f"{handle.path} has {format_nbytes(handle.nbytes)}; expected at most {format_nbytes(limit)}",
                    operation="read",
                    path=handle.path,
                    errno=errno.EFBIG,
                )
            data = bytearray(handle.nbytes)
            handle.read_into(0, [memoryview(data)])
        return bytes(data)

    def written_nbytes(self, path: str) -> int:
        full = self._full(path)
        if self.stat(path) is None:
            return 0
        with _explained("stat", full, f"reading the status of {full}"):
            fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return _data_nbytes(fd)
        finally:
            os.close(fd)

    def write(self, path: str, data: Bytes) -> None:
        self.write_all({path: data})

    def write_all(self, files: Mapping[str, Content]) -> None:
        with self._made(files) as handles:
            # Start all before waiting for the first: a journal then commits once for all of them.
            for handle in handles:
                handle.begin()
            for handle in handles:
                handle.sync()

    def leave(self, path: str, data: Bytes) -> None:
        with self._made({path: data}):
            pass

    @contextlib.contextmanager
    def _made(self, files: Mapping[str, Content]) -> Iterator[Sequence[_LocalWrite]]:
        """Create and write new files, and hold them open; all are deleted if anything fails, including the close."""
        made = []
        try:
            with contextlib.ExitStack() as closing:
                for path, content in files.items():
                    made.append(closing.enter_context(_LocalWrite(self._full(path), 0)))
                    made[-1].write_on(pieces_of(content))
                yield made
        except StorageError:
            for handle in made:
                with contextlib.suppress(OSError):  # report the first error
                    os.unlink(handle.path)
            raise

    def replace(self, path: str, data: Bytes) -> None:
        draft = f"{path}.{uuid.uuid4().hex}.part"
        self.write(draft, data)
        full = self._full(path)
        with _explained("replace", full, f"replacing {full}"):
            os.replace(self._full(draft), full)
            _sync_folder(os.path.dirname(full))

    def append(self, path: str, data: Bytes) -> None:
        full = self._full(path)
        with _explained("append", full, f"appending to {full}"):
            fd = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                views = byte_views([data])
                while views:
                    views = _tail(views, os.writev(fd, _head(views)))
            finally:
                os.close(fd)

    def make_folder(self, path: str) -> None:
        full = self._full(path)
        with _explained("make folder", full, f"creating the folder {full}"):
            missing = []
            while not os.path.isdir(full):
                missing.append(full)
                full = os.path.dirname(full)
            for folder in reversed(missing):
                try:
                    os.mkdir(folder)
                except FileExistsError:
                    if not os.path.isdir(folder):  # another process may have created the folder, but not a file
                        raise
                _sync_folder(os.path.dirname(folder))

    def sync_folder(self, path: str) -> None:
        full = self._full(path)
        with _explained("sync folder", full, f"syncing the folder {full}"):
            _sync_folder(full)

    def rename(self, src: str, dst: str) -> None:
        full_src, full_dst = self._full(src), self._full(dst)
        with _explained("rename", full_dst, f"renaming {full_src} to {full_dst}"):
            syscalls.rename_new(full_src, full_dst)

    def exchange(self, one: str, other: str) -> bool:
        full_one, full_other = self._full(one), self._full(other)
        with _explained("exchange", full_other, f"exchanging {full_one} and {full_other}"):
            return syscalls.exchange(full_one, full_other)

    def why_fixed(self, path: str) -> str:
        return why_fixed(self._full(path))

    def keep_access(self, src: str, dst: str) -> None:
        full_src, full_dst = self._full(src), self._full(dst)
        with _explained("keep access", full_dst, f"giving {full_dst} the mode of {full_src}"):
            wanted, found = os.stat(full_src), os.stat(full_dst)
            if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
                for uid, gid in ((wanted.st_uid, wanted.st_gid), (-1, wanted.st_gid)):
                    try:
                        os.chown(full_dst, uid, gid)
                        break
                    except PermissionError:
                        continue  # only root may change the owner, and others the group only to one of their groups
            # Last, because a change of owner clears the set-group-id bit. The owner must be able to write into it.
            os.chmod(full_dst, stat_modes.S_IMODE(wanted.st_mode) | stat_modes.S_IRWXU)

    def carry(self, src: str, dst: str) -> None:
        full_src, full_dst = self._full(src), self._full(dst)
        with _explained("carry", full_dst, f"transferring {full_src} to {full_dst}"):
            try:
                os.link(full_src, full_dst, follow_symlinks=False)
            except FileExistsError:
                raise
            except OSError:  # no hard links, or not to other users' files
                shutil.copy2(full_src, full_dst, follow_symlinks=False)

    def share(self, src: str, dst: str) -> bool:
        full_src, full_dst = self._full(src), self._full(dst)
        with _explained("share", full_dst, f"linking {full_src} as {full_dst}"):
            try:
                os.link(full_src, full_dst, follow_symlinks=False)
            except FileExistsError:
                # The answer to a first attempt was lost on the network; that attempt had succeeded.
                if not os.path.samestat(os.lstat(full_src), os.lstat(full_dst)):
                    raise
            except FileNotFoundError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _clone(full_src, full_dst)
            return True

    def remove(self, path: str) -> None:
        full = self._full(path)
        with _explained("remove", full, f"removing {full}"):
            _unlink(full)

    def remove_tree(self, path: str) -> None:
        full = self._full(path)
        with _explained("remove", full, f"removing {full}"):
            _remove_tree(full)


def _entry(name: str, found: os.stat_result) -> Entry:
    is_folder = stat_modes.S_ISDIR(found.st_mode)
    return Entry(
        name=name,
        is_folder=is_folder,
        nbytes=0 if is_folder else found.st_size,
        mtime_s=found.st_mtime,
        is_link=stat_modes.S_ISLNK(found.st_mode),
        link_id=f"{found.st_dev}:{found.st_ino}" if found.st_nlink > 1 and not is_folder else "",
    )


def _data_nbytes(fd: int) -> int:
    """Return the number of data bytes of an open file; the kernel reports merely reserved space as a hole."""
    total = end = 0
    for _ in range(_MAX_STRETCHES):
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                return total
            return os.fstat(fd).st_size  # not supported by this file system
        total += end - start
    return total


def _clone(src: str, dst: str) -> bool:
    """Make ``dst`` a synced copy-on-write clone of ``src``; returns False if not supported."""
    src_fd = os.open(src, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        dst_fd = os.open(dst, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            is_cloned = syscalls.clone(src_fd, dst_fd)
            if is_cloned:
                os.fsync(dst_fd)
        finally:
            os.close(dst_fd)
    finally:
        os.close(src_fd)
    if not is_cloned:
        os.unlink(dst)
    return is_cloned


def _sync_folder(full: str) -> None:
    fd = os.open(full, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems can't, and order names themselves
            raise
    finally:
        os.close(fd)


def _remove_tree(full: str) -> None:
    """Delete a tree by descriptors, so that no link is followed. Another process may be deleting it too."""

    def unlisted(error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise error

    if os.path.islink(full) or os.path.isfile(full):
        _unlink(full)
        return
    with contextlib.suppress(FileNotFoundError):
        for _, folders, files, folder_fd in os.fwalk(full, topdown=False, onerror=unlisted, follow_symlinks=False):
            for name in files:
                _unlink(name, folder_fd)
            for name in folders:
                try:
                    os.rmdir(name, dir_fd=folder_fd)
                except FileNotFoundError:
                    continue
                except NotADirectoryError:  # a link to a folder
                    _unlink(name, folder_fd)
        os.rmdir(full)


def _unlink(name: str, folder_fd: int | None = None) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder_fd)
