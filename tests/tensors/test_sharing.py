"""Plans that ranks make alone: no exchange of boxes, and yet each box is written once, by a rank that holds it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from milepost.errors import PlanError
from milepost.format.box import Box, cover_faults
from milepost.saving.structure import Nesting, Roster, structure_of
from milepost.tensors.layout import axis_cuts, shard_pieces
from milepost.tensors.plan import LocalLayout, Mesh, Spread, TensorSpec, WritePlan, deal, plan_save
from milepost.tensors.sharing import FromRank0, Group, Sharing, groups_in_common, only, plan_alone


def spread_spec(key: str, shape: tuple[int, ...], mesh: Mesh, placements: Sequence[Placement], rank: int) -> TensorSpec:
    """Return the spec of a rank's part of a DTensor."""
    boxes: tuple[Box, ...] = ()
    if rank in mesh.ranks:
        coordinate = list(itertools.product(*map(range, mesh.shape)))[mesh.ranks.index(rank)]
        boxes = tuple(piece.box for piece in shard_pieces(shape, mesh.shape, coordinate, placements))
    return TensorSpec(key, "float32", shape, boxes, Spread(mesh, axis_cuts(placements)))


def plain_spec(key: str, shape: tuple[int, ...], *boxes: Box) -> TensorSpec:
    return TensorSpec(key, "float32", shape, boxes or (Box.whole(shape),))


def sorted_out(layouts: Sequence[LocalLayout]) -> tuple[Sharing, list[frozenset[str]]]:
    """Return rank 0's result from the descriptions that it asks for, and the keys that each rank described alone."""
    roster = Roster()
    structures = [
        structure_of(layout, Nesting({key: tuple(key.split(".")) for key in keys_of(layout)}, (), {"": b""}), rank)
        for rank, layout in enumerate(layouts)
    ]
    digests = [(one.shared.digest(), one.own.digest()) for one in structures]
    roster.learn(digests, [structures[rank] for rank in roster.ask(digests)])
    return roster.sort_out(), [frozenset(one.own.nesting.paths) for one in structures]


def keys_of(layout: LocalLayout) -> list[str]:
    return [*(spec.key for spec in layout.tensors), *layout.objects]


def plan_together(
    layouts: Sequence[LocalLayout], nodes: Sequence[Sequence[int]] | None = None
) -> tuple[list[WritePlan], list[tuple[Group, ...]], Sharing]:
    """Return the plans and the groups of all ranks, each made only from data that the rank receives."""
    sharing, own = sorted_out(layouts)
    placed = [only(layout, sharing.placed) for layout in layouts]
    dealt, groups = deal(placed, nodes), groups_in_common(placed)
    made = [
        plan_alone(
            *(rank, layout, sharing),
            own=own[rank],
            given=FromRank0(dealt[rank], tuple(group for group in groups if rank in group.ranks)),
            node=next(ranks for ranks in nodes if rank in ranks) if nodes is not None else None,
        )
        for rank, layout in enumerate(layouts)
    ]
    return [plan for plan, _ in made], [found for _, found in made], sharing


def written(plans: Sequence[WritePlan]) -> list[tuple[str, Box]]:
    files = (file for plan in plans for file, _ in plan.images)
    return sorted((item.key, item.box) for file in files for item in file.items)


# ---- random worlds ----


