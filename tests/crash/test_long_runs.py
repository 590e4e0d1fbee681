"""Nothing grows with the number of saves or of managers, and nothing is left of a process, however it ends."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import psutil
import pytest
import torch
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.config import AsyncMode
from milepost.run.lock import LOCK_NAME
from milepost.run.owner import OWNERLESS_LIFETIME_S
from milepost.run.sweep import sweep_leftovers
from milepost.saving.async_save import MAX_SAVERS
from milepost.storage import LocalStorage
from milepost.testing.world import run_world


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


MODES = get_args(AsyncMode)
NUM_SAVES = 200
WARM_SAVES = 50
"""Number of saves after which the interpreter's and the allocator's own pools have their size."""
NUM_MANAGERS = 100


class Step:
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def manager_in(folder: Path, mode: AsyncMode, *, keep_latest_k: int = 2) -> tuple[CheckpointManager, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    config = CheckpointConfig(
        enable=True, interval=1, keep_latest_k=keep_latest_k, async_mode=mode, last_save_model_only=False
    )
    optimizer = torch.optim.AdamW(model.parameters())
    return CheckpointManager(folder, config, model=model, optimizer=optimizer, train_state=Step()), model


def save(manager: CheckpointManager, model: nn.Module, step: int) -> None:
    """Run one step of training: change the weights, and save."""
    manager.maybe_wait_for_staging()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert manager.save(step)


@dataclass(frozen=True)
class Usage:
    """The resources that a process and its writer process hold."""

    fds: int
    threads: int
    processes: int
    segments: int
    """Mappings of shared memory, of both kinds: nameless, and by a name in /dev/shm."""
    resident_nbytes: int
    writer_nbytes: int
    """Resident in the writer process."""

    @classmethod
    def now(cls) -> Usage:
        mine, writers = os.getpid(), children(os.getpid())
        mapped = [line for pid in (mine, *writers) for line in _told(pid, "maps").splitlines()]
        return cls(
            fds=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            processes=len(writers),
            segments=sum("/memfd:" in line or "/dev/shm/" in line for line in mapped),
            resident_nbytes=_resident(mine),
            writer_nbytes=sum(map(_resident, writers)),
        )

    def growth_since(self, then: Usage) -> list[str]:
        """The figures that are larger than they were; of memory, by more than 1 % (and 1 MB)."""
        grown = self.more_held_than(then)
        for name in ("resident_nbytes", "writer_nbytes"):
            before = getattr(then, name)
            grown += [name] if getattr(self, name) > before + max(before // 100, 1 << 20) else []
        return grown

    def more_held_than(self, then: Usage) -> list[str]:
        """As ``growth_since``, but for memory: that of the allocator's pools is never given back."""
        counts = ("fds", "threads", "processes", "segments")
        return [name for name in counts if getattr(self, name) > getattr(then, name)]


def _told(pid: int, name: str) -> str:
    """A file of /proc on a process; empty if that has ended since it was listed."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _resident(pid: int) -> int:
    return int((_told(pid, "statm") or "0 0").split()[1]) * os.sysconf("SC_PAGESIZE")


def soon(holds: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Wait until ``holds`` is true, since threads and processes take a moment to end; return its last value."""
    deadline = time.monotonic() + timeout_s
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _save_often(folder: Path, mode: AsyncMode) -> tuple[Usage, Usage, Usage, Usage]:
    """On every rank: the usage before there is a manager, early and late in a long run, and after its close."""
    before = Usage.now()
    manager, model = manager_in(folder, mode)
    during = {}
    for step in range(1, NUM_SAVES + 1):
        save(manager, model, step)
        manager.take_events()
        if step in (WARM_SAVES, NUM_SAVES):
            wait_for_commit(manager)
            during[step] = Usage.now()
    manager.close()
    soon(lambda: not Usage.now().more_held_than(before))
    return before, during[WARM_SAVES], during[NUM_SAVES], Usage.now()


def wait_for_commit(manager: CheckpointManager) -> None:
    """Return once the running save is committed, and its resources are free."""
    if manager.pending is not None:
        manager.pending.committed(60)
    gc.collect()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_grows_over_two_hundred_saves(memory_path: Path, mode: AsyncMode, tally: Callable[..., None]) -> None:
    ranks = run_world(_save_often, 2, memory_path / "run", mode)
    grown = 0
    for before, early, late, after in ranks:
        num_segments = early.segments - before.segments  # the trainer's arena, and its writer process's view of it
        assert early.processes == num_segments // 2 == (mode == "async_with_pinned_mem"), (before, early)
        grown += len(late.growth_since(early))
        assert after.more_held_than(before) == [], (before, after)
    assert sorted(os.listdir(memory_path / "run")) == ["events.jsonl", "step-199", "step-200"]
    assert not grown, ranks
    tally("one save after another, and nothing grows: memory, file descriptors, threads, processes", tried=200, lost=0)


