"""The saves of a run: when one is due, and each that was begun, until it is committed or has failed."""

from __future__ import annotations

import contextlib
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from milepost.collective.comm import on_every_rank, on_rank_0
from milepost.errors import MilepostError, SaveError
from milepost.loading.load_from import LoadReport
from milepost.run.branches import Descent, History
from milepost.saving.agreement import SaverSettings
from milepost.saving.async_save import AsyncSaver
from milepost.saving.background import SaveHandle
from milepost.saving.job import SaveReport
from milepost.saving.nodes import Nodes
from milepost.saving.request import SaveRequest
from milepost.saving.save import Saver
from milepost.training.due import DueCheck
from milepost.training.events import SaveLog
from milepost.training.hf_saves import HfSaves
from milepost.training.history import SaveHistory
from milepost.training.pending import LateRecord, PendingSave
from milepost.training.run_folder import RunFolder
from milepost.training.save_failures import SaveFailures
from milepost.training.save_request import RequestMaker
from milepost.training.signals import RequestFiles, SignalFlags
from milepost.training.training_run import TrainingRun

if TYPE_CHECKING:
    from milepost.training.resume import Loader


class BlockedTime:
    """The time that the training thread has spent in a manager's methods."""

    def __init__(self) -> None:
        self.total_s = 0.0

    @contextmanager
    def measured(self) -> Iterator[_Stopwatch]:
        """Add the duration of the block, which the yielded watch holds after it."""
        watch = _Stopwatch()
        started = time.monotonic()
        try:
            yield watch
        finally:
            watch.seconds = time.monotonic() - started
            self.total_s += watch.seconds


class _Stopwatch:
    seconds = 0.0


