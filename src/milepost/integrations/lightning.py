"""Lightning: a ``CheckpointIO``, and a callback that installs it in every strategy, including sharded ones.

A checkpoint is a folder with the name given by Lightning (``last.ckpt``) and the model's keys at the top level, so that
all of Milepost's commands support it.
"""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import milepost
from milepost.collective.comm import Comm, SingleProcess, default_comm, on_rank_0
from milepost.config import part_of
from milepost.errors import ConfigError, MilepostError
from milepost.run import catalog, checkpoint_record
from milepost.run.sweep import delete_checkpoint
from milepost.saving.async_save import Mode
from milepost.saving.background import SaveHandle, finish_saves
from milepost.saving.request import Kind
from milepost.storage import open_storage
from milepost.tensors.tree import Tree
from milepost.training.random_state import rng_state, set_rng_state

log = logging.getLogger("milepost")

PARTS = {"optimizer_states": "optimizer", "lr_schedulers": "lr_scheduler"}
"""Entries of Lightning's checkpoint that become separate parts; ``state_dict`` is the model, all others are train
state."""
RANDOM = "milepost_random_state"


Module = TypeVar("Module", bound=LightningModule)


class MilepostCheckpointIO(CheckpointIO):
    """Saves Lightning's checkpoints with Milepost, for strategies in which rank 0 saves: one device, and DDP.

    Lightning's own files are still loaded; no code from them is run unless ``weights_only=False`` is given.

    Args:
        mode: ``async``: a thread writes while training continues; ``async_with_pinned_mem``: a process; None: training
        waits.
    """

    def __init__(self, mode: Mode | None = "async"):
        self._saves = _Saves(mode)
        self._stock = TorchCheckpointIO()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save; with a ``mode``, everything is staged on return. The error of an earlier save is raised here."""
        if storage_options is not None:
            raise ConfigError("MilepostCheckpointIO has no storage_options; put a URL of the store in the path")
        self._saves.save(os.fspath(path), to_parts(checkpoint), checkpoint["global_step"], SingleProcess())

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the checkpoint at ``path`` into CPU memory, comparing every byte with its digest."""
        self._saves.wait(SingleProcess())
        if os.path.isfile(path):
            is_safe = weights_only is None or weights_only
            return self._stock.load_checkpoint(path, map_location or "cpu", weights_only=is_safe)
        return from_parts(milepost.load(path, comm=SingleProcess()))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint once its replacement is committed. Anything else is left unchanged."""
        if os.path.isfile(path):
            self._saves.wait(SingleProcess())
            self._stock.remove_checkpoint(path)
        else:
            self._saves.remove(os.fspath(path))

    def teardown(self) -> None:
        """Return once the last save is committed.

        Raises:
            SaveError: it has failed.
        """
        self._saves.wait(SingleProcess())


class MilepostCallback(Callback):
    """Installs Milepost in a Trainer with any strategy, and saves the random state of each rank.

    Under ``FSDPStrategy`` and ``ModelParallelStrategy`` each rank saves its shards, and a checkpoint resumes on other
    numbers of ranks; under the others :class:`MilepostCheckpointIO` saves. ``ModelCheckpoint`` still decides when to
    save and what to keep, and ``trainer.fit(ckpt_path="last")`` resumes.

    Args:
        mode: see :class:`MilepostCheckpointIO`.
    """

    def __init__(self, mode: Mode | None = "async"):
        self._mode = mode
        self._taken: Strategy | None = None
        self._sharded: _Sharded | None = None
        self._random: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the strategy's means of saving and loading, before anything is loaded."""
        strategy = trainer.strategy
        if strategy is self._taken:
            return
        self._taken = strategy
        # A link to a checkpoint that is not committed yet would be lost with its run.
        links = any(getattr(callback, "save_last", None) == "link" for callback in trainer.checkpoint_callbacks)
        mode = None if links else self._mode
        if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
            self._sharded = _Sharded(strategy, mode)
            for name in ("save_checkpoint", "load_checkpoint", "remove_checkpoint"):
                setattr(strategy, name, getattr(self._sharded, name))
        elif not isinstance(strategy.checkpoint_io, MilepostCheckpointIO):
            strategy.checkpoint_io = MilepostCheckpointIO(mode)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Return once the last save is committed: these strategies do not tear down their CheckpointIO.

        Raises:
            SaveError: it has failed.
        """
        if self._sharded is not None:
            self._sharded.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait for staged saves without a collective: after an error the other ranks may not take part."""
        finish_saves()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random state of every rank. Collective, like all saves under Lightning."""
        comm = default_comm()
        states = comm.broadcast(comm.gather(rng_state()) or [])
        checkpoint[RANDOM] = {f"rank{rank}": state for rank, state in enumerate(states)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore this rank's random state, on the same number of ranks, before Lightning sets up the data."""
        comm = default_comm()
        states = checkpoint.get(RANDOM, {})
        self._random = states.get(f"rank{comm.rank}") if len(states) == comm.world_size else None
        if self._random is not None:
            set_rng_state(self._random)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random state again, if the run was saved within an epoch.

        The iterator over the data has drawn from it since. It would have done so at the end of an epoch too, but not in
        the middle of one.
        """
        state, self._random = self._random, None
        if state is not None and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            set_rng_state(state)


def load_from_checkpoint(
    module: type[Module], path: str | os.PathLike[str], *, strict: bool | None = None, **arguments: Any
) -> Module:
    """Return a ``module`` with the weights and hyperparameters of a checkpoint, on the CPU.

    Replaces ``Module.load_from_checkpoint``, which opens a file. ``arguments`` are constructor arguments that the
    checkpoint does not hold.

    Raises:
        CheckpointDamagedError: bytes changed after they were written.
        CheckpointNotFoundError: there is nothing at ``path``.
    """
    if os.path.isfile(path):
        return module.load_from_checkpoint(path, map_location="cpu", strict=strict, **arguments)
    path = os.fspath(path)
    wanted: dict[str, Any] = {key: None for key in keys_of(path) if key not in PARTS.values()}
    milepost.load(path, wanted, allow_unexpected=(*PARTS.values(),), comm=SingleProcess())
    checkpoint = from_parts(wanted)
    for name in ("loops", "callbacks"):
        checkpoint.pop(name, None)
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    stream.seek(0)
    return module.load_from_checkpoint(stream, map_location="cpu", strict=strict, weights_only=False, **arguments)


class _Saves:
    """Runs saves one after the other, and removes replaced checkpoints once the last save is committed."""

    def __init__(self, mode: Mode | None):
        self._mode = mode
        self._current: SaveHandle | None = None
        self._lock = threading.Lock()
        self._replaced: list[str] = []

    def save(self, path: str, state: Mapping[str, Any], step: int, comm: Comm) -> None:
        kind: Kind = "full" if "optimizer" in state else "model"
        if self._mode is None:
            milepost.save(path, state, comm=comm, step=step, kind=kind)
        else:
            self._current = milepost.async_save(path, state, mode=self._mode, comm=comm, step=step, kind=kind)
            self._current.staged()  # Lightning has no hook for waiting before the weights change

    def wait(self, comm: Comm) -> None:
        """Raise the last save's error on every rank, and remove the checkpoints that it replaced. Collective."""
        current, self._current = self._current, None
        if current is not None:
            try:
                current.result()
            finally:
                self._remove_replaced(current)

    def remove(self, path: str) -> None:
        if self._current is None:
            _remove(path)
        else:
            with self._lock:
                self._replaced.append(path)
            self._current.when_done(partial(self._remove_replaced, self._current))

    def _remove_replaced(self, handle: SaveHandle) -> None:
        """Remove the checkpoints replaced by a finished save. Called by the thread that ends it, and by waiters."""
        with self._lock:
            paths, self._replaced = self._replaced, []
            for path in paths:
                if handle.failure is None:
                    _remove(path)
                else:
                    log.warning("%s is kept: the save that should replace it failed", path)


