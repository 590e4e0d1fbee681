"""A run whose nodes have a folder each: no mix of old and new, and never a silent start from scratch."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import milepost
from milepost import CheckpointConfig, CheckpointManager, Commit
from milepost.cli.main import main
from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, ConfigError, SaveError
from milepost.run import catalog, checkpoint_record, node_steps
from milepost.saving.copy_part import copy_part
from milepost.saving.copy_step import Spot, begin_copy
from milepost.storage import LocalStorage, open_storage
from milepost.testing.world import run_world
from milepost.verification.verify import verify

RANKS_A_NODE = 2
NUM_RANKS = 4


class Progress:
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def home(base: Path) -> Path:
    """This rank's node's own disk."""
    return base / f"node{dist.get_rank() // RANKS_A_NODE}"


def steps_here(base: Path) -> list[int]:
    entries = catalog.scan(*open_storage(home(base) / "run"))
    assert all(entry.state == "part" for entry in entries), entries
    return [entry.step for entry in entries]


class Run:
    """A few steps of training of a sharded model, a replicated one and a scheduler, as one start of a job."""

    def __init__(self, base: Path, seen: list[Commit] | None = None, **options: Any):
        os.environ["NODE_DISK"] = str(home(base))
        torch.manual_seed(1)
        self.sharded = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 8))
        fully_shard(self.sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.replica = nn.Linear(8, 70)
        self.model = nn.ModuleDict({"sharded": self.sharded, "replica": self.replica})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.progress = Progress()
        config = CheckpointConfig(
            **{
                "enable": True,
                "interval": 1,
                "folder_per_node": True,
                "remote_folder": str(base / "remote"),
                "last_save_model_only": False,
                **options,
            }
        )
        self.manager = CheckpointManager(
            "$NODE_DISK/run",
            config,
            model=self.model,
            optimizer=self.optimizer,
            train_state=self.progress,
            on_commit=seen.append if seen is not None else None,
        )

    def load(self) -> milepost.LoadReport | None:
        return self.manager.load()

    def train(self, upto: int, *, save: bool = True) -> None:
        while self.progress.step < upto:
            self.progress.step += 1
            torch.manual_seed(self.progress.step)
            self.replica(self.sharded(torch.randn(3, 64))).square().sum().backward()
            for parameter in self.replica.parameters():
                dist.all_reduce(parameter.grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if save:
                self.manager.save(self.progress.step)
                self.manager.maybe_wait_for_staging()

    def values(self) -> list[list[float]]:
        """All weights, and Adam's state, whole: the same on every rank."""
        found = []
        for parameter in self.model.parameters():
            for tensor in (parameter.data, self.optimizer.state.get(parameter, {}).get("exp_avg", torch.zeros(1))):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                found.append(whole.flatten().tolist())
        return found

    def drop(self) -> None:
        """End like a job that is killed: nothing more is copied."""
        self.manager.__exit__(SystemExit, SystemExit(), None)


def undisturbed(base: Path, upto: int) -> list[list[float]]:
    run = Run(base / "undisturbed", enable=False)
    run.train(upto, save=False)
    return run.values()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    dist.barrier()


def world(act: Callable[..., Any], *args: Any, num_ranks: int = NUM_RANKS) -> list[Any]:
    return run_world(act, num_ranks, *args, timeout_s=100)


# ---- saving, copying, resuming ----


def save_wipe_and_resume(base: Path, mode: str) -> None:
    seen: list[Commit] = []
    run = Run(base, seen, async_mode=mode, keep_latest_k=2, remote_keep_latest_k=0)
    assert run.load() is None
    run.train(3)
    run.manager.close()
    assert run.manager.committed_step == 3
    dist.barrier()
    assert steps_here(base) == [2, 3]
    remote = catalog.scan(*open_storage(base / "remote"))
    assert [(entry.step, entry.state) for entry in remote][-1] == (3, "committed")
    if dist.get_rank() == 0:
        assert verify(base / "remote/step-3").is_sound
        assert [(one.step, one.tier) for one in seen if one.tier == "folder"] == [(s, "folder") for s in (1, 2, 3)]
        shutil.rmtree(base / "node1")  # its disk is new
    expected = run.values()
    dist.barrier()

    again = Run(base, async_mode=mode, keep_latest_k=2)
    report = again.load()
    assert report is not None
    assert report.resumed_step == 3
    assert again.values() == expected
    again.train(5)
    again.manager.close()
    assert again.values() == undisturbed(base, 5)
    dist.barrier()
    # On the node that has it, what the run resumed from stays.
    assert steps_here(base) == ([3, 4, 5] if dist.get_rank() < RANKS_A_NODE else [4, 5])