def _forget(folder: Path) -> tuple[Usage, Usage, Usage]:
    """Build manager after manager, each to save once, and close none. The usage before, the most of all, after."""
    before = Usage.now()
    seen = []
    for step in range(1, NUM_MANAGERS + 1):
        # As in a notebook: the one before is forgotten, then the next is made. (Two at a time are refused.)
        manager = model = None
        manager, model = manager_in(folder, MODES[0 if step % 5 else 2] if step % 2 else MODES[1])
        save(manager, model, step)
        assert (folder / LOCK_NAME).exists(), step
        seen.append(Usage.now())
    del manager
    gc.collect()
    soon(lambda: not Usage.now().more_held_than(before))
    most = Usage(*(max(getattr(usage, field.name) for usage in seen) for field in fields(Usage)))
    return before, most, Usage.now()


def test_a_manager_that_is_forgotten_without_close_lets_go_of_all_it_holds(
    memory_path: Path, tally: Callable[..., None]
) -> None:
    ((before, most, after),) = run_world(_forget, 1, memory_path / "run")
    assert most.threads <= before.threads + 8, (before, most)
    assert most.fds <= before.fds + 16, (before, most)
    assert most.processes <= 3, most
    assert after.more_held_than(before) == [], (before, after)
    assert sorted(os.listdir(memory_path / "run")) == ["events.jsonl", "step-100", "step-99"]
    tally("a manager is forgotten without close(), and nothing of it stays", tried=NUM_MANAGERS, lost=0)


def _save_into_many_folders(folder: Path) -> tuple[Usage, Usage]:
    """A folder for each step, with a checkpoint in it."""
    before = Usage.now()
    for number in range(12):
        state = {"w": torch.full((100, 100), float(number))}
        milepost.async_save(folder / str(number) / "model", state, mode="async_with_pinned_mem").committed(60)
    gc.collect()
    soon(lambda: Usage.now().processes <= MAX_SAVERS)
    return before, Usage.now()


def test_what_is_kept_for_async_save_does_not_grow_with_the_folders_saved_into(memory_path: Path) -> None:
    ((before, after),) = run_world(_save_into_many_folders, 1, memory_path)
    assert after.processes == MAX_SAVERS
    assert after.fds <= before.fds + 5 * MAX_SAVERS, (before, after)
    assert after.threads <= before.threads + 2 * MAX_SAVERS, (before, after)
    for number in range(12):
        into = {"w": torch.zeros(100, 100)}
        milepost.load(memory_path / str(number) / "model", into)
        assert into["w"].unique().tolist() == [number]


TRAINER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_long_runs import manager_in, save
manager, model = manager_in(Path(sys.argv[2]), "async_with_pinned_mem")
for step in range(1, 4):
    save(manager, model, step)
"""


def test_a_program_that_ends_without_close_commits_its_last_save_and_leaves_nothing(memory_path: Path) -> None:
    command = [sys.executable, "-c", TRAINER, str(Path(__file__).parent), str(memory_path / "run")]
    subprocess.run(command, env=os.environ | {"MILEPOST_TEST_MARK": str(memory_path)}, timeout=120, check=True)
    assert marked(str(memory_path)) == []
    assert sorted(os.listdir(memory_path / "run")) == ["events.jsonl", "step-2", "step-3"]


def marked(text: str) -> list[str]:
    """The processes that were started with ``text`` in their environment."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdecimal() and text.encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_text())
    return found


def _train_until_killed(folder: Path, to_test: int) -> None:
    manager, model = manager_in(folder, "async_with_pinned_mem")
    for step in range(1, 1_000_000):
        save(manager, model, step)
        if step == 3:
            (writer,) = children(os.getpid())
            os.write(to_test, f"{writer}\n".encode())


SEED = 11
NUM_KILLS = 10


def test_nothing_is_left_of_a_trainer_that_is_killed_at_any_moment(
    memory_path: Path, tally: Callable[..., None]
) -> None:
    """Its writer process ends, and the unnamed shared memory is freed with it."""
    rng = random.Random(SEED)
    for number in range(NUM_KILLS):
        folder = memory_path / str(number)
        writer = _kill_trainer(folder, rng.uniform(0.0, 0.1))
        assert soon(lambda process=Path(f"/proc/{writer}"): not process.exists()), "the writer process stays"
        manager, _ = manager_in(folder, "disabled")
        assert manager.load() is not None
        manager.close()
        # An attempt killed in its first moment has no owner's record yet: it is swept when it is old.
        sweep_leftovers(LocalStorage(folder), "", now=time.time() + 2 * OWNERLESS_LIFETIME_S)
        assert all(name.startswith("step-") for name in set(os.listdir(folder)) - {"events.jsonl"})
    tally("SIGKILL of a trainer: its writer process, shared memory and attempts go", tried=NUM_KILLS, lost=0, seed=SEED)


def _kill_trainer(folder: Path, after_s: float) -> int:
    """Kill a trainer that saves without pause, and had then begun its third save; its writer process."""
    from_trainer, to_test = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        torch.set_num_threads(1)
        try:
            _train_until_killed(folder, to_test)
        finally:
            os._exit(1)
    os.close(to_test)
    with os.fdopen(from_trainer) as pipe:
        writer = int(pipe.readline())
    time.sleep(after_s)
    mapped = [line.split()[-2:] for line in Path(f"/proc/{writer}/maps").read_text().splitlines() if "arena" in line]
    os.kill(trainer, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(trainer, 0)[1]) == -signal.SIGKILL
    assert mapped == [["/memfd:milepost-arena", "(deleted)"]]
    return writer
