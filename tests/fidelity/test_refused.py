"""A load that is refused has changed nothing: every byte of model, optimizer, scheduler, loader, counters and random
generators is what it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same import digest
from torch import nn
from torch.optim import lr_scheduler

import milepost
from milepost import (
    CheckpointConfig,
    CheckpointDamagedError,
    CheckpointManager,
    MilepostError,
    PartlyLoadedError,
    SaveError,
    StateMismatchError,
)
from milepost.run import checkpoint_record
from milepost.storage import LocalStorage


class Counter:
    """A loader or the state of a loop."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"step": 0, "losses": torch.zeros(3)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Run:
    """A small run with every part, trained for some steps."""

    def __init__(self, seed: int, *, layers: int = 2, width: int = 4, groups: int = 2, steps: int = 0):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)], nn.BatchNorm1d(width))
        parameters = list(self.model.parameters())
        chunks = [{"params": parameters[n::groups], "lr": 0.1 / (n + 1)} for n in range(groups)]
        self.optimizer = torch.optim.AdamW(chunks)
        self.scheduler = lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        self.parts = {"dataloader": Counter(), "train_state": Counter()}
        for _ in range(steps):
            self.model(torch.randn(5, width)).square().sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            for part in self.parts.values():
                part.state = {"step": part.state["step"] + 1, "losses": part.state["losses"] + 0.1}

    def manager(self, folder: Path, **options: Any) -> CheckpointManager:
        config = CheckpointConfig(enable=True, interval=1, last_save_model_only=False, **options)
        return CheckpointManager(
            folder,
            config,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.scheduler,
            **self.parts,  # type: ignore[arg-type]
        )

    def digest(self) -> str:
        return digest(
            {
                "model": [*self.model.named_parameters(), *self.model.named_buffers()],
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "parts": {name: part.state for name, part in self.parts.items()},
                "random": [torch.get_rng_state(), list(np.random.get_state()), random.getstate()],
            }
        )


def flip(step: Path, *, of_a_value: bool) -> None:
    manifest = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name)
    if of_a_value:
        entry = manifest.objects["train_state.step"]
        name, place = entry.file, entry.record_offset + entry.record_nbytes // 2
    else:
        shard = manifest.tensors["train_state.losses"].shards[0]
        name, place = shard.file, (shard.data_offset or 0) + 1
    data = bytearray((step / name).read_bytes())
    data[place] ^= 4
    (step / name).write_bytes(data)


REFUSED: dict[str, Callable[[Path], Run]] = {
    "fewer layers": lambda step: Run(1, layers=1, steps=2),
    "more layers": lambda step: Run(1, layers=3, steps=2),
    "other shapes": lambda step: Run(1, width=5, steps=2),
    "other groups": lambda step: Run(1, groups=1, steps=2),
    "never trained": lambda step: Run(1, layers=1),
    "a flipped bit in a value": lambda step: flip(step, of_a_value=True) or Run(1, steps=1),  # type: ignore[func-returns-value]
    "a flipped bit in a tensor of the state": lambda step: flip(step, of_a_value=False) or Run(1),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_nothing_is_changed(memory_path: Path, make: Callable[[Path], Run]) -> None:
    saved = Run(0, steps=3)
    manager = saved.manager(memory_path / "run")
    manager.save(1)
    manager.close()
    run = make(memory_path / "run" / "step-1")
    manager = run.manager(memory_path / "run", load_step=1)
    before = run.digest()
    with pytest.raises(MilepostError):
        manager.load()
    assert run.digest() == before
    manager.close()


def test_nothing_is_changed_by_load(memory_path: Path) -> None:
    """``milepost.load`` into modules, optimizers and plain values."""
    saved = Run(0, steps=3)

    def state(run: Run) -> dict[str, Any]:
        return {"model": run.model, "optimizer": run.optimizer, "part": run.parts["train_state"].state, "n": 1}

    milepost.save(memory_path / "step-1", state(saved))
    for run in (Run(1, layers=1, steps=1), Run(1, width=5), Run(1, groups=1), Run(1, layers=3)):
        into = state(run)
        kept = copy.copy(into)
        before = run.digest()
        with pytest.raises(MilepostError):
            milepost.load(memory_path / "step-1", into)
        assert run.digest() == before
        assert into == kept


class Checking(Counter):
    """A loader that looks at its state before anything is loaded."""

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.error = error

    def check_state_dict(self, state: dict[str, Any]) -> None:
        assert state["step"] == 3
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [StateMismatchError("of other data"), RuntimeError("of other data")])
def test_an_object_may_refuse_its_state_before_anything_is_changed(memory_path: Path, error: Exception) -> None:
    with Run(0, steps=3).manager(memory_path / "run") as manager:
        manager.save(1)
    run = Run(1, steps=1)
    run.parts["dataloader"] = refusing = Checking(error)
    before = run.digest()
    with run.manager(memory_path / "run") as manager:
        with pytest.raises(StateMismatchError, match="of other data"):
            manager.load()
        assert run.digest() == before
        refusing.error = None
        manager.load()
    assert run.parts["dataloader"].state["step"] == 3
    with pytest.raises(StateMismatchError, match="of other data"):
        milepost.load(memory_path / "run" / "step-1", {"dataloader": Checking(error)}, allow_unexpected=["*"])


