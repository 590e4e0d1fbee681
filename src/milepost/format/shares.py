"""Digests of files that several ranks write ranges of, in any order, without reading anything back.

A CRC is linear: what some bytes contribute to the CRC-32 of the block they lie in depends on nothing but these bytes
and how many follow them in the block. So each rank notes the contributions of the ranges that it writes, and the XOR of
all ranks' contributions is the digest of the block.
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
    """By number of the block; of the blocks that it wrote in."""


@dataclass(frozen=True, slots=True)
class FileDigests:
    """The CRC-32 of each block of a file, and of all of it."""

    nbytes: int
    blocks: tuple[int, ...]

    @property
    def crc32(self) -> int:
        """Of the whole file."""
        return combine_blocks(self.blocks, self.nbytes)


class ShareCount:
    """Counts this rank's share of a file of ``nbytes``. Safe to use from several threads."""

    def __init__(self, nbytes: int):
        self._file_nbytes = nbytes
        self._nbytes = 0
        self._crcs: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, offset: int, data: memoryview) -> None:
        """Note that ``data`` is written at ``offset``. Each byte of the file is noted once, by one rank."""
        position = 0
        while position < len(data):
            block, start = divmod(offset + position, BLOCK_NBYTES)
            block_nbytes = min(BLOCK_NBYTES, self._file_nbytes - block * BLOCK_NBYTES)
            part = data[position : position + block_nbytes - start]
            # From a register of zeros and not inverted, as the bytes before it count for nothing.
            linear = crc32(part, _ONES) ^ _ONES
            contribution = combine(linear, 0, block_nbytes - start - len(part))
            with self._lock:
                self._crcs[block] = self._crcs.get(block, 0) ^ contribution
                self._nbytes += len(part)
            position += len(part)

    def share(self) -> Share:
        """The part as noted so far."""
        return Share(self._nbytes, dict(self._crcs))


def joined(nbytes: int, shares: Iterable[Share]) -> FileDigests:
    """The digests of a file of ``nbytes``, from the shares of all ranks that wrote to it.

    Raises:
        ValueError: together they wrote more or fewer bytes than it has.
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