@pytest.mark.parametrize(
    "mode",
    [
        "disabled",
        pytest.param("async", marks=pytest.mark.slow),
        pytest.param("async_with_pinned_mem", marks=pytest.mark.slow),
    ],
)
def test_a_node_that_comes_back_empty_reads_from_the_remote_folder(memory_path: Path, mode: str) -> None:
    world(save_wipe_and_resume, memory_path, mode)


def remote_steps(base: Path) -> list[int]:
    return [entry.step for entry in catalog.scan(*open_storage(base / "remote")) if entry.is_usable]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_in_weights(folder: Path) -> None:
    """Change a bit of a weight in each file of a part."""
    manifest = checkpoint_record.read_part(*open_storage(folder)).manifest
    for file in {shard.file for tensor in manifest.tensors.values() for shard in tensor.shards}:
        shards = [
            s for key, t in manifest.tensors.items() if key.endswith("weight") for s in t.shards if s.file == file
        ]
        flip(folder / file, shards[0].data_offset)


def killed_behind_the_remote_folder(base: Path) -> None:
    run = Run(base, remote_every_n_steps=2, keep_latest_k=3)
    run.load()
    run.train(2)
    wait_until(lambda: 2 in remote_steps(base))
    at_2 = run.values()
    run.train(3)
    wait_until(lambda: 3 in node_steps.settled_steps(*open_storage(home(base) / "run")))
    at_3 = run.values()
    run.drop()
    dist.barrier()
    assert remote_steps(base) == [2]

    # Every node has its part of a step that is nowhere else.
    again = Run(base, remote_every_n_steps=2, keep_latest_k=3)
    report = again.load()
    assert report is not None
    assert report.resumed_step == 3
    assert str(home(base)) in report.path
    assert again.values() == at_3
    again.drop()
    dist.barrier()

    # A bit of it has changed on one node: all ranks load the step before, and no rank keeps the newer state.
    if dist.get_rank() == 3:
        flip_in_weights(home(base) / "run/step-3")
    dist.barrier()
    again = Run(base, remote_every_n_steps=2, keep_latest_k=3)
    report = again.load()
    assert report is not None
    assert report.resumed_step == 2
    assert again.values() == at_2
    again.drop()
    dist.barrier()

    # One node's part of a step is damaged, and the remote folder has the step: that node reads it there.
    if dist.get_rank() == 3:
        assert catalog.examine(*open_storage(home(base) / "run/step-3")).state == "damaged"
        flip_in_weights(home(base) / "run/step-2")
    dist.barrier()
    again = Run(base, remote_every_n_steps=2, keep_latest_k=3)
    report = again.load()
    assert report is not None
    assert report.resumed_step == 2
    assert again.values() == at_2
    again.train(4)
    again.manager.close()
    assert again.values() == undisturbed(base, 4)


def test_a_killed_run_resumes_what_all_nodes_have_and_falls_back_together(memory_path: Path) -> None:
    world(killed_behind_the_remote_folder, memory_path)
    assert verify(memory_path / "remote/step-4").is_sound


def lost_parts(base: Path) -> None:
    run = Run(base, remote_every_n_steps=100)
    run.load()
    run.train(2)
    wait_until(lambda: 2 in node_steps.settled_steps(*open_storage(home(base) / "run")))
    run.drop()
    dist.barrier()
    assert remote_steps(base) == []
    if dist.get_rank() == 2:
        shutil.rmtree(home(base) / "run/step-2")
    dist.barrier()

    # Nodes that disagree on the newest step resume from one that all have, and log it.
    again = Run(base, remote_every_n_steps=100)
    report = again.load()
    assert report is not None
    assert report.resumed_step == 1
    assert any("node 1 (ranks 2-3) has no part of it" in note for note in report.notes), report.notes
    again.drop()
    dist.barrier()
    if dist.get_rank() == 2:
        shutil.rmtree(home(base))
    dist.barrier()

    # The steps are lost, which must not start a new run.
    again = Run(base, remote_every_n_steps=100)
    with pytest.raises(CheckpointDamagedError, match="refusing to start a new run over existing steps"):
        again.load()
    again.drop()


