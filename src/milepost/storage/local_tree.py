"""Files and folders by name, on a POSIX file system: status, clones, durable names, deletion of trees."""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_modes

from milepost.storage import syscalls
from milepost.storage.base import Entry

_MAX_STRETCHES = 100_000
"""Maximum number of data ranges between holes that are counted in a file being written."""


def entry_of(name: str, found: os.stat_result) -> Entry:
    is_folder = stat_modes.S_ISDIR(found.st_mode)
    return Entry(
        name=name,
        is_folder=is_folder,
        nbytes=0 if is_folder else found.st_size,
        mtime_s=found.st_mtime,
        is_link=stat_modes.S_ISLNK(found.st_mode),
        link_id=f"{found.st_dev}:{found.st_ino}" if found.st_nlink > 1 and not is_folder else "",
    )


def data_nbytes(fd: int) -> int:
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


def clone_file(src: str, dst: str) -> bool:
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


def sync_folder(full: str) -> None:
    fd = os.open(full, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems can't, and order names themselves
            raise
    finally:
        os.close(fd)


def remove_tree(full: str) -> None:
    """Delete a tree by descriptors, so that no link is followed. Another process may be deleting it too."""

    def unlisted(error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise error

    if os.path.islink(full) or os.path.isfile(full):
        unlink(full)
        return
    with contextlib.suppress(FileNotFoundError):
        for _, folders, files, folder_fd in os.fwalk(full, topdown=False, onerror=unlisted, follow_symlinks=False):
            for name in files:
                unlink(name, folder_fd)
            for name in folders:
                try:
                    os.rmdir(name, dir_fd=folder_fd)
                except FileNotFoundError:
                    continue
                except NotADirectoryError:  # a link to a folder
                    unlink(name, folder_fd)
        os.rmdir(full)


def unlink(name: str, folder_fd: int | None = None) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder_fd)
