"""Ordinary loops around ``CheckpointManager`` in all modes: what forward changes, workers, endings, waits."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager, SaveError
from milepost.collective.threads import map_in_threads
from milepost.errors import StorageError
from milepost.saving import writer_link
from milepost.storage import LocalStorage

MODES = ("disabled", "async", "async_with_pinned_mem")


def manager_of(folder: Path | str, mode: str, model: nn.Module | None = None, **options: Any) -> CheckpointManager:
    options = {"enable": True, "interval": 1, "last_save_model_only": False, **options}
    config = CheckpointConfig(async_mode=mode, **options)  # type: ignore[arg-type]
    return CheckpointManager(folder, config, model=model or nn.Linear(64, 64))


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("step-"))


def disk_full(self: LocalStorage, path: str, nbytes: int, **_: object) -> Any:
    raise StorageError(f"no space left on device: {path}", operation="open_write", path=path, errno=28)


def refuse(self: LocalStorage, path: str, **options: Any) -> Any:
    raise StorageError("read-only file system", operation="make folder", path=path, errno=30)


# ---- what forward changes ----


class Counting(nn.Module):
    """Batch norm, and what every forward changes: a large buffer, and a parameter without gradient (a codebook)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 1))
        self.register_buffer("seen", torch.zeros(1 << 20))
        self.codes = nn.Parameter(torch.zeros(1 << 20), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        with torch.no_grad():
            self.codes.add_(1)
        return self.body(x)


def test_buffers_that_forward_changes_are_saved_as_they_were_at_the_call(tmp_path: Path) -> None:
    model = Counting()
    optimizer = torch.optim.AdamW(model.parameters())
    config = CheckpointConfig(enable=True, interval=1, async_mode="async_with_pinned_mem", last_save_model_only=False)
    expected: dict[int, dict[str, torch.Tensor]] = {}
    with CheckpointManager(tmp_path / "run", config, model=model, optimizer=optimizer) as manager:
        for step in range(1, 5):
            model(torch.randn(16, 32)).mean().backward()
            manager.maybe_wait_for_staging()
            optimizer.step()
            optimizer.zero_grad()
            expected[step] = {key: value.clone() for key, value in model.state_dict().items()}
            manager.save(step)
    for step, state in expected.items():
        into = {key: torch.zeros_like(value) for key, value in state.items()}
        milepost.load(tmp_path / "run" / f"step-{step}", into, allow_unexpected=["optimizer", "rng"])
        assert all(torch.equal(into[key], state[key]) for key in state), step


def test_the_same_for_a_module_given_to_async_save(tmp_path: Path) -> None:
    model = Counting()
    handle = milepost.async_save(tmp_path / "ck", {"model": model}, mode="async_with_pinned_mem")
    model(torch.randn(16, 32))
    handle.staged(60)
    handle.committed(60)
    other = Counting()
    milepost.load(tmp_path / "ck", {"model": other})
    assert other.seen.max() == other.codes.max() == 0
    assert model.seen.max() == model.codes.max() == 1


# ---- waiting and closing ----


@pytest.mark.parametrize("mode", MODES)
def test_maybe_wait_for_saving_returns_when_the_save_is_committed(tmp_path: Path, mode: str) -> None:
    with manager_of(tmp_path / "run", mode) as manager:
        manager.maybe_wait_for_saving()
        manager.save(1)
        manager.maybe_wait_for_saving()
        assert steps_in(tmp_path / "run") == ["step-1"]
        assert [event.step for event in manager.take_events()] == [1]


def test_maybe_wait_for_saving_raises_the_failure_once(tmp_path: Path) -> None:
    with manager_of(tmp_path / "run", "async") as manager:
        with mock.patch.object(LocalStorage, "open_write", disk_full):
            manager.save(1)
            with pytest.raises(SaveError, match="no space left"):
                manager.maybe_wait_for_saving()
        manager.maybe_wait_for_saving()
        manager.save(2)
    assert steps_in(tmp_path / "run") == ["step-2"]


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_manager_refuses_to_save(tmp_path: Path, mode: str) -> None:
    manager = manager_of(tmp_path / "run", mode)
    manager.save(1)
    manager.close()
    manager.close()
    with pytest.raises(SaveError, match="step 2 was not saved: this CheckpointManager is closed"):
        manager.save(2)
    with manager_of(tmp_path / "run", "disabled", enable=False) as disabled:
        assert not disabled.save(1)
    with pytest.raises(SaveError, match="closed"):
        disabled.save(1)
    assert steps_in(tmp_path / "run") == ["step-1"]


@pytest.mark.parametrize("mode", MODES)
def test_an_error_in_the_block_is_raised_as_it_is_and_what_was_staged_is_committed(tmp_path: Path, mode: str) -> None:
    manager = manager_of(tmp_path / "run", mode)

    def train() -> None:
        with manager:
            manager.save(1)
            manager.maybe_wait_for_staging()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert steps_in(tmp_path / "run") == ["step-1"]
    manager_of(tmp_path / "run", "disabled").close()  # the lock is free


def events_in(folder: Path) -> list[tuple[str, int]]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [(line.get("event", "saved"), line["step"]) for line in lines]


@pytest.mark.parametrize("mode", MODES)
def test_the_last_save_is_in_the_events_however_the_loop_ends(tmp_path: Path, mode: str) -> None:
    def run(folder: Path, end: str) -> list[tuple[str, int]]:
        with contextlib.suppress(ZeroDivisionError):
            if end == "error":
                with manager_of(folder, mode) as manager:
                    manager.save(1)
                    raise ZeroDivisionError
            manager = manager_of(folder, mode)
            manager.save(1)
            del manager
            gc.collect()
        deadline = time.monotonic() + 20
        while not (folder / "events.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return events_in(folder)

    assert run(tmp_path / "error", "error") == [("saved", 1)]
    assert run(tmp_path / "dropped", "dropped") == [("saved", 1)]
    script = f"""
from pathlib import Path
from torch import nn
from milepost import CheckpointConfig, CheckpointManager
config = CheckpointConfig(interval=1, async_mode={mode!r})
manager = CheckpointManager({str(tmp_path / "ended")!r}, config, model=nn.Linear(64, 64))
manager.save(1)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert events_in(tmp_path / "ended") == [("saved", 1)]


@pytest.mark.parametrize("mode", MODES)
def test_loading_waits_for_the_save_that_runs(tmp_path: Path, mode: str) -> None:
    with manager_of(tmp_path / "run", mode) as manager:
        manager.save(1)
        manager.maybe_wait_for_staging()
        report = manager.load()
        assert report is not None
        assert report.resumed_step == 1


def test_live_workers_of_a_data_loader_do_not_hold_up_the_end(tmp_path: Path) -> None:
    data = torch.utils.data.DataLoader(list(range(64)), num_workers=2, persistent_workers=True)  # type: ignore[var-annotated,arg-type]
    with manager_of(tmp_path / "run", "async_with_pinned_mem") as manager:
        batches = iter(data)
        next(batches)
        manager.save(1)
        pid = manager._saves.saver.writer_pid  # type: ignore[union-attr]
        started = time.monotonic()
    assert time.monotonic() - started < 15
    assert not Path(f"/proc/{pid}").exists()
    assert steps_in(tmp_path / "run") == ["step-1"]
    next(batches)


def test_a_killed_trainer_with_a_child_that_lives_is_noticed_by_its_writer(tmp_path: Path) -> None:
    script = f"""
import os, signal, time, torch, milepost
saver_dir = {str(tmp_path)!r}
handle = milepost.async_save(saver_dir + "/ck", {{"w": torch.ones(3)}}, mode="async_with_pinned_mem")
handle.committed()
from milepost.saving.async_save import _savers
print(next(iter(_savers.values())).writer_pid, flush=True)
pid = os.fork()
if pid == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    writer, child = map(int, done.stdout.split())
    try:
        deadline = time.monotonic() + 20
        while Path(f"/proc/{writer}/cmdline").exists() and time.monotonic() < deadline:
            if Path(f"/proc/{writer}/stat").read_text().split()[2] == "Z":
                break
            time.sleep(0.05)
        assert time.monotonic() < deadline
    finally:
        os.kill(child, signal.SIGKILL)


# ---- failures ----


@pytest.mark.parametrize("mode", MODES)
def test_warn_continues_when_a_save_can_not_even_begin(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts once, and the next save is tried."""
    with manager_of(tmp_path / "run", mode, on_save_error="warn") as manager:
        assert manager.save(1)
        with mock.patch.object(LocalStorage, "make_folder", refuse):
            assert not manager.save(2)
            assert not manager.save(3)
        assert manager.save(4)
    assert caplog.text.count("a save failed, training continues") == 2
    assert steps_in(tmp_path / "run") == ["step-1", "step-4"]


def test_a_failure_while_loading_is_no_save_error(tmp_path: Path) -> None:
    with manager_of(tmp_path / "run", "disabled") as manager:
        manager.save(1)
        for place in ("milepost.run.catalog.scan", "milepost.training.resume.choose"):
            with mock.patch(place, side_effect=ZeroDivisionError("on purpose")):
                with pytest.raises(milepost.MilepostError, match="on purpose") as caught:
                    manager.load()
                assert not isinstance(caught.value, SaveError)


def test_without_a_spare_thread_a_save_is_made_all_the_same(tmp_path: Path) -> None:
    for mode in MODES:
        with manager_of(tmp_path / mode, mode) as manager:
            error = RuntimeError("can't start new thread")
            with mock.patch("threading.Thread.start", side_effect=error):
                manager.save(1)
        assert steps_in(tmp_path / mode) == ["step-1"]


# ---- the writer process ----


def test_a_module_in_the_working_directory_does_not_kill_the_writer(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("json", "logging", "struct"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    with manager_of(tmp_path / "run", "async_with_pinned_mem") as manager:
        manager.save(1)
    assert steps_in(tmp_path / "run") == ["step-1"]


def test_what_the_writer_logs_is_in_the_log_of_the_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="milepost")
    with manager_of(tmp_path / "run", "async_with_pinned_mem", keep_latest_k=1) as manager:
        manager.save(1)
        manager.save(2)
    assert "deleted step-1: no rule keeps it (keep_latest_k = 1)" in caplog.text


KILLED_AFTER_THE_COMMIT = """
import os, signal
from milepost.run import commit
real = commit.publish
def publish(*args, **options):
    real(*args, **options)
    print("something on stderr", file=__import__("sys").stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
commit.publish = publish
"""


def test_a_writer_that_dies_after_the_commit_has_lost_nothing(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    boot = writer_link._BOOT.replace("from milepost", KILLED_AFTER_THE_COMMIT + "from milepost", 1)
    monkeypatch.setattr(writer_link, "_BOOT", boot)
    with manager_of(tmp_path / "run", "async_with_pinned_mem") as manager:
        manager.save(1)
        manager.maybe_wait_for_saving()
        assert steps_in(tmp_path / "run") == ["step-1"]
        assert "died (signal 9)" in caplog.text
        assert "the save is committed" in caplog.text
        assert "printed:\nsomething on stderr" in caplog.text
        assert [event.step for event in manager.take_events()] == [1]


# ---- options ----


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_number_of_io_threads_is_an_option(tmp_path: Path, mode: str) -> None:
    counts = []

    def counting(work: Any, items: Any, num_threads: int, *, name: str) -> Any:
        counts.append(num_threads)
        return map_in_threads(work, items, num_threads, name=name)

    with (
        mock.patch("milepost.saving.writer.map_in_threads", counting),
        mock.patch("milepost.saving.stage.map_in_threads", counting),
        manager_of(tmp_path / "run", mode, num_io_threads=3) as manager,
    ):
        manager.save(1)
    assert set(counts) == {3}
    with pytest.raises(milepost.ConfigError, match=r"checkpoint\.num_io_threads must be at least 1, not 0"):
        CheckpointConfig(num_io_threads=0)


def test_a_file_url_is_decoded(tmp_path: Path) -> None:
    milepost.save(f"file://{tmp_path}/with%20space%25/step-1", {"w": torch.ones(2)})
    assert (tmp_path / "with space%" / "step-1").is_dir()
    with manager_of(f"file://{tmp_path}/run%202", "disabled") as manager:
        manager.save(1)
    assert steps_in(tmp_path / "run 2") == ["step-1"]
    assert LocalStorage(tmp_path).stat("with%20space%25") is None
