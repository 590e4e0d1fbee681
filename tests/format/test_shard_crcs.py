"""CRC-32s of all shards from those of their blocks, against one shard after the other."""

from __future__ import annotations

import numpy as np
import pytest

from milepost.format.box import Box
from milepost.format.columns import table_of
from milepost.format.digest import combine_blocks, num_blocks
from milepost.format.manifest import FileEntry, Manifest, ShardEntry, TensorEntry
from milepost.format.shard_crcs import shard_crcs


def manifest_of(lengths: list[list[int]]) -> Manifest:
    """Tensors of bytes, cut into stretches of these lengths."""
    tensors = {}
    for number, cuts in enumerate(lengths):
        starts = [sum(cuts[:place]) for place in range(len(cuts))]
        shards = [
            ShardEntry(Box((start,), (length,)), "f", 0, length + 1, 0, length, 0)
            for start, length in zip(starts, cuts, strict=True)
        ]
        tensors[f"{number:03}"] = TensorEntry("uint8", (sum(cuts),), shards)
    return Manifest(1, "ab", 0.0, "state", 1, {}, {}, tensors, {}, {"f": FileEntry(1 << 40)})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block_nbytes", [16, 4096])
def test_the_digest_of_every_shard_is_that_of_its_blocks(seed: int, block_nbytes: int):
    rng = np.random.default_rng(seed)
    few = [0, 1, 15, 16, 17, 32, 4095, 4096, 4097, 9000, 20000]
    lengths = [rng.choice(few, rng.integers(1, 40)).tolist() for _ in range(rng.integers(0, 20))]
    lengths += [[5000]] * 50  # more than a few of one length
    manifest = manifest_of(lengths)
    table = table_of(manifest)
    counts = [num_blocks(length, block_nbytes) for cuts in lengths for length in cuts]
    blocks = rng.integers(0, 1 << 32, sum(counts), dtype=np.uint32)
    found = shard_crcs(table, blocks, block_nbytes).tolist()
    start, expected = 0, []
    for length, count in zip((length for cuts in lengths for length in cuts), counts, strict=True):
        expected.append(combine_blocks(blocks[start : start + count].tolist(), length, block_nbytes))
        start += count
    assert found == expected


def test_a_table_without_shards_has_no_digests():
    assert shard_crcs(table_of(manifest_of([])), b"", 16).tolist() == []
