"""States of the user's own beside the model: averages that are sharded, whole optimizers and schedulers inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from same import assert_same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from milepost import CheckpointConfig, CheckpointManager
from milepost.testing.world import run_world

CONFIG = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)


class Average:
    """An average of weights, made when it is first updated or at once; one more DTensor of its own."""

    def __init__(self, model: nn.Module, *, at_once: bool):
        self.model = model
        self.average: dict[str, Any] = {}
        if at_once:
            self.update()

    def update(self) -> None:
        self.average = {name: p.detach().clone() + 1 for name, p in self.model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        if not self.average:
            raise RuntimeError("nothing has been averaged yet")
        return {"average": self.average, "count": torch.tensor(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


def sharded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    return fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))


def average(folder: Path, at_once: bool, save: bool) -> list[Any]:
    model = sharded(0 if save else 1)
    state = Average(model, at_once=at_once or save)
    further = Average(model, at_once=at_once or save)
    with CheckpointManager(folder, CONFIG, model=model, train_state=state, states={"slow": further}) as manager:
        manager.save(1) if save else manager.load()
    for found in (state.average, further.average):
        for name, parameter in model.named_parameters():
            assert isinstance(found[name], DTensor), name
            assert_same(found[name], parameter.detach() + 1, name)
    return [tensor.full_tensor().tolist() for tensor in state.average.values()]


@pytest.mark.parametrize("at_once", [True, False])
def test_averages_of_sharded_weights_come_back_sharded(memory_path: Path, at_once: bool) -> None:
    saved = run_world(average, 2, memory_path, at_once, True, timeout_s=60)
    for world_size in (2, 3):
        assert run_world(average, world_size, memory_path, at_once, False, timeout_s=60)[0] == saved[0]


class Whole:
    """A common pattern: an object whose state holds other stateful objects, or their state dicts."""

    def __init__(self, seed: int, as_objects: bool):
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 3])
        self.as_objects = as_objects

    def train(self, steps: range) -> None:
        for step in steps:
            self.model(torch.full((2, 3), float(step))).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        inside = {"model": self.model, "optimizer": self.optimizer, "schedulers": [self.scheduler]}
        if self.as_objects:
            return inside
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "schedulers": [self.scheduler.state_dict()]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["schedulers"][0])


@pytest.mark.parametrize("as_objects", [True, False])
def test_whole_optimizers_and_schedulers_inside_a_state(memory_path: Path, as_objects: bool) -> None:
    runs = [Whole(0, as_objects), Whole(1, as_objects)]
    runs[0].train(range(2))
    for run in runs:
        with CheckpointManager(memory_path, CONFIG, model=nn.Linear(1, 1), train_state=run) as manager:
            manager.save(1) if run is runs[0] else manager.load()
    for steps in (range(0), range(2, 5)):
        for run in runs:
            run.train(steps)
        for part in ("model", "optimizer", "scheduler"):
            assert_same(getattr(runs[1], part).state_dict(), getattr(runs[0], part).state_dict(), part)
