"""Ranks of a large world that do not finish are named with their nodes: ten ranges, and the number of the rest."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from milepost.collective.comm import default_comm
from milepost.errors import SaveError
from milepost.run.assemble import SaveInfo
from milepost.saving.job import write_file
from milepost.saving.request import SaveRequest
from milepost.saving.save import Saver
from milepost.storage import LocalStorage
from milepost.testing.world import run_world

RANKS_PER_NODE = 8
LATE_S = 12.0


def save_late(folder: Path, late: list[int]) -> tuple[str, int | None, str]:
    """Save once with some late ranks, then once more; the error of the first, and the steps at the end."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"w": DTensor.from_local(torch.full((2, 4), float(rank)), mesh, [Shard(0)])}

    def write_late(*args: object, **kwargs: object) -> object:
        time.sleep(LATE_S if rank in late else 0)
        return write_file(*args, **kwargs)  # type: ignore[arg-type]

    host = mock.patch("milepost.saving.agreement.host_name", return_value=f"node-{rank // RANKS_PER_NODE}")
    with host:
        saver = Saver(LocalStorage(folder), default_comm(), timeout_s=4.0)
        with mock.patch("milepost.saving.job.write_file", write_late), pytest.raises(SaveError) as caught:
            saver.save(SaveRequest("step-1", lambda: state, SaveInfo(step=1, kind="state")))
        saver = Saver(LocalStorage(folder), default_comm(), timeout_s=60.0)
        report = saver.save(SaveRequest("step-2", lambda: state, SaveInfo(step=2, kind="state")))
    dist.barrier()
    return caught.value.message, caught.value.rank, report.path


@pytest.mark.slow  # 64 processes
def test_late_ranks_of_64_are_named_with_their_nodes_and_the_next_save_is_committed(tmp_path: Path) -> None:
    late = [9, 10, 11, *range(15, 61, 3)]
    found = run_world(save_late, 64, tmp_path, late, timeout_s=150)
    message, rank, _ = found[0]
    assert rank == 9
    assert message.startswith(
        "ranks 9-11 (node-1), 15 (node-1), 18 (node-2), 21 (node-2), 24 (node-3), 27 (node-3), 30 (node-3), "
        "33 (node-4), 36 (node-4), 39 (node-4) and 7 more of 64 did not finish writing within 4 s; "
    )
    assert {one[:2] for one in found} == {(message, 9)}, "every rank raises the same"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2"]
