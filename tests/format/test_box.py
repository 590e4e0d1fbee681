"""Boxes: regions, runs and the proof of exact cover."""

from __future__ import annotations

import time

import numpy as np
import pytest

from milepost.format.box import Box, contiguous_runs, cover_faults, first_gap, span


def test_a_box_knows_its_corners_and_its_number_of_elements():
    box = Box((2, 0), (3, 4))
    assert box.stops == (5, 4)
    assert box.numel == 12
    assert str(box) == "[2:5, 0:4]"
    assert Box.whole((5, 4)) == Box((0, 0), (5, 4))


def test_a_0_d_box_holds_one_element_and_an_empty_one_none():
    assert Box((), ()).numel == 1
    assert str(Box((), ())) == "[]"
    assert Box((0, 0), (0, 7)).numel == 0


def test_the_intersection_is_in_global_coordinates_and_never_empty():
    assert Box((0, 0), (4, 4)).intersect(Box((2, 3), (4, 4))) == Box((2, 3), (2, 1))
    assert Box((0,), (4,)).intersect(Box((4,), (4,))) is None
    assert Box((), ()).intersect(Box((), ())) == Box((), ())


def test_relative_to_moves_a_box_into_the_coordinates_of_another():
    assert Box((5, 2), (1, 1)).relative_to(Box((4, 2), (3, 3))) == Box((1, 0), (1, 1))


@pytest.mark.parametrize("box", [Box((3,), (2,)), Box((-1,), (1,)), Box((0,), (-1,)), Box((0, 0), (1, 1))])
def test_a_box_that_leaves_the_shape_is_not_inside(box: Box):
    assert not box.inside((4,))
    assert cover_faults((4,), [Box((0,), (4,)), box])


def test_an_index_selects_a_view_of_an_array_of_0_dims_too():
    array = np.arange(20).reshape(4, 5)
    assert array[Box((1, 2), (2, 3)).index()].tolist() == [[7, 8, 9], [12, 13, 14]]
    scalar = np.zeros(())
    scalar[Box((), ()).index()] = 3
    assert scalar == 3


def test_shifted_is_the_inverse_of_relative_to():
    inner, outer = Box((5, 2), (1, 1)), Box((4, 2), (3, 3))
    assert inner.relative_to(outer).shifted(outer.offsets) == inner


def test_runs_of_a_slice_along_the_first_dim_are_one():
    assert list(contiguous_runs(Box((1, 0), (2, 5)), (4, 5))) == [(5, 15)]


def test_runs_of_columns_are_one_per_row():
    assert list(contiguous_runs(Box((0, 1), (3, 2)), (3, 5))) == [(1, 3), (6, 8), (11, 13)]


@pytest.mark.parametrize(
    ("box", "shape"),
    [
        (Box((), ()), ()),
        (Box((3,), (4,)), (9,)),
        (Box((0, 1), (3, 2)), (3, 5)),
        (Box((1, 0), (2, 5)), (4, 5)),
        (Box((1, 2, 0), (2, 1, 3)), (4, 3, 5)),
    ],
)
def test_the_span_of_a_box_is_from_its_first_run_to_its_last(box: Box, shape: tuple[int, ...]):
    runs = list(contiguous_runs(box, shape))
    assert span(box, shape) == (runs[0][0], runs[-1][1])


def test_a_0_d_tensor_is_one_run_and_an_empty_one_none():
    assert list(contiguous_runs(Box((), ()), ())) == [(0, 1)]
    assert list(contiguous_runs(Box((0, 0), (0, 5)), (0, 5))) == []


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((), [Box((), ())]),
        ((0, 3), []),
        ((0, 3), [Box((0, 0), (0, 3)), Box((0, 0), (0, 3))]),
        ((7,), [Box((0,), (3,)), Box((3,), (3,)), Box((6,), (1,)), Box((7,), (0,))]),
        ((4, 4), [Box((0, 0), (2, 4)), Box((2, 0), (2, 1)), Box((2, 1), (2, 3))]),
        # A pinwheel: no cut goes through all of it, so it is no grid and no tree of cuts.
        (
            (3, 3),
            [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1)), Box((1, 1), (1, 1))],
        ),
    ],
)
def test_an_exact_cover_has_no_faults(shape: tuple[int, ...], boxes: list[Box]):
    assert cover_faults(shape, boxes) == []


def test_a_gap_is_named():
    assert cover_faults((4, 2), [Box((0, 0), (1, 2)), Box((3, 0), (1, 2))]) == [
        "4 of 8 elements are in no shard (the first gap is [1:3, 0:2])"
    ]
    assert cover_faults((4,), []) == ["no shard holds any of its elements"]


def test_an_overlap_is_named():
    assert cover_faults((4, 4), [Box((0, 0), (3, 4)), Box((2, 0), (2, 4))]) == [
        "region [2:3, 0:4] is stored more than once"
    ]
    assert cover_faults((), [Box((), ()), Box((), ())]) == ["it is stored 2 times"]


def test_a_gap_that_an_overlap_makes_up_for_in_volume_is_found():
    boxes = [Box((0, 0), (2, 2)), Box((0, 0), (2, 2))]
    assert cover_faults((4, 2), boxes) == ["region [0:2, 0:2] is stored more than once"]


def test_the_first_gap_is_none_when_all_is_covered():
    assert first_gap((4,), [Box((0,), (4,))]) is None
    assert first_gap((4,), [Box((0,), (1,))]) == Box((1,), (3,))


def test_a_cover_by_very_many_boxes_is_proven_quickly_whatever_their_arrangement():
    """Two triangles of columns: a sweep along any dim would look at all pairs, 2e8 of them."""
    n = 10_000
    low = [Box((0, i), (i + 1, 1)) for i in range(n)]
    high = [Box((i + 1, i), (n - i, 1)) for i in range(n)]
    started = time.process_time()
    assert cover_faults((n + 1, n), low + high) == []
    assert cover_faults((n + 1, n), low + high[1:])
    assert time.process_time() - started < 10


def test_cuts_along_hopelessly_many_dims_are_refused_rather_than_checked_forever():
    shape = (2,) * 40
    boxes = [Box((0,) * 40, (1,) * 40), Box((1,) * 40, (1,) * 40)]
    assert "too many to check" in cover_faults(shape, boxes)[0]