class Refusing(Counter):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RuntimeError("of an older version")


def test_a_state_that_an_object_refuses_halfway_is_named_and_never_saved(memory_path: Path) -> None:
    saved = Run(0, steps=3)
    with saved.manager(memory_path / "run") as manager:
        manager.save(1)
    run = Run(1, steps=1)
    run.parts["dataloader"] = Refusing()
    with run.manager(memory_path / "run") as manager:
        with pytest.raises(
            PartlyLoadedError, match=r"dataloader: load_state_dict.. raised RuntimeError: of an older version"
        ) as caught:
            manager.load()
        assert caught.value.loaded == ("model", "optimizer", "lr_scheduler")
        assert (caught.value.failed, caught.value.not_loaded) == ("dataloader", ("train_state", "rng"))
        with pytest.raises(SaveError, match=r"may be a mix of two, since load.. failed in the middle"):
            manager.save(2)
        run.parts["dataloader"].load_state_dict = lambda state: None  # type: ignore[method-assign]
        manager.load()
        assert manager.save(2)


def test_further_objects_are_named_one_by_one(memory_path: Path) -> None:
    def manager(**states: Any) -> CheckpointManager:
        return CheckpointManager(memory_path, CheckpointConfig(interval=1), model=nn.Linear(1, 1), states=states)

    with manager(ema=Counter(), scaler=Counter()) as saving:
        saving.save(1)
    with manager(ema=Counter(), scaler=Refusing()) as loading, pytest.raises(PartlyLoadedError) as caught:
        loading.load()
    assert (caught.value.loaded, caught.value.failed) == (("model", "states.ema"), "states.scaler")


def test_load_names_the_objects_that_are_loaded_and_those_that_are_not(memory_path: Path) -> None:
    milepost.save(memory_path / "step-1", {"one": Counter(), "two": Counter(), "three": Counter()})
    with pytest.raises(PartlyLoadedError) as caught:
        milepost.load(memory_path / "step-1", {"one": Counter(), "two": Refusing(), "three": Counter()})
    assert (caught.value.loaded, caught.value.failed, caught.value.not_loaded) == (("one",), "two", ("three",))


def test_weights_that_are_damaged_halfway_are_never_saved(memory_path: Path) -> None:
    saved = Run(0, steps=3)
    with saved.manager(memory_path / "run") as manager:
        manager.save(1)
    manifest = checkpoint_record.read_manifest(LocalStorage(memory_path / "run"), "step-1")
    shard = manifest.tensors["1.weight"].shards[0]
    data = bytearray((memory_path / "run" / "step-1" / shard.file).read_bytes())
    data[(shard.data_offset or 0) + 1] ^= 4
    (memory_path / "run" / "step-1" / shard.file).write_bytes(data)
    run = Run(1, steps=1)
    with run.manager(memory_path / "run") as manager:
        with pytest.raises(CheckpointDamagedError):
            manager.load()
        with pytest.raises(SaveError, match="may be a mix of two"):
            manager.save(2)
