"""Five kills of a training run's processes, at moments that follow from a seed. ``make soak`` does fifty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from soak import DELAYS_S, MODES, schedule, soak

SEED = 3614
"""Its five kills are of each kind of process, in each mode, with two starts of the launcher between them."""


@pytest.mark.timeout(600)
def test_a_run_whose_processes_are_killed_ends_as_one_that_nobody_touched(
    memory_path: Path, tally: Callable[..., None]
) -> None:
    kills = schedule(SEED, 5)
    assert {kill.victim.split()[0] for kill in kills} == {"rank", "writer", "launcher", "everything"}
    assert {kill.mode for kill in kills} == set(MODES)
    report = soak(memory_path, kills, show=print)
    assert report.num_launchers == 3
    tally("SIGKILL of a process of a training run on 2 ranks, which is started again", tried=5, lost=0, seed=SEED)


def test_the_kills_follow_from_the_seed_and_come_at_every_moment_in_every_mode() -> None:
    kills = schedule(7, 50)
    assert kills == schedule(7, 50) != schedule(8, 50)
    assert {kill.moment for kill in kills} == set(DELAYS_S)
    assert {kill.mode for kill in kills} == set(MODES)
    assert {kill.victim for kill in kills} >= {"rank 0", "rank 1", "writer 0", "writer 1", "launcher", "everything"}
    assert all(kill.mode == "async_with_pinned_mem" for kill in kills if kill.victim.startswith("writer"))