def test_a_lost_part_is_reported_and_is_never_a_new_run(memory_path: Path) -> None:
    world(lost_parts, memory_path)


def a_disk_that_fails(base: Path) -> None:
    run = Run(base, async_mode="async", keep_latest_k=1)
    run.load()
    run.train(1)
    run.manager.maybe_wait_for_saving()
    dist.barrier()
    is_full = (
        mock.patch.object(LocalStorage, "open_write", refuse) if dist.get_rank() == 3 else contextlib.nullcontext()
    )
    with is_full:
        run.train(2)
        with pytest.raises(SaveError, match=r"rank 3: .*no space"):
            run.manager.maybe_wait_for_saving()
    dist.barrier()
    assert 1 in steps_here(base)
    run.train(3)
    run.manager.close()
    dist.barrier()
    assert steps_here(base) == [3]
    assert remote_steps(base)[-1] == 3
    again = Run(base)
    report = again.load()
    assert report is not None
    assert report.resumed_step == 3
    assert again.values() == undisturbed(base, 3)
    again.drop()


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def test_an_error_on_one_node_fails_the_save_on_all_and_deletes_nothing(memory_path: Path) -> None:
    world(a_disk_that_fails, memory_path)


def resume_on_one_node(base: Path) -> None:
    global RANKS_A_NODE
    RANKS_A_NODE = NUM_RANKS  # this job has one node, with the first one's disk
    run = Run(base)
    report = run.load()
    assert report is not None
    assert report.resumed_step == 2
    assert report.path.startswith(str(base / "remote"))
    run.train(3)
    run.manager.close()
    assert run.values() == undisturbed(base, 3)
    plain = Run(base, folder_per_node=False, remote_folder="")
    if dist.get_rank() == 0:
        assert [(entry.step, entry.state) for entry in catalog.scan(*open_storage(home(base) / "run"))][-1] == (
            3,
            "committed",
        )
    plain.drop()


def short_run(base: Path, steps: int) -> None:
    run = Run(base)
    run.load()
    run.train(steps)
    run.manager.close()


def refused_without_the_option(base: Path) -> None:
    run = Run(base, folder_per_node=False, remote_folder="")
    with pytest.raises(ConfigError, match=r"holds parts of steps .*node 0 of 2.*checkpoint\.folder_per_node"):
        run.load()
    run.drop()


