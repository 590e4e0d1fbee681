"""The seam between Milepost and the places where checkpoints live.

A storage is a tree of names below one root. Names are relative, ``/``-separated and never leave the root; ``""`` is
the root itself. Every method either does all that it promises or raises ``StorageError`` (``CheckpointNotFoundError``
is not its business): there are no short reads and no short writes, and no error is swallowed.
"""

from __future__ import annotations

import errno
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, Self

from milepost.errors import StorageError

Bytes = bytes | bytearray | memoryview | mmap.mmap


def counted(count: int, noun: str) -> str:
    """A count with its noun: ``1 key``, ``2 keys``, ``3 retries``."""
    if count == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
    return f"{count} {plural}"


def format_nbytes(nbytes: int) -> str:
    """A size for people: ``17 bytes``, ``8.0 MiB``."""
    if nbytes < 1024:
        return counted(nbytes, "byte")
    value = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} PiB"


def format_duration(seconds: float) -> str:
    """A time span for people, to two units: ``45 s``, ``3 h 20 min``, ``2 d``."""
    left = round(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def join(folder: str, name: str) -> str:
    """The storage name of ``name`` in ``folder``, which may be the root (``""``)."""
    return f"{folder}/{name}" if folder else name


def split(path: str) -> tuple[str, str]:
    """The folder of a storage name, and its last part: what ``join`` takes."""
    folder, _, name = path.rpartition("/")
    return folder, name


def byte_views(buffers: Sequence[Bytes]) -> list[memoryview]:
    """The buffers as flat bytes, without the empty ones."""
    views = (memoryview(buffer) for buffer in buffers)
    return [view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in views if view.nbytes]


def check_name(root: str, path: str) -> str:
    """``path``, if it is a name below ``root``.

    Raises:
        StorageError: it is absolute, or has a part that leaves the root or is empty.
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

    ``tag`` stands for this version of a file, for ``put_if``; empty where there are no conditional puts. ``link_id`` is
    the same for all names of a file that has several (hard links); empty for a file with one name.
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
``direct`` goes past the cache. ``auto`` keeps a file that is smaller than half of the memory that is free, and drops a
larger one."""


class ReadHandle(ABC):
    """An open file. Safe to use from several threads at once."""

    path: str
    nbytes: int

    @abstractmethod
    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers`` (writable, byte-format), one after the other, from ``offset`` on.

        Raises StorageError when the file ends before they are full.
        """

    def read(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` from ``offset`` on. Raises as :meth:`read_into`."""
        data = bytearray(nbytes)
        self.read_into(offset, [memoryview(data)])
        return bytes(data)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:  # noqa: B027 - most have no use for it
        """Be told which byte ranges (half-open) will be read, each once, about in ascending order.

        A store fetches neighbours together and ahead of the reads. Reads that were not announced are still correct.
        """

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class WriteHandle(ABC):
    """A file being written. Safe to use from several threads at once on ranges that do not overlap.

    ``alignment`` is what ``write`` asks of offsets, lengths and buffer addresses to be fast: 1 for no wish. A write
    that is not aligned to it is still correct. ``is_sequential``: bytes go out in ascending order; what comes early is
    held in memory until its turn, so one thread writes such a file.
    """

    path: str
    alignment: int = 1
    is_sequential: bool = False

    @abstractmethod
    def write(self, offset: int, buffers: Sequence[Bytes], *, stable: bool = False) -> None:
        """Store ``buffers``, one after the other, from ``offset`` on. The caller may reuse them at once.

        ``stable``: the caller leaves them as they are until ``sync`` has returned, so they need not be copied.
        """

    @abstractmethod
    def sync(self) -> None:
        """Return when all that was written will outlive a power cut, as far as the medium can promise."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Storage(ABC):
    """A tree of names below ``root``.

    What a storage can and can't do, callers ask of its properties, never of its kind.
    """

    root: str
    """How the root is named to people, and to another process that opens it: a path, or a URL."""
    page_cache: PageCache = "auto"
    """What becomes of the pages of large files that are written. Without meaning for a store, which has no pages."""

    @property
    @abstractmethod
    def can_rename(self) -> bool:
        """True if a folder can be renamed and two names exchanged in one atomic act."""

    @property
    def is_remote(self) -> bool:
        """True if its bytes come over a network, so that each is worth reading once for all ranks."""
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
        """The number of concurrent operations with the best throughput."""
        return 2

    @property
    def poll_s(self) -> float:
        """Seconds between polls for what another process writes, at first."""
        return 0.002

    @abstractmethod
    def list(self, path: str) -> list[Entry]:
        """List a folder, sorted by name; empty when the folder is absent.

        Where folders come and go by themselves (a store), one that is empty may be listed or not.
        """

    def names(self, path: str) -> Sequence[str]:
        """The names in a folder, as :meth:`list`, without a look at each: for folders of which many processes ask."""
        return [entry.name for entry in self.list(path)]

    def list_files(self, path: str) -> dict[str, Entry]:
        """All files below a folder, by their names relative to it (``a/b``); empty when the folder is absent."""
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
        """The entry at ``path`` (links not followed), or None when there is nothing."""

    @abstractmethod
    def open_read(self, path: str) -> ReadHandle:
        """Open a regular file. Refuses links: a checkpoint has none, so one is an attack or an accident."""

    @abstractmethod
    def open_write(self, path: str, nbytes: int, *, shared: bool = False) -> WriteHandle:
        """Create a file (it must not exist) of about ``nbytes``, reserving the space where that is possible.

        ``shared``: the file may exist, and is of exactly ``nbytes`` from now on. Several processes may open it so and
        each write ranges of its own; every one must sync.
        """

    @abstractmethod
    def read(self, path: str, limit: int = 1 << 30) -> bytes:
        """A whole small file. Raises StorageError if it is absent or longer than ``limit`` bytes."""

    def written_nbytes(self, path: str) -> int:
        """Bytes of a file that were written so far: fewer than its size where space is reserved; 0 if it is gone."""
        found = self.stat(path)
        return found.nbytes if found is not None else 0

    @abstractmethod
    def write(self, path: str, data: Bytes) -> None:
        """Create a small file (it must not exist) with ``data``, synced."""

    def write_all(self, files: Mapping[str, Bytes]) -> None:
        """Create several small files (none may exist), by their names; all are synced when this returns.

        Quicker than one by one. After an error any of them may be there.
        """
        for path, data in files.items():
            self.write(path, data)

    def leave(self, path: str, data: Bytes) -> None:
        """Create a small file (it must not exist) for other processes that run now.

        A power cut may tear it or take it away: for what nobody asks after one.
        """
        self.write(path, data)

    @abstractmethod
    def replace(self, path: str, data: Bytes) -> None:
        """Make ``path`` a small file with ``data``, synced, in one atomic act, whatever file was there before."""

    def read_tagged(self, path: str, limit: int = 1 << 30) -> tuple[bytes, str] | None:
        """As ``read``, with a tag of this very version for ``put_if``; None when there is no such file."""
        raise self._has_no("read_tagged", path)

    def put_if(self, path: str, data: Bytes, tag: str | None) -> None:
        """Make ``path`` a small file with ``data`` if it still is the version of ``tag`` (None: if it is absent).

        Raises:
            StorageError: with ``errno`` EEXIST when it is another version, and nothing was done.
        """
        raise self._has_no("put_if", path)

    def abort_uploads(self, path: str, is_dead: Callable[[str], bool] = lambda name: True) -> int:
        """Abort the uploads of files below a folder that were never ended; how many there were.

        ``is_dead`` says of a file's name, relative to the folder, whether nobody is at work on it.
        """
        return 0

    def _has_no(self, operation: str, path: str) -> StorageError:
        message = f"{self.root} has no conditional put"
        return StorageError(message, operation=operation, path=path, errno=errno.ENOTSUP)

    @abstractmethod
    def append(self, path: str, data: Bytes) -> None:
        """Add to the end of a small file, made if absent; not synced. For logs, not for what a checkpoint needs."""

    @abstractmethod
    def make_folder(self, path: str) -> None:
        """Create a folder and its parents, each synced into its parent; no error if it exists."""

    @abstractmethod
    def sync_folder(self, path: str) -> None:
        """Make the names in a folder outlive a power cut."""

    @abstractmethod
    def rename(self, src: str, dst: str) -> None:
        """Move a file or folder to ``dst``, which must not exist. Atomic. Synced by ``sync_folder`` of the parents."""

    @abstractmethod
    def exchange(self, one: str, other: str) -> bool:
        """Swap two names in one atomic act. False (and nothing done) where the file system can't."""

    def why_fixed(self, path: str) -> str:
        """The reason why the folder at ``path`` can't be replaced by another; empty if it can."""
        return ""

    def keep_access(self, src: str, dst: str) -> None:
        """Give the folder ``dst`` mode, owner and group of ``src``, as far as that is allowed, where there are any."""
        return

    def carry(self, src: str, dst: str) -> None:
        """Make ``dst`` (which must not exist) the same file as ``src``, or a copy, whatever kind of file it is."""
        self.write(dst, self.read(src))

    def share(self, src: str, dst: str) -> bool:
        """Make ``dst`` (which must not exist) a file with the bytes of ``src``, without moving them; they never change.

        By a second name of the same file, by blocks that two files have in common, or by a copy within a store. False,
        and nothing done, where there is no such way, or no ``src``. ``dst`` is synced by ``sync_folder`` of its folder.
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
        """Delete a folder and all below it (links are removed, not followed); no error if it is absent."""
