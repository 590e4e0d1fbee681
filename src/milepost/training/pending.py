"""A started save that is not logged yet."""

from __future__ import annotations

import os
from dataclasses import dataclass

from milepost.saving.background import SaveHandle, log_wait
from milepost.saving.job import SaveReport
from milepost.training.events import SaveLog


@dataclass(slots=True, eq=False)
class PendingSave:
    """A started save, with its report, or the handle that will provide it."""

    step: int
    reason: str
    kind: str
    outcome: SaveReport | SaveHandle
    stall_s: float
    is_staged: bool = False

    def report(self, rank: int) -> SaveReport | None:
        """Wait for the end of the save and return its report; None if it failed."""
        if isinstance(self.outcome, SaveReport):
            return self.outcome
        log_wait(self.outcome, rank)
        return self.outcome.result() if self.outcome.failure is None else None

    @property
    def failure(self) -> str:
        """The error of a failed save; empty if it did not fail."""
        error = None if isinstance(self.outcome, SaveReport) else self.outcome.failure
        return getattr(error, "message", str(error)) if error is not None else ""


class LateRecord:
    """Records the save begun last where no call of the manager does: after an error, or if the manager is dropped.

    Does not hold the manager.
    """

    def __init__(self, log: SaveLog, rank: int):
        self.pending: PendingSave | None = None
        """The save that is not recorded yet."""
        self._log = log
        self._rank = rank
        self._pid = os.getpid()

    def record(self) -> None:
        """Record the save once it has ended: now, or in the thread that ends it. On rank 0; never waits."""
        pending, self.pending = self.pending, None
        if pending is None or self._rank != 0 or os.getpid() != self._pid:  # a forked child does not save
            return
        if isinstance(pending.outcome, SaveHandle):
            pending.outcome.when_done(lambda: self._write(pending))

    def _write(self, pending: PendingSave) -> None:
        report = pending.report(self._rank)
        if report is None:
            self._log.failed(pending.step, pending.reason, pending.failure)
        else:
            self._log.record(
                report, step=pending.step, reason=pending.reason, kind=pending.kind, stall_s=pending.stall_s
            )
        self._log.close()
