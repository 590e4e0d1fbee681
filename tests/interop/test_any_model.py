"""``milepost convert`` of a model that Milepost does not know, under its own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import milepost
from milepost.interop.convert import convert
from milepost.interop.options import ConvertOptions


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 0))
    return model.append(nn.Embedding(7, 3).bfloat16())


def saved(path: Path, how: str) -> tuple[Path, nn.Module]:
    model = net()
    if how == "manager":
        with milepost.CheckpointManager(path / "run", model=model, optimizer=torch.optim.SGD(model.parameters())) as m:
            m.save(500)
        return path / "run" / "step-500", model
    if how == "state":
        milepost.save(path / "a", {"model": model, "epoch": 3, "optimizer": {"n": torch.ones(2)}})
        return path / "a", model
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path / "a.pt")
    return path / "a.pt", model


def same(found: dict[str, Any], model: nn.Module) -> None:
    model.load_state_dict(found)
    assert {key: value.dtype for key, value in found.items()} == {k: v.dtype for k, v in net().state_dict().items()}
    for key, value in net().state_dict().items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("how", ["manager", "state", "file"])
def test_to_a_torch_file(memory_path: Path, how: str) -> None:
    path, model = saved(memory_path, how)
    report = convert(path, memory_path / "model.pt", ConvertOptions(to="pt", verify=True))
    assert report.num_tensors == len(model.state_dict())
    same(torch.load(memory_path / "model.pt", weights_only=True), model)
