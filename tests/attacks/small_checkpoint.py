"""A small state with every kind of value, to save and then to damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import milepost
from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, MilepostError

DATA_FILES = ("__0_0.distcp", "__1_0.distcp")


def state() -> dict[str, Any]:
    """The same on every rank, so that both write a part of it."""
    generator = torch.Generator().manual_seed(1)
    return {
        **{f"w{n}": torch.rand(20 + n, 7, generator=generator) for n in range(6)},
        "half": torch.rand(33, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "loop": {"step": 7, "text": "ünï", "list": [1, 2.5, None], "raw": bytes(range(40))},
    }


def blank() -> dict[str, Any]:
    into = {key: torch.zeros_like(value) for key, value in state().items() if isinstance(value, torch.Tensor)}
    return {**into, "loop": dict.fromkeys(state()["loop"])}


def is_unchanged(found: dict[str, Any]) -> bool:
    expected = state()
    tensors = [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
    return found["loop"] == expected["loop"] and all(torch.equal(found[key], expected[key]) for key in tensors)


def save_state(path: Path) -> None:
    milepost.save(path, state())


def load_everything(step: Path) -> MilepostError | None:
    """The error of loading all of it; None if there is none, and then every value must be unchanged."""
    into = blank()
    try:
        milepost.load(step, into)
    except (CheckpointDamagedError, CheckpointNotFoundError) as error:
        return error
    assert is_unchanged(into), "a changed value was loaded"
    return None
