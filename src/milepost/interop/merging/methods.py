"""The arithmetic of merging one tensor's values from all sources. Pure, in numpy.

Every method is elementwise after its measurements over complete tensors (``measure``), so that tensors can be merged in
parts of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from milepost.interop.weights.boxes import Array

ReadPart = Callable[[int], Array]
"""Returns the part of source n in the computation's dtype, in memory that the caller may change."""
BASE = 0
"""Index of the base, if a method has one; the other sources follow."""
LINEAR_ABOVE = 0.9995
"""Cosine above which spherical interpolation is replaced by linear."""


class Method(Protocol):
    """A way to merge."""

    def values(self, key: str, read: ReadPart) -> Array:
        """Return the merged part of tensor ``key``, in memory owned by the caller."""
        ...


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """The weighted sum of all sources, divided by ``divisor``."""

    weights: Sequence[float]
    divisor: float = 1.0

    def values(self, key: str, read: ReadPart) -> Array:
        """See :class:`Method`."""
        total = _times(read(0), self.weights[0])
        for number, weight in enumerate(self.weights[1:], start=1):
            total += _times(read(number), weight)
        if self.divisor != 1:
            total /= total.dtype.type(self.divisor)
        return total


@dataclass(frozen=True, slots=True)
class Slerp:
    """Two sources with factors per tensor: a point on the arc between them (``measure.arcs``)."""

    factors: Mapping[str, tuple[float, float]]

    def values(self, key: str, read: ReadPart) -> Array:
        """See :class:`Method`."""
        return WeightedSum(self.factors[key]).values(key, read)


@dataclass(frozen=True, slots=True)
class TaskArithmetic:
    """The base and the weighted differences of the sources from it (Ilharco et al., arXiv 2212.04089)."""

    weights: Sequence[float]

    def values(self, key: str, read: ReadPart) -> Array:
        """See :class:`Method`."""
        base = read(BASE)
        total = np.zeros_like(base)
        for number, weight in enumerate(self.weights, start=1):
            difference = read(number)
            difference -= base
            total += _times(difference, weight)
        total += base
        return total


@dataclass(frozen=True, slots=True)
class Ties:
    """The base and the merged differences of the sources from it (TIES, Yadav et al., arXiv 2306.01708).

    Only differences of at least ``thresholds[key]`` count (one per source; ``measure.thresholds``). For each element
    the sign with the larger weighted sum is elected, and values with that sign are averaged. NaN stays NaN.
    """

    weights: Sequence[float]
    scale: float
    thresholds: Mapping[str, Sequence[float]]

    def values(self, key: str, read: ReadPart) -> Array:
        """See :class:`Method`."""
        base = read(BASE)
        sums = {sign: np.zeros_like(base) for sign in (1, -1)}
        shares = {sign: np.zeros_like(base) for sign in (1, -1)}
        is_nan = np.zeros(base.shape, bool)
        for number, weight in enumerate(self.weights, start=1):
            difference = read(number)
            difference -= base
            difference[np.abs(difference).astype(np.float32) < np.float32(self.thresholds[key][number - 1])] = 0
            difference = _times(difference, weight)
            is_nan |= np.isnan(difference)
            for sign in (1, -1):
                agrees = difference * sign > 0
                sums[sign] += np.where(agrees, difference, 0)
                shares[sign] += agrees * base.dtype.type(abs(weight))
        is_positive = sums[1] >= -sums[-1]
        total = np.where(is_positive, sums[1], sums[-1])
        share = np.where(is_positive, shares[1], shares[-1])
        np.divide(total, share, out=total, where=share > 0)
        total = _times(total, self.scale)
        total += base
        total[is_nan] = np.nan
        return total


def _times(values: Array, factor: float) -> Array:
    """Multiply ``values`` in place by ``factor``."""
    if factor != 1:
        values *= values.dtype.type(factor)
    return values


def ema_weights(num_sources: int, decay: float) -> tuple[float, ...]:
    """Return the weights of an exponential moving average, oldest first; it starts from the first value."""
    later = tuple((1 - decay) * decay ** (num_sources - 1 - number) for number in range(1, num_sources))
    return (decay ** (num_sources - 1), *later)


def arc_factors(dot: float, square_a: float, square_b: float, share: float) -> tuple[float, float]:
    """Return the factors of two vectors for the point at ``share`` of the arc between them (Shoemake 1985).

    ``dot`` is their dot product, the squares are those of their norms. Without an arc, interpolation is linear.
    """
    norms = float(np.sqrt(square_a) * np.sqrt(square_b))
    cosine = dot / norms if norms > 0 else 1.0
    if not abs(cosine) <= LINEAR_ABOVE:
        return 1 - share, share
    angle = float(np.arccos(cosine))
    return float(np.sin((1 - share) * angle) / np.sin(angle)), float(np.sin(share * angle) / np.sin(angle))
