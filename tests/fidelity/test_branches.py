"""Returning to older steps: a run whose last branch is killed and restarted equals the undisturbed run.

Each start is a process of its own, which a script might start again with the same command.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same import assert_same
from torch import nn

from milepost import CheckpointConfig, CheckpointManager
from milepost.cli.main import main
from milepost.errors import CheckpointDamagedError, ConfigError, SaveError
from milepost.run import catalog, checkpoint_record, marks
from milepost.run.branches import History
from milepost.run.catalog import StepEntry
from milepost.storage import LocalStorage
from milepost.training import signals

MODES = ("disabled", "async", "async_with_pinned_mem")


class Progress:
    def __init__(self) -> None:
        self.step, self.losses = 0, torch.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.losses = state["step"], state["losses"]


class Loop:
    """A training script: ``lr`` is what its user changed before going back."""

    def __init__(self, folder: Path, *, lr: float = 0.01, **options: Any):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.lr = lr
        self.progress = Progress()
        config = CheckpointConfig(**{"enable": True, "interval": 2, "last_save_model_only": False, **options})
        self.manager = CheckpointManager(
            folder, config, model=self.model, optimizer=self.optimizer, train_state=self.progress
        )

    def load(self, num_steps: int | None = None) -> int | None:
        report = self.manager.load(num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        return report.step if report is not None else None

    def step(self) -> float:
        loss = self.model(torch.randn(3, 4) + random.random() + float(np.random.rand())).square().mean()
        loss.backward()
        self.manager.maybe_wait_for_staging()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.progress.losses = torch.cat([self.progress.losses, loss.detach().reshape(1)])
        return loss.item()

    def train(self, stop: int, *, is_last: bool = True) -> None:
        for step in range(self.progress.step + 1, stop + 1):
            loss = self.step()
            self.manager.save(step, last_step=is_last and step == stop, metrics={"loss": loss})

    def everything(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": self.progress.state_dict(),
            "draws": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
        }


def start(
    folder: Path, stop: int, *, kill: bool = False, is_last: bool = True, **options: Any
) -> tuple[int | None, dict[str, Any]]:
    """Run a process that loads, trains to ``stop`` and ends or is killed; return its resumed step and final state."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            loop = Loop(folder, **options)
            resumed = loop.load()
            loop.train(stop, is_last=is_last)
            loop.manager.maybe_wait_for_saving()
            with os.fdopen(theirs, "wb") as pipe:
                pickle.dump((resumed, loop.everything()), pipe)
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            loop.manager.close()
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        found: tuple[int | None, dict[str, Any]] = pickle.load(pipe)
    os.waitpid(pid, 0)
    return found


def scan(folder: Path) -> list[StepEntry]:
    return catalog.scan(LocalStorage(folder.parent), folder.name)


def steps(folder: Path) -> list[int]:
    return [entry.step for entry in scan(folder)]


def flip_a_bit(step: Path) -> None:
    manifest = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name)
    (shard,) = manifest.tensors["0.weight"].shards
    assert shard.data_offset is not None
    data = bytearray((step / shard.file).read_bytes())
    data[shard.data_offset] ^= 1
    (step / shard.file).write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


@pytest.fixture
def opened() -> Iterator[Callable[..., Loop]]:
    loops: list[Loop] = []

    def open_loop(folder: Path, **options: Any) -> Loop:
        loops.append(Loop(folder, **options))
        return loops[-1]

    yield open_loop
    for loop in loops:
        loop.manager.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_that_is_killed_and_started_again_is_the_undisturbed_one(folder: Path, mode: str) -> None:
    """Ten steps, back to the fourth with another learning rate, killed twice, the same command each time."""
    start(folder, 10, async_mode=mode, keep_latest_k=0)
    untouched = folder.with_name("untouched")
    shutil.copytree(folder, untouched)
    _, expected = start(untouched, 9, load_step=4, lr=0.05, interval=100)

    back = {"load_step": 4, "lr": 0.05, "async_mode": mode, "keep_latest_k": 2}
    killed = [start(folder, stop, kill=True, **back) for stop in (6, 7)]
    assert [resumed for resumed, _ in killed] == [4, 6]
    assert steps(folder) == [6, 7]  # all of the abandoned branch has gone, but nothing of this one's newest
    resumed, found = start(folder, 9, **back)
    assert resumed == 7
    assert_same(found, expected)
    assert start(folder, 9)[0] == 9  # without load_step, too


def test_a_start_that_dies_before_it_has_saved_goes_back_again(folder: Path) -> None:
    start(folder, 6)
    assert [start(folder, 3, load_step=2, kill=True, is_last=False)[0] for _ in range(2)] == [2, 2]
    entries = scan(folder)
    assert {entry.step: entry.state for entry in entries if entry.step != 3} == dict.fromkeys((2, 4, 6), "committed")


