"""Streaming statistics of stored tensors, for ``milepost stats``, ``milepost diff`` and the report.

Everything is computed in float64 from the stored elements, slab by slab, so memory does not grow with a tensor. Means
and sums of squares of slabs are combined as in Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances" (1979), so that the order of the slabs does not cost precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS
from milepost.format.box import Box, cut_into_slabs
from milepost.format.dtype import itemsize, numpy_dtype
from milepost.interop.weights.boxes import Array, Readable
from milepost.verification.extent_reader import Progress

PIECE_NUMEL = 1 << 16
"""Elements are widened to float64 in pieces of this size, which stay in a core's cache."""
SLAB_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """Statistics of the elements of one tensor.

    ``minimum`` to ``norm`` are over the finite elements, NaN if there are none; for complex elements, over their
    magnitudes. ``std`` is the population's (numpy's ``ddof=0``), ``norm`` is Euclidean. ``num_dead_rows`` counts the
    all-zero rows (indices of the first dim, for two dims or more).
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    num_elements: int
    num_zeros: int
    num_nan: int
    num_inf: int
    minimum: float
    maximum: float
    mean: float
    std: float
    norm: float
    num_dead_rows: int = 0
    num_saturated: int = 0
    """Number of elements at the largest finite magnitude of their dtype."""

    @property
    def num_finite(self) -> int:
        """Number of elements that are neither NaN nor infinite."""
        return self.num_elements - self.num_nan - self.num_inf

    def flags(self) -> tuple[str, ...]:
        """Name suspicious properties; empty if there are none."""
        found = []
        for count, what in ((self.num_nan, "NaN"), (self.num_inf, "Inf"), (self.num_saturated, "saturated")):
            if count:
                found.append(f"{count:,} {what}")
        if self.num_elements and self.num_zeros == self.num_elements:
            found.append("all zero")
        elif self.num_dead_rows:
            found.append(f"{self.num_dead_rows:,} dead {'row' if self.num_dead_rows == 1 else 'rows'}")
        return tuple(found)


def tensor_statistics(
    source: Readable, keys: Sequence[str], *, progress: Progress | None = None
) -> list[TensorStatistics]:
    """Compute statistics of every element of the tensors ``keys``, in that order.

    Raises:
        ConversionError: a tensor is of a dtype that numpy can't compute with (see :func:`is_countable`).
        DigestMismatchError: from the source, for bytes that changed since they were saved.
    """
    total = sum(nbytes_of(source, key) for key in keys)
    done = 0

    def measure(key: str) -> TensorStatistics:
        nonlocal done
        found = Accumulator(key, source.tensors[key].dtype, source.tensors[key].shape)
        for box, slab in slabs_of(source, key):
            found.add(slab, box)
            done += slab.nbytes  # a lost update between two threads only makes the bar lag
            if progress is not None:
                progress(done, total)
        return found.result()

    return map_in_threads(measure, keys, NUM_IO_THREADS, name="milepost-stats")


def is_countable(dtype: str) -> bool:
    """Return True if numpy can compute with the dtype; not packed 4-bit floats, ``complex32`` and plain bits."""
    return numpy_dtype(dtype) is not None


def nbytes_of(source: Readable, key: str) -> int:
    """Return the size of a tensor's elements in bytes."""
    info = source.tensors[key]
    return math.prod(info.shape) * itemsize(info.dtype)


def slabs_of(source: Readable, key: str) -> Iterator[tuple[Box, Array]]:
    """Yield the tensor in consecutive boxes of some megabytes, each read into new memory.

    The cuts depend only on the shape, so that tensors of one shape are cut alike, whatever their dtypes.
    """
    info = source.tensors[key]
    dtype = numpy_dtype(info.dtype)
    assert dtype is not None, info.dtype
    if math.prod(info.shape) == 0:
        return
    for slab in cut_into_slabs(info.shape, 4, SLAB_NBYTES):
        out: Array = np.empty(slab.box.sizes, dtype)
        source.read_into(key, slab.box, out)
        yield slab.box, out


def widened(array: Array) -> Any:
    """Convert elements to float64, complex ones to magnitudes: exact for all dtypes but 64-bit integers."""
    if array.dtype.kind == "c":
        return np.abs(array.astype(np.complex128))
    return array.astype(np.float64)


