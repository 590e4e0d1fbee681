"""A user without the means to send a signal asks the trainer to save, and to stop, by a file in the run's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import milepost
from milepost.cli.main import main
from milepost.run import catalog
from milepost.storage import LocalStorage
from milepost.testing.world import WorldError, run_world
from milepost.train.config import TrainConfig
from milepost.train.loop import Trainer
from milepost.train.options import load_config
from milepost.train.process import show_log
from milepost.train.provenance import git_revision
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
    before = sorted(memory_path.rglob("*.distcp"))
    again = replace(
        config,
        checkpoint=replace(config.checkpoint, exclude_from_loading=("train_state",)),
        training=replace(config.training, steps=12),
    )
    with pytest.raises(WorldError, match=r"train_state restarts at step 0, but .* holds step-4: .*dump_folder"):
        run_world(_train, 1, again, {})
    assert sorted(memory_path.rglob("*.distcp")) == before  # nothing was replaced


def test_a_resume_with_other_data_is_refused_before_anything_is_loaded_and_so_is_one_without_steps_to_train(
    memory_path: Path,
) -> None:
    flags = ["--training.seq_len=16", "--training.local_batch_size=1", "--checkpoint.enable", "--checkpoint.interval=2"]
    flags += [f"--job.dump_folder={memory_path}"]
    assert run_world(_train, 1, load_config([*flags, "--training.steps=3"], 1), {}) == [0]
    other = load_config([*flags, "--training.steps=5", "--training.seq_len=32"], 1)
    with pytest.raises(WorldError, match=r"StateMismatchError: .*seq_len was 16 and is 32.*exclude_from_loading"):
        run_world(_train, 1, other, {})
    start = [f"--checkpoint.initial_load_path={memory_path}/checkpoint/step-2", "--checkpoint.folder=other"]
    start += ["--checkpoint.no_initial_load_model_only", "--training.steps=2"]
    with pytest.raises(WorldError, match=r"ConfigError: training.steps is 2, but in .*step-2 2 steps are done already"):
        run_world(_train, 1, load_config([*flags, *start], 1), {})


def test_options_tokenizer_and_revision_travel_with_each_step(
    memory_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (memory_path / "assets").mkdir()
    (memory_path / "assets/tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (memory_path / "assets/somebody.py").write_text("no part of a tokenizer")
    options = {
        "job.dump_folder": memory_path,
        "job.description": "the fourth try",
        "model.hf_assets_path": memory_path / "assets",
        "training.steps": 1,
        "training.seq_len": 16,
        "training.local_batch_size": 1,
        "checkpoint.enable": "true",
        "checkpoint.last_save_model_only": "false",
    }
    config = load_config([f"--{name}={value}" for name, value in options.items()], 1)
    assert run_world(_train, 1, config, {}) == [0]
    kept = milepost.load(memory_path / "checkpoint/step-1")["attached"]
    assert sorted(kept["files"]) == ["config.toml", "tokenizer_config.json"]
    again = memory_path / "again.toml"
    again.write_bytes(kept["files"]["config.toml"])
    assert load_config([f"--job.config_file={again}"], 1) == replace(
        config, job=replace(config.job, config_file=str(again))
    )
    assert kept["extra"]["description"] == "the fourth try"
    assert kept["extra"].get("git_revision") == git_revision()
    assert main(["inspect", str(memory_path / "checkpoint/step-1")]) == 0
    assert "the fourth try" in capsys.readouterr().out
    assert main(["export", str(memory_path / "checkpoint"), str(memory_path / "out")]) == 0
    assert (memory_path / "out/tokenizer_config.json").read_text() == '{"bos_token": "<s>"}'
