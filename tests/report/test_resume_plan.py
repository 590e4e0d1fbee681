"""``plan_resume`` against the real thing: the boxes that DTensors have, and what a load reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import milepost
from milepost.format.box import cover_faults
from milepost.format.manifest import BLOCK_NBYTES
from milepost.loading import reader
from milepost.parallelism.placement import Layout, Place, box_of, is_on_stage
from milepost.report.resume_plan import READ_BUFFER_NBYTES, plan_resume
from milepost.storage import LocalStorage
from milepost.tensors.layout import shard_pieces
from milepost.testing.sample import Array, save_arrays

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
    layout = Layout(fsdp=fsdp, tp=tp)
    for key, dim in PARAMETERS.items():
        placements: tuple[Any, ...]
        if dim == 0 and tp > 1:
            placements = (_StridedShard(0, split_factor=tp), Shard(0))
        else:
            placements = (Shard(0), Replicate() if dim is None else Shard(dim))
        for rank in range(layout.world_size):
            place = Place.of(rank, layout)
            pieces = shard_pieces(shape, (fsdp, tp), (place.shard, place.tp), placements)
            box = box_of(key, shape, layout, place)
            assert [piece.box for piece in pieces if piece.box.numel] == ([box] if box.numel else [])


@pytest.mark.parametrize("layout", [Layout(fsdp=4, tp=2, ep=4), Layout(fsdp=8, ep=2), Layout(fsdp=2, cp=2, ep=1)])
def test_experts_are_dealt_out_once(layout: Layout) -> None:
    shape = (8, 16, 4)
    places = [Place.of(rank, layout) for rank in range(layout.world_size)]
    boxes = [box_of("layers.0.moe.experts.w1", shape, layout, place) for place in places]
    assert cover_faults(shape, boxes) == []


def test_every_layer_is_on_one_stage_and_stages_are_even() -> None:
    layout = Layout(pp=2, stages_per_rank=2)
    held = [
        [layer for layer in range(6) if is_on_stage(f"layers.{layer}.x", 6, layout, Place(pp, 0, 0, 0), tied=False)]
        for pp in (0, 1)
    ]
    assert held == [[0, 1, 4], [2, 3, 5]]  # stages of 2, 2, 1 and 1 layers, dealt out in turn
    assert is_on_stage("tok_embeddings.weight", 6, layout, Place(1, 0, 0, 0), tied=True)
    assert not is_on_stage("tok_embeddings.weight", 6, layout, Place(1, 0, 0, 0), tied=False)
    assert not is_on_stage("output.weight", 6, layout, Place(0, 0, 0, 0), tied=False)


def test_what_is_planned_is_what_a_load_reads(memory_path: Path) -> None:
    """On one rank: whole tensors, and in pieces of a large one."""
    storage = LocalStorage(memory_path)
    arrays: dict[str, Array] = {"w": np.ones((1024, 5000), "float32"), "b": np.ones(7, "float32")}
    manifest = save_arrays(storage, "a", arrays, num_ranks=2)
    (planned,) = plan_resume(manifest, Layout()).ranks
    report = milepost.load(memory_path / "a", {"w": torch.zeros(1024, 5000), "b": torch.zeros(7)})
    framing = report.read_nbytes - report.wanted_nbytes
    assert planned.wanted_nbytes == report.wanted_nbytes == planned.read_nbytes
    assert 0 <= framing < 4096  # headers and footers of four records
    assert (planned.num_files, planned.num_tensors, planned.buffer_nbytes) == (2, 2, 0)


def test_whole_blocks_are_read_for_a_part(memory_path: Path) -> None:
    manifest = save_arrays(LocalStorage(memory_path), "a", {"something": np.ones((3 << 20, 1), "float32")})
    first, second, third = plan_resume(manifest, Layout(fsdp=3)).ranks
    assert [rank.wanted_nbytes for rank in (first, second, third)] == [4 << 20] * 3
    assert [rank.read_nbytes for rank in (first, second, third)] == [BLOCK_NBYTES] * 3
    halves = plan_resume(manifest, Layout(fsdp=2)).ranks
    assert [rank.wanted_nbytes for rank in halves] == [6 << 20] * 2
    assert [rank.read_nbytes for rank in halves] == [2 * BLOCK_NBYTES] * 2
    assert halves[0].memory_nbytes == (6 << 20) + READ_BUFFER_NBYTES


def test_the_read_buffers_are_the_readers() -> None:
    assert 2 * (reader.SLAB_NBYTES + 2 * BLOCK_NBYTES) == READ_BUFFER_NBYTES


def test_replicas_read_the_same_and_stages_only_their_layers(memory_path: Path) -> None:
    arrays: dict[str, Array] = {f"layers.{i}.attention.wq.weight": np.ones((8, 8), "float32") for i in range(4)}
    arrays["tok_embeddings.weight"] = np.ones((8, 8), "float32")
    arrays["output.weight"] = np.ones((8, 8), "float32")
    manifest = save_arrays(LocalStorage(memory_path), "a", arrays)
    ranks = plan_resume(manifest, Layout(replicate=2, pp=2)).ranks
    assert [rank.num_tensors for rank in ranks] == [3, 3, 3, 3]
    assert [(rank.place.pp, rank.place.replica) for rank in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_missing_and_unexpected_keys_are_told(memory_path: Path) -> None:
    arrays: dict[str, Array] = {f"layers.{i}.attention.wq.weight": np.ones((8, 8), "float32") for i in (0, 2)}
    arrays |= {f"optimizer.state.{key}.exp_avg": array for key, array in arrays.items()}
    arrays["optimizer.state.layers.0.attention.wq.weight.step"] = np.array(1.0, "float32")
    arrays["optimizer.state.gone.weight.step"] = np.array(1.0, "float32")
    manifest = save_arrays(LocalStorage(memory_path), "a", arrays, objects={"train_state.step": 1})
    plan = plan_resume(manifest, Layout())
    assert not plan.fits
    assert plan.missing == (
        "layers.1.attention.wq.weight",
        "optimizer.state.layers.2.attention.wq.weight.step",
    )
    assert plan.unexpected == ("optimizer.state.gone.weight.step",)
