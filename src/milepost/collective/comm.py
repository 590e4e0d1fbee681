"""The few exchanges between ranks that a checkpoint needs, and their single-process version.

Only this module calls a collective, and only on the training thread. Background writers agree through storage alone.
Exchanges carry Python objects between trusted ranks of one job, and plain bytes. Data of a checkpoint is exchanged only
as bytes, or in objects that Milepost created from it: stored data is never unpickled.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, distributed_c10d  # type: ignore[attr-defined]

from milepost.collective.alone import is_alone
from milepost.collective.packing import data_of, length_of, message_of, parted, tensor_on, without_large
from milepost.errors import MilepostError, SaveError, listed

T = TypeVar("T")

WINDOW_NBYTES = 64 << 20
"""Maximum number of bytes received at once in an exchange."""
_FIRST_NBYTES = 4096
"""Size of a broadcast of which all goes in one message."""
_TAG = 0x6D69  # of such an exchange, among the messages of the group


class Comm(Protocol):
    """The exchanges of a group of ranks. Methods are collective except those that may be called from any thread."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def name(self) -> str:
        """An identifier of this group within the job."""
        ...

    def gather(self, value: T) -> list[T] | None:
        """Every rank's value on rank 0, in rank order; None elsewhere."""

    def collect(self, value: T, ranks: Sequence[int]) -> list[T]:
        """Yield the values of ``ranks`` on rank 0, in this order, one at a time in memory; nothing elsewhere.

        In :meth:`gather`, by contrast, each rank's value takes the memory of the largest.
        """

    def scatter(self, values: Sequence[T] | None) -> T:
        """Send each rank its own value from rank 0."""

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""

    def union(self, flags: int) -> int:
        """The bits that any rank has set in ``flags``, on every rank. Cheap enough for every training step."""

    def barrier(self) -> None:
        """Return once every rank has called this."""

    def exchange(
        self,
        outgoing: Sequence[tuple[int, memoryview]],
        incoming: Sequence[tuple[int, int]],
        arrived: Callable[[int, memoryview], None],
    ) -> None:
        """Send bytes to other ranks, and receive from others. Messages between two ranks arrive in order.

        ``outgoing`` has a rank and bytes, ``incoming`` a rank and a number of bytes. ``arrived`` is called with each
        index of ``incoming``, in order, and the bytes, whose memory is reused; it must not raise. At most
        ``WINDOW_NBYTES`` are received at once.
        """

    def post(self, name: str, text: str) -> None:
        """Post ``text`` under ``name`` for all ranks; from any thread. Never fails, but may get lost."""

    def look_up(self, name: str) -> str | None:
        """Return the text posted under ``name``, if any. Never waits; from any thread."""

    def arrive(self, name: str) -> None:
        """Add one to the count under ``name``; from any thread."""

    def num_arrived(self, name: str) -> float:
        """Return the count under ``name``; infinity if counting is not supported. Never waits; from any thread."""


class SingleProcess:
    """A group of one."""

    rank = 0
    world_size = 1
    name = ""

    def gather(self, value: T) -> list[T] | None:
        return [value]

    def collect(self, value: T, ranks: Sequence[int]) -> list[T]:
        return [value for _ in ranks]

    def scatter(self, values: Sequence[T] | None) -> T:
        assert values is not None
        return values[0]

    def broadcast(self, value: T) -> T:
        return value

    def union(self, flags: int) -> int:
        return flags

    def barrier(self) -> None:
        return None

    def exchange(
        self,
        outgoing: Sequence[tuple[int, memoryview]],
        incoming: Sequence[tuple[int, int]],
        arrived: Callable[[int, memoryview], None],
    ) -> None:
        return None

    def post(self, name: str, text: str) -> None:
        return None

    def look_up(self, name: str) -> str | None:
        return None

    def arrive(self, name: str) -> None:
        return None

    def num_arrived(self, name: str) -> float:
        return math.inf