class RunSaves:
    """Decides when a save of a run is due, and follows each that was begun. Collective except where noted.

    ``CheckpointManager.save`` begins them itself, which keeps the way to the storage short. Construction locks the
    run's folder, and continues what an earlier run left unfinished.
    """

    def __init__(
        self,
        run: TrainingRun,
        folder: RunFolder,
        loader: Loader,
        signals: SignalFlags,
        blocked: BlockedTime,
        per_rank: tuple[str, ...],
    ):
        storage, path = run.folder.storage, run.folder.path
        self._config, self._comm = run.config, run.comm
        self._folder = folder
        self._loader = loader
        self._signals = signals
        self._blocked = blocked
        self.saver: Saver | AsyncSaver | None = on_every_rank(self._comm, partial(_new_saver, run, folder.nodes))
        """None once closed."""
        self.history = SaveHistory(self._comm, partial(loader.scan, needs_remote=False), loader.look)
        self.log = SaveLog(storage, path, self._comm.world_size, run.degrees)
        self._late = LateRecord(self.log, self._comm.rank)
        weakref.finalize(self, self._late.record)  # also at the end of a program that does not close the manager
        self.due = DueCheck(self._config, self._comm, signals, RequestFiles(storage, path))
        self._failures = SaveFailures(self._config, self._comm.rank)
        self.requests = RequestMaker(run, folder, self.history, per_rank)
        self._pending: PendingSave | None = None
        self._is_prepared = False
        self._hf_saves: HfSaves | None = None
        self._begin(run)

    def _begin(self, run: TrainingRun) -> None:
        self._folder.take(self._comm.broadcast(uuid.uuid4().hex))
        if self._folder.nodes is not None:
            self._loader.look()
            on_rank_0(self._comm, self._offer_newest)
        if self._config.hf_interval:
            try:
                self._hf_saves = HfSaves(run)
            except BaseException:
                self._folder.release()
                raise

    def _offer_newest(self) -> None:
        """Copy the newest step that all nodes hold to the remote folder, if the previous run did not. On rank 0."""
        newest = History.of(self._loader.scan()).newest
        if newest is not None and not self._loader.is_remote(newest):
            self._folder.offer_newest(newest)

    def resumed(self, report: LoadReport | None, descent: Descent | None) -> None:
        """Continue from a loaded step; None if nothing was loaded. On every rank."""
        self.history.resumed(descent)
        if report is not None and report.resumed_step is not None:
            self._folder.protected[report.resumed_step] = "this run resumed from it"
            self.log.resumed(report.resumed_step, report.path)
            self._prepare_staging()

    def reason(self, step: int, *, is_last: bool) -> str | None:
        """Return the reason to save after ``step``; None if no save is due. Starts the save as Hugging Face files."""
        reason = self.due.reason(step, is_last=is_last)
        if reason is None:
            self._prepare_staging()
            self._save_in_hf(step)
        return reason

    def began(self, save: PendingSave, request: SaveRequest) -> None:
        """Follow a save that was begun, and start that as Hugging Face files."""
        self.due.saved_at = time.monotonic()
        self.due.stall_s = save.stall_s
        self._pending = self._late.pending = save
        self._folder.announce(save.outcome, request)
        if isinstance(save.outcome, SaveReport) or self._signals.stop_signal is not None:
            self._record_pending()
        self._save_in_hf(save.step)

    def failed(self, step: int, reason: str, error: SaveError) -> None:
        """Record a save that could not be begun. Raises ``error``, or logs it: ``on_save_error``."""
        self.log.failed(step, reason, error.message)
        self._failures.stop_or_warn(error)

    def _prepare_staging(self) -> None:
        """Allocate the memory of background saves, once the state is whole: after a resume, or the first step."""
        if not self._is_prepared and isinstance(self.saver, AsyncSaver):
            self._is_prepared = True
            self.saver.prepare(self.requests.staging_nbytes())

    def _save_in_hf(self, step: int) -> None:
        """Start the periodic save in Hugging Face's format, if due: after the step, which a resume needs."""
        if self._hf_saves is None or not self._hf_saves.is_due(step) or self._signals.stop_signal is not None:
            return
        with self._blocked.measured():
            try:
                self._hf_saves.save(step, self.history.run_id(step))
            except SaveError as error:
                self._failures.stop_or_warn(error)

    @property
    def pending(self) -> SaveHandle | None:
        """The last save, if it is written in the background and has not been waited for."""
        outcome = self._pending.outcome if self._pending is not None else None
        return outcome if isinstance(outcome, SaveHandle) else None

    def wait_for_staging(self) -> None:
        """Return once the weights may be changed again. Not collective: a failure is raised by the next save."""
        pending = self._pending
        if pending is None or isinstance(pending.outcome, SaveReport) or pending.is_staged:
            return
        with self._blocked.measured() as blocked, contextlib.suppress(MilepostError):
            pending.outcome.staged()
        pending.is_staged = True
        pending.stall_s += blocked.seconds
        self.due.stall_s = pending.stall_s

    def wait(self) -> None:
        """Return once the running saves are committed. Raises SaveError if one failed; on every rank, and only here."""
        try:
            self._wait_for_pending()
        finally:
            if self._hf_saves is not None:
                self._hf_saves.wait()

    def wait_or_warn(self) -> None:
        """Wait for the running save of a step. Its failure stops the run or is logged: ``on_save_error``."""
        try:
            self._wait_for_pending()
        except SaveError as error:
            self._failures.stop_or_warn(error)

    def _wait_for_pending(self) -> None:
        """Wait for the running save, and log it. Its failure is raised on every rank."""
        try:
            if isinstance(self.saver, AsyncSaver):
                self.saver.wait()
        finally:
            self._record_pending()

    def _record_pending(self) -> None:
        """Wait for the pending save, and log it on rank 0. The saver raises its error."""
        pending, self._pending = self._pending, None
        self._late.pending = None
        if pending is None:
            return
        report = pending.report(self._comm.rank)
        if report is None:
            self.log.failed(pending.step, pending.reason, pending.failure)
            return
        self._failures.num_in_a_row = 0
        self.history.committed(pending.step, report.save_id)
        if self._comm.rank == 0:
            self.log.record(
                report, step=pending.step, reason=pending.reason, kind=pending.kind, stall_s=pending.stall_s
            )

    def close(self) -> None:
        """Wait for the last save and its copy, and release memory, processes and the folder. Raises like :meth:`wait`.

        Raises:
            SaveError: on every rank: the newest step could not be copied to the remote folder.
        """
        if self.saver is None:
            return
        saver, self.saver = self.saver, None
        try:
            with self._blocked.measured():
                try:
                    if isinstance(saver, AsyncSaver):
                        saver.close()
                finally:
                    if self._hf_saves is not None:
                        self._hf_saves.close()
        finally:
            # Not earlier: Ctrl-C while the last save is being written must not lose it.
            self._signals.restore()
            self._record_pending()
            if self._comm.rank == 0:
                self.log.close()
            self._folder.close()
        with self._blocked.measured():
            self._folder.check_copied()

    def leave(self) -> None:
        """Close after an error of this rank, without collectives, since the other ranks may not close."""
        saver, self.saver = self.saver, None
        try:
            if isinstance(saver, AsyncSaver):
                saver.leave()
            if self._hf_saves is not None:
                self._hf_saves.leave()
        finally:
            self._late.record()
            self._signals.restore()
            self._folder.leave()


def _new_saver(run: TrainingRun, nodes: Nodes | None) -> Saver | AsyncSaver:
    config = run.config
    settings = SaverSettings(num_threads=config.num_io_threads, check_replicas=config.check_replicas, nodes=nodes)
    if config.async_mode == "disabled":
        return Saver(run.folder.storage, run.comm, **settings)
    return AsyncSaver(run.folder.storage, run.comm, config.async_mode, **settings)