def test_an_abandoned_branch_is_shown_and_resumed_only_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(folder, 6)
    start(folder, 3, load_step=2)
    assert main(["ls", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "abandoned branch (ended at step 6)" in line] == ["4", "6"]
    assert "loss 0." in lines[1]
    assert main(["prune", str(folder), "--keep-latest", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("delete    abandoned branch (ended at step 6)") == 2
    assert start(folder, 3)[0] == 3
    assert start(folder, 7, load_step=6)[0] == 6
    assert start(folder, 7)[0] == 7
    assert [entry.step for entry in History.of(scan(folder)).abandoned] == [3]


def test_saving_a_number_of_an_abandoned_branch_replaces_it(folder: Path) -> None:
    start(folder, 6)
    marks.pin(LocalStorage(folder.parent), folder.name, 6)
    old = {entry.step: entry.save_id for entry in scan(folder)}
    _, found = start(folder, 6, load_step=2, lr=0.05)
    new = {entry.step: entry.save_id for entry in scan(folder)}
    assert old.keys() == new.keys()
    assert [step for step in old if old[step] == new[step]] == [2]
    assert History.of(scan(folder)).abandoned == ()
    # What was pinned is the old step 6: it is kept, under another name, and loads from there.
    (aside,) = [path for path in folder.iterdir() if path.name.startswith("step-6.aside-")]
    assert not any(entry.pinned for entry in scan(folder))
    _, again = start(folder.with_name("fresh"), 0, initial_load_path=str(aside))
    with pytest.raises(AssertionError):
        assert_same(again["model"], found["model"])


def test_a_damaged_end_falls_back_on_its_own_branch(folder: Path) -> None:
    start(folder, 8, keep_latest_k=0)
    start(folder, 5, load_step=2, interval=1, keep_latest_k=0)
    flip_a_bit(folder / "step-5")
    assert start(folder, 5, kill=True, is_last=False)[0] == 4
    for step in (2, 3, 4):
        flip_a_bit(folder / f"step-{step}")
    loop = Loop(folder)
    with pytest.raises(
        CheckpointDamagedError, match=r"every step of the branch.*or resume steps 6, 8, of an abandoned"
    ):
        loop.load()
    loop.manager.close()


def test_two_runs_in_turn_in_one_folder(folder: Path, opened: Callable[..., Loop]) -> None:
    """The second run never loads: its steps are resumed, and those of the first are neither deleted nor replaced."""
    start(folder, 8, keep_latest_k=3)
    first = {entry.step: entry.save_id for entry in scan(folder)}
    loop = opened(folder, keep_latest_k=3)
    loop.train(4)
    assert steps(folder) == [2, 4, 6, 8]
    assert {entry.step for entry in scan(folder) if first.get(entry.step) == entry.save_id} == {6, 8}
    (aside,) = folder.glob("step-4.aside-*")
    assert first[4] in (aside / "milepost.json").read_text()
    loop.manager.close()
    assert start(folder, 5, keep_latest_k=3)[0] == 4


def test_a_copied_and_a_renamed_folder_keep_their_history(folder: Path) -> None:
    start(folder, 6)
    start(folder, 3, load_step=2)
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copy)
    folder.rename(folder.with_name("renamed"))
    for name in ("copy", "renamed"):
        place = folder.with_name(name)
        assert start(place, 4, load_step=2)[0] == 3
        assert [entry.step for entry in History.of(scan(place)).current] == [2, 3, 4]


# ---- the loop of the README ----


def readme_loop(folder: Path, num_steps: int, calls: list[int], **options: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    config = CheckpointConfig(enable=True, interval=20, **options)
    manager = CheckpointManager(folder, config, model=model, optimizer=optimizer)
    report = manager.load(num_steps)
    for step in range(report.step + 1 if report and report.step else 1, num_steps + 1):
        calls.append(step)
        manager.save(step, last_step=step == num_steps)
    manager.close()


@pytest.mark.parametrize("model_only", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_finished_run_is_recognised_and_saves_nothing_twice(folder: Path, mode: str, model_only: bool) -> None:
    calls: list[int] = []
    options = {"async_mode": mode, "last_save_model_only": model_only}
    readme_loop(folder, 50, calls, **options)
    before = {entry.step: entry.save_id for entry in scan(folder)}
    assert (len(calls), list(before)) == (50, [20, 40, 50])
    readme_loop(folder, 50, calls, **options)
    assert len(calls) == 50
    assert {entry.step: entry.save_id for entry in scan(folder)} == before
    readme_loop(folder, 60, calls, **options)
    assert calls[50] == (41 if model_only else 51)
    assert steps(folder) == [20, 40, 50, 60]
    assert History.of(scan(folder)).abandoned == ()


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_load_straight_after_a_save_waits_for_it(folder: Path, mode: str, opened: Callable[..., Loop]) -> None:
    loop = opened(folder, async_mode=mode, interval=1)
    for step in (1, 2, 3):
        loop.step()
        assert loop.manager.save(step)
        assert loop.load() == step


def test_a_load_raises_the_failure_of_the_save_before_once(folder: Path, opened: Callable[..., Loop]) -> None:
    loop = opened(folder, async_mode="async", interval=1)
    loop.step()
    loop.manager.save(1)
    loop.manager.maybe_wait_for_saving()
    loop.step()
    loop.manager.save(2)
    folder.rename(folder.with_name("moved"))  # in one act: a writer that makes files meanwhile can't disturb it
    folder.write_text("in its place")
    with pytest.raises(SaveError):
        loop.manager.load()
    folder.unlink()
    assert loop.manager.load() is None


# ---- metrics ----


def test_the_best_steps_are_kept_by_value(folder: Path, opened: Callable[..., Loop]) -> None:
    values = {1: 5.0, 2: 0.5, 3: float("nan"), 4: 4.0, 5: 0.25, 6: float("inf"), 7: 3.0, 8: 2.0}
    loop = opened(folder, interval=1, keep_latest_k=1, keep_best_k=2, metric="loss")
    for step, value in values.items():
        loop.manager.save(step, metrics={"loss": torch.tensor(value), "tokens": np.int64(step)})
    assert steps(folder) == [2, 5, 8]
    assert dict(scan(folder)[0].metrics) == {"loss": 0.5, "tokens": 2.0}


@pytest.mark.parametrize("metrics", [{"loss": "0.5"}, {"loss": None}, {7: 0.5}, {"loss": torch.ones(2)}])
def test_an_invalid_metric_fails_the_save_and_not_the_run(
    folder: Path, opened: Callable[..., Loop], metrics: dict[Any, Any]
) -> None:
    loop = opened(folder, interval=1)
    with pytest.raises(ConfigError, match=r"metrics\[.*must be a number under a name"):
        loop.manager.save(1, metrics=metrics)
    assert loop.manager.save(2, metrics={"loss": 0.5})
    assert steps(folder) == [2]


def test_a_metric_that_is_never_recorded_is_warned_of_once(
    folder: Path, opened: Callable[..., Loop], caplog: pytest.LogCaptureFixture
) -> None:
    loop = opened(folder, interval=1, keep_best_k=1, metric="los")
    for step in (1, 2, 3):
        loop.manager.save(step, metrics={"loss": 0.5})
    assert caplog.text.count("checkpoint.metric = los is not among the metrics of a save: loss") == 1


# ---- requests by file ----


def test_files_ask_as_signals_do_and_are_consumed_once(
    folder: Path, opened: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(signals, "LOOK_EVERY_S", 0.0)
    caplog.set_level("INFO", "milepost")
    loop = opened(folder, interval=100)
    (folder / "SAVE").touch()
    assert not loop.manager.save(1)  # no signal is listened to
    loop.manager.listen_to_signals()
    assert loop.manager.save(2)
    assert not (folder / "SAVE").exists()
    assert not loop.manager.save(3)
    assert "saved step 2 (file SAVE, full)" in caplog.text
    (folder / "STOP").write_text("please")
    assert loop.manager.save(4)
    assert (loop.manager.stop_requested, loop.manager.stop_reason) == (True, "file STOP")
    assert not (folder / "STOP").exists()
    assert steps(folder) == [2, 4]


def test_a_request_is_not_missed_where_every_step_is_saved(
    folder: Path, opened: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "LOOK_EVERY_S", 0.0)
    loop = opened(folder, interval=1)
    loop.manager.listen_to_signals()
    assert loop.manager.save(1)
    os.kill(os.getpid(), signal.SIGUSR1)
    (folder / "STOP").touch()
    assert loop.manager.save(2)
    assert loop.manager.stop_requested


def test_a_request_that_cannot_be_removed_is_not_acted_on(
    folder: Path, opened: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(signals, "LOOK_EVERY_S", 0.0)
    loop = opened(folder, interval=100)
    loop.manager.listen_to_signals()
    (folder / "STOP").mkdir()
    assert not loop.manager.save(1)
    assert not loop.manager.save(2)
    assert caplog.text.count("the file STOP is ignored, because it can't be removed") == 1
