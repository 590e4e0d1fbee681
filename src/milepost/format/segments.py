"""Segments: each rank's part of the table of shards, as its sign-off holds it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from milepost.errors import FormatError
from milepost.format.columns import ShardTable, UInts
from milepost.format.manifest import BLOCK_NBYTES, FileEntry
from milepost.format.shards_file import dump_shards, parse_shards


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The output of one rank: its shards, objects and files, and the CRC-32s of its shards' blocks, in order."""

    table: ShardTable
    files: Mapping[str, FileEntry]
    block_crcs: UInts


def dump_segment(segment: Segment, save_id: str) -> bytes:
    """Return the bytes of a segment: those of ``milepost.shards``, the block CRCs, and their number."""
    crcs = segment.block_crcs.astype("<u4", copy=False).tobytes()
    return b"".join((dump_shards(segment.table, save_id), crcs, struct.pack("<Q", len(segment.block_crcs))))


def parse_segment(data: memoryview, files: Mapping[str, FileEntry], save_id: str, path: str) -> Segment:
    """Parse the output of ``dump_segment``. ``files`` are those written by its rank.

    Raises FormatError if it is damaged, belongs to another save, or its number of block CRCs does not match its shards.
    """
    count = struct.unpack("<Q", data[-8:])[0] if len(data) >= 8 else -1
    if not 0 <= 4 * count <= len(data) - 8:
        raise FormatError(f"{path}: its number of block CRCs is invalid", path=path)
    end = len(data) - 8 - 4 * count
    table, _ = parse_shards(data[:end], save_id, path, is_segment=True)
    crcs: UInts = np.frombuffer(data, "<u4", count, end)
    if int(table.first_blocks(BLOCK_NBYTES)[-1]) != count or set(table.files) != set(files):
        raise FormatError(f"{path}: its block CRCs or its files do not match its shards", path=path)
    return Segment(table, files, crcs)
