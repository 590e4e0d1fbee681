"""A resumed run equals the uninterrupted one: bit for bit on the same ranks, within 1e-5 on others."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor

from milepost.testing.world import WorldError, run_world
from milepost.train.config import TrainConfig
from milepost.train.loop import Trainer
from milepost.train.metrics import StepFigures
from milepost.train.models.decoder import Block
from milepost.train.options import load_config
from milepost.train.process import show_log

NUM_STEPS = 10
GLOBAL_BATCH = 4


@dataclass
class Record:
    """The results of a run on one rank."""

    losses: dict[int, float] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    """Global count -> sample, of those that this rank read."""
    state_digest: str = ""
    """Of this rank's part of all weights and optimizer state."""


def configure(folder: Path, world_size: int, *flags: str) -> TrainConfig:
    options = {
        "job.dump_folder": folder,
        "training.steps": NUM_STEPS,
        "training.seq_len": 32,
        "training.local_batch_size": GLOBAL_BATCH // world_size,
        "training.global_batch_size": GLOBAL_BATCH,
        "training.mixed_precision_param": "float32",
        "lr_scheduler.warmup_steps": 3,
        "metrics.log_freq": 1,
        "checkpoint.interval": 5,
    }
    argv = [f"--{name}={value}" for name, value in options.items()]
    return load_config([*argv, "--checkpoint.enable", *flags], world_size)


def train_rank(config: TrainConfig, kill_rank: int | None = None, kill_before_step: int = 0) -> Record:
    """The body of one rank: a whole run, watched. ``kill_rank`` is killed, as by the kernel, before a step."""
    show_log()
    trainer, record = Trainer(config), Record()
    samples, log = trainer.data.order.samples, trainer.meter.log

    def watched_samples(counts):
        if int(os.environ["RANK"]) == kill_rank and trainer.state.step + 1 == kill_before_step:
            os.kill(os.getpid(), signal.SIGKILL)
        found = samples(counts)
        record.samples.update(zip(counts.tolist(), found.tolist(), strict=True))
        return found

    def watched_log(figures: StepFigures, **rest):
        record.losses[figures.step] = figures.loss
        log(figures, **rest)

    trainer.data.order.samples, trainer.meter.log = watched_samples, watched_log  # type: ignore[method-assign]
    trainer.run()
    record.state_digest = digest_of_state(trainer)
    return record


def digest_of_state(trainer: Trainer) -> str:
    digest = hashlib.sha256()
    for part, optimizer in zip(trainer.model.parts, trainer.optimizers, strict=True):
        for parameter in part.parameters():
            for value in (parameter, *optimizer.state.get(parameter, {}).values()):
                local = value.to_local() if isinstance(value, DTensor) else value
                digest.update(local.detach().numpy().tobytes())
    return digest.hexdigest()


def merged_samples(records: list[Record]) -> dict[int, int]:
    """The samples of all ranks by count; each count was read by one rank."""
    merged = {count: sample for record in records for count, sample in record.samples.items()}
    assert len(merged) == sum(len(record.samples) for record in records)
    return merged


@dataclass
class Runs:
    whole_folder: Path
    whole: list[Record]
    killed_folder: Path
    resumed: dict[int, list[Record]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """10 steps in one go on 2 ranks; then 5 and a killed rank, resumed on 2, on 1 and on 4 ranks."""
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    whole_records = run_world(train_rank, 2, configure(whole, 2))
    with pytest.raises(WorldError):
        run_world(train_rank, 2, configure(killed, 2), 1, 8, allow_death=True)
    resumed = {}
    for world_size in (2, 1, 4):
        folder = tmp_path_factory.mktemp("resumed") / "run"
        shutil.copytree(killed, folder)
        resumed[world_size] = run_world(train_rank, world_size, configure(folder, world_size))
    return Runs(whole, whole_records, killed, resumed)


def test_a_killed_run_leaves_only_the_steps_it_committed(runs: Runs):
    assert [path.name for path in (runs.killed_folder / "checkpoint").glob("step-*")] == ["step-5"]


def test_resumed_on_the_same_ranks_it_is_equal_to_the_last_bit(runs: Runs):
    for whole, resumed in zip(runs.whole, runs.resumed[2], strict=True):
        assert list(resumed.losses) == [6, 7, 8, 9, 10]
        assert resumed.losses == {step: whole.losses[step] for step in resumed.losses}
        assert resumed.state_digest == whole.state_digest


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resumed_on_any_number_of_ranks_it_sees_the_same_samples_and_losses(runs: Runs, world_size: int):
    records = runs.resumed[world_size]
    seen, expected = merged_samples(records), merged_samples(runs.whole)
    assert sorted(seen) == list(range(5 * GLOBAL_BATCH, NUM_STEPS * GLOBAL_BATCH))
    assert seen == {count: expected[count] for count in seen}
    for record in records:
        for step, loss in record.losses.items():
            assert loss == pytest.approx(runs.whole[0].losses[step], abs=1e-5)


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_saving_in_the_background_changes_nothing(runs: Runs, mode: str, tmp_path: Path):
    records = run_world(train_rank, 2, configure(tmp_path, 2, "--checkpoint.async_mode", mode))
    assert [r.losses for r in records] == [r.losses for r in runs.whole]
    assert [r.state_digest for r in records] == [r.state_digest for r in runs.whole]
    assert sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*")) == ["step-10", "step-5"]


def test_training_learns(runs: Runs):
    losses = runs.whole[0].losses
    assert losses[1] > 5.4
    assert losses[10] < losses[1] - 0.8


def test_a_finished_run_says_so_and_is_left_as_it_is(runs: Runs, capfd: pytest.CaptureFixture[str]):
    def listing() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in (runs.whole_folder / "checkpoint").rglob("*"))

    before = listing()
    (record,) = run_world(train_rank, 1, configure(runs.whole_folder, 1))
    assert record.losses == {}
    assert "this run is finished" in capfd.readouterr().out
    assert listing() == before


