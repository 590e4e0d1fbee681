"""torchtitan 0.3 with Milepost's checkpoint manager, on CPUs: killed, resumed, damaged, and to and from its own.

torchtitan needs packages that don't go with those of the other tests: it has an environment of its own, in which
``make test-integrations`` runs this file.
"""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan", reason="torchtitan is not installed here; make test-integrations has a place for it")

from titan_run import train
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import milepost
from milepost import CheckpointConfig, CheckpointManager, HfModel
from milepost.interop.convert import convert
from milepost.interop.names.model_sizes import model_args
from milepost.interop.options import ConvertOptions
from milepost.run import catalog
from milepost.storage import LocalStorage
from milepost.testing.world import WorldError, run_world
from milepost.train import loop
from milepost.train.loop import TrainState
from milepost.train.models import make_model
from milepost.train.options import load_config

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def run(folder: Path, world_size: int = 1, *, allow_death: bool = False, **options: Any) -> list[dict[str, Any]]:
    return run_world(_run, world_size, str(folder), options, allow_death=allow_death)


def _run(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    return train(folder, **options)


def steps_in(folder: Path) -> dict[int, catalog.StepEntry]:
    return {entry.step: entry for entry in catalog.scan(LocalStorage(str(folder)), "checkpoint")}


def agree(resumed: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> int:
    """Assert that a run ended as the undisturbed one did, to the last bit; the first step that it has trained."""
    for again, whole in zip(resumed, undisturbed, strict=True):
        count = len(again["losses"])
        assert again["losses"] == whole["losses"][len(whole["losses"]) - count :]
        assert {**again, "losses": []} == {**whole, "losses": []}
    return resumed[0]["losses"][0][0]


@pytest.mark.parametrize(
    ("world_size", "tp", "mode"), [(1, 1, "async"), (2, 1, "disabled"), (4, 2, "async_with_pinned_mem")]
)
def test_a_killed_run_resumes_to_the_last_bit(tmp_path: Path, world_size: int, tp: int, mode: str) -> None:
    options = {"tp": tp, "async_mode": mode, "last_save_model_only": False, "steps": 8}
    undisturbed = run(tmp_path / "whole", world_size, **options)
    assert sorted(steps_in(tmp_path / "whole")) == [6, 8], "keep_latest_k = 2, after the last step too"
    for kill_at in (4, 7) if world_size == 1 else (7,):
        run(tmp_path / "killed", world_size, kill_at=kill_at, allow_death=True, **options)
    first = agree(run(tmp_path / "killed", world_size, **options), undisturbed)
    assert first > 1
    assert sorted(steps_in(tmp_path / "killed")) == sorted({first - 1, 6, 8}), "and what the run has resumed from"


def test_a_flipped_bit_is_passed_over(tmp_path: Path) -> None:
    options = {"last_save_model_only": False, "keep_latest_k": 0}
    undisturbed = run(tmp_path, steps=6, **options)
    for step in (4, 6):
        file = tmp_path / f"checkpoint/step-{step}/__0_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert agree(run(tmp_path, steps=6, **options), undisturbed) == 3


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_either_resumes_from_what_the_other_has_written(tmp_path: Path, world_size: int) -> None:
    options = {"last_save_model_only": False, "keep_latest_k": 0}
    undisturbed = run(tmp_path / "whole", world_size, steps=6, **options)
    assert agree(run(tmp_path / "stock", world_size, steps=6, stock=True, **options), undisturbed) == 1
    for first, second in ((True, False), (False, True)):
        folder = tmp_path / f"from-{first}"
        run(folder, world_size, steps=4, stock=first, **options)
        assert agree(run(folder, world_size, steps=6, stock=second, **options), undisturbed) == 5


@pytest.mark.parametrize(("before", "after"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_step_is_whole_on_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    """All but the data loader, whose state torchtitan itself keeps for as many ranks as there were."""
    options = {"last_save_model_only": False, "steps": 4}
    saved, *_ = run(tmp_path, before, **options)
    found = run(tmp_path, after, **options, exclude_from_loading=["dataloader"])
    assert found == [{**saved, "losses": []}] * after
    (trained, *_) = run(tmp_path, after, **(options | {"steps": 5}), exclude_from_loading=["dataloader"])
    assert [step for step, _ in trained["losses"]] == [5]


def resume_in_ours(folder: str, world_size: int) -> dict[str, Any]:
    """The loss of our model on torchtitan's batch of step 5, resumed from its step 4; and its state after that step."""
    sizes = model_args("llama3", "debugmodel", vocab_size=2048)
    model = make_model("llama3", sizes, 32)
    if world_size > 1:
        mesh = init_device_mesh("cpu", (world_size,))
        for part in (*model.layers.values(), model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4)
    train_state = TrainState()
    config = CheckpointConfig(enable=True, load_step=4, exclude_from_loading=("lr_scheduler", "dataloader"))
    known = HfModel(name="llama3", flavor="debugmodel", args=sizes)
    options = {"model": model, "optimizer": optimizer, "hf": known, "train_state": train_state}
    with CheckpointManager(f"{folder}/checkpoint", config, **options) as manager:
        report = manager.load()
    assert report is not None
    batch = [torch.randint(0, 2048, (33,), generator=torch.Generator().manual_seed(seed)) for seed in (8, 9)]
    tokens = torch.stack(batch)
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    weights = {
        name: whole(value).tolist() for name, value in model.state_dict().items() if name.endswith("norm.weight")
    }
    return {"loss": loss.item(), "notes": report.notes, "step": train_state.step, "weights": weights}


def whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.mark.parametrize("world_size", [1, 2])
def test_our_loop_resumes_its_step_optimizer_and_all(tmp_path: Path, world_size: int) -> None:
    (titan,) = run(tmp_path, stock=True, steps=5, last_save_model_only=False, keep_latest_k=0)
    for found in run_world(resume_in_ours, world_size, str(tmp_path), world_size):
        assert found["loss"] == pytest.approx(titan["losses"][4][1], abs=2e-5)
        assert found["step"] == 4
        assert "it has the names of torchtitan-0.3: read under this run's" in found["notes"]
        after = milepost.load(tmp_path / "checkpoint/step-5")
        for name, values in found["weights"].items():  # a new optimizer would move each of them by its rate
            assert values == pytest.approx(after[name].tolist(), abs=2e-5), name


def train_ours(folder: str, steps: int, exclude: str) -> list[float]:
    argv = {
        "job.dump_folder": folder,
        "training.steps": steps,
        "training.seq_len": 32,
        "training.local_batch_size": 2,
        "training.dataset_path": f"{folder}/text.txt",
        "model.hf_assets_path": f"{folder}/assets",
        "lr_scheduler.warmup_steps": 2,
        "checkpoint.enable": "true",
        "checkpoint.interval": 2,
        "checkpoint.last_save_model_only": "false",
        "checkpoint.exclude_from_loading": exclude,
        "metrics.log_freq": 1,
    }
    trainer = loop.Trainer(load_config([f"--{name}={value}" for name, value in argv.items()], 1))
    losses = []
    log = trainer.meter.log
    trainer.meter.log = lambda figures, **rest: (losses.append(figures.loss), log(figures, **rest))  # type: ignore
    assert trainer.run() == 0
    return losses


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """A text, and a tokenizer of as many tokens as torchtitan's debug model has."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = {word: number for number, word in enumerate([*alphabet, *(f"<{n}>" for n in range(2048 - len(alphabet)))])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    (tmp_path / "assets").mkdir()
    tokenizer.save(str(tmp_path / "assets/tokenizer.json"))
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 100)
    return tmp_path


def test_our_trainer_resumes_its_run_and_it_resumes_ours_converted(assets: Path) -> None:
    run(assets, stock=True, steps=4, last_save_model_only=False)
    with pytest.raises(WorldError, match=r"another program's data loader .*exclude_from_loading dataloader"):
        run_world(train_ours, 1, str(assets), 6, "")
    ((_, _),) = run_world(train_ours, 1, str(assets), 6, "dataloader")  # two steps
    options = ConvertOptions(
        to="dcp", model="llama3", flavor="debugmodel", names="torchtitan-0.3", training_state=True, verify=True
    )
    ours = milepost.load(assets / "checkpoint/step-6")
    report = convert(assets / "checkpoint/step-6", assets / "theirs/checkpoint/step-6", options)
    assert any("not converted" in note and "dataloader" in note for note in report.notes)
    (again,) = run(assets / "theirs", stock=True, steps=7, exclude_from_loading=["dataloader"])
    assert [step for step, _ in again["losses"]] == [7]
    assert again["schedule"] == {"last_epoch": 7}
    assert again["steps_of_optimizer"] == {7.0}
    assert ours["train_state"]["step"] == 6
    name = "tok_embeddings.weight"
    theirs, after = milepost.load(assets / "checkpoint/step-4")[name], ours[name]
    assert (after - theirs).norm() < 0.1 * theirs.norm(), "two steps do not lead that far from the loaded weights"


@pytest.mark.slow
def test_five_kills_while_a_step_is_written_lose_no_step(tmp_path: Path) -> None:
    options = {"async_mode": "async", "last_save_model_only": False, "steps": 12}
    undisturbed = run(tmp_path / "whole", **options)
    for kill_at in (3, 5, 7, 9, 11):  # right after the save of the step before was staged
        run(tmp_path / "killed", kill_at=kill_at, allow_death=True, **options)
    agree(run(tmp_path / "killed", **options), undisturbed)
    assert {6, 8, 10, 12} >= set(steps_in(tmp_path / "killed")) >= {10, 12}


def train_where_files_stay_small(folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train(folder, steps=4)


def test_a_save_that_finds_no_room_stops_the_run_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=r"SaveError: file too large while reserving .* for .*checkpoint"):
        run_world(train_where_files_stay_small, 1, str(tmp_path))
    assert steps_in(tmp_path) == {}
