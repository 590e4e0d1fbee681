"""Compute the CRC-32 of every shard from those of its blocks, for all shards at once.

To append a block to a stretch of bytes, the CRC of the stretch is shifted by the block's length, which is linear over
GF(2), and the block's CRC is added. All shards take each step together, with tables for the few distinct lengths.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from milepost.format.columns import Ints, ShardTable, UInts
from milepost.format.digest import combine

_FEW_ROWS = 32
"""Up to this number of shards, a table costs more than combining one by one."""


def shard_crcs(table: ShardTable, blocks: Any, block_nbytes: int) -> UInts:
    """Compute the CRC-32 of each shard's raw data from those of all shards' ``blocks``, in the table's order."""
    crcs = np.frombuffer(blocks, np.uint32)
    counts = table.spread([tiling.num_blocks(block_nbytes) for tiling in table.tilings])
    tails = table.spread([tiling.data_nbytes % block_nbytes for tiling in table.tilings])
    tails[tails == 0] = block_nbytes
    first = np.cumsum(counts) - counts
    # Most blocks first, so that the shards with a block left are always a prefix.
    order = np.argsort(-counts, kind="stable")
    counts, tails, first = counts[order], tails[order], first[order]
    found = np.zeros(len(table), np.uint32)
    found[: _having(counts, 1)] = crcs[first[: _having(counts, 1)]]
    shift = _shifts(block_nbytes)
    for block in range(1, int(counts.max(initial=0))):
        active, inner = _having(counts, block + 1), _having(counts, block + 2)
        found[:inner] = _apply(shift, found[:inner])
        found[inner:active] = _shifted(found[inner:active], tails[inner:active])
        found[:active] ^= crcs[first[:active] + block]
    in_order = np.empty_like(found)
    in_order[order] = found
    return in_order


def _having(counts: Ints, at_least: int) -> int:
    """Count the shards with at least ``at_least`` blocks; ``counts`` descend."""
    return int(np.searchsorted(-counts, -at_least, side="right"))


def _shifted(crcs: UInts, nbytes: Ints) -> UInts:
    """Shift each CRC by its own length."""
    found = np.empty_like(crcs)
    lengths, group = np.unique(nbytes, return_inverse=True)
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(len(lengths) + 1))
    for number, length in enumerate(lengths.tolist()):
        rows = order[bounds[number] : bounds[number + 1]]
        if len(rows) < _FEW_ROWS:
            found[rows] = [combine(crc, 0, length) for crc in crcs[rows].tolist()]
        else:
            found[rows] = _apply(_shifts(length), crcs[rows])
    return found


def _shifts(nbytes: int) -> UInts:
    """Return a table for each of a CRC's four bytes: its contribution to the CRC shifted by ``nbytes``."""
    bits = np.array([combine(1 << bit, 0, nbytes) for bit in range(32)], np.uint32)
    tables = np.zeros((4, 256), np.uint32)
    for bit in range(8):
        chosen = (np.arange(256) >> bit & 1).astype(bool)
        tables[:, chosen] ^= bits[bit::8, None]
    return tables


def _apply(tables: UInts, crcs: UInts) -> UInts:
    parts = (tables[byte][(crcs >> np.uint32(8 * byte)) & np.uint32(255)] for byte in range(4))
    return cast(UInts, np.bitwise_xor.reduce(list(parts)))
