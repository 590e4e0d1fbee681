"""N-dimensional regions of a tensor, and a check that a set of them covers it exactly once.

Below ``tensors/layout.py``, a DTensor, an FSDP shard or a pipeline stage is a *box*: offsets and sizes in the
coordinates of the global tensor. A 0-d tensor is one box with empty offsets and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

from milepost.errors import MAX_LISTED

_MAX_CORNERS = 1 << 23
_MAX_LOOKS = 1 << 18
_MAX_GAP_BOXES = 500


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The half-open region ``[offsets, offsets + sizes)`` of a global tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box of an entire tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d box, 0 if any size is 0."""
        return math.prod(self.sizes)

    @property
    def stops(self) -> tuple[int, ...]:
        """Exclusive upper corner."""
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Return the common region in global coordinates, or None if it is empty."""
        offsets = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        stops = tuple(min(a, b) for a, b in zip(self.stops, other.stops, strict=True))
        if any(stop <= start for start, stop in zip(offsets, stops, strict=True)):
            return None
        return Box(offsets, tuple(stop - start for start, stop in zip(offsets, stops, strict=True)))

    def relative_to(self, outer: Box) -> Box:
        """Return the same region in the coordinates of ``outer``, which must contain it."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)

    def shifted(self, by: Sequence[int]) -> Box:
        """Return the box moved by ``by``: the inverse of :meth:`relative_to` for the outer box's offsets."""
        return Box(tuple(a + b for a, b in zip(self.offsets, by, strict=True)), self.sizes)

    def index(self) -> tuple[Any, ...]:
        """Return the index that selects the box in an array or a tensor as a view, also of a 0-d one."""
        return (..., *(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True)))

    def inside(self, shape: Sequence[int]) -> bool:
        """Return whether the box lies within a tensor of ``shape``."""
        return len(shape) == len(self.sizes) == len(self.offsets) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def __str__(self) -> str:
        if len(self.offsets) != len(self.sizes):  # only for messages about malformed files
            return f"[offsets {self.offsets}, sizes {self.sizes}]"
        return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True)) + "]"


