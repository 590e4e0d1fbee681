"""The possible states of a disk after a power cut, derived from a journal of system calls.

The model assumes only what POSIX promises. After a cut,

* data written to a file since its last fsync may be present or not, block by block (4096 bytes): each block has its
  content of any moment since then, or zeros beyond the file's end at that moment. The length, too, is that of any
  moment since then, independently of the blocks.
* each change to the names in a folder that no fsync of the folder has covered may have happened or not, independently
  of other changes and of the files' content; only changes of the same name keep their order.
* a rename or an exchange is one change, which happened completely or not at all. That also holds between two folders,
  where an fsync of either makes it durable, as on every journalling file system (ext4, xfs, btrfs).
* an fsync of a file makes its bytes durable, not its name; an fsync of a folder its names, not the files' bytes.

Real disks lose far less: ext4 and xfs write a file's name with its fsync, and metadata in order.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Union

from milepost.testing.journal import (
    Change,
    Created,
    Exchanged,
    Inode,
    Linked,
    Marked,
    Name,
    Removed,
    RenameCall,
    Resized,
    Synced,
    Written,
    inode_of,
)

BLOCK_NBYTES = 4096

FileTree = Mapping[str, Union[bytes, "FileTree"]]
"""The content of a folder: names with the bytes of files and the trees of folders."""


@dataclass(slots=True, eq=False)
class _File:
    """``versions`` are the durable content and the content after each later change, oldest first."""

    versions: list[bytes]


@dataclass(slots=True, eq=False)
class _Folder:
    """``names`` are those that processes see, ``durable`` those certain to survive a cut."""

    names: dict[str, _Node] = field(default_factory=dict)
    durable: dict[str, _Node] = field(default_factory=dict)


_Node = _File | _Folder


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    folder: _Folder
    name: str

    @property
    def key(self) -> tuple[int, str]:
        return id(self.folder), self.name


@dataclass(frozen=True, slots=True, eq=False)
class _NameChange:
    """An atomic change of names; None: the name is deleted."""

    effects: tuple[tuple[_Place, _Node | None], ...]


class Disk:
    """A folder on a disk: its visible state, and the states that may survive a power cut.

    Built from an existing folder, assumed to be durable; then :meth:`apply` is called for each change.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._nodes: dict[Inode, _Node] = {}
        self._pending: list[_NameChange] = []
        self._root = self._read(os.fspath(folder))

    def _read(self, path: str) -> _Folder:
        made = _Folder()
        self._nodes[inode_of(path)] = made
        for item in os.scandir(path):
            if item.is_dir(follow_symlinks=False):
                made.names[item.name] = self._read(item.path)
            else:
                inode = inode_of(item.path)
                if inode not in self._nodes:  # otherwise it is another name of a known file
                    with open(item.path, "rb") as file:
                        self._nodes[inode] = _File([file.read()])
                made.names[item.name] = self._nodes[inode]
        made.durable = dict(made.names)
        return made

    def apply(self, change: Change) -> None:
        """Apply a change from the journal; ignores changes outside this folder."""
        match change:
            case Created(name, inode, is_folder):
                if name[0] in self._nodes:
                    made: _Node = _Folder() if is_folder else _File([b""])
                    self._nodes[inode] = made
                    self._rename((self._place(name), made))
            case Written(inode, offset, data):
                if isinstance(file := self._nodes.get(inode), _File):
                    now = file.versions[-1].ljust(offset, b"\0")
                    file.versions.append(now[:offset] + data + now[offset + len(data) :])
            case Resized(inode, nbytes):
                if isinstance(file := self._nodes.get(inode), _File):
                    file.versions.append(file.versions[-1][:nbytes].ljust(nbytes, b"\0"))
            case Synced(inode):
                node = self._nodes.get(inode)
                if isinstance(node, _File):
                    del node.versions[:-1]
                elif node is not None:
                    self._sync_names(node)
            case RenameCall(src, dst):
                if src[0] in self._nodes:
                    one, other = self._place(src), self._place(dst)
                    self._rename((one, None), (other, one.folder.names[one.name]))
            case Linked(src, dst):
                if src[0] in self._nodes:
                    one = self._place(src)
                    self._rename((self._place(dst), one.folder.names[one.name]))
            case Exchanged(src, dst):
                if src[0] in self._nodes:
                    one, other = self._place(src), self._place(dst)
                    self._rename((one, other.folder.names[other.name]), (other, one.folder.names[one.name]))
            case Removed(name):
                if name[0] in self._nodes:
                    self._rename((self._place(name), None))
            case Marked():
                pass

    def _place(self, name: Name) -> _Place:
        folder = self._nodes[name[0]]
        assert isinstance(folder, _Folder)
        return _Place(folder, name[1])

    def _rename(self, *effects: tuple[_Place, _Node | None]) -> None:
        for place, node in effects:
            _put(place.folder.names, place.name, node)
        self._pending.append(_NameChange(effects))

    def _sync_names(self, folder: _Folder) -> None:
        """Make the changes of a folder's names durable, and the changes of other names on which they depend."""
        covered, left = [], []
        needed: set[tuple[int, str]] = set()
        for change in reversed(self._pending):
            keys = {place.key for place, _ in change.effects}
            if not needed.isdisjoint(keys) or any(place.folder is folder for place, _ in change.effects):
                covered.append(change)
                needed |= keys
            else:
                left.append(change)
        for change in reversed(covered):
            for place, node in change.effects:
                _put(place.folder.durable, place.name, node)
        self._pending = left[::-1]

    def seen(self) -> FileTree:
        """The state that processes see, also after a kill, which loses nothing that was written."""
        return _tree(self._root, lambda folder: folder.names, lambda file: file.versions[-1])

    def durable(self) -> FileTree:
        """The minimum that survives a power cut: only synced data."""
        return _tree(self._root, lambda folder: folder.durable, lambda file: file.versions[0])

    def after_cut(self, rng: random.Random) -> FileTree:
        """Return one of the possible states after a power cut at this moment."""
        chosen = self._some_changes(rng)
        moods = {"all": 2, "torn": 4, "none": 2}
        return _tree(
            self._root,
            lambda folder: chosen.get(id(folder), folder.durable),
            lambda file: _torn(file, rng.choices([*moods], [*moods.values()])[0], rng),
        )

    def _some_changes(self, rng: random.Random) -> dict[int, dict[str, _Node]]:
        """Return the names of folders (by id) after a choice of the pending changes, without unchanged folders."""
        likely = rng.choice((0.1, 0.5, 0.9))
        lost: set[tuple[int, str]] = set()
        chosen: dict[int, dict[str, _Node]] = {}
        for change in self._pending:
            keys = {place.key for place, _ in change.effects}
            if not lost.isdisjoint(keys) or rng.random() >= likely:
                lost |= keys  # later changes of these names can't have happened either
                continue
            for place, node in change.effects:
                names = chosen.setdefault(id(place.folder), dict(place.folder.durable))
                _put(names, place.name, node)
        return chosen


