"""Hugging Face transformers: a ``Trainer`` that saves and resumes with Milepost instead of its own checkpoints.

The Trainer still decides when to save; it writes, keeps and resumes from Milepost's steps.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

import milepost
from milepost.collective.comm import default_comm, on_rank_0
from milepost.config import PARTS, CheckpointConfig
from milepost.errors import CheckpointNotFoundError, ConfigError
from milepost.integrations.accelerate import unwrapped
from milepost.integrations.choice import Resumable, step_to_resume
from milepost.interop.hf.model import HfModel
from milepost.run import catalog
from milepost.run.step_names import step_name, step_of
from milepost.storage import open_storage
from milepost.training.manager import CheckpointManager
from milepost.training.random_state import set_rng_state

log = logging.getLogger("milepost")

STATE_NAME = "trainer_state.json"
REPLACED = ("train", "_load_from_checkpoint", "_load_rng_state", "_save_checkpoint", "_load_best_model")
"""The Trainer's methods for checkpoints."""


class MilepostCallback(TrainerCallback):
    """Saves and resumes all runs of a Trainer with Milepost: model, optimizer, scheduler, random state, Trainer state.

    ``trainer.train(resume_from_checkpoint=True)`` resumes from the newest undamaged step; where there is no step, from
    the newest checkpoint of the Trainer's own in its ``output_dir``, and else it begins a new run. A path of a step
    loads that one. When to save is set with ``save_strategy`` and ``save_steps``; ``save_total_limit`` is Milepost's
    ``keep_latest_k``, and with ``load_best_model_at_end`` the best step is kept too.

    Example::

        trainer = Trainer(model, args, train_dataset=data)
        MilepostCallback(trainer)
        trainer.train(resume_from_checkpoint=True)

    Args:
        trainer: the Trainer; the callback adds itself.
        folder: folder of the steps; by default ``milepost`` in the Trainer's ``output_dir``.
        config: further options; by default training continues while a step is written (``async_mode="async"``) and, as
            with the Trainer itself, all steps are kept.

    Raises:
        ConfigError: the Trainer's arguments require something that Milepost does not support.
    """

    def __init__(self, trainer: Trainer, folder: str | None = None, config: CheckpointConfig | None = None):
        _check_trainer(trainer)
        self._trainer = trainer
        self._config = _config_of(trainer, config or CheckpointConfig(enable=True, async_mode="async", keep_latest_k=0))
        self._folder = folder if folder is not None else os.path.join(trainer.args.output_dir, "milepost")
        self._stock = {name: getattr(trainer, name) for name in REPLACED}
        self._manager: CheckpointManager | None = None
        self._resuming: Resumable | None = None
        self._handed_over: tempfile.TemporaryDirectory[str] | None = None
        self._metrics: tuple[int, dict[str, float]] = (0, {})
        trainer.add_callback(self)
        for name in REPLACED:
            setattr(trainer, name, getattr(self, f"_{name.lstrip('_')}"))

    @property
    def manager(self) -> CheckpointManager:
        """The manager of the run that trains."""
        if self._manager is None:
            raise ConfigError("MilepostCallback has a manager only while its Trainer is training")
        return self._manager

    # Replacements for the Trainer's methods.

    def _train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._close()  # of an earlier run in this process
        self._resuming, given = None, resume_from_checkpoint
        given = os.fspath(given) if isinstance(given, os.PathLike) else given
        if given is True or (isinstance(given, str) and self._is_step(given)):
            self._resuming = self._find(given)
            given = self._hand_over() if self._resuming is not None else self._own_of_trainer()
        elif isinstance(given, str) and os.path.abspath(given) == os.path.abspath(self._folder):
            raise ConfigError(
                f"resume_from_checkpoint = {given} is the folder of the steps: give one of them, such as "
                f"{self._path_of(10)}, or True for the newest"
            )
        if self._resuming is None:
            self._warn_of_steps(given)
        try:
            return self._stock["train"](given, *args, **kwargs)
        except BaseException as error:  # also Ctrl-C: another Trainer of this process may resume the run
            self._leave(error)
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._resuming is None:  # the Trainer's own at first
            self._stock["_load_from_checkpoint"](resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state once the Trainer has skipped the samples already seen."""
        if self._resuming is None:
            self._stock["_load_rng_state"](checkpoint)
            return
        saved: dict[str, Any] = {"rng": {f"rank{default_comm().rank}": None}}
        if self._resuming.world_size == default_comm().world_size:
            milepost.load(self._resuming.path, saved, allow_unexpected=["*"])
            set_rng_state(saved["rng"][f"rank{default_comm().rank}"])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self._trainer.state.global_step
        if trial is not None:
            raise ConfigError("MilepostCallback does not save the trials of a hyperparameter search")
        self._trainer.store_flos()
        if self._trainer.state.best_global_step:
            self._trainer.state.best_model_checkpoint = self._path_of(self._trainer.state.best_global_step)
        evaluated, values = self._metrics
        self.manager.save(step, metrics=values if evaluated == step else {})

    def _load_best_model(self) -> None:
        self.manager.maybe_wait_for_saving()
        comm = default_comm()
        step = on_rank_0(comm, partial(_best_step, self._folder, self._trainer.state, self._config))
        config = replace(self._config, load_only=True, exclude_from_loading=PARTS[1:])
        log.info("loading the weights of step %d, the best by %s", step, self._config.metric)
        CheckpointManager(self._folder, config, model=self._trainer.model_wrapped, layout=self._layout()).load(
            step=step
        )

    # Events of the Trainer.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Create the manager of this run, now that everything is prepared, and load."""
        self._close()
        trainer = self._trainer
        scaler = getattr(trainer.accelerator, "scaler", None)
        self._manager = CheckpointManager(
            self._folder,
            self._config,
            model=trainer.model_wrapped,
            optimizer=unwrapped(trainer.optimizer),
            lr_scheduler=trainer.lr_scheduler,
            train_state=_TrainerState(trainer),
            states={} if scaler is None else {"scaler": scaler},
            layout=self._layout(),
            per_rank=("train_state",),
            hf=HfModel.of(trainer.model) if self._config.hf_interval or self._config.initial_load_in_hf else None,
        )
        if self._resuming is not None:
            self._manager.load(step=self._resuming.step)
            if state.best_global_step:
                state.best_model_checkpoint = self._path_of(state.best_global_step)
        elif self._config.initial_load_path:
            self._manager.load()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait until the weights may change."""
        self.manager.maybe_wait_for_staging()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the metrics for the save of this step."""
        before = self._metrics[1] if self._metrics[0] == state.global_step else {}
        numbers = {name: float(value) for name, value in (metrics or {}).items() if isinstance(value, int | float)}
        self._metrics = state.global_step, {**before, **numbers}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Return once the last save is committed."""
        self._close()

    def _find(self, given: str | bool) -> Resumable | None:
        if isinstance(given, bool):
            return step_to_resume(self._folder, self._config, default_comm())
        step = step_of(os.path.basename(os.path.normpath(given)))
        assert step is not None, "is_step has found it"
        return step_to_resume(self._folder, replace(self._config, load_step=step, restart_branch=True), default_comm())

    def _own_of_trainer(self) -> str | None:
        """The newest checkpoint that the Trainer itself has written, for a folder that has no step yet."""
        comm = default_comm()
        found: str | None = on_rank_0(comm, partial(_last_of_trainer, self._trainer.args.output_dir))
        if comm.rank == 0:
            where = f"the Trainer's own {found}" if found is not None else "a new run"
            log.info("%s holds no step to resume from: %s", self._folder, where)
        return found

    def _warn_of_steps(self, given: str | bool | None) -> None:
        """Warn that a new run starts over the steps of another, as the Trainer itself allows.

        Also for a run that resumes from the Trainer's own checkpoint ``given``.
        """
        comm = default_comm()
        newest = on_rank_0(comm, partial(_newest_step, self._folder))
        if newest is not None and comm.rank == 0:
            log.warning(
                "%s holds steps up to %d, and this %s: its steps replace those of the same number. To resume from "
                "there, call train(resume_from_checkpoint=True)",
                self._folder,
                newest,
                f"run resumes from the Trainer's own {given}" if isinstance(given, str) else "is a new run",
            )

    def _is_step(self, path: str) -> bool:
        folder, name = os.path.split(os.path.normpath(path))
        is_ours = os.path.abspath(folder) == os.path.abspath(self._folder) or folder == self._folder.rstrip("/")
        return is_ours and step_of(name) is not None

    def _hand_over(self) -> str:
        """Yield a folder with the step's Trainer state, which the Trainer reads before the model exists."""
        assert self._resuming is not None
        saved: dict[str, Any] = {"train_state": None}
        milepost.load(self._resuming.path, saved, allow_unexpected=["*"])
        state = saved["train_state"]
        rank = default_comm().rank
        state = state.get(f"rank{rank}", state.get("rank0", state))
        self._handed_over = tempfile.TemporaryDirectory(prefix="milepost-")
        with open(os.path.join(self._handed_over.name, STATE_NAME), "w", encoding="utf-8") as file:
            file.write(state["trainer_state"])
        return self._handed_over.name

    def _path_of(self, step: int) -> str:
        return f"{self._folder.rstrip('/')}/{step_name(step)}"

    def _layout(self) -> dict[str, int]:
        return {"dp": self._trainer.args.world_size}

    def _close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def _leave(self, error: BaseException) -> None:
        """Close after an error of this rank, without waiting for the others; what was staged is still committed."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.__exit__(type(error), error, error.__traceback__)


class _TrainerState:
    """The Trainer's state in its own JSON form, and the loss not logged yet."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "trainer_state": json.dumps(dataclasses.asdict(_with_callbacks(trainer))),
            "unlogged_loss": float(trainer._tr_loss),
            "last_logged_step": trainer._globalstep_last_logged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        trainer = self._trainer
        trainer._tr_loss.fill_(state["unlogged_loss"])
        trainer._total_loss_scalar = -state["unlogged_loss"]  # the mean at the end is over this call's steps
        trainer._globalstep_last_logged = state["last_logged_step"]

    def reshard(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """On another number of ranks, each continues from rank 0's state."""
        return states[0]


def _check_trainer(trainer: Any) -> None:
    """Raise ConfigError for anything but a Trainer that has no such callback yet."""
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"MilepostCallback(trainer): expected a transformers Trainer, found {type(trainer).__name__}")
    if any(isinstance(callback, MilepostCallback) for callback in trainer.callback_handler.callbacks):
        raise ConfigError("this Trainer has a MilepostCallback already: its constructor adds it, once")


def _with_callbacks(trainer: Trainer) -> TrainerState:
    """Return the state including that of stateful callbacks, as the Trainer would write it on rank 0."""
    callbacks = [*trainer.callback_handler.callbacks, trainer.control]
    exported = [callback for callback in callbacks if isinstance(callback, ExportableState)]
    state = replace(trainer.state, stateful_callbacks=exported)
    return replace(state, is_local_process_zero=True, is_world_process_zero=True)


def _last_of_trainer(folder: str) -> str | None:
    return get_last_checkpoint(folder) if os.path.isdir(folder) else None


def _newest_step(folder: str) -> int | None:
    storage, name = open_storage(folder)
    return max((entry.step for entry in catalog.scan(storage, name) if entry.is_usable), default=None)


def _best_step(folder: str, state: TrainerState, config: CheckpointConfig) -> int:
    """Return the kept step with the best value: of equal ones retention keeps the newest, the Trainer names the first.

    Raises:
        CheckpointNotFoundError: it no longer exists.
    """
    storage, name = open_storage(folder)
    steps = {entry.step: entry for entry in catalog.scan(storage, name) if entry.is_usable}
    if state.best_global_step in steps:
        return int(state.best_global_step)
    equal = [step for step, entry in steps.items() if entry.metrics.get(config.metric) == state.best_metric]
    if not equal:
        raise CheckpointNotFoundError(
            f"the best step, {state.best_global_step} with {config.metric} = {state.best_metric}, is not in {folder}",
            path=folder,
            available=sorted(steps),
        )
    return max(equal)


def _options_without_effect(config: CheckpointConfig) -> list[str]:
    problems = []
    if not config.enable:
        problems.append("MilepostCallback(config=...): to train without checkpoints, leave the callback out")
    if config.last_save_in_hf:
        problems.append(
            "MilepostCallback(config=...): last_save_in_hf has no effect here: call trainer.save_model() after "
            "training, or `milepost export`; hf_interval writes Hugging Face files during it"
        )
    return problems


def _config_of(trainer: Trainer, config: CheckpointConfig) -> CheckpointConfig:
    """Merge the options with the Trainer's arguments about checkpoints.

    Raises:
        ConfigError: naming each argument that could not be honoured.
    """
    args = trainer.args
    refused = {
        "deepspeed": bool(args.deepspeed),
        "save_only_model = True": args.save_only_model,
        "push_to_hub with hub_strategy = checkpoint": args.push_to_hub and "checkpoint" in str(args.hub_strategy.value),
    }
    problems = _options_without_effect(config)
    problems += [
        f"MilepostCallback does not support these TrainingArguments: {name}" for name, on in refused.items() if on
    ]
    problems += [
        f"this version of transformers has no Trainer.{name}" for name in REPLACED if not hasattr(trainer, name)
    ]
    if problems:
        raise ConfigError(problems)
    values: dict[str, Any] = {"interval": 1}  # the Trainer decides when to save
    if args.save_total_limit is not None:
        values["keep_latest_k"] = args.save_total_limit
    if args.load_best_model_at_end:
        name = args.metric_for_best_model or "loss"
        values |= {
            "keep_best_k": max(1, config.keep_best_k),
            "metric": name if name.startswith("eval_") else f"eval_{name}",
            "mode": "max" if args.greater_is_better else "min",
        }
    return replace(config, **values)
