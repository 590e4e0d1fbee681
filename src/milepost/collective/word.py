"""Word of a failed save past its storage, for a rank whose storage refuses even a sign-off.

The ranks of a save agree through storage records. A rank that has run out of open files, or has lost its mount, can
leave none, and the others would wait for it to the time-out. So a failure is told through the job's own store too.
"""

from __future__ import annotations

import json

from milepost.collective.comm import Comm
from milepost.errors import MilepostError, SaveError


class Word:
    """What this rank tells and hears of one save. All methods may be called from any thread, and none waits."""

    def __init__(self, comm: Comm, save_id: str):
        self._comm = comm
        # Rank 0 waits for any of the others, and they for rank 0 alone.
        self._ours, self._theirs = f"{save_id} rank 0", f"{save_id} others"
        if comm.rank != 0:
            self._ours, self._theirs = self._theirs, self._ours

    def leave(self, error: MilepostError) -> None:
        """Tell that this rank has failed, and why: perhaps because another one has."""
        self._comm.leave_word(self._ours, json.dumps([error.rank, error.message]))

    def check(self) -> None:
        """Return if nothing was heard.

        Raises:
            SaveError: the save has failed on a rank that this one waits for, named.
        """
        text = self._comm.find_word(self._theirs)
        if text is not None:
            rank, message = json.loads(text)
            if f"rank {rank}" not in message:
                message = f"the save failed on rank {rank}: {message}"
            raise SaveError(message, rank=rank)