@st.composite
def meshes(draw: st.DrawFn, world_size: int) -> Mesh:
    """Any ranks of the world, in any order, in up to three axes."""
    num_ranks = draw(st.integers(1, world_size))
    first = draw(st.sampled_from([n for n in range(1, num_ranks + 1) if num_ranks % n == 0]))
    shape = draw(st.sampled_from([(num_ranks,), (first, num_ranks // first), (1, first, num_ranks // first)]))
    return Mesh.of(shape, draw(st.permutations(range(world_size)))[:num_ranks])


@st.composite
def placements_on(draw: st.DrawFn, mesh: Mesh, ndim: int) -> tuple[Placement, ...]:
    if ndim == 0:
        return (Replicate(),) * len(mesh.shape)
    found: list[Placement] = []
    for axis in range(len(mesh.shape)):
        dim = draw(st.integers(-1, ndim - 1))
        rest = math.prod(mesh.shape[axis + 1 :])
        strided = dim >= 0 and rest > 1 and draw(st.booleans())
        factor = draw(st.sampled_from([rest, 2])) if strided else 1
        found.append(Replicate() if dim < 0 else _StridedShard(dim, split_factor=factor) if strided else Shard(dim))
    return tuple(found)


Tensor = tuple[Mesh | None, tuple[Placement, ...], tuple[int, ...], frozenset[int]]
"""On a mesh, or as a whole on some ranks, or (empty placements, on a mesh) cut by the ranks themselves."""


@st.composite
def worlds(draw: st.DrawFn) -> list[LocalLayout]:
    """The layouts of up to six ranks: every mix of tensors on meshes, plain ones, cut ones, and values."""
    world_size = draw(st.integers(1, 6))
    everyone = frozenset(range(world_size))
    tensors: dict[str, dict[int, TensorSpec]] = {}
    marks: dict[str, str] = {}
    for number in range(draw(st.integers(1, 5))):
        key, shape = f"w{number}", tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        mesh = draw(meshes(world_size))
        kind = draw(st.sampled_from(["on a mesh", "on a mesh", "on two meshes", "plain", "cut", "own"]))
        some = draw(st.sets(st.integers(0, world_size - 1), min_size=1)) if draw(st.booleans()) else everyone
        if kind == "on a mesh":  # and known to others, or to all
            tensors[key] = {
                rank: spread_spec(key, shape, mesh, placements, rank)
                for placements in [draw(placements_on(mesh, len(shape)))]
                for rank in some.union(mesh.ranks)
            }
        elif kind == "on two meshes":  # replicas of each other
            placements = draw(placements_on(mesh, len(shape)))
            free = [rank for rank in range(world_size) if rank not in mesh.ranks]
            both = [mesh, *([Mesh.of(mesh.shape, free[: len(mesh.ranks)])] if len(free) >= len(mesh.ranks) else [])]
            tensors[key] = {rank: spread_spec(key, shape, one, placements, rank) for one in both for rank in one.ranks}
        elif kind == "plain":
            tensors[key] = {rank: plain_spec(key, shape) for rank in some}
        elif kind == "own":
            tensors |= {f"own.rank{rank}.{key}": {rank: plain_spec(f"own.rank{rank}.{key}", shape)} for rank in some}
        else:
            cut = Mesh.of((len(some),), sorted(some))
            for rank in some:
                held = spread_spec(key, shape, cut, (Shard(0) if shape else Replicate(),), rank)
                tensors.setdefault(key, {})[rank] = TensorSpec(key, held.dtype, shape, held.boxes)
        marks[key] = draw(st.sampled_from(["", "", "buffer", "frozen"]))
    values = {
        f"v{number}": draw(st.sets(st.integers(0, world_size - 1), min_size=1))
        for number in range(draw(st.integers(0, 3)))
    }
    return [
        LocalLayout(
            tuple(held[rank] for held in draw(st.permutations([*tensors.values()])) if rank in held),
            (*(key for key, some in values.items() if rank in some), f"rng.rank{rank}.torch"),
            frozenset(key for key, mark in marks.items() if mark == "buffer" and rank in tensors.get(key, ())),
            frozenset(key for key, mark in marks.items() if mark == "frozen" and rank in tensors.get(key, ())),
        )
        for rank in range(world_size)
    ]


def holders_of(layouts: Sequence[LocalLayout]) -> Mapping[tuple[str, Box], list[int]]:
    found: dict[tuple[str, Box], list[int]] = {}
    for rank, layout in enumerate(layouts):
        for spec in layout.tensors:
            for box in dict.fromkeys(spec.boxes):
                found.setdefault((spec.key, box), []).append(rank)
    return found


@settings(max_examples=120, deadline=None)
@given(layouts=worlds())
def test_ranks_that_plan_alone_write_what_a_plan_for_all_does(layouts: list[LocalLayout]) -> None:
    plans, groups, _ = plan_together(layouts)
    assert written(plans) == written(plan_save(layouts))
    assert Counter(key for plan in plans for key in plan.objects) == dict.fromkeys(
        (key for layout in layouts for key in layout.objects), 1
    )
    holders = holders_of(layouts)
    buffers = frozenset[str]().union(*(layout.buffers for layout in layouts))
    for plan in plans:
        for item in (item for file, _ in plan.images for item in file.items):
            assert plan.rank in holders[item.key, item.box]
            assert item.key not in buffers or plan.rank == holders[item.key, item.box][0]
        for key in plan.objects:
            assert plan.rank == min(rank for rank, layout in enumerate(layouts) if key in layout.objects)
    compared = {(group.ranks, key) for found in groups for group in found for key in (*group.tensors, *group.objects)}
    wanted = groups_in_common(layouts)
    assert compared == {(group.ranks, key) for group in wanted for key in (*group.tensors, *group.objects)}
    for rank, found in enumerate(groups):
        assert all(rank in group.ranks for group in found)
        assert {group.digest() for group in found} == {
            group.digest() for others in groups for group in others if rank in group.ranks
        }


@settings(max_examples=40, deadline=None)
@given(layouts=worlds(), cut=st.integers(1, 5))
def test_each_node_by_itself_writes_all_that_its_ranks_hold(layouts: list[LocalLayout], cut: int) -> None:
    everyone = range(len(layouts))
    nodes = [ranks for ranks in (everyone[:cut], everyone[cut:]) if ranks]
    plans, _, _ = plan_together(layouts, nodes)
    wanted = plan_save(layouts, nodes)
    for ranks in nodes:
        assert written([plans[rank] for rank in ranks]) == written([wanted[rank] for rank in ranks])
        objects = [key for rank in ranks for key in plans[rank].objects]
        assert sorted(objects) == sorted({key for rank in ranks for key in layouts[rank].objects})


# ---- what is exchanged, and what is not ----

FSDP = Mesh.of((4,), range(4))


def test_no_boxes_are_asked_for_of_what_lies_on_one_mesh_or_on_none() -> None:
    layouts = [
        LocalLayout(
            (
                spread_spec("w", (10, 3), FSDP, (Shard(0),), rank),
                spread_spec("b", (3,), FSDP, (Shard(0),), rank),
                plain_spec("step", ()),
            ),
            ("v", f"rng.rank{rank}.torch"),
        )
        for rank in range(4)
    ]
    plans, _, sharing = plan_together(layouts)
    assert (sharing.placed, sharing.common, sharing.kind_of) == (frozenset(), {}, (0, 0, 0, 0))
    assert sharing.num_shards >= len(written(plans))
    assert [plan.objects for plan in plans] == [("v", "rng.rank0.torch"), *((f"rng.rank{n}.torch",) for n in (1, 2, 3))]


def test_stages_of_a_pipeline_are_kinds_that_have_little_in_common() -> None:
    stages = [Mesh.of((2,), (0, 1)), Mesh.of((2,), (2, 3))]
    layouts = [
        LocalLayout((spread_spec(f"w{rank // 2}", (4,), stages[rank // 2], (Shard(0),), rank),), ("step",))
        for rank in range(4)
    ]
    _, groups, sharing = plan_together(layouts)
    assert sharing.kind_of == (0, 0, 1, 1)
    assert (sharing.common, sharing.kinds, sharing.placed) == ({"step": 0}, ((0, 1),), frozenset())
    assert groups[0] == (Group((0, 1, 2, 3), (), ("step",)),)


def test_replicas_are_balanced_by_bytes() -> None:
    sizes = [1 << n for n in range(14)] * 2
    layouts = [LocalLayout(tuple(plain_spec(f"w{n}", (size,)) for n, size in enumerate(sizes)), ())] * 4
    plans, _, _ = plan_together(layouts)
    loads = [plan.data_nbytes for plan in plans]
    assert max(loads) - min(loads) <= 4 * 4, loads


def test_what_is_held_by_a_few_goes_to_different_ones_of_them() -> None:
    """Pairs of replicas of tensors of one size: not the lower rank of each pair has to write all of them."""
    pairs = Mesh.of((8, 2), range(16))
    layouts = [LocalLayout((spread_spec("w", (8, 4), pairs, (Shard(0), Replicate()), rank),), ()) for rank in range(16)]
    plans, _, _ = plan_together(layouts)
    assert {plan.rank % 2 for plan in plans if plan.items} == {0, 1}


# ---- what is refused ----


def test_a_mesh_of_which_a_rank_brings_nothing_leaves_a_gap() -> None:
    layouts = [LocalLayout((spread_spec("w", (8,), FSDP, (Shard(0),), rank),), ()) for rank in range(3)]
    with pytest.raises(PlanError, match=r"w: 2 of 8 elements are in no shard \(the first gap is \[6:8\]\)"):
        plan_together([*layouts, LocalLayout((), ())])


def test_replicas_on_one_rank_and_shards_on_others_overlap() -> None:
    layouts = [LocalLayout((spread_spec("w", (8,), FSDP, (Shard(0),), rank),), ()) for rank in range(3)]
    with pytest.raises(PlanError, match=r"w: region .* is stored more than once"):
        plan_together([*layouts, LocalLayout((plain_spec("w", (8,)),), ())])


def test_conflicting_dtypes_and_shapes_name_the_ranks() -> None:
    mine = LocalLayout((plain_spec("a", (2, 4)), plain_spec("b", (2, 4))), ())
    other = LocalLayout((TensorSpec("a", "bfloat16", (2, 4), (Box.whole((2, 4)),)), plain_spec("b", (3, 4))), ())
    with pytest.raises(PlanError) as caught:
        plan_together([mine, mine, other, other])
    assert "a: float32 [2, 4] on rank 0, but bfloat16 [2, 4] on rank 2" in caught.value.message
    assert "b: float32 [2, 4] on rank 0, but float32 [3, 4] on rank 2" in caught.value.message


def test_tensor_on_one_rank_and_value_on_another() -> None:
    with pytest.raises(PlanError, match="w is a tensor on one rank and another kind of value on another"):
        plan_together([LocalLayout((plain_spec("w", (2,)),), ()), LocalLayout((), ("w",))])


def test_what_is_stored_covers_each_tensor() -> None:
    """The proof that the commit makes, of plans of 64 ranks: uneven and strided shards."""
    mesh = Mesh.of((8, 8), range(64))
    layouts = [
        LocalLayout(
            (
                spread_spec("strided", (100, 7), mesh, (_StridedShard(0, split_factor=8), Shard(0)), rank),
                spread_spec("uneven", (13, 100), mesh, (Shard(0), Shard(1)), rank),
                spread_spec("norm", (9,), mesh, (Shard(0), Replicate()), rank),
            ),
            (),
        )
        for rank in range(64)
    ]
    plans, _, sharing = plan_together(layouts)
    assert not sharing.placed
    for spec in layouts[0].tensors:
        assert cover_faults(spec.shape, [box for key, box in written(plans) if key == spec.key]) == []
    assert sharing.num_shards >= len(written(plans))
