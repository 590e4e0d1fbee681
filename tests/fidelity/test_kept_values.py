"""Values of this run that a load leaves as they are: learning rates, and whatever is excluded from loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from changed_runs import Net, Run, close_managers, cosine, opened, scheduled, step_lr  # noqa: F401 - one is a fixture
from same import assert_same
from torch.optim import lr_scheduler

from milepost import StateMismatchError


@pytest.mark.parametrize("make", [cosine, step_lr], ids=["cosine", "step"])
def test_a_fresh_optimizer_gets_the_rate_of_the_loaded_schedule(memory_path: Path, make: Any) -> None:
    first = scheduled(memory_path, make)
    rates = [first.optimizer.param_groups[0]["lr"]]
    run = scheduled(memory_path, make, 0, exclude_from_loading=["optimizer"])
    run.load()
    assert not run.optimizer.state
    assert [run.optimizer.param_groups[0]["lr"]] == rates
    for other in (first, run):
        other.optimizer.step()
        other.scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("make", [cosine, step_lr, None], ids=["cosine", "step", "none"])
def test_a_new_schedule_begins_with_this_runs_rate(memory_path: Path, make: Any) -> None:
    first = scheduled(memory_path, cosine, 4)
    assert first.optimizer.param_groups[0]["lr"] < 1e-9
    run = scheduled(memory_path, make, 0, exclude_from_loading=["lr_scheduler"])
    undisturbed = scheduled(memory_path / "fresh", make, 0)
    run.load()
    assert run.optimizer.state
    for _ in range(3):
        assert run.optimizer.param_groups[0]["lr"] == undisturbed.optimizer.param_groups[0]["lr"]
        for other in (run, undisturbed):
            other.optimizer.step()
            if make:
                other.scheduler.step()


def test_a_schedule_where_there_was_none(memory_path: Path) -> None:
    scheduled(memory_path, None)
    with pytest.raises(StateMismatchError, match=r"holds no lr_scheduler.*exclude_from_loading = lr_scheduler"):
        scheduled(memory_path, cosine, 0).load()
    opened.pop().close()
    run = scheduled(memory_path, cosine, 0, exclude_from_loading=["lr_scheduler"])
    run.load()
    assert run.optimizer.param_groups[0]["lr"] == 0.1


def test_each_of_several_schedulers_its_own(memory_path: Path) -> None:
    def two(folder: Path, steps: int, count: int = 2, **config: Any) -> Run:
        model = Net()
        optimizers = [
            torch.optim.AdamW(model.body.parameters(), lr=0.1),
            torch.optim.AdamW(model.head.parameters(), lr=0.2),
        ]
        schedulers = [cosine(optimizers[0]), step_lr(optimizers[1])][:count]
        run = Run(folder, model, optimizers, schedulers, **config)
        return run.train(steps) if steps else run

    first = two(memory_path, 3)
    run = two(memory_path, 0)
    run.load()
    for one, other in zip(first.scheduler, run.scheduler, strict=True):
        assert_same(other.state_dict(), one.state_dict())
    opened.pop().close()
    with pytest.raises(StateMismatchError, match="schedulers"):
        two(memory_path, 0, 1).load()
    opened.pop().close()
    two(memory_path, 0, 1, exclude_from_loading=["lr_scheduler"]).load()


def test_any_key_or_glob_can_be_left_as_it_is(memory_path: Path) -> None:
    first = scheduled(memory_path)
    run = scheduled(
        memory_path, cosine, 0, exclude_from_loading=["head.*", "optimizer.state.head.*", "*.lr", "lr_scheduler.T_max"]
    )
    run.scheduler.T_max = 77
    fresh = run.model.head.weight.detach().clone()
    with torch.no_grad():
        run.model.head.weight.add_(1)
    run.load()
    assert torch.equal(run.model.head.weight, fresh + 1)
    assert run.model.head.weight not in run.optimizer.state
    assert run.optimizer.param_groups[0]["lr"] == 0.1
    assert run.scheduler.T_max == 77
    assert run.scheduler.last_epoch == 2
    assert_same(run.model.body.state_dict(), first.model.body.state_dict())


def test_an_exclusion_that_leaves_a_part_incomplete(memory_path: Path) -> None:
    """Parts of a parameter's state may be excluded; the run's own values are kept. Generators are left unchanged."""
    scheduled(memory_path)
    fresh = scheduled(memory_path, cosine, 0, exclude_from_loading=["optimizer.state.*.step"])
    with pytest.raises(StateMismatchError, match=r"head.weight: step excluded, and this run has none yet"):
        fresh.load()
    opened.pop().close()
    run = scheduled(memory_path, cosine, 0, exclude_from_loading=["optimizer.state.*.step", "rng.rank0.numpy*"])
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(7):
        run.optimizer.step()
    state = torch.get_rng_state()
    assert "random generators keep this run's seeds" in run.load()
    assert {entry["step"].item() for entry in run.optimizer.state.values()} == {7}
    assert torch.equal(torch.get_rng_state(), state)


def test_momentum_that_this_runs_schedule_sets(memory_path: Path) -> None:
    scheduled(memory_path, step_lr)
    cycle: Any = lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)  # noqa: E731
    run = scheduled(memory_path, cycle, 0, exclude_from_loading=["lr_scheduler.*"])
    betas = run.optimizer.param_groups[0]["betas"]
    run.load()
    assert run.optimizer.param_groups[0]["betas"] == betas != (0.9, 0.999)
