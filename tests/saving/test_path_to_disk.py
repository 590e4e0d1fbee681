"""The way from ``manager.save()`` to the disk: its stack frames, its threads, and the syncs that it waits for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.saving.writer_process import serve

OWN = str(Path(milepost.__file__).parent)
MOST = {"disabled": 9, "async": 8, "async_with_pinned_mem": 8}
MOST_IN_A_LOAD = 7


@dataclass
class Seen:
    """The deepest stack of own functions at calls that moved a checkpoint's data, and how many there were."""

    stack: list[str] = field(default_factory=list)
    calls: int = 0

    def look(self, fd: int) -> None:
        if not os.readlink(f"/proc/self/fd/{fd}").endswith(".distcp"):
            return
        self.calls += 1
        frame: Any = sys._getframe(2)
        stack = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(OWN):
                stack.append(f"{frame.f_code.co_qualname} ({os.path.relpath(frame.f_code.co_filename, OWN)})")
            frame = frame.f_back
        self.stack = max(self.stack, stack, key=len)


@contextmanager
def watching(name: str) -> Iterator[Seen]:
    """Inside, calls of ``os.<name>`` on data files are looked at, in all threads."""
    seen, real = Seen(), getattr(os, name)

    def call(fd: int, *args: Any) -> int:
        seen.look(fd)
        return int(real(fd, *args))

    with mock.patch.object(os, name, call):
        yield seen


def manager_of(folder: Path, mode: str = "disabled") -> CheckpointManager:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    model.register_buffer("strided", torch.arange(600.0).view(20, 30).t())
    config = CheckpointConfig(enable=True, interval=1, async_mode=mode, last_save_model_only=False)  # type: ignore[arg-type]
    return CheckpointManager(folder, config, model=model, optimizer=torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_few_frames_to_the_disk(tmp_path: Path, mode: str) -> None:
    with manager_of(tmp_path / "run", mode) as manager, watching("pwritev") as seen:
        manager.save(1)
        manager.maybe_wait_for_saving()
    assert 0 < len(seen.stack) <= MOST[mode], "\n".join(seen.stack)


def test_few_frames_to_the_disk_in_the_writer_process(tmp_path: Path) -> None:
    """The process runs ``serve``; here a thread of this process does, at the other end of the same pipe."""
    import threading
    from multiprocessing.connection import Connection

    def in_a_thread(command: list[str], *, pass_fds: tuple[int, int], **_: Any) -> Any:
        connection, arena = (os.dup(fd) for fd in pass_fds)
        thread = threading.Thread(target=serve, args=(Connection(connection), arena), daemon=True)
        thread.start()
        process = mock.Mock(pid=0)
        process.poll.return_value = None
        process.wait.side_effect = lambda timeout: thread.join(timeout)
        return process

    with (
        mock.patch("milepost.saving.writer_link.subprocess.Popen", in_a_thread),
        watching("pwritev") as seen,
        manager_of(tmp_path / "run", "async_with_pinned_mem") as manager,
    ):
        manager.save(1)
        manager.maybe_wait_for_saving()
    assert 0 < len(seen.stack) <= MOST["async_with_pinned_mem"], "\n".join(seen.stack)


def test_few_frames_from_the_disk(tmp_path: Path) -> None:
    with manager_of(tmp_path / "run") as manager:
        manager.save(1)
    with manager_of(tmp_path / "run") as manager, watching("preadv") as seen:
        assert manager.load() is not None
    assert 0 < len(seen.stack) <= MOST_IN_A_LOAD, "\n".join(seen.stack)


def test_a_group_of_tensors_is_written_by_one_call(tmp_path: Path) -> None:
    state = {f"w{number}": torch.full((100,), float(number)) for number in range(200)}
    with watching("pwritev") as seen:
        milepost.save(tmp_path / "step-1", state)
    assert seen.calls == 1
    into = {key: torch.zeros(100) for key in state}
    milepost.load(tmp_path / "step-1", into)
    assert all(torch.equal(into[key], state[key]) for key in state)


def test_a_repeated_save_that_deletes_an_older_step_syncs_once_for_each_thing_that_must_not_be_lost(
    memory_path: Path,
) -> None:
    """Each sync waits for a commit of the file system's journal, as long as the data of a small model takes.

    They are: owner and attempt, the data, its four records and their names, the new step's name, and before anything
    is removed the names of the attempt and of the old step.
    """
    calls = {"fsync": 0, "threads": 0}
    real_fsync, real_start = os.fsync, threading.Thread.start

    def fsync(fd: int) -> None:
        calls["fsync"] += 1
        real_fsync(fd)

    def start(thread: threading.Thread) -> None:
        calls["threads"] += 1
        real_start(thread)

    config = CheckpointConfig(interval=1, keep_latest_k=2)
    with CheckpointManager(memory_path / "run", config, model=nn.Linear(8, 8)) as manager:
        for step in (1, 2, 3):
            manager.save(step)
        with mock.patch.object(os, "fsync", fsync), mock.patch.object(threading.Thread, "start", start):
            manager.save(4)
        assert {path.name for path in (memory_path / "run").glob("step-*")} == {"step-3", "step-4"}
    assert calls["fsync"] <= 11
    assert calls["threads"] <= 1  # the watch over all slow work, if it has ended meanwhile
