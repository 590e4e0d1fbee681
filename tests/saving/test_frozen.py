"""Frozen tensors: stored once, shared from step to step for as long as their bytes are the same, and never wrongly."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import CheckpointDamagedError, ConfigError
from milepost.run import catalog, retention
from milepost.saving.copy_step import Spot, copy_step
from milepost.storage import LocalStorage, Storage, open_storage
from milepost.storage.objectstore import ObjectStorage
from milepost.testing.wrap import TraceStorage
from milepost.training import manager as manager_module
from milepost.verification.verify import verify

WIDTH = 512
NUM_FROZEN = 8
MODES = ("disabled", "async", "async_with_pinned_mem")


class Adapted(nn.Module):
    """Weights of a base that is frozen, and an adapter that is trained, with under 1 % of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_FROZEN))
        self.base.requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, 8, bias=False)

    def train_on(self) -> None:
        nn.init.normal_(self.adapter.weight)


@dataclass
class Run:
    """A run in a folder; ``storage`` is what it works through, for tests that look at its operations."""

    path: Path
    storage: Storage | None = None

    def manager(self, model: nn.Module, mode: str = "disabled", **options: object) -> CheckpointManager:
        config = CheckpointConfig(interval=1, async_mode=mode, last_save_model_only=False, **options)  # type: ignore[arg-type]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, momentum=0.9) if trained else None
        opened = (self.storage, "run") if self.storage is not None else open_storage(str(self.path / "run"))
        with mock.patch.object(manager_module, "open_storage", return_value=opened):
            return CheckpointManager(self.path / "run", config, model=model, optimizer=optimizer)

    def save(self, model: Adapted, *steps: int, mode: str = "disabled", **options: object) -> None:
        with self.manager(model, mode, **options) as manager:
            manager.load()
            for step in steps:
                manager.maybe_wait_for_staging()
                model.train_on()
                manager.save(step)

    def step(self, number: int) -> Path:
        return self.path / "run" / f"step-{number}"

    def frozen(self, number: int) -> Path:
        return self.step(number) / "__0_1.distcp"

    def shares(self, one: int, other: int) -> bool:
        return self.frozen(one).samefile(self.frozen(other))

    def check(self, number: int, model: nn.Module) -> None:
        """Every byte of a step is verified, and it is the model."""
        assert verify(self.step(number)).is_sound
        state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
        milepost.load(self.step(number), state, allow_unexpected=["optimizer", "rng"])
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.fixture
def run(memory_path: Path) -> Run:
    torch.manual_seed(0)
    return Run(memory_path)


