"""``async_save``: training goes on while a checkpoint is written.

Two events matter. *Staged*: the weights may change again. *Committed*: the checkpoint may be relied on.
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike, fspath
from typing import Any, Literal

import torch

from milepost.collective.comm import Comm, FailureNotice, default_comm, failure_on, raise_together
from milepost.collective.interrupt import interrupts_held
from milepost.collective.progress import watched, writing
from milepost.errors import MilepostError, StorageError
from milepost.run import commit
from milepost.run.assemble import SaveInfo
from milepost.run.catalog import step_of
from milepost.saving.agreement import Agreement
from milepost.saving.background import InProcess, InThread
from milepost.saving.job import Form, Keep, SaveJob, sign_off_failure, tell_outcome
from milepost.saving.save import TIMEOUT_S, SaveReport, save_failure
from milepost.saving.stage import Arena, Staging, pin, unpin
from milepost.storage import open_storage
from milepost.storage.base import Storage
from milepost.tensors.layout import TensorLeaf
from milepost.tensors.plan import WritePlan

log = logging.getLogger("milepost")

Mode = Literal["async", "async_with_pinned_mem"]


class SaveHandle:
    """A save that is under way, as this rank sees it."""

    def __init__(self, path: str, save_id: str, nbytes: int):
        self.path = path
        self.save_id = save_id
        self.nbytes = nbytes
        """Bytes of tensor data that this rank writes."""
        self._written_nbytes = 0
        self._staged: Future[None] = Future()
        self._committed: Future[SaveReport] = Future()

    def staged(self, timeout_s: float | None = None) -> None:
        """Return when the tensors may be changed again.

        Raises:
            TimeoutError: not within ``timeout_s`` seconds.
            MilepostError: staging failed; the save is lost.
        """
        self._staged.result(timeout_s)

    def committed(self, timeout_s: float | None = None) -> None:
        """Return when the checkpoint may be relied on, on all ranks.

        Raises:
            TimeoutError: not within ``timeout_s`` seconds.
            MilepostError: the save failed, on this rank or another.
        """
        self._committed.result(timeout_s)

    def result(self) -> SaveReport:
        """Wait for the commit; what the save did, or the error that it failed with."""
        return self._committed.result()

    def done(self) -> bool:
        """Whether the save has ended, one way or the other."""
        return self._committed.done()

    @property
    def progress(self) -> float:
        """The part of this rank's bytes that is written, from 0 to 1."""
        return min(1.0, self._written_nbytes / self.nbytes) if self.nbytes else 1.0

    def _add_written(self, nbytes: int) -> None:
        self._written_nbytes += nbytes


