"""Measurements over complete tensors that some methods need first: passes over all values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from milepost.collective.threads import map_in_threads
from milepost.format.box import Box
from milepost.interop.merging.merged import cut_box, is_floating, read_box, wide_dtype
from milepost.interop.merging.methods import BASE, arc_factors
from milepost.interop.weights.boxes import Array, Readable
from milepost.interop.weights.stream import Advance

NUM_THREADS = 4
LOW_BITS = 15
"""A magnitude is found in two passes: by its upper 16 of 31 bits, then by the remaining ones."""


def num_elements(inputs: Sequence[Readable]) -> int:
    """Return the number of elements of all merged tensors of one source."""
    return sum(Box.whole(inputs[0].tensors[key].shape).numel for key in _keys(inputs))


def _visited(part: Box, advance: Advance | None) -> None:
    if advance is not None:
        advance(part.numel)


def _keys(inputs: Sequence[Readable]) -> list[str]:
    return [key for key, info in inputs[0].tensors.items() if is_floating(info)]


def arcs(inputs: Sequence[Readable], share: float, advance: Advance | None) -> dict[str, tuple[float, float]]:
    """Return for each tensor the factors of the point at ``share`` of the arc from the first source to the second."""

    def measure(key: str) -> tuple[str, tuple[float, float]]:
        sums = np.zeros(3, np.float64)
        dtype = wide_dtype(key, inputs)
        for part in cut_box(key, Box.whole(inputs[0].tensors[key].shape), inputs):
            a, b = (read_box(inputs, number, key, part, dtype).reshape(-1).astype(np.float64) for number in (0, 1))
            with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are reported at the end
                sums += (np.dot(a, b), np.dot(a, a), np.dot(b, b))
            _visited(part, advance)
        dot, square_a, square_b = map(float, sums)
        return key, arc_factors(dot, square_a, square_b, share)

    return dict(map_in_threads(measure, _keys(inputs), NUM_THREADS, name="milepost-merge"))


def thresholds(inputs: Sequence[Readable], density: float, advance: Advance | None) -> dict[str, list[float]]:
    """Return for each tensor and source the threshold of the largest ``density`` of differences to the base."""

    def measure(key: str) -> tuple[str, list[float]]:
        return key, [_threshold(inputs, number, key, density, advance) for number in range(1, len(inputs))]

    return dict(map_in_threads(measure, _keys(inputs), NUM_THREADS, name="milepost-merge"))


def _threshold(inputs: Sequence[Readable], number: int, key: str, density: float, advance: Advance | None) -> float:
    """Find the exact k-th largest magnitude of a difference, in float32, by counting instead of sorting."""
    shape = inputs[0].tensors[key].shape
    if 0 in shape:
        return 0.0
    count = max(1, int(density * Box.whole(shape).numel))
    upper, lower = np.zeros(1 << (31 - LOW_BITS), np.int64), np.zeros(1 << LOW_BITS, np.int64)
    for part in cut_box(key, Box.whole(shape), inputs):
        upper += np.bincount(_magnitudes(inputs, number, key, part) >> LOW_BITS, minlength=len(upper))
        _visited(part, advance)
    high, count = _from_above(upper, count)
    for part in cut_box(key, Box.whole(shape), inputs):
        bits = _magnitudes(inputs, number, key, part)
        lower += np.bincount(bits[bits >> LOW_BITS == high] & (len(lower) - 1), minlength=len(lower))
        _visited(part, advance)
    low, _ = _from_above(lower, count)
    return float(np.array(high << LOW_BITS | low, np.uint32).view(np.float32))


def _magnitudes(inputs: Sequence[Readable], number: int, key: str, part: Box) -> npt.NDArray[np.uint32]:
    """Return the magnitudes of a difference as float32 bits, which sort like the values."""
    dtype = wide_dtype(key, inputs)
    values = read_box(inputs, number, key, part, dtype)
    values -= read_box(inputs, BASE, key, part, dtype)
    magnitudes: Array = np.abs(values).astype(np.float32)
    return magnitudes.reshape(-1).view(np.uint32)


def _from_above(counts: npt.NDArray[Any], wanted: int) -> tuple[int, int]:
    """Return the bin of the ``wanted``-th largest value, and its rank within that bin."""
    cumulated = np.cumsum(counts[::-1])
    place = int(np.searchsorted(cumulated, wanted))
    before = int(cumulated[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before
