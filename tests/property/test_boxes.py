"""Properties of boxes against brute force on small tensors."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from milepost.format.box import Box, boxes_of_run, contiguous_runs, cover_faults

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def boxes_inside(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return Box(offsets, tuple(draw(st.integers(0, size - o)) for size, o in zip(shape, offsets, strict=True)))


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and boxes that cover it once, made by cutting again and again, in any order."""
    shape = draw(shapes)
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        if not shape:
            return shape, [box]
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.sizes[dim]))
        low, high = list(box.sizes), list(box.sizes)
        low[dim], high[dim] = cut, box.sizes[dim] - cut
        offsets = list(box.offsets)
        offsets[dim] += cut
        boxes += [Box(box.offsets, tuple(low)), Box(tuple(offsets), tuple(high))]
    return shape, draw(st.permutations(boxes))


def counts(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    """Return the number of times that each element is covered."""
    total = np.zeros(shape, dtype=int)
    for box in boxes:
        total[tuple(slice(o, stop) for o, stop in zip(box.offsets, box.stops, strict=True))] += 1
    return total


@given(tilings())
def test_every_tiling_is_accepted(tiling: tuple[tuple[int, ...], list[Box]]):
    shape, boxes = tiling
    assert cover_faults(shape, boxes) == []


@given(st.data(), shapes)
def test_a_cover_is_faulty_exactly_if_some_element_is_not_covered_once(data: st.DataObject, shape: tuple[int, ...]):
    boxes = data.draw(st.lists(boxes_inside(shape), max_size=5))
    assert (cover_faults(shape, boxes) == []) == bool((counts(shape, boxes) == 1).all())


@given(st.data(), tilings())
def test_a_tiling_that_lost_gained_or_moved_a_box_is_refused(data: st.DataObject, tiling: tuple):
    shape, boxes = tiling
    number = data.draw(st.integers(0, len(boxes) - 1))
    changed = boxes[:number] + boxes[number + 1 :] + data.draw(st.lists(boxes_inside(shape), max_size=1))
    assert (cover_faults(shape, changed) == []) == bool((counts(shape, changed) == 1).all())


@given(st.data(), shapes)
def test_runs_are_the_elements_of_the_box_in_order_and_as_long_as_can_be(data: st.DataObject, shape: tuple[int, ...]):
    box = data.draw(boxes_inside(shape))
    runs = list(contiguous_runs(box, shape))
    region = tuple(slice(o, stop) for o, stop in zip(box.offsets, box.stops, strict=True))
    wanted = np.arange(int(np.prod(shape))).reshape(shape)[region].reshape(-1).tolist()
    assert [element for start, stop in runs for element in range(start, stop)] == wanted
    assert len(runs) <= max(1, box.numel // max(box.sizes[-1:], default=1)) if box.numel else not runs


@given(st.data(), shapes)
def test_a_run_is_made_up_of_few_boxes_in_order(data: st.DataObject, shape: tuple[int, ...]):
    numel = int(np.prod(shape))
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    boxes = list(boxes_of_run(start, stop, shape))
    assert len(boxes) <= max(1, 2 * len(shape))
    runs = [run for box in boxes for run in contiguous_runs(box, shape)]
    assert len(runs) == len(boxes)
    assert [element for run in runs for element in range(*run)] == list(range(start, stop))


@given(st.data(), shapes)
def test_an_intersection_holds_just_the_common_elements(data: st.DataObject, shape: tuple[int, ...]):
    one, other = data.draw(boxes_inside(shape)), data.draw(boxes_inside(shape))
    common = one.intersect(other)
    overlap = counts(shape, [one, other]) == 2
    if common is None:
        assert not overlap.any()
    else:
        assert (counts(shape, [common]).astype(bool) == overlap).all()
        inner = common.relative_to(one)
        assert inner.inside(one.sizes)
