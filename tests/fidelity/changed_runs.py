"""Small runs that tests save, change and load again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from milepost import CheckpointConfig, CheckpointManager

Optimizer = torch.optim.Optimizer


class Net(nn.Module):
    """A body and a head."""

    def __init__(self, classes: int = 3, *, adapter: bool = False, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        if adapter:
            self.adapter = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes, bias=False)
        if tied:
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.body(self.embedding(x)))
        out: torch.Tensor = self.head(x)
        return out


class Run:
    """A small run."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: Any = None, scheduler: Any = None, **config: Any):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        options = CheckpointConfig(interval=1, last_save_model_only=False, **config)
        self.manager = CheckpointManager(folder, options, model=model, optimizer=optimizer, lr_scheduler=scheduler)
        opened.append(self.manager)

    def train(self, steps: int) -> Run:
        for step in range(1, steps + 1):
            self.model(torch.arange(5)).square().mean().backward()
            for optimizer in self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]:
                optimizer.step()
                optimizer.zero_grad()
            for scheduler in self.scheduler if isinstance(self.scheduler, list) else [self.scheduler]:
                if scheduler is not None:
                    scheduler.step()
            self.manager.save(step)
        self.manager.close()
        return self

    def load(self) -> list[str]:
        report = self.manager.load()
        assert report is not None
        return list(report.notes)


opened: list[CheckpointManager] = []


@pytest.fixture(autouse=True)
def close_managers() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


def adamw(model: nn.Module, lr: float = 0.1, **options: Any) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, **options)


def saved(folder: Path, **options: Any) -> Run:
    """A run of two steps."""
    torch.manual_seed(0)
    model = Net(**options)
    return Run(folder, model, adamw(model)).train(2)


def cosine(optimizer: Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, 4)


def step_lr(optimizer: Optimizer) -> Any:
    return lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def scheduled(folder: Path, make: Any = cosine, steps: int = 2, **config: Any) -> Run:
    """A run with a schedule: of these steps, or not trained if that is 0."""
    torch.manual_seed(0)
    model = Net()
    optimizer = adamw(model)
    run = Run(folder, model, optimizer, make(optimizer) if make else None, **config)
    return run.train(steps) if steps else run
