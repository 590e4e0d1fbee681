"""A clock that jumps by hours, back and forward, at any moment: no step is lost, nothing of a live process is swept.

Wall time is recorded for people, and decides only which steps of an hour or a day are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from small_runs import (
    CASES,
    MODES,
    RUN,
    Case,
    Model,
    check_the_next_run,
    impatient,
    prepare,
    quiet,
    shown,
    train,
)
from two_ranks import Outcome, PairComm, run_pair

from milepost import CheckpointConfig, CheckpointManager, RunLockedError
from milepost.run import catalog, retention, sweep
from milepost.run.attempts import begin_attempt
from milepost.run.lock import RunLock
from milepost.run.owner import OWNER_PREFIX, this_process
from milepost.run.step_names import ATTEMPT_PREFIX
from milepost.run.takeover import Attempts
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays

Tally = Callable[..., None]
HOUR_S = 3600.0
REAL = time.time
JUMPS_S = (-9 * HOUR_S, 0.0, 9 * HOUR_S)


@contextlib.contextmanager
def jumping(seed: int) -> Iterator[None]:
    """Each look at the clock of this process finds it hours before or after the last one."""
    jumps = random.Random(seed)
    with mock.patch.object(time, "time", side_effect=lambda: REAL() + jumps.uniform(-9, 9) * HOUR_S):
        yield


@contextlib.contextmanager
def set_to(offset_s: float) -> Iterator[None]:
    with mock.patch.object(time, "time", side_effect=lambda: REAL() + offset_s):
        yield


@pytest.mark.parametrize("mode", MODES)
def test_saves_continue_and_keep_what_they_should(memory_path: Path, mode: str, tally: Tally) -> None:
    saves = 0
    for number, name in enumerate(("deleting old steps", "the same step again", "later saves")):
        case, folder = CASES[name], memory_path / str(number)
        local = prepare(folder, case)

        def act(comm: PairComm, case: Case = case, folder: Path = folder, number: int = number) -> None:
            quiet()
            with jumping(seed=10 * number + comm.rank):
                train(comm, LocalStorage(folder), case, mode)

        with impatient():
            assert run_pair(act) == [Outcome(), Outcome()]
            found = shown(local)
            assert found == case.after
            lines = [json.loads(line) for line in local.read(f"{RUN}/events.jsonl").splitlines()]
            lines = [line for line in lines if "event" not in line]  # those of resumes are of no save
            assert [line["step"] for line in lines] == [*case.before, *(save.step for save in case.saves)]
            assert all(line["stall_s"] >= 0 and line["commit_s"] >= 0 for line in lines)
            with jumping(seed=number):
                check_the_next_run(local, found)
        saves += len(case.saves)
    tally(f"saves of 2 ranks whose clocks jump by hours at each look ({mode})", tried=saves, lost=0)


def test_by_wall_time_means_time_that_has_passed(memory_path: Path) -> None:
    """A clock set forward does not make a save due, and one set back does not delay it."""
    config = CheckpointConfig(enable=True, interval=10**6, interval_seconds=0.4)
    model = Model(1.0)
    manager = CheckpointManager(memory_path / "run", config, model=model)
    made = []
    started = time.monotonic()
    with jumping(seed=0):
        for step in range(1, 200):
            if manager.save(step):
                made.append(time.monotonic() - started)
            if len(made) == 2:
                break
            time.sleep(0.02)
        manager.close()
    assert len(made) == 2
    assert made[0] >= 0.4
    assert made[1] - made[0] >= 0.4
    assert made[1] < 10


@contextlib.contextmanager
def another_living(do: Callable[[], object]) -> Iterator[None]:
    """A process that has done this, lives for a while, and then exits without cleaning up."""
    ready, signal_ready = os.pipe()
    living, life = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(life)
            do()
            os.write(signal_ready, b"x")
            os.read(living, 1)
        os._exit(0)
    os.close(signal_ready)
    os.close(living)
    assert os.read(ready, 1) == b"x"
    try:
        yield
    finally:
        os.close(life)
        os.waitpid(pid, 0)
        os.close(ready)


@pytest.mark.parametrize("offset_s", JUMPS_S)
def test_the_lock_of_a_run_that_lives_is_kept_and_that_of_a_dead_one_is_not(memory_path: Path, offset_s: float) -> None:
    storage = LocalStorage(memory_path)
    held: list[RunLock] = []
    with (
        another_living(lambda: held.append(RunLock(storage, "run", beat_s=0.05))),
        set_to(offset_s),
        pytest.raises(RunLockedError),
    ):
        RunLock(storage, "run")
    with set_to(offset_s):
        RunLock(storage, "run").release()  # of the run that is dead now, without a lease's wait


@pytest.mark.parametrize("offset_s", JUMPS_S)
def test_an_attempt_is_swept_when_its_owner_is_dead_whatever_the_clock_says(
    memory_path: Path, offset_s: float, tally: Tally
) -> None:
    storage = LocalStorage(memory_path)
    ours, elsewhere = "a" * 32, "b" * 32
    with another_living(lambda: begin_attempt(storage, "run/step-1", ours)), set_to(offset_s):
        attempt = begin_attempt(storage, "run/step-2", elsewhere)
        for entry in storage.list(attempt):
            if entry.name.startswith(OWNER_PREFIX):
                storage.remove(f"{attempt}/{entry.name}")
        owner = replace(this_process(REAL()), host="elsewhere", machine_id="another")
        storage.write(f"{attempt}/{OWNER_PREFIX}0.json", owner.dump())
        assert sweep.sweep_leftovers(storage, "run", now=time.time()).removed == ()
        assert len(Attempts(storage, "run").look(now=time.time())) == 2
    with set_to(offset_s):
        assert sweep.sweep_leftovers(storage, "run", now=time.time()).removed == (ATTEMPT_PREFIX + ours,)
    tally(f"attempts under way while the clock is {offset_s / HOUR_S:+g} hours off", tried=2, lost=0)


def test_hours_and_days_are_those_of_the_newest_steps(memory_path: Path) -> None:
    """A clock that was ahead for two hours, and was then set right."""
    storage = LocalStorage(memory_path)
    hours = {1: 100, 2: 101, 3: 900, 4: 901, 5: 102, 6: 103, 7: 104}
    for step, hour in hours.items():
        save_arrays(storage, f"run/step-{step}", {"w": np.zeros(4, "float32")}, step=step, now=hour * HOUR_S)
    entries = catalog.scan(storage, "run")
    now = 105 * HOUR_S
    hourly = retention.plan(entries, retention.Rules(keep_latest_k=1, keep_hourly=3), now=now)
    assert [decision.step for decision in hourly if decision.keep] == [5, 6, 7]
    daily = retention.plan(entries, retention.Rules(keep_latest_k=1, keep_daily=2), now=now)
    assert [decision.step for decision in daily if decision.keep] == [4, 7]


@pytest.mark.parametrize("rule", ["keep_hourly", "keep_daily"])
def test_a_step_goes_only_for_newer_ones_of_its_hour_or_of_enough_others(rule: str, tally: Tally) -> None:
    span_s = HOUR_S if rule == "keep_hourly" else 24 * HOUR_S
    seed, tried = 20, 2000
    chance = random.Random(seed)
    lost = 0
    for _ in range(tried):
        now, entries = 1000 * span_s, []
        for step in range(chance.randrange(1, 20)):
            now += chance.choice((0.2, 0.5, 1.0, 3.0, -4.0, 30.0, -30.0)) * span_s
            fields = {"kind": "full", "created_s": now, "nbytes": 1}
            entries.append(catalog.StepEntry(step=step, path=f"run/step-{step}", state="committed", **fields))  # type: ignore[arg-type]
        count = chance.randrange(1, 6)
        rules = retention.Rules(keep_latest_k=1, **{rule: count})  # type: ignore[arg-type]
        for entry, decision in zip(entries, retention.plan(entries, rules, now=now), strict=True):
            newer = {other.created_s // span_s for other in entries[entry.step + 1 :]}
            lost += not decision.keep and entry.created_s // span_s not in newer and len(newer) < count
    tally(f"{rule} over steps of clocks that jump", tried=tried, lost=lost, seed=seed)
