"""A background save: its state, the reports of its job, and how its failure reaches every rank.

Torch-free, because ``finish_saves`` at process exit needs it even if nothing was saved.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

from milepost.collective.progress import watched, writing
from milepost.errors import MilepostError
from milepost.saving.job import JobMonitor, JobResult, SaveJob, SaveReport, report_failure, save_failure
from milepost.storage.base import Storage

if TYPE_CHECKING:
    from milepost.collective.comm import FailureNotice
    from milepost.saving.frozen import FrozenFile
    from milepost.saving.peers import PeerWatch
    from milepost.saving.stage import Staging

log = logging.getLogger("milepost")

GRACE_S = 30.0
"""Seconds that an exiting process waits for a save without progress: the other ranks may be gone."""


class SaveHandle:
    """A running save on this rank."""

    def __init__(self, path: str, save_id: str, nbytes: int):
        self.path = path
        self.save_id = save_id
        self.nbytes = nbytes
        """Bytes of tensor data written by this rank."""
        self._written_nbytes = 0
        self._staged: Future[None] = Future()
        self._committed: Future[SaveReport] = Future()

    def staged(self, timeout_s: float | None = None) -> None:
        """Return once the tensors may be changed again.

        Raises:
            TimeoutError: not within ``timeout_s`` seconds.
            MilepostError: staging failed; the save is lost.
        """
        self._staged.result(timeout_s)

    def is_staged(self) -> bool:
        """Return whether the tensors may be changed again, or staging has failed."""
        return self._staged.done()

    def committed(self, timeout_s: float | None = None) -> None:
        """Return once the checkpoint is committed, on all ranks.

        Raises:
            TimeoutError: not within ``timeout_s`` seconds.
            MilepostError: the save failed, on this rank or another.
        """
        self._committed.result(timeout_s)

    def result(self) -> SaveReport:
        """Wait for the commit, and return the save's report or raise its error."""
        return self._committed.result()

    def done(self) -> bool:
        """Return whether the save has ended, successfully or not."""
        return self._committed.done()

    @property
    def failure(self) -> BaseException | None:
        """The error of a failed save; None while it runs and if it was committed."""
        return self._committed.exception() if self._committed.done() else None

    @property
    def progress(self) -> float:
        """The fraction of this rank's bytes written so far, from 0 to 1."""
        return min(1.0, self._written_nbytes / self.nbytes) if self.nbytes else 1.0

    def when_done(self, act: Callable[[], None]) -> None:
        """Call ``act`` once the save has ended, in the thread that ends it, or at once."""
        self._committed.add_done_callback(lambda _: act())


class BackgroundSave(SaveHandle, JobMonitor):
    """A background save on this rank. Owns the outcome: only this object resolves the handle.

    Every error of this rank goes to :meth:`fail`, the single channel: the handle's owner finds it here, waiting ranks
    in the attempt or, if that can't be written, in the job's store.
    """

    def __init__(self, storage: Storage, job: SaveJob, notice: FailureNotice, peers: PeerWatch):
        super().__init__(f"{storage.root}/{job.target}", job.save_id, job.data_nbytes)
        self.job = job
        self._storage = storage
        self._notice = notice
        self._peers = peers
        self.staging: Staging | None = None
        """The copies that remain to be made."""
        self.frozen: FrozenFile | None = None
        """This rank's file of frozen tensors in the step, after the commit."""
        self._stage_s = 0.0
        self._lock = threading.Lock()
        _running.add(self)
        self.when_done(lambda: _running.discard(self))

    def wrote(self, nbytes: int) -> None:
        """See ``JobMonitor``."""
        with self._lock:  # several threads write
            self._written_nbytes += nbytes

    def why_stop(self) -> None:
        """See ``JobMonitor``."""
        self._notice.check()
        self._peers.check()

    def accepted(self) -> None:
        """Record that the tensors may change: the save will be committed unless the process of the job dies."""
        if not self._staged.done():
            self._staged.set_result(None)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Make errors in the block fail the save instead of being raised; an interrupt is also raised.

        The other ranks have already started: an error raised only here would leave them waiting.
        """
        try:
            yield
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise

    def stage(self) -> None:
        """Copy into the arena, and release :attr:`staging`, which holds tensors and a view of the arena."""
        assert self.staging is not None
        started = time.monotonic()
        self.staging.run(num_threads=self.job.num_threads)
        self.staging = None
        self._stage_s = time.monotonic() - started

    def run(self, write: Callable[[BackgroundSave], JobResult], *, plan_s: float, reused_plan: bool) -> None:
        """Stage, unless done already, and ``write``: the body of the background thread."""
        with self.failing(), watched(self._doing):
            if self.staging is not None:
                self.stage()
            result = write(self)
            self.frozen = result.frozen
            report = SaveReport.of(
                self.path, self.job, result, plan_s=plan_s, stage_s=self._stage_s, reused_plan=reused_plan
            )
            self._committed.set_result(report)

    def fail(self, error: BaseException) -> None:
        """Fail the save with ``error``, and report it to every rank that waits for this one. The first error counts."""
        self.staging = None
        if self.done():
            return
        failure = save_failure(self.job.rank, error)
        if not isinstance(error, Exception):
            failure.__cause__ = None  # an interrupt is raised here; the handle must not raise it again
        # Report to the other ranks first: once this handle has failed, its owner may remove the attempt.
        self._notice.post(failure)
        report_failure(self._storage, self.job, failure)
        if not self._staged.done():
            self._staged.set_exception(failure)
        self._committed.set_exception(failure)

    def _doing(self) -> str:
        return writing(self.job.rank, f"{self.path} in the background", self.progress)


_running: weakref.WeakSet[BackgroundSave] = weakref.WeakSet()
os.register_at_fork(after_in_child=_running.clear)  # the writing threads belong to the parent


def log_wait(handle: SaveHandle, rank: int, *, every_s: float = 2.0) -> None:
    """Wait for the end of a save. Rank 0 logs its progress meanwhile, and the time it took."""
    started = time.monotonic()
    while not handle.done():
        try:
            handle.committed(every_s)
        except TimeoutError:
            if rank == 0:
                waited = time.monotonic() - started
                log.info("waiting for %s: %.0f %% written, %.0f s", handle.path, 100 * handle.progress, waited)
        except MilepostError:
            break  # the caller gets the error from the handle
    waited = time.monotonic() - started
    if rank == 0 and waited >= 0.01:
        log.info("waited %.2f s for %s to be committed", waited, handle.path)


def finish_saves() -> None:
    """Wait for this process's background saves, if it exits without ``close()``.

    Staged saves are committed if the other ranks finish theirs; one without progress for ``GRACE_S`` seconds is
    abandoned.
    """
    for save in list(_running):
        ended = threading.Event()
        save.when_done(ended.set)
        if not save.done():
            log.info("finishing the staged save of %s before this process exits", save.path)
        written, deadline = save.progress, time.monotonic() + GRACE_S
        while not ended.wait(0.5) and time.monotonic() < deadline:
            if save.progress != written:
                written, deadline = save.progress, time.monotonic() + GRACE_S
        if save.failure is not None:
            log.error("the save of %s failed: %s", save.path, save.failure)
        elif not save.done():
            log.error("the save of %s was not committed: no progress for %.0f s", save.path, GRACE_S)
