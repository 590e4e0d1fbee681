"""The request of each periodic save: parts of the training state, format, and attachments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import torch

from milepost.errors import ConfigError
from milepost.interop.weights.base_samples import ONLY_TRAINABLE
from milepost.run.assemble import SaveInfo
from milepost.run.step_names import step_name
from milepost.saving.request import SaveRequest
from milepost.storage.base import join
from milepost.training.attached import PART as ATTACHED
from milepost.training.attached import attached
from milepost.training.frozen import record_of
from milepost.training.history import SaveHistory
from milepost.training.metrics import MetricRecorder
from milepost.training.peft import adapter_files
from milepost.training.run_folder import RunFolder
from milepost.training.staging_memory import staging_nbytes
from milepost.training.training_run import TrainingRun
from milepost.training.training_state import KINDS

log = logging.getLogger("milepost")


@dataclass(frozen=True, slots=True)
class Attachments:
    """The arguments of a save besides the step: metrics, small files, and values that describe the step."""

    metrics: Mapping[str, float] | None = None
    files: Mapping[str, bytes | str | PathLike[str]] | None = None
    extra: Mapping[str, Any] | None = None


class RequestMaker:
    """Creates the request of each save of a run, the same on every rank except for the state."""

    def __init__(self, run: TrainingRun, folder: RunFolder, history: SaveHistory, per_rank: tuple[str, ...]):
        self._run = run
        self._config, self._comm, self._state = run.config, run.comm, run.state
        self._folder = folder
        self._history = history
        self._per_rank = per_rank
        self._metrics = MetricRecorder(run.config.metric)

    def make(self, step: int, *, is_last: bool, given: Attachments) -> SaveRequest:
        """Return the request of the save after ``step``. Collective for the first save of a new run.

        Raises:
            SaveError: on every rank, if the folder can't be read.
        """
        config = self._config
        model_only = config.create_seed_checkpoint or (is_last and config.last_save_model_only)
        is_export = model_only and not config.create_seed_checkpoint
        weights_format = self._run.weights_format if is_export and config.last_save_in_hf else None
        only_trainable = config.only_trainable and weights_format is None
        base = record_of(self._comm, self._state) if only_trainable else {}
        metrics, mistake = self._metrics.values(given.metrics or {}) if self._comm.rank == 0 else ({}, None)
        return SaveRequest(
            target=join(self._folder.local.path, step_name(step)),
            make_state=partial(
                self._make_state,
                ("model",) if model_only else self._state.present(),
                mistake,
                None if weights_format is not None else partial(self._attached, given, base),
                only_trainable=only_trainable,
            ),
            info=SaveInfo(
                step=step,
                kind="model" if model_only else "full",
                layout=self._run.degrees,
                extra={
                    **(self._run.weights_format.record() if self._run.weights_format is not None else {}),
                    **({ONLY_TRAINABLE: True} if only_trainable else {}),
                    **({} if model_only else {KINDS: self._state.kinds()}),
                },
                lineage=self._history.next_lineage(step),
                metrics=metrics,
            ),
            dtype=getattr(torch, config.export_dtype) if is_export and config.export_dtype is not None else None,
            keep=self._folder.keep(),
            make_form=weights_format.form_of if weights_format is not None else None,
            per_rank=self._per_rank,
            modules=self._state.modules,
            full_every=config.full_every,
        )

    def staging_nbytes(self) -> int:
        """Estimate the bytes of this rank's next full saves, from the tensors there are now; 0 if that fails."""
        replicas = self._comm.world_size // self._run.degrees.get("pp", 1)
        if (nodes := self._folder.nodes) is not None:  # each node stores all that its ranks hold
            replicas = min(replicas, len(nodes.part_of(self._comm.rank).ranks))
        try:
            return staging_nbytes(
                *(self._state.modules, self._state.optimizers, max(1, replicas)),
                only_trainable=self._config.only_trainable,
            )
        except Exception as error:  # noqa: BLE001 - of a model or optimizer of an unusual kind; it is but an estimate
            log.debug("can't estimate the size of a save: %s", error)
            return 0

    def _attached(self, given: Attachments, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the step's attachments: the caller's files and values, and the adapters' configuration and base."""
        files = {**adapter_files(self._state.models), **(given.files or {})}
        return {**attached(files, given.extra), **base}

    def _make_state(
        self,
        parts: tuple[str, ...],
        mistake: ConfigError | None,
        attach: Callable[[], dict[str, Any]] | None,
        *,
        only_trainable: bool,
    ) -> dict[str, Any]:
        """Return the state to save. Called within the save, so that a caller's mistake on one rank fails it on all."""
        if mistake is not None:
            raise mistake
        state = self._state.state_dict(parts, only_trainable=only_trainable)
        if attach is not None and self._comm.rank == 0 and (beside := attach()):
            state[ATTACHED] = beside
        return state