def test_with_more_steps_it_continues_from_the_newest_full_state_and_says_so(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    shutil.copytree(runs.whole_folder, tmp_path / "run")
    config = configure(tmp_path / "run", 1, "--training.steps", "12", "--checkpoint.export_dtype", "bfloat16")
    (record,) = run_world(train_rank, 1, config)
    assert list(record.losses) == [6, 7, 8, 9, 10, 11, 12]
    out = capfd.readouterr().out
    assert "step-5 (full): 5 steps are done" in out
    assert "step 10" in out


def test_the_last_step_converts_with_the_tool_of_pytorch(runs: Runs, tmp_path: Path):
    """The command of PyTorch's documentation, then a load that runs no code from the file."""
    step, target = runs.whole_folder / "checkpoint" / "step-10", tmp_path / "checkpoint.pt"
    command = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", step, target]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    loaded = torch.load(target, weights_only=True)
    assert loaded["tok_embeddings.weight"].shape == (256, 256)
    assert loaded["layers.5.attention.wq.weight"].abs().sum() > 0
    assert not any(key.startswith("optimizer") for key in loaded)


def test_the_full_state_converts_too(runs: Runs, tmp_path: Path):
    run_world(dcp_to_torch_save, 1, runs.whole_folder / "checkpoint" / "step-5", tmp_path / "full.pt")
    loaded = torch.load(tmp_path / "full.pt", weights_only=True)
    assert loaded["train_state"]["step"] == 5
    assert loaded["train_state"]["ntokens_seen"] == 5 * GLOBAL_BATCH * 32
    assert loaded["dataloader"]["samples_consumed"] == 5 * GLOBAL_BATCH
    assert loaded["lr_scheduler"]["last_epoch"] == 5
    assert any(key.startswith("state.layers.0.") for key in loaded["optimizer"])


def test_a_step_that_is_not_there_is_reported_with_those_that_are(runs: Runs):
    with pytest.raises(WorldError, match=r"CheckpointNotFoundError: .*step 7 does not exist.*steps that do: 5, 10"):
        run_world(train_rank, 1, configure(runs.whole_folder, 1, "--checkpoint.load_step", "7"))


def test_other_data_is_refused(runs: Runs):
    with pytest.raises(WorldError, match=r"StateMismatchError: .*seed was 0 and is 1"):
        run_world(train_rank, 1, configure(runs.whole_folder, 1, "--training.seed", "1", "--checkpoint.load_step", "5"))


def test_parts_left_out_are_as_freshly_built(runs: Runs, tmp_path: Path):
    """Without the data loader the samples start over; the weights continue."""
    shutil.copytree(runs.killed_folder, tmp_path / "run")
    config = configure(tmp_path / "run", 1, "--checkpoint.exclude_from_loading", "data_loader,lr_scheduler")
    (record,) = run_world(train_rank, 1, config)
    assert sorted(record.samples) == list(range(5 * GLOBAL_BATCH))
    assert record.losses[6] < runs.whole[0].losses[1] - 0.5


def test_an_initial_load_gives_weights_to_a_run_that_has_no_steps(runs: Runs, tmp_path: Path):
    flags = [
        "--checkpoint.initial_load_path",
        str(runs.whole_folder / "checkpoint" / "step-10"),
        "--training.steps",
        "1",
    ]
    (record,) = run_world(train_rank, 1, configure(tmp_path, 1, *flags))
    assert list(record.losses) == [1]
    assert record.losses[1] < runs.whole[0].losses[1] - 0.5


def test_a_seed_checkpoint_starts_a_run_and_is_refused_over_steps(runs: Runs, tmp_path: Path):
    seed = configure(tmp_path, 1, "--checkpoint.create_seed_checkpoint")
    run_world(train_rank, 1, seed)
    assert [path.name for path in (tmp_path / "checkpoint").glob("step-*")] == ["step-0"]
    with pytest.raises(WorldError, match="already holds step-0"):
        run_world(train_rank, 1, seed)
    records = run_world(train_rank, 2, configure(tmp_path, 2, "--training.steps", "1"))
    assert records[0].losses[1] == pytest.approx(runs.whole[0].losses[1], abs=1e-5)


def train_rank_with_dropout(config: TrainConfig, kill_before_step: int = 0) -> Record:
    """``train_rank`` with dropout after each block, which draws from the random generators."""
    forward = Block.forward

    def dropped(self: Block, *args, **options):
        return torch.nn.functional.dropout(forward(self, *args, **options), 0.2)

    Block.forward = dropped  # type: ignore[method-assign]  # in this process alone
    return train_rank(config, 0, kill_before_step)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_with_dropout_that_is_resumed_in_mid_epoch_equals_the_undisturbed_one(
    memory_path: Path, world_size: int
) -> None:
    whole, killed = (
        configure(memory_path / name, world_size, "--training.steps=4", "--checkpoint.interval=2")
        for name in ("whole", "killed")
    )
    expected = run_world(train_rank_with_dropout, world_size, whole)
    with pytest.raises(WorldError):
        run_world(train_rank_with_dropout, world_size, killed, 4)
    found = run_world(train_rank_with_dropout, world_size, killed)
    assert [record.state_digest for record in found] == [record.state_digest for record in expected]
    assert found[0].losses == {step: expected[0].losses[step] for step in (3, 4)}
