"""Keys that no rank wants are found from bits; ranks that have read other keys bring theirs."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from milepost.collective.comm import default_comm
from milepost.loading.unwanted import unwanted_everywhere
from milepost.testing.world import run_world

STORED = [f"layers.{number}.weight" for number in range(20)] + ["naïve", "step"]


def ask(cases: list[list[tuple[list[str], set[str], bool, int]]]) -> list[tuple[list[str], bool]]:
    comm = default_comm()
    found = []
    for case in cases:
        stored, unwanted, fits, node = case[dist.get_rank()]
        known = case[0][0] if node == 0 else ()
        found.append(unwanted_everywhere(comm, unwanted, stored=stored, known=known, fits_something=fits, node=node))
    return found


def test_only_what_every_rank_of_some_node_finds_unwanted_is_named(tmp_path: Path) -> None:
    one, two, both = STORED[0], STORED[1], {STORED[0], STORED[1]}
    renamed = [f"module.{key}" for key in STORED]
    cases = [
        [(STORED, {one}, True, 0), (STORED, both, True, 0), (STORED, {two, one}, True, 0)],
        [(STORED, {one}, True, 0), (STORED, {two}, False, 0), (STORED, set(), False, 0)],
        [(STORED, set(STORED), False, 0)] * 3,
        [([], set(), False, 0)] * 3,
        [(STORED, {one}, True, 0), (STORED, {two}, True, 1), (STORED, {two, "naïve"}, True, 1)],
        [(STORED, {one, two}, True, 0), (STORED[:5], {one, two}, True, 0), (STORED, {two}, True, 0)],
        [
            (STORED, {one, "packed.a"}, True, 0),
            (STORED, {"packed.a", "packed.b"}, True, 0),
            (STORED, {"packed.a"}, True, 0),
        ],
        [(STORED, {one}, True, 0), (renamed, {renamed[3]}, True, 1), (renamed, {renamed[3]}, True, 1)],
    ]
    expected = [
        ([one], True),
        ([], True),
        (sorted(STORED), False),
        ([], False),
        ([one, two], True),
        ([two], True),
        (["packed.a"], True),
        (sorted([one, renamed[3]]), True),
    ]
    for found in run_world(ask, 3, cases, timeout_s=60):
        assert found == expected
