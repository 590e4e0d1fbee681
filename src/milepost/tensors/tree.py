"""The nesting of a checkpoint's values: the containers that were saved, with a :class:`Ref` for each value.

A tree has the structure of ``state_dict()`` without its values, so that an object gets back everything saved for it,
whatever it holds at the time of the load.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from milepost.errors import FormatError, SaveError
from milepost.format.manifest import Manifest
from milepost.tensors.aliases import Aliases, Geometry
from milepost.tensors.parts import TensorParts
from milepost.tensors.sharing import own_to_each
from milepost.tensors.state import EMPTY_MAPPINGS, PACKED, Path, alike, is_terminal
from milepost.tensors.value_reader import decode_object
from milepost.tensors.value_writer import encode_object

MAX_STRUCTURE_NBYTES = 256 << 20
MAX_LIST = 1 << 20
"""Maximum length of a list whose elements are stored separately."""

Node = Any
"""A container of nodes, or a :class:`Ref`."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to the value stored under ``key``."""

    key: str


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A value that is read already, since its container is stored as one value."""

    value: Any


ByRank = Mapping[str, Sequence[tuple[Sequence[int], bytes]]]
"""For a part whose containers differ between ranks: the ranks of each kind, and their skeleton."""
_BY_RANK = "milepost.by_rank"
"""The name of these parts in the record of the structure."""
ALL_MODULES = "*"
_NOTED = "milepost.noted"
"""The name of a :class:`Relations` in the record of the structure."""

Read = Callable[[str], Any]
"""Reads a value of a checkpoint, other than a tensor, by key."""


@dataclass(frozen=True, slots=True)
class Relations:
    """Properties of a state's tensors beyond their values: shared memory, and placements on ranks."""

    aliases: Mapping[str, Aliases] = field(default_factory=dict)
    """Groups of tensors that overlap in memory, by the first key of each."""
    versions: Mapping[str, int] = field(default_factory=dict)
    """Versions of the model's modules by FQN (``nn.Module._version``), and of all others under ``ALL_MODULES``."""
    sharded: Mapping[str, str] = field(default_factory=dict)
    """Placements of DTensors, by key; see :func:`milepost.tensors.placements.describe_placements`."""
    parameters: Mapping[str, bool] = field(default_factory=dict)
    """Keys of parameters, and whether they require a gradient."""

    def skeleton(self) -> dict[str, Any]:
        """The part of a skeleton that records it. Its leaves are text, so that those of ranks can be merged."""
        shared = {
            name: {key: "" if place is None else json.dumps(place) for key, place in group.items()}
            for name, group in self.aliases.items()
        }
        versions = {name: str(version) for name, version in self.versions.items()}
        parameters = {key: str(int(needs_grad)) for key, needs_grad in self.parameters.items()}
        parts = {"shared": shared, "sharded": dict(self.sharded), "versions": versions, "parameters": parameters}
        return {_NOTED: {name: part for name, part in parts.items() if part}} if any(parts.values()) else {}

    @classmethod
    def of(cls, found: Any) -> Relations:
        """Parse the record of a checkpoint. Raises FormatError: it is malformed."""
        try:
            shared = {
                str(name): {str(key): _geometry(place) for key, place in group.items()}
                for name, group in found.get("shared", {}).items()
            }
            versions = {str(name): int(version) for name, version in found.get("versions", {}).items()}
            sharded = {str(key): str(text) for key, text in found.get("sharded", {}).items()}
            parameters = {str(key): text == "1" for key, text in found.get("parameters", {}).items()}
            return cls(shared, versions, sharded, parameters)
        except (AttributeError, TypeError, ValueError) as error:
            raise FormatError(f"the record of shared memory, placements and versions is malformed: {error}") from error


def _geometry(text: str) -> Geometry | None:
    if not text:
        return None
    start, strides = json.loads(text)
    return int(start), tuple(map(int, strides))


