"""Reading many files with a limited number open at a time: a process may be limited to 1,024 open files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from milepost.storage.base import ReadHandle, Storage

MAX_OPEN_FILES = 128
"""Briefly exceeded if more threads read different files at once."""


class OpenFiles:
    """Files of a storage, open while they are read. A context manager.

    The first ones stay open; those beyond the limit take turns.
    """

    def __init__(self, storage: Storage, limit: int = MAX_OPEN_FILES):
        self._storage = storage
        self._num_turns = limit // 4
        self._num_kept = limit - self._num_turns
        self._kept: list[ReadHandle] = []
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()  # least recently used first
        self._ranges: dict[str, Sequence[tuple[int, int]]] = {}

    def open(self, path: str) -> ReadHandle:
        """Open the file at ``path`` now, so that a missing file is reported before anything is read.

        Raises:
            StorageError: it can't be opened.
        """
        if len(self._kept) < self._num_kept:
            self._kept.append(self._storage.open_read(path))
            return self._kept[-1]
        with self.using(path) as handle:
            return _PooledRead(self, path, handle)

    @contextmanager
    def using(self, path: str) -> Iterator[ReadHandle]:
        """Hold the file at ``path`` open for the block: one of those that take turns."""
        held = self._take(path)
        try:
            yield held.handle
        finally:
            with self._lock:
                held.num_users -= 1

    def _take(self, path: str) -> _Held:
        with self._lock:
            held = self._held.get(path)
            if held is not None:
                held.num_users += 1
                self._held.move_to_end(path)
                return held
        # Not under the lock: on a network file system other threads would wait for it.
        opened = self._storage.open_read(path)
        if path in self._ranges:
            opened.will_read(self._ranges[path])
        with ExitStack() as closing, self._lock:
            held = self._held.get(path)
            if held is None:
                held = self._held[path] = _Held(opened)
            else:  # another thread opened it first
                closing.callback(opened.close)
            held.num_users += 1
            idle = [name for name, one in self._held.items() if not one.num_users]
            for name in idle[: max(0, len(self._held) - self._num_turns)]:
                closing.callback(self._held.pop(name).handle.close)
            return held

    def will_read(self, path: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Announce reads of a file, to this handle and to any later one if this one is closed meanwhile."""
        self._ranges[path] = ranges
        with self.using(path) as handle:
            handle.will_read(ranges)

    def close(self) -> None:
        """Close all files. Called when no thread reads any more."""
        with ExitStack() as closing, self._lock:
            for handle in (*self._kept, *(held.handle for held in self._held.values())):
                closing.callback(handle.close)
            self._kept.clear()
            self._held.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(slots=True, eq=False)
class _Held:
    handle: ReadHandle
    num_users: int = 0


class _PooledRead(ReadHandle):
    """A file that is reopened on a read if it was closed to make room."""

    def __init__(self, files: OpenFiles, name: str, opened: ReadHandle):
        self.path = opened.path
        self.nbytes = opened.nbytes
        self._files = files
        self._name = name

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        with self._files.using(self._name) as handle:
            handle.read_into(offset, buffers)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._files.will_read(self._name, ranges)

    def close(self) -> None:
        """Do nothing: all files are closed together."""
