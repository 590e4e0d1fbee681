"""Checks of a table of shards that might mislead a reader, each for all shards at once.

They report the same faults as ``manifest_check`` does for entries; only if a check fails are shards examined one by
one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from milepost.errors import MAX_LISTED, Problem
from milepost.format.box import cover_faults
from milepost.format.columns import Ints, ShardTable, Tiling
from milepost.format.dtype import itemsize
from milepost.format.manifest import FileEntry
from milepost.format.manifest_check import RESERVED
from milepost.format.tags import untagged
from milepost.format.typed_json import MAX_COUNT

_BATCH_ROWS = 1 << 18
_FEW_BOXES = 24
"""Up to this number of boxes, a check box by box is faster than one with arrays."""
_MAX_CORNERS = 1 << 26


def table_faults(
    table: ShardTable, files: Mapping[str, FileEntry], limit: int = MAX_LISTED, *, must_cover: bool = True
) -> list[Problem]:
    """Check ``table``, whose records are in ``files``; returns the first ``limit`` faults.

    Checks that each tiling is possible and, with ``must_cover``, covers its shape exactly once; that each record is
    inside its file and its data inside the record; and that no two records share a byte.
    """
    return list(islice(_faults(table, files, must_cover), limit))


def _faults(table: ShardTable, files: Mapping[str, FileEntry], must_cover: bool) -> Iterator[Problem]:
    bad = {}
    for number, tiling in enumerate(table.tilings):
        why = _impossible(tiling) or (cover_fault(tiling) if must_cover else "")
        if why:
            bad[number] = why
    if bad:
        for tensor in np.flatnonzero(np.isin(table.tiling, list(bad))):
            key = table.keys[tensor]
            yield Problem(f"{key!r}{bad[int(table.tiling[tensor])]}", key=key)
        return
    unknown = [name for name in table.files if name not in files or untagged(name) in RESERVED]
    if unknown:
        yield Problem(f"records are in {unknown[0]!r:.200}, which is not a data file of this checkpoint")
        return
    nbytes = np.array([files[name].nbytes for name in table.files], np.int64)
    outside = False
    for fault in _outside(table, nbytes):
        outside = True
        yield fault
    if not outside:
        yield from _overlaps(table, nbytes)


# ---- tilings ----


def _impossible(tiling: Tiling) -> str:
    """Return the reason why a tiling is impossible, worded to follow the key; empty if it is possible."""
    if min(tiling.shape, default=0) < 0 or math.prod(tiling.shape) * itemsize(tiling.dtype) > MAX_COUNT:
        return f"has invalid shape {list(tiling.shape)!r:.200}"
    shape = np.array(tiling.shape, np.int64)
    # Written so that no sum of hostile numbers overflows.
    inside = (tiling.offsets >= 0) & (tiling.sizes >= 0) & (tiling.sizes <= shape) & (tiling.offsets <= shape)
    inside &= tiling.sizes <= shape - np.clip(tiling.offsets, 0, shape)
    if not inside.all():
        box = tiling.boxes[int(np.flatnonzero(~inside.all(axis=1))[0])]
        return f": box {box} is not inside shape {list(tiling.shape)}"
    header, record = tiling.header_nbytes, tiling.record_nbytes
    fits = (header >= 0) & (record > 0) & (record <= MAX_COUNT) & (header <= record)
    fits &= tiling.data_nbytes <= record - header
    if not fits.all():
        box = tiling.boxes[int(np.flatnonzero(~fits)[0])]
        return f": the data of shard {box} is not inside its record"
    return ""


def cover_fault(tiling: Tiling) -> str:
    """Return the reason why boxes do not cover the shape exactly once, worded to follow the key; empty if they do."""
    if len(tiling) > _FEW_BOXES and _is_tiling(tiling):
        return ""
    return "".join(f": {fault}" for fault in cover_faults(tiling.shape, tiling.boxes)[:1])


def _is_tiling(tiling: Tiling) -> bool:
    """Check like ``box._is_tiling``, with arrays: all signed corners cancel, except those of the entire tensor."""
    filled = tiling.numel > 0
    offsets, sizes = tiling.offsets[filled], tiling.sizes[filled]
    if not len(sizes):
        return math.prod(tiling.shape) == 0
    split = np.flatnonzero((sizes != np.array(tiling.shape)).any(axis=0))
    if not len(split):
        return len(sizes) == 1
    if len(split) == 1:
        start, size = offsets[:, split[0]], sizes[:, split[0]]
        order = np.argsort(start, kind="stable")
        stops = np.cumsum(size[order])
        begins = np.concatenate(([0], stops[:-1]))
        return bool((start[order] == begins).all()) and int(stops[-1]) == tiling.shape[split[0]]
    if len(sizes) << len(split) > _MAX_CORNERS:
        return False
    low = np.concatenate((offsets[:, split], np.zeros((1, len(split)), np.int64)))
    high = np.concatenate(((offsets + sizes)[:, split], np.array([[tiling.shape[d] for d in split]], np.int64)))
    weight = np.ones(len(low), np.int64)
    weight[-1] = -1  # the entire tensor
    corners, signs = [np.empty((len(low), 0), np.int64)], [weight]
    for column in range(len(split)):
        corners = [np.column_stack((corner, edge[:, column])) for corner in corners for edge in (low, high)]
        signs = [side * sign for sign in signs for side in (1, -1)]
    points, total = np.concatenate(corners), np.concatenate(signs)
    order = np.lexsort(points.T)
    points, total = points[order], total[order]
    begins_anew = np.concatenate(([True], (points[1:] != points[:-1]).any(axis=1)))
    return not np.add.reduceat(total, np.flatnonzero(begins_anew)).any()


# ---- places ----


def _outside(table: ShardTable, nbytes: Ints) -> Iterator[Problem]:
    """Report records that are not inside their files."""
    record = [tiling.record_nbytes for tiling in table.tilings]
    tensor = 0
    while tensor < len(table.keys):
        first = int(table.first[tensor])
        stop = max(tensor + 1, int(np.searchsorted(table.first, first + _BATCH_ROWS)) - 1)
        rows = slice(first, int(table.first[stop]))
        lengths = table.spread(record, tensor, stop)
        for row in _not_inside(table.record_offset[rows], lengths, nbytes[table.file[rows]]):
            key = table.keys[int(np.searchsorted(table.first, first + row, side="right")) - 1]
            yield _place_fault(
                table, nbytes, key, table.file[first + row], table.record_offset[first + row], lengths[row]
            )
        tensor = stop
    objects = table.objects
    for row in _not_inside(objects.record_offset, objects.record_nbytes, nbytes[objects.file]):
        yield _place_fault(
            table, nbytes, objects.keys[row], objects.file[row], objects.record_offset[row], objects.record_nbytes[row]
        )


def _not_inside(start: Ints, length: Ints, room: Ints) -> list[int]:
    fits = (start >= 0) & (length > 0) & (length <= room) & (start <= room - length)
    return [] if fits.all() else np.flatnonzero(~fits).tolist()


def _place_fault(table: ShardTable, nbytes: Ints, key: str, file: Any, start: Any, length: Any) -> Problem:
    name = table.files[file]
    where = f"bytes {int(start)} to {int(start) + int(length)} of {name!r}"
    return Problem(f"{key!r} is recorded in {where}, which has {int(nbytes[file])} bytes", key=key)


def _overlaps(table: ShardTable, nbytes: Ints) -> Iterator[Problem]:
    """Report records that share bytes. If records are stored in table order, one pass suffices."""
    if _ascend(table, len(nbytes)):
        return
    objects = table.objects
    file = np.concatenate((table.file, objects.file))
    start = np.concatenate((table.record_offset, objects.record_offset))
    length = np.concatenate((table.spread([tiling.record_nbytes for tiling in table.tilings]), objects.record_nbytes))
    order = np.lexsort((start, file))
    file, start, length = file[order], start[order], length[order]
    shared = (file[1:] == file[:-1]) & (start[:-1] + length[:-1] > start[1:])
    for place in np.flatnonzero(shared):
        first, second = (_key_of(table, int(order[place + i])) for i in (0, 1))
        name = table.files[file[place]]
        text = f"the records of {first!r} and {second!r} overlap in {name!r} at byte {int(start[place + 1])}"
        yield Problem(text, key=second)


def _ascend(table: ShardTable, num_files: int) -> bool:
    """Return True if each record begins after its predecessor in the file, as Milepost writes them.

    Worthwhile only for tensors with many shards: it takes one Python step per tensor. False is inconclusive.
    """
    if len(table) < 8 * len(table.keys):
        return False
    end = np.zeros(num_files, np.int64)
    record = [tiling.record_nbytes for tiling in table.tilings]
    bounds, numbers = table.first.tolist(), table.tiling.tolist()
    for tensor, tiling in enumerate(numbers):
        rows = slice(bounds[tensor], bounds[tensor + 1])
        file, start = table.file[rows], table.record_offset[rows]
        if len(file) > num_files or (start < end[file]).any():
            return False
        stop = start + record[tiling]
        end[file] = stop
        if (end[file] != stop).any():  # two shards of the tensor are in one file
            return False
    objects = table.objects
    order = np.lexsort((objects.record_offset, objects.file))
    file, start = objects.file[order], objects.record_offset[order]
    stop = start + objects.record_nbytes[order]
    same = file[1:] == file[:-1]
    return bool((start >= end[file]).all()) and not bool((same & (stop[:-1] > start[1:])).any())


def _key_of(table: ShardTable, row: int) -> str:
    if row >= len(table):
        return table.objects.keys[row - len(table)]
    return table.keys[int(np.searchsorted(table.first, row, side="right")) - 1]
