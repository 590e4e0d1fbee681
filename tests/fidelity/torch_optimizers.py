"""Every optimizer of torch, over small models, and the training that tests save and resume."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from milepost import CheckpointConfig, CheckpointManager

CLASSES = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
}
"""All of them: one that a new torch version brings is tried without being named here."""
VARIANTS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "SGD without momentum": {},
    "Adam amsgrad": {"amsgrad": True},
    "Adam with a tensor as rate": {"lr": torch.tensor(0.02), "foreach": False},
    "AdamW fused": {"fused": True},
    "RMSprop centered": {"centered": True, "momentum": 0.1},
    "LBFGS": {"history_size": 3, "line_search_fn": "strong_wolfe"},
}
CONFIG = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)

Make = Callable[[nn.Module], Optimizer]


def makes() -> dict[str, Make]:
    names = dict.fromkeys([*CLASSES, *VARIANTS])
    return {name: lambda model, name=name: build(name, model) for name in names}  # type: ignore[misc]


def build(name: str, model: nn.Module) -> Optimizer:
    kind = CLASSES[name.split()[0]]
    options = VARIANTS.get(name, {})
    if "lr" in inspect.signature(kind).parameters:
        options = {"lr": 0.05, **options}
    parameters = [p for p in model.parameters() if kind is not torch.optim.Muon or p.dim() == 2]
    if kind is torch.optim.LBFGS or kind is torch.optim.SparseAdam:
        return kind(parameters, **options)
    half = len(parameters) // 2
    return kind([{"params": parameters[:half]}, {"params": parameters[half:], **options}], **options)


class Net(nn.Module):
    """An embedding with sparse gradients, where the optimizer wants those, and two layers."""

    def __init__(self, sparse: bool):
        super().__init__()
        self.embedding = nn.Embedding(8, 4, sparse=sparse)
        self.layers = nn.ModuleList([] if sparse else [nn.Linear(4, 6), nn.Linear(6, 2)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = x.square().mean()
        return out


def new_model(name: str, seed: int) -> Net:
    torch.manual_seed(seed)
    return Net(sparse=name.split()[0] == "SparseAdam")


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 8, (6,), generator=torch.Generator().manual_seed(step))

        def closure(tokens: torch.Tensor = tokens) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(tokens)
            loss.backward()
            return loss

        optimizer.step(closure)


def save(folder: Path, model: nn.Module, optimizer: Any) -> None:
    manager = CheckpointManager(folder, CONFIG, model=model, optimizer=optimizer)
    manager.save(1)
    manager.close()


def load(folder: Path, model: nn.Module, optimizer: Any) -> None:
    manager = CheckpointManager(folder, CONFIG, model=model, optimizer=optimizer)
    try:
        manager.load()
    finally:
        manager.close()
