"""The boxes computed for a rank are those that it holds: checked against tensors sharded by torch itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from milepost.errors import SaveError
from milepost.format.box import cover_faults
from milepost.tensors.layout import TensorLeaf, shard_pieces, tensor_leaf
from milepost.testing.fake_rank import fake_rank

Cut = Callable[[DeviceMesh, torch.Tensor], torch.Tensor]
"""Makes one rank's tensor out of the whole one, as some parallelism does."""


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in which the value of every element is its own place."""
    return torch.arange(math.prod(shape), dtype=torch.int64).reshape(shape)


def check_layout(shape: tuple[int, ...], mesh_shape: tuple[int, ...], names: tuple[str, ...], cut: Cut) -> None:
    """On every rank of a mesh each piece holds the elements of its box, and together the boxes are the tensor."""
    whole = numbered(shape)
    boxes = set()
    for rank in range(math.prod(mesh_shape)):
        with fake_rank(rank, math.prod(mesh_shape)):
            leaf = tensor_leaf("w", cut(init_device_mesh("cpu", mesh_shape, mesh_dim_names=names), whole.clone()))
        assert leaf.shape == shape
        assert sum(piece.box.numel for piece in leaf.pieces) == leaf.local.numel()
        for number, piece in enumerate(leaf.pieces):
            held = leaf.view(number)
            assert torch.equal(held, whole[piece.box.index()]) or (held.numel() == 0 and math.prod(shape) == 0), (
                rank,
                piece,
            )
            boxes.add(piece.box)
    assert cover_faults(shape, sorted(boxes)) == []


def fsdp_over_tensor_parallel(dim: int) -> Cut:
    """``fully_shard`` of a parameter that is split along ``dim`` over a tensor-parallel mesh already."""

    def cut(mesh: DeviceMesh, whole: torch.Tensor) -> torch.Tensor:
        split = distribute_tensor(whole, mesh["tp"], [Shard(dim)], src_data_rank=None)
        module = nn.ParameterDict({"w": nn.Parameter(split, requires_grad=False)})
        fully_shard(module, mesh=mesh["dp"])
        return module["w"]

    return cut


@pytest.mark.parametrize("mesh_shape", [(2, 2), (3, 2), (3, 4)])
def test_fsdp_over_tensor_parallelism_of_any_size(mesh_shape: tuple[int, int]) -> None:
    """Sizes that divide, sizes that don't, and sizes that leave some ranks without a row, on one dim and on two."""
    for rows in (1, 7, 12, 15):
        check_layout((rows, 2), mesh_shape, ("dp", "tp"), fsdp_over_tensor_parallel(0))
    check_layout((7, 5), mesh_shape, ("dp", "tp"), fsdp_over_tensor_parallel(1))


def test_hybrid_sharding() -> None:
    def cut(mesh: DeviceMesh, whole: torch.Tensor) -> torch.Tensor:
        module = nn.ParameterDict({"w": nn.Parameter(whole, requires_grad=False)})
        fully_shard(module, mesh=mesh)
        return module["w"]

    for rows in (1, 5, 6):
        check_layout((rows, 3), (2, 3), ("replicate", "shard"), cut)


PLACEMENTS = st.one_of(st.just(Replicate()), st.integers(0, 2).map(Shard))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(0, 7)] * 3),
    axes=st.lists(st.tuples(st.integers(1, 4), PLACEMENTS), min_size=1, max_size=3).filter(
        lambda axes: math.prod(size for size, _ in axes) <= 8
    ),
)
def test_any_placements_of_distribute_tensor(shape: tuple[int, ...], axes: list[tuple[int, Placement]]) -> None:
    """Replicated and sharded mesh dims in any order, several on one dim of the tensor, with empty shards."""
    mesh_shape = tuple(size for size, _ in axes)

    def cut(mesh: DeviceMesh, whole: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(whole, mesh, [placement for _, placement in axes], src_data_rank=None)

    check_layout(shape, mesh_shape, tuple(f"axis{n}" for n in range(len(axes))), cut)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 40),
    sizes=st.permutations(range(3)).flatmap(lambda order: st.tuples(st.just(order), *[st.integers(1, 4)] * 3)),
)
def test_any_order_of_mesh_dims_on_one_dim(rows: int, sizes: tuple[list[int], int, int, int]) -> None:
    """Three mesh dims that cut one dim of a tensor in any order, which ``_StridedShard`` encodes in its factors."""
    order, *mesh_shape = sizes
    placements: list[Placement] = []
    for mesh_dim in range(3):
        before = order[: order.index(mesh_dim)]
        factor = math.prod(mesh_shape[other] for other in before if other > mesh_dim)
        placements.append(_StridedShard(0, split_factor=factor) if factor > 1 else Shard(0))
    for coordinate in itertools.product(*map(range, mesh_shape)):
        expected = torch.arange(rows)
        for mesh_dim in order:
            chunks = expected.chunk(mesh_shape[mesh_dim])
            # Fewer chunks than asked for means that the last ranks have none.
            index = coordinate[mesh_dim]
            expected = chunks[index] if index < len(chunks) else expected[:0]
        pieces = shard_pieces((rows,), mesh_shape, coordinate, placements)
        assert [row for p in pieces for row in range(p.box.offsets[0], p.box.stops[0])] == expected.tolist()


def test_strided_placement_that_is_no_order_of_mesh_dims() -> None:
    """As ``view`` makes them: split into ``split_factor`` parts, of each of which a rank has its chunk."""
    pieces = shard_pieces((12,), (2,), (1,), [_StridedShard(0, split_factor=3)])
    assert [(p.box.offsets, p.box.sizes, p.local.offsets) for p in pieces] == [
        ((2,), (2,), (0,)),
        ((6,), (2,), (2,)),
        ((10,), (2,), (4,)),
    ]


def test_rank_outside_of_the_mesh_holds_nothing() -> None:
    with fake_rank(3, 4):
        mesh = DeviceMesh("cpu", [0, 1])
        leaf = tensor_leaf("w", DTensor.from_local(torch.empty(0), mesh, [Shard(0)], shape=(4,), stride=(1,)))
    assert leaf.pieces == ()


def test_pending_sum_is_refused() -> None:
    with fake_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        summed = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        with pytest.raises(SaveError, match=r"^w is a DTensor with a pending sum.*redistribute it first") as caught:
            tensor_leaf("w", summed)
    assert caught.value.key == "w"


def test_local_tensor_of_another_size_is_refused() -> None:
    with fake_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        wrong = DTensor.from_local(torch.ones(3), mesh, [Shard(0)], shape=(10,), stride=(1,), run_check=False)
        with pytest.raises(SaveError, match=r"w: placements .* give rank coordinate .* 5 elements, but .* has 3"):
            tensor_leaf("w", wrong)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), "torch.sparse_coo tensor; store its parts"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.empty(2, device="meta"), "meta tensor without data"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "resolve_conj"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "resolve_neg"),
    ],
)
def test_tensors_that_are_no_plain_memory_are_refused(make: Callable[[], torch.Tensor], what: str) -> None:
    with pytest.raises(SaveError, match=what):
        tensor_leaf("w", make())


def test_leaf_shares_memory_and_is_detached() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    leaf: TensorLeaf = tensor_leaf("w", tensor)
    leaf.local.fill_(1)
    assert tensor.tolist() == [1, 1, 1]
    assert not leaf.local.requires_grad
