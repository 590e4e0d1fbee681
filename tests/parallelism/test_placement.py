"""The box of each rank by the torch-free rules: the same as DTensor's, covering each element exactly once.

``tests/distributed/test_layouts.py`` compares the same rules with the trainer's own DTensors, layout by layout.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from milepost.format.box import cover_faults
from milepost.parallelism.degrees import Degrees
from milepost.parallelism.placement import Coordinates, Stage, box_of, stages_of
from milepost.tensors.layout import shard_pieces

PARAMETERS = {
    "tok_embeddings.weight": 0,
    "layers.3.attention.wq.weight": 0,
    "layers.3.attention.wo.weight": 1,
    "layers.3.feed_forward.w2.weight": 1,
    "layers.3.attention_norm.weight": None,
    "something.else": None,
}
"""Parameters of each kind, and the dim that tensor parallelism splits."""


@pytest.mark.parametrize("fsdp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shape", [(16, 8), (7, 12)])
def test_boxes_are_those_of_fully_shard_over_tensor_parallelism(shape: tuple[int, ...], tp: int, fsdp: int) -> None:
    degrees = Degrees(data_parallel_shard_degree=fsdp, tensor_parallel_degree=tp)
    for key, dim in PARAMETERS.items():
        placements: tuple[Any, ...]
        if dim == 0 and tp > 1:
            placements = (_StridedShard(0, split_factor=tp), Shard(0))
        else:
            placements = (Shard(0), Replicate() if dim is None else Shard(dim))
        for rank in range(degrees.world_size):
            here = Coordinates.of(rank, degrees)
            pieces = shard_pieces(shape, (fsdp, tp), (here.shard, here.tp), placements)
            box = box_of(key, shape, degrees, rank)
            assert [piece.box for piece in pieces if piece.box.numel] == ([box] if box.numel else [])


@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(data_parallel_shard_degree=4, tensor_parallel_degree=2, expert_parallel_degree=4),
        Degrees(data_parallel_shard_degree=8, expert_parallel_degree=2),
        Degrees(data_parallel_shard_degree=2, context_parallel_degree=2),
    ],
)
def test_experts_are_dealt_out_once(degrees: Degrees) -> None:
    shape = (8, 16, 4)
    boxes = [box_of("layers.0.moe.experts.w1", shape, degrees, rank) for rank in range(degrees.world_size)]
    assert cover_faults(shape, boxes) == []


def test_ranks_count_pipeline_outermost_and_tensor_innermost() -> None:
    degrees = Degrees(pipeline_parallel_degree=2, data_parallel_replicate_degree=3, tensor_parallel_degree=2)
    assert [Coordinates.of(rank, degrees) for rank in (0, 1, 2, 6)] == [
        Coordinates(pp=0, replica=0, shard=0, tp=0),
        Coordinates(pp=0, replica=0, shard=0, tp=1),
        Coordinates(pp=0, replica=1, shard=0, tp=0),
        Coordinates(pp=1, replica=0, shard=0, tp=0),
    ]


@pytest.mark.parametrize(("num_layers", "num_stages"), [(6, 4), (8, 8), (126, 16), (5, 1)])
def test_stages_split_the_layers_evenly(num_layers: int, num_stages: int) -> None:
    stages = [Stage(index=i, num_stages=num_stages, num_layers=num_layers, tied=False) for i in range(num_stages)]
    assert [layer for stage in stages for layer in stage.layers] == list(range(num_layers))
    assert max(len(stage.layers) for stage in stages) - min(len(stage.layers) for stage in stages) <= 1


def held(pp_rank: int, *, tied: bool = False) -> set[str]:
    degrees = Degrees(pipeline_parallel_degree=2)
    keys = [*(f"layers.{layer}.x" for layer in range(6)), "tok_embeddings.weight", "norm.weight", "output.weight"]
    stages = stages_of(pp_rank, degrees, stages_per_rank=2, num_layers=6, tied=tied)
    return {key for key in keys if any(stage.holds(key) for stage in stages)}


def test_stages_go_to_the_ranks_in_turn_and_a_tied_embedding_to_both_ends() -> None:
    first = {"layers.0.x", "layers.1.x", "layers.4.x", "tok_embeddings.weight"}  # stages of 2, 2, 1 and 1 layers
    last = {"layers.2.x", "layers.3.x", "layers.5.x", "norm.weight", "output.weight"}
    assert (held(0), held(1)) == (first, last)
    assert (held(0, tied=True), held(1, tied=True)) == (first, last | {"tok_embeddings.weight"})
