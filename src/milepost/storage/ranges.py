"""Plan the requests for many byte ranges of an object: neighbours are merged, with little excess."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_GAP_NBYTES = 512 << 10
"""Maximum gap between two ranges that is read instead of skipped: reading it is faster than another request."""
MAX_SPAN_NBYTES = 16 << 20
"""Maximum size of a request."""
MAX_OVERREAD = 0.25
"""Maximum fraction of merged ranges that is not requested by a reader."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``[start, stop)`` to request at once, of which the ranges take ``wanted_nbytes``."""

    start: int
    stop: int
    wanted_nbytes: int


def merge_ranges(
    ranges: Sequence[tuple[int, int]],
    *,
    max_gap_nbytes: int = MAX_GAP_NBYTES,
    max_span_nbytes: int = MAX_SPAN_NBYTES,
) -> list[Span]:
    """Merge ``ranges`` (half-open, in any order, may touch and overlap) into ascending, disjoint spans.

    Neighbours are merged without regard to the size of a request, and then cut into requests of equal size: a tensor
    with its header is a little larger than a power of two, and should not cost a request for its last bytes.
    """
    wanted = sorted((start, stop) for start, stop in ranges if start < stop)
    runs: list[Span] = []
    for start, stop in wanted:
        last = runs[-1] if runs else None
        if last is None or not _fits(last, start, stop, max_gap_nbytes):
            runs.append(Span(start, stop, stop - start))
        else:
            runs[-1] = Span(last.start, max(last.stop, stop), last.wanted_nbytes + _beyond(last, start, stop))
    cuts = [piece for run in runs for piece in _pieces(run.start, run.stop, max_span_nbytes)]
    counts = [0] * len(cuts)
    starts = [start for start, _ in cuts]
    for start, stop in wanted:
        index = bisect_right(starts, start) - 1
        while index < len(cuts) and cuts[index][0] < stop:
            counts[index] += min(stop, cuts[index][1]) - max(start, cuts[index][0])
            index += 1
    return [Span(start, stop, count) for (start, stop), count in zip(cuts, counts, strict=True)]


def _fits(last: Span, start: int, stop: int, max_gap: int) -> bool:
    if start < last.stop:
        return True  # otherwise a byte would be in two spans
    reach = stop - last.start
    unwanted = reach - last.wanted_nbytes - (stop - start)
    return start - last.stop <= max_gap and unwanted <= MAX_OVERREAD * reach


def _beyond(last: Span, start: int, stop: int) -> int:
    """Return the number of bytes of ``[start, stop)`` that are not in ``last``."""
    return max(0, stop - max(start, last.stop))


def _pieces(start: int, stop: int, max_nbytes: int) -> Iterator[tuple[int, int]]:
    step = -(-(stop - start) // -(-(stop - start) // max_nbytes))
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
