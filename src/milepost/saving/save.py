"""``save``: a state dict to a committed checkpoint, on one process or many.

::

    objects -state-> {key: leaf} -layout-> boxes -plan-> WritePlan -write-> files + digests -commit-> visible
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import torch

from milepost.collective.comm import Comm, FailureNotice, default_comm, raise_together
from milepost.collective.interrupt import interrupts_held
from milepost.collective.progress import ProgressLog, watched, writing
from milepost.errors import MilepostError, SaveError
from milepost.run import commit
from milepost.run.assemble import SaveInfo
from milepost.run.catalog import step_of
from milepost.saving.agreement import Agreement
from milepost.saving.job import Form, JobResult, Keep, SaveJob, run_job
from milepost.saving.stage import TensorBlocks
from milepost.storage import open_storage
from milepost.storage.base import Storage

TIMEOUT_S = 600.0
"""How long a rank waits for the others' records before it gives a save up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """What a save did, as this rank saw it. Times are in seconds of wall clock."""

    path: str
    save_id: str
    nbytes: int
    """Bytes that this rank wrote."""
    plan_s: float
    stage_s: float = 0.0
    write_s: float
    commit_s: float
    reused_plan: bool
    """Whether the plan of the previous save was taken, without exchanging layouts."""
    contents: Mapping[str, str]
    """On rank 0: a digest of each part of the state. Equal in two saves if nothing changed between them."""


@interrupts_held()
def save(
    path: str | PathLike[str],
    state_dict: Mapping[str, Any],
    *,
    comm: Comm | None = None,
    step: int | None = None,
) -> SaveReport:
    """Save ``state_dict`` as a checkpoint at ``path``. Returns when it is committed; collective over all ranks.

    ``state_dict`` may nest mappings and lists; its values are tensors (DTensors too), plain values, or objects with
    ``state_dict()``. What was at ``path`` before stays whole until the moment the new checkpoint takes its place.
    Stock ``torch.distributed.checkpoint.load`` reads the folder. ``step`` is recorded; by default it is read off a
    path that ends in ``step-<N>``.

    Raises:
        SaveError: on every rank, when any rank failed; the message names the rank. Nothing visible has changed.
        ConfigError: on every rank; what is at ``path`` is no checkpoint, so it is not replaced.
    """
    storage, target = open_storage(fspath(path))
    saver = Saver(storage, comm if comm is not None else default_comm())
    return saver.save(
        target, lambda: state_dict, SaveInfo(step=step_of(target) if step is None else step, kind="state")
    )


def save_failure(rank: int, cause: BaseException) -> SaveError:
    """Whatever made a save fail on ``rank``, as the SaveError that is raised on every rank."""
    if isinstance(cause, SaveError):
        failure = cause
    else:
        text = cause.message if isinstance(cause, MilepostError) else f"{type(cause).__name__}: {cause}"
        failure = SaveError(text, path=getattr(cause, "path", None), key=getattr(cause, "key", None))
        failure.__cause__ = cause
    if failure.rank is None:
        failure.rank = rank
    return failure


class Saver:
    """Saves state dicts again and again, each written before :meth:`save` returns."""

    def __init__(self, storage: Storage, comm: Comm, *, timeout_s: float = TIMEOUT_S):
        self._storage = storage
        self._comm = comm
        self._agreement = Agreement(storage, comm, timeout_s=timeout_s)

    def save(
        self,
        target: str,
        make_state: Callable[[], Mapping[str, Any]],
        info: SaveInfo,
        *,
        dtype: torch.dtype | None = None,
        keep: Keep | None = None,
        form: Form | None = None,
    ) -> SaveReport:
        """Save what ``make_state`` returns to ``target``, a path in the storage; then prune as ``keep`` says.

        ``make_state`` is called here so that its error, too, reaches every rank. With ``dtype``, tensors of a
        floating-point dtype are stored in that one; with ``form``, in files of another format. See :func:`save`.
        """
        started = time.monotonic()
        prepared = self._agreement.prepare(make_state, dtype)
        job, reused = self._agreement.agree(target, prepared, info, keep, form)
        planned = time.monotonic()
        result = self._write(job, TensorBlocks(prepared.flat.tensors), prepared.objects)
        return SaveReport(
            path=f"{self._storage.root}/{target}",
            save_id=job.save_id,
            nbytes=result.nbytes,
            plan_s=planned - started,
            write_s=result.write_s,
            commit_s=result.commit_s,
            reused_plan=reused,
            contents=result.contents,
        )

    def _write(self, job: SaveJob, source: TensorBlocks, objects: Mapping[str, bytes]) -> JobResult:
        result, failure = None, None
        notice = FailureNotice(self._comm, job.save_id)
        where = f"{self._storage.root}/{job.target}"
        nbytes = sum(item.data_nbytes for item in job.plan.items)
        progress = ProgressLog(f"saving {where}", nbytes, is_quiet=job.rank != 0)
        try:
            with watched(lambda: writing(job.rank, where, progress.part)):
                result = run_job(self._storage, job, source, objects, on_progress=progress.add, give_up=notice.check)
        except BaseException as cause:  # noqa: BLE001 - whatever it was, the other ranks must hear of it
            failure = save_failure(self._comm.rank, cause)
            notice.post(failure)
        news = failure.message if failure is not None else "it has done its part"
        try:
            with watched(f"rank {job.rank} waits for the other ranks to hear of {where}: {news}"):
                raise_together(self._comm, failure)
        except BaseException:
            if self._comm.rank == 0:
                commit.abort_attempt(self._storage, job.attempt)
            raise
        assert result is not None
        return result
