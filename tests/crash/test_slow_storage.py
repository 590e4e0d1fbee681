"""Storage that is slow, hangs, or shows files of other processes late, as a network file system may, on two ranks.

A save on it takes longer or fails on all ranks, with a log that names the rank and what it does; and no half
checkpoint is ever shown, whoever wakes up when.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
from small_runs import CASES, MODES, RUN, Case, impatient, prepare, quiet, shown, train
from two_ranks import Outcome, PairComm, run_pair, through

from milepost.collective import progress
from milepost.errors import MilepostError, SaveError
from milepost.run import catalog, commit, signoff
from milepost.run.assemble import SaveInfo
from milepost.saving.async_save import AsyncSaver
from milepost.saving.request import SaveRequest
from milepost.saving.save import Saver
from milepost.storage import LocalStorage, Storage
from milepost.storage.base import Entry
from milepost.testing.wrap import Operation, WrappedStorage
from milepost.verification.verify import verify_in

T = TypeVar("T")
Tally = Callable[..., None]
Log = list[str]

PAUSE_S = 0.4
TIMEOUT_S = 0.6
DELAY_S = 0.3
PATIENCE_S = 20.0
"""Nothing here takes so long, unless it waits for what never comes."""


class Hooked(WrappedStorage):
    """Calls ``before`` ahead of each operation."""

    def __init__(self, inner: Storage, before: Callable[[Operation], None]):
        super().__init__(inner)
        self._before = before

    def around(self, operation: Operation, act: Callable[[], T], half: Callable[[], None] | None = None) -> T:
        self._before(operation)
        return act()


@contextmanager
def listening(on_line: Callable[[str], None] = lambda _: None) -> Iterator[Log]:
    """Collect the log lines of this process, with the thresholds for slowness set to 0.1 s."""
    lines: Log = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            on_line(lines[-1])

    logger, handler = logging.getLogger("milepost"), Handler()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with mock.patch.object(progress, "SLOW_S", 0.1), mock.patch.object(signoff, "SLOW_S", 0.1):
            yield lines
    finally:
        logger.removeHandler(handler)


def saver_of(mode: str, storage: Storage, comm: PairComm, timeout_s: float = PATIENCE_S) -> Saver | AsyncSaver:
    if mode == "disabled":
        return Saver(storage, comm, timeout_s=timeout_s)
    return AsyncSaver(storage, comm, mode, timeout_s=timeout_s)  # type: ignore[arg-type]


def save(saver: Saver | AsyncSaver, step: int) -> None:
    """Return when the step is committed, as far as this rank knows."""
    state = {f"layer{number}": torch.full((3000,), float(step)) for number in range(4)}
    begun = saver.save(SaveRequest(f"run/step-{step}", lambda: state, SaveInfo(step=step, kind="state")))
    if isinstance(saver, AsyncSaver):
        begun.committed(PATIENCE_S)  # type: ignore[union-attr]


def close(saver: Saver | AsyncSaver) -> None:
    if isinstance(saver, AsyncSaver):
        saver.close()


def failure_of(act: Callable[[], object]) -> MilepostError:
    with pytest.raises(SaveError) as caught:
        act()
    return caught.value


def whole_steps(folder: Path) -> list[int]:
    """The steps in ``folder/run``, each byte verified."""
    storage, steps = LocalStorage(folder), []
    for entry in catalog.scan(storage, "run"):
        assert entry.state == "committed", entry
        assert verify_in(storage, entry.path, num_threads=1).is_sound
        steps.append(entry.step)
    return steps


def results(outcomes: list[Outcome]) -> list[Any]:
    for outcome in outcomes:
        assert outcome == Outcome(result=outcome.result), outcome
    return [outcome.result for outcome in outcomes]


def writer_name(mode: str, rank: int) -> str:
    """The process that writes a rank's file."""
    return f"writer {rank}" if mode == "async_with_pinned_mem" else f"rank {rank}"


def says(log: Log, pattern: str) -> bool:
    return any(re.search(pattern, line) for line in log)


