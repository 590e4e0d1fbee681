"""Hugging Face's Trainer and Accelerate with Milepost: killed and resumed, against a run that was not disturbed."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fsdp_on_cpu import shard_on_cpu
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from milepost import CheckpointConfig
from milepost.errors import ConfigError
from milepost.integrations.transformers import MilepostCallback
from milepost.run import catalog
from milepost.storage import LocalStorage
from milepost.testing.world import run_world

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class KillAt(TrainerCallback):
    """Dies at the beginning of a step, with whatever is being written."""

    def __init__(self, step: int):
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_in(folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.2, **sizes))
    settings = {"max_steps": 14, "save_steps": 3, "logging_steps": 2, "learning_rate": 1e-2, "warmup_steps": 4}
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **(settings | options),
    )
    return Trainer(model, args, train_dataset=Samples(), eval_dataset=Samples())


def digest(state: Any) -> str:
    """A digest of all tensors and numbers of a nested state."""
    found = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            found.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else b"")
            found.update(repr(value.item() if not value.dim() else tuple(value.shape)).encode())
        elif isinstance(value, dict):
            for key in value:
                found.update(repr(key).encode())
                walk(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        else:
            found.update(repr(value).encode())

    walk(state)
    return found.hexdigest()


def outcome(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    return {
        "losses": [
            (entry["step"], entry["loss"], entry["learning_rate"]) for entry in state.log_history if "loss" in entry
        ],
        "model": digest(trainer.model.state_dict()),
        "optimizer": digest(trainer.optimizer.state_dict()),
        "scheduler": digest(trainer.lr_scheduler.state_dict()),
        "rng": digest(torch.get_rng_state()),
        "step": state.global_step,
    }


def train(
    folder: Path, kill_at: int = 0, mode: str = "async", is_sharded: bool = False, **options: Any
) -> dict[str, Any]:
    trainer = trainer_in(folder, **options)
    if is_sharded:
        shard_on_cpu(trainer.accelerator, "LlamaDecoderLayer")
        trainer.is_fsdp_enabled = True
    config = CheckpointConfig(enable=True, async_mode=mode, keep_latest_k=0)  # type: ignore[arg-type]
    MilepostCallback(trainer, config=config)
    if kill_at:
        trainer.add_callback(KillAt(kill_at))
    trainer.train(resume_from_checkpoint=True)
    assert is_sharded == all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return outcome(trainer)


class Begun(TrainerCallback):
    """Records the state that a run begins with."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.found: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = self.found or outcome(self._trainer)


def loaded_when_sharded(folder: Path) -> dict[str, Any]:
    trainer = trainer_in(folder, max_steps=15)
    shard_on_cpu(trainer.accelerator, "LlamaDecoderLayer")
    trainer.is_fsdp_enabled = True
    MilepostCallback(trainer, config=CheckpointConfig(enable=True))
    begun = Begun(trainer)
    trainer.add_callback(begun)
    trainer.train(resume_from_checkpoint=True)
    return {name: begun.found[name] for name in ("model", "optimizer", "scheduler", "step")}


def steps_in(folder: Path) -> dict[int, catalog.StepEntry]:
    return {entry.step: entry for entry in catalog.scan(LocalStorage(str(folder)), "milepost")}


@pytest.mark.parametrize(("world_size", "mode"), [(1, "disabled"), (1, "async_with_pinned_mem"), (2, "async")])
def test_a_killed_run_resumes_to_the_last_bit(tmp_path: Path, world_size: int, mode: str) -> None:
    undisturbed = run_world(train, world_size, tmp_path / "whole", 0, mode)
    for kill_at in (4, 11):  # in mid-epoch, and at the end of the second
        run_world(train, world_size, tmp_path / "killed", kill_at, mode, allow_death=True)
    resumed = run_world(train, world_size, tmp_path / "killed", 0, mode)
    assert resumed == undisturbed
    assert undisturbed[0]["step"] == 14
    assert not list((tmp_path / "killed").glob("checkpoint-*")), "the Trainer writes none of its own"
    assert sorted(steps_in(tmp_path / "killed")) == [3, 6, 9, 12, 14]


