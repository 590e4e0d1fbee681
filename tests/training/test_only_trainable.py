"""``checkpoint.only_trainable``: steps hold the trainable parameters, and are resumed over the frozen ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import MilepostError, StateMismatchError
from milepost.testing.world import run_world


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
    assert any(note.startswith("2 parameters are frozen and not in the step") for note in report.notes)
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
    frozen = model_of(0.5)
    frozen[2].requires_grad_(requires_grad=False)  # trained before, and stored: it is loaded all the same
    config = CheckpointConfig(exclude_from_loading=["optimizer"])
    with CheckpointManager(memory_path, config, model=frozen) as manager:
        manager.load()
    assert frozen[2].weight[0, 0] != 0.5
    with pytest.raises(MilepostError):
        milepost.load(memory_path / "step-1", model_of(1.0).state_dict())


def test_over_other_weights_a_step_is_not_resumed(memory_path: Path) -> None:
    train(memory_path, model_of(0.5), 1)
    other = model_of(0.75)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(StateMismatchError, match="trained on other frozen weights than this run") as caught:
        train(memory_path, other, 0)
    assert caught.value.mismatched == ("0.bias: different values", "0.weight: different values") or set(
        caught.value.mismatched
    ) == {"0.bias: different values", "0.weight: different values"}
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    larger = nn.Sequential(*model_of(0.5), nn.Linear(2, 2).requires_grad_(requires_grad=False))
    with pytest.raises(StateMismatchError, match=r"3\.weight: not in the saved model"):
        train(memory_path, larger, 0)
    assert train(memory_path, model_of(0.75), 0, exclude_from_loading=["0.*"]) is not None, "as was asked for"
    begun = train(memory_path / "new", model_of(0.75), 0, initial_load_path=str(memory_path / "step-1"))
    assert begun is not None, "a new run loads the trained part over any base"


def test_what_was_frozen_on_the_way_is_not_lost(memory_path: Path) -> None:
    model = model_of(0.5)
    train(memory_path, model, 2)
    model[2].requires_grad_(requires_grad=False)
    model[1].weight.requires_grad_()
    optimizer = torch.optim.SGD(model[1].parameters())
    config = CheckpointConfig(interval=1, only_trainable=True, last_save_model_only=False)
    with CheckpointManager(memory_path / "later", config, model=model, optimizer=optimizer) as manager:
        manager.save(3)
    again = model_of(0.5)
    again[2].requires_grad_(requires_grad=False)
    with pytest.raises(StateMismatchError, match=r"2\.weight: different values"):
        CheckpointManager(
            memory_path / "later", config, model=again, optimizer=torch.optim.SGD([again[1].weight])
        ).load()


def sharded(folder: Path, dim: int, value: float) -> str:
    """Save, or resume, with the frozen layer sharded along ``dim`` of two ranks; what was refused."""
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).requires_grad_(requires_grad=False)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        model[0].weight[4, 5] += value
        model[0].weight[2, 1] += value
        model[0].weight += value
    for name, parameter in list(model[0].named_parameters()):
        shared = distribute_tensor(parameter.data, mesh, [Shard(min(dim, parameter.dim() - 1))])
        model[0].register_parameter(name, nn.Parameter(shared, requires_grad=False))
    model[1].requires_grad_()
    config = CheckpointConfig(interval=1, only_trainable=True, last_save_model_only=False)
    with CheckpointManager(folder, config, model=model, layout={"d": dim}) as manager:
        try:
            report = manager.load()
        except StateMismatchError as error:
            return error.message
        if report is None:
            manager.save(1)
    return ""


def test_the_base_is_known_whatever_the_ranks_hold_of_it(memory_path: Path) -> None:
    assert run_world(sharded, 2, memory_path, 0, 0.0) == ["", ""]
    assert run_world(sharded, 2, memory_path, 1, 0.0) == ["", ""]
    refused = run_world(sharded, 2, memory_path, 1, 0.5)
    assert all("0.weight: different values" in message for message in refused)
