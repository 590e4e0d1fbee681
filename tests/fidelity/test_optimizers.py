"""Every optimizer of torch is restored through its own ``load_state_dict()``, without taking a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from same import assert_same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch_optimizers import build, load, makes, new_model, save, train

from milepost.testing.world import run_world


@pytest.mark.parametrize("name", makes())
def test_a_resumed_run_equals_the_undisturbed_one(memory_path: Path, name: str) -> None:
    model = new_model(name, 0)
    optimizer = build(name, model)
    train(model, optimizer, range(3))
    save(memory_path / "run", model, optimizer)

    resumed = new_model(name, 1)
    again = build(name, resumed)
    steps = []
    again.register_step_pre_hook(lambda *args: steps.append("before"))
    again.register_step_post_hook(lambda *args: steps.append("after"))
    load(memory_path / "run", resumed, again)
    assert steps == []
    assert_same(again.state_dict(), optimizer.state_dict(), name)

    train(model, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    assert_same(again.state_dict(), optimizer.state_dict(), name)
    assert_same(resumed.state_dict(), model.state_dict(), name)


# ---- on two ranks ----

WITHOUT_DTENSOR = {"LBFGS", "SparseAdam", "Adafactor", "Muon", "Rprop"}
"""Torch itself does not step DTensors with these."""


def two_ranks(folder: Path, wrap: str) -> list[str]:
    """Each optimizer in turn, to be run on two ranks; returns those that were tried."""
    mesh = init_device_mesh("cpu", (2,))
    tried = []

    def wrapped(name: str, seed: int) -> nn.Module:
        model = new_model(name, seed)
        if wrap == "ddp":
            return DistributedDataParallel(model)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    for name in makes():
        if name.split()[0] in (WITHOUT_DTENSOR if wrap == "fsdp" else {"SparseAdam"}):
            continue
        model = wrapped(name, 0)
        optimizer = build(name, model)
        train(model, optimizer, range(2))
        save(folder / name, model, optimizer)
        resumed = wrapped(name, 1)
        again = build(name, resumed)
        load(folder / name, resumed, again)
        for pair in ((model, optimizer), (resumed, again)):
            train(*pair, range(2, 4))
        assert_same(again.state_dict(), optimizer.state_dict(), name)
        assert_same(resumed.state_dict(), model.state_dict(), name)
        tried.append(name)
    if wrap == "ddp":
        check_divided(folder / "divided", wrapped)
    return tried


def check_divided(folder: Path, wrapped: Any) -> None:
    """An optimizer that divides its state among ranks needs no consolidation: each rank saves its part."""
    runs = []
    for seed in (0, 1):
        model = wrapped("AdamW", seed)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.05 / (seed + 1))
        if seed == 0:
            train(model, optimizer, range(2))
            save(folder, model, optimizer)
        else:
            load(folder, model, optimizer)
        train(model, optimizer, range(2, 4))
        runs.append((model.state_dict(), optimizer.optim.state_dict()))
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_on_two_ranks(memory_path: Path, wrap: str) -> None:
    tried, _ = run_world(two_ranks, 2, memory_path, wrap, timeout_s=120)
    assert len(tried) >= 14
