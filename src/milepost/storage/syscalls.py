"""The few Linux system calls that Python's ``os`` does not offer. Nothing here knows of checkpoints."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WAIT_BEFORE, _SYNC_FILE_RANGE_WRITE, _WAIT_AFTER = 1, 2, 4  # of linux/fs.h
_FICLONE = 0x40049409  # of linux/fs.h
_MEMORY_FILE_SYSTEMS = {0x01021994, 0x858458F6}  # TMPFS_MAGIC, RAMFS_MAGIC of linux/magic.h
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY})
"""What a kernel or a file system answers when it does not know an operation."""


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def _renameat2(src: str, dst: str, flags: int) -> bool:
    """Return whether ``renameat2`` did it; False where it is not known. OSError for every other failure."""
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
    """Swap what two names stand for, in one atomic act. False, and nothing done, where that is not supported."""
    try:
        return _renameat2(one, other, _RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False  # no answer to an exchange: a file system in user space took it for a plain rename


def rename_new(src: str, dst: str) -> None:
    """Rename, atomically, to a name that must be free (FileExistsError otherwise).

    Where the file system can't promise that (NFS), looking and renaming are two acts.
    """
    if _renameat2(src, dst, _RENAME_NOREPLACE):
        return
    if os.path.lexists(dst):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), dst)
    os.rename(src, dst)


def clone(src_fd: int, dst_fd: int) -> bool:
    """Let a file have all blocks of another one, until either is written to. False where the file system can't."""
    try:
        fcntl.ioctl(dst_fd, _FICLONE, src_fd)
    except OSError as error:
        if error.errno in UNSUPPORTED or error.errno in (errno.EXDEV, errno.EPERM, errno.EACCES):
            return False
        raise
    return True


def reserve(fd: int, nbytes: int) -> bool:
    """Give the file its length and its blocks ahead of the writes. False where the file system can't.

    Not ``os.posix_fallocate``: where a file system can't, the C library imitates it by writing into every block,
    which costs as much as the real write does.
    """
    try:
        _check(_libc().fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(nbytes)), "")
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def begin_write_back(fd: int, offset: int, nbytes: int) -> bool:
    """Have the kernel begin to write a range of dirty pages to the device. False where that is not known.

    No promise: only ``fsync`` makes bytes outlive a power cut. OSError for a failed device, which this call may be the
    first and, on its descriptor, the only one to report.
    """
    return _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def finish_write_back(fd: int, offset: int, nbytes: int) -> bool:
    """The same, and wait until the device has taken the range. OSError if it did not."""
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


def address_of(view: memoryview) -> int | None:
    """The address of a buffer; None for a read-only one, whose address Python does not give."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    except TypeError:
        return None
