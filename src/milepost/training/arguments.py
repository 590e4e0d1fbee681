"""Checks of the arguments of ``CheckpointManager``: all problems are reported at once, when it is created."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from typing import Any

import torch
from torch import nn

from milepost.collective.comm import Comm, by_ranks, failure_on, raise_together
from milepost.collective.meeting import meeting
from milepost.config import PER_RANK_PARTS, CheckpointConfig
from milepost.errors import ConfigError, listed
from milepost.saving.arguments import checked_layout
from milepost.tensors.state import LAZY


def check_arguments(
    *,
    folder: Any,
    config: Any,
    model: Any,
    optimizer: Any,
    lr_scheduler: Any,
    parts: Mapping[str, Any],
    layout: Any,
    states: Any = None,
    on_commit: Any = None,
    hf: Any = None,
) -> None:
    """Refuse arguments that can't be saved. ``parts`` are the loader and the train state, by name.

    Raises:
        ConfigError: with every problem at once.
    """
    problems = []
    if not isinstance(folder, str | PathLike):
        swapped = "; the folder comes first" if isinstance(folder, nn.Module) else ""
        problems.append(f"folder: expected a path, found a {_kind(folder)}{swapped}")
    if config is not None and not isinstance(config, CheckpointConfig):
        hint = ": write CheckpointConfig(**config)" if isinstance(config, Mapping) else ""
        problems.append(f"config: expected a CheckpointConfig, found a {_kind(config)}{hint}")
    problems += _model_problems(model)
    problems += _optimizer_problems(optimizer)
    for scheduler in _each(lr_scheduler):
        problems += _stateful_problems("lr_scheduler", scheduler)
    for name, part in parts.items():
        problems += _stateful_problems(name, part) if part is not None else ()
    try:
        checked_layout(layout)
    except ConfigError as error:
        problems.append(error.message)
    if states is not None and not isinstance(states, Mapping):
        problems.append(f'states: expected objects by name, such as {{"ema": ema}}, found a {_kind(states)}')
    if on_commit is not None and not callable(on_commit):
        hint = "; a command line goes into config.on_commit" if isinstance(on_commit, str) else ""
        problems.append(f"on_commit: expected a function, found a {_kind(on_commit)}{hint}")
    if hf is not None and not hasattr(hf, "form_of"):
        problems.append(f"hf: expected a milepost.HfModel, found a {_kind(hf)}")
    if problems:
        raise ConfigError([f"CheckpointManager: {problem}" for problem in problems])


def check_arguments_of_all_ranks(comm: Comm, **given: Any) -> None:
    """Check arguments on every rank, see :func:`check_arguments`; also refuse different folders. Collective.

    Raises:
        ConfigError: on every rank.
    """
    failure = None
    try:
        check_arguments(**given)
    except ConfigError as error:
        failure = failure_on(comm.rank, error)
    with meeting(comm, f"making a CheckpointManager for {str(given['folder'])[:200]}"):
        fit = (str(given["folder"]), given["config"] or CheckpointConfig()) if failure is None else None
        brought = comm.gather(fit)
    found = [one for one in brought or () if one is not None]
    if brought is not None and len(found) == len(brought):
        failure = _unlike([folder for folder, _ in found], [config for _, config in found])
    raise_together(comm, failure)


_OF_A_HOST = ("folder", "num_io_threads", "page_cache")
"""Options that may differ between ranks."""


def _unlike(folders: Sequence[str], configs: Sequence[CheckpointConfig]) -> ConfigError | None:
    """The error for ranks that were given different folders or options; None if they are the same."""
    problems = []
    if len(set(folders)) > 1 and not configs[0].folder_per_node:  # else each node may name its own
        problems.append(f"CheckpointManager: every rank must be given the same folder, found{_lines(folders)}")
    for option in (field.name for field in fields(CheckpointConfig) if field.name not in _OF_A_HOST):
        found = [repr(getattr(config, option)) for config in configs]
        if len(set(found)) > 1:
            problems.append(f"checkpoint.{option}: every rank must be given the same, found{_lines(found)}")
    return ConfigError(problems) if problems else None


def _lines(by_rank: Sequence[str]) -> str:
    return "".join(f"\n  {shown}" for shown in listed(by_ranks(by_rank)))


def checked_per_rank(names: Collection[str]) -> tuple[str, ...]:
    """Return the parts that may belong to each rank.

    Raises:
        ConfigError: ``names`` holds anything else.
    """
    if isinstance(names, str) or not isinstance(names, Collection) or not set(names) <= set(PER_RANK_PARTS):
        raise ConfigError(
            f"CheckpointManager(per_rank={names!r}): expected a collection of {', '.join(PER_RANK_PARTS)}; the model "
            "and the optimizer are shared by all ranks, and random generators are always saved per rank"
        )
    return tuple(names)


def check_format_given(config: CheckpointConfig, weights_format: object) -> None:
    """Raise ConfigError if an option needs weights in Hugging Face's format, and no model was given for it."""
    if weights_format is None and (config.initial_load_in_hf or config.last_save_in_hf or config.hf_interval):
        raise ConfigError(
            "initial_load_in_hf, last_save_in_hf and hf_interval need the model: give CheckpointManager `hf`"
        )


