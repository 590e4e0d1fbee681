"""The manager and the engine on several ranks: one rank's error is raised on all, and no rank is left waiting."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.collective.comm import default_comm
from milepost.errors import MilepostError
from milepost.run import catalog, checkpoint_record
from milepost.run.assemble import SaveInfo
from milepost.saving.request import SaveRequest
from milepost.saving.save import Saver
from milepost.storage import LocalStorage, Storage, open_storage
from milepost.storage.system_errors import storage_error
from milepost.testing.world import run_world
from milepost.testing.wrap import Operation, WrappedStorage

Outcome = tuple[str, str]
"""Name of an error's class, and its message."""


class Progress:
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def network(widths: tuple[int, ...] = (6, 11, 3)) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])


def sharded(widths: tuple[int, ...] = (6, 11, 3)) -> nn.Sequential:
    model = network(widths)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


opened: list[CheckpointManager] = []


def manager_of(folder: Path, model: nn.Module | None = None, **config: Any) -> tuple[CheckpointManager, Progress]:
    """A manager over a model that has trained one step."""
    model = model if model is not None else sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    progress = Progress()
    options = CheckpointConfig(**{"enable": True, "interval": 1, "last_save_model_only": False, **config})
    while opened:  # as if its process had ended
        opened.pop().close()
    manager = CheckpointManager(folder, options, model=model, optimizer=optimizer, train_state=progress)
    opened.append(manager)
    return manager, progress


def outcome(act: Callable[[], object]) -> Outcome:
    """Return the error that ``act`` raises, which must be one of Milepost's."""
    with pytest.raises(MilepostError) as caught:
        act()
    return type(caught.value).__name__, caught.value.message


def raises(*args: Any) -> Any:
    raise ZeroDivisionError("by the user's own code")


def steps_in(folder: Path) -> dict[int, str]:
    return {entry.step: entry.state for entry in catalog.scan(LocalStorage(folder.parent), folder.name)}


# ---- errors that one rank meets ----


def errors_of_one_rank(folder: Path, bad: int) -> dict[str, Outcome]:
    """Provoke an error only on rank ``bad``, at every public step; return the errors raised on this rank."""
    is_bad = dist.get_rank() == bad
    found: dict[str, Outcome] = {}

    # Construction: a module on one stage has a name that is kept.
    found["construct"] = outcome(
        lambda: CheckpointManager(
            folder / "construct",
            CheckpointConfig(enable=True),
            model=nn.ModuleDict({"optimizer" if is_bad else "fine": nn.Linear(2, 2)}),
        )
    )

    # Saving: the user's state_dict() raises; then a value that can't be stored. The next save works.
    manager, progress = manager_of(folder / "save")
    manager.save(1)
    if is_bad:
        progress.state_dict = raises  # type: ignore[method-assign]
    found["state_dict"] = outcome(lambda: manager.save(2))
    if is_bad:
        progress.state_dict = lambda: {"step": raises}  # type: ignore[method-assign]
    found["value"] = outcome(lambda: manager.save(3))
    progress.state_dict = lambda: {"step": 4}  # type: ignore[method-assign]
    assert manager.save(4)
    assert steps_in(folder / "save") == {1: "committed", 4: "committed"}

    # Loading: load_state_dict() raises; a model that differs.
    manager, progress = manager_of(folder / "save")
    if is_bad:
        progress.load_state_dict = raises  # type: ignore[method-assign]
    found["load_state_dict"] = outcome(manager.load)
    mine = network((6, 11, 3, 2) if is_bad else (6, 11, 3))
    found["model"] = outcome(manager_of(folder / "save", model=mine)[0].load)

    # Planning: a shard that is missing, a dtype that differs.
    width = 3 if is_bad else 4
    gap = DTensor.from_local(
        torch.ones(width, 2),
        init_device_mesh("cpu", (dist.get_world_size(),)),
        [Shard(0)],
        run_check=False,
        shape=torch.Size([4 * dist.get_world_size(), 2]),
        stride=(2, 1),
    )
    found["gap"] = outcome(lambda: milepost.save(folder / "gap", {"w": gap}))
    odd = torch.ones(2, dtype=torch.float16 if is_bad else torch.float32)
    found["dtype"] = outcome(lambda: milepost.save(folder / "dtype", {"w": odd}))

    # The functions' own error paths.
    class Bad:
        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            if is_bad:
                raises()

    milepost.save(folder / "function", {"part": Bad()})
    found["load function"] = outcome(lambda: milepost.load(folder / "function", {"part": Bad()}))
    found["not there"] = outcome(lambda: milepost.load(folder / ("nowhere" if is_bad else "function"), {"part": Bad()}))
    return found


