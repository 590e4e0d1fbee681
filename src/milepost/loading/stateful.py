"""Load anything with ``load_state_dict()``: it gets all of its saved state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from milepost.errors import MilepostError, StateMismatchError
from milepost.loading.parts import want_node, want_parts
from milepost.loading.target import Target, fresh_like, is_place_for, item
from milepost.tensors.layout import torch_dtype
from milepost.tensors.parts import TensorParts
from milepost.tensors.tree import Node, rebuild, refs


class StatefulOwner:
    """Anything with ``load_state_dict()``, which gets everything that was saved below ``path``, as it was saved.

    ``own`` is the object's present ``state_dict()``, if it may be called. A tensor in it of the saved one's shape
    determines device and sharding of the loaded one; with ``in_place`` it is filled itself. Without one, ``like_of``
    returns a model for the key.
    """

    def __init__(
        self,
        stateful: Any,
        path: Sequence[Any],
        *,
        own: Any = None,
        in_place: bool = False,
        like_of: Callable[[str], torch.Tensor | None] = lambda key: None,
    ):
        self._stateful = stateful
        self._path = path
        self._own = own
        self._in_place = in_place
        self._like_of = like_of
        self._node: Node = None
        self._excludes = False
        self._is_excluded: Callable[[str], bool] = lambda key: False

    def prepare(self, target: Target) -> None:
        self._node = target.at(self._path)
        self._is_excluded = target.is_excluded
        start = ".".join(map(str, self._path)) + "."
        self._excludes = any(key.startswith(start) for key in target.excluded_keys)
        if self._node is None:
            target.want_missing([".".join(map(str, self._path))])
        else:
            self._want(target, self._node, self._own)

    def _want(self, target: Target, node: Node, own: Any) -> None:
        if isinstance(node, TensorParts):
            like = own if isinstance(own, torch.Tensor) else self._like_of(node.key)
            want_parts(target, node, live=own if self._in_place else None, like=like)
        elif isinstance(node, Mapping):
            for name in node:
                self._want(target, node[name], item(own, name))
        elif isinstance(node, list | tuple):
            for index, value in enumerate(node):
                self._want(target, value, item(own, index))
        else:
            for key in refs(node):
                self._want_value(target, node, key, own)

    def _want_value(self, target: Target, node: Node, key: str, own: Any) -> None:
        entry = target.entry(key)
        if entry is None:
            want_node(target, node)
        elif self._in_place and is_place_for(own, entry):
            target.want(key, own, live=True)
        else:
            likely = (own, self._like_of(key))
            like = next((tensor for tensor in likely if is_place_for(tensor, entry)), None)
            if like is None:
                want_node(target, node)
            else:
                target.want(key, fresh_like(like, dtype=torch_dtype(entry.dtype)), live=False)

    def check(self, values: Mapping[str, Any]) -> None:
        """Let the object refuse its state, if it has a method for that: nothing is changed yet."""
        if self._node is not None and has_check(self._stateful):
            check_state(self._stateful, self._state(self._node, values), self._path)

    def restore(self, values: Mapping[str, Any]) -> None:
        if self._node is not None:
            self._stateful.load_state_dict(self._state(self._node, values))

    def _state(self, node: Node, values: Mapping[str, Any]) -> Any:
        state = rebuild(node, values)
        if self._excludes:
            _fill_excluded(state, self._stateful.state_dict(), self._path, self._is_excluded)
        return state


def has_check(stateful: Any) -> bool:
    """Return whether an object wants to see its state before anything is loaded."""
    return callable(getattr(stateful, "check_state_dict", None))


def check_state(stateful: Any, state: Any, path: Sequence[Any]) -> None:
    """Call the object's ``check_state_dict(state)``.

    Raises:
        MilepostError: as it was raised; a StateMismatchError for an error of any other kind.
    """
    try:
        stateful.check_state_dict(state)
    except MilepostError:
        raise
    except Exception as error:
        part = ".".join(map(str, path))
        raise StateMismatchError(
            f"{part}: {type(stateful).__name__}.check_state_dict() raised {type(error).__name__}: {error}. Nothing was "
            f"changed. To leave the part as initialized, set checkpoint.exclude_from_loading = {path[0]}",
            mismatched=[part],
        ) from error


def _fill_excluded(state: Any, own: Any, path: Sequence[Any], is_excluded: Callable[[str], bool]) -> None:
    """Fill in the object's own values for excluded keys, so that the state is complete."""
    if not isinstance(state, dict) or not isinstance(own, Mapping):
        return
    for name, value in own.items():
        here = (*path, name)
        if name not in state:
            if is_excluded(".".join(map(str, here))):
                state[name] = value
        else:
            _fill_excluded(state[name], value, here, is_excluded)