def _remove(path: str) -> None:
    """Delete a checkpoint. A failure is logged: training does not depend on it."""
    storage, name = open_storage(path)
    try:
        found = catalog.examine(storage, name)
        if found is None or found.state not in ("committed", "damaged"):
            log.warning("%s is not deleted: it is not a checkpoint of Milepost", path)
        else:
            delete_checkpoint(storage, name)
    except MilepostError as error:
        log.warning("%s could not be deleted: %s", path, error)


class _Sharded:
    """Saving and loading under a strategy in which each rank holds shards. All methods are collective."""

    def __init__(self, strategy: FSDPStrategy | ModelParallelStrategy, mode: Mode | None):
        self._strategy = strategy
        self._saves = _Saves(mode)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        comm = default_comm()
        path = comm.broadcast(os.fspath(filepath))
        step = checkpoint["global_step"]
        checkpoint["state_dict"] = get_model_state_dict(self._strategy.model)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = self._optimizer_states()
        state = to_parts(checkpoint)
        state["train_state"] = comm.broadcast(state["train_state"])  # it contains clock values that differ by rank
        self._saves.save(path, state, step, comm)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        comm = default_comm()
        self._saves.wait(comm)
        path = comm.broadcast(os.fspath(checkpoint_path))
        wanted: dict[str, Any] = dict(get_model_state_dict(self._strategy.model))
        model_keys = list(wanted)
        keys = on_rank_0(comm, partial(keys_of, path))
        wanted |= {key: None for key in keys if part_of(key) != "model" and key != "optimizer"}
        is_training = "optimizer" in keys and bool(self._strategy.optimizers)
        if is_training:
            wanted["optimizer"] = dict(enumerate(self._optimizer_states()))
        milepost.load(path, wanted, allow_unexpected=() if is_training else ("optimizer",))
        self._strategy.model.load_state_dict({key: wanted[key] for key in model_keys})
        for number, optimizer in enumerate(self._strategy.optimizers if is_training else ()):
            set_optimizer_state_dict(self._strategy.model, optimizer, optim_state_dict=wanted["optimizer"][number])
        return from_parts(wanted)

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        if self._strategy.is_global_zero:
            self._saves.remove(os.fspath(filepath))

    def close(self) -> None:
        self._saves.wait(default_comm())

    def _optimizer_states(self) -> list[Any]:
        return [get_optimizer_state_dict(self._strategy.model, optimizer) for optimizer in self._strategy.optimizers]


