"""What the ranks agree on before a save: all ranks' empty mappings, one gloo group, one report of a failure."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import milepost
from milepost.collective.comm import ProcessGroupComm, default_comm
from milepost.run import checkpoint_record
from milepost.run.assemble import SaveInfo
from milepost.saving.agreement import SaveRequest
from milepost.saving.save import Saver
from milepost.storage import LocalStorage
from milepost.tensors.state import EMPTY_MAPPINGS, flatten
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
        manifest = checkpoint_record.read_manifest(LocalStorage(folder), f"step-{number}")
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


class CountingComm(ProcessGroupComm):
    """Counts the bytes that this rank brings to each exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []
        self.collected: list[list[int]] = []

    def gather(self, value: Any) -> list[Any] | None:
        self.gathered.append(len(pickle.dumps(value)))
        return super().gather(value)

    def collect(self, value: Any, ranks: Sequence[int]) -> list[Any]:
        self.collected.append(list(ranks))
        return super().collect(value, ranks)


def save_two_stages(folder: Path) -> tuple[list[int], list[list[int]], int]:
    """Two stages of a pipeline on two ranks each, saved three times; the last time one has grown."""
    comm = CountingComm()
    saver = Saver(LocalStorage(folder), comm)
    stage = comm.rank // 2
    state: dict[str, Any] = {
        f"stage {stage}": {"a module of some depth": {f"of a long name, {n}": torch.full((1,), n) for n in range(300)}}
    }
    nesting = len(pickle.dumps([(key, path) for key, path in flatten(state).paths.items()]))
    for number in range(3):
        if number == 2 and stage == 1:
            state["more"] = {"nested": torch.ones(2)}
        saver.save(SaveRequest(f"step-{number}", lambda: state, SaveInfo(step=number, kind="state")))
    return comm.gathered, comm.collected, nesting


def test_each_nesting_is_brought_by_one_rank_and_only_while_it_is_not_known(tmp_path: Path) -> None:
    for gathered, collected, nesting in run_world(save_two_stages, 4, tmp_path):
        assert collected == [[0, 2], [2]]
        assert gathered[0] < 1.5 * nesting, "the layout, which rank 0 has to know of every rank, and no nesting"
        assert max(gathered[1:3]) < 1000, "nothing has changed"
    read = milepost.load(tmp_path / "step-2")
    assert read["more"]["nested"].tolist() == [1, 1]
    for stage in (0, 1):
        values = read[f"stage {stage}"]["a module of some depth"]
        assert [value.item() for value in values.values()] == list(range(300))
