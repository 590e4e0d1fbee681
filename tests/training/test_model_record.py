"""A step records its model: another model is refused in one sentence, other settings are noted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from milepost import CheckpointConfig, CheckpointManager, StateMismatchError
from milepost.interop.hf.model import HfModel
from milepost.interop.names.model_sizes import model_args

LLAMA = model_args("llama3", "debugmodel")


def manager(folder: Path, hf: HfModel | None, model: nn.Module | None = None) -> CheckpointManager:
    config = CheckpointConfig(enable=True, interval=1)
    return CheckpointManager(folder, config, model=model or nn.Linear(2, 2), hf=hf)


@pytest.fixture
def saved(memory_path: Path) -> Path:
    run = manager(memory_path / "run", HfModel(name="llama3", flavor="debugmodel", args=LLAMA))
    run.save(1)
    run.close()
    return memory_path / "run"


def test_another_model_is_one_sentence_and_not_a_list_of_keys(saved: Path) -> None:
    other = HfModel(name="qwen3", flavor="0.6B", args=model_args("qwen3", "0.6B"))
    run = manager(saved, other, nn.Sequential(*(nn.Linear(3, 3) for _ in range(50))))
    with pytest.raises(StateMismatchError, match=r"step-1 holds llama3 debugmodel, but this run trains qwen3 0\.6B: "):
        run.load()
    run.close()


def test_other_sizes_of_the_same_model_are_named(saved: Path) -> None:
    other = HfModel(name="llama3", flavor="tiny", args=replace(LLAMA, n_layers=2))
    run = manager(saved, other)
    with pytest.raises(StateMismatchError, match=r"trains llama3 tiny \(n_layers 6 instead of 2\)"):
        run.load()
    run.close()


def test_other_settings_are_a_note_and_no_record_says_nothing(saved: Path) -> None:
    other = HfModel(name="llama3", flavor="debugmodel", args=replace(LLAMA, rope_scaling=None))
    for hf, expected in ((other, ["it was saved with rope_scaling by 8 from 8192 instead of none"]), (None, [])):
        run = manager(saved, hf)
        report = run.load()
        assert report is not None
        assert [note.partition(",")[0] for note in report.notes] == expected
        run.close()
