"""Saves on storage that is full, failing or read-only on one rank, and on a rank that is out of descriptors.

Each save fails on all ranks with an error that names the rank and the cause, or succeeds; steps from before are whole,
nothing is left behind, and the next save works once the cause is gone.
"""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mounts import small
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from milepost import CheckpointConfig, CheckpointManager, MilepostError
from milepost.collective.comm import default_comm
from milepost.run import catalog
from milepost.run.assemble import SaveInfo
from milepost.saving.request import SaveRequest
from milepost.saving.save import Saver
from milepost.storage import LocalStorage, Storage
from milepost.testing.faulty import FaultyStorage
from milepost.testing.world import run_world
from milepost.verification.verify import verify_in

MODES = ("disabled", "async", "async_with_pinned_mem")
ROWS = 2048
"""Rows of 512 numbers: a state of 4 MiB, half on each of two ranks."""


class Big(torch.nn.Module):
    """A model of which every rank holds half."""

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.w = torch.nn.Parameter(distribute_tensor(torch.ones(ROWS, 512), mesh, [Shard(0)]))


def manager_in(folder: Path, **options: Any) -> CheckpointManager:
    config = CheckpointConfig(enable=True, interval=1, **{"keep_latest_k": 2, "last_save_model_only": False, **options})
    return CheckpointManager(folder, config, model=Big())


def error_of(act: Callable[[], object]) -> str:
    with pytest.raises(MilepostError) as caught:
        act()
    return caught.value.message


def whole_steps(folder: Path) -> list[int]:
    """The steps of a run, each byte verified; nothing else is there."""
    storage = LocalStorage(folder.parent)
    steps = []
    for entry in catalog.scan(storage, folder.name):
        assert entry.state == "committed", entry
        assert verify_in(storage, entry.path).is_sound
        steps.append(entry.step)
    # An empty place for a deletion may be another process's, about to be used: it is swept when it is old.
    places = {path.name for path in folder.glob(".milepost-deleting-*") if not [*path.iterdir()]}
    names = {path.name for path in folder.iterdir()} - {"events.jsonl", ".lock"} - places
    assert names == {f"step-{step}" for step in steps}, names
    return steps


def fill(folder: Path) -> Path:
    """Leave room for one rank's half, but not for both."""
    ballast = folder / "ballast"
    if dist.get_rank() == 0:
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
        with ballast.open("wb") as file:
            file.write(bytes(free - (3 << 20)))
            os.fsync(file.fileno())
    dist.barrier()
    return ballast


# ---- a full disk ----


def save_on_a_full_disk(folder: Path, mode: str) -> str:
    manager = manager_in(folder / "run", async_mode=mode)
    manager.save(1)
    if mode != "disabled":
        manager.pending.committed(60)  # type: ignore[union-attr]
    ballast = fill(folder)
    message = error_of(lambda: [manager.save(2), manager.maybe_wait_for_staging(), manager.save(3)])
    dist.barrier()
    assert whole_steps(folder / "run") == [1]
    if dist.get_rank() == 0:
        ballast.unlink()
    dist.barrier()
    assert manager.save(4)
    manager.close()
    dist.barrier()
    assert whole_steps(folder / "run") == [1, 4]
    return message


@pytest.mark.parametrize(("kind", "mode"), [*(("tmpfs", mode) for mode in MODES), ("ext4", "disabled")])
def test_a_disk_that_fills_up_in_the_middle_of_a_save(tmp_path: Path, kind: str, mode: str, tally: Any) -> None:
    with small(kind, tmp_path / "small") as folder:
        messages = run_world(save_on_a_full_disk, 2, folder, mode, timeout_s=60)
    assert messages[0] == messages[1]
    # If both have failed, the name of the file says whose it is.
    assert re.search(r"rank [01]|__[01]_0\.distcp|sign-off-[01]", messages[0])
    assert "no space left on device" in messages[0]
    tally(f"a real full {kind} in the middle of a save ({mode}), on 2 ranks", tried=1, lost=0)


def warn_on_a_full_disk(folder: Path) -> str:
    manager = manager_in(folder / "run", on_save_error="warn")
    assert manager.save(1)
    ballast = fill(folder)
    assert not manager.save(2)
    assert not manager.save(3)
    message = error_of(lambda: manager.save(4))
    if dist.get_rank() == 0:
        ballast.unlink()
    dist.barrier()
    assert manager.save(5)
    manager.close()
    dist.barrier()
    assert whole_steps(folder / "run") == [1, 5]
    return message


def test_warn_continues_twice_on_a_real_full_disk(tmp_path: Path) -> None:
    with small("tmpfs", tmp_path / "small") as folder:
        messages = run_world(warn_on_a_full_disk, 2, folder, timeout_s=60)
    assert messages[0] == messages[1]
    assert messages[0].startswith("3 consecutive saves failed; the last: ")


# ---- errors of one rank ----


def request(step: int, state: dict[str, Any]) -> SaveRequest:
    return SaveRequest(f"run/step-{step}", lambda: state, SaveInfo(step=step, kind="state"))


def failing_saver(folder: Path, bad: int) -> list[str]:
    """Each number in the middle of the data of one rank; then no free descriptor there at all."""
    state = Big().state_dict()
    messages = []
    for step, number in enumerate((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS), 1):
        storage: Storage = LocalStorage(folder)
        if dist.get_rank() == bad:
            storage = FaultyStorage(storage, fail_at=3 if bad == 0 else 1, number=number, tear=True)
        saver = Saver(storage, default_comm())
        messages.append(error_of(lambda saver=saver: saver.save(request(9, state))))  # type: ignore[misc]
        Saver(LocalStorage(folder), default_comm()).save(
            SaveRequest(f"run/step-{step}", lambda: state, SaveInfo(step=step, kind="state"))
        )
    saver = Saver(LocalStorage(folder), default_comm())
    saver.save(request(7, state))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if dist.get_rank() == bad:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        messages.append(error_of(lambda: saver.save(request(8, state))))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    saver.save(request(8, state))
    dist.barrier()
    assert whole_steps(folder / "run") == [1, 2, 3, 4, 7, 8]
    return messages


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_the_system_on_one_rank(memory_path: Path, bad: int, tally: Any) -> None:
    messages = run_world(failing_saver, 2, memory_path, bad, timeout_s=60)
    assert messages[0] == messages[1]
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE)
    for number, message in zip(numbers, messages[0], strict=True):
        assert os.strerror(number).lower() in message, message
        assert f"rank {bad}" in message or bad == 0, message
    tally(f"ENOSPC, EDQUOT, EIO, EROFS, EMFILE on rank {bad} of 2 alone", tried=len(numbers), lost=0)
