"""A pair of ranks, forked in milliseconds and joined by a pipe; and their writer processes, forked too.

Crash tests need thousands of runs, too many for processes that each import torch. All that counts is real: processes
that live, meet errors and are killed, each with its own storage. Only the way in which the ranks exchange objects is
a pipe instead of gloo, and a writer process is a fork that runs the same ``serve``.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar
from unittest import mock

import torch

from milepost.errors import MilepostError
from milepost.saving import writer_link, writer_process
from milepost.storage import LocalStorage, Storage

T = TypeVar("T")
J = TypeVar("J")

StorageOf = Callable[[str, Storage], Storage]
"""Gives the storage that a process works through: by the process's name, around the real one."""


class PairComm:
    """A ``Comm`` of two ranks that hold the ends of one pipe. Broken, as gloo would be, if one dies."""

    world_size = 2
    name = "a pair"

    def __init__(self, rank: int, connection: Connection):
        self.rank = rank
        self._connection = connection

    def gather(self, value: T) -> list[T] | None:
        if self.rank == 1:
            self._connection.send(value)
            return None
        return [value, self._connection.recv()]

    def collect(self, value: T, ranks: Sequence[int]) -> list[T]:
        if self.rank == 1:
            if 1 in ranks:
                self._connection.send(value)
            return []
        return [value if rank == 0 else self._connection.recv() for rank in ranks]

    def scatter(self, values: Sequence[T] | None) -> T:
        if self.rank == 1:
            return self._connection.recv()
        assert values is not None
        self._connection.send(values[1])
        return values[0]

    def broadcast(self, value: T) -> T:
        return self.scatter([value, value])

    def union(self, flags: int) -> int:
        brought = self.gather(flags)
        return self.broadcast(brought[0] | brought[1] if brought is not None else 0)

    def barrier(self) -> None:
        self.union(0)

    def exchange(self, outgoing: Any, incoming: Any, arrived: Any) -> None:
        raise NotImplementedError("two ranks of one machine read for themselves")

    def post(self, name: str, text: str) -> None:
        """Dropped, which is allowed: records in storage must suffice."""

    def look_up(self, name: str) -> str | None:
        return None

    def arrive(self, name: str) -> None:
        """Not counted."""

    def num_arrived(self, name: str) -> float:
        return math.inf


@dataclass(frozen=True)
class Outcome:
    """The end of a rank: a result, an error of Milepost's, or the death of the rank or its partner."""

    result: Any = None
    error: MilepostError | None = None
    signal: int = 0
    lost_partner: bool = False


def run_pair(act: Callable[[PairComm], Any], *, timeout_s: float = 60.0) -> list[Outcome]:
    """``act(comm)`` on two forked ranks, and the outcomes, once all processes that they started have ended.

    Anything but an error of Milepost's or the loss of the other rank fails the test, as does a process that still runs
    after ``timeout_s``. All processes of the pair are one process group.
    """
    ends = Pipe()
    living, life = os.pipe()  # every process of the pair holds `life`, so `living` ends when none is left
    pids, results = [], []
    for rank in (0, 1):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            ends[1 - rank].close()
            os.close(living)
            os.setpgid(0, pids[0] if pids else 0)
            _be_rank(act, PairComm(rank, ends[rank]), writer, life)
        with contextlib.suppress(PermissionError):
            os.setpgid(pid, pids[0] if pids else pid)
        os.close(writer)
        pids.append(pid)
        results.append(reader)
    os.close(life)
    for end in ends:
        end.close()
    try:
        in_time = bool(select.select([living], [], [], timeout_s)[0])
        if not in_time:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        outputs = [_read_all(fd) for fd in results]
    finally:
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        os.close(living)
    assert in_time, f"not at an end after {timeout_s:g} s"
    return [_outcome(*pair) for pair in zip(outputs, statuses, strict=True)]


def _be_rank(act: Callable[[PairComm], Any], comm: PairComm, writer: int, life: int) -> NoReturn:
    try:
        torch.set_num_threads(1)
        writers = partial(ForkedWriter, f"writer {comm.rank}", life)
        with mock.patch.object(writer_link.subprocess, "Popen", writers):
            outcome = Outcome(result=act(comm))
    except MilepostError as error:
        outcome = Outcome(error=error)
    except (EOFError, ConnectionError):
        outcome = Outcome(lost_partner=True)
    except BaseException:  # noqa: BLE001 - the top of a process
        os.write(writer, pickle.dumps(traceback.format_exc()))
        os._exit(1)
    os.write(writer, pickle.dumps(outcome))
    os._exit(0)


def _read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _outcome(output: bytes, status: int) -> Outcome:
    if os.WIFSIGNALED(status):
        return Outcome(signal=os.WTERMSIG(status))
    found = pickle.loads(output)
    assert isinstance(found, Outcome), found
    return found


storage_of: StorageOf = lambda _, storage: storage  # noqa: E731 - replaced by `through`
"""What the processes of this pair work through."""


@contextmanager
def through(wrap: StorageOf) -> Iterator[None]:
    """Inside, writer processes too work through what ``wrap`` gives."""
    with mock.patch(f"{__name__}.storage_of", wrap):
        yield


class ForkedWriter:
    """The interface of ``subprocess.Popen`` for a writer process that is forked instead of spawned."""

    def __init__(self, name: str, life: int, command: Sequence[str], *, pass_fds: Sequence[int], **_: object):
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _be_writer(name, *pass_fds, keep=(0, 1, 2, life))

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, "the writer process does not end"
            time.sleep(0.001)
        return status


def _be_writer(name: str, connection: int, arena: int, *, keep: Sequence[int]) -> NoReturn:
    try:
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd not in (connection, arena, *keep):
                with contextlib.suppress(OSError):
                    os.close(fd)
        storages: dict[str, Storage] = {}

        def open_once(root: str, **_: object) -> Storage:
            return storages.setdefault(root, storage_of(name, LocalStorage(root)))

        with mock.patch.object(writer_process, "open_root", open_once):
            writer_process.serve(Connection(connection), arena)
    except BaseException:  # noqa: BLE001 - the top of a process
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def in_a_child(do: Callable[[], None]) -> int:
    """Run ``do`` in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            do()
            status = 0
        except BaseException:  # noqa: BLE001 - the top of a process
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def in_parallel(do: Callable[[J], T], jobs: Sequence[J], num_workers: int = 2) -> list[T]:
    """``do(job)`` for each, in forked processes, every one with its share of the jobs; the results in order.

    Raises:
        AssertionError: with what a worker raised.
    """
    pids, readers = [], []
    for worker in range(num_workers):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _be_worker(lambda worker=worker: [do(job) for job in jobs[worker::num_workers]], writer)
        os.close(writer)
        pids.append(pid)
        readers.append(reader)
    shares = [pickle.loads(_read_all(reader)) for reader in readers]
    for pid in pids:
        os.waitpid(pid, 0)
    for share in shares:
        assert isinstance(share, list), share
    return [shares[number % num_workers][number // num_workers] for number in range(len(jobs))]


def _be_worker(do: Callable[[], object], writer: int) -> NoReturn:
    try:
        torch.set_num_threads(1)
        result = do()
    except BaseException:  # noqa: BLE001 - the top of a process
        result = traceback.format_exc()
    with os.fdopen(writer, "wb") as file:
        file.write(pickle.dumps(result))
    os._exit(0)