def train_for_the_best(folder: Path) -> dict[str, Any]:
    """Rising losses after a while: the learning rate is absurd."""
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = trainer_in(folder, learning_rate=0.5, lr_scheduler_type="constant", **options)
    MilepostCallback(trainer)
    trainer.train(resume_from_checkpoint=True)
    loss = trainer.evaluate()["eval_loss"]
    return {"best": trainer.state.best_global_step, "metric": trainer.state.best_metric, "loss": loss}


@pytest.mark.slow
def test_a_killed_run_under_fsdp2_resumes_to_the_last_bit_and_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    undisturbed = run_world(train, 2, tmp_path / "whole", 0, "async", True)
    run_world(train, 2, tmp_path / "killed", 8, "async", True, allow_death=True)
    saved = {name: undisturbed[0][name] for name in ("model", "optimizer", "scheduler", "step")}
    for world_size in (1, 4):  # a step has other samples there: the loaded state is the saved one
        folder = shutil.copytree(tmp_path / "whole", tmp_path / f"on-{world_size}")
        assert run_world(loaded_when_sharded, world_size, folder) == [saved] * world_size
    assert run_world(train, 2, tmp_path / "killed", 0, "async", True) == undisturbed


def test_the_best_step_is_kept_and_loaded_at_the_end(tmp_path: Path) -> None:
    (found,) = run_world(train_for_the_best, 1, tmp_path)
    steps = steps_in(tmp_path)
    assert set(steps) == {found["best"], 14}, "save_total_limit = 1: the newest, and the best beside it"
    assert found["best"] < 14
    assert steps[found["best"]].metrics["eval_loss"] == found["metric"] == found["loss"]


def resume_past_damage(folder: Path) -> dict[str, Any]:
    trainer = trainer_in(folder)
    callback = MilepostCallback(trainer)
    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    trainer.add_callback(Watch())
    trainer.train(resume_from_checkpoint=True)
    assert callback is not None
    return {**outcome(trainer), "first": seen[0]}


def test_a_damaged_or_incomplete_step_is_passed_over(tmp_path: Path) -> None:
    (undisturbed,) = run_world(train, 1, tmp_path / "whole")
    run_world(train, 1, tmp_path / "killed", 13, "disabled", allow_death=True)
    folder = tmp_path / "killed/milepost"
    (folder / "step-12/milepost.json").unlink()
    (folder / "step-12/.metadata").unlink()
    file = folder / "step-9/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    (resumed,) = run_world(resume_past_damage, 1, tmp_path / "killed")
    assert resumed.pop("first") == 6
    assert resumed == undisturbed


def load_named(folder: Path) -> int:
    trainer = trainer_in(folder, max_steps=7)
    MilepostCallback(trainer)
    trainer.train(resume_from_checkpoint=str(folder / "milepost/step-6"))
    return len([entry for entry in trainer.state.log_history if "loss" in entry])


def test_a_named_step_is_loaded_and_no_other(tmp_path: Path) -> None:
    run_world(train, 1, tmp_path)
    assert run_world(load_named, 1, tmp_path) == [3]
    assert steps_in(tmp_path)[7].is_usable


def train_anew(folder: Path) -> tuple[int, list[str]]:
    logged: list[str] = []
    logging.getLogger("milepost").addFilter(lambda record: logged.append(record.getMessage()) or True)
    trainer = trainer_in(folder, max_steps=3)
    MilepostCallback(trainer)
    trainer.train()
    return trainer.state.global_step, [text for text in logged if "is a new run" in text]


def test_a_new_run_over_the_steps_of_another_is_warned_of(tmp_path: Path) -> None:
    assert run_world(train_anew, 1, tmp_path) == [(3, [])]
    ((step, logged),) = run_world(train_anew, 1, tmp_path)
    assert step == 3
    assert len(logged) == 1
    assert "resume_from_checkpoint=True" in logged[0]


