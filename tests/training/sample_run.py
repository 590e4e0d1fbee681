"""A training run with every part on one process, for tests of ``CheckpointManager``."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler

from milepost import CheckpointConfig, CheckpointManager
from milepost.loading.load_from import LoadReport
from milepost.run import catalog, checkpoint_record
from milepost.storage import LocalStorage

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Progress:
    """Train state of a loop: counters, and containers that happen to be empty."""

    def __init__(self) -> None:
        self.step = 0
        self.losses = torch.zeros(0)
        self.notes: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "losses": self.losses, "notes": self.notes, "history": [{}, {"n": self.step}]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.losses, self.notes = state["step"], state["losses"], state["notes"]
        assert state["history"] == [{}, {"n": self.step}]


class Loader:
    """A data loader: counts samples."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


opened: list[CheckpointManager] = []


class Run:
    """A small training run with every part."""

    def __init__(
        self,
        folder: Path,
        *,
        model: nn.Module | None = None,
        optimizer: MakeOptimizer = adamw,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        layout: Mapping[str, int] | None = None,
        seed: int = 0,
        **config: Any,
    ):
        while opened and not config.get("load_only"):  # as if its process had ended
            opened.pop().close()
        seed_all(seed)
        self.model = model if model is not None else nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.optimizer = optimizer(self.model)
        self.scheduler = scheduler(self.optimizer) if scheduler else lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.loader, self.progress = Loader(), Progress()
        self.config = CheckpointConfig(**{"enable": True, "interval": 2, "last_save_model_only": False, **config})
        self.manager = CheckpointManager(
            folder,
            self.config,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.scheduler,
            dataloader=self.loader,
            train_state=self.progress,
            layout=layout,
        )
        opened.append(self.manager)

    def step(self) -> float:
        """One step, whose batch and dropout come from the random generators."""
        batch = torch.randn(4, 5) * random.random() + float(np.random.rand())
        loss = self.model(batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.loader.seen += 4
        self.progress.step += 1
        self.progress.losses = torch.cat([self.progress.losses, loss.detach().reshape(1)])
        self.progress.notes["last"] = loss.item()
        return loss.item()

    def train(self, stop: int) -> Run:
        """To step ``stop``, saving when it is due; ``stop`` is the last step."""
        for step in range(self.progress.step + 1, stop + 1):
            self.step()
            self.manager.save(step, last_step=step == stop)
        return self

    def load(self) -> LoadReport:
        report = self.manager.load()
        assert report is not None
        return report

    def everything(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
                "loader": self.loader.state_dict(),
                "progress": self.progress.state_dict(),
                "draws": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
            }
        )


def assert_same(found: Any, expected: Any, what: str = "state") -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, what
        assert torch.equal(found, expected), what
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), what
        for key, value in expected.items():
            assert_same(found[key], value, f"{what}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), what
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{what}.{number}")
    else:
        assert type(found) is type(expected), what
        assert found == expected, what


def steps_in(folder: Path) -> list[int]:
    return [entry.step for entry in catalog.scan(LocalStorage(folder.parent), folder.name)]


def states_in(folder: Path) -> dict[int, str]:
    return {entry.step: entry.state for entry in catalog.scan(LocalStorage(folder.parent), folder.name)}


def damage(step: Path) -> None:
    """Flip a bit in the middle of a tensor's data."""
    manifest = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name)
    shard = next(shard for tensor in manifest.tensors.values() for shard in tensor.shards if shard.data_nbytes > 30)
    data = bytearray((step / shard.file).read_bytes())
    data[(shard.data_offset or 0) + shard.data_nbytes // 2] ^= 0x10
    (step / shard.file).write_bytes(data)