@pytest.mark.parametrize(("world_size", "bad"), [(2, 1), (2, 0), (3, 1)])
def test_error_of_one_rank_is_raised_on_every_rank(tmp_path: Path, world_size: int, bad: int) -> None:
    """The same error everywhere, with the rank in its message."""
    results = run_world(errors_of_one_rank, world_size, tmp_path, bad, timeout_s=90)
    for other in results[1:]:
        assert other == results[0]
    kinds = {name: kind for name, (kind, _) in results[0].items()}
    assert kinds == {
        "construct": "ConfigError",
        "state_dict": "SaveError",
        "value": "SaveError",
        "load_state_dict": "PartlyLoadedError",
        "model": "StateMismatchError",
        "gap": "SaveError",
        "dtype": "PlanError",
        "load function": "PartlyLoadedError",
        "not there": "CheckpointNotFoundError",
    }
    for name, (_, message) in results[0].items():
        assert f"rank {bad}" in message, (name, message)
    messages = {name: message for name, (_, message) in results[0].items()}
    assert "by the user's own code" in messages["state_dict"]
    assert "train_state.step holds a builtins.function" in messages["value"]
    assert "by the user's own code" in messages["load_state_dict"]
    assert "2.weight" in messages["model"]


# ---- storages that fail on one rank ----


@contextmanager
def storage_of_this_rank(wrap: Callable[[Storage], Storage]) -> Iterator[None]:
    """Every storage opened within the block is wrapped."""

    def opened(path: str) -> tuple[Storage, str]:
        storage, name = open_storage(path)
        return wrap(storage), name

    homes = ("training.manager", "saving.request", "loading.load")
    with mock.patch.multiple("milepost.training.manager", open_storage=opened):
        patches = [mock.patch(f"milepost.{home}.open_storage", opened) for home in homes[1:]]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


Fault = tuple[str, str, int]
"""Which operation fails, on paths that hold which text, and the system's number for the cause."""


NO_FAULT: Fault = ("", "", 0)


