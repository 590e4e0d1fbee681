"""One rank of four raises, anywhere in a save, a load or the code around them: all ranks get the error, none hangs.

A world walks through all the places. At each, on each rank in turn, an error is put in (or Ctrl-C); every rank must
raise within ``LIMIT_S`` seconds an error that names that rank, and the next save must then be committed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from milepost import CheckpointConfig, CheckpointManager, MilepostError
from milepost.errors import StorageError
from milepost.run import catalog
from milepost.storage import LocalStorage
from milepost.testing.world import run_world

RANKS = 4
LIMIT_S = 30.0


IN_A_SAVE = {
    "state_dict of the model": "torch.nn.Module.state_dict",
    "state_dict of the optimizer": "milepost.training.training_state.optimizer_state",
    "state_dict of lr_scheduler": "lr_scheduler.state_dict",
    "state_dict of dataloader": "dataloader.state_dict",
    "state_dict of train_state": "train_state.state_dict",
    "state of the random generators": "milepost.training.training_state.rng_state",
    "flatten": "milepost.saving.request.flatten",
    "boxes of a tensor": "milepost.tensors.state.tensor_leaf",
    "encode a value": "milepost.saving.request.encode_object",
    "layout": "milepost.tensors.state.FlatState.layout",
    "fingerprint": "milepost.saving.last_plan.LastPlan.fingerprint_of",
    "write": "milepost.saving.job.write_file",
    "sign-off, and even the report of its failure": "milepost.saving.job.sign_off",
}
IN_A_SAVE_ON_RANK_0 = {
    "begin the attempt": "milepost.saving.agreement.begin_attempt",
    "wait for the sign-offs": "milepost.saving.job.wait_for_sign_offs",
    "publish": "milepost.saving.job.commit.publish",
    "put in place": "milepost.run.commit._put_in_place",
}
IN_A_LOAD = {
    "target": "milepost.training.training_state.TrainingState.loading",
    "flatten": "milepost.loading.load_from.flatten",
    "compare": "milepost.loading.load_from.compare",
    "digests": "milepost.loading.load_from.parse_digests",
    "plan": "milepost.loading.sources.plan_load",
    "open a file": "milepost.storage.local.LocalStorage.open_read",
    "read": "milepost.storage.local_files.LocalRead.read_into",
    "read a tensor": "milepost.loading.load_from.map_in_threads",
    "read a value": "milepost.loading.values.decode_object",
    "restore the optimizer": "milepost.training.optimizers_owner.OptimizersOwner.restore",
    "load_state_dict of lr_scheduler": "lr_scheduler.load_state_dict",
    "load_state_dict of dataloader": "dataloader.load_state_dict",
    "load_state_dict of train_state": "train_state.load_state_dict",
    "restore the random generators": "milepost.training.owners.set_rng_state",
}
IN_A_LOAD_ON_RANK_0 = {
    "scan": "milepost.training.resume.catalog.scan",
    "choose a step": "milepost.training.resume.choose",
    "manifest": "milepost.loading.load_from.checkpoint_record.read_manifest",
    "the digests' file": "milepost.loading.load_from.checkpoint_record.read_digests_file",
}
AT_THE_START = {"state": "milepost.training.manager.TrainingState.of", "saver": "milepost.training.run_saves.Saver"}
AT_THE_START_ON_RANK_0 = {
    "lock": "milepost.run.takeover.RunLock",
    "sweep": "milepost.run.takeover.sweep_leftovers",
}
ON_SIGNALS = {"signals": "milepost.training.signals.SignalFlags.take"}
IN_THE_BACKGROUND = {
    "arena": "milepost.saving.arena.Arena.fit",
    "staging plan": "milepost.saving.async_save.Staging",
    "staging": "milepost.saving.stage.Staging.run",
    "hand over": "milepost.saving.async_save.FileImage",
    "write": "milepost.saving.job.write_file",
    "sign-off, and even the report of its failure": "milepost.saving.job.sign_off,milepost.saving.job.fail_attempt",
}
IN_THE_BACKGROUND_ON_RANK_0 = {
    "wait for the sign-offs": "milepost.saving.job.wait_for_sign_offs",
    "publish": "milepost.saving.job.commit.publish",
}
BEFORE_A_WRITER = {
    "hand over": "milepost.saving.writer_link.Request",
    "hand over, and even the report of its failure": (
        "milepost.saving.writer_link.Request,milepost.saving.job.sign_off,milepost.saving.job.fail_attempt"
    ),
}


class Injected(Exception):
    """An error that no code expects."""


@dataclass(frozen=True)
class Outcome:
    """One error as raised on one rank. ``rank`` is the rank that the error names."""

    place: str
    bad: int
    kind: str
    rank: int | None
    message: str
    seconds: float


def refused(text: str) -> StorageError:
    return StorageError(f"input/output error {text}", operation="sync folder", path="", errno=errno.EIO)


class Part:
    """Anything with a state."""

    def __init__(self) -> None:
        self.step = 0
        self.more: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, **self.more}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Run:
    """A manager over a sharded model, and the places in it where an error can be put."""

    def __init__(self, folder: Path, **options: Any):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        self.parts = {name: Part() for name in ("lr_scheduler", "dataloader", "train_state")}
        self.folder = folder
        self.step = 0
        self.outcomes: list[Outcome] = []
        options = {"interval": 1, "keep_latest_k": 2, "last_save_model_only": False, **options}
        self.config = CheckpointConfig(enable=True, **options)
        self.manager = self.build(folder)

    def build(self, folder: Path) -> CheckpointManager:
        return CheckpointManager(folder, self.config, model=self.model, optimizer=self.optimizer, **self.parts)

    def save(self) -> None:
        self.step += 1
        self.parts["train_state"].step = self.step
        assert self.manager.save(self.step, last_step=self.config.interval != 1)

    def save_another_structure(self) -> None:
        """Drop the plan of the previous save."""
        self.parts["train_state"].more = {f"new{self.step}": 1}
        self.save()

    def save_and_hear(self) -> None:
        """A save, and the next call, which raises a failure in the background."""
        self.save()
        self.manager.maybe_wait_for_staging()
        self.save()

    @contextmanager
    def broken(self, places: str, error: BaseException) -> Iterator[None]:
        """Calls of ``places`` raise: of functions and methods by their names, or of this run's parts."""
        with contextlib.ExitStack() as stack:
            for place in places.split(","):
                owner, _, method = place.partition(".")
                if owner in self.parts:
                    stack.enter_context(mock.patch.object(self.parts[owner], method, side_effect=error))
                else:
                    stack.enter_context(mock.patch(place, side_effect=error))
            yield

    def inject(
        self,
        name: str,
        places: str,
        act: Callable[[], object],
        *,
        ranks: tuple[int, ...] = tuple(range(RANKS)),
        make: Callable[[str], BaseException] = Injected,
    ) -> None:
        """On each of ``ranks`` in turn make ``act`` fail; then, after a load, a save must be committed."""
        for bad in ranks:
            is_bad = dist.get_rank() == bad
            started = time.monotonic()
            with self.broken(places, make("on purpose")) if is_bad else contextlib.nullcontext():
                self.outcomes.append(outcome_of(name, bad, act, started))
        if act == self.manager.load:  # one that failed midway leaves a mix, which is not saved
            assert self.manager.load() is not None
        self.save()
        if self.config.async_mode != "disabled":
            self.manager.pending.committed(60)  # type: ignore[union-attr]

    def walk(
        self, act: Callable[[], object], anywhere: dict[str, str], on_rank_0: dict[str, str], **options: Any
    ) -> None:
        for name, places in anywhere.items():
            self.inject(name, places, act, **options)
        for name, places in on_rank_0.items():
            self.inject(name, places, act, ranks=(0,), **options)

    def finish(self) -> list[Outcome]:
        """Close; every step left must be complete, the last save above all."""
        self.manager.close()
        dist.barrier()
        entries = catalog.scan(LocalStorage(self.folder.parent), self.folder.name)
        assert {entry.state for entry in entries} == {"committed"}
        assert max(entry.step for entry in entries) == self.step
        names = {path.name for path in self.folder.iterdir()} - {"events.jsonl"}
        assert all(name.startswith("step-") for name in names), names
        return self.outcomes


