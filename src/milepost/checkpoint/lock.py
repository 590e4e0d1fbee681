"""One writer to a run's folder: a lock that says who holds it, and that a dead holder can't keep.

The lock is a small file that names its owner. On the same machine a holder is dead when its process is gone. From
another machine that can't be seen, so a holder adds a byte to the file now and then, and one who wants the lock watches
whether it grows: no clocks are compared. (The lease by observation is that of Chubby and of borg's and restic's locks.)
"""

from __future__ import annotations

import errno
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable

from milepost.catalog import DELETING_PREFIX
from milepost.checkpoint.owner import Owner, is_alive, is_here, parse_owner, this_process
from milepost.errors import FormatError, RunLockedError, StorageError
from milepost.storage.base import Storage, join

log = logging.getLogger("milepost")

LOCK_NAME = ".lock"
BEAT_S = 20.0
"""A holder adds a byte to its lock this often."""
LEASE_S = 90.0
"""A lock from another machine that has not grown for this long is taken for a dead run's."""


class RunLock:
    """Held from construction to :meth:`release`, or until nobody has this object any more, or the process ends.

    Raises:
        RunLockedError: a run that still lives holds it; the message names host, process and start.
        StorageError: the folder can't be written.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        *,
        beat_s: float = BEAT_S,
        lease_s: float = LEASE_S,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._storage = storage
        self._folder = folder
        self._path = join(folder, LOCK_NAME)
        self._text = b""
        storage.make_folder(folder)
        while not self._take():
            self._break_or_refuse(lease_s, sleep)
        released = threading.Event()
        args = (storage, self._path, self._text, released, beat_s)
        # The thread must not know this object, or it would never be forgotten.
        self._thread = threading.Thread(target=_hold, args=args, name="milepost-lock", daemon=True)
        self._thread.start()
        self._let_go = weakref.finalize(self, _let_go, released, self._thread)

    def release(self) -> None:
        """Let another run in. No error if the lock is gone, or can't be removed: that is logged."""
        self._let_go()
        self._thread.join()

    def _take(self) -> bool:
        self._text = this_process(time.time()).dump() + b"\n"
        try:
            self._storage.write(self._path, self._text)
        except StorageError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
        return True

    def _break_or_refuse(self, lease_s: float, sleep: Callable[[float], None]) -> None:
        try:
            seen = self._storage.read(self._path, 1 << 20)
        except StorageError:
            return  # it was released this moment
        owner = _owner_in(seen)
        if owner is not None and is_here(owner):
            mine = owner.pid == this_process(0.0).pid
            if not mine and is_alive(owner, time.time()):
                raise self._refusal(owner)
        elif self._grows(len(seen), owner, lease_s, sleep):
            raise self._refusal(owner)
        self._break(seen)

    def _grows(self, nbytes: int, owner: Owner | None, lease_s: float, sleep: Callable[[float], None]) -> bool:
        """Whether its holder, on another machine, is seen to live within a lease."""
        log.info("%s is held by %s: waiting up to %.0f s to see whether it lives", self._path, owner or "?", lease_s)
        for _ in range(int(lease_s)):
            sleep(1.0)
            found = self._storage.stat(self._path)
            if found is None:
                return False
            if found.nbytes != nbytes:
                return True
        return False

    def _break(self, seen: bytes) -> None:
        """Take a dead run's lock away. Of several that try, one succeeds; the others look again."""
        aside = join(self._folder, DELETING_PREFIX + uuid.uuid4().hex)
        try:
            self._storage.rename(self._path, aside)
        except StorageError:
            return
        if self._storage.read(aside, 1 << 20) != seen:  # someone else broke it and took it first
            self._storage.rename(aside, self._path)
            return
        self._storage.remove(aside)

    def _refusal(self, owner: Owner | None) -> RunLockedError:
        who = f"{owner}, since {_when(owner.created_s)}" if owner is not None else "a process that left no name"
        return RunLockedError(
            f"another run writes to {self._storage.root}/{self._folder}: {who}. Wait for it, stop it, or give this run "
            "another job.dump_folder or checkpoint.folder; to only read, set checkpoint.load_only",
            path=self._path,
        )


def _hold(storage: Storage, path: str, text: bytes, released: threading.Event, beat_s: float) -> None:
    """Renew the lock until it is released, then remove it, unless another one has been put in its place."""
    while not released.wait(beat_s):
        try:
            storage.append(path, b".")
        except StorageError as error:  # the lease may run out; training need not stop for it
            log.warning("the lock of this run could not be renewed: %s", error)
    try:
        if storage.stat(path) is not None and storage.read(path, 1 << 20).startswith(text):
            storage.remove(path)
    except StorageError as error:  # at the latest when this process has ended, the next run breaks it
        log.warning("the lock of this run could not be removed: %s", error)


def _let_go(released: threading.Event, thread: threading.Thread) -> None:
    """Have the lock removed by its thread (a fork of the holder has none, so it can't).

    The garbage collector may run this in that very thread, or in one that holds what that one waits for: so it waits
    for the removal, but not for long.
    """
    released.set()
    if thread is not threading.current_thread():
        thread.join(timeout=5.0)


def _owner_in(data: bytes) -> Owner | None:
    try:
        return parse_owner(data.rstrip(b".\n"), LOCK_NAME)
    except FormatError:
        return None  # torn by a crash: only its growth tells


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
