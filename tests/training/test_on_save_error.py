"""``on_save_error``: stop at the first failed save, or warn and stop after several in a row."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost import CheckpointConfig, CheckpointManager, SaveError
from milepost.errors import StorageError
from milepost.storage import LocalStorage


def manager_for(folder: Path, mode: str, on_save_error: str) -> CheckpointManager:
    config = CheckpointConfig(enable=True, interval=1, async_mode=mode, on_save_error=on_save_error)  # type: ignore[arg-type]
    return CheckpointManager(folder, config, model=torch.nn.Linear(64, 64))


def save_twice(manager: CheckpointManager) -> None:
    """The third failure shows at the second call here in the background modes, at the first otherwise."""
    for step in (8, 9):
        manager.save(step)


def wait_for_failure(manager: CheckpointManager) -> None:
    with pytest.raises(SaveError):
        manager.pending.committed(60)


def disk_full(self: LocalStorage, path: str, nbytes: int) -> Any:
    raise StorageError(f"no space left on device: {path}", operation="open_write", path=path, errno=28)


def test_stop_raises_at_once_and_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manager = manager_for(tmp_path / "run", "disabled", "stop")
    manager.save(1)
    monkeypatch.setattr(LocalStorage, "open_write", disk_full)
    with pytest.raises(SaveError, match="no space left"):
        manager.save(2)
    assert [p.name for p in (tmp_path / "run").iterdir() if p.is_dir()] == ["step-1"]
    manager.close()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_warn_continues_and_stops_after_three_failures_in_a_row(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, logger="milepost")
    manager = manager_for(tmp_path / "run", mode, "warn")
    manager.save(1)
    if mode == "async":
        manager.pending.committed(60)  # before the disk is full
    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "open_write", disk_full)
        manager.save(2)
        manager.save(3)  # in the background modes: reports step 2
        if mode == "async":
            wait_for_failure(manager)
    assert "no space left" in caplog.text
    manager.save(4)
    manager.save(5)  # both succeed, so the count starts again
    with monkeypatch.context() as broken:
        if mode == "async":
            manager.pending.committed(60)
        broken.setattr(LocalStorage, "open_write", disk_full)
        manager.save(6)
        manager.save(7)
        with pytest.raises(SaveError, match=r"3 consecutive saves failed; the last: .*no space left"):
            save_twice(manager)
    steps = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir() and p.name.startswith("step-")}
    assert steps == {"step-1", "step-4", "step-5"}
    manager.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(line.get("event", "saved"), line["step"]) for line in lines][:5] == [
        ("saved", 1), ("failed", 2), ("failed", 3), ("saved", 4), ("saved", 5)
    ]  # fmt: skip
    assert {line["step"] for line in lines if line.get("event") == "failed"} >= {2, 3, 6, 7, 8}
    assert all("no space left" in line["error"] for line in lines if "error" in line)


def test_a_resume_and_what_retention_deleted_are_in_the_log(tmp_path: Path) -> None:
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=2)
    for start in (1, 3):
        manager = CheckpointManager(tmp_path, config, model=torch.nn.Linear(2, 2), layout={"data_parallel_shard": 1})
        manager.load()
        for step in (start, start + 1):
            manager.save(step)
        manager.close()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line.get("event", "saved"), line["step"], line.get("deleted")) for line in lines] == [
        ("saved", 1, []), ("saved", 2, []), ("resumed", 2, None), ("saved", 3, ["step-1"]), ("saved", 4, [])
    ]  # fmt: skip
    assert all(line["world_size"] == 1 for line in lines)
