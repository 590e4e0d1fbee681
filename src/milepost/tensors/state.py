"""Flatten a nested state dict to ``{key: leaf}``, where a leaf is a tensor or another value.

Keys are those of stock DCP (path elements joined by dots; mappings are always entered, lists only when they hold
tensors or mappings), so that it reads what we write and we read what it writes. Many small values in one
container are stored as one leaf: a record for each would take more space and time than the values.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from milepost.errors import SaveError
from milepost.tensors.layout import Placed, TensorLeaf, arrived, can_be_boxes, tensor_leaf
from milepost.tensors.parts import TensorParts, comes_apart, take_apart
from milepost.tensors.plan import LocalLayout
from milepost.tensors.registry import registered

Path = tuple[str | int, ...]

PER_RANK = "per_rank"
"""The name in the manifest's ``extra`` for the parts that are stored per rank, below ``rank<N>``."""
LOOP_PARTS = ("lr_scheduler", "dataloader", "train_state", "states")
"""Parts that belong to the training loop: each rank gets back exactly what it gave, with keys in order."""
EXTRA_STATE = "_extra_state"
"""The last element of the name of a module's extra state in its state dict."""
EMPTY_MAPPINGS = "empty_mappings"
"""The name in the manifest's ``extra`` for the paths of empty mappings, which have no keys."""
LAZY = (UninitializedParameter, UninitializedBuffer)
"""Tensors of lazy modules before their first batch."""
PACKED = "milepost.packed"
"""The key of the values at the top level of a state dict, if they are stored as one."""
PACK_FROM = 4096
"""Minimum number of values in a container to be stored as one."""
PACK_NBYTES = 512
"""Maximum average size of their tensors in bytes."""
_PACK_MAX_NBYTES = 64 << 10

MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
"""Types of mappings that are restored as such; the result of ``state_dict()`` itself is restored as a dict."""
_PACKABLE = frozenset((list, *MAPPINGS))
_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_ATOMIC = frozenset(_ATOMS)
_TENSORS = frozenset((torch.Tensor, nn.Parameter))
"""Types of which a tensor is stored as it is: not lazy, not the result of a collective, not made of others."""
_PLAIN = frozenset((*_ATOMS, tuple, set, frozenset, np.ndarray, torch.Size, torch.dtype, torch.device))


class ByName(dict[str, Any]):
    """A mapping whose keys must be found by other programs, so that it is never stored as one value."""

    versions: Mapping[str, int] = MappingProxyType({})
    """Versions of the model's modules: see ``Noted``."""


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Create ordinary tensors, also for a caller in inference mode, whose tensors could not be used in training."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class Slot(NamedTuple):
    """The location of a value: ``container[index]`` of the caller's own nested dict."""

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
    """Path of each key in the nested dict, as in stock DCP's ``planner_data``."""
    slots: dict[str, Slot]
    empty: list[Path] = field(default_factory=list)
    """Paths of empty mappings. A key for them would keep stock DCP from finding the others."""
    skeleton: dict[Any, Any] = field(default_factory=dict)
    """The containers of the state dict, with their types and order, and None in place of each leaf."""

    def layout(self) -> LocalLayout:
        return LocalLayout(tuple(leaf.spec for leaf in self.tensors.values()), tuple(self.objects))