def _put(names: dict[str, _Node], name: str, node: _Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _tree(
    folder: _Folder, names: Callable[[_Folder], Mapping[str, _Node]], content: Callable[[_File], bytes]
) -> FileTree:
    return {
        name: content(node) if isinstance(node, _File) else _tree(node, names, content)
        for name, node in sorted(names(folder).items())
    }


def _torn(file: _File, mood: str, rng: random.Random) -> bytes:
    """Return one of a file's possible contents after a cut: the newest, the oldest, or blocks of different moments."""
    versions = file.versions
    if mood != "torn" or len(versions) == 1:
        return versions[0] if mood == "none" else versions[-1]
    nbytes = len(rng.choice(versions))
    blocks = [
        rng.choice(versions)[start : start + BLOCK_NBYTES].ljust(BLOCK_NBYTES, b"\0")
        for start in range(0, nbytes, BLOCK_NBYTES)
    ]
    return b"".join(blocks)[:nbytes]


def write_tree(tree: FileTree, folder: str | os.PathLike[str]) -> None:
    """Create ``folder``, which must not exist, with the content ``tree``."""
    os.makedirs(folder)
    for name, content in tree.items():
        path = os.path.join(folder, name)
        if isinstance(content, bytes):
            with open(path, "wb") as file:
                file.write(content)
        else:
            write_tree(content, path)


def frozen(tree: FileTree) -> tuple[tuple[str, object], ...]:
    """Return the tree as a hashable value: equal if and only if names and bytes are."""
    return tuple((name, node if isinstance(node, bytes) else frozen(node)) for name, node in sorted(tree.items()))
