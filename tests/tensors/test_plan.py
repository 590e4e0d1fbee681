"""Plans of writes and reads, and the faults reported if the ranks' shards don't fit together."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.errors import PlanError
from milepost.format.box import Box, cover_faults
from milepost.format.manifest import FileEntry, Manifest, ShardEntry, TensorEntry
from milepost.tensors.plan import (
    LARGE_ALIGNMENT,
    LARGE_RECORD_NBYTES,
    SMALL_ALIGNMENT,
    LocalLayout,
    TensorSpec,
    WritePlan,
    lay_out_file,
    plan_save,
)
from milepost.tensors.read_plan import plan_load


def rows(start: int, stop: int, width: int = 4) -> Box:
    return Box((start, 0), (stop - start, width))


def spec(key: str, shape: tuple[int, ...], *boxes: Box, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(key, dtype, shape, boxes)


def ranks(*specs: Sequence[TensorSpec]) -> list[LocalLayout]:
    return [LocalLayout(tuple(mine), ()) for mine in specs]


def written(plans: Sequence[WritePlan]) -> list[tuple[str, Box]]:
    return sorted((item.key, item.box) for plan in plans for item in plan.items)


def test_shards_are_written_by_their_holders() -> None:
    plans = plan_save(ranks([spec("w", (8, 4), rows(0, 5))], [spec("w", (8, 4), rows(5, 8))]))
    assert [[item.box for item in plan.items] for plan in plans] == [[rows(0, 5)], [rows(5, 8)]]
    assert [plan.file for plan in plans] == ["__0_0.distcp", "__1_0.distcp"]


def test_replicas_are_written_once_and_balanced_by_bytes() -> None:
    """Tensors of very different sizes, held by all: no rank writes more than its share and the largest tensor."""
    sizes = [1 << n for n in range(14)] * 2
    mine = [spec(f"w{n}", (size,), Box.whole((size,))) for n, size in enumerate(sizes)]
    plans = plan_save(ranks(*[mine] * 4))
    assert written(plans) == sorted((s.key, s.boxes[0]) for s in mine)
    loads = [sum(item.data_nbytes for item in plan.items) for plan in plans]
    assert max(loads) - min(loads) <= 4 * 4, loads


def test_ranks_with_much_of_their_own_are_spared() -> None:
    """Tensors that only one rank holds count towards its share when replicated tensors are dealt out."""
    shared = [spec(f"s{n}", (10,), Box.whole((10,))) for n in range(6)]
    plans = plan_save(ranks([spec("own", (1000,), Box.whole((1000,))), *shared], shared))
    assert [item.key for item in plans[0].items] == ["own"]
    assert len(plans[1].items) == 6


def test_hybrid_sharding_writes_each_box_once() -> None:
    """Two groups of two ranks: the same boxes twice."""
    first, second = rows(0, 4), rows(4, 8)
    layouts = ranks(*[[spec(f"w{n}", (8, 4), box) for n in range(4)] for box in (first, second, first, second)])
    plans = plan_save(layouts)
    assert written(plans) == sorted((f"w{n}", box) for n in range(4) for box in (first, second))
    assert [len(plan.items) for plan in plans] == [2, 2, 2, 2]


def test_same_input_same_plan() -> None:
    layouts = ranks(*[[spec(f"w{n}", (n + 1,), Box.whole((n + 1,))) for n in range(20)]] * 3)
    assert plan_save(layouts) == plan_save(layouts)


def test_empty_tensors_are_kept_and_empty_shards_are_not() -> None:
    empty, nothing = Box.whole((0, 3)), Box((2, 0), (0, 4))
    plans = plan_save(
        ranks(
            [spec("e", (0, 3), empty), spec("w", (2, 4), rows(0, 2))],
            [spec("e", (0, 3), empty), spec("w", (2, 4), nothing)],
        )
    )
    assert written(plans) == [("e", empty), ("w", rows(0, 2))]


def test_objects_are_written_by_the_lowest_rank_that_has_them() -> None:
    plans = plan_save([LocalLayout((), ("a", "b")), LocalLayout((), ("b", "c"))])
    assert [plan.objects for plan in plans] == [("a", "b"), ("c",)]
    assert not any(plan.is_empty for plan in plans)


def test_rank_without_anything_has_an_empty_plan() -> None:
    plans = plan_save([LocalLayout((), ("a",)), LocalLayout((), ("a",))])
    assert [plan.is_empty for plan in plans] == [False, True]


# ---- refusals ----


def faults_of(*specs: Sequence[TensorSpec]) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan_save(ranks(*specs))
    return caught.value


def test_gap_names_key_and_region() -> None:
    error = faults_of([spec("w", (8, 4), rows(0, 3))], [spec("w", (8, 4), rows(5, 8))])
    assert error.key == "w"
    assert "w: 8 of 32 elements are in no shard (the first gap is [3:5, 0:4])" in error.message
    assert "nothing was saved" in error.message


def test_overlap_names_key_and_region() -> None:
    error = faults_of([spec("w", (8, 4), rows(0, 5))], [spec("w", (8, 4), rows(4, 8))])
    assert (error.key, "w: region [4:5, 0:4] is stored more than once" in error.message) == ("w", True)


def test_box_outside_of_its_tensor() -> None:
    assert "w: box [4:9, 0:4] is not inside shape [8, 4]" in faults_of([spec("w", (8, 4), rows(4, 9))]).message


def test_conflicting_dtypes_and_shapes_name_the_ranks() -> None:
    whole = Box.whole((2, 4))
    error = faults_of(
        [spec("a", (2, 4), whole), spec("b", (2, 4), whole)],
        [spec("a", (2, 4), whole, dtype="bfloat16"), spec("b", (3, 4), Box.whole((3, 4)))],
    )
    assert "a: float32 [2, 4] on rank 0, but bfloat16 [2, 4] on rank 1" in error.message
    assert "b: float32 [2, 4] on rank 0, but float32 [3, 4] on rank 1" in error.message


def test_many_faults_are_reported_at_once_but_not_all() -> None:
    error = faults_of([spec(f"w{n:02}", (8, 4), rows(0, 3)) for n in range(25)])
    assert len(re.findall(r"w\d\d: ", error.message)) == 20
    assert "... and 5 more" in error.message


def test_tensor_on_one_rank_and_value_on_another() -> None:
    with pytest.raises(PlanError, match="w is a tensor on one rank and another kind of value on another"):
        plan_save([LocalLayout((spec("w", (2,), Box.whole((2,))),), ()), LocalLayout((), ("w",))])


# ---- fingerprints ----


def test_fingerprint_tells_layouts_apart() -> None:
    base = LocalLayout((spec("w", (8, 4), rows(0, 5)),), ("a",))
    paths: dict[str, tuple[str | int, ...]] = {"w": ("w",), "a": ("a",)}
    others = [
        (LocalLayout((spec("v", (8, 4), rows(0, 5)),), ("a",)), paths),
        (LocalLayout((spec("w", (8, 4), rows(0, 6)),), ("a",)), paths),
        (LocalLayout((spec("w", (9, 4), rows(0, 5)),), ("a",)), paths),
        (LocalLayout((spec("w", (8, 4), rows(0, 5), dtype="float16"),), ("a",)), paths),
        (LocalLayout((spec("w", (8, 4), rows(0, 5)),), ("b",)), paths),
        (LocalLayout((), ("a",)), paths),
        (base, {"w": ("w", 0), "a": ("a",)}),
        (base, {"w": ("w", "0"), "a": ("a",)}),
    ]
    prints = {layout.fingerprint(places) for layout, places in [(base, paths), *others]}
    assert len(prints) == 1 + len(others)
    assert base.fingerprint(paths) == LocalLayout(base.tensors, base.objects).fingerprint(dict(paths))


# ---- the file ----


def test_records_do_not_overlap_and_are_aligned() -> None:
    specs = [spec(f"w{n}", (size,), Box.whole((size,))) for n, size in enumerate((0, 1, 3, 100_000, 7, 1 << 20, 16384))]
    plan = lay_out_file(3, [(one, one.boxes[0]) for one in specs], ["o"])
    end = 0
    for item in plan.items:
        large = item.data_nbytes >= LARGE_RECORD_NBYTES
        assert item.record_offset >= end
        assert item.record_offset % (LARGE_ALIGNMENT if large else SMALL_ALIGNMENT) == 0
        assert item.data_offset % SMALL_ALIGNMENT == 0
        assert item.record_offset < item.data_offset
        assert item.data_offset + item.data_nbytes < item.record_offset + item.record_nbytes
        end = item.record_offset + item.record_nbytes
    assert plan.objects_offset >= end
    assert plan.objects_offset % LARGE_ALIGNMENT == 0
    assert (plan.file, plan.objects) == ("__3_0.distcp", ("o",))


# ---- any grid of shards, held by any ranks ----


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], list[list[int]]]:
    """A shape, boxes that tile it, and for each the ranks that hold it."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    cuts = []
    for size in shape:
        inner = draw(st.sets(st.integers(1, size), max_size=2)) - {size}
        cuts.append(list(itertools.pairwise([0, *sorted(inner), size])))
    boxes = [
        Box(tuple(low for low, _ in cell), tuple(high - low for low, high in cell)) for cell in itertools.product(*cuts)
    ]
    holders = [draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)) for _ in boxes]
    return shape, boxes, holders


