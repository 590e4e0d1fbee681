"""The shards that ``fully_shard`` makes of tensor-parallel weights, on any mesh: saved and shown as they are.

On fake process groups: each rank of the mesh in turn, in this process.
"""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from milepost.format.box import cover_faults
from milepost.tensors.layout import tensor_leaf
from milepost.testing.fake_rank import fake_rank
from milepost.train.parallel.initial import copy_local_part

MESHES = st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4))
"""Replicas, shards, tensor-parallel ranks."""


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in which the value of every element is its own place."""
    return torch.arange(math.prod(shape), dtype=torch.int64).reshape(shape)


def cut(whole: torch.Tensor, mesh_shape: tuple[int, int, int], tensor_dim: int, data_dim: int) -> DTensor:
    """This rank's part: split along ``tensor_dim`` over tensor parallelism, the rest along ``data_dim`` by HSDP."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "fsdp", "tp"))
    split = distribute_tensor(whole, mesh["tp"], [Shard(tensor_dim)], src_data_rank=None)
    module = nn.ParameterDict({"w": nn.Parameter(split, requires_grad=False)})
    data = mesh["replicate", "fsdp"] if mesh_shape[0] > 1 else mesh["fsdp"]
    fully_shard(module, mesh=data, shard_placement_fn=lambda _: Shard(data_dim))
    parameter = module["w"]
    assert isinstance(parameter, DTensor)
    return parameter


@settings(max_examples=40, deadline=None)
@given(mesh_shape=MESHES, rows=st.integers(1, 40), columns=st.integers(1, 12), dims=st.sampled_from([(0, 0), (1, 0)]))
def test_pieces_and_initial_weights_of_uneven_sizes(
    mesh_shape: tuple[int, int, int], rows: int, columns: int, dims: tuple[int, int]
) -> None:
    check((rows, columns), mesh_shape, *dims)


@settings(max_examples=20, deadline=None)
@given(mesh_shape=MESHES, rows=st.integers(1, 20), columns=st.integers(1, 4), tensor_dim=st.integers(0, 1))
def test_pieces_and_initial_weights_cut_along_columns(
    mesh_shape: tuple[int, int, int], rows: int, columns: int, tensor_dim: int
) -> None:
    check((rows, columns * mesh_shape[1] * mesh_shape[2]), mesh_shape, tensor_dim, 1)


def check(shape: tuple[int, int], mesh_shape: tuple[int, int, int], tensor_dim: int, data_dim: int) -> None:
    """Each piece holds the elements of its box, all boxes are the tensor, and a weight is drawn into just these."""
    whole, boxes = numbered(shape), set()
    for rank in range(math.prod(mesh_shape)):
        with fake_rank(rank, math.prod(mesh_shape)):
            parameter = cut(whole.clone(), mesh_shape, tensor_dim, data_dim)
            held = parameter.to_local().clone()
            leaf = tensor_leaf("w", parameter)
            for index, piece in enumerate(leaf.pieces):
                assert torch.equal(leaf.view(index), whole[piece.box.index()]), (rank, piece)
            assert sum(piece.box.numel for piece in leaf.pieces) == held.numel()
            parameter.to_local().fill_(-1)
            copy_local_part(parameter, whole)
            assert torch.equal(parameter.to_local(), held), rank
            boxes |= {piece.box for piece in leaf.pieces}
    assert cover_faults(shape, sorted(boxes)) == []