def contiguous_runs(inner: Box, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the contiguous runs of ``inner`` in a row-major tensor of ``shape`` as half-open element ranges, ascending.

    ``inner`` is in the coordinates of that tensor. Full trailing dims are merged, so runs are as long as possible.
    """
    if inner.numel == 0:
        return
    # Merge full trailing dims: below `split`, a run is contiguous.
    split = len(shape)
    run = 1
    while split > 0:
        split -= 1
        run *= inner.sizes[split]
        if inner.sizes[split] != shape[split]:
            break
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    base = sum(o * st for o, st in zip(inner.offsets, strides, strict=True))
    outer = inner.sizes[:split]
    index = [0] * split
    while True:
        start = base + sum(i * st for i, st in zip(index, strides, strict=False))
        yield start, start + run
        dim = split - 1
        while dim >= 0:
            index[dim] += 1
            if index[dim] < outer[dim]:
                break
            index[dim] = 0
            dim -= 1
        if dim < 0:
            return


def span(inner: Box, shape: Sequence[int]) -> tuple[int, int]:
    """Return the half-open range from the first to the last element of ``inner`` in a row-major tensor of ``shape``.

    ``inner`` is in the coordinates of that tensor and must not be empty.
    """
    first = last = 0
    stride = 1
    for offset, size, whole in zip(reversed(inner.offsets), reversed(inner.sizes), reversed(shape), strict=True):
        first += offset * stride
        last += (offset + size - 1) * stride
        stride *= whole
    return first, last + 1


def boxes_of_run(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Split the elements ``[start, stop)`` of a row-major tensor of ``shape`` into boxes, ascending.

    Each is contiguous; there are at most two for each dim. The inverse of :func:`contiguous_runs`.
    """
    if start >= stop:
        return
    inner = math.prod(shape[1:])
    if stop - start == inner * (shape[0] if shape else 1):
        yield Box.whole(shape)
        return
    first, last = -(-start // inner), stop // inner  # the complete rows
    if first > last:  # all within one row
        yield from _in_row(last, start - last * inner, stop - last * inner, shape)
        return
    yield from _in_row(first - 1, start - (first - 1) * inner, inner, shape)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _in_row(last, 0, stop - last * inner, shape)


def _in_row(row: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    for box in boxes_of_run(start, stop, shape[1:]):
        yield Box((row, *box.offsets), (1, *box.sizes))


@dataclass(frozen=True, slots=True)
class Slab:
    """A contiguous box of a row-major tensor: ``nbytes`` from byte ``start`` of the tensor's data."""

    box: Box
    start: int
    nbytes: int


def cut_into_slabs(shape: Sequence[int], element_nbytes: int, limit_nbytes: int, unit_rows: int = 1) -> Iterator[Slab]:
    """Cut a tensor of ``shape`` into slabs of at most ``limit_nbytes``, ascending; none is larger than the first.

    Units of ``unit_rows`` rows (of the last dim but one) are never split, even if larger. A single row that is longer
    is cut. A tensor without elements has no slabs.
    """
    if 0 in shape:
        return
    dim, inner = len(shape), element_nbytes
    while dim > 0 and inner * shape[dim - 1] <= limit_nbytes:
        dim -= 1
        inner *= shape[dim]
    if unit_rows > 1 and dim >= len(shape) - 1:
        # The cut would split a unit, or a single row.
        dim, inner = len(shape) - 1, element_nbytes * shape[-1]
    if dim == 0:
        yield Slab(Box.whole(shape), 0, inner)
        return
    # Dims from `dim` on are complete, dim - 1 is cut into steps, earlier dims are iterated index by index.
    unit = unit_rows if dim == len(shape) - 1 else 1
    step = max(unit, limit_nbytes // inner // unit * unit)
    start = 0
    for outer in product(*map(range, shape[: dim - 1])):
        for first in range(0, shape[dim - 1], step):
            count = min(step, shape[dim - 1] - first)
            box = Box((*outer, first, *(0 for _ in shape[dim:])), (*(1 for _ in outer), count, *shape[dim:]))
            yield Slab(box, start, count * inner)
            start += count * inner


def cover_faults(shape: Sequence[int], boxes: Sequence[Box]) -> list[str]:
    """Return the reasons why ``boxes`` do not cover a tensor of ``shape`` exactly once; empty if they do.

    Boxes without elements are allowed anywhere inside. At most ``MAX_LISTED`` faults are returned. The time is linear
    in the number of boxes (except for sorting) in all cases: they may come from a hostile file.
    """
    if len(boxes) == 1 and boxes[0] == Box.whole(shape):
        return []
    faults = [f"box {box} is not inside shape {list(shape)}" for box in boxes if not box.inside(shape)]
    if faults:
        return faults[:MAX_LISTED]
    filled = [box for box in boxes if box.numel > 0]
    if not filled:
        return [] if math.prod(shape) == 0 else ["no shard holds any of its elements"]
    split = [
        dim
        for dim, size in enumerate(shape)
        if any(box.sizes[dim] != size for box in filled)  # a box of full size inside the shape begins at 0
    ]
    if len(filled) << len(split) > _MAX_CORNERS:
        return [f"{len(filled)} shards cut along {len(split)} dims are too many to check"]
    if _is_tiling(shape, filled, split):
        return []
    if not split:
        return [f"it is stored {len(filled)} times"]
    return _explain(shape, filled, split)


def _is_tiling(shape: Sequence[int], boxes: Sequence[Box], split: Sequence[int]) -> bool:
    """Return whether boxes inside ``shape`` cover each element exactly once. Dims outside ``split`` are complete.

    A sum of boxes' indicator functions is determined by its signed corners (its mixed difference, +1 at a box's lower
    corner and alternating in sign along each edge). So the boxes tile the tensor if and only if all corners cancel,
    except those of the entire tensor.
    """
    if len(split) == 1:
        position = 0
        for start, size in sorted((box.offsets[split[0]], box.sizes[split[0]]) for box in boxes):
            if start != position:
                return False
            position += size
        return position == shape[split[0]]
    excess: dict[tuple[int, ...], int] = {}
    signs = [math.prod(corner) for corner in product((1, -1), repeat=len(split))]
    for box, weight in chain(((box, 1) for box in boxes), ((Box.whole(shape), -1),)):
        edges = [(box.offsets[dim], box.offsets[dim] + box.sizes[dim]) for dim in split]
        for corner, sign in zip(product(*edges), signs, strict=True):
            excess[corner] = excess.get(corner, 0) + weight * sign
    return not any(excess.values())


def _explain(shape: Sequence[int], boxes: list[Box], split: Sequence[int]) -> list[str]:
    """Explain why boxes are not a tiling: overlaps found by a sweep along one dim, else a gap."""
    axis = max(split, key=lambda dim: len({box.offsets[dim] for box in boxes}))
    faults: list[str] = []
    active: list[Box] = []
    looks = 0
    for box in sorted(boxes, key=lambda box: box.offsets[axis]):
        start = box.offsets[axis]
        active = [other for other in active if other.offsets[axis] + other.sizes[axis] > start]
        looks += len(active)
        if looks > _MAX_LOOKS:
            return faults or ["its shards do not cover it exactly once"]
        for other in active:
            common = box.intersect(other)
            if common is not None:
                faults.append(f"region {common} is stored more than once")
                if len(faults) == MAX_LISTED:
                    return faults
        active.append(box)
    if faults:
        return faults
    numel, covered = math.prod(shape), sum(box.numel for box in boxes)
    where = f" (the first gap is {first_gap(shape, boxes)})" if len(boxes) <= _MAX_GAP_BOXES else ""
    return [f"{numel - covered} of {numel} elements are in no shard{where}"]


def first_gap(shape: Sequence[int], boxes: Sequence[Box]) -> Box | None:
    """Return a region of a tensor of ``shape`` that none of ``boxes`` holds, or None. Slow; for error messages."""
    rest = [Box.whole(shape)] if math.prod(shape) else []
    for box in boxes:
        rest = [piece for r in rest for piece in _subtract(r, box)]
    return min(rest, default=None)


def _subtract(box: Box, hole: Box) -> list[Box]:
    common = box.intersect(hole)
    if common is None:
        return [box]
    pieces: list[Box] = []
    low, high = list(box.offsets), list(box.stops)
    for dim in range(len(low)):
        for start, stop in ((low[dim], common.offsets[dim]), (common.stops[dim], high[dim])):
            if start < stop:
                offsets = (*low[:dim], start, *low[dim + 1 :])
                stops = (*high[:dim], stop, *high[dim + 1 :])
                pieces.append(Box(offsets, tuple(b - a for a, b in zip(offsets, stops, strict=True))))
        low[dim], high[dim] = common.offsets[dim], common.stops[dim]
    return pieces
