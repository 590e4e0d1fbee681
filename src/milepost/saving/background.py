"""Who runs a job while training goes on: a thread of the trainer, or a process of its own.

A writer process is started once, never imports torch, maps the arena by its file descriptor and talks over a pipe: no
ports, no re-import of the user's main module. It lives in a session of its own, so it outlives a killed trainer and
finishes what was staged; then it leaves.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from milepost.errors import MilepostError, SaveError, StorageError
from milepost.saving.job import JobResult, SaveJob, run_job, sign_off_failure, tell_outcome
from milepost.saving.stage import Arena
from milepost.saving.writer import FileImage
from milepost.saving.writer_process import NO_PLAN, Request
from milepost.storage import LocalStorage
from milepost.storage.base import Storage
from milepost.tensors.plan import WritePlan

RELAY_S = 1.0
"""How often a trainer that waits for its writer process looks whether another rank has failed."""


class InThread:
    """Runs jobs in the calling thread, which is a background thread of the trainer."""

    def __init__(self, storage: Storage):
        self._storage = storage

    def run(
        self,
        job: SaveJob,
        arena: Arena,
        objects: Mapping[str, bytes],
        on_progress: Callable[[int], None],
        on_accepted: Callable[[], None],
        check: Callable[[], None],
    ) -> JobResult:
        on_accepted()
        image = FileImage(arena.memory)
        return run_job(self._storage, job, image, objects, detached=True, on_progress=on_progress, give_up=check)

    def close(self) -> None:
        """Nothing is held."""


class InProcess:
    """Runs jobs in a writer process, started now and again when it has died. Forgotten, it lets that process go."""

    def __init__(self, storage: Storage, arena: Arena):
        self._root = storage.root
        self._arena = arena
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._sent_plan: WritePlan | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """Of the writer process; None when there is none."""
        return self._process.pid if self._process is not None else None

    def run(
        self,
        job: SaveJob,
        arena: Arena,
        objects: Mapping[str, bytes],
        on_progress: Callable[[int], None],
        on_accepted: Callable[[], None],
        check: Callable[[], None],
    ) -> JobResult:
        """Hand a job over and return its result. From ``on_accepted`` on, it is done even if this process dies.

        ``check`` is asked now and then, and raises what another rank failed with.

        Raises:
            MilepostError: as the job raised it.
            SaveError: the writer process died.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        connection = self._connection
        assert connection is not None
        known = self._sent_plan == job.plan
        sent = replace(job, plan=NO_PLAN) if known else job
        try:
            connection.send(Request(self._root, sent, known, arena.nbytes, objects))
            self._sent_plan = job.plan
            on_accepted()
            relayed = False
            while True:
                if not connection.poll(RELAY_S):
                    relayed = relayed or self._relay(job, check)
                    continue
                answer = connection.recv()
                if isinstance(answer, int):
                    on_progress(answer)
                elif isinstance(answer, MilepostError):
                    raise answer
                else:
                    return _checked(answer)
        except (EOFError, OSError) as error:
            raise self._died(job) from error

    def _relay(self, job: SaveJob, check: Callable[[], None]) -> bool:
        """Put into storage, for the writer process, the failure of a rank that could not do it itself, if there is."""
        try:
            check()
        except SaveError as error:
            storage = LocalStorage(self._root)
            with contextlib.suppress(StorageError):  # it was told already
                if job.rank == 0:
                    sign_off_failure(storage, replace(job, rank=error.rank or 0), error.message)
                else:
                    tell_outcome(storage, job, error)
            return True
        return False

    def close(self) -> None:
        """Let the writer process go; it exits at the end of its work."""
        self._let_go()
        self._process, self._connection = None, None

    def _start(self) -> None:
        ours, theirs = Pipe()
        fds = (theirs.fileno(), self._arena.fd)
        process = subprocess.Popen(
            [sys.executable, "-m", "milepost.saving.writer_process", *map(str, fds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        self._process, self._connection, self._sent_plan = process, ours, None
        self._let_go = weakref.finalize(self, _let_go, process, ours)

    def _died(self, job: SaveJob) -> SaveError:
        assert self._process is not None
        status = self._process.wait(timeout=60)
        self.close()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return SaveError(
            f"the writer process of rank {job.rank} died ({how}) while it wrote {job.target}: this save is lost, the "
            "ones before are untouched, and the next one starts a new writer",
            path=job.target,
            rank=job.rank,
        )


def _let_go(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.wait(timeout=60)


def _checked(answer: object) -> JobResult:
    if not isinstance(answer, JobResult):
        raise SaveError(f"the writer process answered with a {type(answer).__name__}")
    return answer
