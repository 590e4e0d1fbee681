"""Checks of a value before it is written, and the error for one that can't be stored."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from milepost.errors import SaveError
from milepost.tensors.registry import is_named_tuple
from milepost.tensors.value_types import ATOMS, CONTAINERS, MAX_DEPTH


@dataclasses.dataclass(slots=True)
class Traits:
    """The traits that decide how a value is written."""

    num_parts: int = 0
    num_bytes: int = 0
    """Total size of all ``bytes`` in it."""
    has_sets: bool = False


def traits_of(key: str, value: Any) -> Traits:
    """Examine a value. Raises SaveError if it contains itself or is nested too deep."""
    found = Traits()
    open_ids: set[int] = set()

    def visit(node: Any, depth: int) -> None:
        if type(node) is bytes or type(node) is bytearray:
            found.num_bytes += len(node)
        if not isinstance(node, CONTAINERS):
            return
        if depth > MAX_DEPTH or id(node) in open_ids:
            raise SaveError(f"{key} contains itself, or is nested deeper than {MAX_DEPTH} levels", key=key)
        found.num_parts += len(node)
        found.has_sets = found.has_sets or isinstance(node, set | frozenset)
        parts = node.values() if isinstance(node, dict) else node
        if ATOMS.issuperset(map(type, parts)):
            return
        open_ids.add(id(node))
        for part in parts:
            kind = type(part)
            if kind in ATOMS:
                continue
            inner = part.values() if kind is dict else part if kind is tuple or kind is list else None
            if inner is not None and depth < MAX_DEPTH and ATOMS.issuperset(map(type, inner)):
                found.num_parts += len(part)  # most parts of a large value: without a call for each
            else:
                visit(part, depth + 1)
        open_ids.remove(id(node))

    visit(value, 0)
    return found


class Refused(Exception):
    """A value without a stored form."""

    def __init__(self, value: Any, reason: str, *, what: str = ""):
        super().__init__(reason)
        self.value = value
        self.reason = reason
        self.what = what
        """Description and alternative, if not determined by its class."""


def refusal(key: str, value: Any, refused: Refused) -> SaveError:
    """Return the error that names the part of a value that can't be stored, and an alternative."""
    kind = type(refused.value)
    where = f"{key}{place(value, lambda part: part is refused.value) or ''}"
    if refused.what:
        return SaveError(f"{where} is {refused.what}", key=key)
    what = f"{where} holds a {kind.__module__}.{kind.__qualname__}, which can't be loaded without running code"
    return SaveError(f"{what}: {refused.reason or _advice(refused.value)}", key=key)


def _advice(value: Any) -> str:
    if isinstance(value, enum.Enum) or dataclasses.is_dataclass(type(value)) or is_named_tuple(type(value)):
        return f"call milepost.register_value({type(value).__qualname__}) when the program starts to make it loadable"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return "store its name, and look it up when it is loaded"
    if hasattr(value, "state_dict"):
        return "store its state_dict()"
    for method in ("get_state", "getstate"):
        if hasattr(value, method):
            return f"store what its {method}() returns"
    for kind in (Mapping, list, tuple, set, frozenset, str, bytes, int, float):
        if isinstance(value, kind):
            return f"store {'dict' if kind is Mapping else kind.__name__}(...) of it"
    if isinstance(value, np.ndarray):
        return "store numpy.asarray(...) of it"
    return "store plain values or tensors, or milepost.register_value() its class with encode and decode"


def place(root: Any, is_it: Callable[[Any], bool]) -> str | None:
    """The path in a nested value of the first part that satisfies a predicate, written as in Python."""
    if is_it(root):
        return ""
    if not isinstance(root, CONTAINERS):
        return None
    for index, part in root.items() if isinstance(root, dict) else enumerate(root):
        if is_it(index):
            return f", as a key: {index!r:.60}"
        found = place(part, is_it)
        if found is not None:
            return f"[{index!r:.60}]{found}"
    return None
