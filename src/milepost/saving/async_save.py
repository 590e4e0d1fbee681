"""``async_save``: training continues while a checkpoint is written.

There are two events. *Staged*: the weights may change again. *Committed*: the checkpoint is durable.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Mapping
from functools import partial
from os import PathLike
from typing import Any, Literal, Unpack, get_args

from milepost.collective.comm import Comm, FailureNotice, default_comm, failure_on, raise_together
from milepost.collective.interrupt import interrupts_held
from milepost.errors import ConfigError, MilepostError, SaveError
from milepost.run.attempts import abort_attempt
from milepost.saving.agreement import Agreement, SaverSettings
from milepost.saving.arena import Arena
from milepost.saving.background import BackgroundSave, SaveHandle, finish_saves, log_wait
from milepost.saving.job import JobResult, run_job, save_failure
from milepost.saving.peers import Peers, PeerWatch
from milepost.saving.request import Kind, SaveRequest, request_of
from milepost.saving.stage import Staging
from milepost.saving.writer import FileImage
from milepost.saving.writer_link import WriterLink
from milepost.storage.base import Storage
from milepost.tensors.plan import WritePlan
from milepost.tensors.snapshot import Snapshot, encoded
from milepost.tensors.state import ordinary_tensors

log = logging.getLogger("milepost")

Mode = Literal["async", "async_with_pinned_mem"]


class AsyncSaver:
    """Saves state dicts in the background, one at a time, through one reused arena.

    If dropped without :meth:`close`, it releases everything it holds at the end of the running save.
    Collective methods are :meth:`save`, :meth:`wait` and :meth:`close`; they are called on the training thread.
    """

    def __init__(self, storage: Storage, comm: Comm, mode: Mode, **settings: Unpack[SaverSettings]):
        self._storage = storage
        self._comm = comm
        self._mode = mode
        self._peers = Peers(comm)
        self._agreement = Agreement(storage, comm, may_defer=True, **settings)
        self._arena = Arena()
        self._writer = WriterLink(storage, self._arena) if mode == "async_with_pinned_mem" else None
        self._current: BackgroundSave | None = None
        self._thread: threading.Thread | None = None
        # Whether ranks have yet to exchange the current save's outcome: the same on every rank.
        self._is_open = False
        _alive.add(self)

    @property
    def arena_nbytes(self) -> int:
        """Host memory held for staging."""
        return self._arena.nbytes

    @property
    def current(self) -> SaveHandle | None:
        """The save started last."""
        return self._current

    @property
    def writer_pid(self) -> int | None:
        """The id of the writer process; None in the mode without one."""
        return self._writer.pid if self._writer is not None else None

    def prepare(self, nbytes: int) -> None:
        """Begin to allocate memory to stage ``nbytes`` in, so that the first save doesn't wait for it.

        An estimate suffices: a save that needs more enlarges the memory. Not collective.
        """
        self._arena.prepare(nbytes)

    def is_for(self, comm: Comm) -> bool:
        """Return whether this saver's ranks are those of ``comm``."""
        return (self._comm.rank, self._comm.world_size) == (comm.rank, comm.world_size)

    @ordinary_tensors()
    def save(self, request: SaveRequest) -> SaveHandle:
        """Start a save: flatten, agree, stage; the rest happens in the background. Collective.

        Waits for a running save. Its failure, on any rank, is raised here on every rank, and no new save is started.
        """
        self.wait()
        started = time.monotonic()
        agreed = self._agreement.agree(request)
        prepared, job = agreed.prepared, agreed.job
        notice = FailureNotice(self._comm, job.save_id, for_all=job.part is not None)
        peers = PeerWatch(self._peers, self._storage, job, has_writer=self._writer is not None)
        save = self._current = BackgroundSave(self._storage, job, notice, peers)
        self._is_open = True
        # From here on an error of only this rank goes to the handle: the other ranks have already started.
        with save.failing():
            image = self._fit_arena(job.plan)
            save.staging = Staging(
                *(prepared.flat.tensors, job.plan, image),
                at_once=prepared.changed_early,
                is_deferred=self._mode != "async",
            )
            plan_s = time.monotonic() - started
            if self._mode == "async":
                save.stage()
                save.accepted()
            write = partial(_write, self._storage, self._arena, self._writer, prepared.objects)
            run = partial(save.run, write, plan_s=plan_s, reused_plan=agreed.reused_plan)
            # Not a daemon: a program that ends, even by an exception, waits for staged saves.
            self._thread = threading.Thread(target=run, name="milepost-save")
            try:
                self._thread.start()
            except RuntimeError:  # no more threads are available: training waits this time
                self._thread = None
                log.warning("can't start a thread to save %s in the background: writing it now", save.path)
                run()
        return save

    def wait(self) -> None:
        """Return once the running save, if any, is committed. Collective.

        Raises:
            MilepostError: it failed on some rank; raised on every rank, and once.
        """
        if not self._is_open:
            return
        failure = self.failure_of_current()
        if not _any_failed(self._comm, failure):
            self._is_open = False
            if self._current is not None:
                self._agreement.committed(self._current.frozen)
            return
        try:
            raise_together(self._comm, failure)
        finally:
            self._forget_failed()

    def close(self) -> None:
        """Wait for the running save, and release all memory and processes. Collective.

        Raises:
            MilepostError: on every rank, if that save failed and its failure was not raised before.
        """
        failure = self.failure_of_current()
        try:
            self._let_go()
        except Exception:
            log.exception("rank %d could not release the resources of its saves", self._comm.rank)
        except BaseException as cause:  # noqa: BLE001 - an interrupt: the other ranks wait below
            failure = failure or failure_on(self._comm.rank, cause, SaveError)
        try:
            raise_together(self._comm, failure)
        finally:
            if failure is not None:
                self._forget_failed()

    def leave(self) -> None:
        """Close without collectives, on a rank that exits with an error: a failure is logged."""
        finish_saves()
        if self._current is None or self._current.done():
            self._let_go()

    def failure_of_current(self) -> MilepostError | None:
        """Wait for this rank's running save and return its failure. Ctrl-C counts as one: it must reach the others."""
        if self._current is None:
            return None
        try:
            if not self._current.done():
                log_wait(self._current, self._comm.rank)
            error = self._current.failure
        except BaseException as cause:  # noqa: BLE001
            error = cause
        return save_failure(self._comm.rank, error) if error is not None else None

    def _forget_failed(self) -> None:
        """Forget a failure known to every rank: it is not raised again, and its attempt is removed."""
        if self._current is not None and self._current.failure is not None:
            if self._current.job.publishes:
                abort_attempt(self._storage, self._current.job.attempt)
            self._current = None

    def _fit_arena(self, plan: WritePlan) -> memoryview:
        if self._arena.fit(plan) and self._comm.rank == 0:
            pinned = "pinned" if self._arena.is_pinned else "not pinned (no CUDA)"
            kind = "shared memory" if self._mode == "async_with_pinned_mem" else "memory"
            log.info("staging arena of rank 0: %.1f MB of %s, %s", self._arena.nbytes / 1e6, kind, pinned)
        return self._arena.memory

    def _let_go(self) -> None:
        if self._thread is not None:
            self._thread.join()  # it uses the memory released now; an interrupt may have ended the wait for its save
        if self._writer is not None:
            self._writer.close()
        self._arena.close()


