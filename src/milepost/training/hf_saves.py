"""Periodic saves in Hugging Face's format (``checkpoint.hf_interval``), beside the steps, while training continues.

That folder is like a run's: its steps are committed, swept and pruned by separate rules. They are
written by a thread, from a copy of the model, independently of the save of a step.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch

from milepost.collective.comm import on_every_rank, on_rank_0
from milepost.run import catalog
from milepost.run.assemble import SaveInfo
from milepost.run.lock import RunLock
from milepost.run.retention import Rules
from milepost.run.step_names import step_name
from milepost.run.takeover import take_over
from milepost.saving.async_save import AsyncSaver
from milepost.saving.background import SaveHandle
from milepost.saving.job import Keep
from milepost.saving.request import SaveRequest
from milepost.storage.base import join
from milepost.training.history import SaveHistory
from milepost.training.training_run import TrainingRun

log = logging.getLogger("milepost")

FOLDER = "hf"
"""Name of the folder in the run's folder."""


class HfSaves:
    """Saves the model every ``hf_interval`` steps. Collective except :meth:`is_due` and :meth:`leave`."""

    def __init__(self, run: TrainingRun):
        assert run.weights_format is not None
        self._storage, self._folder = run.folder.storage, join(run.folder.path, FOLDER)
        self._config, self._comm, self._state = run.config, run.comm, run.state
        self._format, self._layout = run.weights_format, run.degrees
        comm = run.comm
        self._history = SaveHistory(comm, partial(catalog.scan, self._storage, self._folder), lambda: None)
        self._begun: tuple[int, SaveHandle] | None = None
        self._lock: RunLock | None = None  # rank 0 holds it
        self._saver = on_every_rank(comm, self._make_saver)
        on_rank_0(comm, self._take_folder)  # last: no later failure may leave the folder locked

    def _make_saver(self) -> AsyncSaver:
        return AsyncSaver(self._storage, self._comm, "async", num_threads=self._config.num_io_threads)

    def _take_folder(self) -> None:
        self._storage.make_folder(self._folder)
        self._lock = take_over(self._storage, self._folder)

    def is_due(self, step: int) -> bool:
        """Return whether a save is due after ``step``."""
        return step > 0 and step % self._config.hf_interval == 0

    def save(self, step: int, run_id: str) -> None:
        """Start saving the model for ``step`` of a run; returns once it is copied. Waits for the previous save.

        Raises:
            SaveError: it could not be started, or the previous one failed in the background; on every rank.
        """
        self.wait()
        config = self._config
        request = SaveRequest(
            target=join(self._folder, step_name(step)),
            make_state=partial(self._state.state_dict, ("model",)),
            info=SaveInfo(
                step=step,
                kind="model",
                layout=self._layout,
                extra=self._format.record(),
                lineage=replace(self._history.next_lineage(step), run=run_id),
            ),
            dtype=getattr(torch, config.export_dtype) if config.export_dtype is not None else None,
            keep=Keep(self._folder, Rules(config.hf_keep_latest_k, config.hf_keep_every_n_steps, weights_alone=True)),
            make_form=self._format.form_of,
            modules=self._state.modules,
        )
        self._begun = step, self._saver.save(request)

    def wait(self) -> None:
        """Return once the running save, if any, is committed.

        Raises:
            SaveError: it failed; on every rank, and once.
        """
        try:
            self._saver.wait()
        finally:
            self._record()

    def close(self) -> None:
        """Wait for the running save, and release memory and the folder. Raises like :meth:`wait`."""
        try:
            self._saver.close()
        finally:
            self._record()
            self._release()

    def leave(self) -> None:
        """Close without collectives, on a rank that exits with an error: a failure is logged."""
        try:
            self._saver.leave()
        finally:
            self._release()

    def _record(self) -> None:
        """Record the save that has ended."""
        if self._begun is None or not self._begun[1].done():
            return
        (step, save), self._begun = self._begun, None
        if save.failure is not None:
            return
        report = save.result()
        self._history.committed(step, report.save_id)
        if self._comm.rank == 0:
            log.info("saved the model of step %d as Hugging Face files in %s", step, report.path)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