# ---- slow ----


def run_through(
    folder: Path, wrap: Callable[[str, Storage], Storage], act: Callable[[PairComm, Storage], Any]
) -> list[Any]:
    """``act`` on two ranks, whose processes ("rank 1", "writer 1") work through what ``wrap`` gives by their names."""
    with through(wrap):
        run = run_pair(lambda comm: act(comm, wrap(f"rank {comm.rank}", LocalStorage(folder))))
    return results(run)


@pytest.mark.parametrize("mode", MODES)
def test_slow_writes_are_waited_for_and_reported_by_rank(memory_path: Path, mode: str, tally: Tally) -> None:
    def wrap(name: str, storage: Storage) -> Storage:
        is_slow = name == writer_name(mode, 1)
        return Hooked(storage, lambda op: time.sleep(PAUSE_S if is_slow and op.name in ("write_at", "sync") else 0))

    def act(comm: PairComm, storage: Storage) -> Log:
        with listening() as log:
            saver = saver_of(mode, storage, comm)
            save(saver, 1)
            close(saver)
        return log

    logs = run_through(memory_path, wrap, act)
    assert whole_steps(memory_path) == [1]
    assert says(logs[1], r"^rank 1 is writing \S*step-1\b.*: for \d+ s now; is the storage slow, or does it hang\?")
    assert says(
        logs[0], r"^rank 0 has written its part of \S*step-1\b.* and is waiting for the disk, the other ranks or "
    )
    if mode != "async_with_pinned_mem":  # there it is the writer process that waits for sign-offs
        assert says(logs[0], r"^rank 0 has waited \d+ s for rank 1 of 2 to finish writing run/\.milepost-attempt-")
    tally(f"writes on rank 1 of 2 that take long ({mode})", tried=1, lost=0)


def test_a_slow_begin_is_reported(memory_path: Path) -> None:
    def wrap(name: str, storage: Storage) -> Storage:
        return Hooked(storage, lambda op: time.sleep(PAUSE_S if name == "rank 0" and op.name == "make_folder" else 0))

    def act(comm: PairComm, storage: Storage) -> Log:
        with listening() as log:
            save(saver_of("disabled", storage, comm), 1)
        return log

    logs = run_through(memory_path, wrap, act)
    assert says(logs[0], r"^rank 0 is making the folder for the save of \S*step-1: for \d+ s now")
    assert whole_steps(memory_path) == [1]


# ---- hung ----


def hang_at(name: str, wake: Path) -> Callable[[Operation], None]:
    """Hold the operation of this name until there is a file ``wake``."""

    def before(operation: Operation) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while operation.name == name and not wake.exists():
            assert time.monotonic() < deadline, "nothing has woken the storage"
            time.sleep(0.01)

    return before


MISSING = r"^rank 1 of 2 did not finish writing within 0\.6 s; nothing was committed"


def test_hung_storage_in_the_foreground(memory_path: Path, tally: Tally) -> None:
    """No rank can leave the save while the hung one can't get the error; but rank 0's log names that one in time."""
    wake = memory_path / "wake"

    def wrap(name: str, storage: Storage) -> Storage:
        return Hooked(storage, hang_at("write_at", wake)) if name == "rank 1" else storage

    def act(comm: PairComm, storage: Storage) -> tuple[MilepostError, float]:
        started, gave_up = time.monotonic(), [0.0]

        def on_line(line: str) -> None:
            if re.search(
                r"^rank 0 is waiting for the other ranks to finish \S*step-1: rank 1 of 2 did not finish", line
            ):
                gave_up[0] = time.monotonic() - started
                assert whole_steps(memory_path) == []
                wake.touch()

        saver = saver_of("disabled", storage, comm, TIMEOUT_S)
        with listening(on_line):
            failure = failure_of(lambda: save(saver, 1))
        assert whole_steps(memory_path) == []
        save(saver, 2)
        return failure, gave_up[0]

    (failure, gave_up_s), (other, _) = run_through(memory_path, wrap, act)
    assert TIMEOUT_S <= gave_up_s < TIMEOUT_S + 5
    assert re.search(MISSING, failure.message)
    assert (failure.rank, other.rank) == (1, 1)
    assert other.message == failure.message
    assert whole_steps(memory_path) == [2]
    assert {path.name for path in (memory_path / "run").iterdir()} == {"step-2"}
    tally("storage of rank 1 of 2 that hangs past the time-out, in write_at (disabled)", tried=1, lost=0)


