"""``CheckpointManager``: what a training loop talks to. When to save, what to keep, where to resume from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from milepost import catalog, retention
from milepost.checkpoint.assemble import SaveInfo
from milepost.checkpoint.commit import sweep_leftovers
from milepost.checkpoint.load import LoadReport, load_from
from milepost.checkpoint.resume import Choice, choose
from milepost.checkpoint.save import Saver, SaveReport
from milepost.checkpoint.schedule import reason_to_save
from milepost.checkpoint.training_state import TrainingState
from milepost.comm import Comm, default_comm, failure_on, raise_together
from milepost.config import CheckpointConfig, part_of
from milepost.errors import CheckpointDamagedError, StorageError
from milepost.format.manifest import Manifest
from milepost.storage import open_storage
from milepost.storage.base import join

log = logging.getLogger("milepost")

T = TypeVar("T")


class CheckpointManager:
    """Saves and resumes a training run. All methods are collective: call them on every rank.

    Example::

        manager = CheckpointManager("outputs/checkpoint", CheckpointConfig(enable=True, interval=100),
                                    model=model, optimizer=optimizer, train_state=my_state)
        manager.load()
        for step in range(my_state.step + 1, num_steps + 1):
            ...
            manager.save(step, last_step=step == num_steps)
        manager.close()

    Args:
        folder: where the steps are kept, as ``step-<N>`` folders.
        config: see :class:`milepost.CheckpointConfig`.
        model: a module, or this rank's pipeline stages.
        optimizer: one or several optimizers over the model's parameters.
        lr_scheduler: a scheduler; of several, all are given the first one's state when loading.
        dataloader, train_state: anything with ``state_dict()`` and ``load_state_dict()``.
        layout: degrees of parallelism by name. Recorded; random generators are restored only under the same one.
        comm: how ranks exchange; by default the default process group, or one process.

    Raises (from every method, on every rank): subclasses of :class:`milepost.MilepostError`.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        lr_scheduler: Any = None,
        dataloader: Stateful | None = None,
        train_state: Stateful | None = None,
        layout: Mapping[str, int] | None = None,
        comm: Comm | None = None,
    ):
        self._config = config if config is not None else CheckpointConfig(enable=True)
        self._comm = comm if comm is not None else default_comm()
        parent, name = open_storage(fspath(folder))
        self._storage, self._folder = parent, name
        self._state = TrainingState.of(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dataloader=dataloader,
            train_state=train_state,
            rank=self._comm.rank,
        )
        self._layout = dict(layout or {})
        self._saver = Saver(self._storage, self._comm)
        self._protected: dict[int, str] = {}
        self._blocked_s = 0.0
        if self._config.enable and not self._config.load_only:
            self._on_rank_0(lambda: sweep_leftovers(self._storage, self._folder, now=time.time()))

    @property
    def blocked_s(self) -> float:
        """Seconds that the training thread has spent in this manager's methods."""
        return self._blocked_s

    @property
    def folder(self) -> str:
        """Where the steps are kept."""
        return join(self._storage.root, self._folder)

    @property
    def latest_step(self) -> int | None:
        """The newest step that can be loaded, of whatever kind; None if there is none. Collective."""
        if not self._config.enable:
            return None
        steps = [entry.step for entry in self._on_rank_0(self._scan) if entry.is_usable]
        return max(steps, default=None)

    def load(self) -> LoadReport | None:
        """Resume, or start from ``initial_load_path``; None when there is nothing to load and training starts afresh.

        The newest committed step with the full state is taken, or ``load_step``. When its bytes prove damaged, it is
        marked so and the next older one is taken, on all ranks together; ``load_step`` never falls back.
        """
        if not self._config.enable:
            return None
        with self._blocked():
            rejected: dict[int, str] = {}
            while True:
                choice = self._on_rank_0(lambda: choose(self._scan(), self._config, rejected, self.folder))
                if choice is None:
                    return None
                try:
                    report = self._load(choice)
                except CheckpointDamagedError as error:
                    if not choice.may_fall_back or choice.step is None:
                        raise
                    rejected[choice.step] = error.message
                    self._on_rank_0(partial(self._mark_damaged, choice.path, error.message))
                    continue
                if choice.step is not None:
                    self._protected[choice.step] = "this run resumed from it"
                return report

    def save(self, step: int, *, last_step: bool = False) -> bool:
        """Save if a checkpoint is due after ``step``; returns whether one was made.

        The state of the previous step is untouched until the new one is committed; then ``keep_latest_k`` is applied.
        """
        reason = reason_to_save(self._config, step, is_last=last_step)
        if reason is None:
            return False
        with self._blocked():
            started = time.monotonic()
            report = self._save(step, last_step=last_step)
            self._on_rank_0(self._prune)
            self._log_save(step, reason, report, time.monotonic() - started)
        return True

    def maybe_wait_for_staging(self) -> None:
        """Return when the weights may be changed again. To be called before ``optimizer.step()``."""

    def close(self) -> None:
        """Finish what runs in the background, and raise its error if nothing else did."""

    def _save(self, step: int, *, last_step: bool) -> SaveReport:
        model_only = self._config.create_seed_checkpoint or (last_step and self._config.last_save_model_only)
        dtype = None
        if model_only and not self._config.create_seed_checkpoint and self._config.export_dtype != "float32":
            dtype = getattr(torch, self._config.export_dtype)
        wanted = ("model",) if model_only else self._state.present()
        info = SaveInfo(step=step, kind="model" if model_only else "full", layout=self._layout)
        target = join(self._folder, catalog.step_name(step))
        return self._saver.save(target, lambda: self._state.state_dict(wanted), info, dtype=dtype)

    def _load(self, choice: Choice) -> LoadReport:
        if choice.step is None:
            storage, path = open_storage(choice.path)
        else:
            storage, path = self._storage, choice.path
        wanted = ("model",) if choice.model_only else self._state.present()
        wanted = tuple(part for part in wanted if part not in self._config.exclude_from_loading)
        same_layout = False
        target: dict[str, Any] = {}

        def make_target(manifest: Manifest) -> dict[str, Any]:
            nonlocal same_layout, target
            same = manifest.world_size == self._comm.world_size and dict(manifest.layout) == self._layout
            same_layout = same
            target = self._state.target(wanted, manifest, same_layout=same)
            return target

        complete = {part for part in ("model", "optimizer") if part in wanted}
        report = load_from(
            storage,
            path,
            make_target,
            strict=True,
            comm=self._comm,
            must_be_wanted=lambda key: part_of(key) in complete,
        )
        failure, notes = None, [*choice.notes]
        try:
            remark = self._state.restore(wanted, target, same_layout=same_layout)
            notes += [remark] if remark else []
        except Exception as cause:  # noqa: BLE001 - a load_state_dict() of the user's may raise anything
            failure = failure_on(self._comm.rank, cause)
        raise_together(self._comm, failure)
        if self._config.exclude_from_loading:
            notes.append(f"left as freshly built: {', '.join(self._config.exclude_from_loading)}")
        return replace(report, notes=tuple(notes))

    def _scan(self) -> list[catalog.StepEntry]:
        return catalog.scan(self._storage, self._folder)

    def _mark_damaged(self, path: str, reason: str) -> None:
        log.warning("%s\nFalling back to an older step; the damaged one is left where it is, marked.", reason)
        if self._config.load_only:
            return
        try:
            catalog.mark_damaged(self._storage, path, reason, now=time.time())
        except StorageError as error:  # it is passed over in this run all the same
            log.warning("the mark could not be left: %s", error)

    def _prune(self) -> None:
        decisions = retention.plan(
            self._scan(), keep_latest_k=self._config.keep_latest_k, protected=self._protected, now=time.time()
        )
        try:
            for name in retention.apply(self._storage, self._folder, decisions):
                log.info("deleted %s: keep_latest_k = %d", name, self._config.keep_latest_k)
        except StorageError as error:  # the save is committed; an old step that stays is no reason to stop training
            log.warning("an old step could not be deleted: %s", error)

    def _log_save(self, step: int, reason: str, report: SaveReport, seconds: float) -> None:
        if self._comm.rank == 0:
            log.info(
                "saved step %d (%s) in %.2f s: plan %.2f, write %.2f, commit %.2f; rank 0 wrote %.1f MB",
                step,
                reason,
                seconds,
                report.plan_s,
                report.write_s,
                report.commit_s,
                report.nbytes / 1e6,
            )

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._blocked_s += time.monotonic() - started

    def _on_rank_0(self, act: Callable[[], T]) -> T:
        """Do something on rank 0 alone and give its result, or its error, to every rank."""
        result, failure = None, None
        if self._comm.rank == 0:
            try:
                result = act()
            except Exception as cause:  # noqa: BLE001 - the other ranks wait for the outcome
                failure = failure_on(0, cause)
        result, failure = self._comm.broadcast((result, failure))
        if failure is not None:
            raise failure
        return cast("T", result)
