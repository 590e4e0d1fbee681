"""Every order of torch.compile, activation checkpointing and DDP around a model: keys show none of them."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from same import assert_same
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from milepost import CheckpointConfig, CheckpointManager
from milepost.run import checkpoint_record
from milepost.storage import LocalStorage
from milepost.testing.world import run_world

CONFIG = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)
WRAPPERS: dict[str, Any] = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "ddp": DistributedDataParallel,
}
ORDERS = [order for length in range(4) for order in permutations(WRAPPERS, length)]
"""From the inside out."""


def wrapped(order: tuple[str, ...], seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for name in order:
        model = WRAPPERS[name](model)
    return model, torch.optim.AdamW(model.parameters())


def run_orders(folder: Path) -> int:
    torch.compiler.set_stance("force_eager")
    keys = set()
    trained: list[Any] = []
    for number, order in enumerate(ORDERS):
        model, optimizer = wrapped(order, 0)
        for step in range(2):
            model(torch.full((4, 3), float(step)) + torch.arange(12.0).reshape(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with CheckpointManager(folder / str(number), CONFIG, model=model, optimizer=optimizer) as manager:
            manager.save(1)
        manifest = checkpoint_record.read_manifest(LocalStorage(folder / str(number)), "step-1")
        keys.add(frozenset((*manifest.tensors, *manifest.objects)))
        trained.append([*model.parameters(), *model.buffers(), optimizer.state_dict()])
        for saved in (0, number):  # by the bare model, and by one that was wrapped so
            fresh, again = wrapped(order, 1)
            with CheckpointManager(folder / str(saved), CONFIG, model=fresh, optimizer=again) as manager:
                manager.load()
            assert_same([*fresh.parameters(), *fresh.buffers(), again.state_dict()], trained[saved], str(order))
    assert len(keys) == 1
    return len(ORDERS)


def test_every_order_of_wrappers(memory_path: Path) -> None:
    assert run_world(run_orders, 1, memory_path, timeout_s=120) == [16]
