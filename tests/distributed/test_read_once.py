"""Ranks that want the same bytes: each byte is read by one of them, counted at the storage."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.collective.comm import ProcessGroupComm, SingleProcess
from milepost.errors import ConfigError, DigestMismatchError, MilepostError, StorageError
from milepost.format.manifest import BLOCK_NBYTES
from milepost.loading import load as load_module
from milepost.loading import measured
from milepost.storage import LocalStorage
from milepost.testing.faulty import FaultyStorage
from milepost.testing.world import run_world
from milepost.testing.wrap import Operation, TraceStorage, WrappedStorage

State = dict[str, Any]
Hold = Callable[[torch.Tensor], torch.Tensor]

LARGE = (1024, 2300)
"""9 MiB of float32: three blocks, the last one short, and cut anywhere but at a row."""


def whole_state() -> State:
    """The same on every rank, with values that differ at every place."""
    state: State = {
        f"large{n}": torch.arange(LARGE[0] * LARGE[1], dtype=torch.float32).view(LARGE) + n for n in range(2)
    }
    state |= {f"small{n}": torch.full((7, 8), float(n)) for n in range(30)}
    state["options"] = {"lr": 0.5, "betas": (0.9, 0.99), "names": [f"n{n}" for n in range(50)]}
    return state


def held(state: Mapping[str, Any], hold: Hold) -> State:
    return {key: hold(value) if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def tensors_nbytes(state: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))


def placed(shape: tuple[int, ...], *placements: Placement) -> Hold:
    mesh = init_device_mesh("cpu", shape)
    return lambda whole: distribute_tensor(whole, mesh, placements, src_data_rank=None)


@contextmanager
def through(storage: WrappedStorage, folder: str) -> Iterator[None]:
    with mock.patch.object(load_module, "open_storage", return_value=(storage, folder)):
        yield


def read_once(folder: Path, placements: Mapping[str, tuple[tuple[int, ...], tuple[Placement, ...]]]) -> dict[str, Any]:
    """Load a checkpoint of one process in several ways; bytes that this rank read, and reads of records."""
    whole = whole_state()
    if dist.get_rank() == 0:
        milepost.save(folder / "step-1", whole, comm=SingleProcess())
    dist.barrier()
    found = {}
    for name, (shape, kinds) in placements.items():
        hold = placed(shape, *kinds)
        into = held(whole, hold)
        for value in into.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        into["options"] = {}
        trace = TraceStorage(LocalStorage(folder))
        with through(trace, "step-1"):
            report = milepost.load(folder / "step-1", into, read="shared")
        expected = held(whole, hold)
        for key, value in whole.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(into[key].to_local(), expected[key].to_local()), (name, key)
        assert into["options"] == whole["options"]
        num_records = sum(operation.name in ("read", "list") for operation in trace.operations)
        found[name] = (trace.nbytes("read_into"), num_records)
        assert report.wanted_nbytes == sum(
            v.to_local().nbytes for v in expected.values() if isinstance(v, torch.Tensor)
        )
    return found


REPLICAS = {"replicas": ((4,), (Replicate(),))}
SQUARE = {
    "tensor parallel over FSDP": ((2, 2), (Shard(0), Shard(1))),
    "HSDP": ((2, 2), (Replicate(), Shard(0))),
    "columns": ((4,), (Shard(1),)),
}


def check_read_once(results: list[dict[str, Any]]) -> None:
    stored = tensors_nbytes(whole_state())
    for name in results[0]:
        together = sum(found[name][0] for found in results)
        assert together <= 1.05 * stored, (name, together / stored)
        assert all(found[name][1] == 0 for found in results[1:]), name  # rank 0 has read the record for all
        most = max(found[name][0] for found in results)
        assert most <= 0.6 * stored, (name, "one rank has read it all")


def test_each_byte_is_read_once_by_all_ranks_together(memory_path: Path) -> None:
    check_read_once(run_world(read_once, 4, memory_path, REPLICAS | SQUARE))


@pytest.mark.slow
def test_each_byte_is_read_once_by_sixteen_ranks(memory_path: Path) -> None:
    layouts = {
        "TP 4 over FSDP 4": ((4, 4), (Shard(0), Shard(1))),
        "four replicas of four": ((4, 4), (Replicate(), Shard(0))),
        "sixteen columns": ((16,), (Shard(1),)),
    }
    check_read_once(run_world(read_once, 16, memory_path, layouts, timeout_s=400.0))


@pytest.mark.slow
def test_each_byte_is_read_once_by_eight_column_slices(memory_path: Path) -> None:
    check_read_once(run_world(read_once, 8, memory_path, {"columns": ((8,), (Shard(1),))}, timeout_s=300.0))


def read_damaged(folder: Path) -> str:
    whole = whole_state()
    if dist.get_rank() == 0:
        milepost.save(folder / "step-1", whole, comm=SingleProcess())
        with open(folder / "step-1" / "__0_0.distcp", "r+b") as file:
            file.seek(6 << 20)
            file.write(b"damage")
    dist.barrier()
    with pytest.raises(DigestMismatchError) as caught:
        milepost.load(folder / "step-1", whole, read="shared")
    dist.barrier()  # the group is in order: nothing of the load is left in it
    return str(caught.value)


def test_a_bad_digest_fails_every_rank(memory_path: Path) -> None:
    messages = run_world(read_damaged, 3, memory_path)
    assert len(set(messages)) == 1
    assert "digest mismatch in 'large0'" in messages[0]
    assert messages[0].count("rank ") == 1


class FailsToRead(FaultyStorage):
    """Its second read of data fails, as if the disk were gone."""

    def around(self, operation: Operation, act: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        if operation.name == "read_into" and operation.nbytes > 1 << 20:
            raise StorageError("no such device (injected)", operation="read", path=operation.path, errno=19)
        return act()


def read_where_one_rank_fails(folder: Path) -> tuple[str, int | None]:
    whole = whole_state()
    rank = dist.get_rank()
    if rank == 0:
        milepost.save(folder / "step-1", whole, comm=SingleProcess())
    dist.barrier()
    inner = LocalStorage(folder)
    storage = FailsToRead(inner) if rank == 2 else WrappedStorage(inner)
    with through(storage, "step-1"), pytest.raises(MilepostError) as caught:
        milepost.load(folder / "step-1", whole, read="shared")
    dist.barrier()
    return caught.value.message, caught.value.rank


def test_a_rank_that_can_not_read_fails_every_rank(memory_path: Path) -> None:
    found = run_world(read_where_one_rank_fails, 3, memory_path)
    assert len(set(found)) == 1
    assert found[0][0].startswith("rank 2: no such device")
    assert found[0][1] == 2


def run_and_resume(folder: Path) -> list[int]:
    """A run of replicas, each with its own random numbers, that is resumed; what each rank reads of values."""
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(512, 512)
    dist.broadcast(model.weight.data, 0)
    dist.broadcast(model.bias.data, 0)
    config = CheckpointConfig(interval=1, read="shared", last_save_model_only=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with CheckpointManager(folder / "run", config, model=model, optimizer=optimizer, layout={"dp": 2}) as manager:
        manager.save(1)
    drawn = torch.rand(3)
    before = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    trace = TraceStorage(LocalStorage(folder))
    with CheckpointManager(folder / "run", config, model=model, optimizer=optimizer, layout={"dp": 2}) as manager:
        manager._loader._storage = trace
        assert manager.load() is not None
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.rand(3), drawn)
    return [operation.nbytes for operation in trace.operations if operation.name == "read_into"]


def test_a_run_is_resumed_with_each_rank_s_own_values(memory_path: Path) -> None:
    sizes = run_world(run_and_resume, 2, memory_path)
    stored = sum(os.path.getsize(path) for path in (memory_path / "run" / "step-1").glob("*.distcp"))
    assert sum(map(sum, sizes)) <= 1.05 * stored


def read_by_default(folder: Path) -> int:
    whole = {"w": torch.ones(LARGE)}
    if dist.get_rank() == 0:
        milepost.save(folder / "step-1", whole, comm=SingleProcess())
    dist.barrier()
    trace = TraceStorage(LocalStorage(folder))
    with through(trace, "step-1"):
        milepost.load(folder / "step-1", whole)
    mine = trace.nbytes("read_into")
    trace = TraceStorage(LocalStorage(folder))
    with mock.patch.object(LocalStorage, "is_remote", True), through(trace, "step-1"):
        milepost.load(folder / "step-1", whole)
    return mine - trace.nbytes("read_into")


def test_by_default_a_local_disk_is_read_by_each_and_a_network_once(memory_path: Path) -> None:
    spared = run_world(read_by_default, 2, memory_path)
    assert sum(spared) >= 0.9 * LARGE[0] * LARGE[1] * 4


class SlowToRead(WrappedStorage):
    """Each rank reads 20 MB/s, as from a server that limits each client to that rate."""

    def around(self, operation: Operation, act: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        if operation.name == "read_into":
            time.sleep(operation.nbytes / 20e6)
        return act()


@contextmanager
def slow_to_hand_on() -> Iterator[None]:
    exchange = ProcessGroupComm.exchange

    def late(self: ProcessGroupComm, outgoing: Any, incoming: Any, arrived: Any) -> None:
        time.sleep(sum(nbytes for _, nbytes in incoming) / 20e6)
        exchange(self, outgoing, incoming, arrived)

    with mock.patch.object(ProcessGroupComm, "exchange", late):
        yield


def read_as_is_faster(folder: Path) -> list[int]:
    """Bytes that this rank reads of a slow storage that looks local, and of a fast one that looks remote."""
    whole = {"w": torch.ones(2 * LARGE[0], LARGE[1]), "n": torch.ones(3)}
    if dist.get_rank() == 0:
        milepost.save(folder / "step-1", whole, comm=SingleProcess())
    dist.barrier()
    found = []
    for is_remote in (False, True):
        trace = TraceStorage(LocalStorage(folder))
        with (
            mock.patch.object(measured, "MAX_PROBED_PART", 1),
            mock.patch.object(LocalStorage, "is_remote", is_remote),
            slow_to_hand_on() if is_remote else nullcontext(),
            through(trace if is_remote else SlowToRead(trace), "step-1"),
        ):
            report = milepost.load(folder / "step-1", whole)
        found.append(trace.nbytes("read_into"))
        assert 0.99 * found[-1] <= report.read_nbytes <= found[-1]  # apart from options and similar values
    return found


def test_by_default_ranks_do_what_they_measure_to_be_faster(memory_path: Path) -> None:
    slow, fast = zip(*run_world(read_as_is_faster, 2, memory_path), strict=True)
    stored, probed = 2 * LARGE[0] * LARGE[1] * 4, 4 * BLOCK_NBYTES
    assert sum(slow) <= 1.05 * stored + probed
    assert min(fast) >= stored


def load_with_ways_that_differ(folder: Path) -> bool:
    own = torch.zeros(LARGE)
    milepost.load(folder, {"large0": own}, allow_unexpected=["*"], read=("shared", "auto")[dist.get_rank()])
    with pytest.raises(ConfigError, match="expected read to be one of auto, own, shared, found 'shraed'"):
        milepost.load(folder, {"large0": own}, allow_unexpected=["*"], read="shraed")  # type: ignore[call-overload]
    return torch.equal(own, whole_state()["large0"])


def test_ranks_that_ask_for_different_ways_load_together(memory_path: Path) -> None:
    milepost.save(memory_path / "ck", whole_state())
    assert run_world(load_with_ways_that_differ, 2, memory_path / "ck") == [True, True]
