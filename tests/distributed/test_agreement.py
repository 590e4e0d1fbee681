"""What the ranks agree on before a save: all ranks' empty mappings, one gloo group, one report of a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import milepost
from milepost.collective.comm import default_comm
from milepost.run import catalog
from milepost.run.assemble import SaveInfo
from milepost.saving.agreement import SaveRequest
from milepost.saving.save import Saver
from milepost.storage import LocalStorage
from milepost.tensors.state import EMPTY_MAPPINGS
from milepost.testing.world import run_world


def save_empty_mappings(folder: Path) -> list[list[Any]]:
    saver = Saver(LocalStorage(folder), default_comm())
    found = []
    for number in range(3):
        state: dict[str, Any] = {"w": torch.ones(3), f"of rank {dist.get_rank()}": {}}
        if number == 2 and dist.get_rank() == 1:
            state["later"] = {"nested": {}}
        info = SaveInfo(step=number, kind="state")
        saver.save(SaveRequest(f"step-{number}", lambda state=state: state, info))
        manifest = catalog.read_manifest(LocalStorage(folder), f"step-{number}")
        found.append(sorted(map(list, manifest.extra[EMPTY_MAPPINGS])))
    return found


def test_the_empty_mappings_of_every_rank_are_recorded(tmp_path: Path) -> None:
    ours = [["of rank 0"], ["of rank 1"]]
    for found in run_world(save_empty_mappings, 2, tmp_path):
        assert found == [ours, ours, [["later", "nested"], *ours]]


def save_without_gloo(folder: Path) -> int:
    """As on a default group of NCCL alone."""
    with (
        mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"),
        mock.patch.object(dist, "new_group", wraps=dist.new_group) as made,
    ):
        for number in range(3):
            milepost.save(folder / f"step-{number}", {"w": torch.ones(3)})
    return made.call_count


def test_one_gloo_group_is_made_however_many_saves_there_are(tmp_path: Path) -> None:
    assert run_world(save_without_gloo, 2, tmp_path) == [1, 1]