def go_on_from_theirs(folder: Path) -> tuple[int, list[str]]:
    trainer_in(folder / "theirs", max_steps=2, save_strategy="steps", save_steps=2).train()
    logged: list[str] = []
    logging.getLogger("milepost").addFilter(lambda record: logged.append(record.getMessage()) or True)
    trainer = trainer_in(folder, max_steps=3)
    MilepostCallback(trainer)
    trainer.train(resume_from_checkpoint=folder / "theirs" / "checkpoint-2")
    return len([e for e in trainer.state.log_history if "loss" in e]), [
        text for text in logged if "holds steps up" in text
    ]


def test_a_run_that_continues_from_the_trainers_own_checkpoint_is_not_called_new(tmp_path: Path) -> None:
    run_world(train_anew, 1, tmp_path)
    ((_, logged),) = run_world(go_on_from_theirs, 1, tmp_path)
    assert len(logged) == 1
    assert "this run resumes from the Trainer's own" in logged[0]
    assert "checkpoint-2" in logged[0]


def begin_with_theirs(folder: Path, steps: int) -> int:
    trainer = trainer_in(folder, max_steps=steps)
    MilepostCallback(trainer)
    begun = Begun(trainer)
    trainer.add_callback(begun)
    trainer.train(resume_from_checkpoint=True)
    return int(begun.found["step"])


def train_without(folder: Path) -> None:
    trainer_in(folder, max_steps=2, save_steps=2).train()


def test_where_there_is_no_step_the_newest_of_the_trainers_own_is_resumed_from(tmp_path: Path) -> None:
    run_world(train_without, 1, tmp_path)
    assert run_world(begin_with_theirs, 1, tmp_path, 3) == [2], "not from scratch"
    assert sorted(steps_in(tmp_path)) == [3]
    assert run_world(begin_with_theirs, 1, tmp_path, 4) == [3], "from ours, now that one exists"


def test_arguments_that_can_not_be_honoured_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_only_model"):
        MilepostCallback(trainer_in(tmp_path, save_only_model=True))


class FailAt(TrainerCallback):
    """Raises an error, as Ctrl-C or a user's code does, and leaves the process alive."""

    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def fail_and_resume(folder: Path) -> tuple[dict[str, Any], list[int]]:
    failing = trainer_in(folder)
    MilepostCallback(failing)
    failing.add_callback(FailAt(8))
    with pytest.raises(KeyboardInterrupt):
        failing.train()
    trainer = trainer_in(folder)
    MilepostCallback(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert failing.state.global_step == 8  # it is still there, as in a notebook
    return outcome(trainer), sorted(steps_in(folder))


def test_after_an_error_another_trainer_of_the_process_resumes(tmp_path: Path) -> None:
    undisturbed = run_world(train, 1, tmp_path / "whole")
    (found,) = run_world(fail_and_resume, 1, tmp_path / "failed")
    assert found == (undisturbed[0], [3, 6, 9, 12, 14])


def train_with_hf_files(folder: Path) -> list[str]:
    trainer = trainer_in(folder, max_steps=6)
    MilepostCallback(trainer, config=CheckpointConfig(hf_interval=6))
    trainer.train()
    found = LlamaForCausalLM.from_pretrained(folder / "milepost" / "hf" / "step-6").state_dict()
    assert digest(found) == digest(trainer.model.state_dict())
    return sorted(path.name for path in (folder / "milepost" / "hf").iterdir())


def test_hugging_face_files_are_written_beside_the_steps(tmp_path: Path) -> None:
    assert run_world(train_with_hf_files, 1, tmp_path) == [["step-6"]]


def test_mistakes_in_the_use_of_the_callback_are_named(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    with pytest.raises(ConfigError, match="expected a transformers Trainer, found LlamaForCausalLM"):
        MilepostCallback(trainer.model)
    for options in ({"enable": False}, {"last_save_in_hf": True}):
        with pytest.raises(ConfigError, match=r"leave the callback out|trainer.save_model"):
            MilepostCallback(trainer, config=CheckpointConfig(**options))
    MilepostCallback(trainer)
    with pytest.raises(ConfigError, match="has a MilepostCallback already"):
        MilepostCallback(trainer)
    with pytest.raises(ConfigError, match=r"is the folder of the steps: give one of them, such as .*/milepost/step-10"):
        trainer.train(resume_from_checkpoint=tmp_path / "milepost")
