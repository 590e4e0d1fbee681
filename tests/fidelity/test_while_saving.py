"""What is saved in the background is the state at the call of ``save()``, whatever a loop does meanwhile."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same import assert_same
from torch import nn

from milepost import CheckpointConfig, CheckpointManager

MODES = ("disabled", "async", "async_with_pinned_mem")


class Loop:
    """What a loop keeps beside its weights, some of it in tensors that it changes at any time."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {
            "tokens": torch.zeros((), dtype=torch.int64),
            "order": torch.arange(50_000),
            "shared": torch.from_numpy(np.zeros(1000)),
            "history": [],
        }

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state

    def proceed(self) -> None:
        self.values["tokens"] += 8
        self.values["order"].copy_(torch.randperm(50_000))
        self.values["shared"].numpy()[3] = 5
        self.values["history"].append(1)


class Scaled(nn.Linear):
    """Its extra state is a tensor that every forward changes."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.largest = torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest += x.detach().abs().max()
        return super().forward(x)

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        return {"largest": self.largest}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        self.largest = state["largest"]


def parts_of_a_loop() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(Scaled())
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    model(torch.randn(4, 16)).mean().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler, "dataloader": Loop()}
    return {**parts, "train_state": Loop(), "states": {"metric": Loop()}}


@pytest.mark.parametrize("mode", MODES)
def test_what_the_loop_changes_before_the_optimizer_steps_is_saved_as_it_was(tmp_path: Path, mode: str) -> None:
    config = CheckpointConfig(interval=1, async_mode=mode)  # type: ignore[arg-type]
    parts = parts_of_a_loop()
    loops = parts["dataloader"], parts["train_state"], parts["states"]["metric"]
    with CheckpointManager(tmp_path / "run", config, **parts) as manager:
        expected = copy.deepcopy([part.state_dict() for part in (*list(parts.values())[:3], *loops)])
        manager.save(1)
        for loop in loops:
            loop.proceed()
        parts["lr_scheduler"].step()
        parts["model"](torch.randn(4, 16)).mean().backward()
        manager.maybe_wait_for_staging()
        parts["optimizer"].step()
    again = parts_of_a_loop()
    with CheckpointManager(tmp_path / "run", config, **again) as manager:
        manager.load()
    loops = again["dataloader"], again["train_state"], again["states"]["metric"]
    assert_same([part.state_dict() for part in (*list(again.values())[:3], *loops)], expected)