class Tree:
    """The nested containers of a checkpoint, with a :class:`Ref` in place of each value."""

    def __init__(self, root: dict[Any, Node], read: Read | None = None):
        self.root = root
        self._read = read
        self.relations = Relations()
        self.is_packed = False
        """True if it is stored as one value."""

    @classmethod
    def of(cls, manifest: Manifest, read: Read | None = None) -> Tree:
        """Return the tree of a checkpoint, as recorded or from the paths of its keys.

        ``read`` is called for a container that is stored as one value when its content is needed.

        Raises:
            FormatError: the record is malformed, or the paths contradict each other.
        """
        stored = {*manifest.tensors, *manifest.objects}
        skeleton = _recorded(manifest) if manifest.structure else {}
        skeleton.pop(_BY_RANK, None)
        relations = Relations.of(skeleton.pop(_NOTED, {}))
        root = _with_refs(skeleton, (), stored)
        for path in _empty_mappings(manifest) if not root else ():
            _put(root, path, {})
        for key in (*manifest.tensors, *manifest.objects):
            if key in stored:
                _put(root, _path_of(key, manifest), Ref(key))
        tree = cls(root, read)
        tree.relations = relations
        if PACKED in root and read is not None:
            root.update(tree._held(root.pop(PACKED)))
            tree.is_packed = True
        return tree

    def narrow(self, manifest: Manifest, rank: int) -> None:
        """Reduce parts whose containers differ between ranks to those of ``rank``, in its order."""
        stored = {*manifest.tensors, *manifest.objects}
        for name, part in _parts_of(manifest, rank).items():
            self.root.pop(name, None)
            if part:
                self.root.update(_with_refs({name: _load(part)}, (), {*stored}))

    def at(self, path: Sequence[Any]) -> Node | None:
        """The node at ``path``, with elements compared as text; None if there is none."""
        found = self._descend(path)
        # External checkpoints may lack the paths of keys: then every dot in a key separates names.
        return found if found is not None else self._descend(".".join(map(str, path)).split("."))

    def _descend(self, path: Sequence[Any]) -> Node | None:
        node: Node = self.root
        for element in path:
            if isinstance(node, Ref):
                node = self._held(node)
            node = child(node, element)
            if node is None:
                return None
        return node

    def read(self, key: str) -> Any:
        """The value of a key that is not a tensor; None if it can't be read."""
        return self._read(key) if self._read is not None else None

    def _held(self, ref: Ref) -> Node:
        """The nodes of a container that is stored as one value; none for any other value."""
        value = self._read(ref.key) if self._read is not None else None
        return as_held(value) if isinstance(value, Mapping | list) else {}


def as_held(value: Any) -> Node:
    """The nodes of a container that is read already."""
    if isinstance(value, Mapping):
        return alike(value, [(key, as_held(part)) for key, part in value.items()])
    if isinstance(value, list) and not is_terminal(value):
        return [as_held(part) for part in value]
    return Held(value)


# ---- the record ----


def dump_parts(skeleton: Mapping[Any, Any]) -> dict[str, bytes]:
    """Encode a rank's skeleton part by part, so that common parts are the same bytes on all ranks.

    The empty name has the order of the parts.
    """
    parts = {str(name): encode_object(str(name), part) for name, part in skeleton.items() if part is not None}
    return {"": encode_object("", list(skeleton)), **parts}


def merge_parts(brought: Sequence[Mapping[str, bytes]], by_rank: ByRank) -> tuple[bytes, frozenset[str]]:
    """Merge the skeletons of all ranks into the ``structure`` of a manifest, including those that differ.

    Also return the keys of tensors that ranks have decomposed differently, or that only some have decomposed.

    Raises:
        SaveError: ranks have lists of different lengths under one key, or a container and another value.
    """
    merged: dict[Any, Any] = {}
    unlike: set[str] = set()
    on_their_own: set[Any] = set()  # values at the top level, outside all parts
    for order, named in dict.fromkeys((parts[""], frozenset(parts)) for parts in brought if parts):
        found = _load(order)
        on_their_own.update(key for key in found if str(key) not in named)
        merged.update(dict.fromkeys(key for key in found if key not in merged))
    for name in merged:
        for part in dict.fromkeys(parts[str(name)] for parts in brought if str(name) in parts):
            here = merged[name]
            merged[name] = _load(part) if here is None else _merge(here, _load(part), (name,), unlike)
        if merged[name] is not None and name in on_their_own:
            if not isinstance(merged[name], TensorParts):
                raise _unlike_on_ranks("values of different kinds", (name,))
            unlike.add(str(name))
    recorded = {**merged, _BY_RANK: dict(by_rank)} if by_rank else merged
    return zlib.compress(encode_object("the structure", recorded), 1), frozenset(unlike)


def _parts_of(manifest: Manifest, rank: int) -> dict[str, bytes]:
    """One rank's skeletons of the parts that differ between ranks, by name; empty for a part that it lacks."""
    recorded = _recorded(manifest).get(_BY_RANK, {}) if manifest.structure else {}
    try:
        return {str(name): part for name, kinds in recorded.items() for ranks, part in kinds if rank in ranks}
    except (AttributeError, TypeError, ValueError) as error:
        raise FormatError(f"the structure that a checkpoint records of its ranks is malformed: {error}") from error


def _recorded(manifest: Manifest) -> dict[Any, Any]:
    found = _load(_inflated(manifest.structure))
    if type(found) is not dict:
        raise FormatError("the structure that a checkpoint records is malformed")
    return found


def _inflated(data: bytes) -> bytes:
    try:
        inflate = zlib.decompressobj()
        found = inflate.decompress(data, MAX_STRUCTURE_NBYTES)
    except zlib.error as error:
        raise FormatError(f"the structure that a checkpoint records is malformed: {error}") from error
    if not inflate.eof:
        raise FormatError("the structure that a checkpoint records is malformed")
    return found


def _load(data: bytes) -> Any:
    return decode_object("structure", data, "the structure")


