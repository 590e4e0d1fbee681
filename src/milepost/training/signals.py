"""Requests to save and to stop: signals to any rank, and files that a user creates in the run's folder.

They are recorded when they arrive, and handled when all ranks have agreed.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from milepost.errors import StorageError
from milepost.storage.base import Storage, join

log = logging.getLogger("milepost")

DUE = 1
SAVE = 2
STOP = 4
FAILED = 8
INTERRUPT = 16
SAVE_BY_FILE = 32
STOP_BY_FILE = 64
HANG_UP = 128
"""Bits that ranks exchange: a save is due by the clock, was requested by SIGUSR1, by SIGTERM (STOP), SIGINT (INTERRUPT)
or SIGHUP (HANG_UP) before stopping, or by a file; or a rank failed to decide (FAILED)."""

REASONS = {
    INTERRUPT: signal.SIGINT.name,
    STOP: signal.SIGTERM.name,
    HANG_UP: signal.SIGHUP.name,
    STOP_BY_FILE: "file STOP",
    SAVE: signal.SIGUSR1.name,
    SAVE_BY_FILE: "file SAVE",
}
"""The reason of each request, strongest first."""

FILES = {"SAVE": SAVE_BY_FILE, "STOP": STOP_BY_FILE}
"""The request made by a file of this name in the run's folder."""
LOOK_EVERY_S = 1.0
"""The folder is checked for these files at most this often."""

_BITS = {signal.SIGUSR1: SAVE, signal.SIGTERM: STOP, signal.SIGINT: INTERRUPT, signal.SIGHUP: HANG_UP}

ECHO_S = 1.0
"""A scheduler signals every process of a job, and a launcher forwards signals: the same signal within this time of
the first is the same request."""


class SignalFlags:
    """Records SIGUSR1, SIGTERM, SIGHUP and, on request, SIGINT.

    ``agreed``: all ranks' requests at the last exchange.
    """

    def __init__(self) -> None:
        self.agreed = 0
        self._noted = 0
        self._before: dict[int, Any] = {}
        self._stop: tuple[int, float] | None = None  # the first request to stop, and when it came
        self._on_stop: Callable[[signal.Signals], None] | None = None

    @property
    def listening(self) -> bool:
        return bool(self._before)

    @property
    def stop_signal(self) -> signal.Signals | None:
        """The signal by which the ranks agreed to stop; None if they did not. A file STOP counts as SIGTERM."""
        if self.agreed & INTERRUPT:
            return signal.SIGINT
        if self.agreed & (STOP | STOP_BY_FILE):
            return signal.SIGTERM
        return signal.SIGHUP if self.agreed & HANG_UP else None

    @property
    def reason(self) -> str | None:
        """The request to save on which the ranks agreed; None if there is none."""
        return next((reason for bit, reason in REASONS.items() if self.agreed & bit), None)

    def listen(self, *, interrupt: bool = False, on_stop: Callable[[signal.Signals], None] | None = None) -> None:
        """Install the handlers; on the main thread. With ``interrupt``, SIGINT is handled like SIGTERM.

        SIGHUP, by which a closed terminal or a lost connection ends a program, is handled like SIGTERM unless it is
        ignored, as ``nohup`` requests.
        A second request to stop has the signal's previous effect. ``on_stop`` is called in the handler of the first.
        """
        if self.listening:
            return
        self._on_stop = on_stop
        for number in _BITS:
            ignored = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not ignored and (number != signal.SIGINT or interrupt):
                self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def take(self) -> int:
        """Return the requests that arrived since the last call."""
        noted, self._noted = self._noted, 0
        return noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._noted |= SAVE
            return
        now = time.monotonic()
        if self._stop is None:
            self._stop = number, now
            self._noted |= _BITS[signal.Signals(number)]
            if self._on_stop is not None:
                self._on_stop(signal.Signals(number))
            return
        first, when = self._stop
        # systemd ends a session by SIGTERM and SIGHUP, in either order: together they are one request.
        is_echo = number == signal.SIGHUP or ((number == first or first == signal.SIGHUP) and now - when < ECHO_S)
        if not is_echo:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)


class RequestFiles:
    """Files ``SAVE`` and ``STOP`` in the run's folder, for use where no signal can be sent. Each is consumed once."""

    def __init__(self, storage: Storage, folder: str, *, clock: Callable[[], float] = time.monotonic):
        self._storage = storage
        self._folder = folder
        self._clock = clock
        self._looked = -LOOK_EVERY_S
        self._warned = False

    def take(self) -> int:
        """Return the requests since the last call. Removes the files; one that can't be removed is ignored.

        Otherwise it would repeat the request, and stop every later start as well.
        """
        if self._clock() - self._looked < LOOK_EVERY_S:
            return 0
        self._looked = self._clock()
        asked = 0
        for name, bit in FILES.items():
            path = join(self._folder, name)
            try:
                if self._storage.stat(path) is not None:
                    self._storage.remove(path)
                    asked |= bit
            except StorageError as error:
                if not self._warned:
                    log.warning("the file %s is ignored, because it can't be removed: %s", name, error)
                self._warned = True
        return asked
