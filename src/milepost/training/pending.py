"""A started save that is not logged yet."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.saving.background import SaveHandle, log_wait
from milepost.saving.job import SaveReport


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
