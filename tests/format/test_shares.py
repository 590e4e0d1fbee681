"""Digests of a file from the ranges that several ranks wrote."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from milepost.format import digest
from milepost.format.manifest import BLOCK_NBYTES
from milepost.format.shares import ShareCount, joined


@pytest.mark.parametrize(
    "nbytes", [0, 1, 5000, BLOCK_NBYTES, BLOCK_NBYTES + 1, 2 * BLOCK_NBYTES, 2 * BLOCK_NBYTES + 77]
)
def test_ranges_in_any_order_give_the_digests_of_the_file(nbytes: int):
    rng = random.Random(nbytes)
    data = rng.randbytes(nbytes)
    cuts = sorted({0, nbytes, *(rng.randrange(nbytes + 1) for _ in range(40))})
    ranges = list(pairwise(cuts))
    rng.shuffle(ranges)
    ranks = [ShareCount(nbytes) for _ in range(3)]
    for start, stop in ranges:
        rng.choice(ranks).add(start, memoryview(data)[start:stop])
    found = joined(nbytes, [rank.share() for rank in ranks])
    assert list(found.blocks) == digest.block_crcs(data)
    assert found.crc32 == digest.crc32(data)


def test_a_range_that_nobody_wrote_is_found_even_where_it_would_be_zeros():
    rank = ShareCount(100)
    rank.add(0, memoryview(bytes(60)))
    with pytest.raises(ValueError, match="60 of 100 bytes"):
        joined(100, [rank.share()])