class ProcessGroupComm:
    """Ranks of a ``torch.distributed`` process group that can move CPU objects.

    No other thread may use the group while a save or load runs: gloo would mix up the two streams.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.name = str(getattr(group if group is not None else dist.group.WORLD, "group_name", ""))
        ranks = dist.get_process_group_ranks(group)
        self.has_job_ranks = ranks == list(range(len(ranks)))
        """True if ranks have the same number in this group as in the job, and so in device meshes."""
        # Objects are exchanged with rank 0 of this group.
        self._root = 0 if group is None else dist.get_global_rank(group, 0)
        # The store of the job's rendezvous: a server of small values, independent of any file system.
        self._store = PrefixStore("milepost", distributed_c10d._get_default_store())

    def gather(self, value: T) -> list[T] | None:
        # Not by ``dist.gather_object``: it sends every rank the sizes of all, around a ring of all ranks, which is nine
        # tenths of its work with 64 of them.
        data = pickle.dumps(value)
        largest = torch.tensor([len(data)], dtype=torch.int64, device="cpu")
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        mine = message_of(data, int(largest.item()))
        rows = [torch.empty_like(mine) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(mine, rows, dst=self._root, group=self._group)
        return None if rows is None else [pickle.loads(data_of(row)) for row in rows]

    def collect(self, value: T, ranks: Sequence[int]) -> list[T]:
        if self.rank == 0:
            return [value if rank == 0 else self._receive(rank) for rank in ranks]
        if self.rank in ranks:
            dist.send_object_list([value], dst=self._root, group=self._group)
        return []

    def _receive(self, rank: int) -> Any:
        box: list[Any] = [None]
        source = rank if self._group is None else dist.get_global_rank(self._group, rank)
        dist.recv_object_list(box, src=source, group=self._group)
        return box[0]

    def scatter(self, values: Sequence[T] | None) -> T:
        out: list[Any] = [None]
        dist.scatter_object_list(out, None if values is None else list(values), src=self._root, group=self._group)
        return cast("T", out[0])

    def broadcast(self, value: T) -> T:
        large: list[memoryview] = []
        data: bytes | memoryview = without_large(value, large) if self.rank == 0 else b""
        first = message_of(data, _FIRST_NBYTES)
        dist.broadcast(first, src=self._root, group=self._group)
        nbytes = length_of(first)
        if nbytes <= _FIRST_NBYTES:  # as most are
            data = data_of(first)
        else:
            data = self._broadcast_memory(memoryview(data or bytearray(nbytes)))
        sizes, pickled = parted(data)
        memory = large if self.rank == 0 else [memoryview(bytearray(size)) for size in sizes]
        for one in memory:
            self._broadcast_memory(one)
        return value if self.rank == 0 else cast("T", pickle.loads(pickled, buffers=memory))

    def _broadcast_memory(self, memory: memoryview) -> memoryview:
        for start in range(0, len(memory), WINDOW_NBYTES):
            piece = tensor_on(memory[start : start + WINDOW_NBYTES])
            dist.broadcast(piece, src=self._root, group=self._group)
        return memory

    def union(self, flags: int) -> int:
        bits = torch.tensor([flags], dtype=torch.int64, device="cpu")
        dist.all_reduce(bits, op=dist.ReduceOp.BOR, group=self._group)
        return int(bits.item())

    def barrier(self) -> None:
        dist.barrier(self._group)

    def exchange(
        self,
        outgoing: Sequence[tuple[int, memoryview]],
        incoming: Sequence[tuple[int, int]],
        arrived: Callable[[int, memoryview], None],
    ) -> None:
        # All sends are started before the first wait for a receipt, so that no two ranks wait for each other.
        sends = [
            dist.isend(torch.frombuffer(memory, dtype=torch.uint8), group=self._group, group_dst=rank, tag=_TAG)
            for rank, memory in outgoing
        ]
        for window in _windows(incoming):
            buffers = {index: torch.empty(incoming[index][1], dtype=torch.uint8, device="cpu") for index in window}
            receipts = [
                dist.irecv(buffers[index], group=self._group, group_src=incoming[index][0], tag=_TAG)
                for index in window
            ]
            for receipt in receipts:
                _wait(receipt)
            for index in window:
                arrived(index, memoryview(cast("Any", buffers[index].numpy())))
        for send in sends:
            _wait(send)

    def post(self, name: str, text: str) -> None:
        with suppress(RuntimeError):  # the rank that serves the store has exited
            self._store.set(name, text)

    def look_up(self, name: str) -> str | None:
        with suppress(RuntimeError):
            if self._store.check([name]):
                return self._store.get(name).decode("utf-8", "replace")
        return None

    def arrive(self, name: str) -> None:
        with suppress(RuntimeError):
            self._store.add(name, 1)

    def num_arrived(self, name: str) -> float:
        with suppress(RuntimeError):
            return int(self._store.add(name, 0))
        return math.inf


def _windows(incoming: Sequence[tuple[int, int]]) -> Iterator[range]:
    """Split the indices of ``incoming`` into groups to receive at once."""
    start = nbytes = 0
    for index, (_, size) in enumerate(incoming):
        if index > start and nbytes + size > WINDOW_NBYTES:
            yield range(start, index)
            start, nbytes = index, 0
        nbytes += size
    if start < len(incoming):
        yield range(start, len(incoming))


def _wait(work: dist.Work | None) -> None:
    assert work is not None, "only a rank outside the group gets none"
    work.wait()


class FailureNotice:
    """Reports a failed save without its storage, for a rank whose storage refuses even a sign-off.

    The ranks of a save agree through storage records. A rank that has run out of open files, or has lost its mount,
    can't write one, and the others would wait until the time-out. So failures are also posted in the job's store. All
    methods may be called from any thread, and none waits. ``for_all``: the save waits for several ranks.
    """

    def __init__(self, comm: Comm, save_id: str, *, for_all: bool = False):
        self._comm = comm
        # Rank 0 waits for all others, and they only for rank 0.
        self._ours, self._theirs = f"{save_id} rank 0", f"{save_id} others"
        if for_all:
            self._ours = self._theirs = f"{save_id} any"
        elif comm.rank != 0:
            self._ours, self._theirs = self._theirs, self._ours

    def post(self, error: MilepostError) -> None:
        """Report that this rank has failed, with the reason, which may be another rank's failure."""
        self._comm.post(self._ours, json.dumps([error.rank, error.message]))

    def check(self) -> None:
        """Return if no failure was posted.

        Raises:
            SaveError: the save has failed on a rank that this one waits for; it names the rank.
        """
        text = self._comm.look_up(self._theirs)
        if text is not None:
            rank, message = json.loads(text)
            if f"rank {rank}" not in message:
                message = f"the save failed on rank {rank}: {message}"
            raise SaveError(message, rank=rank)


