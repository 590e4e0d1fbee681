"""A storage that fails on command: at operation k with an error, a torn write, or a hook."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from milepost.errors import StorageError
from milepost.storage.base import Storage
from milepost.testing.wrap import Operation, WrappedStorage

T = TypeVar("T")

Hook = Callable[[Operation], None]


class FaultyStorage(WrappedStorage):
    """Counts the operations that change something and fails at number ``fail_at`` (from 0; None never fails).

    At that operation ``hook`` is called (to kill the process, for instance), with ``tear`` a write stores the first
    half of its bytes, and StorageError with ``number`` is raised. With ``stays_broken`` every later operation, reads
    included, fails too, as for a process that has died.

    ``operations`` records the operations, so that a first run without a fault shows how many there are.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        fail_at: int | None = None,
        number: int = errno.EIO,
        tear: bool = False,
        stays_broken: bool = False,
        hook: Hook | None = None,
    ):
        super().__init__(inner)
        self.operations: list[Operation] = []
        self._fail_at = fail_at
        self._number = number
        self._tear = tear
        self._stays_broken = stays_broken
        self._hook = hook
        self._broken = False
        self._lock = threading.Lock()

    @property
    def has_failed(self) -> bool:
        """True if operation ``fail_at`` was reached."""
        return self._broken

    def around(self, operation: Operation, act: Callable[[], T], half: Callable[[], None] | None = None) -> T:
        with self._lock:
            first = not self._broken and operation.changes and len(self.operations) == self._fail_at
            later = self._broken and self._stays_broken
            self._broken = self._broken or first
            if operation.changes:
                self.operations.append(operation)
        if not first and not later:
            return act()
        if first and self._hook is not None:
            self._hook(operation)
        if first and self._tear and half is not None:
            half()
        raise StorageError(
            f"{os.strerror(self._number).lower()} (injected) at {operation} in {self.root}",
            operation=operation.name,
            path=operation.path,
            errno=self._number,
        )