class Accumulator:
    """Combines the statistics of a tensor's parts."""

    def __init__(self, key: str, dtype: str, shape: tuple[int, ...]):
        self._key, self._dtype, self._shape = key, dtype, shape
        self._largest = largest_finite(dtype)
        self._num = self._num_finite = self._num_zeros = self._num_nan = self._num_inf = self._num_saturated = 0
        self._mean = self._squares = 0.0  # over the finite elements; squares: of deviations from the mean
        self._sum_squares = 0.0
        self._min: float = math.inf
        self._max: float = -math.inf
        self._dead_rows = 0
        self._live_row = False  # whether the row in which the last slab ended has a nonzero element
        self._last_row = -1

    def add(self, slab: Array, box: Box | None = None) -> None:
        """Count the elements of a slab. Without ``box`` (a sample of the tensor) rows are not checked."""
        flat = slab.reshape(-1)
        for start in range(0, flat.size, PIECE_NUMEL):
            stored = flat[start : start + PIECE_NUMEL]
            self._add_piece(widened(stored), stored)
        if box is not None and len(self._shape) >= 2:
            self._add_rows(slab, box)

    def _add_piece(self, piece: Any, stored: Array) -> None:
        self._num += piece.size
        finite = np.isfinite(piece)
        num_finite = int(np.count_nonzero(finite))
        if num_finite != piece.size:
            num_nan = int(np.count_nonzero(np.isnan(piece)))
            self._num_nan += num_nan
            self._num_inf += piece.size - num_finite - num_nan
            piece = piece[finite]
        if not num_finite:
            return
        if stored.dtype.kind in "iu":  # exact, where float64 rounds
            low: float = int(stored.min())
            high: float = int(stored.max())
        else:
            low, high = float(piece.min()), float(piece.max())
        self._min, self._max = min(self._min, low), max(self._max, high)
        if low <= 0 <= high:
            self._num_zeros += piece.size - int(np.count_nonzero(piece))
        if max(-low, high) >= self._largest:
            self._num_saturated += int(np.count_nonzero(np.abs(piece) >= self._largest))
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(piece.mean())
            # Not np.dot: BLAS has its own threads, which would compete with training for cores.
            squares = float(np.square(piece - mean).sum())
            self._sum_squares += float(np.square(piece).sum())
            joined = self._num_finite + num_finite
            delta = mean - self._mean
            self._squares += squares + delta * delta * self._num_finite * num_finite / joined
            self._mean += delta * num_finite / joined
        self._num_finite = joined

    def _add_rows(self, slab: Array, box: Box) -> None:
        """Count dead rows. A row cut into several slabs is dead if it is zero in all of them."""
        live = _live_rows(slab)
        first = box.offsets[0]
        if first != self._last_row:
            self._end_row()
            self._last_row, self._live_row = first, False
        self._live_row = self._live_row or bool(live[0])
        if len(live) > 1:  # so the slab holds complete rows
            self._end_row()
            self._dead_rows += int(np.count_nonzero(~live[1:-1]))
            self._last_row, self._live_row = first + len(live) - 1, bool(live[-1])

    def _end_row(self) -> None:
        if self._last_row >= 0 and not self._live_row:
            self._dead_rows += 1

    def result(self) -> TensorStatistics:
        """Return the statistics; call it last."""
        self._end_row()
        nothing = not self._num_finite
        nan = math.nan
        norm = math.sqrt(self._sum_squares) if math.isfinite(self._sum_squares) else math.inf
        return TensorStatistics(
            key=self._key,
            dtype=self._dtype,
            shape=self._shape,
            num_elements=self._num,
            num_zeros=self._num_zeros,
            num_nan=self._num_nan,
            num_inf=self._num_inf,
            minimum=nan if nothing else self._min,
            maximum=nan if nothing else self._max,
            mean=nan if nothing else self._mean,
            std=nan if nothing else math.sqrt(max(0.0, self._squares) / self._num_finite),
            norm=nan if nothing else norm,
            num_dead_rows=self._dead_rows,
            num_saturated=self._num_saturated,
        )


def _live_rows(slab: Array) -> Any:
    """Return for each index of the first dim whether it has a nonzero element; compares bits, which is faster."""
    rows = slab.reshape(slab.shape[0], -1)
    if slab.dtype.kind == "c":
        rows = rows.view(np.dtype(f"f{slab.dtype.itemsize // 2}"))
    bits = rows.view(np.dtype(f"u{rows.dtype.itemsize}"))
    if rows.dtype.kind in "fV":
        bits = bits << bits.dtype.type(1)  # minus zero is zero
    return bits.any(axis=1)


def largest_finite(dtype: str) -> float:
    """Return the largest finite magnitude of a floating dtype; infinity for others, which never count as saturated."""
    found = numpy_dtype(dtype)
    if found is None or found.kind not in "fV" or dtype == "float8_e8m0fnu":
        return math.inf
    return float(ml_dtypes.finfo(found).max)  # type: ignore[no-untyped-call]  # knows numpy's own dtypes too