def default_comm(group: dist.ProcessGroup | None = None) -> Comm:
    """The ranks of ``group`` or of the default process group; one process when none is initialised, or in ``alone``.

    On a default group without a CPU backend (only NCCL) objects would be sent through the GPU, so a gloo group is
    created for them, once for each default group. That is collective, so call this on every rank.
    """
    if is_alone() or not (dist.is_available() and dist.is_initialized()):
        return SingleProcess()
    if group is None and "gloo" not in str(dist.get_backend_config()):
        group = _gloo_group(dist.group.WORLD)
    return ProcessGroupComm(group)


_gloo_groups: list[tuple[object, dist.ProcessGroup]] = []
"""The default group for which a gloo group was last created, and that gloo group."""


def _gloo_group(default: object) -> dist.ProcessGroup:
    if not _gloo_groups or _gloo_groups[0][0] is not default:
        _gloo_groups[:] = [(default, dist.new_group(backend="gloo"))]
    return _gloo_groups[0][1]


def failure_on(rank: int, error: BaseException, kind: type[MilepostError] = MilepostError) -> MilepostError:
    """Convert ``error`` to one that can be sent to the other ranks: it names ``rank`` and can be pickled.

    Errors other than Milepost's become one of ``kind``.
    """
    if not isinstance(error, MilepostError):
        sent = kind(f"{type(error).__name__}: {error}".removesuffix(": "), rank=rank)
        sent.__cause__ = error
        return sent
    if error.rank is None:
        error.rank = rank
    return error


