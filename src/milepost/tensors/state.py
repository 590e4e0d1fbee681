"""Between Python objects and leaves: a nested state dict is flattened to ``{key: leaf}`` and filled again.

Keys are those of stock DCP (path elements joined by dots; mappings are always entered, lists only when they hold
tensors or mappings), so that it reads what we write and we read what it writes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.stateful import Stateful

from milepost.errors import FormatError, SaveError
from milepost.format import record
from milepost.tensors.layout import TensorLeaf, tensor_leaf
from milepost.tensors.plan import LocalLayout

Path = tuple[str | int, ...]

PER_RANK = "per_rank"
"""Under this name the manifest's ``extra`` lists the top-level names below which each rank's state stands, as
``rank<N>``."""
EMPTY_MAPPINGS = "empty_mappings"
"""Under this name the manifest's ``extra`` lists the paths of mappings without items, which have no keys."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where a value stood: ``container[index]`` of the caller's own nested dict."""

    container: Any
    index: Any

    def fill(self, value: Any) -> None:
        self.container[self.index] = value


@dataclass(frozen=True, slots=True, eq=False)
class FlatState:
    """A state dict as ``{key: leaf}``. Tensors share memory with the caller's."""

    tensors: dict[str, TensorLeaf]
    objects: dict[str, Any]
    paths: dict[str, Path]
    """Where each key stood in the nested dict, as stock DCP's ``planner_data`` has it."""
    slots: dict[str, Slot]
    empty: list[Path] = field(default_factory=list)
    """Where mappings without items stood. A key for them would keep stock DCP from finding the others."""

    def layout(self) -> LocalLayout:
        return LocalLayout(tuple(leaf.spec for leaf in self.tensors.values()), tuple(self.objects))


def unwrap_stateful(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each top-level value that has a ``state_dict()`` by what it returns, as stock DCP does."""
    return {key: value.state_dict() if is_stateful(value) else value for key, value in state_dict.items()}


def is_stateful(value: Any) -> TypeGuard[Stateful]:
    """Whether a value hands out its state itself. Tensors and mappings go first: asking a protocol is slow."""
    return not isinstance(value, (torch.Tensor, Mapping)) and isinstance(value, Stateful)


def flatten(state_dict: Mapping[str, Any]) -> FlatState:
    """Flatten nested mappings and lists. Empty mappings get no key, only a place in ``empty``.

    Raises:
        SaveError: two values would get the same key, or a tensor of a kind that can't be stored.
    """
    flat = FlatState({}, {}, {}, {})
    for path, value, slot in _walk(state_dict, ()):
        if isinstance(value, Mapping):
            flat.empty.append(path)
            continue
        key = ".".join(map(str, path))
        if key in flat.paths:
            raise SaveError(
                f"two values would be stored under the key '{key}': {flat.paths[key]} and {path}; rename one", key=key
            )
        flat.paths[key] = path
        flat.slots[key] = slot
        if isinstance(value, torch.Tensor):
            flat.tensors[key] = tensor_leaf(key, value)
        else:
            flat.objects[key] = value
    return flat


def _walk(container: Any, path: Path) -> Iterator[tuple[Path, Any, Slot]]:
    """The leaves and the empty mappings."""
    if isinstance(container, Mapping):
        items: Iterator[tuple[Any, Any]] = iter(container.items())
    else:
        items = iter(enumerate(container))
    for index, value in items:
        here: Path = (*path, index if isinstance(container, list) else str(index))
        if (isinstance(value, Mapping) and value) or (isinstance(value, list) and not is_terminal(value)):
            yield from _walk(value, here)
        else:
            yield here, value, Slot(container, index)


def is_terminal(values: list[Any]) -> bool:
    """Whether a list is stored as one value: it holds neither tensors nor mappings, at any depth."""
    for value in values:
        if isinstance(value, (torch.Tensor, Mapping)):
            return False
        if isinstance(value, list) and not is_terminal(value):
            return False
    return True


def encode_object(key: str, value: Any) -> bytes:
    """A value that is not a tensor, as a ``torch.save`` stream that loads without running code.

    Raises:
        SaveError: it would need code to load (an instance of a class of the user's, a function, ...).
    """
    try:
        return record.object_record(value)
    except TypeError:
        pass  # not one of the plain types: let torch try
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True, map_location="cpu")
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise SaveError(
            f"{key} holds a {type(value).__module__}.{type(value).__qualname__}, which can't be loaded without running "
            f"code; store plain values or tensors instead (its state_dict(), say). The cause: {error}",
            key=key,
        ) from error
    return buffer.getvalue()


def decode_object(key: str, data: bytes | bytearray | memoryview, path: str) -> Any:
    """The value in a ``torch.save`` stream. Never runs code from it.

    Raises:
        FormatError: the stream is malformed, or would run code.
    """
    try:
        return record.read_object(bytes(data))
    except FormatError:
        pass  # more than plain values: torch's restricted unpickler decides
    try:
        record.check_archive(data)  # torch would unpack compressed entries, whatever they unpack to
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise FormatError(
            f"{path}: the value of '{key}' can't be loaded safely: {error}", path=path, key=key
        ) from error