def nbytes_of(folder: Path) -> int:
    """Bytes of files that this folder alone holds."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.stat().st_nlink == 1)


@pytest.mark.parametrize("mode", MODES)
def test_from_the_second_save_on_only_what_is_trained_is_written(run: Run, mode: str) -> None:
    model = Adapted()
    run.save(model, 1, mode=mode)
    first = nbytes_of(run.step(1))
    assert first > NUM_FROZEN * WIDTH * WIDTH * 4
    run.save(model, 2, 3, mode=mode)  # stands for another process: it resumes first
    for step in (2, 3):
        assert run.shares(1, step)
        assert nbytes_of(run.step(step)) <= 0.02 * first
    run.check(3, model)
    loaded = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    dcp.load(loaded, checkpoint_id=run.step(3), no_dist=True)
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_bytes_asked_of_the_storage(run: Run) -> None:
    run.storage = trace = TraceStorage(LocalStorage(run.path))
    with run.manager(model := Adapted()) as manager:
        manager.save(1)
        first = trace.nbytes("write_at") + trace.nbytes("write")
        manager.save(2)
    assert trace.nbytes("write_at") + trace.nbytes("write") <= 1.02 * first
    run.check(2, model)


def test_a_full_run_has_one_file_a_rank_and_digests_nothing_twice(run: Run) -> None:
    model = Adapted()
    model.requires_grad_(True)
    with (
        mock.patch("milepost.saving.writer.xxhash.xxh3_128", side_effect=AssertionError),
        run.manager(model) as manager,
    ):
        manager.save(1)
        manager.save(2)
    assert not run.frozen(1).exists()
    assert not run.frozen(2).exists()


def test_a_table_that_is_frozen_in_a_trained_model_is_no_file(run: Run) -> None:
    model = Adapted()
    model.requires_grad_(True)
    model.adapter.weight.requires_grad_(False)
    run.save(model, 1)
    assert not run.frozen(1).exists()


@pytest.mark.parametrize("mode", MODES)
def test_one_bit_that_changes_is_saved(run: Run, mode: str) -> None:
    model = Adapted()
    with run.manager(model, mode) as manager:
        for step in (1, 2, 3):
            manager.maybe_wait_for_staging()
            if step == 2:
                model.base[3].weight.data.view(torch.int32)[5, 7] ^= 1  # counts as no change, as torch counts them
            manager.save(step)
    assert not run.shares(1, 2)
    assert run.shares(2, 3)
    run.check(3, model)


def test_what_is_no_longer_frozen_is_saved_as_trained(run: Run) -> None:
    model = Adapted()
    with run.manager(model) as manager:
        manager.save(1)
        model.base[0].requires_grad_(True)
        nn.init.normal_(model.base[0].weight)
        manager.save(2)
        nn.init.normal_(model.base[0].weight)
        manager.save(3)
    assert not run.shares(1, 2)
    assert run.shares(2, 3)
    run.check(3, model)


def test_everything_is_rewritten_at_every_nth_save(run: Run) -> None:
    model = Adapted()
    run.save(model, 1, 2, full_every=3)
    run.save(model, 3, 4, 5, full_every=3)
    assert [run.shares(step, step + 1) for step in range(1, 5)] == [True, True, False, True]
    run.check(5, model)
    run.save(model, 6, full_every=1)
    assert not run.frozen(6).exists()
    with pytest.raises(ConfigError, match="full_every"):
        CheckpointConfig(full_every=-1)


def test_old_steps_are_deleted_and_what_they_shared_stays(run: Run) -> None:
    model = Adapted()
    run.save(model, 1, 2, 3, keep_latest_k=2)
    assert not run.step(1).exists()
    run.check(3, model)
    storage = LocalStorage(run.path)
    decisions = retention.plan(catalog.scan(storage, "run"), retention.Rules(keep_latest_k=1), now=0.0)
    gone = next(decision for decision in decisions if not decision.keep)
    assert gone.nbytes < 0.02 * run.frozen(2).stat().st_size  # what deleting it frees
    retention.apply(storage, "run", decisions)
    run.check(3, model)
    assert catalog.scan(storage, "run")[0].shared_nbytes == 0


def mark(run: Run) -> None:
    catalog.mark_damaged(LocalStorage(run.path), "run/step-2", "marked by hand", now=0.0)


def cut(run: Run) -> None:
    shutil.copy(run.frozen(2), copy := run.path / "copy")
    with open(copy, "r+b") as file:
        file.truncate(4096)
    copy.rename(run.frozen(2))


def replace_by_another_save(run: Run) -> None:
    milepost.save(run.step(2), {"w": torch.ones(3)})
    shutil.copy(run.frozen(1), run.frozen(2))


def delete(run: Run) -> None:
    shutil.rmtree(run.step(2))


def make_a_link(run: Run) -> None:
    run.frozen(2).unlink()
    run.frozen(2).symlink_to(run.frozen(1))


@pytest.mark.parametrize("act", [mark, cut, replace_by_another_save, delete, make_a_link])
def test_nothing_is_shared_with_a_step_that_is_not_fit(run: Run, act: Callable[[Run], None]) -> None:
    model = Adapted()
    with run.manager(model) as manager:
        manager.save(1)
        manager.save(2)
        act(run)
        manager.save(3)
        manager.save(4)
    assert run.frozen(3).stat().st_nlink == 2
    assert run.shares(3, 4)
    run.check(4, model)


def test_a_run_shares_with_the_step_that_it_goes_back_to_and_with_no_other_run(run: Run, tmp_path: Path) -> None:
    model = Adapted()
    run.save(model, 1, 2)
    with run.manager(model) as manager:
        nn.init.normal_(model.base[0].weight)
        manager.save(3)  # nothing was loaded: the run continues with other values
    assert not run.shares(2, 3)
    with run.manager(model) as manager:
        manager.load(step=2)
        manager.save(4)
    assert run.shares(2, 4)
    assert not run.shares(3, 4)
    with run.manager(model) as manager:  # a number that is not above the last begins another run
        manager.save(3)
    assert not run.shares(2, 3)
    run.check(3, model)
    run.check(4, model)


def test_damage_of_a_shared_file_is_damage_of_each_step_and_is_said_so(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    model = Adapted()
    run.save(model, 1, full_every=2)
    run.save(model, 2, 3, 4, full_every=2)
    assert [run.shares(step, step + 1) for step in (1, 2, 3)] == [True, False, True]
    with open(run.frozen(4), "r+b") as file:
        file.seek(WIDTH * WIDTH)
        file.write(b"damage")
    report = verify(run.step(3))
    assert report.verdict == "damaged"
    assert "step-4 share __0_1.distcp (by hard links): these steps are damaged too" in report.notes
    with caplog.at_level(logging.WARNING), run.manager(model) as manager:
        found = manager.load()
    assert found is not None
    assert found.step == 2
    assert "step-3 shares the file, so it is marked as damaged too" in caplog.text
    states = {entry.step: entry.state for entry in catalog.scan(LocalStorage(run.path), "run")}
    assert states == {1: "committed", 2: "committed", 3: "damaged", 4: "damaged"}
    with run.manager(model) as manager, pytest.raises(CheckpointDamagedError):
        manager.load(step=3)


def test_where_there_are_no_links_blocks_are_shared_or_all_is_written(run: Run) -> None:
    model = Adapted()
    with mock.patch("milepost.storage.local.os.link", side_effect=PermissionError(1, "not permitted")):
        run.save(model, 1, 2)
    assert not run.shares(1, 2)
    run.check(2, model)

    def clone(src_fd: int, dst_fd: int) -> bool:
        with open(dst_fd, "wb", closefd=False) as file, open(src_fd, "rb", closefd=False) as source:
            file.write(source.read())
        return True

    with (
        mock.patch("milepost.storage.local.os.link", side_effect=PermissionError(1, "not permitted")),
        mock.patch("milepost.storage.syscalls.clone", side_effect=clone) as asked,
    ):
        run.save(model, 3)
    assert asked.call_count == 1
    assert run.frozen(3).stat().st_nlink == 1
    run.check(3, model)


@pytest.fixture
def store() -> Storage:
    pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    return ObjectStorage("memory://", store=MemoryStore())


def test_a_store_copies_within_itself(run: Run, store: Storage) -> None:
    run.storage = trace = TraceStorage(store)
    model = Adapted()
    with run.manager(model) as manager:
        manager.save(1)
        first = trace.nbytes("write_at") + trace.nbytes("write")
        manager.save(2)
        assert sum(operation.name == "share" for operation in trace.operations) == 1
        assert trace.nbytes("write_at") + trace.nbytes("write") <= 1.05 * first
        with mock.patch.object(ObjectStorage, "share", return_value=False):
            manager.save(3)  # it can't: all is written
    assert trace.nbytes("write_at") > 1.9 * NUM_FROZEN * WIDTH * WIDTH * 4
    entries = catalog.scan(store, "run")
    assert [(entry.step, entry.state) for entry in entries] == [(1, "committed"), (2, "committed"), (3, "committed")]
    retention.apply(store, "run", retention.plan(catalog.scan(store, "run"), retention.Rules(keep_latest_k=1), now=0.0))
    copy_step(Spot(store, "run/step-3"), Spot(LocalStorage(run.path), "copy/step-3"))
    loaded = milepost.load(run.path / "copy" / "step-3")
    assert torch.equal(loaded["base.3.weight"], model.base[3].weight)


def test_a_copy_of_a_run_shares_what_the_run_shares(run: Run) -> None:
    model = Adapted()
    run.save(model, 1, 2, 3)
    storage = LocalStorage(run.path)
    copied = Run(run.path / "other")
    sent = {
        step: copy_step(Spot(storage, f"run/step-{step}"), Spot(storage, f"other/run/step-{step}")).nbytes
        for step in (1, 3, 2)
    }
    assert copied.shares(1, 3)
    assert copied.shares(1, 2)
    assert not copied.frozen(1).samefile(run.frozen(1))
    assert max(sent[2], sent[3]) <= 0.02 * sent[1]
    copied.check(3, model)