@pytest.mark.parametrize(
    ("mode", "operation"), [("async", "write_at"), ("async", "sync"), ("async_with_pinned_mem", "write_at")]
)
def test_hung_storage_in_the_background(memory_path: Path, mode: str, operation: str, tally: Tally) -> None:
    wake = memory_path / "wake"

    def wrap(name: str, storage: Storage) -> Storage:
        return Hooked(storage, hang_at(operation, wake)) if name == writer_name(mode, 1) else storage

    def act(comm: PairComm, storage: Storage) -> tuple[str, str, float]:
        saver = saver_of(mode, storage, comm, TIMEOUT_S)
        started = time.monotonic()
        first = failure_of(lambda: save(saver, 1))
        seconds = time.monotonic() - started
        assert whole_steps(memory_path) == []
        if comm.rank == 0:
            assert not wake.exists()  # rank 1 still hangs
            wake.touch()
        assert first.rank == 1
        raised = failure_of(lambda: save(saver, 2))  # of the save before, on every rank
        assert whole_steps(memory_path) == []
        save(saver, 3)
        close(saver)
        return first.message, raised.message, seconds

    outcomes = run_through(memory_path, wrap, act)
    assert re.search(MISSING, outcomes[0][0])
    assert TIMEOUT_S <= outcomes[0][2] < TIMEOUT_S + 5
    assert "rank 1 of 2 did not finish" in outcomes[1][0]
    assert outcomes[0][1] == outcomes[1][1]
    assert whole_steps(memory_path) == [3]
    assert {path.name for path in (memory_path / "run").iterdir()} == {"step-3"}
    tally(f"storage of rank 1 of 2 that hangs past the time-out, in {operation} ({mode})", tried=1, lost=0)


@pytest.mark.parametrize("operation", ["write_at", "rename"])
def test_the_rank_that_commits_hangs(memory_path: Path, operation: str, tally: Tally) -> None:
    """The other one names it in time; a step that it commits after it wakes up is complete."""
    wake = memory_path / "wake"

    def wrap(name: str, storage: Storage) -> Storage:
        return Hooked(storage, hang_at(operation, wake)) if name == "rank 0" else storage

    def act(comm: PairComm, storage: Storage) -> str:
        saver = saver_of("async", storage, comm, TIMEOUT_S)
        message = ""
        if comm.rank == 1:
            failure = failure_of(lambda: save(saver, 1))
            message = failure.message
            assert (failure.rank, whole_steps(memory_path)) == (0, [])
            wake.touch()
        else:
            save(saver, 1)
        failure_of(lambda: save(saver, 2))
        save(saver, 3)
        close(saver)
        return message

    outcomes = run_through(memory_path, wrap, act)
    assert re.search(r"^rank 0 did not commit \S*step-1 within 0\.6 s: see its log", outcomes[1])
    assert whole_steps(memory_path) == [1, 3]
    assert {path.name for path in (memory_path / "run").iterdir()} == {"step-1", "step-3"}
    tally(f"storage of rank 0 of 2 that hangs past the time-out, in {operation} (async)", tried=1, lost=0)


# ---- shown late ----


