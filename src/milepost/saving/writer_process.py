"""The writer process. Never imports torch.

Handles requests from a connection one at a time, answering each with log lines, progress, and a result or an error. It
exits on the trainer's request, or once the trainer has died and the current job is done.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import mmap
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from milepost.errors import MilepostError, SaveError
from milepost.run.attempts import adopt_attempt
from milepost.saving.job import JobMonitor, JobResult, SaveJob, run_job
from milepost.saving.writer import FileImage
from milepost.storage import Storage, open_root
from milepost.storage.base import PageCache
from milepost.tensors.plan import WritePlan

PROGRESS_S = 0.5
"""Minimum interval in seconds between progress reports."""
LEAVE = None
"""The message that ends a writer process."""


@dataclass(frozen=True, slots=True)
class Request:
    """A job for the writer process. The job's ``plan`` is left out if it equals the previous one."""

    root: str
    page_cache: PageCache
    job: SaveJob
    plan_is_known: bool
    arena_nbytes: int
    objects: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line for the trainer's log."""

    name: str
    level: int
    text: str


NO_PLAN = WritePlan(0, "", (), (), 0)
"""Placeholder for a plan that the writer process already has."""


def prepare() -> tuple[Connection, int]:
    """Set up a writer process with last arguments ``<connection fd> <arena fd>``; returns both for :func:`serve`."""
    faulthandler.enable()
    logging.captureWarnings(True)
    logging.getLogger("milepost").setLevel(logging.INFO)
    return Connection(int(sys.argv[-2])), int(sys.argv[-1])


def serve(connection: Connection, arena_fd: int) -> None:
    """Run jobs until the trainer asks to exit, or has exited."""
    link = _Link(connection)
    logging.getLogger().addHandler(link)
    memory = memoryview(b"")
    plan: WritePlan | None = None
    storage: Storage | None = None
    try:
        while (request := _next_request(connection)) is not None:
            if len(memory) != request.arena_nbytes:
                memory = memoryview(mmap.mmap(arena_fd, request.arena_nbytes))
            if not request.plan_is_known:
                plan = request.job.plan
            assert plan is not None, "the first request must include a plan"
            if storage is None or (storage.root, storage.page_cache) != (request.root, request.page_cache):
                # Reused: for an object store it is a connection.
                storage = open_root(request.root, page_cache=request.page_cache)
            link.send(_run(link, storage, request, replace(request.job, plan=plan), memory))
    finally:
        logging.getLogger().removeHandler(link)


def _next_request(connection: Connection) -> Request | None:
    """Read the next request; None if the trainer asks to exit, or has exited."""
    try:
        request: Request | None = connection.recv()
    except (EOFError, OSError):
        return None
    return request


def _run(
    link: _Link, storage: Storage, request: Request, job: SaveJob, memory: memoryview
) -> JobResult | MilepostError:
    watch = _Watch(link, job.data_nbytes)
    try:
        if job.publishes:  # without the committing writer, the others' work is lost
            adopt_attempt(storage, job.attempt)
        return run_job(storage, job, FileImage(memory), request.objects, watch, detached=True)
    except MilepostError as error:
        return error
    except Exception as error:
        logging.getLogger("milepost").exception("unexpected error in the writer process of rank %d", job.rank)
        return SaveError(f"{type(error).__name__}: {error}", rank=job.rank)


class _Link(logging.Handler):
    """The thread-safe connection to the trainer. Messages of an orphan are dropped."""

    def __init__(self, connection: Connection):
        super().__init__()
        self.connection = connection
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        with self._sending, contextlib.suppress(OSError):
            self.connection.send(message)

    def emit(self, record: logging.LogRecord) -> None:
        self.send(LogLine(record.name, record.levelno, self.format(record)))


class OrphanWatch:
    """Detects the exit of the process at the other end of a connection. Polled while a job waits for other ranks.

    An orphaned writer waits another ``grace_s`` seconds for the other ranks' writers, but not for ranks whose trainers
    died before staging.
    """

    def __init__(self, connection: Connection, clock: Callable[[], float], grace_s: float = 30.0):
        self._connection = connection
        self._clock = clock
        self._grace_s = grace_s
        self._since: float | None = None
        self._lock = threading.Lock()

    def give_up(self) -> str | None:
        """Return the reason to stop waiting, or None."""
        with self._lock:
            # The trainer sends nothing while a job runs, so readability means the end of the stream.
            if self._since is None and self._connection.poll(0):
                self._since = self._clock()
            if self._since is not None and self._clock() - self._since > self._grace_s:
                return f"within {self._grace_s:g} s after the training process died"
        return None


class _Watch(JobMonitor):
    """Reports bytes written at intervals and at the end (``nbytes``); stops waiting when orphaned."""

    def __init__(self, link: _Link, nbytes: int):
        self._link = link
        self._orphan = OrphanWatch(link.connection, time.monotonic)
        self._left = nbytes
        self._lock = threading.Lock()
        self._pending = 0
        self._reported = time.monotonic()

    def wrote(self, nbytes: int) -> None:
        with self._lock:
            self._pending += nbytes
            self._left -= nbytes
            if self._left <= 0 or time.monotonic() - self._reported >= PROGRESS_S:
                self._link.send(self._pending)
                self._pending, self._reported = 0, time.monotonic()

    def why_stop(self) -> str | None:
        return self._orphan.give_up()
