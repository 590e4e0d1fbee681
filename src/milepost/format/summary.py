"""Totals of a checkpoint's content, for listings and reports. Torch-free, from the manifest only."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from milepost.config import PARTS, part_of
from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.manifest import Manifest, PartTotal, TensorEntry, TiledShards

_MAX_DTYPES = 8
"""Maximum number of dtypes in a manifest's head, which is short: those with the most bytes."""


def totals_by_part(manifest: Manifest) -> list[PartTotal]:
    """Return the total of each existing part, the model first."""
    if manifest.parts:
        return list(manifest.parts)
    tensors: dict[str, Counter[_Kind]] = {part: Counter() for part in PARTS}
    table = getattr(manifest.tensors, "table", None)
    if table is not None:  # columns: without an object for each tensor
        for (part, number), count in Counter(zip(map(part_of, table.keys), table.tiling.tolist(), strict=True)).items():
            tiling = table.tilings[number]
            tensors[part][tiling.dtype, tiling.shape, len(tiling)] += count
    else:
        for key, entry in manifest.tensors.items():
            tensors[part_of(key)][entry.dtype, entry.shape, len(entry.shards)] += 1
    num_objects = Counter(map(part_of, manifest.objects))
    return [_total(part, tensors[part], num_objects[part]) for part in PARTS if tensors[part] or num_objects[part]]


_Kind = tuple[str, tuple[int, ...], int]
"""Dtype, shape and number of shards of tensors: layers are alike."""


def _total(part: str, tensors: Counter[_Kind], num_objects: int) -> PartTotal:
    nbytes: Counter[str] = Counter()
    num_elements = num_shards = 0
    for (dtype, shape, shards), count in tensors.items():
        numel = math.prod(shape) * count
        nbytes[dtype] += numel * itemsize(dtype)
        num_elements, num_shards = num_elements + numel, num_shards + shards * count
    dtypes = tuple(dtype for dtype, _ in nbytes.most_common(_MAX_DTYPES))
    return PartTotal(part, tensors.total(), num_elements, nbytes.total(), num_objects, dtypes, num_shards)


def model_total(manifest: Manifest) -> PartTotal:
    """Return the total of the part ``model``; zeros if there is none."""
    found = totals_by_part(manifest)
    return found[0] if found and found[0].part == "model" else PartTotal("model", 0, 0, 0, 0, ())


def cuts_of(entry: TensorEntry) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return for each dim the half-open intervals between consecutive boundaries of stored shards."""
    return _cuts(entry.shape, boxes_of(entry))


def files_of(entry: TensorEntry) -> Sequence[str]:
    """Return the files that hold the shards, sorted."""
    shards = entry.shards
    return shards.files if isinstance(shards, TiledShards) else sorted({shard.file for shard in shards})


def boxes_of(entry: TensorEntry) -> tuple[Box, ...]:
    """Return the box of each shard."""
    return entry.shards.boxes if isinstance(entry.shards, TiledShards) else tuple(shard.box for shard in entry.shards)


def _cuts(shape: tuple[int, ...], boxes: Sequence[Box]) -> tuple[tuple[tuple[int, int], ...], ...]:
    # A rank past the end of an uneven shard stores an empty box.
    filled = [box for box in boxes if box.numel] or [Box.whole(shape)]
    cuts = []
    for dim in range(len(shape)):
        edges = sorted({edge for box in filled for edge in (box.offsets[dim], box.stops[dim])})
        cuts.append(tuple(itertools.pairwise(edges)))
    return tuple(cuts)


def shard_counts(entry: TensorEntry) -> tuple[int, ...] | None:
    """Return the number of shards along each dim, or None if the boxes are not the cells of one grid.

    A checkpoint stores each box once: it shows the shards of the original mesh, not the replicas.
    """
    return _counts(entry.shape, boxes_of(entry))


@lru_cache(maxsize=64)  # layers are cut alike
def _counts(shape: tuple[int, ...], boxes: Sequence[Box]) -> tuple[int, ...] | None:
    num_filled = sum(box.numel > 0 for box in boxes)
    if num_filled <= 1:
        return (1,) * len(shape)
    counts = tuple(len(cuts) for cuts in _cuts(shape, boxes))
    return counts if math.prod(counts) == num_filled else None  # boxes cover a tensor exactly once, so each is one cell


def placement_text(entry: TensorEntry) -> str:
    """Describe a placement in DTensor's terms: ``whole``, ``Shard(0) over 2 x Shard(1) over 4``, ``irregular``."""
    counts = shard_counts(entry)
    if counts is None:
        return f"irregular, {sum(box.numel > 0 for box in boxes_of(entry))} shards"
    return " x ".join(f"Shard({dim}) over {count}" for dim, count in enumerate(counts) if count > 1) or "whole"


def format_count(count: int) -> str:
    """Format a number of elements for people: ``950``, ``5.25 M``, ``8.03 B``."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
