"""Log the progress of long work, and the cause of a wait.

A hanging storage can't be interrupted, but it is reported.
"""

from __future__ import annotations

import logging
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
    over = threading.Event()

    def warn() -> None:
        while not over.wait(SLOW_S):
            text = what if isinstance(what, str) else what()
            log.warning("%s: for %.0f s now; is the storage slow, or does it hang?", text, time.monotonic() - started)

    started = time.monotonic()
    thread = threading.Thread(target=warn, name="milepost-watch", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads are available: the work matters, not the log
        yield
        return
    try:
        yield
    finally:
        over.set()
        thread.join()


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
