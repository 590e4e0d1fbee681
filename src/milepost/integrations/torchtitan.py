"""torchtitan: a ``CheckpointManager`` that replaces its own, selected by its configuration.

Its options keep their names and meanings; Milepost's are added and become flags too. Steps have torchtitan's keys, so
that either resumes from the other's steps.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torchtitan.components.checkpointer.base import MODEL, ModelWrapper
from torchtitan.components.checkpointer.dcp import AsyncMode, CheckpointManager
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import filesystem

import milepost
from milepost.config import NUM_IO_THREADS, CheckpointConfig
from milepost.errors import ConfigError

OURS = ("interval_seconds", "on_save_error", "check_replicas", "num_io_threads", "page_cache", "keep_every_n_steps")
SAME = (
    "enable",
    "folder",
    "interval",
    "last_save_model_only",
    "async_mode",
    "keep_latest_k",
    "load_step",
    "enable_first_step_checkpoint",
    "create_seed_checkpoint",
    "load_only",
)
"""torchtitan's options that Milepost has under the same name, with the same meaning."""


class MilepostCheckpointManager(CheckpointManager):
    """torchtitan's checkpoint manager, using Milepost to save, find, load, keep and delete steps."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """torchtitan's options, and those specific to Milepost; see ``milepost.CheckpointConfig``."""

        interval_seconds: float = 0.0
        """Also save when this many seconds have passed since the last save; 0 disables."""
        on_save_error: Literal["stop", "warn"] = "stop"
        """When a save fails: stop, or warn and train on."""
        check_replicas: int = 0
        """At every N-th save compare whole tensors that several ranks hold; 0: only a sample of them."""
        num_io_threads: int = NUM_IO_THREADS
        """Threads of each rank that copy, write and read the files of a checkpoint."""
        page_cache: Literal["auto", "keep", "drop", "direct"] = "auto"
        """Treatment of written files in the operating system's page cache."""
        keep_every_n_steps: int = 0
        """Also keep older steps that are multiples of N; 0 disables."""
        restart_branch: bool = False
        """Start from load_step again, on a new branch, although steps that descend from it have been saved."""

        def __post_init__(self) -> None:
            CheckpointManager.Config.__post_init__(self)

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[torch.nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ) -> None:
        self.enable = config.enable
        self.save_future: Any = None
        self.staging_future: Any = None
        if not self.enable:
            return
        self.folder = filesystem.join(base_folder, config.folder)
        self.async_mode = AsyncMode(config.async_mode)
        self.sd_adapter = sd_adapter
        self.states = {MODEL: ModelWrapper(model_parts)}  # for the adapter: weights in Hugging Face's format
        self.initial_load_in_hf = config.initial_load_in_hf
        self.initial_load_in_hf_quantized = config.initial_load_in_hf_quantized
        self.initial_load_path = config.initial_load_path
        self.last_save_in_hf = config.last_save_in_hf
        self.export_dtype = TORCH_DTYPE_MAP[config.export_dtype]
        if sd_adapter is None and (config.last_save_in_hf or config.initial_load_in_hf):
            raise ConfigError("last_save_in_hf and initial_load_in_hf need a model with a state dict adapter")
        self._load_step = config.load_step
        others = {name: state for name, state in states.items() if name != "train_state"}
        self._manager = milepost.CheckpointManager(
            self.folder,
            _config_of(config),
            model=model_parts,
            optimizer=optimizers,
            lr_scheduler=lr_schedulers,
            dataloader=dataloader,
            train_state=states.get("train_state"),
            states=others,
            per_rank=(),  # torchtitan's data loader keeps each rank's state under a separate name
        )

    def __del__(self) -> None:
        """Do not close here: closing is collective, and objects are collected at different times."""

    @property
    def manager(self) -> milepost.CheckpointManager:
        """Milepost's manager, for its events, signals and properties."""
        return self._manager

    @torch.no_grad()
    def _load(self, step: int = -1) -> bool:
        report = self._manager.load() if step == self._load_step else self._manager.load(step=step)
        if report is None and self.initial_load_in_hf:
            path = self.initial_load_path or self.sd_adapter.hf_assets_path
            model = self.states[MODEL].state_dict()
            self.dcp_load(model, path, from_hf=True, from_quantized=self.initial_load_in_hf_quantized)
            return True
        return report is not None

    @torch.no_grad()
    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if last_step and self.last_save_in_hf:
            return self._save_in_hf(curr_step)
        begun = self._manager.save(curr_step, last_step=last_step)
        if begun:
            self.save_future = self.staging_future = self._manager.pending
        return begun

    def _save_in_hf(self, step: int) -> bool:
        """Write the weights through torchtitan's adapter beside the steps, visible only when complete."""
        self._manager.maybe_wait_for_saving()
        final = self._create_checkpoint_id(step)
        place = f"{final}.unfinished"
        model = self.states[MODEL].state_dict()
        cast = {
            key: value.to(self.export_dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in model.items()
        }
        self.dcp_save(cast, place, AsyncMode.DISABLED, enable_garbage_collection=True, to_hf=True)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            os.rename(place, final)
        torch.distributed.barrier()
        return True

    def _maybe_wait_for_staging(self) -> None:
        self._manager.maybe_wait_for_staging()
        self.staging_future = None

    def _wait_for_saving(self) -> None:
        self.save_future = None
        self._manager.maybe_wait_for_saving()

    def _find_load_step(self, folder: str = "") -> int:
        step = self._manager.latest_step
        return -1 if step is None else step

    def _should_purge(self) -> bool:
        return False  # each commit applies `keep_latest_k`

    def _close(self) -> None:
        """Return once the last save is committed; after an error, without a collective."""
        error = sys.exc_info()
        if error[0] is not None:
            self._manager.__exit__(*error)
        else:
            self._manager.close()


def with_milepost(config: Any, **options: Any) -> Any:
    """Let a torchtitan configuration use Milepost, and return it.

    ``options`` are those of :class:`MilepostCheckpointManager.Config`, which become ``--checkpoint.*`` flags.

    Example::

        def llama3_8b_milepost() -> Trainer.Config:
            return with_milepost(llama3_8b(), num_io_threads=4)
    """
    before = config.checkpoint
    values = {field.name: getattr(before, field.name) for field in fields(before) if field.init}
    config.checkpoint = MilepostCheckpointManager.Config(**{**values, **options})
    return config


def _config_of(config: MilepostCheckpointManager.Config) -> CheckpointConfig:
    """Convert torchtitan's options to Milepost's."""
    in_hf = config.initial_load_in_hf
    values = {name: getattr(config, name) for name in (*SAME, *OURS)}
    return CheckpointConfig(
        **values,
        restart_branch=config.restart_branch,
        exclude_from_loading=tuple(config.exclude_from_loading),
        initial_load_path="" if in_hf else config.initial_load_path or "",
        initial_load_model_only=config.initial_load_model_only,
        export_dtype=config.export_dtype if config.last_save_model_only else None,
    )