def _write(
    storage: Storage,
    arena: Arena,
    writer: WriterLink | None,
    objects: Mapping[str, bytes | Snapshot],
    save: BackgroundSave,
) -> JobResult:
    """Write the arena, by the writer process or here. Does not hold the saver, which may be dropped meanwhile."""
    if writer is not None:
        return writer.run(save.job, encoded(objects), save)
    save.accepted()
    return run_job(storage, save.job, FileImage(arena.memory), encoded(objects), save, detached=True)


def _any_failed(comm: Comm, failure: MilepostError | None) -> bool:
    """Return whether the save failed on any rank. Collective; if a rank is dead, raises this rank's ``failure``."""
    try:
        return bool(comm.union(int(failure is not None)))
    except RuntimeError as lost:
        if failure is not None:
            raise failure from lost
        raise


_alive: weakref.WeakSet[AsyncSaver] = weakref.WeakSet()


@atexit.register
def log_lost_saves() -> None:
    """Log background failures that were never raised because the program did not call :meth:`AsyncSaver.close`."""
    for saver in list(_alive):
        if saver.current is not None and (error := saver.current.failure) is not None:
            log.error("the program is exiting, and its last save failed: %s", error)


@interrupts_held()
def async_save(
    path: str | PathLike[str],
    state_dict: Mapping[str, Any],
    *,
    mode: Mode = "async",
    comm: Comm | None = None,
    step: int | None = None,
    kind: Kind = "state",
    layout: Mapping[str, int] | None = None,
) -> SaveHandle:
    """Start saving ``state_dict`` at ``path`` in the background. Collective over all ranks.

    With ``mode = "async"`` everything is staged on return, and a thread writes. With ``"async_with_pinned_mem"``
    staging continues in the background (call ``handle.staged()`` before the weights change; buffers of modules in
    ``state_dict`` are already copied) and a process writes, which finishes even if this one is killed. Staging memory
    of the state's size is reused by the next call for the same folder (of the last few); a running save is waited for
    first. ``step``, ``kind`` and ``layout`` are recorded, as by :func:`milepost.save`.

    Raises:
        SaveError: on every rank, if any rank failed before staging, or the previous save of this folder failed.
    """
    storage, request = request_of("async_save", path, state_dict, step, kind, layout)
    if mode not in get_args(Mode):
        raise ConfigError(f"milepost.async_save(mode={mode!r}): expected {' or '.join(get_args(Mode))}")
    return _saver_for(storage, comm if comm is not None else default_comm(), mode).save(request)


MAX_SAVERS = 4
"""Number of recent folders of ``async_save`` that keep their memory and writer process."""
_savers: dict[tuple[str, str], AsyncSaver] = {}


def _saver_for(storage: Storage, comm: Comm, mode: Mode) -> AsyncSaver:
    """Return the saver of an earlier call for the same folder, ranks and mode, so that memory does not grow with calls.

    It does not grow with folders either: the least recently used saver is dropped, the same one on every rank.
    """
    saver = _savers.pop((storage.root, mode), None)
    if saver is None or not saver.is_for(comm):
        while len(_savers) >= MAX_SAVERS:
            forgotten = _savers.pop(next(iter(_savers)))
            if (failure := forgotten.failure_of_current()) is not None:
                log.error("a background save failed: %s", failure)
        saver = AsyncSaver(storage, comm, mode)
    _savers[storage.root, mode] = saver  # now the most recent
    return saver