class BreaksOn(WrappedStorage):
    """Fails each operation that fits a fault, after half of it is done if it is a write."""

    def __init__(self, inner: Storage, fault: Fault):
        super().__init__(inner)
        self.fault = fault

    def around(self, operation: Operation, act: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        name, text, number = self.fault
        # An empty file can be made on a full disk.
        if operation.name != name or text not in operation.path or (name == "write" and not operation.nbytes):
            return act()
        if half is not None and name == "write_at":
            half()
        raise storage_error(OSError(number, os.strerror(number)), name, operation.path, f"at {operation.path}")


FAULTS = {
    "create": ("open_write", ".distcp", errno.ENOSPC),
    "write": ("write_at", ".distcp", errno.EIO),
    "sync": ("sync", ".distcp", errno.EIO),
    "close": ("close", ".distcp", errno.EDQUOT),
    "sign off": ("write", "sign-off", errno.ENOSPC),
}


def failing_writes(folder: Path, bad: int) -> dict[str, Outcome]:
    """A full disk and a broken one, at each kind of operation of one rank's writing, on any of its threads."""
    found = {}
    # Large enough for several groups, so that several threads write.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = [distribute_tensor(torch.ones(dist.get_world_size() * 1500, 1024), mesh, [Shard(0)]) for _ in range(9)]
    state = {f"w{n}": tensor for n, tensor in enumerate(rows)}
    milepost.save(folder / "step-1", {"w": rows[0]})
    for name, fault in FAULTS.items():
        is_bad = dist.get_rank() == bad

        def wrap(storage: Storage, is_bad: bool = is_bad, fault: Fault = fault) -> Storage:
            return BreaksOn(storage, fault) if is_bad else storage

        with storage_of_this_rank(wrap):
            found[name] = outcome(lambda: milepost.save(folder / "step-1", state))
        dist.barrier()
        assert [path.name for path in folder.iterdir()] == ["step-1"], name
    into = {"w": torch.zeros(dist.get_world_size() * 1500, 1024)}
    milepost.load(folder / "step-1", into)
    assert into["w"].sum().item() == into["w"].numel()
    milepost.save(folder / "step-1", {"w": rows[1]})
    return found


def dead_storage(folder: Path) -> Outcome:
    """Rank 1 can't even record its failure; rank 0 waits until its timeout and no longer."""
    storage: Storage = LocalStorage(folder)
    if dist.get_rank() == 1:
        storage = BreaksOn(BreaksOn(storage, ("write", "", errno.EIO)), ("open_write", "", errno.EIO))
    saver = Saver(storage, default_comm(), timeout_s=1.0)
    result = outcome(
        lambda: saver.save(
            SaveRequest("step-1", lambda: {f"w{dist.get_rank()}": torch.ones(2)}, SaveInfo(step=1, kind="state"))
        )
    )
    dist.barrier()
    assert list(folder.iterdir()) == []
    return result


def test_rank_that_cannot_tell_of_its_failure(tmp_path: Path) -> None:
    results = run_world(dead_storage, 2, tmp_path, timeout_s=60)
    assert results[0] == results[1]
    assert results[0][1].startswith("rank 1: input/output error")


@pytest.mark.parametrize("bad", [0, 1])
def test_failed_write_names_rank_and_file_on_every_rank(tmp_path: Path, bad: int) -> None:
    results = run_world(failing_writes, 2, tmp_path, bad, timeout_s=100)
    assert results[0] == results[1]
    texts = {
        errno.ENOSPC: "no space left on device",
        errno.EIO: "input/output error",
        errno.EDQUOT: "disk quota exceeded",
    }
    for name, (_, _, number) in FAULTS.items():
        _, message = results[0][name]
        assert f"rank {bad}" in message, message
        assert texts[number] in message.lower(), message
        assert (f"__{bad}_0.distcp" if name != "sign off" else f"sign-off-{bad}") in message, message


def failing_rank_0(folder: Path) -> list[Outcome]:
    """Failures of what only rank 0 does: scanning, opening the attempt, publishing, marking."""
    storage = BreaksOn(LocalStorage(folder), NO_FAULT)
    with storage_of_this_rank(lambda _: storage):
        manager, _ = manager_of(folder / "run")
    manager.save(1)
    acts: dict[Fault, Callable[[], object]] = {
        ("list", "run", errno.EIO): lambda: manager.latest_step,
        ("list", "step-1", errno.EIO): manager.load,
        ("make_folder", ".milepost-attempt", errno.ENOSPC): lambda: manager.save(2),
        ("rename", "data", errno.EIO): lambda: manager.save(3),
    }
    found = []
    for fault, act in acts.items():
        if dist.get_rank() == 0:
            storage.fault = fault
        found.append(outcome(act))
        storage.fault = NO_FAULT
    assert steps_in(folder / "run") == {1: "committed"}
    return found


def test_failure_of_what_only_rank_0_does(tmp_path: Path) -> None:
    results = run_world(failing_rank_0, 2, tmp_path, timeout_s=60)
    assert results[0] == results[1]
    assert [kind for kind, _ in results[0]] == ["StorageError", "StorageError", "SaveError", "SaveError"]


# ---- damage ----


def fall_back(folder: Path) -> tuple[int | None, int, list[Outcome], tuple[str, ...]]:
    """Only the last rank reads the damaged bytes; all fall back to the older step together."""
    manager, progress = manager_of(folder)
    last = dist.get_world_size() - 1
    for step in (1, 2, 3):
        progress.step = step
        manager.save(step)
    manager.close()
    if dist.get_rank() == last:
        flip_bit_in(folder / "step-3", f"__{last}_0.distcp")
    dist.barrier()
    named = outcome(manager_of(folder, load_step=3)[0].load)
    manager, progress = manager_of(folder)
    report = manager.load()
    assert report is not None
    result = report.step, progress.step, report.notes
    latest = manager.latest_step
    if dist.get_rank() == 0:
        for step in (1, 2):
            flip_bit_in(folder / f"step-{step}", "__0_0.distcp")
    dist.barrier()
    everything = outcome(manager_of(folder)[0].load)
    return latest, result[1], [named, everything], result[2]


def flip_bit_in(step: Path, file: str) -> None:
    """In the data of the largest tensor shard of a file."""
    manifest = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name)
    shards = [s for tensor in manifest.tensors.values() for s in tensor.shards if s.file == file]
    shard = max(shards, key=lambda s: s.data_nbytes)
    data = bytearray((step / file).read_bytes())
    data[(shard.data_offset or 0) + shard.data_nbytes // 2] ^= 1
    (step / file).write_bytes(data)


def test_all_ranks_fall_back_together(tmp_path: Path) -> None:
    results = run_world(fall_back, 2, tmp_path / "run", timeout_s=60)
    for latest, step, outcomes, notes in results:
        assert (latest, step) == (2, 2)
        assert notes == results[0][3]
        assert notes[0].startswith("step 3 is newer but damaged: rank 1: ")
        assert outcomes == results[0][2]
        assert [kind for kind, _ in outcomes] == ["DigestMismatchError", "CheckpointDamagedError"]
        assert outcomes[0][1].startswith("rank 1: ")
        assert re.search(r"digest mismatch in '.+', bytes \d+ to \d+ of .*__1_0\.distcp", outcomes[0][1])
    assert steps_in(tmp_path / "run") == {1: "damaged", 2: "damaged", 3: "damaged"}


# ---- layouts ----


def parameters_of(model: nn.Module) -> dict[str, list[float]]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten().tolist()
        for name, p in model.state_dict().items()
    }


