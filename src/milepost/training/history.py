"""The lineage of a run's saves, kept from one save to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from milepost.collective.comm import Comm, on_rank_0
from milepost.collective.meeting import meeting
from milepost.errors import SaveError, StorageError
from milepost.format.manifest import Lineage
from milepost.run.branches import Descent, begin
from milepost.run.catalog import StepEntry

log = logging.getLogger("milepost")


class SaveHistory:
    """The lineage of each save of a run: its parent is the loaded step or the previous save. The same on every rank."""

    def __init__(self, comm: Comm, scan: Callable[[], list[StepEntry]], look: Callable[[], None]):
        self._comm = comm
        self._look = look
        self._scan = scan
        self._next: Descent | None = None
        self._has_warned = False
        self.committed_step: int | None = None
        """The last step known to be committed."""

    def resumed(self, descent: Descent | None) -> None:
        """Record the loaded step; None if it is not in the run's folder."""
        self._next = descent

    def next_lineage(self, step: int) -> Lineage:
        """Return the lineage of a save of ``step``. Collective for the first save of a run that has loaded no step.

        Raises:
            SaveError: on every rank, if the folder can't be read.
        """
        descent = self._descent(step)
        self._warn_of_going_back(step, descent.parent_step)
        self._next = descent.tried()
        return descent.lineage()

    def run_id(self, step: int) -> str:
        """Return the id of the run that saves ``step``. Collective and raises like :meth:`next_lineage`."""
        return self._descent(step).run

    def _descent(self, step: int) -> Descent:
        if self._next is None:
            with meeting(self._comm, f"saving step {step}"):  # nothing before has waited for all ranks
                self._look()
                self._next = on_rank_0(self._comm, partial(self._begin, step))
        return self._next

    def _warn_of_going_back(self, step: int, parent_step: int | None) -> None:
        """Warn once if steps are counted anew in the folder of the step that was resumed from."""
        if parent_step is None or step >= parent_step or self._has_warned or self._comm.rank != 0:
            return
        self._has_warned = True
        log.warning(
            "step %d is saved by a run that continues from step %d: an older step of this number is replaced. To count "
            "steps anew, give the run another checkpoint.folder, with initial_load_path",
            *(step, parent_step),
        )

    def committed(self, step: int, save_id: str) -> None:
        """Record that the last save is committed, so that the next one descends from it."""
        self.committed_step = step
        if self._next is not None:
            self._next = self._next.committed(step, save_id)

    def _begin(self, step: int) -> Descent:
        try:
            return begin(self._scan(), step)
        except StorageError as error:
            raise SaveError(error.message, path=error.path) from error