@settings(max_examples=150, deadline=None)
@given(grid=grids())
def test_every_element_is_written_once_by_one_that_holds_it(
    grid: tuple[tuple[int, ...], list[Box], list[list[int]]],
) -> None:
    shape, boxes, holders = grid
    layouts = [
        LocalLayout((spec("w", shape, *[b for b, held in zip(boxes, holders, strict=True) if rank in held]),), ())
        for rank in range(4)
    ]
    plans = plan_save(layouts)
    assert cover_faults(shape, [box for _, box in written(plans)]) == []
    for plan in plans:
        for item in plan.items:
            assert plan.rank in holders[boxes.index(item.box)]


@settings(max_examples=150, deadline=None)
@given(grid=grids(), lost=st.integers(0, 100))
def test_a_lost_or_doubled_box_is_always_found(
    grid: tuple[tuple[int, ...], list[Box], list[list[int]]], lost: int
) -> None:
    shape, boxes, _ = grid
    victim = boxes[lost % len(boxes)]
    with pytest.raises(PlanError) as caught:
        plan_save(ranks([spec("w", shape, *[box for box in boxes if box != victim])], []))
    assert str(victim) in caught.value.message or len(boxes) == 1
    corner = Box(victim.offsets, (1,) * len(shape))
    if corner != victim:
        with pytest.raises(PlanError, match=re.escape(f"w: region {corner} is stored more than once")):
            plan_save(ranks([spec("w", shape, *boxes)], [spec("w", shape, corner)]))


