"""The requests for many ranges of an object: few, of bounded size, and with little that nobody asked for."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from milepost.storage.ranges import MAX_OVERREAD, MAX_SPAN_NBYTES, merge_ranges

MIB = 1 << 20


def test_tensors_a_little_larger_than_a_request_cost_none_for_their_last_bytes() -> None:
    nbytes = 16 * MIB + 700
    spans = merge_ranges([(index * nbytes, (index + 1) * nbytes) for index in range(24)])
    assert len(spans) == 25
    assert min(span.stop - span.start for span in spans) > 15 * MIB


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 3000)), min_size=1, max_size=40))
def test_spans_cover_what_is_wanted_once_and_little_else(found: list[tuple[int, int]]) -> None:
    ranges = [(start, start + nbytes) for start, nbytes in found]
    spans = merge_ranges(ranges, max_gap_nbytes=500, max_span_nbytes=1000)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(spans))
    assert all(0 < span.stop - span.start <= 1000 for span in spans)
    wanted = {byte for start, stop in ranges for byte in range(start, stop)}
    read = {byte for span in spans for byte in range(span.start, span.stop)}
    assert wanted <= read
    assert len(read) * (1 - MAX_OVERREAD) <= len(wanted)
    assert sum(span.wanted_nbytes for span in spans) == sum(stop - start for start, stop in ranges)


def test_a_large_gap_is_not_read() -> None:
    spans = merge_ranges([(0, 10), (2 * MAX_SPAN_NBYTES, 2 * MAX_SPAN_NBYTES + 10)])
    assert [(span.start, span.stop) for span in spans] == [(0, 10), (2 * MAX_SPAN_NBYTES, 2 * MAX_SPAN_NBYTES + 10)]
