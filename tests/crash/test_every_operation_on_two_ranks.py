"""Two ranks, and their writer processes, that get an error or are killed at any operation on their storages.

An error at any operation of any process is raised on both ranks, or does no harm. Whatever is killed, one process or
all at once: a scan shows the state before or the state after, each byte of it; what was reported to a user as committed
is there; the next run resumes from the newest step, saves, prunes and clears up. And no rank waits forever.

In the suite each case meets a sample of its faults; ``make reliability`` tries all.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
from small_runs import AFTER_DAMAGE, CASES, MODES, Case, check_the_next_run, impatient, prepare, quiet, shown, train
from two_ranks import Outcome, PairComm, in_parallel, run_pair, through

from milepost.errors import MilepostError
from milepost.saving import writer_process
from milepost.storage import LocalStorage, Storage
from milepost.testing.faulty import FaultyStorage
from milepost.testing.wrap import Operation, WrappedStorage

Tally = Callable[..., None]
Kind = Literal["error", "kill", "kill all"]
KINDS: tuple[Kind, ...] = ("error", "kill", "kill all")

RUNS = [*itertools.product(CASES, MODES), ("after damage", "disabled")]

SEED = 21
SAMPLE = 4
"""So many faults of each kind for each case and mode are tried in the suite."""
NUMBERS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


@dataclass(frozen=True)
class Fault:
    """A fault of a process ("rank 0", "writer 1", ...) at its operation ``at``, counted from 0."""

    process: str
    at: int
    kind: Kind

    @property
    def number(self) -> int:
        return NUMBERS[self.at % len(NUMBERS)]

    def __str__(self) -> str:
        return f"{self.kind} of {self.process} at {self.at}"


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    quiet()
    orphans = partial(writer_process.OrphanWatch, grace_s=0.3)
    with impatient(), mock.patch.object(writer_process, "OrphanWatch", orphans):
        yield


@dataclass(frozen=True)
class Place:
    """The folder of one run, and the records that its processes leave there for the test."""

    folder: Path

    @property
    def storage(self) -> LocalStorage:
        return LocalStorage(self.folder / "disk")

    def note(self, name: str, text: str) -> None:
        with open(self.folder / name, "a") as file:
            file.write(text + "\n")

    def noted(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


class Counted(WrappedStorage):
    """Notes each operation that changes something."""

    def __init__(self, inner: Storage, place: Place, process: str):
        super().__init__(inner)
        self._note = partial(place.note, process)

    def around(self, operation, act, half=None):  # type: ignore[no-untyped-def]
        if operation.changes:
            self._note(str(operation))
        return act()


def run(place: Place, case: Case, mode: str, wrap: Callable[[str, Storage], Storage]) -> list[Outcome]:
    def act(comm: PairComm) -> None:
        storage = wrap(f"rank {comm.rank}", place.storage)
        train(comm, storage, case, mode, lambda count: place.note("reported", str(count)))

    with through(wrap):
        return run_pair(act)


def operations_of(folder: Path, template: Path, case: Case, mode: str) -> list[tuple[str, int]]:
    """Every operation of every process, by its number, in a run without a fault."""
    place = Place(folder)
    shutil.copytree(template, folder / "disk")
    outcomes = run(place, case, mode, lambda process, inner: Counted(inner, place, process))
    assert outcomes == [Outcome(), Outcome()]
    assert shown(place.storage, damaged=case.damaged) == case.after
    # A rank with a writer process writes nothing itself, unless it is the first, which begins the save.
    processes = ["rank 0", *(["writer 0", "writer 1"] if mode == "async_with_pinned_mem" else ["rank 1"])]
    found = [(process, number) for process in processes for number in range(len(place.noted(process)))]
    assert {process for process, _ in found} == {*processes}
    assert len(found) > 30
    return found


def strike(place: Place, fault: Fault, operation: Operation) -> None:
    place.note("struck", str(operation))
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "kill all":
        os.killpg(0, signal.SIGKILL)


def attempt(folder: Path, template: Path, case: Case, mode: str, fault: Fault) -> str | None:
    """Make the run with the fault. Returns what is wrong; empty if nothing is; None if the fault did not occur."""
    place = Place(folder)
    shutil.copytree(template, folder / "disk")

    def wrap(process: str, inner: Storage) -> Storage:
        if process != fault.process:
            return inner
        return FaultyStorage(
            inner, fail_at=fault.at, number=fault.number, tear=True, hook=partial(strike, place, fault)
        )

    try:
        with impatient(timeout_s=20.0 if fault.kind == "error" else 1.5):
            outcomes = run(place, case, mode, wrap)
        struck = place.noted("struck")
        num_reported = max(map(int, place.noted("reported")), default=0)
        if fault.kind == "error" or not struck:
            num_reported = max(num_reported, check_the_errors(outcomes, fault, len(case.saves)))
        found = shown(place.storage, damaged=case.damaged)
        allowed = [shown for num_committed, shown in case.stages() if num_committed >= num_reported]
        if fault.process.startswith("writer"):  # each writer may have died between its commit and its deletions
            allowed += [found for shown in allowed if shown.items() <= found.items() <= case.everything.items()]
        assert found in allowed, (num_reported, found)
        check_the_next_run(place.storage, found, case.damaged)
    except (AssertionError, MilepostError) as error:
        return f"{fault} at {place.noted('struck')}: {type(error).__name__}: {error}"
    shutil.rmtree(folder)
    return "" if struck else None


def check_the_errors(outcomes: list[Outcome], fault: Fault, num_saves: int) -> int:
    """Both ranks have raised the error, or none has; the number of saves that must be there."""
    if outcomes == [Outcome(), Outcome()]:
        return num_saves
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is not None, f"rank {rank} has raised nothing: {outcomes}"
        assert os.strerror(fault.number).lower() in str(outcome.error).lower(), f"rank {rank}: {outcome.error}"
    return 0


def strike_each(folder: Path, tally: Tally, name: str, mode: str, *, sample: int | None) -> None:
    """Try all faults of a case, or a sample of this size of each kind."""
    case = {**CASES, "after damage": AFTER_DAMAGE}[name]
    template = Path(prepare(folder / "template", case).root)
    places = operations_of(folder / "rehearsal", template, case, mode)
    rng = random.Random(f"{SEED} {name} {mode}")
    faults = [
        Fault(process, at, kind)
        for kind in KINDS
        for process, at in (places if sample is None else rng.sample(places, sample))
    ]

    def try_one(fault: Fault) -> str | None:
        return attempt(folder / str(fault), template, case, mode, fault)

    results = list(zip(faults, in_parallel(try_one, faults), strict=True))
    print(*(wrong for _, wrong in results if wrong), sep="\n")
    for kind in KINDS:
        found = [result for fault, result in results if fault.kind == kind and result is not None]
        tally(WHAT[kind], tried=len(found), lost=sum(map(bool, found)), seed=None if sample is None else SEED)


WHAT = {
    "error": "an I/O error at an operation of one of 2 ranks or of their writers",
    "kill": "SIGKILL of one of 2 ranks or of their writers at an operation",
    "kill all": "SIGKILL of 2 ranks and their writers at once at an operation",
}


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_some_operations(memory_path: Path, tally: Tally, name: str, mode: str) -> None:
    strike_each(memory_path, tally, name, mode, sample=SAMPLE)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_every_operation(memory_path: Path, tally: Tally, name: str, mode: str) -> None:
    strike_each(memory_path, tally, name, mode, sample=None)
