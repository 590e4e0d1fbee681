"""The manager's background modes on two ranks: outcomes, failures and deaths that every rank must report."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import SaveError
from milepost.storage import LocalStorage
from milepost.testing.world import WorldError, run_world

MODES = ("disabled", "async", "async_with_pinned_mem")


class Progress:
    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Run:
    """A small FSDP training whose every step is reproducible."""

    def __init__(self, folder: Path, mode: str, **options: Any):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 129), torch.nn.ReLU(), torch.nn.Linear(129, 7))
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.progress = Progress()
        options = {"interval": 2, "last_save_model_only": False, **options}
        config = CheckpointConfig(enable=True, async_mode=mode, **options)
        self.manager = CheckpointManager(
            folder, config, model=self.model, optimizer=self.optimizer, train_state=self.progress
        )

    def train(self, num_steps: int) -> list[float]:
        losses = []
        for step in range(self.progress.step + 1, num_steps + 1):
            torch.manual_seed(step)
            loss = self.model(torch.randn(8, 64)).square().mean()
            loss.backward()
            self.manager.maybe_wait_for_staging()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress.step = step
            losses.append(loss.item())
            self.manager.save(step, last_step=step == num_steps)
        return losses


def data_of(step: Path) -> dict[str, Any]:
    manifest = milepost.run.checkpoint_record.read_manifest(milepost.storage.LocalStorage(str(step.parent)), step.name)
    return {k: [(s.box, s.crc32) for s in entry.shards] for k, entry in manifest.tensors.items()}


def _train(folder: Path, mode: str, num_steps: int) -> list[float]:
    run = Run(folder, mode)
    run.manager.load()
    losses = run.train(num_steps)
    run.manager.close()
    return losses


def test_all_modes_train_alike_store_alike_and_resume_alike(tmp_path: Path):

    losses = {mode: run_world(_train, 2, tmp_path / mode, mode, 5) for mode in MODES}
    assert losses["disabled"] == losses["async"] == losses["async_with_pinned_mem"]
    for step in ("step-2", "step-4", "step-5"):
        stored = [data_of(tmp_path / mode / step) for mode in MODES]
        assert stored[0] == stored[1] == stored[2]
    resumed = {mode: run_world(_train, 2, tmp_path / mode, mode, 8) for mode in MODES}
    assert resumed["disabled"] == resumed["async"] == resumed["async_with_pinned_mem"]
    lines = map(json.loads, (tmp_path / "async" / "events.jsonl").read_text().splitlines())
    assert [line.get("event", "saved") for line in lines].count("saved") == 5


def _fail_in_background(folder: Path, mode: str) -> list[str]:
    run = Run(folder, mode)
    run.train(2)
    if dist.get_rank() == 1:
        _break_writes(run.manager)
    run.progress.step = 2
    caught = []
    try:
        run.train(6)
    except SaveError as error:
        caught.append(str(error))
    if dist.get_rank() == 1:
        _mend_writes(run.manager)
    run.train(8)
    run.manager.close()
    return caught


def _break_writes(manager: CheckpointManager) -> None:
    """Make this rank's next write fail: by a disk that is full, or a writer process that dies."""
    manager.pending.committed(60)
    pid = manager._saves.saver.writer_pid
    if pid is None:
        BROKEN.start()
        return
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    NO_MORE_PROCESSES.start()


def _mend_writes(manager: CheckpointManager) -> None:
    (BROKEN if manager._config.async_mode == "async" else NO_MORE_PROCESSES).stop()


def _disk_full(self: LocalStorage, path: str, nbytes: int) -> Any:
    raise milepost.StorageError(f"no space left on device: {path}", operation="open_write", path=path, errno=28)


BROKEN = mock.patch.object(LocalStorage, "open_write", _disk_full)
NO_MORE_PROCESSES = mock.patch(
    "milepost.saving.writer_link.subprocess.Popen", side_effect=OSError(11, "Resource temporarily unavailable")
)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_failure_in_the_background_of_one_rank_is_raised_on_both_at_the_next_call(tmp_path: Path, mode: str):
    caught = run_world(_fail_in_background, 2, tmp_path, mode, timeout_s=180)
    for errors in caught:
        assert len(errors) == 1
        assert "rank 1" in errors[0]
        assert "no space left" in errors[0] or "temporarily unavailable" in errors[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "step-2", "step-8"]


def _die_after_staging(folder: Path) -> None:
    run = Run(folder, "async_with_pinned_mem")
    run.train(2)
    run.manager.maybe_wait_for_staging()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_is_committed_by_its_writers_and_the_next_run_waits_for_them(tmp_path: Path):
    with pytest.raises(WorldError, match="died with exit status -9"):
        run_world(_die_after_staging, 2, tmp_path)
    # Started at once, while the writers may still be running.
    losses = run_world(_train, 2, tmp_path, "async", 4)
    assert [len(found) for found in losses] == [2, 2], "steps 1 and 2 were not trained again"
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".attempt")]


def _signalled(folder: Path, mode: str) -> tuple[list[str], bool]:
    run = Run(folder, mode, interval=1000)
    run.manager.listen_to_signals()
    run.train(1)
    run.manager.save(2)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    run.progress.step = 2
    run.train(4)
    stopped = run.manager.stop_requested
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    run.manager.save(5)
    committed = sorted(p.name for p in folder.iterdir() if p.name.startswith("step"))
    run.manager.close()
    assert not stopped
    return committed, run.manager.stop_requested


@pytest.mark.parametrize("mode", ["disabled", "async_with_pinned_mem"])
def test_a_signal_to_one_rank_saves_on_both_and_sigterm_waits_for_the_commit(tmp_path: Path, mode: str):
    for committed, stop in run_world(_signalled, 2, tmp_path, mode):
        assert committed == ["step-1", "step-3", "step-4", "step-5"]
        assert stop


def _by_the_clock(folder: Path) -> list[int]:
    run = Run(folder, "disabled", interval=1000, interval_seconds=0.4)
    saved = []
    for step in range(1, 12):
        if dist.get_rank() == 1:
            run.manager._saves.due.saved_at = -1e9  # this rank's clock says that a save is long overdue
        if run.manager.save(step):
            saved.append(step)
        time.sleep(0.1)
    run.manager.close()
    return saved


def test_saves_by_wall_time_follow_the_clock_of_rank_0_on_every_rank(tmp_path: Path):
    one, other = run_world(_by_the_clock, 2, tmp_path)
    assert one == other
    assert 1 <= len(one) <= 3
    assert 1 not in one