def unwrap_stateful(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each top-level value that has a ``state_dict()`` by its result, like stock DCP."""
    unwrapped = {key: value.state_dict() if is_stateful(value) else value for key, value in state_dict.items()}
    if not isinstance(state_dict, ByName):
        return unwrapped
    named = ByName(unwrapped)
    named.versions = state_dict.versions
    return named


def is_stateful(value: Any) -> TypeGuard[Stateful]:
    """Return whether a value has a ``state_dict()``. Checks tensors and mappings first: protocol checks are slow."""
    if type(value) in _PLAIN or isinstance(value, (torch.Tensor, Mapping, list, type)):
        return False
    return isinstance(value, Stateful)


def flatten(state_dict: Mapping[Any, Any], by_shard: Collection[str] = ()) -> FlatState:
    """Flatten nested mappings and lists. Empty mappings get no key but are listed in ``empty``.

    Composed tensors are decomposed, and DTensors under the keys ``by_shard`` into their shards.

    Raises:
        SaveError: two values would get the same key, or there is a tensor of a kind that can't be stored.
    """
    flat = FlatState({}, {}, {}, {})
    if PACKED in state_dict:
        raise SaveError(f"the key '{PACKED}' is Milepost's own: rename it", key=PACKED)
    try:
        packed = _Packing().packed_below(state_dict)
        if id(state_dict) in packed:
            state_dict = {PACKED: dict(state_dict)}
            packed = {id(state_dict[PACKED])}
        flat.skeleton.update(_enter(flat, state_dict, (), packed, frozenset(by_shard)))
    except RecursionError:
        raise SaveError("the state contains itself, or its mappings and lists are nested too deep") from None
    return flat


def _enter(
    flat: FlatState,
    container: Any,
    path: Path,
    packed: set[int],
    by_shard: frozenset[str],
    whole: str = "",
    prefix: str = "",
) -> Any:
    """Add a container's content, and return its skeleton. ``whole``: key of the composed tensor around it, if any.

    ``prefix`` begins the keys below it. Plain numbers, text and tensors take the short way: a state has thousands.
    """
    items: Iterable[tuple[Any, Any]]
    is_list = isinstance(container, list)
    items = enumerate(container) if is_list else container.items()
    blank: list[tuple[Any, Any]] = []
    for index, value in items:
        kind = type(value)
        here: Path = (*path, index if is_list else str(index))
        key = f"{prefix}{index!s}"
        if kind in _ATOMIC or (kind in _TENSORS and key not in by_shard):
            _add(flat, key, here, value, Slot(container, index), whole)
            blank.append((index, None))
            continue
        if kind not in _PLAIN and is_stateful(value):
            value = value.state_dict()
        if isinstance(value, LAZY):
            raise SaveError(f"{key} is of a lazy module and has no shape yet: run a batch through it first", key=key)
        value = arrived(value) if isinstance(value, torch.Tensor) else value
        if comes_apart(value) or (isinstance(value, torch.Tensor) and key in by_shard):
            value = take_apart(key, value, by_shard=key in by_shard)
        if id(value) in packed or not is_open(value):
            _add(flat, key, here, value, Slot(container, index), whole)
            blank.append((index, None))
            continue
        if isinstance(value, Mapping) and len(here) > 1 and type(value) not in (*MAPPINGS, TensorParts):
            name = f"{type(value).__module__}.{type(value).__qualname__}"
            raise SaveError(f"{key} is a {name}, a type that can't be stored: store dict(...) of it", key=key)
        if isinstance(value, list) and type(value) is not list:
            name = f"{type(value).__module__}.{type(value).__qualname__}"
            raise SaveError(f"{key} is a {name}, a type that can't be stored: store list(...) of it", key=key)
        if not value and not isinstance(value, TensorParts):
            flat.empty.append(here)
        inside = whole or key if isinstance(value, TensorParts) else ""
        blank.append((index, _enter(flat, value, here, packed, by_shard, inside, f"{key}.")))
    return alike(container, blank)


def _add(flat: FlatState, key: str, path: Path, value: Any, slot: Slot, whole: str) -> None:
    if key in flat.paths:
        one, other = (*flat.paths[key][:-1], flat.slots[key].index), (*path[:-1], slot.index)
        raise SaveError(f"two values would be stored under the key '{key}': {one} and {other}; rename one", key=key)
    flat.paths[key] = path
    flat.slots[key] = slot
    if type(value) in _ATOMIC or not (
        isinstance(value, Placed) or (isinstance(value, torch.Tensor) and has_own_record(value))
    ):
        flat.objects[key] = value
        return
    leaf = tensor_leaf(key, value.resolve_conj().resolve_neg() if is_lazy(value) else value)
    if isinstance(slot.container, TensorParts):
        parts = slot.container
        is_whole = parts.form.cuts.get(str(path[-1])) == "whole"
        leaf = replace(leaf, is_part=True, shard_of=whole if is_whole else "")
    flat.tensors[key] = leaf


def has_own_record(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is stored as a tensor, not as a value (like quantized and sparse tensors)."""
    return not (tensor.is_quantized or tensor.layout != torch.strided) or can_be_boxes(tensor)


def is_lazy(tensor: object) -> TypeGuard[torch.Tensor]:
    """Return whether a tensor is a lazily conjugated or negated view."""
    return isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor and (tensor.is_conj() or tensor.is_neg())


def is_open(value: Any) -> bool:
    """Return whether a container's items are stored separately: mappings, and lists with tensors or mappings."""
    if type(value) not in (*MAPPINGS, TensorParts) and registered(type(value)) is not None:
        return False
    return isinstance(value, Mapping) or (isinstance(value, list) and not is_terminal(value))


def is_terminal(values: list[Any]) -> bool:
    """Return whether a list is stored as one value: no tensors, mappings or objects with a state at any depth."""
    for kind in set(map(type, values)):
        if issubclass(kind, torch.Tensor | Mapping) or (hasattr(kind, "load_state_dict") and registered(kind) is None):
            return False
        if issubclass(kind, list) and not all(is_terminal(value) for value in values if type(value) is kind):
            return False
    return True


def alike(container: Any, items: Iterable[tuple[Any, Any]]) -> Any:
    """Return a container with the type and order of another one, and new values. An unknown mapping becomes a dict."""
    kind = type(container)
    if kind is list:
        return [value for _, value in items]
    if kind is OrderedDict:
        ordered = OrderedDict(items)
        if hasattr(container, "_metadata"):
            ordered._metadata = container._metadata  # type: ignore[attr-defined]
        return ordered
    if kind is TensorParts:
        return TensorParts(container.form, items, key=container.key)
    if kind is defaultdict:
        return defaultdict(container.default_factory, items)
    if kind is Counter:
        counter: Counter[Any] = Counter()
        dict.update(counter, items)
        return counter
    return dict(items)


class _Packing:
    """Finds the innermost containers with enough small values."""

    def __init__(self) -> None:
        self._packed: set[int] = set()

    def packed_below(self, state_dict: Any) -> set[int]:
        """The ids of the containers to store as one value."""
        self._count(state_dict)
        return self._packed

    def _count(self, node: Any) -> tuple[int, int, bool]:
        """The number of leaves in a container, the bytes of their tensors, and whether all are small."""
        is_dict = type(node) is dict or isinstance(node, Mapping)
        parts = node.values() if is_dict else node
        if _ATOMIC.issuperset(map(type, parts)):
            leaves = len(node) if is_dict else 1  # a list of these is one value
            nbytes, is_small = 0, True
        else:
            leaves, nbytes, is_small = self._count_parts(parts)
        is_small = is_small and type(node) in _PACKABLE and not hasattr(node, "_metadata")
        if leaves >= PACK_FROM and is_small and nbytes <= PACK_NBYTES * leaves:
            self._packed.add(id(node))
            return 1, nbytes, False
        return leaves, nbytes, is_small

    def _count_parts(self, parts: Iterable[Any]) -> tuple[int, int, bool]:
        leaves, total_nbytes, is_small = 0, 0, True
        for part in parts:
            kind = type(part)
            if kind in _ATOMIC:
                leaves += 1
            elif kind is dict and len(part) < PACK_FROM and _ATOMIC.issuperset(map(type, part.values())):
                leaves += len(part)
            elif issubclass(kind, torch.Tensor):
                is_plain = kind in (torch.Tensor, nn.Parameter) and part.layout == torch.strided
                nbytes = part.nbytes if is_plain else _PACK_MAX_NBYTES + 1
                leaves, total_nbytes = leaves + 1, total_nbytes + nbytes
                is_small = is_small and nbytes <= _PACK_MAX_NBYTES
            elif kind is list or issubclass(kind, Mapping):
                below, nbytes, are_small = self._count(part)
                leaves, total_nbytes = leaves + below, total_nbytes + nbytes
                is_small = is_small and are_small
            else:
                leaves += 1
        return leaves, total_nbytes, is_small
