"""``checkpoint.only_trainable``: steps hold what is trained, and are resumed over the weights that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import MilepostError, StateMismatchError


def model_of(value: float) -> nn.Sequential:
    """Two layers of which the second is trained, and a buffer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model[0].requires_grad_(requires_grad=False)
    return model


def train(folder: Path, model: nn.Module, steps: int, **options: Any) -> milepost.LoadReport | None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    config = CheckpointConfig(interval=1, only_trainable=True, last_save_model_only=False, **options)
    with CheckpointManager(folder, config, model=model, optimizer=optimizer) as manager:
        report = manager.load()
        for step in range(1, steps + 1):
            model(torch.ones(3, 4) * torch.arange(3).reshape(3, 1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            manager.save(step)
    return report


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_step_is_small_and_resumes_over_the_weights_that_were_built(memory_path: Path) -> None:
    model = model_of(0.5)
    train(memory_path, model, 2)
    with milepost.open(memory_path / "step-2") as step:
        keys = {key for key in step if not key.startswith(("optimizer.", "rng."))}
    assert keys == {key for key in model.state_dict() if not key.startswith("0.")}
    again = model_of(0.5)
    report = train(memory_path, again, 0)
    assert report is not None
    assert report.resumed_step == 2
    assert any(note.startswith("2 parameters are not trained and not in the step") for note in report.notes)
    assert equal(again, model)


@pytest.mark.parametrize("name", ["base.pt", "base"])
def test_what_a_step_leaves_out_comes_from_where_the_run_began(memory_path: Path, name: str) -> None:
    base = model_of(0.25)
    if name == "base":
        milepost.save(memory_path / name, base.state_dict())
    else:
        torch.save(base.state_dict(), memory_path / name)
    model, path = model_of(9.0), str(memory_path / name)
    train(memory_path / "run", model, 2, initial_load_path=path)
    assert model[0].weight[0, 0] == 0.25
    again = model_of(7.0)
    train(memory_path / "run", again, 0, initial_load_path=path)
    assert equal(again, model)


def test_a_step_does_not_pass_for_a_whole_model(memory_path: Path) -> None:
    train(memory_path, model_of(0.5), 1)
    thawed = model_of(1.0)
    thawed[0].requires_grad_()
    with pytest.raises(StateMismatchError) as caught:
        train(memory_path, thawed, 0)
    assert {"0.weight", "0.bias"} <= set(caught.value.missing)
    assert thawed[2].weight[0, 0] == 1.0
    frozen = model_of(1.0)
    frozen[2].requires_grad_(requires_grad=False)  # trained before, and stored: it is loaded all the same
    config = CheckpointConfig(exclude_from_loading=["optimizer"])
    with CheckpointManager(memory_path, config, model=frozen) as manager:
        manager.load()
    assert frozen[2].weight[0, 0] != 1.0
    with pytest.raises(MilepostError):
        milepost.load(memory_path / "step-1", model_of(1.0).state_dict())
