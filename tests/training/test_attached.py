"""Files and values stored with a step: stored, checked, shown, and a tokenizer laid beside exported weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import milepost
from milepost import CheckpointConfig, CheckpointManager, ConfigError, HfModel
from milepost.cli.main import main
from milepost.interop.names.model_sizes import model_args
from milepost.testing.world import run_world
from milepost.train.models import make_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")

SIZES = model_args("llama3", "debugmodel", vocab_size=64)
EXTRA = {"revision": "abc123", "config": {"lr": 0.5, "names": ["a", "b"]}}


def save(folder: Path, files: dict[str, Any], extra: dict[str, Any] = EXTRA) -> None:
    known = HfModel(name="llama3", flavor="debugmodel", args=SIZES)
    model = make_model("llama3", SIZES, 16)
    config = CheckpointConfig(enable=True, interval=1)
    with CheckpointManager(folder, config, model=model, hf=known) as manager:
        assert manager.save(1, files=files, extra=extra)


def test_they_come_back_are_shown_and_a_tokenizer_is_exported(
    memory_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (memory_path / "tokenizer.json").write_text('{"model": "letters"}')
    save(memory_path / "run", {"tokenizer.json": memory_path / "tokenizer.json", "notes.txt": b"mine"})
    kept = milepost.load(memory_path / "run/step-1")["attached"]
    assert kept["files"] == {"tokenizer.json": b'{"model": "letters"}', "notes.txt": b"mine"}
    assert kept["extra"] == EXTRA
    assert main(["inspect", str(memory_path / "run/step-1")]) == 0
    shown = capsys.readouterr().out
    assert "attached.extra.revision" in shown
    assert "abc123" in shown
    assert "attached.files.tokenizer.json" in shown
    assert main(["export", str(memory_path / "run"), str(memory_path / "out")]) == 0
    assert (memory_path / "out/tokenizer.json").read_text() == '{"model": "letters"}'
    assert not (memory_path / "out/notes.txt").exists(), "only what belongs beside weights"


def test_what_is_wrong_with_them_fails_the_save_and_is_named(memory_path: Path) -> None:
    files = {"../up": b"", "gone.json": memory_path / "gone.json"}
    with pytest.raises(ConfigError, match=r"(?s)\.\./up.*gone\.json"):
        save(memory_path, files)


def save_on_two(folder: Path) -> Any:
    rank = torch.distributed.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    with CheckpointManager(folder, CheckpointConfig(enable=True, interval=1), model=model) as manager:
        manager.save(1, files={"rank.txt": str(rank).encode()}, extra={"rank": rank})
    return milepost.load(folder / "step-1")["attached"]


def test_those_of_rank_0_are_stored(memory_path: Path) -> None:
    expected = {"files": {"rank.txt": b"0"}, "extra": {"rank": 0}}
    assert run_world(save_on_two, 2, memory_path) == [expected, expected]
