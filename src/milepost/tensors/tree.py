"""How the values of a checkpoint were nested: the containers that were saved, with a :class:`Ref` for each value.

A tree says what ``state_dict()`` looked like without reading a value, so that an object is given back all that was
saved for it, whatever it holds itself at that moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milepost.errors import FormatError
from milepost.format.manifest import Manifest
from milepost.tensors.state import EMPTY_MAPPINGS, Path

MAX_LIST = 1 << 20
"""No list has more elements that are stored one by one."""

Node = Any
"""A container of nodes, or a :class:`Ref`."""


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for the value that is stored under ``key``."""

    key: str


class Tree:
    """The nested containers of a checkpoint, with a :class:`Ref` in place of each value."""

    def __init__(self, root: Mapping[Any, Node]):
        self.root = root

    @classmethod
    def of(cls, manifest: Manifest) -> Tree:
        """The tree of a checkpoint, from the paths of its keys.

        Raises:
            FormatError: the paths contradict each other, or are absurd.
        """
        root: dict[str, Node] = {}
        for path in _empty_mappings(manifest):
            _put(root, path, {})
        for key in (*manifest.tensors, *manifest.objects):
            _put(root, manifest.paths.get(key, tuple(key.split("."))), Ref(key))
        return cls(root)

    def at(self, path: Sequence[Any]) -> Node | None:
        """The node at ``path``, whose elements are compared as text; None if there is none."""
        found = _descend(self.root, path)
        # Keys of others' checkpoints may come without paths: then every dot of a name divides.
        return found if found is not None else _descend(self.root, ".".join(map(str, path)).split("."))


def _descend(node: Node, path: Sequence[Any]) -> Node | None:
    for element in path:
        node = child(node, element)
        if node is None:
            return None
    return node


def child(node: Node, element: Any) -> Node | None:
    """The node below ``node`` at a key or an index, given as it is or as text."""
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


def assemble(node: Node, values: Mapping[str, Any]) -> Any:
    """The nested value of a node, made of new containers and the values of its keys."""
    if isinstance(node, Ref):
        return values[node.key]
    if isinstance(node, Mapping):
        return {key: assemble(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [assemble(value, values) for value in node]
    return node


def _empty_mappings(manifest: Manifest) -> list[Path]:
    found = manifest.extra.get(EMPTY_MAPPINGS, [])
    paths = [tuple(path) for path in found if isinstance(path, list) and path] if isinstance(found, list) else []
    return [path for path in paths if all(type(part) in (str, int) for part in path)]


def _put(root: Any, path: Path, value: Node) -> None:
    """Set ``root[path[0]][path[1]]...``; a number as path element makes a list."""
    for element, following in zip(path, [*path[1:], None], strict=True):
        fits = isinstance(root, list) and 0 <= element < MAX_LIST if isinstance(element, int) else type(root) is dict
        if not fits:
            raise FormatError(f"the checkpoint gives the path {path}, which contradicts its other paths or is absurd")
        if isinstance(element, int):
            root.extend([None] * (element + 1 - len(root)))
        here = root[element] if isinstance(element, int) else root.get(element)
        if following is None:
            root[element] = value
            return
        if here is None:
            here = root[element] = [] if isinstance(following, int) else {}
        root = here
