"""A rank is killed in a save, without a launcher that ends the others: they don't wait for the time-out."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from milepost import CheckpointConfig, CheckpointManager
from milepost.config import AsyncMode
from milepost.errors import SaveError
from milepost.run import catalog
from milepost.saving import job, peers
from milepost.storage import LocalStorage
from milepost.testing.world import run_world


def _die(*args: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _save(folder: Path, mode: AsyncMode, victim: int) -> None:
    peers.LOOK_S, peers.GRACE_S = 0.1, 0.5
    model = torch.nn.Linear(4, 4)
    manager = CheckpointManager(folder, CheckpointConfig(enable=True, interval=1, async_mode=mode), model=model)
    manager.save(1)
    manager.maybe_wait_for_saving()
    if dist.get_rank() == victim:
        job.sign_off = _die  # its bytes are written
    started = time.monotonic()
    try:
        manager.save(2)
        manager.maybe_wait_for_saving()
    except SaveError as error:
        Path(folder, "error").write_text(f"{time.monotonic() - started:.1f} {error.message}")
    os._exit(0)  # the world's last barrier needs both


@pytest.mark.parametrize(("mode", "victim"), [("disabled", 1), ("async", 1), ("async", 0)])
def test_the_others_notice_and_name_it(memory_path: Path, mode: AsyncMode, victim: int) -> None:
    run_world(_save, 2, memory_path / "run", mode, victim, allow_death=True)
    seconds, _, message = Path(memory_path, "run/error").read_text().partition(" ")
    assert float(seconds) < 30
    assert f"rank {victim} (process " in message
    assert "step-2 is not committed, earlier steps are intact" in message
    entries = catalog.scan(LocalStorage(memory_path), "run")
    assert [entry.step for entry in entries if entry.is_usable] == [1]
