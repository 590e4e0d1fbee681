"""Digests of files written in ranges by several ranks, in any order, without reading anything back.

A CRC is linear: the contribution of some bytes to their block's CRC-32 depends only on these bytes and on how many
follow them in the block. So each rank records the contributions of the ranges that it writes, and the XOR of all ranks'
contributions is the digest of the block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from milepost.format.digest import combine, combine_blocks, crc32, num_blocks
from milepost.format.manifest import BLOCK_NBYTES

_ONES = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a file: the number of bytes, and their contribution to the digest of each block."""

    nbytes: int
    crcs: Mapping[int, int]
    """Contributions by block index, for the blocks in which it wrote."""


@dataclass(frozen=True, slots=True)
class FileDigests:
    """The CRC-32 of each block of a file, and of the file."""

    nbytes: int
    blocks: tuple[int, ...]

    @property
    def crc32(self) -> int:
        """CRC-32 of the file."""
        return combine_blocks(self.blocks, self.nbytes)


class ShareCount:
    """Accumulates this rank's share of a file of ``nbytes``. Safe to use from several threads."""

    def __init__(self, nbytes: int):
        self._file_nbytes = nbytes
        self._nbytes = 0
        self._crcs: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, offset: int, data: memoryview) -> None:
        """Record that ``data`` is written at ``offset``. Each byte of the file must be recorded once, by one rank."""
        position = 0
        while position < len(data):
            block, start = divmod(offset + position, BLOCK_NBYTES)
            block_nbytes = min(BLOCK_NBYTES, self._file_nbytes - block * BLOCK_NBYTES)
            part = data[position : position + block_nbytes - start]
            # From a register of zeros and not inverted, because preceding bytes must not contribute.
            linear = crc32(part, _ONES) ^ _ONES
            contribution = combine(linear, 0, block_nbytes - start - len(part))
            with self._lock:
                self._crcs[block] = self._crcs.get(block, 0) ^ contribution
                self._nbytes += len(part)
            position += len(part)

    def share(self) -> Share:
        """Return the part recorded so far."""
        return Share(self._nbytes, dict(self._crcs))


def joined(nbytes: int, shares: Iterable[Share]) -> FileDigests:
    """Combine the shares of all ranks that wrote a file of ``nbytes`` into its digests.

    Raises:
        ValueError: the ranks wrote more or fewer bytes than the file has.
    """
    crcs = [0] * num_blocks(nbytes)
    written = 0
    for share in shares:
        written += share.nbytes
        for block, contribution in share.crcs.items():
            crcs[block] ^= contribution
    if written != nbytes:
        raise ValueError(f"{written} of {nbytes} bytes were written")
    last_nbytes = nbytes - (len(crcs) - 1) * BLOCK_NBYTES
    empty = {size: crc32(bytes(size)) for size in {BLOCK_NBYTES, last_nbytes} if 0 < size <= nbytes}
    sizes = [BLOCK_NBYTES] * (len(crcs) - 1) + [last_nbytes] * bool(crcs)
    return FileDigests(nbytes, tuple(crc ^ empty[size] for crc, size in zip(crcs, sizes, strict=True)))