def to_parts(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Convert Lightning's checkpoint: the model at the top level, the rest under Milepost's parts.

    Raises:
        ConfigError: a name in the model is reserved for a part.
    """
    model = checkpoint["state_dict"]
    taken = sorted(key for key in model if part_of(key) != "model")
    if taken:
        raise ConfigError(f"the module has '{taken[0]}', but '{part_of(taken[0])}.' is reserved for a part; rename it")
    state: dict[str, Any] = dict(model)
    for theirs, ours in PARTS.items():
        if theirs in checkpoint:
            state[ours] = dict(enumerate(checkpoint[theirs]))
    state["train_state"] = {key: value for key, value in checkpoint.items() if key not in PARTS and key != "state_dict"}
    return state


def from_parts(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert back to Lightning's checkpoint, the inverse of :func:`to_parts`."""
    checkpoint: dict[str, Any] = dict(state.get("train_state") or {})
    checkpoint["state_dict"] = {key: value for key, value in state.items() if part_of(key) == "model"}
    for theirs, ours in PARTS.items():
        if ours in state:
            checkpoint[theirs] = list((state[ours] or {}).values())
    return checkpoint


def keys_of(path: str) -> list[str]:
    """Return the keys at the top level of a checkpoint.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    storage, name = open_storage(path)
    return list(Tree.of(checkpoint_record.read_manifest(storage, name)).root)
