"""Checks of the arguments of savers, with messages that explain common mistakes."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from milepost.errors import ConfigError

MAX_STEP = 10**18 - 1
"""Largest number that fits the name of a step's folder."""


def checked_step(step: Any) -> int:
    """Return a step number given in any integral type, including numpy's and 0-d tensors.

    Raises:
        ConfigError: it is not an integer, or out of range.
    """
    is_flag = isinstance(step, bool) or getattr(step, "dtype", None) in (torch.bool, bool)
    try:
        number = None if is_flag or getattr(step, "shape", None) else operator.index(step)
    except (TypeError, RuntimeError):  # torch's error for a tensor of floats
        number = None
    if number is None:
        raise ConfigError(f"step {step!r:.80}: expected a whole number, found a {type(step).__name__}")
    if not 0 <= number <= MAX_STEP:
        raise ConfigError(f"step {number!r:.80}: expected a number from 0 to {MAX_STEP}")
    return number


def checked_layout(layout: Any) -> dict[str, int]:
    """Degrees of parallelism by name.

    Raises:
        ConfigError: something else.
    """
    expected = 'layout: expected degrees by name, such as {"fsdp": 8}, found'
    if layout is not None and not isinstance(layout, Mapping):
        raise ConfigError(f"{expected} a {type(layout).__name__}")
    found = dict(layout or {})
    for name, degree in found.items():
        is_number = isinstance(degree, numbers.Integral) and not isinstance(degree, bool)
        if not isinstance(name, str) or not is_number or degree < 0:
            raise ConfigError(f"{expected} {name!r:.60}: {degree!r:.60}")
    return {name: int(degree) for name, degree in found.items()}


def check_given(function: str, path: object, state_dict: object) -> None:
    """Explain common mistakes in calls of ``save`` and ``async_save``.

    Raises:
        ConfigError: ``path`` is not a path, or ``state_dict`` is not a mapping.
    """
    if not isinstance(path, str | PathLike):
        is_swapped = isinstance(state_dict, str | PathLike)
        hint = f"; the path comes first: {function}(path, state_dict)" if is_swapped else ""
        raise ConfigError(
            f"milepost.{function}: expected the path of a checkpoint, found a {type(path).__name__}{hint}"
        )
    if isinstance(state_dict, Mapping):
        return
    kind = type(state_dict).__name__
    hint = ""
    if hasattr(state_dict, "state_dict"):
        hint = f': write {function}(path, {{"model": model}})'
    raise ConfigError(
        f"milepost.{function}(path, state_dict): expected a dict of the state to save, found a {kind}{hint}"
    )