def outcome_of(name: str, bad: int, act: Callable[[], object], started: float) -> Outcome:
    try:
        act()
    except MilepostError as error:
        return Outcome(name, bad, "MilepostError", error.rank, error.message, time.monotonic() - started)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is looked at by `check`
        return Outcome(name, bad, type(error).__name__, None, str(error), time.monotonic() - started)
    return Outcome(name, bad, "nothing", None, "", time.monotonic() - started)


def check(results: list[list[Outcome]], *, interrupted: bool = False) -> int:
    """Every rank raised each error in time, naming the same rank. Returns the number of errors."""
    for rank, outcomes in enumerate(results):
        assert [(one.place, one.bad) for one in outcomes] == [(one.place, one.bad) for one in results[0]]
        for one in outcomes:
            assert one.seconds < LIMIT_S, (rank, one)
            if interrupted and one.bad == rank:
                assert one.kind == "KeyboardInterrupt", (rank, one)
                continue
            assert one.kind == "MilepostError", (rank, one)
            assert one.rank == one.bad, (rank, one)
            assert "on purpose" in one.message, (rank, one)
            assert f"rank {one.bad}" in one.message or one.bad == 0, (rank, one)
    return len(results[0])


# ---- the walks ----


def walk_disabled(folder: Path) -> list[Outcome]:
    run = Run(folder / "run")
    run.save()
    run.walk(run.save, IN_A_SAVE, IN_A_SAVE_ON_RANK_0)
    run.inject("sync", "milepost.storage.local_files.LocalWrite.sync", run.save, ranks=(1, 2, 3), make=refused)
    run.inject("sync folder", "milepost.storage.LocalStorage.sync_folder", run.save, ranks=(0,), make=refused)
    run.inject("plan", "milepost.saving.agreement.plan_alone", run.save_another_structure)
    run.walk(run.manager.load, IN_A_LOAD, IN_A_LOAD_ON_RANK_0)
    run.walk(lambda: run.build(folder / "another"), AT_THE_START, AT_THE_START_ON_RANK_0)
    run.walk(lambda: run.manager.latest_step, {}, {"latest step": "milepost.training.resume.catalog.scan"})
    by_signal = Run(folder / "by signal", interval=1000)
    by_signal.manager.listen_to_signals()
    by_signal.walk(lambda: by_signal.manager.save(by_signal.step + 1), ON_SIGNALS, {})
    return run.finish() + by_signal.finish()