@pytest.mark.slow
def test_other_ranks_read_the_remote_folder_and_parts_are_no_checkpoints(
    memory_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world(short_run, memory_path, 2)
    part = memory_path / "node0/run/step-2"
    with pytest.raises(CheckpointNotFoundError, match=r"one node's part of a step.*checkpoint\.remote_folder"):
        milepost.load(part)
    assert main(["ls", str(memory_path / "node1/run"), "--remote"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"2 +both +part .*the part of node 1 of 2 \(ranks 2-3\)", shown), shown
    assert main(["sync", str(memory_path / "node1/run"), str(memory_path / "elsewhere")]) == 3
    world(refused_without_the_option, memory_path, num_ranks=2)
    world(resume_on_one_node, memory_path)


def copies_killed(base: Path) -> None:
    run = Run(base, keep_latest_k=0)
    run.load()
    killed = 0
    for step in range(1, 9):
        run.train(step)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and killed < 4:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if "milepost.saving.copy_process" in " ".join(child.cmdline()):
                        time.sleep(0.1 * dist.get_rank())
                        child.kill()
                        killed += 1
            time.sleep(0.01)
    run.manager.close()
    assert dist.get_rank() % RANKS_A_NODE or killed


@pytest.mark.slow
def test_copies_that_are_killed_are_made_again(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milepost.training.remote.RETRY_S", 0.5)
    world(copies_killed, memory_path)
    assert remote_steps(memory_path)[-1] == 8
    assert all(verify(memory_path / f"remote/step-{step}").is_sound for step in remote_steps(memory_path))


def one_copy_killed(base: Path) -> float:
    """On node 1 alone: node 0's process is not informed, and waits for the part."""
    run = Run(base)
    run.load()
    if dist.get_rank() == RANKS_A_NODE:
        kill_next = threading.Thread(target=kill_a_copy, daemon=True)
        kill_next.start()
    run.train(1)
    if dist.get_rank() == RANKS_A_NODE:
        kill_next.join(60)
        assert not kill_next.is_alive(), "no copy was seen"
    started = time.monotonic()
    run.manager.close()
    return time.monotonic() - started


def kill_a_copy() -> None:
    while True:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "milepost.saving.copy_process" in " ".join(child.cmdline()):
                    child.kill()
                    return
        time.sleep(0.002)


def test_a_copy_that_is_killed_on_one_node_holds_up_no_other(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milepost.training.remote.RETRY_S", 0.5)
    monkeypatch.setattr("milepost.training.node_tier.RETRY_S", 0.5)
    assert max(world(one_copy_killed, memory_path)) < 45
    assert remote_steps(memory_path) == [1]
    assert verify(memory_path / "remote/step-1").is_sound


def one_part_deleted(base: Path, node: int) -> tuple[float, str]:
    """By hand, before it is copied: how long the end of the run took, and what was logged on this rank."""
    run = Run(base, remote_every_n_steps=100)  # so that only the end of the run asks for a copy
    run.load()
    run.train(1)
    run.manager.maybe_wait_for_saving()
    wait_until(lambda: 1 in node_steps.settled_steps(*open_storage(home(base) / "run")))
    if dist.get_rank() == node * RANKS_A_NODE:
        shutil.rmtree(home(base) / "run" / "step-1")
    dist.barrier()
    said = io.StringIO()
    logging.getLogger("milepost").addHandler(logging.StreamHandler(said))
    started = time.monotonic()
    with pytest.raises(SaveError, match="step 1 was not copied") as caught:
        run.manager.close()
    return time.monotonic() - started, said.getvalue() + caught.value.message


@pytest.mark.parametrize("node", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_part_that_is_deleted_by_hand_is_reported_at_once_on_all_nodes(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, node: int
) -> None:
    monkeypatch.setattr("milepost.training.remote.RETRY_S", 0.2)
    outcomes = world(one_part_deleted, memory_path, node)
    assert max(seconds for seconds, _ in outcomes) < 100, "not the hours that a slow link is waited for"
    firsts = outcomes[0][1], outcomes[RANKS_A_NODE][1]
    assert "step-1" in firsts[node], "which part is missing"
    expected = "node 1" if node == 1 else "node 0 can't copy its part"
    assert expected in firsts[1 - node]
    assert remote_steps(memory_path) == []


def test_a_damaged_header_of_a_record_is_not_copied(memory_path: Path) -> None:
    world(save_and_drop, memory_path)
    part = memory_path / "node0" / "run" / "step-1"  # which brings all that it holds
    file = next(part.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[10] ^= 1  # within the first record's zip header
    file.write_bytes(data)
    local, remote = (Spot(*open_storage(memory_path / name)) for name in ("node0/run/step-1", "remote/step-1"))
    begin_copy(remote, checkpoint_record.read_part(local.storage, local.path).manifest.save_id, is_joint=True)
    other = threading.Thread(target=copy_quietly, args=(memory_path, "node1"), daemon=True)
    other.start()
    with pytest.raises(CheckpointDamagedError, match="damaged header or footer of"):
        copy_part(local, remote)
    other.join(30)
    assert not other.is_alive(), "the other node got the error"


def copy_quietly(base: Path, node: str) -> None:
    with contextlib.suppress(SaveError):
        copy_part(Spot(*open_storage(base / node / "run/step-1")), Spot(*open_storage(base / "remote/step-1")))


def save_and_drop(base: Path) -> None:
    run = Run(base, remote_every_n_steps=100)
    run.load()
    run.train(1)
    run.manager.maybe_wait_for_saving()
    dist.barrier()
    run.drop()
