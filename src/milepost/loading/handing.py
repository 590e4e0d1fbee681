"""Shared reads: a block that several ranks need is read and checked by one of them, and sent to the others.

Replicas need the same bytes, and so do ranks whose slices share blocks. Ranks exchange once which blocks they need;
from that alone every rank computes the same schedule (``plan_rounds``). In each round every rank reads a piece, all
ranks learn if any has failed, and the pieces are sent to the ranks that need them while the next round is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from milepost.collective.comm import Comm, failure_on, raise_together
from milepost.collective.threads import map_in_threads
from milepost.errors import MilepostError
from milepost.format.columns import table_of
from milepost.format.digest import BlockDigests
from milepost.format.manifest import Manifest
from milepost.loading.reader import HandedBlocks
from milepost.tensors.read_plan import ReadItem

PIECE_NBYTES = 16 << 20
"""Approximate number of bytes that each rank reads per round."""
PIECE_BLOCKS = 1024
BLOCK_COST_NBYTES = 64 << 10
"""Fixed cost of reading a block, in bytes, for balancing between ranks."""

Runs = npt.NDArray[np.int64]
"""Numbers of blocks, as ascending half-open ranges: a row ``(start, stop)`` for each."""


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """The blocks needed by exactly these ranks."""

    ranks: tuple[int, ...]
    runs: Runs


@dataclass(frozen=True, slots=True)
class HandedPiece:
    """Blocks ``[start, stop)`` that ``reader`` reads and all of ``ranks``, itself among them, want."""

    start: int
    stop: int
    reader: int
    ranks: tuple[int, ...]


def runs_of(blocks: Iterable[int]) -> Runs:
    """Block numbers, in any order and several times, as runs."""
    numbers = np.unique(np.fromiter(blocks, np.int64))
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    starts = numbers[np.concatenate(([0], breaks))] if len(numbers) else numbers
    stops = numbers[np.concatenate((breaks - 1, [-1]))] + 1 if len(numbers) else numbers
    return np.stack((starts, stops), axis=1)


def sizes_of_blocks(manifest: Manifest, block_nbytes: int) -> npt.NDArray[np.int64]:
    """The size of each block of raw data, in the order of ``milepost.digests``."""
    table = table_of(manifest)
    nbytes = table.spread([tiling.data_nbytes for tiling in table.tilings])
    nbytes = nbytes[nbytes > 0]
    last = np.cumsum(-(-nbytes // block_nbytes)) - 1
    sizes = np.full(int(last[-1]) + 1 if len(last) else 0, block_nbytes, np.int64)
    sizes[last] = nbytes - (nbytes - 1) // block_nbytes * block_nbytes
    return sizes


def exchange_wishes(comm: Comm, runs: Runs) -> list[Wish]:
    """Exchange the blocks that all ranks need; the same result on each. Equal sets are sent once. Collective."""
    digests = comm.gather(hashlib.blake2b(runs.tobytes(), digest_size=16).digest())
    speakers = None
    if digests is not None:
        alike: dict[bytes, list[int]] = {}
        for rank, digest in enumerate(digests):
            alike.setdefault(digest, []).append(rank)
        speakers = [tuple(ranks) for ranks in alike.values()]
    speakers = comm.broadcast(speakers)
    assert speakers is not None
    said = comm.collect(runs, [ranks[0] for ranks in speakers])
    wishes = [Wish(ranks, wanted) for ranks, wanted in zip(speakers, said, strict=True)] if comm.rank == 0 else []
    return comm.broadcast(wishes)


def plan_rounds(wishes: Sequence[Wish], sizes: npt.NDArray[np.int64]) -> tuple[tuple[HandedPiece, ...], ...]:
    """Schedule rounds in which each rank reads at most one piece; ranks that need a piece have it after its round.

    Blocks that only one rank needs are in no round: it reads them itself. A shared block is read by the least loaded of
    the ranks that need it.
    """
    cost = np.concatenate(([0], np.cumsum(sizes + BLOCK_COST_NBYTES)))
    load: dict[int, int] = {}
    queues: dict[int, list[HandedPiece]] = {}
    for start, stop, ranks in _wanted_by_several(wishes):
        for low, high in _cut(start, stop, len(ranks), cost):
            reader = min(ranks, key=lambda rank: (load.get(rank, 0), rank))
            load[reader] = load.get(reader, 0) + int(cost[high] - cost[low])
            queues.setdefault(reader, []).append(HandedPiece(low, high, reader, ranks))
    num_rounds = max(map(len, queues.values()), default=0)
    readers = sorted(queues)
    return tuple(
        tuple(queues[reader][number] for reader in readers if number < len(queues[reader]))
        for number in range(num_rounds)
    )


def _wanted_by_several(wishes: Sequence[Wish]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Ranges of blocks, ascending, each with the ranks that need it, at least two."""
    changes: dict[int, list[tuple[int, bool]]] = {}
    for number, wish in enumerate(wishes):
        for start, stop in wish.runs.tolist():
            changes.setdefault(start, []).append((number, True))
            changes.setdefault(stop, []).append((number, False))
    found: list[tuple[int, int, tuple[int, ...]]] = []
    active: set[int] = set()
    ranks_of: dict[frozenset[int], tuple[int, ...]] = {}
    before = 0
    for at in sorted(changes):
        if active:
            ranks = ranks_of.get(frozenset(active))
            if ranks is None:
                ranks = tuple(sorted(rank for number in active for rank in wishes[number].ranks))
                ranks_of[frozenset(active)] = ranks
            if len(ranks) > 1:
                found.append((before, at, ranks))
        for number, begins in changes[at]:
            (active.add if begins else active.discard)(number)
        before = at
    return found