# ---- reading ----


def stored(shape: tuple[int, ...], boxes: Sequence[Box]) -> Manifest:
    """A manifest of one tensor in such boxes; places in the file do not matter here."""
    shards = tuple(
        ShardEntry(box, "__0_0.distcp", 1000 * n, 900, 1000 * n + 500, 4 * box.numel, 0) for n, box in enumerate(boxes)
    )
    return Manifest(
        step=None,
        save_id="0",
        created_s=0.0,
        kind="state",
        world_size=1,
        layout={},
        producer={},
        tensors={"w": TensorEntry("float32", shape, shards)},
        objects={},
        files={"__0_0.distcp": FileEntry(1 << 20)},
    )


@settings(max_examples=150, deadline=None)
@given(grid=grids(), wanted=grids())
def test_every_wanted_element_is_read_once_from_where_it_is(
    grid: tuple[tuple[int, ...], list[Box], list[list[int]]],
    wanted: tuple[tuple[int, ...], list[Box], list[list[int]]],
) -> None:
    shape, boxes, _ = grid
    pieces = [box for box in wanted[1] if len(box.sizes) == len(shape) and box.inside(shape)]
    items = plan_load(stored(shape, boxes), [spec("w", shape, *pieces)])
    for number, piece in enumerate(pieces):
        mine = [item for item in items if item.piece == number]
        assert cover_faults(piece.sizes, [item.dst for item in mine]) == []
        for item in mine:
            # The same element, counted from the stored box and from the wanted one.
            from_store = tuple(a + b for a, b in zip(item.shard.box.offsets, item.src.offsets, strict=True))
            from_wish = tuple(a + b for a, b in zip(piece.offsets, item.dst.offsets, strict=True))
            assert from_store == from_wish
            assert item.src.sizes == item.dst.sizes
            assert item.src.inside(item.shard.box.sizes)
    assert sum(item.src.numel for item in items) == sum(math.prod(piece.sizes) for piece in pieces)


def test_wanted_region_that_is_not_stored() -> None:
    with pytest.raises(PlanError, match=r"^w: the checkpoint stores 8 of the 12 elements of \[0:3, 0:4\]") as caught:
        plan_load(stored((8, 4), [rows(1, 8)]), [spec("w", (8, 4), rows(0, 3))])
    assert caught.value.key == "w"


def test_reads_are_in_the_order_of_the_file() -> None:
    boxes = [rows(n, n + 1) for n in range(8)]
    items = plan_load(stored((8, 4), boxes), [spec("w", (8, 4), rows(4, 8), rows(0, 4))])
    offsets = [item.shard.record_offset for item in items]
    assert offsets == sorted(offsets)
