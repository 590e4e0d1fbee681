"""``save``: save a state dict as a committed checkpoint, on one process or many.

::

    objects -state-> {key: leaf} -layout-> boxes -plan-> WritePlan -write-> files + digests -commit-> visible
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from os import PathLike
from typing import Any, Unpack

from milepost.collective.collector import collection_paused
from milepost.collective.comm import Comm, FailureNotice, default_comm, raise_together
from milepost.collective.interrupt import interrupts_held
from milepost.collective.progress import ProgressLog, watched, writing
from milepost.errors import MilepostError
from milepost.run.attempts import abort_attempt
from milepost.saving.agreement import Agreement, SaverSettings
from milepost.saving.job import JobMonitor, SaveJob, SaveReport, run_job, save_failure
from milepost.saving.last_plan import LastPlan
from milepost.saving.peers import Peers, PeerWatch
from milepost.saving.request import Kind, SaveRequest, request_of
from milepost.saving.stage import TensorBlocks
from milepost.storage.base import Storage
from milepost.tensors.snapshot import encoded
from milepost.tensors.state import ordinary_tensors


@interrupts_held()
def save(
    path: str | PathLike[str],
    state_dict: Mapping[str, Any],
    *,
    comm: Comm | None = None,
    step: int | None = None,
    kind: Kind = "state",
    layout: Mapping[str, int] | None = None,
) -> SaveReport:
    """Save ``state_dict`` as a checkpoint at ``path``. Returns once it is committed; collective over all ranks.

    ``state_dict`` may nest mappings and lists; its values are tensors (DTensors too), plain values, or objects with
    ``state_dict()``. A previous checkpoint at ``path`` stays until the new one replaces it atomically. Stock
    ``torch.distributed.checkpoint.load`` reads the folder. ``step`` is recorded; by default it is taken from a path
    that ends in ``step-<N>``. Also recorded are ``kind`` (``full``: everything needed to resume a run; ``model``: only
    weights) and ``layout``, degrees of parallelism by name.

    Raises:
        SaveError: on every rank, if any rank failed; the message names the rank. Nothing visible has changed.
        ConfigError: on every rank; ``path`` exists but is not a checkpoint, so it is not replaced.
    """
    storage, request = request_of("save", path, state_dict, step, kind, layout)
    last = _last_plans.pop() if _last_plans else LastPlan()  # unique per thread
    try:
        saver = Saver(storage, comm if comm is not None else default_comm(), last=last)
        return saver.save(request)
    finally:
        _last_plans[:] = [last]


_last_plans: list[LastPlan] = []
"""The saver of the last call of :func:`save`, unless one is running. Holds no tensors."""


class Saver:
    """Saves state dicts, each committed before :meth:`save` returns."""

    def __init__(
        self, storage: Storage, comm: Comm, *, last: LastPlan | None = None, **settings: Unpack[SaverSettings]
    ):
        self._storage = storage
        self._comm = comm
        self._peers = Peers(comm)
        self._agreement = Agreement(storage, comm, last=last, **settings)

    @ordinary_tensors()
    @collection_paused()
    def save(self, request: SaveRequest) -> SaveReport:
        """Run a save: flatten, agree, write, sign off, publish and prune. Collective.

        Nothing is staged: the bytes are written from the tensors themselves. See :func:`save`.
        """
        started = time.monotonic()
        agreed = self._agreement.agree(request)
        prepared, job = agreed.prepared, agreed.job
        planned = time.monotonic()
        peers = PeerWatch(self._peers, self._storage, job)
        watch = _Foreground(self._comm, job, f"{self._storage.root}/{job.target}", peers)
        failure = None
        try:
            with watched(watch.doing):
                result = run_job(
                    self._storage, job, TensorBlocks(prepared.flat.tensors), encoded(prepared.objects), watch
                )
        except BaseException as cause:  # noqa: BLE001 - any error must reach the other ranks
            failure = save_failure(self._comm.rank, cause)
        self._exchange(watch, failure)
        self._agreement.committed(result.frozen)
        return SaveReport.of(watch.where, job, result, plan_s=planned - started, reused_plan=agreed.reused_plan)

    def _exchange(self, watch: _Foreground, failure: MilepostError | None) -> None:
        """Return if no rank has failed, else raise on all of them. Collective."""
        if failure is not None:
            watch.notice.post(failure)  # rank 0 may be waiting for a record that this rank's storage refused
        news = failure.message if failure is not None else "its own part is written"
        try:
            with watched(f"rank {self._comm.rank} is waiting for the other ranks to finish {watch.where}: {news}"):
                raise_together(self._comm, failure)
        except BaseException:
            # Every rank knows the outcome, so the records in the attempt are no longer needed.
            if watch.job.publishes:
                abort_attempt(self._storage, watch.job.attempt)
            raise


class _Foreground(JobMonitor):
    """Logs the progress of a blocking save, and ends it when another rank has failed."""

    def __init__(self, comm: Comm, job: SaveJob, where: str, peers: PeerWatch):
        self.job = job
        self._peers = peers
        self.where = where
        self.notice = FailureNotice(comm, job.save_id, for_all=job.part is not None)
        self._progress = ProgressLog(f"saving {where}", job.data_nbytes, is_quiet=job.rank != 0)

    def wrote(self, nbytes: int) -> None:
        self._progress.add(nbytes)

    def why_stop(self) -> None:
        self.notice.check()
        self._peers.check()

    def doing(self) -> str:
        return writing(self.job.rank, self.where, self._progress.part)