class AsyncSaver:
    """Saves state dicts again and again in the background, one at a time, through one arena that is kept.

    One that is forgotten without :meth:`close` lets go of all it holds, at the end of the save that runs.
    Collective methods are :meth:`save` and :meth:`close`; they are called on the training thread.
    """

    def __init__(self, storage: Storage, comm: Comm, mode: Mode, *, timeout_s: float = TIMEOUT_S):
        self._storage = storage
        self._comm = comm
        self._mode = mode
        self._agreement = Agreement(storage, comm, timeout_s=timeout_s)
        self._arena = Arena()
        self._unpin: weakref.finalize | None = None
        self._runner = InProcess(storage, self._arena) if mode == "async_with_pinned_mem" else InThread(storage)
        # One thread: saves do not overtake each other. The interpreter waits for it at exit.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="milepost-save")
        self._current: SaveHandle | None = None
        self._attempt = ""
        _alive.add(self)

    @property
    def arena_nbytes(self) -> int:
        """Host memory held for staging."""
        return self._arena.nbytes

    @property
    def current(self) -> SaveHandle | None:
        """The save that was begun last."""
        return self._current

    def save(
        self,
        target: str,
        make_state: Callable[[], Mapping[str, Any]],
        info: SaveInfo,
        *,
        dtype: torch.dtype | None = None,
        keep: Keep | None = None,
        form: Form | None = None,
    ) -> SaveHandle:
        """Begin to save what ``make_state`` returns to ``target``; arguments as for ``Saver.save``. Collective.

        A save that still runs is waited for. Its failure, on any rank, is raised here on every rank, and nothing new
        is begun.
        """
        previous = self._wait_for_previous()
        started = time.monotonic()
        prepared = self._agreement.prepare(make_state, dtype, previous)
        try:
            job, reused = self._agreement.agree(target, prepared, info, keep, form)
        except BaseException:
            self._forget_failed()
            raise
        handle = SaveHandle(f"{self._storage.root}/{target}", job.save_id, sum(i.data_nbytes for i in job.plan.items))
        self._current, self._attempt = handle, job.attempt
        notice = FailureNotice(self._comm, job.save_id)
        task = _Task(self._storage, self._runner, self._arena, job, prepared.objects, handle, notice)
        # From here on an error of this rank alone goes to the handle: the other ranks are on their way already.
        task.attach(prepared.flat.tensors, self._fit_arena)
        plan_s = time.monotonic() - started
        if self._mode == "async":
            task.stage()
            task.announce()
        self._thread.submit(task.run, plan_s=plan_s, reused=reused)
        return handle

    def _fit_arena(self, plan: WritePlan) -> memoryview:
        if self._arena.fit(plan):
            self._unpin_arena()
            if self._mode == "async_with_pinned_mem" and pin(self._arena.memory):
                # Not of this object: a save that still runs keeps the arena, when its saver is forgotten.
                self._unpin = weakref.finalize(self._arena, unpin, self._arena.memory)
            if self._comm.rank == 0:
                pinned = "pinned" if self._unpin is not None else "not pinned: there is no CUDA device"
                kind = f"shared memory, {pinned}" if self._mode == "async_with_pinned_mem" else "memory"
                log.info("staging arena of rank 0: %.1f MB of %s", self._arena.nbytes / 1e6, kind)
        return self._arena.memory

    def _unpin_arena(self) -> None:
        if self._unpin is not None:
            self._unpin()  # its old memory, if it has grown
            self._unpin = None

    def close(self) -> None:
        """Wait for the save that runs, and let go of all memory and processes. Collective.

        Raises:
            MilepostError: on every rank, if that save failed and its failure was not raised before.
        """
        failure = self._wait_for_previous()
        try:
            self._let_go()
        except BaseException as cause:  # noqa: BLE001 - the other ranks wait below
            failure = failure or failure_on(self._comm.rank, cause)
        try:
            raise_together(self._comm, failure)
        finally:
            if failure is not None:
                self._forget_failed()

    def _let_go(self) -> None:
        self._thread.shutdown()
        self._runner.close()
        self._unpin_arena()
        self._arena.close()

    def _wait_for_previous(self) -> MilepostError | None:
        """Wait for the save that runs; its failure, once. Ctrl-C counts as one: the others must hear of it."""
        if self._current is None:
            return None
        try:
            if not self._current.done():
                log_wait(self._current, self._comm.rank)
            error: BaseException | None = self._current._committed.exception()
        except BaseException as cause:  # noqa: BLE001
            error = cause
        return save_failure(self._comm.rank, error) if error is not None else None

    def _forget_failed(self) -> None:
        """After a failure that every rank knows of: it is not raised again, and its attempt is taken away."""
        if self._current is not None and self._current.done() and self._current._committed.exception() is not None:
            self._current = None
            if self._comm.rank == 0:
                commit.abort_attempt(self._storage, self._attempt)


_alive: weakref.WeakSet[AsyncSaver] = weakref.WeakSet()


@atexit.register
def _tell_of_lost_saves() -> None:
    """The last word on saves that failed in the background, when nothing raised it: the program has called no close."""
    for saver in list(_alive):
        handle = saver.current
        if handle is not None and handle.done() and (error := handle._committed.exception()) is not None:
            log.error("the program ends, and its last save has failed: %s", error)


