"""Signals that ask for a save: noted when they arrive, acted on when all ranks have agreed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

DUE = 1
SAVE = 2
STOP = 4
FAILED = 8
INTERRUPT = 16
"""Bits that ranks exchange: a save is due by the clock, was asked for by SIGUSR1, or by SIGTERM (STOP) or SIGINT
(INTERRUPT) before stopping; or a rank failed to decide (FAILED)."""

_BITS = {signal.SIGUSR1: SAVE, signal.SIGTERM: STOP, signal.SIGINT: INTERRUPT}

ECHO_S = 1.0
"""A scheduler signals every process of a job, and a launcher passes on what it got: the same signal within this time of
the first is the same request."""


class SignalFlags:
    """Notes SIGUSR1, SIGTERM and, on request, SIGINT. ``agreed`` holds what any rank had noted at the last exchange."""

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
        """Why the ranks have agreed to stop; None if they have not."""
        if self.agreed & INTERRUPT:
            return signal.SIGINT
        return signal.SIGTERM if self.agreed & STOP else None

    def listen(self, *, interrupt: bool = False, on_stop: Callable[[signal.Signals], None] | None = None) -> None:
        """Install the handlers; on the main thread. With ``interrupt``, SIGINT is handled as SIGTERM is.

        A second request to stop does what that signal did before. ``on_stop`` is called in the handler of the first.
        """
        if self.listening:
            return
        self._on_stop = on_stop
        for number in _BITS:
            if number != signal.SIGINT or interrupt:
                self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def take(self) -> int:
        """What arrived since the last call."""
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
        elif number != self._stop[0] or now - self._stop[1] >= ECHO_S:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
