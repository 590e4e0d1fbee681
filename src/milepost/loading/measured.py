"""The decision of ``checkpoint.read = "auto"``, measured with the first blocks if it matters.

Some ranks each read a block, send the blocks to one another, and then read the received ones from the storage, all at
the same time. The faster way is used for the rest. The second read comes from the page cache if ranks share a machine,
and over the network if the storage is remote, whatever kind of file system it claims to be. If sharing could save
little, or a measurement would read too much, ``auto`` means ``shared`` for storage that is known to be remote.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from milepost.collective.comm import Comm, failure_on, raise_together
from milepost.errors import MilepostError
from milepost.format.digest import BlockDigests
from milepost.format.dtype import itemsize
from milepost.format.manifest import Manifest
from milepost.storage.base import Storage, join
from milepost.tensors.read_plan import ReadItem
from milepost.verification.block_reader import shard_reader

log = logging.getLogger("milepost")

MAX_PROBES = 16
"""Maximum number of ranks that measure."""
MAX_PROBED_PART = 32
"""The measurement of all ranks together reads at most this share of what they need: one 32nd."""
MIN_GAIN_PART = 4
"""Sharing matters if ranks together would read a quarter more than the stored bytes."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Bytes ``[low, low + nbytes)`` of the data of a shard: one block."""

    key: str
    shard: int
    low: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Wish:
    """A summary of a rank's requested data."""

    blocks_nbytes: int
    stored_nbytes: int
    """Total bytes of all tensors that it needs a part of."""
    keys: bytes
    """A digest of these tensors' keys."""
    block: _Block | None
    """A large block to measure with."""


def hands_on(
    comm: Comm, storage: Storage, folder: str, manifest: Manifest, digests: BlockDigests, items: Sequence[ReadItem]
) -> tuple[bool, int]:
    """Decide whether one rank reads data that several need. Collective; the result is the same on every rank.

    Returns the decision, and the number of bytes that this rank read to measure.

    Raises:
        MilepostError: on every rank, if any rank could not read its block.
    """
    wishes = comm.gather(_wish(manifest, digests.block_nbytes, items, comm))
    answer = (_probes(wishes, digests.block_nbytes), storage.is_remote) if wishes is not None else None
    answer = comm.broadcast(answer)
    assert answer is not None
    probes, is_remote = answer
    if not probes:
        return is_remote, 0
    return _measure(comm, storage, folder, manifest, digests, dict(probes))


def _wish(manifest: Manifest, block_nbytes: int, items: Sequence[ReadItem], comm: Comm) -> _Wish:
    keys = sorted({item.key for item in items})
    entries = [manifest.tensors[key] for key in keys]
    stored = sum(math.prod(entry.shape) * itemsize(entry.dtype) for entry in entries)
    items = [item for item in items if item.src.numel]
    large = [item for item in items if item.shard.data_nbytes >= block_nbytes]
    block = None
    if large:
        item = large[comm.rank * len(large) // comm.world_size]
        low, high = next(iter(item.blocks(block_nbytes)))
        block = _Block(item.key, item.shard_index, low, high - low)
    return _Wish(sum(_nbytes_in_blocks(item, block_nbytes) for item in items), stored, _digest(keys), block)


def _digest(keys: Sequence[str]) -> bytes:
    return hashlib.blake2b("\0".join(keys).encode(), digest_size=16).digest()


def _nbytes_in_blocks(item: ReadItem, block_nbytes: int) -> int:
    """Estimate the bytes read for an item: the blocks from its first byte to its last."""
    start, stop = item.run
    return min(-(-stop // block_nbytes) * block_nbytes, item.shard.data_nbytes) - start // block_nbytes * block_nbytes


def _probes(wishes: Sequence[_Wish], block_nbytes: int) -> tuple[tuple[int, _Block], ...]:
    """The ranks that measure, and their blocks; none if a measurement does not pay."""
    groups: dict[bytes, list[_Wish]] = {}
    for wish in wishes:
        groups.setdefault(wish.keys, []).append(wish)
    stored = sum(group[0].stored_nbytes for group in groups.values())
    gain = sum(max(0, sum(w.blocks_nbytes for w in group) - group[0].stored_nbytes) for group in groups.values())
    able = [(rank, wish.block) for rank, wish in enumerate(wishes) if wish.block is not None]
    count = min(len(able), MAX_PROBES, stored // (MAX_PROBED_PART * 2 * block_nbytes))
    if count < 2 or gain * MIN_GAIN_PART < stored:
        return ()
    return tuple(able[number * len(able) // count] for number in range(count))


def _measure(
    comm: Comm, storage: Storage, folder: str, manifest: Manifest, digests: BlockDigests, probes: dict[int, _Block]
) -> tuple[bool, int]:
    ranks = list(probes)
    failure: MilepostError | None = None
    own, got, source = bytearray(), bytearray(), -1
    if comm.rank in probes:
        place = ranks.index(comm.rank)
        source, follower = ranks[place - 1], ranks[(place + 1) % len(ranks)]
        own, got = bytearray(probes[comm.rank].nbytes), bytearray(probes[source].nbytes)

    def read(rank: int, into: bytearray) -> None:
        nonlocal failure
        block = probes[rank]
        entry = manifest.tensors[block.key]
        shard = entry.shards[block.shard]
        try:
            with storage.open_read(join(folder, shard.file)) as handle:
                reader = shard_reader(handle, block.key, entry.dtype, shard, block.shard, digests)
                reader.read(block.low, memoryview(into), lambda: memoryview(bytearray(digests.block_nbytes)))
        except BaseException as cause:  # noqa: BLE001 - the other ranks must learn of it
            failure = failure_on(comm.rank, cause)

    if source >= 0:
        read(comm.rank, own)
    raise_together(comm, failure)
    handed_s = again_s = 0.0
    if source >= 0:
        for _ in range(2):  # the first exchange may include connecting the ranks
            started = time.perf_counter()
            comm.exchange(
                [(follower, memoryview(own))],
                [(source, len(got))],
                lambda index, memory: np.copyto(np.frombuffer(got, np.uint8), np.frombuffer(memory, np.uint8)),
            )
            handed_s = time.perf_counter() - started
    comm.barrier()  # all ranks read at once, as in the load
    if source >= 0:
        started = time.perf_counter()
        read(source, got)
        again_s = time.perf_counter() - started
    raise_together(comm, failure)
    found = comm.gather((len(got), handed_s, again_s))
    verdict = False
    if found is not None:
        handed, again = (min(times[0] / times[which] for times in found if times[0]) for which in (1, 2))
        verdict = handed > again
        log.info(
            "%s/%s: what several ranks want is %s: %.0f MB/s a rank, against %.0f MB/s",
            *(storage.root, folder, "read by one, and handed on" if verdict else "read by each"),
            *(max(handed, again) / 1e6, min(handed, again) / 1e6),
        )
    return comm.broadcast(verdict), len(own) + len(got)
