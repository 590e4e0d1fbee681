"""The interface between Milepost and the storage of checkpoints.

A storage is a tree of names below one root. Names are relative, ``/``-separated and never leave the root; ``""`` is the
root itself. Every method either does all that it promises or raises ``StorageError`` (never
``CheckpointNotFoundError``): there are no short reads or writes, and no error is swallowed.
"""

from __future__ import annotations

import errno
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, Self

from milepost.errors import StorageError

Bytes = bytes | bytearray | memoryview | mmap.mmap
Content = Bytes | Iterable[Bytes]
"""A file's content: in one piece, or in several that may be generated while it is written."""


def counted(count: int, noun: str) -> str:
    """Format a count with its noun: ``1 key``, ``2 keys``, ``3 retries``."""
    if count == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
    return f"{count} {plural}"


def format_nbytes(nbytes: int) -> str:
    """Format a size for people: ``17 bytes``, ``8.0 MiB``."""
    if nbytes < 1024:
        return counted(nbytes, "byte")
    value = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} PiB"


def format_duration(seconds: float) -> str:
    """Format a time span for people in up to two units: ``45 s``, ``3 h 20 min``, ``2 d``."""
    left = round(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def join(folder: str, name: str) -> str:
    """Return the storage name of ``name`` in ``folder``, which may be the root (``""``)."""
    return f"{folder}/{name}" if folder else name


def split(path: str) -> tuple[str, str]:
    """Split a storage name into its folder and its last part, the inverse of ``join``."""
    folder, _, name = path.rpartition("/")
    return folder, name


def byte_views(buffers: Sequence[Bytes]) -> list[memoryview]:
    """Return the buffers as flat byte views, without empty ones."""
    views = (memoryview(buffer) for buffer in buffers)
    return [view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in views if view.nbytes]


def pieces_of(content: Content) -> Iterable[Bytes]:
    """Return the pieces of a file."""
    return (content,) if isinstance(content, Bytes) else content


def check_name(root: str, path: str) -> str:
    """Return ``path`` if it is a valid name below ``root``.

    Raises:
        StorageError: it is absolute, or has an empty part or one that leaves the root.
    """
    if path.startswith("/") or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise StorageError(
            f"{path!r} is not a name below {root}: names are relative, without '..' and empty parts",
            operation="resolve",
            path=path,
            errno=errno.EINVAL,
        )
    return path


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder. ``nbytes`` is 0 for folders; ``mtime_s`` is in seconds since the epoch.

    ``tag`` identifies this version of a file for ``put_if``; empty without conditional puts. ``link_id`` is the same
    for all names of a file with hard links; empty for a file with one name.
    """

    name: str
    is_folder: bool
    nbytes: int
    mtime_s: float
    is_link: bool = False
    tag: str = ""
    link_id: str = ""


PageCache = Literal["auto", "keep", "drop", "direct"]
"""``keep`` written pages in the operating system's cache for the next load, ``drop`` each once the device has it,
``direct`` bypasses the cache. ``auto`` keeps files smaller than half of the free memory and drops larger ones."""


class _Handle(ABC):
    """An open file, closed at the end of a ``with`` block."""

    path: str

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class ReadHandle(_Handle):
    """An open file. Safe to use from several threads at once."""

    nbytes: int

    @abstractmethod
    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers`` (writable, byte-format) in order, starting at ``offset``.

        Raises StorageError if the file ends before they are full.
        """

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read ``nbytes`` at ``offset``. Raises like :meth:`read_into`."""
        data = bytearray(nbytes)
        self.read_into(offset, [memoryview(data)])
        return bytes(data)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Announce byte ranges (half-open) that will be read, each once, roughly in ascending order.

        A store fetches neighbours together and ahead of the reads. Unannounced reads are still correct.
        """


class WriteHandle(_Handle):
    """A file being written. Safe to use from several threads at once on ranges that do not overlap.

    ``alignment`` of offsets, lengths and buffer addresses makes ``write`` fast; 1: no preference. Unaligned writes are
    still correct. ``is_sequential``: bytes are sent in ascending order; early ones are held in memory until their turn,
    so one thread writes such a file.
    """

    alignment: int = 1
    is_sequential: bool = False

    @abstractmethod
    def write(self, offset: int, buffers: Sequence[Bytes], *, stable: bool = False) -> None:
        """Store ``buffers`` in order, starting at ``offset``. The caller may reuse them at once.

        ``stable``: the caller does not change them until ``sync`` has returned, so they need not be copied.
        """

    @abstractmethod
    def sync(self) -> None:
        """Return once everything written will survive a power cut, as far as the medium can promise."""


class Storage(ABC):
    """A tree of names below ``root``.

    Callers check a storage's capabilities by its properties, never by its type.
    """

    root: str
    """Name of the root for people, and for another process that opens it: a path or a URL."""
    page_cache: PageCache = "auto"
    """Treatment of the page cache when large files are written. No effect for a store."""

    @property
    @abstractmethod
    def can_rename(self) -> bool:
        """True if a folder can be renamed and two names exchanged in one atomic act."""

    @property
    def is_remote(self) -> bool:
        """True if it is accessed over a network, so that reading bytes once for all ranks pays off."""
        return False

    @property
    def can_share(self) -> bool:
        """True if several processes may write one file (``open_write`` with ``shared``)."""
        return True

    @property
    def has_conditional_put(self) -> bool:
        """True if ``put_if`` works."""
        return False

    @property
    def num_streams(self) -> int:
        """Number of concurrent operations with the best throughput."""
        return 2

    @property
    def poll_s(self) -> float:
        """Initial interval in seconds between polls for data that another process writes."""
        return 0.002

    @abstractmethod
    def list(self, path: str) -> list[Entry]:
        """List a folder, sorted by name; empty if the folder is absent.

        Where folders are implicit (a store), an empty one may be listed or not.
        """

    def names(self, path: str) -> Sequence[str]:
        """Return the names in a folder, like :meth:`list` without a stat of each: for folders that are polled."""
        return [entry.name for entry in self.list(path)]

    def list_files(self, path: str) -> dict[str, Entry]:
        """List all files below a folder by names relative to it (``a/b``); empty if the folder is absent."""
        found: dict[str, Entry] = {}
        for entry in self.list(path):
            if entry.is_folder:
                below = self.list_files(join(path, entry.name))
                found |= {
                    f"{entry.name}/{name}": replace(file, name=f"{entry.name}/{name}") for name, file in below.items()
                }
            else:
                found[entry.name] = entry
        return found

    @abstractmethod
    def stat(self, path: str) -> Entry | None:
        """Return the entry at ``path`` (links not followed), or None if there is none."""

    @abstractmethod
    def open_read(self, path: str) -> ReadHandle:
        """Open a regular file. Refuses links: a checkpoint has none, so one is an attack or an accident."""

    @abstractmethod
    def open_write(self, path: str, nbytes: int, *, shared: bool = False) -> WriteHandle:
        """Create a file (it must not exist) of about ``nbytes``, reserving the space if possible.

        ``shared``: the file may exist, and has exactly ``nbytes`` from now on. Several processes may open it this way
        and write disjoint ranges; each must sync.
        """

    @abstractmethod
    def read(self, path: str, limit: int = 1 << 30) -> bytes:
        """Read a small file. Raises StorageError if it is absent or longer than ``limit`` bytes."""

    def written_nbytes(self, path: str) -> int:
        """Return the bytes of a file written so far: fewer than its size if space is reserved; 0 if it was deleted."""
        found = self.stat(path)
        return found.nbytes if found is not None else 0

    @abstractmethod
    def write(self, path: str, data: Bytes) -> None:
        """Create a small file (it must not exist) with ``data``, synced."""

    def write_all(self, files: Mapping[str, Content]) -> None:
        """Create several files (none may exist); all are synced when this returns.

        Faster than one by one. Generated pieces are in memory one at a time where the storage can write them so. After
        an error any of the files may exist.
        """
        for path, content in files.items():
            self.write(path, content if isinstance(content, Bytes) else b"".join(content))

    def leave(self, path: str, data: Bytes) -> None:
        """Create a small file (it must not exist) for processes that are running now.

        A power cut may tear or delete it: only for data that is not needed after one.
        """
        self.write(path, data)

    @abstractmethod
    def replace(self, path: str, data: Bytes) -> None:
        """Write a small file with ``data``, synced, atomically replacing any existing file."""

    def read_tagged(self, path: str, limit: int = 1 << 30) -> tuple[bytes, str] | None:
        """Read a small file and the tag of this version for ``put_if``; None if there is no such file."""
        raise self._has_no("read_tagged", path)

    def put_if(self, path: str, data: Bytes, tag: str | None) -> None:
        """Write a small file with ``data`` if ``path`` still has the version ``tag`` (None: if it is absent).

        Raises:
            StorageError: with ``errno`` EEXIST if it has another version; nothing was changed.
        """
        raise self._has_no("put_if", path)

    def abort_uploads(self, path: str, is_dead: Callable[[str], bool] = lambda name: True) -> int:
        """Abort unfinished uploads of files below a folder; returns their number.

        ``is_dead`` is called with a file's name relative to the folder, and returns True if no process is writing it.
        """
        return 0

    def _has_no(self, operation: str, path: str) -> StorageError:
        message = f"{self.root} has no conditional put"
        return StorageError(message, operation=operation, path=path, errno=errno.ENOTSUP)

    @abstractmethod
    def append(self, path: str, data: Bytes) -> None:
        """Append to a small file, created if absent; not synced. For logs, not for a checkpoint's data."""

    @abstractmethod
    def make_folder(self, path: str, *, synced: bool = True) -> None:
        """Create a folder and its parents, each synced into its parent; no error if it exists.

        Without ``synced`` the folder itself is not: a power cut may take it, with all that is in it.
        """

    @abstractmethod
    def sync_folder(self, path: str) -> None:
        """Make the names in a folder survive a power cut."""

    @abstractmethod
    def rename(self, src: str, dst: str) -> None:
        """Move a file or folder to ``dst``, which must not exist. Atomic. Synced by ``sync_folder`` of the parents."""

    @abstractmethod
    def exchange(self, one: str, other: str) -> bool:
        """Swap two names atomically. Returns False, without effect, if the file system can't."""

    def why_fixed(self, path: str) -> str:
        """Return the reason why the folder at ``path`` can't be replaced by another; empty if it can."""
        return ""

    def keep_access(self, src: str, dst: str) -> None:
        """Give the folder ``dst`` the mode, owner and group of ``src``, as far as the system permits."""
        return

    def carry(self, src: str, dst: str) -> None:
        """Make ``dst`` (which must not exist) the same file as ``src``, or a copy, for any kind of file."""
        self.write(dst, self.read(src))

    def share(self, src: str, dst: str) -> bool:
        """Make ``dst`` (which must not exist) share the bytes of ``src``, which never change, without a transfer.

        By a hard link, by blocks shared between two files, or by a copy within a store. Returns False, without effect,
        if none of these is possible or ``src`` does not exist. ``dst`` is synced by ``sync_folder`` of its folder.
        """
        return False

    @abstractmethod
    def remove(self, path: str) -> None:
        """Delete one file; no error if it is absent."""

    def remove_files(self, folder: str, names: Sequence[str]) -> None:
        """Delete files of one folder, in any order; no error if some are absent."""
        for name in names:
            self.remove(join(folder, name))

    @abstractmethod
    def remove_tree(self, path: str) -> None:
        """Delete a folder and everything below it (links are removed, not followed); no error if it is absent."""
