"""Signals that ask for a save: noted when they come, acted on when all ranks have agreed."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

DUE = 1
SAVE = 2
STOP = 4
FAILED = 8
"""Bits that ranks exchange: a save is due by the clock, was asked for by SIGUSR1, or by SIGTERM before stopping; or a
rank could not say."""


class SignalFlags:
    """Notes SIGUSR1 and SIGTERM. ``agreed`` holds what any rank had noted at the last exchange."""

    def __init__(self) -> None:
        self.agreed = 0
        self._noted = 0
        self._before: dict[int, Any] = {}

    @property
    def listening(self) -> bool:
        return bool(self._before)

    def listen(self) -> None:
        """Install the handlers; on the main thread. A second SIGTERM does what it did before."""
        if not self.listening:
            self._before = {
                signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._note),
                signal.SIGTERM: signal.signal(signal.SIGTERM, self._note),
            }

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def take(self) -> int:
        """What came in since the last call."""
        noted, self._noted = self._noted, 0
        return noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._noted |= STOP
            signal.signal(signal.SIGTERM, self._before[number])
        else:
            self._noted |= SAVE
