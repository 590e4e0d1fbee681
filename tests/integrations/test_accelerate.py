"""Loops with Hugging Face Accelerate: killed and resumed, against a run that was not disturbed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from accelerate import Accelerator
from fsdp_on_cpu import shard_on_cpu
from torch.distributed.tensor import DTensor

from milepost import CheckpointConfig
from milepost.errors import ConfigError
from milepost.integrations.accelerate import checkpoint_manager
from milepost.testing.world import run_world

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

NUM_STEPS = 10


class Average:
    """An object that is registered for checkpointing."""

    def __init__(self) -> None:
        self.value, self.seen = torch.zeros(3), 0

    def add(self, new: torch.Tensor) -> None:
        self.value, self.seen = 0.9 * self.value + 0.1 * new, self.seen + 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.seen = state["value"].clone(), state["seen"]


def adversaries() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3)), nn.Linear(3, 1)


def train(folder: Path, kill_at: int = 0) -> tuple[list[float], list[Any]]:
    accelerator = Accelerator(cpu=True)
    made, judge = adversaries()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.05) for module in (made, judge)]
    schedule = torch.optim.lr_scheduler.StepLR(optimizers[0], 3)
    average = Average()
    accelerator.register_for_checkpointing(average)
    made, judge, *optimizers, schedule = accelerator.prepare(made, judge, *optimizers, schedule)
    config = CheckpointConfig(enable=True, interval=3, async_mode="async")
    losses = []
    with checkpoint_manager(accelerator, folder, config) as manager:
        report = manager.load()
        for step in range(report.step + 1 if report else 1, NUM_STEPS + 1):
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + accelerator.process_index))
            output = made(batch)
            loss = judge(output).square().mean()
            accelerator.backward(loss)
            manager.maybe_wait_for_staging()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
            average.add(accelerator.reduce(output.detach().mean(dim=0), "mean"))
            losses.append(loss.item())
            manager.save(step)
    parameters = [p.detach().numpy().tobytes() for module in (made, judge) for p in module.parameters()]
    states = [entry["exp_avg"].numpy().tobytes() for o in optimizers for entry in o.state_dict()["state"].values()]
    return losses, [
        parameters,
        states,
        schedule.get_last_lr(),
        average.value.tolist(),
        average.seen,
        torch.rand(1).item(),
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_loop_resumes_with_all_that_was_prepared_and_registered(tmp_path: Path, world_size: int) -> None:
    undisturbed = run_world(train, world_size, tmp_path / "whole")
    run_world(train, world_size, tmp_path / "killed", 8, allow_death=True)
    resumed = run_world(train, world_size, tmp_path / "killed")
    for (losses, end), (all_losses, whole_end) in zip(resumed, undisturbed, strict=True):
        assert len(losses) in (4, 7), "from step 6, or from step 3 if it was killed before step 6 was committed"
        assert losses == all_losses[-len(losses) :]
        assert end == whole_end


def train_sharded(folder: Path, kill_at: int = 0, last: int = NUM_STEPS) -> tuple[list[float], list[Any]]:
    """As :func:`train`, under FSDP2: a global batch of 8 whatever the number of ranks, and no dropout."""
    accelerator = Accelerator(cpu=True)
    shard_on_cpu(accelerator)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    losses = []
    with checkpoint_manager(accelerator, folder, CheckpointConfig(enable=True, interval=3)) as manager:
        report = manager.load()
        for step in range(report.step + 1 if report else 1, last + 1):
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = model(batch[accelerator.process_index :: accelerator.num_processes]).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            manager.save(step)
    state = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return losses, [
        (value.full_tensor() if isinstance(value, DTensor) else value).tolist()
        for value in [*model.parameters(), *state]
    ]


@pytest.mark.slow
def test_sharded_by_fsdp2_it_resumes_to_the_last_bit_and_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    undisturbed = run_world(train_sharded, 2, tmp_path / "whole")
    run_world(train_sharded, 2, tmp_path / "killed", 8, allow_death=True)
    for world_size in (1, 4, 2):
        folder = shutil.copytree(tmp_path / "killed", tmp_path / f"on-{world_size}")
        for losses, end in run_world(train_sharded, world_size, folder):
            (whole, whole_end), *_ = undisturbed
            assert len(losses) == 4
            if world_size == 2:
                assert losses == whole[6:]
                assert end == whole_end
            else:
                assert losses == pytest.approx(whole[6:], rel=1e-5)


def test_an_accelerator_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prepare"):
        checkpoint_manager(Accelerator(cpu=True), tmp_path)
