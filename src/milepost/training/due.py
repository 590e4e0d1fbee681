"""Deciding whether a save is due after a step: by schedule, clock, signal or file, agreed by all ranks."""

from __future__ import annotations

import time

from milepost.collective.comm import Comm, failure_on, raise_together
from milepost.config import CheckpointConfig
from milepost.errors import SaveError
from milepost.training.schedule import needs_clock, reason_by_clock, reason_to_save
from milepost.training.signals import DUE, FAILED, RequestFiles, SignalFlags


class DueCheck:
    """Decides when to save. ``saved_at`` (``time.monotonic()``) and ``stall_s`` are those of the last save."""

    def __init__(self, config: CheckpointConfig, comm: Comm, signals: SignalFlags, files: RequestFiles):
        self._config = config
        self._comm = comm
        self._signals = signals
        self._files = files
        self.saved_at = time.monotonic()
        self.stall_s: float | None = None

    def reason(self, step: int, *, is_last: bool) -> str | None:
        """Return the reason to save after ``step``, or None. Collective if signals or the clock are in use."""
        asked = self._agreed_request()  # even if no step is due: a request must not wait for the next one
        if self._signals.stop_signal is not None:
            return asked
        return reason_to_save(self._config, step, is_last=is_last) or asked

    def _agreed_request(self) -> str | None:
        """Exchange the requests of all ranks, with the clock of rank 0."""
        if not self._signals.listening and not needs_clock(self._config):
            return None
        by_clock, failure = None, None
        try:
            flags = self._signals.take()
            if self._comm.rank == 0:
                flags |= self._files.take() if self._signals.listening else 0
                since = time.monotonic() - self.saved_at
                by_clock = reason_by_clock(self._config, since_save_s=since, stall_s=self.stall_s)
                flags |= DUE if by_clock is not None else 0
        except BaseException as cause:  # noqa: BLE001 - the other ranks wait for the flags
            flags, failure = FAILED, failure_on(self._comm.rank, cause, SaveError)
        self._signals.agreed = agreed = self._comm.union(flags)
        if agreed & FAILED:
            raise_together(self._comm, failure)
        if self._signals.reason is not None:
            return self._signals.reason
        return (by_clock or "by the clock of rank 0") if agreed & DUE else None
