"""The trainer's end of the connection to a writer process, which writes while training continues.

A writer process is started once, never imports torch, maps the arena by its file descriptor and communicates over a
pipe: no ports, no re-import of the user's main module. It runs in a separate session, so it survives a killed trainer
and finishes the staged save; then it exits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from milepost.errors import MilepostError, SaveError
from milepost.run import signoff
from milepost.run.outcome import save_id_at, wait_for_outcome
from milepost.saving.arena import Arena
from milepost.saving.background import BackgroundSave
from milepost.saving.job import JobResult, SaveJob, relay_failure
from milepost.saving.writer_process import LEAVE, NO_PLAN, LogLine, Request
from milepost.storage.base import Storage
from milepost.tensors.plan import WritePlan

log = logging.getLogger("milepost")

RELAY_S = 1.0
"""Polling interval in seconds of a waiting trainer for another rank's failure."""
LEAVE_S = 20.0
"""Seconds that an idle writer process may take to exit before it is killed."""

_BOOT = """\
import os, sys
sys.path.append(sys.argv[1])
from milepost.saving.writer_process import prepare, serve
serve(*prepare())
os._exit(0)
"""
"""``-P`` keeps the working directory off the path: the writer must not import a ``json.py`` there."""


class WriterLink:
    """Runs jobs in a writer process, which is restarted if it has died, and released when this object is dropped."""

    def __init__(self, storage: Storage, arena: Arena):
        self._storage = storage
        self._arena = arena
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._stderr: IO[bytes] | None = None
        self._logged_nbytes = 0  # of the process's output
        self._sent_plan: WritePlan | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """The id of the writer process; None when there is none."""
        return self._process.pid if self._process is not None else None

    def run(self, job: SaveJob, objects: Mapping[str, bytes], save: BackgroundSave) -> JobResult:
        """Run a job in the process and return its result.

        Once ``save`` knows that it is accepted, it is done even if this process dies.

        Raises:
            MilepostError: raised by the job.
            SaveError: the writer process died before the save was committed.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        connection = self._connection
        assert connection is not None
        started = time.monotonic()
        known = self._sent_plan == job.plan
        sent = replace(job, plan=NO_PLAN) if known else job
        try:
            storage = self._storage
            connection.send(Request(storage.root, storage.page_cache, sent, known, self._arena.nbytes, objects))
            self._sent_plan = job.plan
            save.accepted()
            answer = self._answer(connection, job, save)
        except (EOFError, OSError) as error:
            return self._after_death(job, save, time.monotonic() - started, error)
        self._log_stderr(job.rank)
        if isinstance(answer, MilepostError):
            raise answer
        return answer

    def _answer(self, connection: Connection, job: SaveJob, save: BackgroundSave) -> JobResult | MilepostError:
        relayed = False
        while True:
            if not connection.poll(RELAY_S):
                relayed = relayed or _relay(self._storage, job, save)
                continue
            said = connection.recv()
            if isinstance(said, int):
                save.wrote(said)
            elif isinstance(said, LogLine):
                logging.getLogger(said.name).log(said.level, "%s", said.text)
            elif isinstance(said, (JobResult, MilepostError)):
                return said
            else:
                raise SaveError(f"unexpected answer of the writer process: a {type(said).__name__}")

    def close(self) -> None:
        """Release the idle writer process. Never fails."""
        if self._process is not None:
            self._let_go()
        if self._stderr is not None:
            self._stderr.close()
        self._process = self._connection = self._stderr = None

    def _start(self) -> None:
        ours, theirs = Pipe()
        fds = (theirs.fileno(), self._arena.fd)
        self._logged_nbytes = 0
        self._stderr = open(os.memfd_create("milepost-writer-stderr", os.MFD_CLOEXEC), "w+b", buffering=0)  # noqa: SIM115
        home = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, home, *map(str, fds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            pass_fds=fds,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        self._process, self._connection, self._sent_plan = process, ours, None
        self._let_go = weakref.finalize(self, _let_go, process, ours, os.getpid())
        _open_ends.add(ours)

    def _after_death(self, job: SaveJob, save: BackgroundSave, seconds: float, cause: BaseException) -> JobResult:
        """Return the result of a save whose writer died, if it was committed nevertheless; else raise SaveError."""
        assert self._process is not None
        status = self._process.wait(timeout=60)
        self._log_stderr(job.rank)
        self.close()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        died = f"the writer process of rank {job.rank} died ({how}) while it wrote {job.target}"
        if not self._is_committed(job, save):
            raise SaveError(
                f"{died}: this save is lost, earlier ones are intact, and the next one starts a new writer",
                path=job.target,
                rank=job.rank,
            ) from cause
        log.warning("%s; but it had finished, and the save is committed", died)
        return JobResult(seconds, 0.0, job.data_nbytes, {})

    def _is_committed(self, job: SaveJob, save: BackgroundSave) -> bool:
        """Return whether a dead writer's job is committed; on a rank that has signed off, waits for rank 0."""
        if not job.publishes and signoff.has_signed_off(self._storage, job.attempt, job.rank):
            wait_for_outcome(
                *(self._storage, job.attempt, job.target, job.save_id),
                timeout_s=job.timeout_s,
                world_size=job.world_size,
                give_up=save.why_stop,
            )
            return True
        return save_id_at(self._storage, job.target) == job.save_id

    def _log_stderr(self, rank: int) -> None:
        """Log the writer process's output: the traceback of a crash, or a Python warning."""
        assert self._stderr is not None
        printed = os.pread(self._stderr.fileno(), 1 << 16, self._logged_nbytes)
        self._logged_nbytes += len(printed)
        if printed.strip():
            log.warning("the writer process of rank %d printed:\n%s", rank, printed.decode(errors="replace").strip())


def _relay(storage: Storage, job: SaveJob, save: BackgroundSave) -> bool:
    """Record another rank's failure that it could not record itself, for the writer; returns True if there is one."""
    try:
        save.why_stop()
    except SaveError as error:
        relay_failure(storage, job, error)
        return True
    return False


def _let_go(process: subprocess.Popen[bytes], connection: Connection, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked child has a copy of the link, but not its writer
    # A message, since a forked child may hold the connection open; the end of the stream is for a trainer that dies.
    with contextlib.suppress(OSError):
        connection.send(LEAVE)
    connection.close()
    try:
        process.wait(timeout=LEAVE_S)
    except subprocess.TimeoutExpired:
        log.warning("the writer process %d has nothing left to write but does not exit: killing it", process.pid)
        process.kill()
        process.wait(timeout=LEAVE_S)


_open_ends: weakref.WeakSet[Connection] = weakref.WeakSet()


def _close_in_child() -> None:
    """Close the links in a forked process, such as a DataLoader worker.

    Otherwise a writer process would not notice its trainer's death while the child lives.
    """
    for end in list(_open_ends):
        with contextlib.suppress(OSError):
            end.close()


os.register_at_fork(after_in_child=_close_in_child)
