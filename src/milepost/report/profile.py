"""Statistics of a step's weights and their change since the step before: the numbers of the report.

Every byte is read and compared with its digest once; the figures come from a sample. It is the same in every step, so
that changes are between the same elements and two steps need not fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS
from milepost.interop.weights.boxes import Readable
from milepost.report.statistics import (
    Accumulator,
    TensorStatistics,
    is_countable,
    nbytes_of,
    slabs_of,
    widened,
)

NUM_BINS = 32
RUN_NUMEL = 64
"""Elements are sampled in runs of this length, a cache line or more, so that sampling touches less memory."""
BUDGET_NUMEL = 24 << 20
"""Maximum number of elements kept to compare a step with the next: 96 MiB of float32, two steps at a time."""
MIN_SAMPLE, MAX_SAMPLE = 1 << 10, 1 << 17

Samples = Mapping[str, Any]
"""The sampled elements of each key as float32 (float64 for wider dtypes), in a fixed order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """The change of a tensor from one step to the next, over the sampled elements. NaN where it is undefined."""

    relative_norm: float
    """Norm of the difference over the previous norm."""
    cosine: float
    share_changed: float
    max_abs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorProfile:
    """One tensor of one step. Statistics cover only the sampled elements, the fraction ``share`` of all."""

    statistics: TensorStatistics
    share: float
    histogram: tuple[int, ...]
    """Counts in ``NUM_BINS`` bins of equal width from the statistics' minimum to their maximum."""
    movement: Movement | None = None
    """None if the previous step does not have the tensor in this shape."""


def sample_numel(num_tensors: int) -> int:
    """Return the maximum number of elements to sample per tensor, in a run whose steps hold up to ``num_tensors``."""
    return min(max(BUDGET_NUMEL // max(num_tensors, 1), MIN_SAMPLE), MAX_SAMPLE)


def profile_tensors(
    source: Readable,
    before: Samples,
    *,
    max_numel: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, TensorProfile], Samples]:
    """Profile every tensor that numpy can compute with; also returns the samples to compare the next step with.

    ``progress`` is called from any thread with the size of each slab that was read. The caller then checks the source's
    digests.
    """
    keys = sorted((key for key, info in source.tensors.items() if is_countable(info.dtype)), key=natural)
    keys.sort(key=lambda key: -nbytes_of(source, key))

    def work(key: str) -> tuple[TensorProfile, Any]:
        return _profile(source, key, before.get(key), max_numel, progress)

    done = dict(zip(keys, map_in_threads(work, keys, NUM_IO_THREADS, name="milepost-report"), strict=True))
    profiles = {key: done[key][0] for key in sorted(keys, key=natural)}
    return profiles, {key: sample for key, (_, sample) in done.items()}


def _profile(
    source: Readable, key: str, before: Any, max_numel: int, progress: Callable[[int], None] | None
) -> tuple[TensorProfile, Any]:
    info = source.tensors[key]
    numel = math.prod(info.shape)
    stride = -(-numel // max_numel) if numel else 1
    found = Accumulator(key, info.dtype, info.shape)
    taken = []
    for box, slab in slabs_of(source, key):
        part = every_nth_run(slab.reshape(-1), stride)
        found.add(part.reshape(slab.shape) if stride == 1 else part, box if stride == 1 else None)
        taken.append(widened(part).astype(np.float64 if slab.dtype.itemsize > 4 else np.float32))
        if progress is not None:
            progress(slab.nbytes)
    sample = np.concatenate(taken) if taken else np.zeros(0, np.float32)
    statistics = found.result()
    profile = TensorProfile(
        statistics=statistics,
        share=statistics.num_elements / numel if numel else 1.0,
        histogram=_histogram(sample, statistics),
        movement=_movement(before, sample) if before is not None and before.shape == sample.shape else None,
    )
    return profile, sample


def every_nth_run(flat: Any, stride: int) -> Any:
    """Select every ``stride``-th run of ``RUN_NUMEL`` elements of a flat array, starting with the first."""
    if stride == 1:
        return flat
    whole = flat.size // (RUN_NUMEL * stride) * RUN_NUMEL * stride
    runs = flat[:whole].reshape(-1, RUN_NUMEL * stride)[:, :RUN_NUMEL].reshape(-1)
    return np.concatenate([runs, flat[whole : whole + RUN_NUMEL]])


def _histogram(sample: Any, statistics: TensorStatistics) -> tuple[int, ...]:
    low, high = float(statistics.minimum), float(statistics.maximum)
    if not sample.size or not low < high or not math.isfinite(high - low):
        return ()
    finite = sample[np.isfinite(sample)].astype(np.float64)
    if high - low > NUM_BINS * np.spacing(max(abs(low), abs(high))):
        counts, _ = np.histogram(finite, bins=NUM_BINS, range=(low, high))
    else:  # numpy refuses a range with fewer numbers than bins, such as that of weights that barely differ from 1
        places = ((finite - low) / (high - low) * NUM_BINS).astype(np.int64)
        counts = np.bincount(np.clip(places, 0, NUM_BINS - 1), minlength=NUM_BINS)
    return tuple(int(count) for count in counts)


def _movement(before: Any, after: Any) -> Movement:
    a, b = before.astype(np.float64), after.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = b - a
        norms = [math.sqrt(float(np.square(x).sum())) for x in (a, b, difference)]
        product = float((a * b).sum())
    changed = int(np.count_nonzero((a != b) & ~(np.isnan(a) & np.isnan(b))))
    largest = float(np.abs(difference).max()) if difference.size else 0.0
    return Movement(
        relative_norm=ratio(norms[2], norms[0]),
        cosine=ratio(product, norms[0] * norms[1]),
        share_changed=changed / a.size if a.size else 0.0,
        max_abs=largest,
    )


def ratio(part: float, whole: float) -> float:
    """Return ``part / whole``; 0/0 is 0, x/0 is NaN."""
    if whole == 0:
        return 0.0 if part == 0 else math.nan
    return part / whole


def natural(key: str) -> tuple[tuple[bool, int, str], ...]:
    """Return a sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple(
        (part.isdecimal(), int(part) if part.isdecimal() and len(part) < 19 else 0, part) for part in key.split(".")
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """Keys that differ only in one number, as a table: one row per kind of tensor, one column per layer."""

    rows: tuple[str, ...]
    """Key patterns, with ``*`` for the number."""
    layers: tuple[int, ...]
    keys: Mapping[tuple[str, int], str]
    rest: tuple[str, ...]
    """Keys outside the layers."""


def grid_of(keys: Sequence[str]) -> Grid:
    """Arrange keys by the first number in each. A row needs two layers: a number that occurs once is part of a name."""
    cells: dict[tuple[str, int], str] = {}
    rest = []
    for key in keys:
        parts = key.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 6), None)
        if at is None:
            rest.append(key)
        else:
            cells[".".join((*parts[:at], "*", *parts[at + 1 :])), int(parts[at])] = key
    counts: dict[str, int] = {}
    for row, _ in cells:
        counts[row] = counts.get(row, 0) + 1
    rest += [key for (row, _), key in cells.items() if counts[row] < 2]
    cells = {cell: key for cell, key in cells.items() if counts[cell[0]] >= 2}
    rows = tuple(sorted({row for row, _ in cells}, key=natural))
    layers = tuple(sorted({layer for _, layer in cells}))
    return Grid(rows, layers, cells, tuple(sorted(rest, key=natural)))
