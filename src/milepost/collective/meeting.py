"""Rendezvous of all ranks before a save, so that a missing one is named within seconds.

A rank that waits in a collective for a rank that continues training would be matched with the collectives of training,
or hang until the group's time-out. So rank 0 first waits for the others in the job's store, which costs one request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from milepost.collective.comm import Comm
from milepost.errors import listed

log = logging.getLogger("milepost")

LATE_S = 5.0
"""Seconds after which a missing rank is named, and again after twice as many."""
PATIENCE_S = 30.0
"""After this many seconds the collective is entered nevertheless, since it detects a dead rank."""
_MAX_PAUSE_S = 0.02

_counts: Counter[str] = Counter()
"""Number of meetings of this process, by group: the same on every rank, since meetings are collective."""


@contextmanager
def meeting(comm: Comm, what: str) -> Iterator[None]:
    """Begin a collective block that all ranks enter for the same purpose, ``what`` for messages. Collective.

    Rank 0 waits until every rank has arrived, for a bounded time. The other ranks enter the block at once; if rank 0 is
    missing, that is logged while they are in it, so the block should end with rank 0's first answer.
    """
    if comm.world_size == 1:
        yield
        return
    _counts[comm.name] += 1
    number = _counts[comm.name]
    comm.post(_key(comm, comm.rank), str(number))
    comm.arrive(_total(comm))
    if comm.rank == 0:
        _wait(comm, number, what)
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(comm, number, what, over), name="milepost-meeting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _key(comm: Comm, rank: int) -> str:
    return f"meeting {comm.name} rank {rank}"


def _total(comm: Comm) -> str:
    return f"meetings {comm.name}"


def _wait(comm: Comm, number: int, what: str) -> None:
    started, late_s, pause_s = time.monotonic(), LATE_S, 0.0002
    while comm.num_arrived(_total(comm)) < number * comm.world_size:
        waited_s = time.monotonic() - started
        if waited_s > late_s:
            log.warning("%s", _text(_missing(comm, number), what, waited_s))
            late_s *= 2
        if waited_s > PATIENCE_S:
            return
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def _missing(comm: Comm, number: int) -> list[int]:
    seen = {rank: comm.look_up(_key(comm, rank)) for rank in range(comm.world_size)}
    return [rank for rank, count in seen.items() if count is None or int(count) < number]


def _watch(comm: Comm, number: int, what: str, over: threading.Event) -> None:
    started, late_s = time.monotonic(), LATE_S
    while not over.wait(late_s):
        count = comm.look_up(_key(comm, 0))
        if count is not None and int(count) >= number:
            return
        log.warning("%s", _text([0], what, time.monotonic() - started))
        late_s *= 2


def _text(missing: list[int], what: str, waited_s: float) -> str:
    who = f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(listed(missing, 8))}"
    return (
        f"{what}: waiting for {who} for {waited_s:.0f} s now. Every rank must call it, with the same step: is it "
        "called on some ranks alone (`if rank == 0:`), at another step, or does that rank hang?"
    )