class LateStorage(WrappedStorage):
    """Shows other processes' files ``DELAY_S`` after the first look, at half their size first, then complete.

    Files that existed when this process began, and its own, are shown at once. A renamed file remains the same file,
    as for a client of NFS.
    """

    def __init__(self, inner: LocalStorage):
        super().__init__(inner)
        found = [os.path.join(at, name) for at, folders, files in os.walk(inner.root) for name in folders + files]
        self._known = {os.lstat(path).st_ino for path in found}
        self._first_seen: dict[int, float] = {}

    def around(self, operation: Operation, act: Callable[[], T], half: Callable[[], None] | None = None) -> T:
        result = act()
        if operation.name in ("open_write", "write", "append", "make_folder"):
            path = Path(self.root, operation.path)
            self._known |= {os.lstat(at).st_ino for at in (path, *path.parents)}
        return result

    def list(self, path: str) -> list[Entry]:
        found = [self._as_shown(f"{path}/{entry.name}", entry) for entry in self.inner.list(path)]
        return [entry for entry in found if entry is not None]

    def stat(self, path: str) -> Entry | None:
        found = self.inner.stat(path)
        return self._as_shown(path, found) if found is not None else None

    def _as_shown(self, path: str, entry: Entry) -> Entry | None:
        try:
            inode = os.lstat(f"{self.root}/{path}").st_ino
        except FileNotFoundError:
            return None
        if inode in self._known:
            return entry
        age_s = time.monotonic() - self._first_seen.setdefault(inode, time.monotonic())
        if age_s < DELAY_S:
            return None
        return replace(entry, nbytes=entry.nbytes // 2) if age_s < 2 * DELAY_S else entry


@pytest.mark.parametrize(
    ("name", "mode"), [("the same step again", "async"), *(("deleting old steps", mode) for mode in MODES)]
)
def test_files_of_others_that_show_late(memory_path: Path, name: str, mode: str, tally: Tally) -> None:
    case: Case = CASES[name]
    local = prepare(memory_path, case)

    def late(_: str, storage: Storage) -> Storage:
        assert isinstance(storage, LocalStorage)
        return LateStorage(storage)

    def act(comm: PairComm, storage: Storage) -> float:
        quiet()
        started = time.monotonic()
        train(comm, storage, case, mode)
        return time.monotonic() - started

    with impatient():
        seconds = run_through(memory_path, late, act)
    assert min(seconds) >= 2 * DELAY_S * len(case.saves)  # it was waited for
    assert shown(local) == case.after
    left = {path.name for path in (memory_path / RUN).iterdir()}
    assert left == {f"step-{step}" for step in case.after} | {"events.jsonl"}
    saves = len(case.saves)
    tally(f"files and sizes that other ranks see {DELAY_S:g} s late: {name} ({mode})", tried=saves, lost=0)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_size_that_stays_wrong(memory_path: Path, mode: str, tally: Tally) -> None:
    visibility_s = 2 * DELAY_S + 0.4

    def cut(operation: Operation) -> None:
        for path in memory_path.glob("run/.milepost-attempt-*/data/__1_0.distcp"):
            if operation.name == "rename" and "sign-off" in operation.path:  # the file is written and synced
                os.truncate(path, path.stat().st_size - 4096)

    def wrap(name: str, storage: Storage) -> Storage:
        assert isinstance(storage, LocalStorage)
        return Hooked(storage, cut) if name == "rank 1" else LateStorage(storage)

    def act(comm: PairComm, storage: Storage) -> tuple[str, float]:
        started = time.monotonic()
        saver = saver_of(mode, storage, comm)
        failure = failure_of(lambda: save(saver, 1))
        return failure.message, time.monotonic() - started

    with mock.patch.dict(commit.publish.__kwdefaults__, visibility_s=visibility_s):
        outcomes = run_through(memory_path, wrap, act)
    for message, seconds in outcomes:
        assert "the save is incomplete, nothing was committed" in message
        sizes = re.search(r"__1_0\.distcp: expected (\d+) bytes, as its rank recorded, found (\d+)", message)
        assert sizes is not None, message
        assert int(sizes[1]) - int(sizes[2]) == 4096
        assert visibility_s <= seconds < visibility_s + 5
    assert whole_steps(memory_path) == []
    tally(f"a file of rank 1 of 2 that was cut before the commit ({mode})", tried=1, lost=0)
