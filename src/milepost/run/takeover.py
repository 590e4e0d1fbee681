"""Taking over a run's folder: lock it, let the writers of a dead run finish, remove stale attempts."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from milepost.errors import StorageError
from milepost.run.lock import RunLock
from milepost.run.object_sweep import remove_orphans
from milepost.run.owner import Owner, is_alive, is_here, owners_of
from milepost.run.step_names import ATTEMPT_PREFIX, OLD_ATTEMPT_PREFIX
from milepost.run.sweep import files_of_attempt, name_left, sweep_leftovers
from milepost.storage.base import Storage, join

log = logging.getLogger("milepost")

WRITERS_TIMEOUT_S = 120.0
"""Seconds that a starting run waits for the writer processes of a dead run."""
LEASE_S = 90.0
"""An attempt from another machine that has not changed for this long is assumed to be dead."""
LOOK_EVERY_S = 0.05


def take_over(storage: Storage, folder: str) -> RunLock:
    """Lock a run's folder, let the writers of a dead run finish, and remove stale save attempts.

    Raises:
        RunLockedError: a run that still lives holds the lock.
        StorageError: the storage refused.
    """
    attempts = Attempts(storage, folder)  # observe the attempts during the wait for the lock
    lock = RunLock(storage, folder)
    try:
        attempts.wait(WRITERS_TIMEOUT_S)
        swept = sweep_leftovers(storage, folder, now=time.time(), dead=attempts.dead())
        for name in swept.removed:
            log.info("removed stale save attempt %s", name)
        name_left(storage, folder, swept.left)
        if not storage.can_rename:
            for name in remove_orphans(storage, folder):
                log.info("removed %s, a file of a save that was not committed", name)
    except BaseException:
        lock.release()
        raise
    return lock


class Attempts:
    """The attempts in a run's folder, watched for signs of life.

    The system knows whether a process on this machine is alive. An attempt of a process elsewhere is dead if nothing
    changes in it for a lease. As for the lock, no clocks are compared.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._storage = storage
        self._folder = folder
        self._lease_s = lease_s
        self._clock = clock
        self._seen: dict[str, tuple[object, float]] = {}
        """The content of each attempt, and the time of its last change."""
        self.look(now=time.time())

    def look(self, *, now: float) -> list[Owner]:
        """The processes that may still work on an attempt. ``now`` is in seconds since the epoch."""
        found: list[Owner] = []
        seen: dict[str, tuple[object, float]] = {}
        for entry in self._storage.list(self._folder):
            if entry.name.startswith((ATTEMPT_PREFIX, OLD_ATTEMPT_PREFIX)):
                path = join(self._folder, entry.name)
                with contextlib.suppress(StorageError):  # its owner is removing it
                    inside = (self._storage.list(path), files_of_attempt(self._storage, path))
                    before, since = self._seen.get(entry.name, (None, 0.0))
                    seen[entry.name] = (inside, since if before == inside else self._clock())
                    owners = [owner for owner in owners_of(self._storage, path) if is_alive(owner, now)]
                    is_still = self._clock() - seen[entry.name][1] >= self._lease_s
                    found += [owner for owner in owners if is_here(owner) or not is_still]
        self._seen = seen
        return found

    def dead(self) -> set[str]:
        """The attempts that have not changed for a lease, and have no owner alive on this machine."""
        since = self._clock() - self._lease_s
        still = {name for name, (_, seen) in self._seen.items() if seen <= since}
        return {name for name in still if not self._lives_here(name)}

    def _lives_here(self, name: str) -> bool:
        try:
            owners = owners_of(self._storage, join(self._folder, name))
        except StorageError:
            return True
        return any(is_here(owner) and is_alive(owner, time.time()) for owner in owners)

    def wait(self, timeout_s: float, *, sleep: Callable[[float], None] = time.sleep) -> list[Owner]:
        """Wait until no process may still work on an attempt; after ``timeout_s`` return those that may."""
        deadline = self._clock() + timeout_s
        has_logged = False
        while owners := self.look(now=time.time()):
            if not has_logged:
                has_logged = True
                log.info(
                    "waiting up to %.0f s for %s to commit what an earlier run had staged",
                    timeout_s,
                    ", ".join(sorted({str(owner) for owner in owners})),
                )
            if self._clock() > deadline:
                log.warning("continuing without it: %s is still running", owners[0])
                break
            sleep(LOOK_EVERY_S)
        return owners