def walk_async(folder: Path) -> list[Outcome]:
    run = Run(folder / "run", async_mode="async")
    run.save()
    run.walk(run.save_and_hear, IN_THE_BACKGROUND, IN_THE_BACKGROUND_ON_RANK_0)
    run.inject("state_dict of train_state", "train_state.state_dict", run.save)
    return run.finish()


def walk_writer_process(folder: Path) -> list[Outcome]:
    run = Run(folder / "run", async_mode="async_with_pinned_mem")
    run.save()
    run.walk(run.save_and_hear, BEFORE_A_WRITER, {})
    run.inject("staging", IN_THE_BACKGROUND["staging"], run.save_and_hear)
    return run.finish()


WALKS = [walk_disabled, walk_async, walk_writer_process]


@pytest.mark.parametrize("walk", WALKS)
def test_an_error_of_one_rank_at_any_step_is_every_ranks(memory_path: Path, walk: Any, tally: Any) -> None:
    tried = check(run_world(walk, RANKS, memory_path, timeout_s=150))
    mode = walk.__name__.removeprefix("walk_").replace("_", " ")
    tally(f"an error on one of {RANKS} ranks ({mode}): every rank raises, the next save is kept", tried=tried, lost=0)


# ---- interrupts ----


def walk_interrupted(folder: Path) -> list[Outcome]:
    """KeyboardInterrupt on one rank: that one raises it, the others an error that names the rank."""
    how: Any = {"ranks": (0, RANKS - 1), "make": KeyboardInterrupt}
    run = Run(folder / "run")
    run.save()
    run.walk(run.save, IN_A_SAVE, {}, **how)
    run.walk(run.manager.load, IN_A_LOAD, {}, **how)
    background = Run(folder / "background", async_mode="async")
    background.save()

    def save_and_hear() -> None:
        """The rank that is interrupted while it stages must still take part in the next call."""
        interrupt = None
        try:
            background.save()
        except KeyboardInterrupt as cause:
            interrupt = cause
        try:
            background.save()
        except MilepostError:
            if interrupt is not None:
                raise interrupt from None
            raise

    staged = {name: IN_THE_BACKGROUND[name] for name in ("arena", "staging plan", "staging")}
    background.walk(save_and_hear, staged, {}, **how)
    return run.finish() + background.finish()