def raise_together(comm: Comm, error: MilepostError | None) -> None:
    """Raise on every rank if any rank has an error: the lowest rank's, with the number of others. Collective.

    A rank that raised alone would leave the others waiting in their next collective. A rank that was interrupted
    (Ctrl-C) raises KeyboardInterrupt, once the others know.
    """
    try:
        if not comm.union(error is not None):  # one message per rank; a gather of objects takes four
            return
        brought = comm.gather(error)
        verdict = merge_failures(brought) if brought is not None else None
        verdict = comm.broadcast(verdict)
    except RuntimeError as lost:
        if error is not None:
            raise error from lost  # the others can't be reached, but this rank knows its own error
        raise
    raise_interrupt(error)
    assert verdict is not None
    if error is not None and str(error) in str(verdict):
        raise verdict from error
    raise verdict


def raise_interrupt(error: MilepostError | None) -> None:
    """Raise the KeyboardInterrupt or SystemExit that ``error`` represents, if any."""
    cause = error.__cause__ if error is not None else None
    if cause is not None and not isinstance(cause, Exception):
        raise cause


def merge_failures(brought: Sequence[MilepostError | None]) -> MilepostError | None:
    """Merge the ranks' errors (by rank) into one, or None.

    A rank's own error is preferred to one that only reports another rank's.
    """
    failures = [error for error in brought if error is not None]
    if not failures:
        return None
    own = [error for rank, error in enumerate(brought) if error is not None and error.rank == rank]
    chosen = next(iter(own), failures[0])
    failed_ranks = {error.rank for error in failures}
    if own and len(failed_ranks) < len(brought):
        others = len(failed_ranks) - 1
        more = f" ({others} more {'rank' if others == 1 else 'ranks'} failed)" if others else ""
        chosen.message = f"rank {chosen.rank}: {chosen.message}{more}"
        chosen.args = (chosen.message, *chosen.args[1:])
    return chosen


def by_ranks(values: Sequence[object]) -> list[str]:
    """List the ranks' values, one line per value: ``ranks 0, 2: step 3``."""
    ranks: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return [
        f"{'rank' if len(found) == 1 else 'ranks'} {', '.join(listed(found, 8))}: {value}"
        for value, found in ranks.items()
    ]


def on_rank_0(comm: Comm, act: Callable[[], T]) -> T:
    """Call ``act`` only on rank 0, and return its result, or raise its error, on every rank. Collective."""
    result, failure = None, None
    if comm.rank == 0:
        try:
            result = act()
        except BaseException as cause:  # noqa: BLE001 - the other ranks wait for the outcome
            failure = failure_on(0, cause)
    met = failure
    result, failure = comm.broadcast((result, failure))
    raise_interrupt(met)
    if failure is not None:
        raise failure
    return cast("T", result)


@contextmanager
def errors_shared(comm: Comm, kind: type[MilepostError] = MilepostError) -> Iterator[None]:
    """At the end of the block raise an error of any rank on all. Collective.

    Errors other than Milepost's become one of ``kind``.
    """
    failure = None
    try:
        yield
    except BaseException as cause:  # noqa: BLE001 - the other ranks wait for the outcome
        failure = failure_on(comm.rank, cause, kind)
    raise_together(comm, failure)


def on_every_rank(comm: Comm, act: Callable[[], T]) -> T:
    """Call ``act`` on each rank, and return this rank's result; an error of any rank is raised on all. Collective."""
    with errors_shared(comm):
        return act()
