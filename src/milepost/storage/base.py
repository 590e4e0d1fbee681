"""The seam between Milepost and the places where checkpoints live.

A storage is a tree of names below one root. Names are relative, ``/``-separated and never leave the root; ``""`` is
the root itself. Every method either does all that it promises or raises ``StorageError`` (``CheckpointNotFoundError``
is not its business): there are no short reads and no short writes, and no error is swallowed.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

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


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder. ``nbytes`` is 0 for folders; ``mtime_s`` is in seconds since the epoch."""

    name: str
    is_folder: bool
    nbytes: int
    mtime_s: float
    is_link: bool = False


class ReadHandle(ABC):
    """An open file. Safe to use from several threads at once."""

    path: str
    nbytes: int

    @abstractmethod
    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers`` (writable, byte-format), one after the other, from ``offset`` on.

        Raises StorageError when the file ends before they are full.
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
    that is not aligned to it is still correct.
    """

    path: str
    alignment: int = 1

    @abstractmethod
    def write(self, offset: int, buffers: Sequence[Bytes]) -> None:
        """Store ``buffers``, one after the other, from ``offset`` on. The caller may reuse them at once."""

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
    """A tree of names below ``root``."""

    root: str

    @property
    @abstractmethod
    def can_rename(self) -> bool:
        """Whether a folder can be renamed and two names exchanged in one atomic act."""

    @abstractmethod
    def list(self, path: str) -> list[Entry]:
        """What is in a folder, sorted by name; empty when the folder is absent."""

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

    @abstractmethod
    def write(self, path: str, data: Bytes) -> None:
        """Create a small file (it must not exist) with ``data``, synced."""

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

    @abstractmethod
    def remove(self, path: str) -> None:
        """Delete one file; no error if it is absent."""

    @abstractmethod
    def remove_tree(self, path: str) -> None:
        """Delete a folder and all below it (links are removed, not followed); no error if it is absent."""
