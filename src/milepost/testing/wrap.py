"""Wrappers around a storage, and one that records each operation.

A wrapper receives each operation as an :class:`Operation` in :meth:`WrappedStorage.around`.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from milepost.storage.base import Bytes, Entry, ReadHandle, Storage, WriteHandle

T = TypeVar("T")

READS = frozenset({"list", "names", "list_files", "stat", "open_read", "read", "read_tagged", "read_into"})
"""Operations that change nothing."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a storage or of one of its handles.

    ``name`` is the method's; those of handles are ``read_into``, ``write_at``, ``sync`` and ``close``. ``nbytes`` is
    what a read or write moves, ``other`` the second path of a rename or exchange.
    """

    name: str
    path: str
    offset: int = 0
    nbytes: int = 0
    other: str = ""

    @property
    def changes(self) -> bool:
        """True if the operation may change what is stored."""
        return self.name not in READS

    def __str__(self) -> str:
        parts = [self.name, self.path or "."]
        if self.other:
            parts.append(self.other)
        if self.name in ("read_into", "write_at"):
            parts.append(f"{self.offset}+{self.nbytes}")
        elif self.nbytes:
            parts.append(str(self.nbytes))
        return " ".join(parts)


class WrappedStorage(Storage):
    """Forwards every operation to ``inner``, through :meth:`around`."""

    def __init__(self, inner: Storage):
        self.inner = inner
        self.root = inner.root

    def around(self, operation: Operation, act: Callable[[], T], half: Callable[[], None] | None = None) -> T:
        """Perform ``operation`` by calling ``act``. Called from several threads if handles are.

        For a write, ``half`` does the first half of it, as a crash in the middle would.
        """
        return act()

    @property
    def can_rename(self) -> bool:
        return self.inner.can_rename

    @property
    def is_remote(self) -> bool:
        return self.inner.is_remote

    @property
    def can_share(self) -> bool:
        return self.inner.can_share

    @property
    def has_conditional_put(self) -> bool:
        return self.inner.has_conditional_put

    @property
    def num_streams(self) -> int:
        return self.inner.num_streams

    @property
    def poll_s(self) -> float:
        return self.inner.poll_s

    def list(self, path: str) -> builtins.list[Entry]:
        return self.around(Operation("list", path), lambda: self.inner.list(path))

    def names(self, path: str) -> Sequence[str]:
        return self.around(Operation("names", path), lambda: self.inner.names(path))

    def list_files(self, path: str) -> dict[str, Entry]:
        return self.around(Operation("list_files", path), lambda: self.inner.list_files(path))

    def stat(self, path: str) -> Entry | None:
        return self.around(Operation("stat", path), lambda: self.inner.stat(path))

    def open_read(self, path: str) -> ReadHandle:
        return self.around(Operation("open_read", path), lambda: _WrappedRead(self, path, self.inner.open_read(path)))

    def open_write(self, path: str, nbytes: int, *, shared: bool = False) -> WriteHandle:
        operation = Operation("open_write", path, nbytes=nbytes)
        return self.around(
            operation, lambda: _WrappedWrite(self, path, self.inner.open_write(path, nbytes, shared=shared))
        )

    def read(self, path: str, limit: int = 1 << 30) -> bytes:
        return self.around(Operation("read", path), lambda: self.inner.read(path, limit))

    def write(self, path: str, data: Bytes) -> None:
        view = memoryview(data).cast("B")
        self.around(
            Operation("write", path, nbytes=len(view)),
            lambda: self.inner.write(path, view),
            lambda: self.inner.write(path, view[: len(view) // 2]),
        )

    def replace(self, path: str, data: Bytes) -> None:
        operation = Operation("replace", path, nbytes=memoryview(data).nbytes)
        self.around(operation, lambda: self.inner.replace(path, data))

    def read_tagged(self, path: str, limit: int = 1 << 30) -> tuple[bytes, str] | None:
        return self.around(Operation("read_tagged", path), lambda: self.inner.read_tagged(path, limit))

    def put_if(self, path: str, data: Bytes, tag: str | None) -> None:
        operation = Operation("put_if", path, nbytes=memoryview(data).nbytes)
        self.around(operation, lambda: self.inner.put_if(path, data, tag))

    def abort_uploads(self, path: str, is_dead: Callable[[str], bool] = lambda name: True) -> int:
        return self.around(Operation("abort_uploads", path), lambda: self.inner.abort_uploads(path, is_dead))

    def append(self, path: str, data: Bytes) -> None:
        operation = Operation("append", path, nbytes=memoryview(data).nbytes)
        self.around(operation, lambda: self.inner.append(path, data))

    def make_folder(self, path: str, *, synced: bool = True) -> None:
        self.around(Operation("make_folder", path), lambda: self.inner.make_folder(path, synced=synced))

    def sync_folder(self, path: str) -> None:
        self.around(Operation("sync_folder", path), lambda: self.inner.sync_folder(path))

    def rename(self, src: str, dst: str) -> None:
        self.around(Operation("rename", src, other=dst), lambda: self.inner.rename(src, dst))

    def exchange(self, one: str, other: str) -> bool:
        return self.around(Operation("exchange", one, other=other), lambda: self.inner.exchange(one, other))

    def why_fixed(self, path: str) -> str:
        return self.inner.why_fixed(path)

    def keep_access(self, src: str, dst: str) -> None:
        self.around(Operation("keep_access", dst, other=src), lambda: self.inner.keep_access(src, dst))

    def carry(self, src: str, dst: str) -> None:
        self.around(Operation("carry", dst, other=src), lambda: self.inner.carry(src, dst))

    def share(self, src: str, dst: str) -> bool:
        return self.around(Operation("share", dst, other=src), lambda: self.inner.share(src, dst))

    def remove(self, path: str) -> None:
        self.around(Operation("remove", path), lambda: self.inner.remove(path))

    def remove_files(self, folder: str, names: Sequence[str]) -> None:
        self.around(Operation("remove_files", folder), lambda: self.inner.remove_files(folder, names))

    def remove_tree(self, path: str) -> None:
        self.around(Operation("remove_tree", path), lambda: self.inner.remove_tree(path))


class _WrappedRead(ReadHandle):
    def __init__(self, owner: WrappedStorage, name: str, inner: ReadHandle):
        self._owner, self._name, self._inner = owner, name, inner
        self.path, self.nbytes = inner.path, inner.nbytes

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._inner.will_read(ranges)

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        operation = Operation("read_into", self._name, offset, sum(buffer.nbytes for buffer in buffers))
        self._owner.around(operation, lambda: self._inner.read_into(offset, buffers))

    def close(self) -> None:
        self._inner.close()


class _WrappedWrite(WriteHandle):
    def __init__(self, owner: WrappedStorage, name: str, inner: WriteHandle):
        self._owner, self._name, self._inner = owner, name, inner
        self.path, self.alignment, self.is_sequential = inner.path, inner.alignment, inner.is_sequential

    def write(self, offset: int, buffers: Sequence[Bytes], *, stable: bool = False) -> None:
        nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)

        def half() -> None:
            whole = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
            self._inner.write(offset, [whole[: nbytes // 2]])

        operation = Operation("write_at", self._name, offset, nbytes)
        self._owner.around(operation, lambda: self._inner.write(offset, buffers, stable=stable), half)

    def sync(self) -> None:
        self._owner.around(Operation("sync", self._name), self._inner.sync)

    def close(self) -> None:
        self._owner.around(Operation("close", self._name), self._inner.close)


class TraceStorage(WrappedStorage):
    """Records all operations in ``operations``, in the order in which they began."""

    def __init__(self, inner: Storage):
        super().__init__(inner)
        self.operations: builtins.list[Operation] = []
        self._lock = threading.Lock()

    def around(self, operation: Operation, act: Callable[[], T], half: Callable[[], None] | None = None) -> T:
        with self._lock:
            self.operations.append(operation)
        return act()

    def nbytes(self, name: str) -> int:
        """Return the total bytes moved by all operations of a name, for instance ``read_into``."""
        with self._lock:
            return sum(operation.nbytes for operation in self.operations if operation.name == name)
