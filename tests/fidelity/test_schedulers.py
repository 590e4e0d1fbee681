"""Every scheduler class of torch is restored exactly: rates, order and types of its state, and its further course."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from same import assert_same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from milepost import CheckpointConfig, CheckpointManager
from milepost.testing.world import run_world

CLASSES = {
    name: kind
    for module in (lr_scheduler, swa_utils)
    for name, kind in vars(module).items()
    if inspect.isclass(kind) and issubclass(kind, LRScheduler) and kind is not LRScheduler and name[0] != "_"
}
"""All of them: one that a new torch version brings is tried without being named here, if it needs no arguments."""


def parts(optimizer: Optimizer) -> list[Any]:
    return [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.8)]


ARGUMENTS: dict[str, Any] = {
    "LambdaLR": lambda o: {"lr_lambda": [lambda step: 0.9**step, lambda step: 0.8**step]},
    "MultiplicativeLR": lambda o: {"lr_lambda": lambda step: 0.9},
    "StepLR": lambda o: {"step_size": 2},
    "MultiStepLR": lambda o: {"milestones": [1, 3, 3, 5]},
    "ExponentialLR": lambda o: {"gamma": 0.9},
    "CosineAnnealingLR": lambda o: {"T_max": 4},
    "CosineAnnealingWarmRestarts": lambda o: {"T_0": 2},
    "CyclicLR": lambda o: {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": lambda o: {"max_lr": 0.1, "total_steps": 20},
    "ReduceLROnPlateau": lambda o: {"patience": 1},
    "SequentialLR": lambda o: {"schedulers": parts(o), "milestones": [2]},
    "ChainedScheduler": lambda o: {"schedulers": parts(o)},
    "SWALR": lambda o: {"swa_lr": 0.01, "anneal_epochs": 3},
}
VARIANTS = {
    "CyclicLR of a function": ("CyclicLR", {"scale_fn": lambda x: 1.0 / (1.0 + x)}),
    "CyclicLR exp_range": ("CyclicLR", {"mode": "exp_range", "gamma": 0.9}),
    "OneCycleLR linear": ("OneCycleLR", {"anneal_strategy": "linear", "three_phase": True}),
}
CONFIG = CheckpointConfig(interval=1, last_save_model_only=False)


def build(name: str, optimizer: Optimizer) -> Any:
    kind, more = VARIANTS.get(name, (name, {}))
    arguments = {**ARGUMENTS.get(kind, lambda o: {})(optimizer), **more}
    if kind == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler(**arguments)
    return CLASSES[kind](optimizer, **arguments)


class Run:
    """A model in two groups, an optimizer with momentum, and a scheduler."""

    def __init__(self, name: str, seed: int, wrap: str = ""):
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        if wrap == "ddp":
            self.model = DistributedDataParallel(self.model)
        elif wrap == "fsdp":
            fully_shard(self.model, mesh=init_device_mesh("cpu", (2,)))
        first, second = list(self.model.parameters())[:2], list(self.model.parameters())[2:]
        self.optimizer = torch.optim.SGD([{"params": first, "lr": 0.05}, {"params": second, "lr": 0.02}], momentum=0.9)
        self.scheduler = build(name, self.optimizer)

    def train(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            loss = self.model(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([1.0 + step % 3] if plateau else []))

    def manager(self, folder: Path) -> CheckpointManager:
        return CheckpointManager(
            folder, CONFIG, model=self.model, optimizer=self.optimizer, lr_scheduler=self.scheduler
        )


def check(folder: Path, name: str, wrap: str = "") -> None:
    """Trained, saved in the middle, resumed by fresh objects, trained on: the same as without a break."""
    run = Run(name, 0, wrap)
    run.train(range(3))
    with run.manager(folder) as manager:
        manager.save(1)
    again = Run(name, 1, wrap)
    with again.manager(folder) as manager:
        manager.load()
    for steps in (range(0), range(3, 9)):
        for each in (run, again):
            each.train(steps)
        assert_same(again.scheduler.state_dict(), run.scheduler.state_dict(), name)
        assert_same(again.optimizer.state_dict(), run.optimizer.state_dict(), name)
        assert_same(again.model.state_dict(), run.model.state_dict(), name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*CLASSES, *VARIANTS])
def test_a_resumed_run_equals_the_undisturbed_one(memory_path: Path, name: str) -> None:
    check(memory_path / "run", name)


def on_two_ranks(folder: Path, wrap: str) -> None:
    for name in CLASSES:
        check(folder / name, name, wrap)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_on_two_ranks(memory_path: Path, wrap: str) -> None:
    run_world(on_two_ranks, 2, memory_path, wrap, timeout_s=300)
