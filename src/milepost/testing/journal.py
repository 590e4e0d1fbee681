"""A journal of the system calls with which ``LocalStorage`` changes a disk, of all processes, in real order.

The state after a crash depends on the actual system calls, not on what a storage promises. So the calls are recorded
with the bytes that they store: during :meth:`Journal.recording`, ``milepost.storage.local*`` use stand-ins for ``os``
and ``syscalls`` that perform and record each call, one at a time over all processes forked meanwhile.
``milepost.testing.powercut`` builds disks from such a journal.
"""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from milepost.storage import local, local_files, local_tree, syscalls

Inode = tuple[int, int]
"""Device and inode number, which identify a file or folder regardless of its current name."""
Name = tuple[Inode, str]
"""A name in a folder."""


@dataclass(frozen=True, slots=True)
class Created:
    """A new file or folder got its first name."""

    name: Name
    inode: Inode
    is_folder: bool


@dataclass(frozen=True, slots=True)
class Written:
    inode: Inode
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resized:
    """Cut, or extended by zeros, to ``nbytes``."""

    inode: Inode
    nbytes: int


@dataclass(frozen=True, slots=True)
class Synced:
    """``fsync`` of a file or of a folder has returned."""

    inode: Inode


@dataclass(frozen=True, slots=True)
class RenameCall:
    src: Name
    dst: Name


@dataclass(frozen=True, slots=True)
class Linked:
    """A file got a second name."""

    src: Name
    dst: Name


@dataclass(frozen=True, slots=True)
class Exchanged:
    one: Name
    other: Name


@dataclass(frozen=True, slots=True)
class Removed:
    """A file was unlinked, or an empty folder removed: trees go entry by entry."""

    name: Name


@dataclass(frozen=True, slots=True)
class Marked:
    """No change to the disk: a test records what has been reported to the user so far."""

    text: str


Change = Created | Written | Resized | Synced | RenameCall | Linked | Exchanged | Removed | Marked

JournalNote = Callable[[Change], None]


class Journal:
    """A journal kept in the file ``path``, made if absent.

    ``can_exchange = False`` simulates a disk on which names can't be exchanged, such as NFS.
    """

    def __init__(self, path: str | os.PathLike[str], *, can_exchange: bool = True):
        self.can_exchange = can_exchange
        self._path = Path(path)
        self._path.touch()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record all changes by any ``LocalStorage`` in this process and in those forked inside the block."""
        journaled_os, journaled_syscalls = _JournaledOs(self), _JournaledSyscalls(self)
        with ExitStack() as patches:
            for module in (local, local_files, local_tree):
                patches.enter_context(mock.patch.object(module, "os", journaled_os))
                patches.enter_context(mock.patch.object(module, "syscalls", journaled_syscalls))
            yield

    def mark(self, text: str) -> None:
        """Record what has been reported to the user at this moment."""
        with self.turn() as note:
            note(Marked(text))

    def changes(self) -> list[Change]:
        """Return all changes recorded so far."""
        found: list[Change] = []
        with open(self._path, "rb") as file:
            while file.peek(1):
                found.append(pickle.load(file))
        return found

    @contextmanager
    def turn(self) -> Iterator[JournalNote]:
        """Exclude all other processes and threads while a call is performed and recorded."""
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # released with the descriptor, however the process ends
            yield lambda change: _append(fd, pickle.dumps(change))
        finally:
            os.close(fd)


def _append(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise OSError("the journal could not be written")


def inode_of(fd_or_path: int | str) -> Inode:
    """Return the journal's identifier of an existing file or folder."""
    found = os.stat(fd_or_path) if isinstance(fd_or_path, int) else os.lstat(fd_or_path)
    return found.st_dev, found.st_ino


def _name(path: str) -> Name:
    folder, name = os.path.split(path)
    return inode_of(folder), name


class _JournaledOs:
    """Stands in for the module ``os``: performs each call and records those that change something."""

    def __init__(self, journal: Journal):
        self._journal = journal

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if not flags & os.O_CREAT:
            return os.open(path, flags, mode)
        with self._journal.turn() as note:
            is_new = not os.path.lexists(path)
            fd = os.open(path, flags, mode)
            if is_new:
                note(Created(_name(path), inode_of(fd), is_folder=False))
        return fd

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._journal.turn() as note:
            count = os.pwritev(fd, buffers, offset)
            note(Written(inode_of(fd), offset, _head(buffers, count)))
        return count

    def writev(self, fd: int, buffers: Sequence[memoryview]) -> int:
        with self._journal.turn() as note:
            offset = os.fstat(fd).st_size
            count = os.writev(fd, buffers)
            note(Written(inode_of(fd), offset, _head(buffers, count)))
        return count

    def ftruncate(self, fd: int, nbytes: int) -> None:
        with self._journal.turn() as note:
            os.ftruncate(fd, nbytes)
            note(Resized(inode_of(fd), nbytes))

    def fsync(self, fd: int) -> None:
        with self._journal.turn() as note:
            os.fsync(fd)
            note(Synced(inode_of(fd)))

    def mkdir(self, path: str) -> None:
        with self._journal.turn() as note:
            os.mkdir(path)
            note(Created(_name(path), inode_of(path), is_folder=True))

    def replace(self, src: str, dst: str) -> None:
        with self._journal.turn() as note:
            change = RenameCall(_name(src), _name(dst))
            os.replace(src, dst)
            note(change)

    def link(self, src: str, dst: str, *, follow_symlinks: bool = True) -> None:
        with self._journal.turn() as note:
            os.link(src, dst, follow_symlinks=follow_symlinks)
            note(Linked(_name(src), _name(dst)))

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        self._remove(os.unlink, path, dir_fd)

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        self._remove(os.rmdir, path, dir_fd)

    def _remove(self, call: Callable[..., None], path: str, dir_fd: int | None) -> None:
        with self._journal.turn() as note:
            name = _name(path) if dir_fd is None else (inode_of(dir_fd), path)
            call(path, dir_fd=dir_fd)
            note(Removed(name))


class _JournaledSyscalls:
    """Stands in for ``milepost.storage.syscalls``; files in memory are treated like files on disk."""

    def __init__(self, journal: Journal):
        self._journal = journal

    def __getattr__(self, name: str) -> Any:
        return getattr(syscalls, name)

    def lives_in_memory(self, fd: int) -> bool:
        return False

    def reserve(self, fd: int, nbytes: int) -> bool:
        with self._journal.turn() as note:
            reserved = syscalls.reserve(fd, nbytes)
            if reserved:
                note(Resized(inode_of(fd), os.fstat(fd).st_size))
        return reserved

    def rename_new(self, src: str, dst: str) -> None:
        with self._journal.turn() as note:
            change = RenameCall(_name(src), _name(dst))
            syscalls.rename_new(src, dst)
            note(change)

    def exchange(self, one: str, other: str) -> bool:
        if not self._journal.can_exchange:
            return False
        with self._journal.turn() as note:
            change = Exchanged(_name(one), _name(other))
            exchanged = syscalls.exchange(one, other)
            if exchanged:
                note(change)
        return exchanged


def _head(buffers: Iterable[memoryview], nbytes: int) -> bytes:
    return b"".join(buffers)[:nbytes]
