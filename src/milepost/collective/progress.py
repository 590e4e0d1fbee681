"""Log the progress of long work, and the cause of a wait.

A hanging storage can't be interrupted, but it is reported.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("milepost")

SLOW_S = 30.0
"""Work in progress is logged at this interval in seconds."""


def writing(rank: int, where: str, part: float) -> str:
    """Describe for :func:`watched` a rank that has written ``part`` (0 to 1) of its bytes of a save."""
    if part < 1.0:
        return f"rank {rank} is writing {where} ({100 * part:.0f} % written)"
    return f"rank {rank} has written its part of {where} and is waiting for the disk, the other ranks or the commit"


@contextmanager
def watched(what: str | Callable[[], str]) -> Iterator[None]:
    """Log a warning every ``SLOW_S`` seconds that ``what`` is still in progress, while the block runs.

    ``what`` names the rank and the operation: see :func:`writing`.
    """
    work = _Work(what)
    _watch.add(work)
    try:
        yield
    finally:
        _watch.remove(work)


class _Work:
    """Work in progress: ``what``, since when, and when to log it next, in seconds of the monotonic clock."""

    def __init__(self, what: str | Callable[[], str]):
        self.what = what
        self.started = time.monotonic()
        self.due = self.started + SLOW_S

    def log(self) -> None:
        text, lasted_s = self.what if isinstance(self.what, str) else self.what(), time.monotonic() - self.started
        log.warning("%s: for %.0f s now; is the storage slow, or does it hang?", text, lasted_s)


class _Watch:
    """One thread that watches the work of all threads, until there was nothing to watch for a while.

    To start and join a thread for each operation would cost a small save more than its bytes do where cores are busy.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._works: set[_Work] = set()
        self._wakes = 0.0
        """When the thread looks next, unless it is notified; 0: it does not run."""

    def add(self, work: _Work) -> None:
        with self._changed:
            self._works.add(work)
            if not self._wakes:
                self._wakes = work.due
                try:
                    threading.Thread(target=self._run, name="milepost-watch", daemon=True).start()
                except RuntimeError:  # no more threads are available: the work matters, not the log
                    self._wakes = 0.0
            elif work.due < self._wakes:
                self._changed.notify()

    def remove(self, work: _Work) -> None:
        with self._changed:
            self._works.discard(work)

    def _run(self) -> None:
        while late := self._wait():
            for work in late:  # without the lock: a handler of the log may take long
                if work in self._works:
                    work.log()

    def _wait(self) -> list[_Work]:
        """Return works that are due to be logged, at least one; empty if the thread may end."""
        with self._changed:
            while self._works or time.monotonic() < self._wakes:
                self._wakes = min((work.due for work in self._works), default=self._wakes)
                self._changed.wait(max(0.0, self._wakes - time.monotonic()))
                now = time.monotonic()
                late = sorted((work for work in self._works if work.due <= now), key=lambda work: work.due)
                for work in late:
                    work.due = now + SLOW_S
                if late:
                    return late
            self._wakes = 0.0
            return []


_watch = _Watch()


def _watch_anew() -> None:
    """A forked child has no thread to watch, and may have inherited a lock that nobody releases."""
    global _watch
    _watch = _Watch()


os.register_at_fork(after_in_child=_watch_anew)


class ProgressLog:
    """Logs the progress of ``nbytes`` every ``EVERY_S`` seconds, unless ``is_quiet``."""

    EVERY_S = 2.0

    def __init__(self, doing: str, nbytes: int, *, is_quiet: bool = False):
        self._doing = doing
        self._is_quiet = is_quiet
        self._nbytes = nbytes
        self._done_nbytes = 0
        self._started = self._logged = time.monotonic()
        self._lock = threading.Lock()

    @property
    def part(self) -> float:
        """The fraction that is done, from 0 to 1."""
        return min(1.0, self._done_nbytes / self._nbytes) if self._nbytes else 1.0

    def add(self, nbytes: int) -> None:
        """Record that ``nbytes`` more are done; from any thread."""
        with self._lock:
            self._done_nbytes += nbytes
            self._log()

    def reach(self, done_nbytes: int) -> None:
        """Record that ``done_nbytes`` are done in total."""
        with self._lock:
            self._done_nbytes = done_nbytes
            self._log()

    def _log(self) -> None:
        now = time.monotonic()
        if not self._is_quiet and now - self._logged >= self.EVERY_S:
            self._logged = now
            log.info("%s: %.0f %% after %.0f s", self._doing, 100.0 * self.part, now - self._started)
