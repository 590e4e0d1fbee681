"""Work in threads: all of it, in order, or its first error; with fewer threads where there are no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from unittest import mock

import pytest

from milepost.collective.threads import map_in_threads


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_results_come_in_the_order_of_the_items(num_threads: int) -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert map_in_threads(slow_at_first, range(20), num_threads, name="test") == [n * n for n in range(20)]
    assert map_in_threads(slow_at_first, [], num_threads, name="test") == []


def test_items_are_done_side_by_side_by_the_calling_thread_too() -> None:
    meeting = threading.Barrier(3, timeout=30)
    threads = map_in_threads(lambda _: (meeting.wait(), threading.current_thread())[1], range(3), 3, name="test")
    assert len(set(threads)) == 3
    assert threading.current_thread() in threads


def test_after_an_error_no_more_is_begun_and_it_is_raised() -> None:
    done = []

    def work(item: int) -> None:
        if item == 3:
            raise ZeroDivisionError
        time.sleep(0.001)
        done.append(item)

    with pytest.raises(ZeroDivisionError):
        map_in_threads(work, range(1000), 2, name="test")
    assert len(done) < 10


def test_items_are_made_as_threads_become_free_and_an_error_of_theirs_is_raised() -> None:
    done: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10):
            assert len(done) >= item - 2, "no item is made long before its turn"
            yield item
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        map_in_threads(done.append, items(), 2, name="test")
    assert sorted(done) == list(range(10))


def test_where_no_thread_can_be_started_the_calling_one_does_it_all() -> None:
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        assert map_in_threads(str, range(5), 4, name="test") == ["0", "1", "2", "3", "4"]
