"""A seed checkpoint: the command line of the documentation, and the same start under every layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from milepost.errors import ConfigError
from milepost.parallelism.degrees import ALL_DEGREES
from milepost.run.catalog import scan
from milepost.storage import LocalStorage
from milepost.testing.world import WorldError, run_world
from milepost.train.config import TrainConfig
from milepost.train.loop import Trainer
from milepost.train.options import load_config
from milepost.train.process import show_log

ROOT = Path(__file__).parents[2]
SEED = 7
"""Of the seed checkpoint's weights. Other runs have the default seed, so theirs would be other weights."""
GLOBAL_BATCH = 4


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a seed checkpoint in it, made as the documentation says."""
    folder = tmp_path_factory.mktemp("seeded")
    command = [ROOT / "run_train.sh", "--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]
    for name in ALL_DEGREES:
        command += [f"--parallelism.{name}", "1"]
    command += ["--training.seed", str(SEED), "--job.dump_folder", folder]
    environment = {**os.environ, "NGPU": "1", "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"wrote the seed checkpoint {folder}/checkpoint/step-0" in done.stdout
    assert "step 1/" not in done.stdout
    return folder


def configure(folder: Path, world_size: int, layout: str, *flags: str) -> TrainConfig:
    """One step under a layout such as ``data_parallel_shard=2 tensor_parallel=2``."""
    options = {
        "job.dump_folder": folder,
        "training.steps": 1,
        "training.seq_len": 32,
        "training.global_batch_size": GLOBAL_BATCH,
        "training.local_batch_size": 2 if "data_parallel_shard=2" in layout else GLOBAL_BATCH,
        "training.mixed_precision_param": "float32",
        "parallelism.data_parallel_shard_degree": 1,
    }
    options |= {f"parallelism.{axis}_degree": n for axis, n in (word.split("=") for word in layout.split())}
    argv = [f"--{name}={value}" for name, value in options.items()]
    return load_config([*argv, "--checkpoint.enable", "--checkpoint.load_only", *flags], world_size)


def _first_losses(configs: list[TrainConfig]) -> list[float]:
    """On every rank: the loss of step 1 under each."""
    show_log()
    losses = []
    for config in configs:
        trainer = Trainer(config)
        assert trainer.run() == 0
        losses.append(trainer.state.loss)
    return losses


def test_command_of_the_documentation_writes_the_whole_model_as_step_0(seeded: Path) -> None:
    (entry,) = scan(LocalStorage(seeded), "checkpoint")
    assert (entry.step, entry.state, entry.kind) == (0, "committed", "model")


def test_nothing_is_seeded_over_steps(seeded: Path) -> None:
    config = load_config(
        ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", f"--job.dump_folder={seeded}"], 1
    )
    with pytest.raises(
        WorldError, match=r"ConfigError: .*/checkpoint already holds step-0; a seed checkpoint is for a new run"
    ):
        run_world(_first_losses, 1, [config])


@pytest.mark.parametrize("name", ALL_DEGREES)
def test_nothing_is_seeded_with_any_degree_above_one(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"initialises on one process, but parallelism.{name} is 2$"):
        load_config(["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", f"--parallelism.{name}=2"], 1)


def test_the_first_loss_is_the_same_under_every_layout(
    seeded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layouts = {
        1: [""],
        2: ["data_parallel_shard=2", "tensor_parallel=2", "pipeline_parallel=2"],
        8: ["data_parallel_shard=2 tensor_parallel=2 pipeline_parallel=2"],
    }
    losses = {}
    for world_size, several in layouts.items():
        ranks = run_world(_first_losses, world_size, [configure(seeded, world_size, layout) for layout in several])
        assert ranks == [ranks[0]] * world_size
        losses |= dict(zip(several, ranks[0], strict=True))
    assert losses == pytest.approx(dict.fromkeys(losses, losses[""]), abs=1e-5)
    assert "there is no checkpoint to start from" not in capfd.readouterr().out

    ((unseeded,), _) = run_world(_first_losses, 2, [configure(tmp_path, 2, "pipeline_parallel=2")])
    assert abs(unseeded - losses[""]) > 1e-3, "the weights did not come from the seed checkpoint"
    assert capfd.readouterr().out.count("there is no checkpoint to start from") == 1
