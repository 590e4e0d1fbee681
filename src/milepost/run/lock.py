"""The lock of a run's folder: it names its holder, and a dead holder loses it.

The lock is a small file that names its owner. On the same machine a holder is dead when its process is gone.
From another machine the file is watched: a live holder appends a byte to it at intervals, so a lock that does not grow
for a lease is dead. No clocks are compared. (Chubby, borg and restic use
such leases by observation too.)
"""

from __future__ import annotations

import errno
import hashlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from milepost.errors import FormatError, RunLockedError, StorageError
from milepost.run.owner import Owner, is_alive, is_here, parse_owner, this_process
from milepost.storage.base import Storage, join

log = logging.getLogger("milepost")

LOCK_NAME = ".lock"
BEAT_S = 20.0
"""A holder adds a byte to its lock this often."""
LEASE_S = 90.0
"""A lock from another machine that has not grown for this long is assumed to be a dead run's."""
MAX_LOCK_NBYTES = 16 << 20
"""The bytes that a holder adds in ten years."""

_RIGHT_PREFIX = LOCK_NAME + "-"


@dataclass(frozen=True, slots=True)
class _Seen:
    """A snapshot of a lock. Torn ones are distinguished only by their time."""

    text: bytes
    mtime_s: float

    @property
    def owner(self) -> Owner | None:
        """Its holder; None for one torn by a crash, or being written: then only its growth shows life."""
        try:
            return parse_owner(self.text.rstrip(b".\n"), LOCK_NAME)
        except FormatError:
            return None


class RunLock:
    """A lock held from construction to :meth:`release`, or until this object is collected or the process ends.

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
        self._lease_s = lease_s
        self._sleep = sleep
        storage.make_folder(folder)
        while not self._take(self._path):
            self._break_or_refuse()
        self._forget_rights()
        released = threading.Event()
        args = (storage, self._path, self._record, released, beat_s)
        # The thread must not reference this object, or it would never be collected.
        self._thread = threading.Thread(target=_hold, args=args, name="milepost-lock", daemon=True)
        self._thread.start()
        self._let_go = weakref.finalize(self, _let_go, released, self._thread)

    def release(self) -> None:
        """Release the lock. A failure to remove it is logged: later it counts as a dead run's."""
        self._let_go()
        self._thread.join()

    def _take(self, path: str) -> bool:
        """Create the lock file, naming this process; returns True for the one caller that succeeds."""
        self._record = this_process(time.time()).dump() + b"\n"
        try:
            self._storage.write(path, self._record)
        except StorageError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
        return True

    def _look(self, path: str) -> _Seen | None:
        return _look(self._storage, path)

    def _break_or_refuse(self) -> None:
        seen = self._look(self._path)
        if seen is None:
            return  # it was released meanwhile
        if self._is_held(self._path, seen):
            raise self._refusal((self._look(self._path) or seen).owner)
        self._break(self._path, seen)

    def _is_held(self, path: str, seen: _Seen) -> bool:
        """Return whether a lock is that of a living process other than this one."""
        owner = seen.owner
        if owner is not None and is_here(owner):
            return owner.pid != this_process(0.0).pid and is_alive(owner, time.time())
        return self._grows(path, len(seen.text), owner)

    def _grows(self, path: str, nbytes: int, owner: Owner | None) -> bool:
        """Return whether its holder, on another machine or not yet named, shows a sign of life within a lease."""
        log.info("%s is held by %s: waiting up to %.0f s to see whether it is alive", path, owner or "?", self._lease_s)
        for _ in range(int(self._lease_s)):
            self._sleep(1.0)
            found = self._storage.stat(path)
            if found is None:
                return False
            if found.nbytes != nbytes:
                return True
        return False

    def _break(self, path: str, seen: _Seen) -> None:
        """Remove a dead run's lock, if it is still the one that was seen.

        The right to remove it is itself a lock, named after the dead lock's content, so that the lock of a run that was
        quicker is not removed. If the holder of that right dies, it is broken in the same way.
        """
        right = join(self._folder, _RIGHT_PREFIX + hashlib.blake2b(repr(seen).encode(), digest_size=8).hexdigest())
        if self._take(right):
            if self._look(path) == seen:
                self._storage.remove(path)
            self._storage.remove(right)
            return
        other = self._look(right)
        if other is not None and not self._is_held(right, other):
            self._break(right, other)
        else:
            self._sleep(0.01)

    def _forget_rights(self) -> None:
        """Remove the remains of processes that died while breaking a lock: they concern earlier locks only."""
        try:
            for entry in self._storage.list(self._folder):
                if entry.name.startswith(_RIGHT_PREFIX):
                    self._storage.remove(join(self._folder, entry.name))
        except StorageError as error:
            log.warning("remains of broken locks could not be removed: %s", error)

    def _refusal(self, owner: Owner | None) -> RunLockedError:
        who = f"{owner}, since {_when(owner.created_s)}" if owner is not None else "an unknown process"
        return RunLockedError(
            f"another run writes to {self._storage.root}/{self._folder}: {who}. Wait for it, stop it, or give this run "
            "another job.dump_folder or checkpoint.folder; to only read, set checkpoint.load_only",
            path=self._path,
        )


def _look(storage: Storage, path: str) -> _Seen | None:
    """Read the lock at ``path``; None if there is none."""
    try:
        found = storage.stat(path)
        return _Seen(storage.read(path, MAX_LOCK_NBYTES), found.mtime_s) if found is not None else None
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _is_ours(storage: Storage, path: str, record: bytes) -> bool:
    """Return whether the lock is still this run's: the lease may expire while this process is suspended."""
    seen = _look(storage, path)
    return seen is not None and seen.text.startswith(record)


def _hold(storage: Storage, path: str, record: bytes, released: threading.Event, beat_s: float) -> None:
    """Renew the lock until it is released, then remove it, unless another run has replaced it."""
    while not released.wait(beat_s):
        try:
            if not _is_ours(storage, path, record):
                log.warning("%s no longer belongs to this run: another run has taken it", path)
                return
            storage.append(path, b".")
        except StorageError as error:  # the lease may expire, which is no reason to stop training
            log.warning("the lock of this run could not be renewed: %s", error)
    try:
        if _is_ours(storage, path, record):
            storage.remove(path)
    except StorageError as error:  # the next run breaks it, at the latest when this process has ended
        log.warning("the lock of this run could not be removed: %s", error)


def _let_go(released: threading.Event, thread: threading.Thread) -> None:
    """Have the lock's thread remove it (a forked child has no such thread, so it can't).

    The garbage collector may call this in that thread, or in one that holds a lock that it needs, so this waits for the
    removal only for a bounded time.
    """
    released.set()
    if thread is not threading.current_thread():
        thread.join(timeout=5.0)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