def _model_problems(model: Any) -> Iterator[str]:
    if isinstance(model, Mapping):
        if model and all(isinstance(part, nn.Module) for part in model.values()):
            yield "model: expected a module or a list of modules, found a dict: give nn.ModuleDict(models)"
        else:
            yield "model: expected a module, found a dict: give the module itself, not its state_dict()"
        return
    if model is None:
        yield "model: expected a module or a list of modules: give model=..."
        return
    parts = list(model) if isinstance(model, Sequence) and not isinstance(model, str) else [model]
    if not parts:
        yield "model: expected a module or a list of modules, found none"
    for part in parts:
        if not isinstance(part, nn.Module):
            hint = ": give an instance, not the class" if isinstance(part, type) else ""
            yield f"model: expected a module or a list of modules, found a {_kind(part)}{hint}"
            continue
        lazy = [name for name, tensor in _tensors(part) if isinstance(tensor, LAZY)]
        if lazy:
            yield (
                f"model: {', '.join(listed(lazy, 3))} of lazy modules have no shape yet: run a batch through the model "
                f"before creating the manager"
            )


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


_OPTIMIZER = ("state_dict", "load_state_dict", "param_groups")


def _optimizer_problems(optimizer: Any) -> Iterator[str]:
    if isinstance(optimizer, Mapping):
        yield "optimizer: expected an optimizer or a list of them, found a dict: give list(optimizers.values())"
        return
    given = _each(optimizer)
    if len({*map(id, given)}) < len(given):
        yield "optimizer: one optimizer is given twice"
    for item in given:
        if isinstance(item, type) or not all(hasattr(item, name) for name in _OPTIMIZER):
            hint = ": give an instance, not the class" if isinstance(item, type) else ""
            yield f"optimizer: expected an optimizer or a list of them, found a {_kind(item)}{hint}"


def _stateful_problems(name: str, part: Any) -> Iterator[str]:
    if not isinstance(part, type) and hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
        return
    hint = ""
    if isinstance(part, type):
        hint = ": give an instance, not the class"
    elif isinstance(part, torch.utils.data.DataLoader):
        hint = (
            ", whose position can't be saved: give torchdata's StatefulDataLoader, or a DataLoader's "
            "milepost.data.ResumableSampler"
        )
    elif isinstance(part, Mapping | int | float):
        hint = ": give an object with these two methods, whose state_dict() returns it"
    yield f"{name}: expected an object with state_dict() and load_state_dict(), found a {_kind(part)}{hint}"


def _each(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _kind(value: Any) -> str:
    return f"class {value.__name__}" if isinstance(value, type) else type(value).__name__
