"""Options that this run gave to its optimizers and schedules, and that a load replaced by the saved ones.

Stock PyTorch's ``load_state_dict()`` does so in silence: another learning rate, weight decay or length of a schedule
has no effect on a run that is resumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

_NOT_OPTIONS = ("self", "params", "optimizer", "last_epoch", "verbose")
_CYCLED = ("momentum", "betas")
"""Options that a schedule sets, if it keeps bounds for them in the group."""


def given_options(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> dict[str, Any]:
    """Return the values of constructors' arguments that the objects keep, by the patterns that exclude them.

    Of a learning rate that a schedule sets, only the first value is returned.
    """
    found: dict[str, Any] = {}
    scheduled = {id(getattr(scheduler, "optimizer", None)) for scheduler in schedulers}
    for optimizer in optimizers if all(isinstance(one, Optimizer) for one in optimizers) else ():
        for option, values in _of_groups(optimizer, is_scheduled=id(optimizer) in scheduled).items():
            found.setdefault(f"optimizer.param_groups.*.{option}", []).append(values)
    for number, scheduler in enumerate(schedulers):
        path = "lr_scheduler" if len(schedulers) == 1 else f"lr_scheduler.{number}"
        found.update(_of_schedule(path, scheduler))
    return found


def replaced_options(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options that differ, as ``pattern: saved value, not this run's``."""
    for pattern, here in before.items():
        saved = after.get(pattern, here)
        if saved != here:
            yield f"{pattern}: {_text(saved)}, not {_text(here)}"


def _of_groups(optimizer: Optimizer, *, is_scheduled: bool) -> dict[str, list[Any]]:
    names = [*_arguments(type(optimizer)), "initial_lr"]
    found: dict[str, list[Any]] = {}
    for group in optimizer.param_groups:
        own = is_scheduled or "initial_lr" in group
        set_by_schedule = {*(("lr",) if own else ()), *(_CYCLED if "max_momentum" in group else ())}
        for option in names:
            if option in group and option not in set_by_schedule and _is_plain(value := _plain(group[option])):
                found.setdefault(option, []).append(value)
    return found


def _of_schedule(path: str, scheduler: Any) -> dict[str, Any]:
    state = getattr(scheduler, "__dict__", {})
    found = {}
    for name in _arguments(type(scheduler)):
        key = name if name in state else f"_{name}"
        if key in state and _is_plain(value := _plain(state[key])):
            found[f"{path}.{key}"] = value
    inner = state.get("_schedulers")
    for number, one in enumerate(inner if isinstance(inner, list | tuple) else ()):
        found.update(_of_schedule(f"{path}._schedulers.{number}", one))
    return found


def _arguments(kind: type) -> list[str]:
    try:
        return [name for name in inspect.signature(kind).parameters if name not in _NOT_OPTIONS]
    except (TypeError, ValueError):  # a class of an extension
        return []


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and not value.is_meta else None
    if isinstance(value, Mapping):
        return tuple(sorted(value.items())) if all(type(key) is int for key in value) else None
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _text(value: Any) -> str:
    """Return a value for a message, once if all groups have the same."""
    while isinstance(value, list) and all(one == value[0] for one in value):
        value = value[0]
    return repr(value)
