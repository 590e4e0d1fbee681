"""A user without the means to send a signal asks the trainer to save, and to stop, by a file in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milepost.run import catalog
from milepost.storage import LocalStorage
from milepost.testing.world import run_world
from milepost.train.config import TrainConfig
from milepost.train.loop import Trainer
from milepost.train.options import load_config
from milepost.train.process import show_log
from milepost.training import signals


def _train(config: TrainConfig, asked: dict[int, str]) -> int:
    """The exit status of a rank; in the steps of ``asked`` a file of that name is made."""
    show_log()
    signals.LOOK_EVERY_S = 0.0
    trainer = Trainer(config)
    log = trainer.meter.log

    def log_and_ask(figures: Any, **rest: Any) -> None:
        if figures.step in asked:
            Path(trainer.checkpoint_folder, asked[figures.step]).touch()
        log(figures, **rest)

    trainer.meter.log = log_and_ask  # type: ignore[method-assign]
    return trainer.run()


def test_a_file_asks_once_and_ends_the_run_well(memory_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = {
        "job.dump_folder": memory_path,
        "training.steps": 9,
        "training.seq_len": 16,
        "training.local_batch_size": 1,
        "checkpoint.enable": "true",
        "checkpoint.interval": 100,
        "checkpoint.load_step": -1,
    }
    config = load_config([f"--{name}={value}" for name, value in options.items()], 1)
    assert run_world(_train, 1, config, {2: "SAVE", 4: "STOP"}) == [0]
    out = capfd.readouterr().out
    assert "saved step 2 (file SAVE, full)" in out
    assert "stopped by file STOP after step 4; the same command resumes from there" in out
    folder = LocalStorage(memory_path)
    assert [entry.step for entry in catalog.scan(folder, "checkpoint")] == [2, 4]
    assert {entry.name for entry in folder.list("checkpoint")}.isdisjoint(signals.FILES)
    assert run_world(_train, 1, config, {}) == [0]
    out = capfd.readouterr().out
    assert "step-4 (full): 4 steps are done" in out
    assert "saved step 9 (last step, model)" in out
    assert run_world(_train, 1, config, {}) == [0]
    assert "this run is finished" in capfd.readouterr().out
    entries = catalog.scan(folder, "checkpoint")
    assert [sorted(entry.metrics) for entry in entries] == [["loss"]] * 3
