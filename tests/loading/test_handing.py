"""Who reads which blocks for whom: a plan that every rank makes alike."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.loading import handing
from milepost.loading.handing import Wish, numbers_of, plan_rounds, runs_of

NUM_BLOCKS = 60
SIZES = np.full(NUM_BLOCKS, 4 << 20, np.int64)

wanted_sets = st.lists(st.sets(st.integers(0, NUM_BLOCKS - 1)), min_size=1, max_size=6)


def wishes_of(wanted: list[set[int]]) -> list[Wish]:
    """As ranks would bring them: those that want the same are one wish."""
    alike: dict[frozenset[int], list[int]] = {}
    for rank, blocks in enumerate(wanted):
        alike.setdefault(frozenset(blocks), []).append(rank)
    return [Wish(tuple(ranks), runs_of(blocks)) for blocks, ranks in alike.items()]


@settings(deadline=None, max_examples=100)
@given(wanted_sets)
def test_what_several_ranks_want_is_read_once_and_each_of_them_gets_it(wanted: list[set[int]]) -> None:
    rounds = plan_rounds(wishes_of(wanted), SIZES)
    pieces = [piece for found in rounds for piece in found]
    readers: dict[int, int] = {}
    for piece in pieces:
        for block in range(piece.start, piece.stop):
            assert block not in readers
            readers[block] = piece.reader
            assert piece.ranks == tuple(rank for rank, blocks in enumerate(wanted) if block in blocks)
            assert piece.reader in piece.ranks
    several = {block for block in range(NUM_BLOCKS) if sum(block in blocks for blocks in wanted) > 1}
    assert readers.keys() == several
    for found in rounds:
        assert len({piece.reader for piece in found}) == len(found)
    for rank, blocks in enumerate(wanted):
        assert numbers_of(rounds, rank) == blocks & several


def test_replicas_read_equal_shares_in_pieces_of_bounded_size() -> None:
    sizes = np.full(1000, 4 << 20, np.int64)
    rounds = plan_rounds([Wish((0, 1, 2, 3), runs_of(range(1000)))], sizes)
    shares = [sum(p.stop - p.start for found in rounds for p in found if p.reader == rank) for rank in range(4)]
    assert max(shares) - min(shares) <= 4
    largest = max(piece.stop - piece.start for found in rounds for piece in found)
    assert largest * (4 << 20) <= handing.PIECE_NBYTES


def test_many_small_blocks_take_few_rounds() -> None:
    sizes = np.full(20_000, 1 << 10, np.int64)
    rounds = plan_rounds([Wish((0, 1), runs_of(range(20_000)))], sizes)
    assert len(rounds) <= 80


def test_runs_of_blocks() -> None:
    assert runs_of([5, 3, 4, 4, 9]).tolist() == [[3, 6], [9, 10]]
    assert runs_of([]).tolist() == []