def _merge(one: Any, other: Any, path: Path, unlike: set[str]) -> Any:
    if isinstance(one, TensorParts) or isinstance(other, TensorParts):
        _compare_forms(one, other, path, unlike)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        both = dict(one)
        for key, part in other.items():
            both[key] = _merge(both[key], part, (*path, key), unlike) if key in both else part
        return alike(one if one or not isinstance(one, TensorParts) else other, both.items())
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            raise _unlike_on_ranks(f"lists of different lengths ({len(one)} and {len(other)})", path)
        return [_merge(part, other[n], (*path, n), unlike) for n, part in enumerate(one)]
    if type(one) is not type(other) and not isinstance(one, TensorParts) and not isinstance(other, TensorParts):
        raise _unlike_on_ranks("values of different kinds", path)
    return other if one is None else one


def _unlike_on_ranks(what: str, path: Path) -> SaveError:
    key = ".".join(map(str, path))
    return SaveError(
        f"ranks hold {what} under the key '{key}': {own_to_each([key])}",
        key=key,
    )


def _compare_forms(one: Any, other: Any, path: Path, unlike: set[str]) -> None:
    """Record a tensor with different parts on two ranks. Empty parts belong to no rank."""
    forms = [part.form for part in (one, other) if isinstance(part, TensorParts) and part]
    is_leaf_elsewhere = not (isinstance(one, TensorParts) and isinstance(other, TensorParts))
    if is_leaf_elsewhere or (len(forms) == 2 and forms[0] != forms[1]):
        unlike.add(".".join(map(str, path)))


def _with_refs(skeleton: Any, path: Path, stored: set[str]) -> Any:
    """Fill a skeleton with a :class:`Ref` for each value, removing their keys from ``stored``."""
    blank: list[tuple[Any, Any]] = []
    for index, part in skeleton.items() if isinstance(skeleton, Mapping) else enumerate(skeleton):
        here = (*path, str(index))
        if isinstance(part, Mapping | list) and (part or isinstance(part, Mapping)):
            node = _with_refs(part, here, stored)
            if isinstance(node, TensorParts):
                node.key = ".".join(map(str, here))
            blank.append((index, node))
            continue
        key = ".".join(map(str, here))
        if key in stored:  # not if a model-only save left out the rest
            stored.discard(key)
            blank.append((index, Ref(key)))
    return alike(skeleton, blank)


# ---- nodes ----


def child(node: Node, element: Any) -> Node | None:
    """The child of ``node`` at a key or an index, which may be given as text."""
    if isinstance(node, Mapping):
        if element in node:
            return node[element]
        return next((found for key, found in node.items() if str(key) == str(element)), None)
    if isinstance(node, list | tuple) and str(element).isdecimal() and int(element) < len(node):
        return node[int(element)]
    return None


def refs(node: Node) -> Iterator[str]:
    """The keys of all values below a node, in order."""
    if isinstance(node, Ref):
        yield node.key
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from refs(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from refs(value)


def rebuild(node: Node, values: Mapping[str, Any]) -> Any:
    """The nested value of a node: new containers with the values of its keys."""
    if isinstance(node, Ref):
        return values[node.key]
    if isinstance(node, Held):
        return node.value
    if isinstance(node, TensorParts):
        return node.tensor if node.tensor is not None else {key: rebuild(value, values) for key, value in node.items()}
    if isinstance(node, Mapping):
        return alike(node, [(key, rebuild(value, values)) for key, value in node.items()])
    if isinstance(node, list):
        return [rebuild(value, values) for value in node]
    return node


def _path_of(key: str, manifest: Manifest) -> Path:
    """Return the path of a key, checked to be its own: another path would place its value wrongly."""
    path = manifest.paths.get(key, tuple(key.split(".")))
    if ".".join(map(str, path)) != key:
        raise FormatError(
            f"the checkpoint gives the key '{key}' the path {path}, which belongs to another key", key=key
        )
    return path


def _empty_mappings(manifest: Manifest) -> list[Path]:
    found = manifest.extra.get(EMPTY_MAPPINGS, [])
    paths = [tuple(path) for path in found if isinstance(path, list) and path] if isinstance(found, list) else []
    return [path for path in paths if all(type(part) in (str, int) for part in path)]


def _put(root: Any, path: Path, value: Node) -> None:
    """Set ``root[path[0]][path[1]]...``; a number as path element makes a list."""
    for element, following in zip(path, [*path[1:], None], strict=True):
        fits = isinstance(root, list) and 0 <= element < MAX_LIST if isinstance(element, int) else type(root) is dict
        if not fits:
            raise FormatError(f"the checkpoint gives the path {path}, which contradicts its other paths or is invalid")
        if isinstance(element, int):
            root.extend([None] * (element + 1 - len(root)))
        here = root[element] if isinstance(element, int) else root.get(element)
        if following is None:
            root[element] = value
            return
        if here is None:
            here = root[element] = [] if isinstance(following, int) else {}
        root = here
