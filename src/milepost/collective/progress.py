"""Lines in the log that tell how far a long save or load is."""

from __future__ import annotations

import logging
import threading
import time

log = logging.getLogger("milepost")


class Progress:
    """Says now and then how much of ``nbytes`` is done, if it takes more than ``EVERY_S`` and unless ``is_quiet``."""

    EVERY_S = 2.0

    def __init__(self, doing: str, nbytes: int, *, is_quiet: bool = False):
        self._doing = doing
        self._is_quiet = is_quiet
        self._nbytes = nbytes
        self._done_nbytes = 0
        self._started = self._told = time.monotonic()
        self._lock = threading.Lock()

    @property
    def part(self) -> float:
        """How much is done, from 0 to 1."""
        return min(1.0, self._done_nbytes / self._nbytes) if self._nbytes else 1.0

    def add(self, nbytes: int) -> None:
        """So many bytes more are done. May be called from any thread."""
        with self._lock:
            self._done_nbytes += nbytes
            self._tell()

    def reach(self, done_nbytes: int) -> None:
        """So many bytes are done in all."""
        with self._lock:
            self._done_nbytes = done_nbytes
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if not self._is_quiet and now - self._told >= self.EVERY_S:
            self._told = now
            log.info("%s: %.0f %% after %.0f s", self._doing, 100.0 * self.part, now - self._started)
