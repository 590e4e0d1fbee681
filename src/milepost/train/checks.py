"""Checks of a configuration, before a process group, a model or a file exists. Torch-free and complete.

A problem is one sentence that names its options as ``section.key``; ``options.Settings.locate`` puts the file and line
or the flag in front of it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milepost.errors import ConfigError
from milepost.interop.names.model_sizes import ModelArgs, model_args
from milepost.parallelism.degrees import ALL_DEGREES, Degrees
from milepost.parallelism.fit import run_problems
from milepost.run.beside import remote_folder_problem
from milepost.storage import is_folder, open_storage
from milepost.train.config import TrainConfig
from milepost.train.corpus import BUILT_IN, SUFFIXES, find_files


def find_problems(config: TrainConfig, world_size: int | None) -> list[str]:
    """Return all reasons why ``config`` can't run on ``world_size`` ranks (None: not known yet)."""
    degrees, problems = _resolved(config, world_size)
    args, model_problems = _model_args(config)
    problems += model_problems
    problems += _value_problems(config)
    problems += _data_problems(config)
    problems += _hf_problems(config)
    if degrees is not None:
        problems += _batch_problems(config, degrees)
    if degrees is not None and args is not None:
        problems += run_problems(
            args,
            degrees,
            seq_len=config.training.seq_len,
            local_batch_size=config.training.local_batch_size,
            schedule=config.parallelism.pipeline_parallel_schedule,
            microbatch_size=config.parallelism.pipeline_parallel_microbatch_size,
        )
    return problems


def _resolved(config: TrainConfig, world_size: int | None) -> tuple[Degrees | None, list[str]]:
    if config.checkpoint.create_seed_checkpoint:
        return None, list(_seed_problems(config, world_size))
    if world_size is None:
        return None, []
    try:
        return Degrees.resolve(config.parallelism.degrees(), world_size), []
    except ConfigError as error:
        return None, list(error.problems)


def _seed_problems(config: TrainConfig, world_size: int | None) -> Iterator[str]:
    above = [name for name in ALL_DEGREES if getattr(config.parallelism, name) > 1]
    num_ranks = world_size or 1
    if above or num_ranks > 1:
        reasons = [f"parallelism.{name} is {getattr(config.parallelism, name)}" for name in above]
        reasons += [f"there are {num_ranks} ranks (start it with NGPU=1)"] if num_ranks > 1 else []
        yield f"checkpoint.create_seed_checkpoint initialises on one process, but {' and '.join(reasons)}"


def _model_args(config: TrainConfig) -> tuple[ModelArgs | None, list[str]]:
    try:
        return model_args(config.model.name, config.model.flavor), []
    except ConfigError as error:
        return None, list(error.problems)


_AT_LEAST: dict[str, float] = {
    "training.local_batch_size": 1,
    "training.seq_len": 1,
    "training.steps": 1,
    "training.max_norm": 0,
    "training.seed": 0,
    "parallelism.pipeline_parallel_microbatch_size": 1,
    "optimizer.lr": 0,
    "optimizer.eps": 0,
    "optimizer.weight_decay": 0,
    "lr_scheduler.warmup_steps": 0,
    "metrics.log_freq": 1,
}

RECORDED = ("loss",)
"""The metrics that the trainer records with each step."""

_FROM_0_TO_1 = ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor")

_FROM_0_BELOW_1 = ("optimizer.beta1", "optimizer.beta2")


def _value_problems(config: TrainConfig) -> Iterator[str]:
    for option, least in _AT_LEAST.items():
        value = _value(config, option)
        if not least <= value < float("inf"):
            yield f"{option} must be at least {least}, not {value}"
    for option in _FROM_0_TO_1:
        value = _value(config, option)
        if value is not None and not 0 <= value <= 1:
            yield f"{option} must be from 0 to 1, not {value}"
    for option in _FROM_0_BELOW_1:
        value = _value(config, option)
        if not 0 <= value < 1:
            yield f"{option} must be at least 0 and less than 1, not {value}"
    if config.checkpoint.metric not in ("", *RECORDED):
        yield (
            f"checkpoint.metric {config.checkpoint.metric}: the trainer records {', '.join(RECORDED)} with each step; "
            "by another metric no step would be kept as one of the best"
        )
    if config.metrics.enable_tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield "metrics.enable_tensorboard needs the package tensorboard: pip install 'milepost[train]'"
    if not config.job.dump_folder:
        yield "job.dump_folder must not be empty"
    elif "://" in config.job.dump_folder:
        yield (
            f"job.dump_folder {config.job.dump_folder} must be a local folder: tokens and TensorBoard files go there. "
            "A URL can be given to checkpoint.folder"
        )
    else:
        yield from _folder_problems(config)