def save_run(folder: Path, kind: str) -> dict[str, list[float]]:
    models: dict[str, Callable[[], nn.Module]] = {
        "ddp": lambda: DistributedDataParallel(network()),
        "fsdp": sharded,
        "plain": network,
    }
    model = models[kind]()
    manager, progress = manager_of(folder, model)
    progress.step = 7
    manager.save(7)
    manager.close()
    return {name.removeprefix("module."): values for name, values in parameters_of(model).items()}


def load_run(folder: Path, kind: str) -> dict[str, list[float]]:
    model = sharded() if kind == "fsdp" else network() if kind == "plain" else DistributedDataParallel(network())
    manager, progress = manager_of(folder, model, load_only=True)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    manager.load()
    assert progress.step == 7
    return {name.removeprefix("module."): values for name, values in parameters_of(model).items()}


def test_any_parallelism_resumes_from_any(tmp_path: Path) -> None:
    """Replicas under DDP, FSDP shards and one process, on one, two and four ranks: the same keys, the same weights."""
    saved = {}
    for kind, size in (("ddp", 2), ("fsdp", 4), ("plain", 1)):
        saved[kind] = run_world(save_run, size, tmp_path / kind, kind)[0]
    keys = {
        frozenset(checkpoint_record.read_manifest(LocalStorage(tmp_path / kind), "step-7").tensors) - RNG
        for kind in saved
    }
    assert len(keys) == 1
    for kind, size in (("ddp", 2), ("fsdp", 2), ("plain", 1)):
        for source, weights in saved.items():
            assert run_world(load_run, size, tmp_path / source, kind)[0] == weights, (source, kind)


RNG = frozenset(f"rng.rank{rank}.torch" for rank in range(4))


# ---- the cached plan ----


def cached_plans(folder: Path) -> list[bool]:
    """Return for each of several saves if it reused the plan; one rank's structure changes in between."""
    rank, size = dist.get_rank(), dist.get_world_size()
    saver = Saver(LocalStorage(folder), default_comm())
    reused = []

    def save(number: int, state: dict[str, Any]) -> None:
        report = saver.save(SaveRequest(f"step-{number}", lambda: state, SaveInfo(step=number, kind="state")))
        reused.append(report.reused_plan)
        manifest = checkpoint_record.read_manifest(LocalStorage(folder), f"step-{number}")
        mine = {"shared": torch.zeros(3), f"own{(rank + 1) % size}": torch.zeros(2)}
        milepost.load(folder / f"step-{number}", mine, allow_unexpected=["extra"])
        assert mine["shared"].tolist() == [number] * 3
        assert mine[f"own{(rank + 1) % size}"].tolist() == [number, (rank + 1) % size]
        assert ("extra" in manifest.tensors) == (number >= 3 and number != 5)

    for number in range(1, 8):
        state = {
            "shared": torch.full((3,), float(number)),
            f"own{rank}": torch.tensor([number, rank], dtype=torch.float32),
        }
        if rank == size - 1 and number >= 3 and number != 5:
            state["extra"] = torch.ones(1)
        save(number, state)
    return reused


def test_plan_cache_misses_when_one_rank_changes(tmp_path: Path) -> None:
    results = run_world(cached_plans, 3, tmp_path, timeout_s=60)
    assert results[0] == results[1] == results[2] == [False, True, False, True, False, False, True]
