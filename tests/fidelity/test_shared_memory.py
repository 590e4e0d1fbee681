"""Tensors that are one in memory, or parts of one another, come back so; and DTensors that only their owner knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from same import assert_same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Rows

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.testing.world import run_world

MODES: Any = ("disabled", "async", "async_with_pinned_mem")


class Held:
    """Anything with a state, which takes what it is given."""

    def __init__(self, state: Any = None):
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def shared_state() -> dict[str, Any]:
    whole = torch.arange(24.0).reshape(4, 6)
    column = whole[:, 2]
    return {
        "whole": whole,
        "same": whole,
        "rows": [whole[1:3], {"last": whole[3]}],
        "transposed": whole.t(),
        "column": column,
        "apart": [column.clone(), torch.arange(12)],
    }


def check_shared(found: dict[str, Any]) -> None:
    assert_same(found, shared_state())
    found["whole"].add_(100)
    assert_same(found, {**shared_after(), "apart": shared_state()["apart"]})


def shared_after() -> dict[str, Any]:
    state = shared_state()
    state["whole"].add_(100)
    return state


@pytest.mark.parametrize("mode", MODES)
def test_in_the_state_of_a_loop(memory_path: Path, mode: Any) -> None:
    config = CheckpointConfig(interval=1, async_mode=mode)
    with CheckpointManager(
        memory_path, config, model=nn.Linear(1, 1), train_state=Held(shared_state()), states={"more": Held({"n": 1})}
    ) as manager:
        manager.save(1)
    loaded = Held()
    with CheckpointManager(
        memory_path, config, model=nn.Linear(1, 1), train_state=loaded, states={"more": Held()}
    ) as manager:
        manager.load()
    check_shared(loaded.state)


def test_in_a_state_dict(memory_path: Path) -> None:
    milepost.save(memory_path / "step-1", {"state": shared_state(), "model": nn.Linear(2, 2)})
    into: dict[str, Any] = {"state": None, "model": nn.Linear(2, 2)}
    milepost.load(memory_path / "step-1", into)
    check_shared(into["state"])
    check_shared(milepost.load(memory_path / "step-1")["state"])


def test_tensors_that_are_there_already_are_filled_as_they_are(memory_path: Path) -> None:
    milepost.save(memory_path / "step-1", {"state": shared_state()})
    into = {"state": {**shared_state(), "same": torch.zeros(4, 6)}}
    tensor = into["state"]["same"]
    milepost.load(memory_path / "step-1", into)
    assert into["state"]["same"] is tensor
    assert_same(tensor, shared_state()["whole"])


class Pooled(torch.optim.SGD):
    """All parameters of a group have one buffer, of which each knows its part."""

    def pool(self) -> None:
        for group in self.param_groups:
            pool = torch.rand(sum(p.numel() for p in group["params"]))
            start = 0
            for p in group["params"]:
                end = start + p.numel()
                self.state[p] = {"pool": pool, "mine": pool[start:end].view_as(p), "step": torch.tensor(1.0)}
                start = end


def test_in_the_state_of_an_optimizer(memory_path: Path) -> None:
    saved, loaded = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    one, other = Pooled(saved.parameters(), lr=0.1), Pooled(loaded.parameters(), lr=0.1)
    one.pool()
    config = CheckpointConfig(interval=1)
    with CheckpointManager(memory_path, config, model=saved, optimizer=one) as manager:
        manager.save(1)
    with CheckpointManager(memory_path, config, model=loaded, optimizer=other) as manager:
        manager.load()
    assert_same(other.state_dict()["state"], one.state_dict()["state"])
    states = list(other.state.values())
    states[0]["pool"].zero_()
    assert all(not entry["mine"].any() and entry["pool"] is states[0]["pool"] for entry in states)


def test_weights_that_are_one_are_one_in_the_whole_state_dict(memory_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    milepost.save(memory_path / "step-1", {"model": model})
    found = milepost.load(memory_path / "step-1")["model"]
    assert found["0.weight"] is found["1.weight"]


def test_parameters_are_parameters(memory_path: Path) -> None:
    temperature, fixed = nn.Parameter(torch.ones(2)), nn.Parameter(torch.arange(3), requires_grad=False)
    state = {"temperature": temperature, "again": temperature, "fixed": [fixed], "plain": temperature.detach().clone()}
    loaded = Held()
    config = CheckpointConfig(interval=1)
    with CheckpointManager(memory_path / "run", config, model=nn.Linear(1, 1), train_state=Held(state)) as manager:
        manager.save(1)
    with CheckpointManager(memory_path / "run", config, model=nn.Linear(1, 1), train_state=loaded) as manager:
        manager.load()
    milepost.save(memory_path / "step-1", {"state": state})
    for found in (loaded.state, milepost.load(memory_path / "step-1")["state"]):
        assert_same(found, state)
        assert found["again"] is found["temperature"]
        assert found["temperature"].requires_grad
        assert not found["fixed"][0].requires_grad


def sharded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("dp",))
    return fully_shard(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), mesh=mesh)


def state_of_its_own(model: nn.Module) -> dict[str, Any]:
    mesh = model[0].weight.device_mesh  # type: ignore[index,union-attr]
    by_column = distribute_tensor(torch.arange(30.0).reshape(5, 6), mesh, [Rows(1)])  # type: ignore[arg-type]
    by_row = distribute_tensor(torch.arange(7), mesh, [Rows(0)])  # type: ignore[arg-type]
    return {"columns": by_column, "again": by_column, "rows": [by_row], "plain": torch.arange(3.0)}


def keep_sharded(folder: Path, save: bool) -> None:
    model = sharded(0 if save else 1)
    held, config = Held(state_of_its_own(model) if save else None), CheckpointConfig(interval=1)
    with CheckpointManager(folder / "run", config, model=model, train_state=held, states={"x": held}) as manager:
        manager.save(1) if save else manager.load()
    into: dict[str, Any] = {"model": model, "held": held.state if save else None}
    (milepost.save if save else milepost.load)(folder / "step-1", into)
    optimizer = torch.optim.SGD(model.parameters())
    if save:
        buffer = torch.zeros_like(model[0].weight)  # type: ignore[index,arg-type]
        optimizer.state.update({p: {"of its own": torch.ones_like(p), "of all": buffer} for p in model.parameters()})
    with CheckpointManager(folder / "optimizer", config, model=model, optimizer=optimizer) as manager:
        manager.save(1) if save else manager.load()
    buffers = [entry["of all"] for entry in optimizer.state.values()]
    assert all(buffer is buffers[0] for buffer in buffers)
    assert buffers[0].placements == (Rows(0),)
    for found in (held.state, into["held"]):
        assert_same(found, state_of_its_own(model))
        assert found["again"] is found["columns"]
        assert isinstance(found["rows"][0], DTensor)


def find_no_mesh(folder: Path) -> None:
    model, held = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), Held()
    with CheckpointManager(
        folder / "run", CheckpointConfig(interval=1), model=model, train_state=held, states={"x": Held()}
    ) as manager:
        report = manager.load()
    assert report is not None
    assert_same(held.state["columns"], torch.arange(30.0).reshape(5, 6))


def test_dtensors_under_names_of_their_own(memory_path: Path) -> None:
    run_world(keep_sharded, 2, memory_path, True, timeout_s=60)
    run_world(keep_sharded, 2, memory_path, False, timeout_s=60)
    find_no_mesh(memory_path)


@pytest.mark.slow
def test_dtensors_under_names_of_their_own_at_another_degree(memory_path: Path) -> None:
    run_world(keep_sharded, 2, memory_path, True, timeout_s=60)
    run_world(keep_sharded, 3, memory_path, False, timeout_s=60)
    run_world(find_no_mesh, 2, memory_path, timeout_s=60)


def test_elements_in_another_order_in_memory(memory_path: Path) -> None:
    """Channels-last and transposed tensors: kernels and sums depend on it to the last bit."""
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"image": image, "transposed": [torch.randn(3, 4).t()], "every other": torch.randn(8)[::2]}
    held, config = Held(), CheckpointConfig(interval=1)
    with CheckpointManager(memory_path / "run", config, model=nn.Linear(1, 1), train_state=Held(state)) as manager:
        manager.save(1)
    with CheckpointManager(memory_path / "run", config, model=nn.Linear(1, 1), train_state=held) as manager:
        manager.load()
    milepost.save(memory_path / "step-1", {"state": state, "weight": image})
    for found in (held.state, milepost.load(memory_path / "step-1")["state"]):
        assert_same(found, state)
        assert found["image"].is_contiguous(memory_format=torch.channels_last)
        assert found["transposed"][0].stride() == (1, 4)
        assert found["every other"].is_contiguous()


class Preconditioned(torch.optim.Optimizer):
    """Keeps plain tensors beside DTensors, as second-order methods do for whole gradients."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state, whole = self.state[parameter], parameter.grad.full_tensor()
                if not state:
                    factors = {dim: {"factor": torch.eye(size)} for dim, size in enumerate(whole.shape)}
                    state.update(factors=factors, whole=torch.zeros_like(whole), sum=torch.zeros_like(parameter))
                state["whole"] += whole
                state["sum"] += parameter.grad
                for dim, entry in state["factors"].items():
                    rows = whole.transpose(0, dim).reshape(whole.shape[dim], -1)
                    entry["factor"] += rows @ rows.T
                parameter.sub_(state["sum"], alpha=group["lr"])