def test_an_interrupt_of_one_rank_is_reported_to_the_others(memory_path: Path, tally: Any) -> None:
    tried = check(run_world(walk_interrupted, RANKS, memory_path, timeout_s=150), interrupted=True)
    tally(f"KeyboardInterrupt on one of {RANKS} ranks: every rank raises, the next save is kept", tried=tried, lost=0)


def ctrl_c(folder: Path) -> list[str]:
    """On each rank in turn SIGINT comes while it waits for another one, whose state takes long to make."""
    run = Run(folder)
    told = []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    part = run.parts["dataloader"]

    def slow() -> dict[str, Any]:
        time.sleep(0.6)
        return {"step": part.step}

    for bad in range(RANKS):
        is_slow = dist.get_rank() == (bad + 1) % RANKS
        if dist.get_rank() == bad:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with mock.patch.object(part, "state_dict", slow) if is_slow else contextlib.nullcontext():
            try:
                run.save()
                told.append("saved")
            except KeyboardInterrupt:
                told.append("KeyboardInterrupt")
        run.save()
    run.finish()
    return told


def test_ctrl_c_waits_until_the_ranks_are_done_with_each_other(memory_path: Path) -> None:
    for rank, told in enumerate(run_world(ctrl_c, RANKS, memory_path / "run", timeout_s=60)):
        assert told == ["KeyboardInterrupt" if bad == rank else "saved" for bad in range(RANKS)]


# ---- collectives of the user's own ----


def failed_collective(folder: Path) -> list[Outcome]:
    """A part gathers a DTensor for its state. On one rank that fails; the others wait until their group gives up."""
    run = Run(folder)
    run.save()
    part = run.parts["train_state"]
    for bad in (0, RANKS - 1):
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2))
        mesh = DeviceMesh.from_group(group, "cpu")
        tensor = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])

        def gathered(tensor: Any = tensor) -> dict[str, Any]:
            return {"step": part.step, "whole": tensor.full_tensor()}

        with mock.patch.object(part, "state_dict", gathered):
            assert gathered()["whole"].tolist() == list(range(8))
            started = time.monotonic()
            broken = mock.patch.object(DTensor, "full_tensor", side_effect=RuntimeError("on purpose"))
            with broken if dist.get_rank() == bad else contextlib.nullcontext():
                run.outcomes.append(outcome_of("collective", bad, run.save, started))
        run.save()
    return run.finish()


def test_a_failed_collective_of_a_dtensor_is_every_ranks_error(memory_path: Path) -> None:
    results = run_world(failed_collective, RANKS, memory_path / "run", timeout_s=60)
    for outcomes in results:
        assert len(outcomes) == 2
        for one in outcomes:
            assert one.kind == "MilepostError", one
            assert one.seconds < LIMIT_S, one
            # Of several ranks that fail the first is named; those that waited for it fail too.
            assert f"rank {one.rank}" in one.message or one.rank == 0, one
            assert one.message == next(o.message for o in results[0] if o.bad == one.bad)