def _cut(start: int, stop: int, num_ranks: int, cost: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut a range into parts small enough for a piece, and enough for each rank to read one."""
    limit = min(PIECE_NBYTES, max(1, int(cost[stop] - cost[start]) // num_ranks))
    parts = []
    while start < stop:
        end = int(np.searchsorted(cost, cost[start] + limit, side="right")) - 1
        end = min(max(end, start + 1), stop, start + PIECE_BLOCKS)
        parts.append((start, end))
        start = end
    return parts


def numbers_of(rounds: Sequence[Sequence[HandedPiece]], rank: int) -> frozenset[int]:
    """The blocks that a rank gets in the rounds, read by itself or by others."""
    pieces = (piece for pieces in rounds for piece in pieces if rank in piece.ranks)
    return frozenset(number for piece in pieces for number in range(piece.start, piece.stop))


ReadBlock = Callable[[int, memoryview], None]
"""Reads the block of a number into memory, and checks it."""
TakeBlock = Callable[[int, memoryview], None]
"""Copies the bytes of a block to their targets; the memory is reused afterwards."""


class Handing:
    """The schedule of a shared read of one part of a load: the same rounds on all ranks."""

    def __init__(
        self, comm: Comm, blocks: HandedBlocks, rounds: Sequence[Sequence[HandedPiece]], sizes: npt.NDArray[np.int64]
    ):
        self.blocks = blocks
        """The blocks that this rank gets."""
        self._comm = comm
        self._rounds = rounds
        self._bounds = np.concatenate(([0], np.cumsum(sizes)))
        self._failure: MilepostError | None = None

    @classmethod
    def agreed(cls, comm: Comm, manifest: Manifest, digests: BlockDigests, items: Sequence[ReadItem]) -> Handing:
        """Agree on a schedule with the other ranks, given the regions that this rank needs. Collective."""
        nbytes, plain = digests.block_nbytes, HandedBlocks(digests, frozenset())
        wanted = [plain.number(item, low) for item in items if item.src.numel for low, _ in item.blocks(nbytes)]
        sizes = sizes_of_blocks(manifest, nbytes)
        rounds = plan_rounds(exchange_wishes(comm, runs_of(wanted)), sizes)
        mine = [[piece for piece in pieces if piece.reader == comm.rank] for pieces in rounds]
        blocks = HandedBlocks(digests, numbers_of(rounds, comm.rank), numbers_of(mine, comm.rank))
        return cls(comm, blocks, rounds, sizes)

    def run(self, read: ReadBlock, take: TakeBlock, num_threads: int) -> None:
        """Read, check, send and receive all pieces; ``read`` and ``take`` are called from several threads. Collective.

        Raises:
            MilepostError: on every rank, the error of a rank that could not read, check or copy a block.
        """
        if not self._rounds:
            return
        self._read, self._take, self._num_threads = read, take, num_threads
        buffers = (bytearray(PIECE_NBYTES), bytearray(PIECE_NBYTES))
        with ThreadPoolExecutor(1, thread_name_prefix="milepost-ahead") as ahead:
            held = self._begin(ahead, 0, buffers[0])
            for number, pieces in enumerate(self._rounds):
                mine = self._settled(held)
                self._raise_if_any_failed()
                held = self._begin(ahead, number + 1, buffers[(number + 1) % 2])
                self._hand_on(pieces, mine)
            self._raise_if_any_failed()

    def _begin(self, ahead: ThreadPoolExecutor, number: int, buffer: bytearray) -> Future[memoryview | None]:
        """Start reading this rank's piece of a round, if there is one."""
        pieces = self._rounds[number] if number < len(self._rounds) else ()
        mine = next((piece for piece in pieces if piece.reader == self._comm.rank), None)
        return ahead.submit(self._read_piece, mine, buffer)

    def _read_piece(self, piece: HandedPiece | None, buffer: bytearray) -> memoryview | None:
        if piece is None:
            return None
        nbytes = self._nbytes(piece)
        memory = memoryview(buffer)[:nbytes] if nbytes <= len(buffer) else memoryview(bytearray(nbytes))
        map_in_threads(
            lambda number: self._read(number, self._part(piece, memory, number)),
            range(piece.start, piece.stop),
            self._num_threads,
            name="milepost-read",
        )
        return memory

    def _settled(self, held: Future[memoryview | None]) -> memoryview | None:
        try:
            return held.result()
        except BaseException as cause:  # noqa: BLE001 - the other ranks must learn of it
            self._failure = self._failure or failure_on(self._comm.rank, cause)
            return None

    def _raise_if_any_failed(self) -> None:
        if self._comm.union(int(self._failure is not None)):
            raise_together(self._comm, self._failure)

    def _hand_on(self, pieces: Sequence[HandedPiece], mine: memoryview | None) -> None:
        rank = self._comm.rank
        outgoing, incoming = [], []
        for piece in pieces:
            if piece.reader == rank:
                assert mine is not None, "or this rank has failed, and all ranks know"
                outgoing = [(other, mine) for other in piece.ranks if other != rank]
                self._take_piece(piece, mine)
            elif rank in piece.ranks:
                incoming.append(piece)
        sources = [(piece.reader, self._nbytes(piece)) for piece in incoming]
        self._comm.exchange(outgoing, sources, lambda index, memory: self._take_piece(incoming[index], memory))

    def _take_piece(self, piece: HandedPiece, memory: memoryview) -> None:
        if self._failure is not None:
            return
        try:
            map_in_threads(
                lambda number: self._take(number, self._part(piece, memory, number)),
                range(piece.start, piece.stop),
                self._num_threads,
                name="milepost-take",
            )
        except BaseException as cause:  # noqa: BLE001 - reported in the next round, and the others still send this one
            self._failure = failure_on(self._comm.rank, cause)

    def _nbytes(self, piece: HandedPiece) -> int:
        return int(self._bounds[piece.stop] - self._bounds[piece.start])

    def _part(self, piece: HandedPiece, memory: memoryview, number: int) -> memoryview:
        start = int(self._bounds[number] - self._bounds[piece.start])
        return memory[start : start + int(self._bounds[number + 1] - self._bounds[number])]