class _Task:
    """What the background thread does for one save."""

    def __init__(
        self,
        storage: Storage,
        runner: InThread | InProcess,
        arena: Arena,
        job: SaveJob,
        objects: Mapping[str, bytes],
        handle: SaveHandle,
        notice: FailureNotice,
    ):
        self._storage = storage
        self._runner = runner
        self._arena = arena
        self._job = job
        self._staging: Staging | None = None
        self._objects = objects
        self._handle = handle
        self._notice = notice
        self._stage_s = 0.0

    def attach(self, leaves: Mapping[str, TensorLeaf], fit_arena: Callable[[WritePlan], memoryview]) -> None:
        """Make room and get ready to copy. An error goes to the handle."""
        try:
            self._staging = Staging(leaves, self._job.plan, fit_arena(self._job.plan))
        except BaseException as error:  # it is raised where the handle is asked
            self._fail(error)
            if not isinstance(error, Exception):
                raise

    def stage(self) -> None:
        """Copy into the arena. An error goes to the handle."""
        if self._staging is None:
            return
        started = time.monotonic()
        try:
            self._staging.run()
        except BaseException as error:  # it is raised where the handle is asked
            self._fail(error)
            if not isinstance(error, Exception):
                raise
        self._staging = None  # holds tensors and a view of the arena
        self._stage_s = time.monotonic() - started

    def announce(self) -> None:
        """The tensors may be changed again, and what was staged will be committed if the job's runner lives."""
        if not self._handle._staged.done():
            self._handle._staged.set_result(None)

    def run(self, *, plan_s: float, reused: bool) -> None:
        self.stage()
        if self._handle.done():
            return
        try:
            with watched(self._what):
                result = self._runner.run(
                    self._job, self._arena, self._objects, self._handle._add_written, self.announce, self._notice.check
                )
        except Exception as error:  # noqa: BLE001 - the top of a thread: the handle carries it
            self._fail(error)
            return
        self._handle._committed.set_result(
            SaveReport(
                path=self._handle.path,
                save_id=self._job.save_id,
                nbytes=result.nbytes,
                plan_s=plan_s,
                stage_s=self._stage_s,
                write_s=result.write_s,
                commit_s=result.commit_s,
                reused_plan=reused,
                contents=result.contents,
            )
        )

    def _what(self) -> str:
        return writing(self._job.rank, f"{self._handle.path} in the background", self._handle.progress)

    def _fail(self, error: BaseException) -> None:
        told = save_failure(self._job.rank, error)
        if not isinstance(error, Exception):
            told.__cause__ = None  # an interrupt is raised here and now, and not once more where the handle is asked
        self._notice.post(told)
        self._tell_others(told)
        if not self._handle._staged.done():
            self._handle._staged.set_exception(told)
        self._handle._committed.set_exception(told)

    def _tell_others(self, error: MilepostError) -> None:
        """Leave word in storage, in case the job did not come to it: a failed staging, a dead writer process."""
        for leave in (self._leave_sign_off, self._leave_outcome):
            try:
                leave(error)
            except StorageError:
                pass  # it was told already, or can't be
            except Exception:
                log.exception("rank %d could not tell that its save failed", self._job.rank)

    def _leave_sign_off(self, error: MilepostError) -> None:
        sign_off_failure(self._storage, self._job, error.message)

    def _leave_outcome(self, error: MilepostError) -> None:
        if self._job.rank == 0:
            tell_outcome(self._storage, self._job, error)


def log_wait(handle: SaveHandle, rank: int, *, every_s: float = 2.0) -> None:
    """Wait for a save to end; on rank 0 say so, with how far it is, and how long it took in all."""
    started = time.monotonic()
    while not handle.done():
        try:
            handle.committed(every_s)
        except TimeoutError:
            if rank == 0:
                waited = time.monotonic() - started
                log.info("waiting for %s: %.0f %% written, %.0f s", handle.path, 100 * handle.progress, waited)
        except MilepostError:
            break  # the caller asks the handle
    waited = time.monotonic() - started
    if rank == 0 and waited >= 0.01:
        log.info("waited %.2f s for %s to be committed", waited, handle.path)


@interrupts_held()
def async_save(
    path: str | PathLike[str],
    state_dict: Mapping[str, Any],
    *,
    mode: Mode = "async",
    comm: Comm | None = None,
    step: int | None = None,
) -> SaveHandle:
    """Begin to save ``state_dict`` at ``path`` and return at once. Collective over all ranks.

    With ``mode = "async"`` everything is staged when this returns, and a thread writes. With
    ``"async_with_pinned_mem"`` staging goes on in the background (call ``handle.staged()`` before the weights change)
    and a process writes, which finishes even if this one is killed. Staging memory of the state's size is kept and
    used again by the next call for the same folder (of the last few); a save that still runs is waited for first.

    Raises:
        SaveError: on every rank, when any rank failed before staging, or the previous save of this folder failed.
    """
    storage, target = open_storage(fspath(path))
    saver = _saver_for(storage, comm if comm is not None else default_comm(), mode)
    return saver.save(
        target, lambda: state_dict, SaveInfo(step=step_of(target) if step is None else step, kind="state")
    )


MAX_SAVERS = 4
"""So many folders that ``async_save`` was last called for keep their memory and writer process."""
_savers: dict[tuple[str, str], AsyncSaver] = {}


def _saver_for(storage: Storage, comm: Comm, mode: Mode) -> AsyncSaver:
    """The saver of an earlier call for the same folder, ranks and mode, so that memory does not grow with calls.

    Nor does it with folders: the saver not called for the longest is forgotten, which is the same one on every rank.
    """
    saver = _savers.pop((storage.root, mode), None)
    if saver is None or (saver._comm.rank, saver._comm.world_size) != (comm.rank, comm.world_size):
        while len(_savers) >= MAX_SAVERS:
            forgotten = _savers.pop(next(iter(_savers)))
            if (failure := forgotten._wait_for_previous()) is not None:
                log.error("a save in the background has failed: %s", failure)
        saver = AsyncSaver(storage, comm, mode)
    _savers[storage.root, mode] = saver  # the last of them now
    return saver
