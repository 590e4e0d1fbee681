"""``run_world``: a small gloo world whose ranks are forks of this process.

Importing torch takes seconds in every process that ``torchrun`` starts. Forking after one import makes a world of four
ranks in well under a second. The limitation: the parent must not have run tensor operations in threads before (the
autograd and OpenMP pools do not survive a fork), so ranks run with one thread.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch._dynamo  # otherwise every rank imports it at its first DTensor operation, which takes a second each
import torch.distributed as dist


class WorldError(AssertionError):
    """A rank raised, died or hung. ``failures`` maps ranks to descriptions."""

    def __init__(self, failures: dict[int, str]):
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        self.failures = failures


def run_world(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    allow_death: bool = False,
) -> list[Any]:
    """Run ``fn(*args)`` on ``world_size`` ranks with a gloo process group; returns the results by rank.

    ``fn`` may use ``torch.distributed`` freely; its result must pickle. With ``allow_death`` a rank that dies (a test
    that kills one) gives ``None`` instead of an error. When a rank is not done after ``timeout_s`` seconds, every rank
    prints the stacks of its threads and is killed.

    Raises:
        WorldError: naming each rank that raised, died or hung.
    """
    # Rank 0 inherits its listening socket: a port that was only found free may be taken a moment later.
    listener = socket.create_server(("127.0.0.1", 0))
    with tempfile.TemporaryFile("w+") as stacks:
        pids, pipes = [], []
        for rank in range(world_size):
            reader, writer = os.pipe()
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _run_rank(fn, args, rank, world_size, listener, writer, stacks.fileno())
            os.close(writer)
            pids.append(pid)
            pipes.append(reader)
        listener.close()
        try:
            outputs, late = _collect(pipes, timeout_s)
            if late:
                _dump_stacks(pids, late)
        finally:
            statuses = _reap(pids)
            for pipe in pipes:
                os.close(pipe)
        stacks.seek(0)
        stack_text = stacks.read()
    return _results(outputs, statuses, late, stack_text, timeout_s, allow_death)


def _run_rank(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    listener: socket.socket,
    writer: int,
    stacks: int,
) -> NoReturn:
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    host, port = listener.getsockname()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        torch.set_num_threads(1)
        listen_fd = listener.detach() if rank == 0 else None
        listener.close()
        store = dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it without a declaration
            host, port, world_size, is_master=rank == 0, master_listen_fd=listen_fd
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        payload = (True, fn(*args))
        # A rank that exits early would break the others' last collective.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 - the top of a process: everything is reported to the parent
        payload = (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    with os.fdopen(writer, "wb") as out:
        out.write(pickle.dumps(payload))
    sys.stdout.flush()
    sys.stderr.flush()
    # A gloo thread may abort while Python finalises: leave without finalising.
    os._exit(0 if payload[0] else 1)


def _collect(pipes: list[int], timeout_s: float) -> tuple[list[bytes], list[int]]:
    """Read every pipe to its end; returns the data, and the ranks that were not done in time.

    After a rank has failed, the others get a few more seconds: they may be stuck in a collective with it.
    """
    chunks: list[list[bytes]] = [[] for _ in pipes]
    open_ranks = set(range(len(pipes)))
    deadline = time.monotonic() + timeout_s
    while open_ranks:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            break
        ready, _, _ = select.select([pipes[r] for r in open_ranks], [], [], remaining)
        for rank in sorted(open_ranks):
            if pipes[rank] not in ready:
                continue
            data = os.read(pipes[rank], 1 << 20)
            if data:
                chunks[rank].append(data)
                continue
            open_ranks.discard(rank)
            if not chunks[rank] or not pickle.loads(b"".join(chunks[rank]))[0]:
                deadline = min(deadline, time.monotonic() + 20.0)
    return [b"".join(c) for c in chunks], sorted(open_ranks)


def _dump_stacks(pids: list[int], late: list[int]) -> None:
    for rank in late:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[rank], signal.SIGUSR2)
    time.sleep(0.5)
    for rank in late:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[rank], signal.SIGKILL)


def _reap(pids: list[int]) -> list[int]:
    """Wait for every child (at most 10 s each, then SIGKILL); returns exit codes, negative for signals."""
    codes = []
    for pid in pids:
        deadline = time.monotonic() + 10.0
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes.append(os.waitstatus_to_exitcode(status))
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                deadline += 3600.0
            time.sleep(0.002)
    return codes


def _results(
    outputs: list[bytes], statuses: list[int], late: list[int], stacks: str, timeout_s: float, allow_death: bool
) -> list[Any]:
    results: list[Any] = []
    failures: dict[int, str] = {}
    for rank, (raw, status) in enumerate(zip(outputs, statuses, strict=True)):
        results.append(None)
        if raw and rank not in late:
            ok, value = pickle.loads(raw)
            if ok:
                results[rank] = value
            else:
                failures[rank] = value
        elif rank in late:
            failures[rank] = f"not done after {timeout_s:.0f} s; stacks of all late ranks:\n{stacks}"
        elif not allow_death:
            failures[rank] = f"died with exit status {status}"
    if failures:
        raise WorldError(failures)
    return results
