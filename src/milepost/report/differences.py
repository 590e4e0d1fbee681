"""Differences between the elements of two tensors, accumulated over their slabs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.config import part_of
from milepost.format.box import Box
from milepost.interop.weights.boxes import Array, as_bytes


def group_of(key: str) -> str:
    """Return part and layer of a key: ``layers.3``, ``optimizer.state.layers.3``; ``model`` outside the layers."""
    parts = key.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return part_of(key) if at is None else ".".join(parts[: at + 1])


@dataclass(frozen=True, slots=True)
class ValueChange:
    """The differences between a tensor's elements. Across dtypes the values are compared.

    ``num_different`` counts elements with different bytes (with different values, if dtypes differ). ``max_abs`` is the
    largest absolute difference, NaN where only one side is NaN; ``max_rel`` the largest one relative to ``|a|``.
    """

    key: str
    num_elements: int
    num_different: int
    max_abs: float
    max_rel: float
    at: tuple[int, ...]
    """The index of ``max_abs``."""
    mean_abs: float = math.nan
    """Mean absolute difference over all elements that are finite on both sides; the next two are over the same
    elements."""
    relative_norm: float = math.nan
    """Norm of the difference over the norm of A; NaN if A is zero and B is not."""
    cosine: float = math.nan
    """Cosine of the angle between A and B; NaN if one is zero."""

    @property
    def group(self) -> str:
        """Part and layer of the tensor, see :func:`group_of`."""
        return group_of(self.key)

    @property
    def share_different(self) -> float:
        """Share of the elements that differ."""
        return self.num_different / self.num_elements if self.num_elements else 0.0


class Differences:
    """Accumulates the differences found in one tensor."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape = shape
        self.num_different = 0
        self._max_abs = -1.0
        self._max_rel = 0.0
        self._at: tuple[int, ...] = ()
        self._sums = np.zeros(4)  # sums of |b-a|, |b-a|^2, |a|^2, |b|^2 over the elements that are finite on both sides
        self._product = 0.0  # of a and b, likewise
        self._num_finite = 0

    def add(self, box: Box, a: Array, b: Array) -> None:
        wide_a, wide_b = _widened(a), _widened(b)
        distance = _distance(a, b, wide_a, wide_b)
        self._add_sums(wide_a, wide_b, distance)
        if a.dtype == b.dtype:
            if np.array_equal(as_bytes(a), as_bytes(b)):
                return
            size = a.dtype.itemsize
            other = (as_bytes(a).reshape(-1, size) != as_bytes(b).reshape(-1, size)).any(axis=1).reshape(a.shape)
        else:
            other = (wide_a != wide_b) & ~(np.isnan(wide_a) & np.isnan(wide_b))
        if not other.any():
            return
        self.num_different += int(other.sum())
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            unlike = other & ~(np.isnan(wide_a) & np.isnan(wide_b)) & ((wide_a != wide_b) | (distance > 0))
            absolute = np.where(unlike, distance, 0.0)
            relative = np.where(absolute > 0, absolute / np.abs(wide_a), 0.0)
            relative = np.nan_to_num(relative, nan=np.inf, posinf=np.inf)
        index = np.unravel_index(int(np.argmax(absolute)), a.shape)  # the first NaN, if there is one
        largest = float(absolute[index])
        if np.isnan(largest) or largest > self._max_abs:
            if not np.isnan(self._max_abs):
                self._at = tuple(int(i) + o for i, o in zip(index, box.offsets, strict=True))
            self._max_abs = largest
        self._max_rel = max(self._max_rel, float(relative.max()))

    def _add_sums(self, a: Any, b: Any, distance: Any) -> None:
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            a, b, distance = a[finite], b[finite], distance[finite]
        self._num_finite += a.size
        with np.errstate(over="ignore", invalid="ignore"):
            squares = (np.square(np.abs(x)).sum() for x in (distance, a, b))
            self._sums += np.array([distance.sum(), *squares], dtype=np.float64)
            self._product += float((a * np.conj(b)).sum().real)

    def change(self, key: str) -> ValueChange:
        numel = Box.whole(self._shape).numel
        total, squares, norm_a, norm_b = (float(x) for x in self._sums)
        return ValueChange(
            key,
            numel,
            self.num_different,
            self._max_abs,
            self._max_rel,
            self._at,
            mean_abs=total / self._num_finite if self._num_finite else math.nan,
            relative_norm=self._relative_norm(squares, norm_a),
            cosine=self._product / math.sqrt(norm_a) / math.sqrt(norm_b) if norm_a and norm_b else math.nan,
        )

    def _relative_norm(self, squares: float, norm_a: float) -> float:
        """Divide the difference's norm by A's, both given as sums of squares; NaN where undefined."""
        if norm_a:
            return math.sqrt(squares / norm_a)
        return math.nan if squares or not self._num_finite else 0.0


def _distance(a: Array, b: Array, wide_a: Any, wide_b: Any) -> Any:
    """Compute ``|a - b|`` of each element as float64; of 64-bit integers, which float64 would round, in integers."""
    if a.dtype == b.dtype and a.dtype.kind in "iu" and a.dtype.itemsize == 8:
        bits_a, bits_b = a.view(np.uint64), b.view(np.uint64)
        return np.where(a > b, bits_a - bits_b, bits_b - bits_a).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.abs(wide_b - wide_a)


def _widened(array: Array) -> Any:
    """Convert elements to float64 or complex128, exact for every stored dtype except 64-bit integers."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
