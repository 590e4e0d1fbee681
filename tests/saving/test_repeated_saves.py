"""Saves that reuse the previous one's plan: every change since is in the next step."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import milepost
from milepost.format import dcp_writer
from milepost.format.remembered import Remembered
from milepost.run.checkpoint_record import read_manifest
from milepost.storage import LocalStorage

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def state(**changed: Any) -> dict[str, Any]:
    options = {"lr": 0.1, "betas": (0.9, 0.999), "fused": None, "amsgrad": False, "name": "adamw", "decay": 0.0}
    weights = {f"layers.{n}.weight": torch.full((4, 3), float(n)) for n in range(6)}
    return {**weights, "large": torch.arange(70_000.0), "optimizer": {**options, **changed}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"decay": 0.0}, {"decay": -0.0}),
        ({"decay": 0.0}, {"decay": 0}),
        ({"decay": 1}, {"decay": True}),
        ({"decay": 1}, {"decay": 1.0}),
        ({"betas": (0, 1)}, {"betas": (False, 1.0)}),
        ({"betas": (0.9, 0.999)}, {"betas": (0.9, 0.95)}),
        ({"lr": math.inf}, {"lr": -math.inf}),
        ({"lr": 255}, {"lr": 256}),  # a longer record
        ({"name": "adamw"}, {"name": "adam"}),
        ({"fused": None}, {"fused": True}),
        ({"lr": {"a": 1, "b": 2}}, {"lr": {"b": 2, "a": 1}}),
        ({"lr": {"a": 1}}, {"lr": OrderedDict(a=1)}),
        ({"lr": [1, 2]}, {"lr": (1, 2)}),
    ],
    ids=repr,
)
def test_every_change_of_a_value_is_in_the_next_step(one: Any, other: Any, memory_path: Path) -> None:
    for number, changed in enumerate((one, other, one)):
        now = state(**changed)
        milepost.save(memory_path / f"step-{number}", now)
        assert repr(milepost.load(memory_path / f"step-{number}")["optimizer"]) == repr(now["optimizer"])


def test_a_list_that_is_changed_in_place_is_seen(memory_path: Path) -> None:
    now = state(schedule=[1, (2, 3)])
    milepost.save(memory_path / "step-1", now)
    now["optimizer"]["schedule"].append(4)
    milepost.save(memory_path / "step-2", now)
    assert milepost.load(memory_path / "step-2")["optimizer"]["schedule"] == [1, (2, 3), 4]
    assert milepost.load(memory_path / "step-1")["optimizer"]["schedule"] == [1, (2, 3)]


@pytest.mark.parametrize("change", ["shape", "dtype", "renamed", "removed", "order", "strides", "in place"])
def test_every_change_of_a_tensor_is_in_the_next_step(change: str, memory_path: Path) -> None:
    now = state()
    milepost.save(memory_path / "step-1", now)
    key = "layers.2.weight"
    if change == "shape":
        now[key] = torch.ones(3, 4)
    elif change == "dtype":
        now[key] = now[key].to(torch.bfloat16)
    elif change == "renamed":
        now["layers.2.bias"] = now.pop(key)
    elif change == "removed":
        del now[key]
    elif change == "order":
        now[key] = now.pop(key)
    elif change == "strides":
        now[key] = torch.arange(12.0).reshape(3, 4).T
    else:
        now[key].fill_(7)
    milepost.save(memory_path / "step-2", now)
    found = milepost.load(memory_path / "step-2")
    assert list(found) == list(now)
    assert [key for key in now if key != "optimizer" and not torch.equal(found[key], now[key])] == []
    assert [key for key in now if key != "optimizer" and found[key].dtype != now[key].dtype] == []


def test_what_a_step_records_does_not_depend_on_the_saves_before(memory_path: Path) -> None:
    """``.metadata`` is the one of a process that saves for the first time, also after saves of other states."""
    for number, changed in enumerate(({}, {"lr": 300}, {"more": 1}, {})):
        path = memory_path / f"step-{number}"
        milepost.save(path, state(**changed))
        written = (path / ".metadata").read_bytes()
        with mock.patch.object(dcp_writer, "_last_start", Remembered()):
            assert written == dcp_writer.dump_metadata(read_manifest(LocalStorage(memory_path), path.name))
        assert milepost.verify(path).verdict == "ok"