def _folder_problems(config: TrainConfig) -> Iterator[str]:
    """Return the reasons why the run could not write to its folder, as far as they can be known in advance."""
    saves = config.checkpoint.enable and not config.checkpoint.load_only
    folders = {"job.dump_folder": config.job.dump_folder, "checkpoint.folder": config.checkpoint_folder()}
    if config.checkpoint.remote_folder:
        folders["checkpoint.remote_folder"] = config.checkpoint_options().remote_folder
    problems = []
    if config.checkpoint.remote_folder:
        problem = remote_folder_problem(folders["checkpoint.folder"], folders["checkpoint.remote_folder"])
        problems += [problem] if problem else []
    for option, folder in folders.items():
        if "://" in folder:
            problems += _store_problems(option, folder)
        elif problem := _cannot_write(folder, saves=saves):
            problems.append(f"{option} {folder} {problem}")
    yield from problems[:1]  # the second problem follows from the first


def _store_problems(option: str, url: str) -> list[str]:
    try:
        open_storage(url)
    except ConfigError as error:
        return [f"{option} {problem}" for problem in error.problems]
    return []


def _cannot_write(folder: str, *, saves: bool) -> str | None:
    there = Path(folder).absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"can't be a folder: {there} is a file"
    if saves and not os.access(there, os.W_OK | os.X_OK):
        return f"can't be written: {there} is read-only or belongs to another user"
    return None


def _data_problems(config: TrainConfig) -> Iterator[str]:
    if config.training.dataset_path:
        path = Path(config.training.dataset_path)
        if not os.path.exists(path):  # os.path's, unlike Path's, raises no error, even for a name that is too long
            yield f"training.dataset_path {path}: there is no such file or folder"
        elif not find_files(path):
            kind = "this folder holds no" if path.is_dir() else "this is not a"
            yield f"training.dataset_path {path}: {kind} {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
    elif config.training.dataset not in BUILT_IN:
        yield (
            f"training.dataset: there is no data set '{config.training.dataset}'; built in: {', '.join(BUILT_IN)}; "
            "for your own files set training.dataset_path"
        )
    yield from _assets_problems(config.model.hf_assets_path)


def _assets_problems(assets: str) -> Iterator[str]:
    """Check the folder, a path or a URL. A store that does not answer is reported when it is read."""
    try:
        if assets and not is_folder(assets):
            yield f"model.hf_assets_path {assets}: there is no such folder"
    except ConfigError as error:
        yield from (f"model.hf_assets_path {assets}: {problem}" for problem in error.problems)


def _hf_problems(config: TrainConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.initial_load_in_hf and not (checkpoint.initial_load_path or config.model.hf_assets_path):
        yield (
            "checkpoint.initial_load_in_hf needs the folder with the weights: checkpoint.initial_load_path or "
            "model.hf_assets_path"
        )


def _batch_problems(config: TrainConfig, degrees: Degrees) -> Iterator[str]:
    training = config.training
    at_once = training.local_batch_size * degrees.data_parallel_degree
    if training.global_batch_size != -1 and (training.global_batch_size < 1 or training.global_batch_size % at_once):
        yield (
            f"training.global_batch_size must be -1 or a multiple of {at_once} (training.local_batch_size "
            f"{training.local_batch_size} x {degrees.data_parallel_degree} data-parallel ranks), "
            f"not {training.global_batch_size}"
        )


def _value(config: TrainConfig, option: str) -> Any:
    section, key = option.split(".")
    return getattr(getattr(config, section), key)
