"""Runs that continue from steps of a model wrapped otherwise, or of stock DCP in its several forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from changed_runs import Net, Run
from same import assert_same
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from milepost.errors import StateMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")


class Task(nn.Module):
    """A module of the user's around the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(x)
        return out


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "DataParallel": nn.DataParallel,
    "a module of the user's": Task,
}


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.AdamW([{"params": parameters[:3], "lr": 0.05}, {"params": parameters[3:], "lr": 0.01}])


def made(seed: int, wrap: Callable[[nn.Module], nn.Module] = WRAPPERS["plain"]) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = wrap(Net())
    return model, two_groups(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(5)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_continues_alike(first: tuple[nn.Module, Any], again: tuple[nn.Module, Any]) -> None:
    assert_same(first[1].state_dict(), again[1].state_dict(), "optimizer")
    for model, optimizer in (first, again):
        step(model, optimizer)
    for one, other in zip(first[0].state_dict().values(), again[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("later", WRAPPERS)
@pytest.mark.parametrize("earlier", WRAPPERS)
def test_a_wrapper_more_or_less_changes_nothing(memory_path: Path, earlier: str, later: str) -> None:
    first = made(0, WRAPPERS[earlier])
    Run(memory_path / "run", *first).train(3)
    again = made(1, WRAPPERS[later])
    assert Run(memory_path / "run", *again).manager.load().step == 3  # type: ignore[union-attr]
    assert_continues_alike(first, again)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def by_name(model: nn.Module, optimizer: Any) -> Mapping[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def flat(model: nn.Module, optimizer: Any) -> Mapping[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=FLAT), strict=True))


def at_the_top(model: nn.Module, optimizer: Any) -> Mapping[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {**weights, "optimizer": state}


def their_own(model: nn.Module, optimizer: Any) -> Mapping[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("wrapper", ["plain", "DataParallel"])
@pytest.mark.parametrize("form", [by_name, flat, at_the_top, their_own])
def test_steps_of_stock_dcp_are_resumed_in_each_of_its_forms(memory_path: Path, form: Any, wrapper: str) -> None:
    first = made(0, WRAPPERS[wrapper])
    for _ in range(2):
        step(*first)
    dcp.save(dict(form(*first)), checkpoint_id=memory_path / "run" / "step-2", no_dist=True)
    again = made(1)
    run = Run(memory_path / "run", *again, exclude_from_loading=["rng"])
    assert run.manager.load().step == 2  # type: ignore[union-attr]
    assert_continues_alike(first, again)


def fewer(parameters: list[Any]) -> list[Any]:
    return [{"params": parameters[1:3]}, {"params": parameters[3:]}]


def in_other_groups(parameters: list[Any]) -> list[Any]:
    return [{"params": parameters[:4]}, {"params": parameters[4:]}]


@pytest.mark.parametrize("groups", [fewer, in_other_groups])
def test_numbered_state_is_refused_where_the_numbers_may_mean_other_parameters(memory_path: Path, groups: Any) -> None:
    first = made(0)
    step(*first)
    dcp.save(dict(their_own(*first)), checkpoint_id=memory_path / "run" / "step-2", no_dist=True)
    torch.manual_seed(1)
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(groups(list(model.parameters())))
    with pytest.raises(StateMismatchError, match="nothing was changed"):
        Run(memory_path / "run", model, optimizer, exclude_from_loading=["rng"]).manager.load()
    assert_same(before, dict(model.state_dict()), "model")
    assert not optimizer.state
