"""Summaries of a checkpoint for listings: how tensors were sharded, derived from the stored boxes."""

from __future__ import annotations

import itertools
import math

import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from milepost.format.box import Box
from milepost.format.manifest import ShardEntry, TensorEntry
from milepost.format.summary import placement_text, shard_counts


def stored(shape: tuple[int, ...], boxes: list[Box]) -> TensorEntry:
    """A tensor of which each rank stored its box."""
    shards = tuple(
        ShardEntry(
            box=box,
            file=f"__{rank}_0.distcp",
            record_offset=0,
            record_nbytes=1000,
            data_offset=0,
            data_nbytes=4 * box.numel,
            crc32=0,
        )
        for rank, box in enumerate(boxes)
    )
    return TensorEntry("float32", shape, shards)


def boxes_on(mesh: tuple[int, ...], placements: list[Placement], shape: tuple[int, ...]) -> list[Box]:
    """The boxes that the ranks of a mesh hold of a DTensor, replicas once, as a save stores them."""
    found = []
    for place in itertools.product(*map(range, mesh)):
        sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, list(place), placements)
        box = Box(tuple(offsets), tuple(sizes))
        if box not in found or not math.prod(sizes):
            found.append(box)
    return found


@pytest.mark.parametrize(
    ("mesh", "placements", "shape", "text", "counts"),
    [
        ((4,), [Replicate()], (8, 6), "whole", (1, 1)),
        ((4,), [Shard(0)], (8, 6), "Shard(0) over 4", (4, 1)),
        ((4,), [Shard(1)], (8, 6), "Shard(1) over 3", (1, 3)),  # 6 columns in chunks of 2: the last rank has none
        ((4,), [Shard(0)], (10, 6), "Shard(0) over 4", (4, 1)),
        ((2, 4), [Shard(0), Shard(1)], (8, 8), "Shard(0) over 2 x Shard(1) over 4", (2, 4)),
        ((2, 4), [Shard(1), Shard(0)], (8, 8), "Shard(0) over 4 x Shard(1) over 2", (4, 2)),
        ((2, 2), [Replicate(), Shard(0)], (8, 8), "Shard(0) over 2", (2, 1)),
        ((2, 2), [Shard(0), Shard(0)], (8,), "Shard(0) over 4", (4,)),
        ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], (8,), "Shard(0) over 4", (4,)),
        (
            (2, 2, 2),
            [Shard(0), Shard(1), Shard(2)],
            (4, 4, 4),
            " x ".join(f"Shard({d}) over 2" for d in range(3)),
            (2, 2, 2),
        ),
        ((4,), [Shard(0)], (1,), "whole", (1,)),
        ((2,), [Replicate()], (), "whole", ()),
        ((2,), [Shard(0)], (0, 3), "whole", (1, 1)),
    ],
)
def test_the_placement_of_a_dtensor_is_inferred_from_its_boxes(
    mesh: tuple[int, ...],
    placements: list[Placement],
    shape: tuple[int, ...],
    text: str,
    counts: tuple[int, ...],
) -> None:
    entry = stored(shape, boxes_on(mesh, placements, shape))
    assert placement_text(entry) == text
    assert shard_counts(entry) == counts


def test_boxes_that_are_on_no_grid_are_called_irregular() -> None:
    """Three ranks: one has the upper half, two share the lower half by columns."""
    entry = stored((4, 4), [Box((0, 0), (2, 4)), Box((2, 0), (2, 2)), Box((2, 2), (2, 2))])
    assert placement_text(entry) == "irregular, 3 shards"
    assert shard_counts(entry) is None
