"""The consequence of a failed save for the run: ``CheckpointConfig.on_save_error``."""

from __future__ import annotations

import logging

from milepost.config import CheckpointConfig
from milepost.errors import SaveError

log = logging.getLogger("milepost")

MAX_FAILURES = 3
"""Number of consecutive failed saves that stop a run even with ``on_save_error = "warn"``."""


class SaveFailures:
    """Counts failed saves. They are the same on every rank, so every rank continues or stops."""

    def __init__(self, config: CheckpointConfig, rank: int):
        self._config = config
        self._rank = rank
        self.num_in_a_row = 0

    def stop_or_warn(self, error: SaveError) -> None:
        """Raise ``error``, or with ``on_save_error = "warn"`` log it."""
        self.num_in_a_row += 1
        if self._config.on_save_error == "stop":
            raise error
        if self.num_in_a_row >= MAX_FAILURES:
            raise SaveError(
                f"{self.num_in_a_row} consecutive saves failed; the last: {error.message}", rank=error.rank
            ) from error
        if self._rank == 0:
            log.warning("a save failed, training continues (checkpoint.on_save_error = warn): %s", error)
