"""The few Linux system calls that Python's ``os`` does not offer. Independent of checkpoints."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WAIT_BEFORE, _SYNC_FILE_RANGE_WRITE, _WAIT_AFTER = 1, 2, 4  # of linux/fs.h
_FICLONE = 0x40049409  # of linux/fs.h
_MADV_POPULATE_WRITE = 23  # of linux/mman.h
_MEMORY_FILE_SYSTEMS = {0x01021994, 0x858458F6}  # TMPFS_MAGIC, RAMFS_MAGIC of linux/magic.h
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY})
"""Errors of a kernel or file system that does not support an operation."""


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def _renameat2(src: str, dst: str, flags: int) -> bool:
    """Call ``renameat2``; returns False if it is not supported. OSError for any other failure."""
    try:
        call = _libc().renameat2
    except AttributeError:  # a C library from before 2018
        return False
    try:
        _check(call(_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), ctypes.c_uint(flags)), dst)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def exchange(one: str, other: str) -> bool:
    """Swap two names atomically. Returns False, without effect, if that is not supported."""
    try:
        return _renameat2(one, other, _RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False  # not a valid answer to an exchange: a file system in user space took it for a plain rename


def rename_new(src: str, dst: str) -> None:
    """Rename atomically to a name that must not exist (FileExistsError otherwise).

    If the file system can't do that (NFS), checking and renaming are two steps.
    """
    if _renameat2(src, dst, _RENAME_NOREPLACE):
        return
    if os.path.lexists(dst):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), dst)
    os.rename(src, dst)


def clone(src_fd: int, dst_fd: int) -> bool:
    """Make a file a copy-on-write clone of another. Returns False if the file system can't."""
    try:
        fcntl.ioctl(dst_fd, _FICLONE, src_fd)
    except OSError as error:
        if error.errno in UNSUPPORTED or error.errno in (errno.EXDEV, errno.EPERM, errno.EACCES):
            return False
        raise
    return True


def reserve(fd: int, nbytes: int) -> bool:
    """Allocate the file's length and blocks before the writes. Returns False if the file system can't.

    Not ``os.posix_fallocate``: if a file system can't, the C library emulates it by writing into every block, which
    costs as much as the real write.
    """
    try:
        _check(_libc().fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(nbytes)), "")
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def begin_write_back(fd: int, offset: int, nbytes: int) -> bool:
    """Start write-back of a range of dirty pages. Returns False if not supported.

    No promise: only ``fsync`` makes bytes survive a power cut. OSError for a failed device, which this call may be the
    first and, on its descriptor, the only one to report.
    """
    return _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def finish_write_back(fd: int, offset: int, nbytes: int) -> bool:
    """Write back a range and wait until it is on the device. OSError if that failed."""
    return _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WAIT_BEFORE | _SYNC_FILE_RANGE_WRITE | _WAIT_AFTER)


def _sync_file_range(fd: int, offset: int, nbytes: int, flags: int) -> bool:
    try:
        call = _libc().sync_file_range
    except AttributeError:  # a C library without it
        return False
    try:
        _check(call(fd, ctypes.c_long(offset), ctypes.c_long(nbytes), ctypes.c_uint(flags)), "")
    except OSError as error:
        if error.errno in UNSUPPORTED or error.errno == errno.ESPIPE:
            return False
        raise
    return True


def lives_in_memory(fd: int) -> bool:
    """Return whether a file is on tmpfs or ramfs, where O_DIRECT is accepted but gains nothing."""
    buffer = (ctypes.c_long * 64)()  # struct statfs is 120 bytes; its first word is the type
    return _libc().fstatfs(fd, buffer) == 0 and buffer[0] in _MEMORY_FILE_SYSTEMS


def map_pages(view: memoryview) -> None:
    """Map the pages of new memory at once, which else are mapped one by one by the copies into it.

    Only saves time, so any failure is ignored: a kernel before Linux 5.14 does not know it. Costs as much as it saves
    where the pages are mapped already.
    """
    address = address_of(view) if len(view) else None
    if address is not None:
        start = address - address % mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + len(view) - start), _MADV_POPULATE_WRITE)


def address_of(view: memoryview) -> int | None:
    """Return the address of a buffer; None for a read-only one, whose address Python does not expose."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    except TypeError:
        return None
