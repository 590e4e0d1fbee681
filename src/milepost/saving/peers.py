"""The processes of other ranks on this machine: a rank that waits for one of them notices its death.

A launcher such as torchrun ends all ranks with the first that dies. Without one, a killed rank leaves no record of a
failure, and the others would wait for its part until the time-out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from milepost.errors import FormatError, SaveError
from milepost.run.owner import Owner, is_alive, is_here, parse_owner, this_process
from milepost.run.signoff import has_signed_off
from milepost.saving.job import SaveJob
from milepost.saving.replicas import host_name
from milepost.storage.base import Storage

if TYPE_CHECKING:
    from milepost.collective.comm import Comm

LOOK_S = 1.0
"""Processes are looked at this often."""
GRACE_S = 10.0
"""Seconds after a death in which what the process did last may still become visible."""
WRITER_GRACE_S = 45.0
"""The same for a rank with a writer process, which finishes without it."""


class Peers:
    """The processes of all ranks that have announced themselves, as each does when this is created."""

    def __init__(self, comm: Comm):
        self.rank, self.world_size = comm.rank, comm.world_size
        self._comm = comm
        self._known: dict[int, Owner] = {}
        me = this_process(time.time())
        self.boot_id = me.boot_id
        comm.post(self._name(comm.rank), me.dump().decode())

    def _name(self, rank: int) -> str:
        return f"{self._comm.name} process of rank {rank}"

    def find(self, rank: int) -> Owner | None:
        """Return the process of a rank, if it has announced itself. From any thread; never waits."""
        if rank not in self._known and (text := self._comm.look_up(self._name(rank))) is not None:
            try:
                self._known[rank] = parse_owner(text.encode(), self._name(rank))
            except FormatError:
                return None
        return self._known.get(rank)


class PeerWatch:
    """Watches the ranks of this machine that a save waits for: all, on the rank that commits; else only that one."""

    def __init__(
        self,
        peers: Peers,
        storage: Storage,
        job: SaveJob,
        *,
        has_writer: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._peers = peers
        self._storage = storage
        self._job = job
        self._grace_s = WRITER_GRACE_S if has_writer else GRACE_S
        self._clock = clock
        self._lock = threading.Lock()
        self._looked = clock()
        self._dead: dict[int, float] = {}
        """Ranks found dead, with the time."""
        own = job.part.ranks if job.part is not None else range(job.world_size)
        if job.publishes:  # thousands of ranks on other machines are not worth a look at each
            near = ("", host_name())
            self._ranks = [r for r in own if r != job.rank and (not job.hosts or job.hosts[r] in near)]
        else:
            self._ranks = [own[0]]
            peers.find(own[0])  # now: it may serve the store in which it is looked up

    def check(self) -> None:
        """Return if none is known to be dead; from any thread.

        Raises:
            SaveError: a rank has died before it finished its part; it names the rank.
        """
        now = self._clock()
        boot_id = self._peers.boot_id
        with self._lock:
            if now - self._looked < LOOK_S:
                return
            self._looked = now
        for rank in self._ranks:
            owner = self._peers.find(rank)
            # Of one boot: two machines may have one name and one id, as clones of an image have.
            if owner is None or owner.boot_id != boot_id or not is_here(owner) or is_alive(owner, now):
                continue
            if now - self._dead.setdefault(rank, now) < self._grace_s:
                continue
            if self._job.publishes and has_signed_off(self._storage, self._job.attempt, rank):
                continue
            what = "its part was written" if self._job.publishes else "it committed the save"
            raise SaveError(
                f"rank {rank} ({owner}) died before {what}: {self._storage.root}/{self._job.target} is not committed, "
                "earlier steps are intact",
                path=self._job.target,
                rank=rank,
            )
