"""The file system operations of a save, counted in real worlds: exactly the numbers in docs/scale.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from milepost.collective.comm import default_comm
from milepost.run.assemble import SaveInfo
from milepost.saving.request import SaveRequest
from milepost.saving.save import Saver
from milepost.storage import LocalStorage
from milepost.testing.world import run_world
from milepost.testing.wrap import TraceStorage

A_RANK = Counter(open_write=1, write_at=1, sync=1, close=1, write=1, rename=1)
"""Its file, made durable, and its sign-off. Of the names rank 0 takes care."""
A_COMMIT = Counter(stat=4, list=3, make_folder=3, write=6, sync_folder=6, rename=2, remove_tree=2)
"""By rank 0, beside its own part and reading the sign-offs; however many ranks there are."""


def save_three_times(folder: Path) -> list[Counter[str]]:
    storage = TraceStorage(LocalStorage(folder))
    saver = Saver(storage, default_comm())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"w": distribute_tensor(torch.arange(640.0).reshape(64, 10), mesh, [Shard(0)])}
    found = []
    for number in range(3):
        storage.operations.clear()
        info = SaveInfo(step=number, kind="state")
        saver.save(SaveRequest(f"step-{number}", lambda: state, info))
        found.append(Counter(operation.name for operation in storage.operations))
    return found


@pytest.mark.slow  # up to 32 processes
@pytest.mark.parametrize("num_ranks", [2, 8, 16, 32])
def test_operations_of_a_save_grow_with_the_ranks_and_no_faster(tmp_path: Path, num_ranks: int) -> None:
    first, *others = run_world(save_three_times, num_ranks, tmp_path, timeout_s=150)
    for found in others:
        assert found == [A_RANK] * 3
    for found in first:
        looks = found.pop("names")  # for sign-offs, less and less often
        assert looks < 50
        assert found == A_RANK + A_COMMIT + Counter(read=num_ranks)
