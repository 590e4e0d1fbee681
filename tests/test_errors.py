"""The parts of messages: problems, bounded lists, near names."""

from __future__ import annotations

from milepost.errors import Problem, listed, near


def test_a_problem_says_where_and_what():
    assert str(Problem("missing", "__0_0.distcp")) == "__0_0.distcp: missing"
    assert str(Problem("data changed", "__0_0.distcp", "w", (8, 16))) == "__0_0.distcp bytes 8-16 (w): data changed"
    assert str(Problem("'w' has an invalid shape", key="w")) == "'w' has an invalid shape"


def test_a_list_says_how_many_it_leaves_out():
    assert listed([1, 2]) == ["1", "2"]
    assert listed([1, 2, 3], limit=2) == ["1", "2", "... and 1 more"]
    assert listed("abc", limit=3, total=1000, hint="; --json lists them")[3:] == ["... and 997 more; --json lists them"]
    assert len(listed(range(100))) == 21


def test_a_near_name_is_found_in_time_whatever_the_names_are():
    assert near("layers.0.atention.wq", ["output.weight", "layers.0.attention.wq"]) == "layers.0.attention.wq"
    assert near("norm", ["output.weight"]) is None
    assert near("a" * 10_000_000, ["b" * 10_000_000, *("c" * 250 for _ in range(3_000))]) is None
