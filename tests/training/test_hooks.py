"""Hooks after each commit, functions and command lines, run while training continues."""

from __future__ import annotations

import json
import logging
import resource
import threading
import time
from pathlib import Path

import pytest
import torch

from milepost import CheckpointConfig, CheckpointManager, Commit
from milepost.config import AsyncMode
from milepost.format.manifest import MANIFEST_NAME
from milepost.training.hooks import CommitHooks

MODES: tuple[AsyncMode, ...] = ("disabled", "async", "async_with_pinned_mem")


@pytest.mark.parametrize("mode", MODES)
def test_each_commit_is_reported_once_it_is_durable(memory_path: Path, mode: AsyncMode) -> None:
    seen: list[Commit] = []

    def act(commit: Commit) -> None:
        assert (Path(commit.path) / MANIFEST_NAME).exists()
        assert threading.current_thread() is not threading.main_thread()
        seen.append(commit)

    command = f'echo "$MILEPOST_STEP $MILEPOST_CONTENTS $MILEPOST_TIER $MILEPOST_METRICS" >> {memory_path}/said'
    config = CheckpointConfig(enable=True, interval=1, async_mode=mode, on_commit=command)
    with CheckpointManager(memory_path / "run", config, model=torch.nn.Linear(2, 2), on_commit=act) as manager:
        manager.save(1, metrics={"loss": 0.5})
        manager.maybe_wait_for_staging()
        # Without another call of the manager's.
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [commit.step for commit in seen] == [1]
        manager.save(2, last_step=True)
    assert [(commit.step, commit.contents, commit.tier) for commit in seen] == [
        (1, "full", "folder"),
        (2, "model", "folder"),
    ]
    assert seen[0].metrics == {"loss": 0.5}
    first, second = (memory_path / "said").read_text().splitlines()
    assert first == f"1 full folder {json.dumps({'loss': 0.5})}"
    assert second == "2 model folder {}"


def test_a_failure_is_logged_and_fails_nothing(memory_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def act(commit: Commit) -> None:
        raise ValueError("of the user's")

    config = CheckpointConfig(enable=True, interval=1, on_commit="echo what went wrong; exit 3")
    with (
        caplog.at_level(logging.INFO, "milepost"),
        CheckpointManager(memory_path, config, model=torch.nn.Linear(2, 2), on_commit=act) as manager,
    ):
        assert manager.save(1)
        assert manager.save(2)
    assert "on_commit failed for step 1" in caplog.text
    assert "of the user's" in caplog.text
    assert "checkpoint.on_commit failed for step 2 (exit status 3): what went wrong" in caplog.text
    assert manager.committed_step == 2


def test_of_what_a_command_prints_the_end_is_kept_and_nothing_waits_for_its_children(
    memory_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = "sleep 60 & head -c 50000000 /dev/zero | tr '\\0' x; echo the end; exit 5"
    config = CheckpointConfig(enable=True, interval=1, on_commit=command)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with CheckpointManager(memory_path, config, model=torch.nn.Linear(2, 2)) as manager:
        assert manager.save(1)
    assert time.monotonic() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    message = next(record.getMessage() for record in caplog.records if "exit status 5" in record.getMessage())
    assert message.endswith("xxxthe end")
    assert len(message) < 3000


def test_training_does_not_wait_for_it(memory_path: Path) -> None:
    may_end = threading.Event()
    config = CheckpointConfig(enable=True, interval=1)
    manager = CheckpointManager(
        memory_path, config, model=torch.nn.Linear(2, 2), on_commit=lambda commit: may_end.wait(30) and None
    )
    for step in (1, 2, 3):
        assert manager.save(step)
    may_end.set()
    manager.close()


def test_a_function_that_exits_fails_nothing_and_is_called_for_later_commits(
    memory_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    def act(commit: Commit) -> None:
        seen.append(commit.step)
        raise SystemExit(3)  # sys.exit(), in a script that was made a function

    with CheckpointManager(
        memory_path, CheckpointConfig(enable=True, interval=1), model=torch.nn.Linear(2, 2), on_commit=act
    ) as manager:
        manager.save(1)
        manager.save(2)
    assert seen == [1, 2]
    assert "on_commit failed for step 1" in caplog.text


def test_a_command_gets_json_and_is_no_rank_of_the_job(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sbatch` passes its environment on, and a program that finds RANK there waits for the other ranks."""
    of_a_rank = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in {**of_a_rank, "LOCAL_SCRATCH": "kept"}.items():
        monkeypatch.setenv(name, value)
    config = CheckpointConfig(enable=True, interval=1, on_commit=f"env > {memory_path}/said")
    with CheckpointManager(memory_path / "run", config, model=torch.nn.Linear(2, 2)) as manager:
        manager.save(1, metrics={"loss": float("nan"), "lr": 0.5})
    said = dict(line.partition("=")[::2] for line in (memory_path / "said").read_text().splitlines())
    assert said["LOCAL_SCRATCH"] == "kept"
    assert of_a_rank.keys().isdisjoint(said)
    assert said["MILEPOST_METRICS"] == '{"loss": null, "lr": 0.5}'


def test_a_killed_command_is_named_with_its_signal(memory_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CheckpointConfig(enable=True, interval=1, on_commit="echo working; kill -9 $$")
    with CheckpointManager(memory_path, config, model=torch.nn.Linear(2, 2)) as manager:
        manager.save(1)
    assert "checkpoint.on_commit failed for step 1 (killed by SIGKILL): working" in caplog.text


def test_the_step_that_a_hook_is_using_is_not_deleted(memory_path: Path) -> None:
    may_end, found = threading.Event(), []

    def act(commit: Commit) -> None:
        may_end.wait(30)
        found.append((commit.step, Path(commit.path, MANIFEST_NAME).exists()))

    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=1)
    manager = CheckpointManager(memory_path, config, model=torch.nn.Linear(2, 2), on_commit=act)
    for step in (1, 2, 3, 4):
        manager.save(step)
    may_end.set()
    manager.close()
    assert found == [(1, True), (2, True), (3, False), (4, True)]


def test_hooks_that_are_slower_than_the_saves_are_reported_and_so_is_what_has_not_run(
    memory_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    may_end = threading.Event()
    hooks = CommitHooks(lambda commit: may_end.wait(30) and None, "")
    for step in range(1, 12):
        hooks.committed(Commit(step=step, path="", contents="full", metrics={}))
    with caplog.at_level(logging.INFO, "milepost"):
        hooks.close(timeout_s=0.1)
    may_end.set()
    assert "on_commit is slower than the saves: 8 commits wait for it" in caplog.text
    assert "it runs for step 1 (folder); 10 commits waiting: step 2 (folder), step 3 (folder)" in caplog.text
