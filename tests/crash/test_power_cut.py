"""A power cut at every moment of a save on two ranks, and the possible states of the disk afterwards.

One real run is recorded, system call by system call. After each call the power may fail: several of the disks that
this may leave are made, the two extremes always among them. Whatever was lost, torn or reordered: a scan shows the
state before or the state after, each byte of it as it was saved; what was reported to a user as committed is there; the
next run resumes from the newest step, saves, prunes and clears up.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_runs import (
    AFTER_DAMAGE,
    CASES,
    MODES,
    NEXT,
    Case,
    Known,
    Shown,
    check_the_next_run,
    check_the_sweep,
    impatient,
    prepare,
    quiet,
    shown,
    train,
)
from two_ranks import Outcome, PairComm, in_a_child, in_parallel, run_pair, through

from milepost.collective.comm import SingleProcess
from milepost.errors import MilepostError
from milepost.storage import LocalStorage, Storage
from milepost.testing.faulty import FaultyStorage
from milepost.testing.journal import Change, Created, Exchanged, Journal, Marked, Synced
from milepost.testing.powercut import Disk, FileTree, frozen, write_tree
from milepost.testing.wrap import Operation, WrappedStorage

Tally = Callable[..., None]

SEED = 20
CUTS = 4
"""So many states are made after each system call, beside the two extremes."""
NUM_WORKERS = 2
NEXT_RUNS = 8
"""Number of states of a recording on which a whole run is started; on the others only its sweep."""


@dataclass
class Recording:
    """The disk as it was before, what happened then, and what may be shown: see ``Case.stages``.

    Marks among the changes are numbers of saves: from there on a user knows that these are committed.
    """

    disk: Disk
    changes: list[Change]
    stages: list[tuple[int, Shown]]
    damaged: frozenset[int] = frozenset()


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    quiet()
    with impatient():
        yield


def record(
    folder: Path, case: Case, mode: str, *, can_exchange: bool = True, wrap: Callable[[Storage], Storage] = lambda s: s
) -> Recording:
    """Let two ranks make a run; ``wrap`` is put around the storage of each process."""
    storage = prepare(folder / "disk", case)
    disk = Disk(storage.root)
    journal = Journal(folder / "journal", can_exchange=can_exchange)

    def act(comm: PairComm) -> None:
        train(comm, wrap(storage), case, mode, lambda count: journal.mark(str(count)))

    with journal.recording(), through(lambda _, inner: wrap(inner)):
        assert run_pair(act) == [Outcome(), Outcome()]
    assert shown(storage, damaged=case.damaged) == case.after
    return Recording(disk, journal.changes(), case.stages(), case.damaged)


@dataclass
class Findings:
    """The outcome of the states that were tried. ``wrong`` describes each that lost data."""

    tried: int = 0
    wrong: list[str] = field(default_factory=list)


def explore(
    folder: Path, recording: Recording, *, seed: int = SEED, cuts: int = CUTS, next_runs: int = 0, start: int = 0
) -> Findings:
    """Look at ``cuts`` states after each call from ``start`` on, beside the extremes; start a run on ``next_runs``."""
    total = Findings()
    for found in in_parallel(
        lambda worker: Explorer(folder, seed, worker).explore(recording, cuts, next_runs // NUM_WORKERS, start),
        range(NUM_WORKERS),
    ):
        total.tried += found.tried
        total.wrong += found.wrong
    return total


class Explorer:
    """Makes disks out of a recording and looks at each; at equal ones only once. Each worker takes its share."""

    def __init__(self, folder: Path, seed: int, worker: int):
        self._storage = LocalStorage(folder / f"after-{worker}")
        self._rng = random.Random(f"{seed} {worker}")
        self._worker = worker
        self._damaged: frozenset[int] = frozenset()
        self._known: Known = {}
        self._shown: dict[Any, Shown | str] = {}
        self._sound: list[tuple[FileTree, Shown]] = []

    def explore(self, recording: Recording, cuts: int, next_runs: int, start: int) -> Findings:
        found = Findings()
        disk = recording.disk
        self._damaged = recording.damaged
        num_reported = 0
        for number, change in enumerate([Marked("0"), *recording.changes]):
            disk.apply(change)
            if isinstance(change, Marked):
                num_reported = max(num_reported, int(change.text))
            if number < start or number % NUM_WORKERS != self._worker:
                continue
            allowed = [shown for num_committed, shown in recording.stages if num_committed >= num_reported]
            trees = [disk.seen(), disk.durable(), *(disk.after_cut(self._rng) for _ in range(cuts))]
            for key, tree in {frozen(tree): tree for tree in trees}.items():
                found.tried += 1
                if self._look(key, tree) not in allowed:
                    when = f"after call {number} ({type(change).__name__}), {num_reported} saves reported"
                    found.wrong.append(f"{when}: {self._shown[key]}")
        for tree, there in self._rng.sample(self._sound, min(next_runs, len(self._sound))):
            wrong = self._try(tree, lambda there=there: check_the_next_run(self._storage, there, self._damaged))
            found.wrong += [f"the next run on {there}: {wrong}"] if wrong else []
        return found

    def _look(self, key: object, tree: FileTree) -> Shown | str:
        """Return the steps that a scan of a disk shows, or a description of its fault."""
        if key not in self._shown:
            there: Shown = {}

            def look() -> None:
                there.update(shown(self._storage, self._known, self._damaged))
                check_the_sweep(self._storage, there)

            wrong = self._try(tree, look)
            self._shown[key] = wrong or there
            self._sound += [] if wrong else [(tree, there)]
        return self._shown[key]

    def _try(self, tree: FileTree, check: Callable[[], None]) -> str:
        """Make the disk and check it; empty, or what was wrong."""
        write_tree(tree, self._storage.root)
        try:
            check()
        except (AssertionError, MilepostError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(self._storage.root)
        return ""


def note(found: Findings, tally: Tally, what: str, seed: int = SEED) -> None:
    print(*found.wrong[:20], sep="\n")
    tally(what, tried=found.tried, lost=len(found.wrong), seed=seed)


WHAT = "power cut after each system call of a save on 2 ranks: unsynced bytes and names lost, torn, reordered"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_a_power_cut_leaves_the_old_state_or_the_new(memory_path: Path, tally: Tally, name: str, mode: str) -> None:
    recording = record(memory_path, CASES[name], mode)
    assert len(recording.changes) > 50
    found = explore(memory_path, recording, next_runs=NEXT_RUNS)
    note(found, tally, WHAT)


def test_a_run_that_falls_back_from_a_damaged_step_and_marks_it(memory_path: Path, tally: Tally) -> None:
    recording = record(memory_path, AFTER_DAMAGE, "disabled")
    found = explore(memory_path, recording, next_runs=NEXT_RUNS)
    note(found, tally, f"{WHAT}, by a run that fell back from a damaged step")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_many_more_power_cuts(memory_path: Path, tally: Tally, name: str, mode: str) -> None:
    recording = record(memory_path, CASES[name], mode)
    note(explore(memory_path, recording, seed=SEED + 1, cuts=60, next_runs=100), tally, WHAT, SEED + 1)


def test_the_same_where_names_cannot_be_exchanged(memory_path: Path, tally: Tally) -> None:
    recording = record(memory_path, CASES["the same step again"], "disabled", can_exchange=False)
    assert not any(isinstance(change, Exchanged) for change in recording.changes)
    found = explore(memory_path, recording, next_runs=NEXT_RUNS)
    note(found, tally, f"{WHAT}, on a file system that can't exchange names (NFS)")


def explore_sweeping(
    folder: Path, case: Case, ks: Callable[[list[Operation]], list[int]], can_exchange: bool
) -> Findings:
    """Kill a run at each of its operations that ``ks`` chooses; then cut the power at every moment of the next run."""
    template = prepare(folder / "template", case)
    total = Findings()
    for k in ks(operations_of(folder / "rehearsal", template, case, can_exchange)):
        storage = LocalStorage(shutil.copytree(template.root, folder / str(k)))
        disk = Disk(storage.root)
        journal = Journal(folder / f"{k}.journal", can_exchange=can_exchange)
        with journal.recording():
            killed = FaultyStorage(storage, fail_at=k, hook=kill)
            assert os.WIFSIGNALED(in_a_child(partial(train, SingleProcess(), killed, case)))
            start = len(journal.changes())
            there = shown(storage)
            following = Case(there, (replace(NEXT, deletes=tuple(sorted(there)[:-1])),), keep=1)
            assert (
                in_a_child(partial(train, SingleProcess(), storage, following, reported=partial(report, journal))) == 0
            )
        # Unsynced changes may be undone until the next run has synced them by its own commit.
        stages = [(0, shown) for _, shown in case.stages()]
        stages += [(1, {**shown, NEXT.step: NEXT.value}) for _, shown in case.stages()]
        stages += following.stages()
        found = explore(folder, Recording(disk, journal.changes(), stages), seed=SEED + k, cuts=2, start=start)
        total.tried += found.tried
        total.wrong += [f"killed at {k}: {wrong}" for wrong in found.wrong]
    return total


def operations_of(folder: Path, template: LocalStorage, case: Case, can_exchange: bool) -> list[Operation]:
    counting = FaultyStorage(LocalStorage(shutil.copytree(template.root, folder)))
    with Journal(folder / "journal", can_exchange=can_exchange).recording():
        train(SingleProcess(), counting, case)
    return counting.operations


def before_syncs(operations: list[Operation]) -> list[int]:
    """Return the positions after a rename or exchange, whose sync comes next."""
    return [k for k in range(1, len(operations)) if operations[k - 1].name in ("rename", "exchange")]


LATER = "power cut after each system call of a run that clears up after a killed one"
ON_SWEEPING = [("the same step again", True), ("the same step again", False), ("deleting old steps", True)]


@pytest.mark.parametrize(("name", "can_exchange"), ON_SWEEPING)
def test_a_power_cut_while_the_next_run_clears_up(
    memory_path: Path, tally: Tally, name: str, can_exchange: bool
) -> None:
    """It relies on what a killed run left, which had no time to sync it."""
    case = replace(CASES[name], saves=CASES[name].saves[:1])
    note(explore_sweeping(memory_path, case, before_syncs, can_exchange), tally, LATER)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "can_exchange"), ON_SWEEPING)
def test_a_power_cut_while_the_next_run_clears_up_after_a_kill_anywhere(
    memory_path: Path, tally: Tally, name: str, can_exchange: bool
) -> None:
    note(explore_sweeping(memory_path, CASES[name], lambda done: [*range(len(done))], can_exchange), tally, LATER)


def kill(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def report(journal: Journal, count: int) -> None:
    journal.mark(str(count))


# ---- the model detects faults ----


class ForgetsFolders(WrappedStorage):
    """Never syncs a folder."""

    def sync_folder(self, path: str) -> None:
        pass


class DeletesFirst(WrappedStorage):
    """Replaces a step by deleting the old one, then giving its name to the new one."""

    def exchange(self, one: str, other: str) -> bool:
        self.inner.remove_tree(other)
        self.inner.rename(one, other)
        return True


@pytest.mark.parametrize(
    ("broken", "loss"),
    [
        (ForgetsFolders, "1 saves reported: AssertionError: StepEntry(path='outputs/run/step-4', state='incomplete'"),
        (DeletesFirst, "0 saves reported: {2: 1.0}"),
    ],
)
def test_a_protocol_that_loses_something_is_found_out(
    memory_path: Path, broken: type[WrappedStorage], loss: str
) -> None:
    recording = record(memory_path, CASES["the same step again"], "disabled", wrap=broken)
    found = explore(memory_path, recording)
    assert any(loss in wrong for wrong in found.wrong), found.wrong[:20]


def test_leaving_out_any_fsync_that_a_checkpoint_needs_is_found_out(memory_path: Path) -> None:
    recording = record(memory_path, CASES["the same step again"], "disabled")
    names = {change.inode: change.name[1] for change in recording.changes if isinstance(change, Created)}
    last = {names.get(change.inode): number for number, change in enumerate(recording.changes) if is_sync(change)}
    needed = (
        "__0_0.distcp",
        "__1_0.distcp",
        "__0_1.distcp",
        "__1_1.distcp",
        "milepost.shards",
        "milepost.digests",
        ".metadata",
        "milepost.json",
        "data",
    )
    for name in needed:
        changes = [change for number, change in enumerate(recording.changes) if number != last[name]]
        found = explore(memory_path, replace(recording, changes=changes), cuts=2, start=last[name])
        assert found.wrong, name


def is_sync(change: Change) -> bool:
    return isinstance(change, Synced)


def test_a_journal_leads_to_the_disk_that_is_there(memory_path: Path) -> None:
    recording = record(memory_path, CASES["deleting old steps"], "async")
    for change in recording.changes:
        recording.disk.apply(change)
    assert frozen(recording.disk.seen()) == frozen(Disk(memory_path / "disk").seen())
