"""The writer process: ``python -m milepost.saving.writer_process <connection fd> <arena fd>``. Never imports torch.

Takes requests from a connection, one at a time, and answers each with progress and a result or an error. It leaves
when the trainer has closed the connection, or died, and the job at hand is done.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from milepost.errors import MilepostError, SaveError
from milepost.run import commit
from milepost.saving.job import JobResult, SaveJob, run_job
from milepost.saving.writer import FileImage
from milepost.storage import LocalStorage
from milepost.tensors.plan import WritePlan

PROGRESS_S = 0.5
"""Progress is told at most so often."""


@dataclass(frozen=True, slots=True)
class Request:
    """A job for the writer process. ``plan`` of the job is left out when it is the one sent before."""

    root: str
    job: SaveJob
    plan_is_known: bool
    arena_nbytes: int
    objects: Mapping[str, bytes]


NO_PLAN = WritePlan(0, "", (), (), 0)
"""Stands in a request for the plan that the writer process has already."""


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    serve(connection, int(sys.argv[2]))


def serve(connection: Connection, arena_fd: int) -> None:
    """Run jobs until the connection ends."""
    memory = memoryview(b"")
    plan: WritePlan | None = None
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        if len(memory) != request.arena_nbytes:
            memory = memoryview(mmap.mmap(arena_fd, request.arena_nbytes))
        if not request.plan_is_known:
            plan = request.job.plan
        assert plan is not None, "the first request brings its plan"
        answer = _run(connection, request, replace(request.job, plan=plan), memory)
        with contextlib.suppress(OSError):  # an orphan has nobody to tell
            connection.send(answer)


def _run(connection: Connection, request: Request, job: SaveJob, memory: memoryview) -> JobResult | MilepostError:
    storage = LocalStorage(request.root)
    watch = OrphanWatch(connection, time.monotonic)
    try:
        commit.adopt_attempt(storage, job.attempt)
        return run_job(
            storage,
            job,
            FileImage(memory),
            request.objects,
            detached=True,
            on_progress=_Progress(connection, sum(item.data_nbytes for item in job.plan.items)).add,
            give_up=watch.give_up,
        )
    except MilepostError as error:
        return error
    except Exception as error:  # noqa: BLE001 - the top of a process: whatever it is goes to the trainer
        return SaveError(f"{type(error).__name__}: {error}", rank=job.rank)


class OrphanWatch:
    """Whether the process at the other end of a connection is gone. Asked while a job waits for other ranks.

    An orphaned writer still gives the other ranks' writers ``grace_s`` seconds, then no longer waits for ranks whose
    trainers died before they had staged.
    """

    def __init__(self, connection: Connection, clock: Callable[[], float], grace_s: float = 30.0):
        self._connection = connection
        self._clock = clock
        self._grace_s = grace_s
        self._since: float | None = None
        self._lock = threading.Lock()

    def give_up(self) -> str | None:
        """Why to stop waiting, or None."""
        with self._lock:
            # The trainer sends nothing while a job runs, so anything to read is the end of the stream.
            if self._since is None and self._connection.poll(0):
                self._since = self._clock()
            if self._since is not None and self._clock() - self._since > self._grace_s:
                return f"within {self._grace_s:g} s after the training process died"
        return None


class _Progress:
    """Bytes written, told to the trainer now and then, and when they are all of ``nbytes``."""

    def __init__(self, connection: Connection, nbytes: int):
        self._connection = connection
        self._left = nbytes
        self._lock = threading.Lock()
        self._pending = 0
        self._told = time.monotonic()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._pending += nbytes
            self._left -= nbytes
            if self._left <= 0 or time.monotonic() - self._told >= PROGRESS_S:
                with contextlib.suppress(OSError):
                    self._connection.send(self._pending)
                self._pending, self._told = 0, time.monotonic()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
