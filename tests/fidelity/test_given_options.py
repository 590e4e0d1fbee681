"""Options that this run gives and the checkpoint replaces: reported, and kept where they are excluded from loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from milepost import CheckpointConfig, CheckpointManager

Schedule = Callable[[Any], Any]


def run(folder: Path, schedule: Schedule | None, options: dict[str, Any], **config: Any) -> tuple[Any, Any, list[str]]:
    """Resume and train for a step; returns the optimizer, the schedule and the notes on options."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    scheduler = schedule(optimizer) if schedule is not None else None
    given = CheckpointConfig(interval=1, **config)
    with CheckpointManager(folder, given, model=model, optimizer=optimizer, lr_scheduler=scheduler) as manager:
        report = manager.load()
        if report is None:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step(0.5) if isinstance(scheduler, schedules.ReduceLROnPlateau) else scheduler.step()
            manager.save(1)
    notes = report.notes if report is not None else ()
    return optimizer, scheduler, [note.partition(": ")[2] for note in notes if "not as this run gave them" in note]


SCHEDULES: dict[str, tuple[Schedule, Schedule, str]] = {
    "cosine": (
        lambda o: schedules.CosineAnnealingLR(o, 6),
        lambda o: schedules.CosineAnnealingLR(o, 12),
        "lr_scheduler.T_max: 6, not 12",
    ),
    "plateau": (
        lambda o: schedules.ReduceLROnPlateau(o, patience=1),
        lambda o: schedules.ReduceLROnPlateau(o, patience=5),
        "lr_scheduler.patience: 1, not 5",
    ),
    "multistep": (
        lambda o: schedules.MultiStepLR(o, [2, 2, 5]),
        lambda o: schedules.MultiStepLR(o, [2, 9]),
        "lr_scheduler.milestones: ((2, 2), (5, 1)), not ((2, 1), (9, 1))",
    ),
    "sequential": (
        lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o), schedules.ExponentialLR(o, 0.9)], [2]),
        lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o), schedules.ExponentialLR(o, 0.5)], [4]),
        "lr_scheduler._milestones: (2,), not (4,); lr_scheduler._schedulers.1.gamma: 0.9, not 0.5",
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_another_length(memory_path: Path, name: str) -> None:
    saved, here, note = SCHEDULES[name]
    run(memory_path, saved, {"lr": 0.1})
    assert run(memory_path, saved, {"lr": 0.1})[2] == []
    assert run(memory_path, here, {"lr": 0.1})[2] == [note]
    pattern = note.partition(":")[0]
    if name == "cosine":  # the option is kept, the rest is as saved
        _, schedule, notes = run(memory_path, here, {"lr": 0.1}, exclude_from_loading=[pattern])
        assert (schedule.T_max, schedule.last_epoch, notes) == (12, 1, [])


def test_options_of_the_optimizer(memory_path: Path) -> None:
    run(memory_path, None, {"lr": 0.1, "weight_decay": 0.1, "foreach": True})
    other = {"lr": 0.5, "weight_decay": 0.3, "fused": True}
    optimizer, _, notes = run(memory_path, None, other)
    assert optimizer.param_groups[0]["lr"] == 0.1
    changed = ("lr: 0.1, not 0.5", "weight_decay: 0.1, not 0.3", "foreach: True, not None", "fused: None, not True")
    assert notes == ["; ".join(f"optimizer.param_groups.*.{text}" for text in changed)]
    kept = [f"optimizer.param_groups.*.{name}" for name in ("lr", "weight_decay", "foreach", "fused")]
    optimizer, _, notes = run(memory_path, None, other, exclude_from_loading=kept)
    group = optimizer.param_groups[0]
    assert notes == []
    assert {name: group[name] for name in (*other, "foreach")} == {**other, "foreach": None}


def test_a_learning_rate_that_a_schedule_changed_is_no_difference(memory_path: Path) -> None:
    run(memory_path, lambda o: schedules.ExponentialLR(o, 0.5), {"lr": 0.1})
    assert run(memory_path, lambda o: schedules.ExponentialLR(o, 0.5), {"lr": 0.1})[2] == []
    notes = run(memory_path, lambda o: schedules.ExponentialLR(o, 0.5), {"lr": 0.2})[2]
    assert notes == ["optimizer.param_groups.*.initial_lr: 0.1, not 0.2"]
