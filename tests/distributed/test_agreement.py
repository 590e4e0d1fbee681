"""The ranks' agreement before a save: all ranks' empty mappings, one gloo group, one report of a failure."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import milepost
from milepost.collective.comm import ProcessGroupComm, default_comm
from milepost.run import checkpoint_record
from milepost.run.assemble import SaveInfo
from milepost.saving.request import SaveRequest
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
        assert max(gathered) < 1000 < nesting, "digests alone"
    read = milepost.load(tmp_path / "step-2")
    assert read["more"]["nested"].tolist() == [1, 1]
    for stage in (0, 1):
        values = read[f"stage {stage}"]["a module of some depth"]
        assert [value.item() for value in values.values()] == list(range(300))


def save_a_mixture(folder: Path) -> list[list[int]]:
    """Tensors on the mesh of all ranks, and on that of a pair; plain ones; values of each rank; ranks that forget."""
    comm = CountingComm()
    rank = comm.rank
    every, pairs = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "pair"))
    whole = torch.arange(40.0).reshape(10, 4)
    strided = distribute_tensor(whole, pairs, [Shard(0), Shard(0)])
    state: dict[str, Any] = {
        "w": distribute_tensor(whole, every, [Shard(0)]),
        "strided": strided,
        f"stage {rank // 2}": {"w": distribute_tensor(whole + rank // 2, pairs["pair"], [Shard(1)])},
        "both": {"norm": distribute_tensor(whole, pairs["pair"], [Shard(0)]), "plain": torch.arange(5)},
        "rng": {f"rank{rank}": {"torch": torch.full((3,), rank), "seed": rank}},
        "step": 7,
    }
    saver = Saver(LocalStorage(folder), comm)
    asked = []

    def save(number: int) -> None:
        saver.save(SaveRequest(f"step-{number}", lambda: state, SaveInfo(step=number, kind="state")))
        asked.append([sum(len(ranks) for ranks in comm.collected), max(comm.gathered)])
        comm.collected.clear()
        comm.gathered.clear()

    save(0)
    save(1)
    for number, forgets in ((2, 1), (3, 0)):
        if rank == forgets:
            saver = Saver(LocalStorage(folder), comm)
        save(number)
    if rank == 3:
        state["more"] = torch.ones(2)
    save(4)
    save(5)
    return asked


def test_ranks_plan_alone_whatever_they_hold_and_whichever_of_them_has_forgotten(tmp_path: Path) -> None:
    whole = torch.arange(40.0).reshape(10, 4)
    for asked in run_world(save_a_mixture, 4, tmp_path):
        # One of each stage; if rank 0 has forgotten, all, for their own state; and one whose structure has changed.
        assert [num for num, _ in asked] == [2, 0, 0, 4, 1, 0]
    for number in range(6):
        read = milepost.load(tmp_path / f"step-{number}")
        for tensor in (
            read["w"],
            read["strided"],
            read["both"]["norm"],
            read["stage 0"]["w"],
            read["stage 1"]["w"] - 1,
        ):
            assert torch.equal(tensor, whole)
        assert read["both"]["plain"].tolist() == [0, 1, 2, 3, 4]
        assert [read["rng"][f"rank{rank}"]["seed"] for rank in range(4)] == [0, 1, 2, 3]
        assert [read["rng"][f"rank{rank}"]["torch"].tolist() for rank in range(4)] == [[rank] * 3 for rank in range(4)]
        assert ("more" in read) is (number >= 4)
        assert milepost.verify(tmp_path / f"step-{number}").is_sound


def save_by_the_function(folder: Path) -> list[bool]:
    every = init_device_mesh("cpu", (2,))
    found = []
    for number in range(4):
        state: dict[str, Any] = {"w": distribute_tensor(torch.arange(6.0) + number, every, [Shard(0)]), "n": number}
        if number == 2 and dist.get_rank() == 1:
            state["more"] = torch.ones(2)
        found.append(milepost.save(folder / f"step-{number}", state).reused_plan)
    return found


def test_calls_of_save_use_the_plan_of_the_last_one(tmp_path: Path) -> None:
    milepost.save(tmp_path / "alone", {"w": torch.ones(3)})
    assert milepost.save(tmp_path / "alone", {"w": torch.zeros(3)}).reused_plan
    assert run_world(save_by_the_function, 2, tmp_path) == [[False, True, False, False]] * 2
    for number in range(4):
        assert milepost.load(tmp_path / f"step-{number}")["w"].tolist() == [n + number for n in range(6)]
