"""``checkpoint.hf_interval``: Hugging Face folders beside the steps, every n steps, under rules of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import milepost
from milepost import CheckpointConfig, CheckpointManager, HfModel
from milepost.cli.main import main
from milepost.errors import ConfigError, SaveError
from milepost.interop.hf.hub_model import HubModel


def tiny() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def train(folder: Path, steps: range, **options: Any) -> None:
    """Every parameter is the number of the step when it is saved, and changes at once."""
    model = tiny()
    config = CheckpointConfig(interval=2, hf_interval=3, last_save_model_only=False, **options)
    with CheckpointManager(folder, config, model=model, hf=HfModel.of(model)) as manager:
        manager.load()
        for step in steps:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(step)
            manager.save(step)
            manager.maybe_wait_for_staging()


def loaded(folder: Path) -> set[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return {value for parameter in model.parameters() for value in parameter.unique().tolist()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("mode", ["disabled", "async_with_pinned_mem"])
def test_folders_stand_beside_the_steps_and_are_pruned_by_their_own_rules(memory_path: Path, mode: str) -> None:
    tiny().save_pretrained(memory_path / "hf" / "step-1")  # another program's
    (memory_path / "hf" / "notes.txt").write_text("mine")
    train(memory_path, range(1, 13), async_mode=mode, keep_latest_k=3, hf_keep_latest_k=2)
    assert names(memory_path / "hf") == ["notes.txt", "step-1", "step-12", "step-9"]
    assert [name for name in names(memory_path) if name.startswith("step-")] == ["step-10", "step-12", "step-8"]
    assert [loaded(memory_path / "hf" / f"step-{step}") for step in (9, 12)] == [{9.0}, {12.0}]
    assert main(["verify", str(memory_path / "hf" / "step-9")]) == 0


def test_after_going_back_the_folders_of_the_newer_branch_are_kept(memory_path: Path) -> None:
    train(memory_path, range(1, 13), hf_keep_latest_k=2)
    train(memory_path, range(5, 7), hf_keep_latest_k=1, load_step=4)
    assert loaded(memory_path / "hf" / "step-6") == {6.0}
    assert "step-9" not in names(memory_path / "hf")


def test_a_failure_stops_or_warns_as_that_of_a_step(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: HubModel, dtypes: object) -> None:
        raise SaveError("no such form today")

    monkeypatch.setattr(HubModel, "form_of", broken)
    with pytest.raises(SaveError, match="no such form today"):
        train(memory_path / "stop", range(1, 7))
    train(memory_path / "warn", range(1, 7), on_save_error="warn")
    assert [name for name in names(memory_path / "warn") if name.startswith("step-")] == ["step-2", "step-4", "step-6"]
    assert names(memory_path / "warn" / "hf") == []


def test_it_needs_to_know_the_model(memory_path: Path) -> None:
    with pytest.raises(ConfigError, match="hf_interval need the model"):
        CheckpointManager(memory_path, CheckpointConfig(hf_interval=2), model=tiny())
    with pytest.raises(ConfigError, match=r"hf_interval must be 0 \(disabled\) or more"):
        CheckpointConfig(hf_interval=-1)


def test_it_has_a_dtype_of_its_own_beside_full_steps(memory_path: Path) -> None:
    train(memory_path, range(1, 4), export_dtype="bfloat16")
    with milepost.open(memory_path / "hf" / "step-3") as exported, milepost.open(memory_path / "step-2") as step:
        assert {str(exported[key].dtype) for key in exported} == {"bfloat16"}
        assert step["model.norm.weight"].dtype == "float32"
    with pytest.raises(ConfigError, match=r"needs checkpoint.last_save_model_only or checkpoint.hf_interval"):
        CheckpointConfig(export_dtype="bfloat16", last_save_model_only=False)
