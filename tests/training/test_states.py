"""Further objects of a run, ``CheckpointManager(states=...)``, and loading one step by its number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import CheckpointNotFoundError, ConfigError, StateMismatchError

CONFIG = CheckpointConfig(enable=True, interval=1)


def trained(folder: Path, steps: int, config: CheckpointConfig = CONFIG, load: dict[str, Any] | None = None) -> Any:
    """A model, its average and a second optimizer's state after some more steps."""
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(2, 1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters())
    second = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    states = {"ema": average, "other": other, "second": second, "scaler": scaler}
    with CheckpointManager(folder, config, model=model, optimizer=optimizer, states=states) as manager:
        report = manager.load(**(load or {}))
        start = report.step if report else 0
        for step in range(start + 1, start + steps + 1):
            scaler.scale(other(model(torch.randn(4, 3))).square().mean()).backward()
            for stepped in (optimizer, second):
                scaler.step(stepped)
                stepped.zero_grad()
            scaler.update()
            average.update_parameters(model)
            manager.save(step)
    tensors = [*model.parameters(), *average.parameters(), average.n_averaged, *other.parameters()]
    momenta = [entry["momentum_buffer"] for entry in second.state_dict()["state"].values()]
    return [tensor.tolist() for tensor in (*tensors, *momenta)], scaler.state_dict()


def test_objects_of_every_kind_resume(memory_path: Path) -> None:
    whole = trained(memory_path / "whole", 6)
    trained(memory_path / "parts", 2)
    assert trained(memory_path / "parts", 4) == whole
    assert whole[1]["scale"] > 8.0


def test_a_step_is_loaded_by_number_each_time(memory_path: Path) -> None:
    for _ in range(2):  # unlike `load_step`, which continues the branch that it has started
        trained(memory_path, 3, load={"step": None})
    assert trained(memory_path, 1, load={"step": 2}) == trained(memory_path, 1, load={"step": 2})
    with pytest.raises(CheckpointNotFoundError, match="step 99 does not exist"):
        trained(memory_path, 1, load={"step": 99})


def test_objects_that_a_checkpoint_lacks_are_named(memory_path: Path) -> None:
    model = nn.Linear(3, 2)
    with CheckpointManager(memory_path, CONFIG, model=model) as manager:
        manager.save(1)
    with (
        CheckpointManager(memory_path, CONFIG, model=model, states={"ema": AveragedModel(model)}) as manager,
        pytest.raises(StateMismatchError, match="exclude_from_loading = states"),
    ):
        manager.load()


def test_what_has_no_state_is_refused(memory_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"states\['a.b'\].*\n.*states\['n'\]"):
        CheckpointManager(memory_path, CONFIG, model=nn.Linear(1, 1), states={"a.b": nn.Linear(1, 1), "n": 3})