def train_preconditioned(folder: Path, mode: Any) -> list[Any]:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        model(torch.full((2, 6), float(number))).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def make(by_hand: bool) -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        fully_shard(model)
        optimizer = Preconditioned(model.parameters())
        given: Any = {"states": {"by_hand": optimizer}} if by_hand else {"optimizer": optimizer}
        return model, optimizer, given

    found = []
    for by_hand in (False, True):
        model, optimizer, given = make(by_hand)
        config = CheckpointConfig(interval=2, async_mode=mode)
        with CheckpointManager(folder / str(by_hand), config, model=model, **given) as manager:
            for number in (1, 2):
                step(model, optimizer, number)
                manager.save(number)
                manager.maybe_wait_for_staging()
        step(model, optimizer, 3)
        again, resumed, given = make(by_hand)
        with CheckpointManager(folder / str(by_hand), config, model=again, **given) as manager:
            manager.load()
        step(again, resumed, 3)
        assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
        assert_same(again.state_dict(), model.state_dict())
        found.append(type(next(iter(resumed.state.values()))["factors"][0]["factor"]))
    return found


@pytest.mark.parametrize("mode", ["disabled", pytest.param("async_with_pinned_mem", marks=pytest.mark.slow)])
def test_plain_state_of_sharded_parameters(memory_path: Path, mode: Any) -> None:
    assert run_world(train_preconditioned, 2, memory_path, mode, timeout_s=60) == [[torch.Tensor] * 2] * 2
