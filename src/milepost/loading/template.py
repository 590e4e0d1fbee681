"""Load into the caller's nested state dict: tensors in place, objects through their own methods."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from milepost.format.manifest import DIGESTS_NAME, Manifest
from milepost.loading.mapped import MappedFiles
from milepost.loading.module import ModuleOwner
from milepost.loading.names import without_wrappers
from milepost.loading.optimizer import OptimizerOwner
from milepost.loading.parts import is_by_shard, want_into_wrapper, want_node, want_parts
from milepost.loading.restoring import restore_each
from milepost.loading.stateful import StatefulOwner
from milepost.loading.target import Restorer, Stored, Target, fresh_like, local_tensor
from milepost.tensors.layout import can_be_boxes
from milepost.tensors.parts import TensorParts, comes_apart
from milepost.tensors.placements import meshes_of
from milepost.tensors.state import Slot, is_stateful, is_terminal
from milepost.tensors.tree import Held, Node, Read, Ref, rebuild

log = logging.getLogger("milepost")

Path = tuple[Any, ...]

_ADVICE = "Don't use it in this state: fix the cause and load again, or restart the program"


class Whole:
    """The full content of a checkpoint as a new state dict: its containers and values, and tensors on the CPU.

    With ``mapped`` files, tensors are views of them where possible, and not read.
    """

    def __init__(self, manifest: Manifest, read: Read, mapped: MappedFiles | None = None):
        stored = Stored(manifest, read)
        self.target = Target(stored)
        self._root = stored.tree.root
        self.target.keeps_parts = True
        want_node(self.target, self._root)
        self.target.take_all()
        self._mapped: dict[str, torch.Tensor] = {}
        for key in _plain_keys(self._root) if mapped is not None else ():
            entry = self.target.entry(key)
            tensor = mapped.tensor(entry) if mapped is not None and entry is not None else None
            if tensor is not None:
                self._mapped[key] = tensor
                del self.target.values[key]
                self.target.left.add(key)
        self.state_dict: dict[str, Any] = {}

    def check(self) -> None:
        """Accept everything."""

    def restore(self) -> None:
        """Build the state dict."""
        for note in self.target.notes:
            log.warning("%s", note)
        self.state_dict = rebuild(self._root, {**self.target.values, **self._mapped})


def _tensors_in(container: Any) -> Iterator[torch.Tensor]:
    """The tensors in a caller's state dict, and in its modules."""
    for value in container.values() if isinstance(container, Mapping) else container:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, Mapping) or (isinstance(value, list) and not is_terminal(value)):
            yield from _tensors_in(value)


def _plain_keys(node: Node) -> Iterator[str]:
    """The keys below a node, without the parts of composed tensors."""
    if isinstance(node, Ref):
        yield node.key
    elif isinstance(node, Mapping | list) and not isinstance(node, TensorParts):
        for part in node.values() if isinstance(node, Mapping) else node:
            yield from _plain_keys(part)


class Template:
    """A nested state dict to load into.

    Tensors are filled in place; those on the meta device are replaced by others with data. Objects with
    ``load_state_dict()`` get their saved state. None and empty containers are replaced by any saved value, other values
    by theirs.
    """

    def __init__(self, into: Mapping[str, Any], manifest: Manifest, read: Read | None = None):
        self.target = Target(Stored(manifest, read))
        self._owners: list[tuple[str, Restorer]] = []
        self._slots: list[tuple[Slot, Node]] = []
        self._made: dict[str, tuple[Slot, torch.Tensor]] = {}  # in place of tensors on the meta device
        self._is_foreign = manifest.file_named(DIGESTS_NAME) is None
        self.target.meshes = meshes_of(_tensors_in(into)) if torch.distributed.is_initialized() else ()
        self._walk(into, ())
        for _, owner in self._owners:
            owner.prepare(self.target)

    def _walk(self, container: Any, path: Path) -> None:
        items: Iterator[tuple[Any, Any]]
        items = iter(container.items()) if isinstance(container, Mapping) else iter(enumerate(container))
        for index, value in items:
            here = (*path, index)
            if comes_apart(value) or (isinstance(value, DTensor) and is_by_shard(self.target.at(here))):
                self._want_parts(value, here)
            elif isinstance(value, torch.Tensor) and can_be_boxes(value):
                if local_tensor(value).is_meta:
                    self._want_in_place_of(Slot(container, index), value, here)
                    continue
                self.target.want(".".join(map(str, here)), value, live=True, path=here)
            elif isinstance(value, nn.Module):
                self._own(here, ModuleOwner(value, self._paths_below(here)))
            elif isinstance(value, Optimizer) and type(value).state_dict is Optimizer.state_dict:
                self._own(here, OptimizerOwner(value, here))
            elif is_stateful(value):
                self._own(here, StatefulOwner(value, here, own=value.state_dict(), in_place=True))
            elif (isinstance(value, Mapping) and value) or (isinstance(value, list) and not is_terminal(value)):
                self._walk(value, here)
            else:
                self._want_value(Slot(container, index), value, here)

    def _own(self, path: Path, owner: Restorer) -> None:
        self._owners.append((".".join(map(str, path)), owner))

    def _paths_below(self, path: Path) -> Callable[[str], Path]:
        """Return the paths of a module's names, which may be stored under those of another wrapper or of none."""
        stored = self.target.names_below(path)
        bare = {without_wrappers(name): name for name in stored}
        is_clear = len(bare) == len(stored)

        def path_of(name: str) -> Path:
            known = name in stored or not is_clear
            return (*path, name if known else bare.get(without_wrappers(name), name))

        return path_of

    def _want_parts(self, value: torch.Tensor, path: Path) -> None:
        """Request the parts of a composed tensor."""
        key = ".".join(map(str, path))
        node = self.target.at(path)
        if self.target.is_excluded(key) or want_into_wrapper(self.target, key, value):
            return
        if not isinstance(node, TensorParts):
            self.target.want_missing([key])
        elif not want_parts(self.target, node, live=value) and node.tensor is not None and node.tensor is not value:
            self.target.refuse(node, f"a {type(value).__name__} of another form here")

    def _want_in_place_of(self, slot: Slot, value: torch.Tensor, path: Path) -> None:
        """Request a tensor that replaces one on the meta device."""
        fresh = fresh_like(value)
        key = ".".join(map(str, path))
        self.target.want(key, fresh, live=False, path=path)
        self.target.apart.add(key)
        is_parameter = isinstance(value, nn.Parameter)
        self._made[key] = slot, nn.Parameter(fresh, value.requires_grad) if is_parameter else fresh

    def _want_value(self, slot: Slot, value: Any, path: Path) -> None:
        key = ".".join(map(str, path))
        node = self.target.at(path)
        takes_all = value is None or isinstance(value, Mapping | list)
        if node is None and isinstance(value, Mapping) and self._is_foreign:
            return  # stock DCP does not record empty mappings
        if isinstance(node, Held):
            self._slots.append((slot, node))
            return
        if node is None or not (takes_all or isinstance(node, Ref)):
            self.target.want_missing([key])
            return
        if value is None or not isinstance(node, Ref):
            want_node(self.target, node)
        else:
            self.target.values[key] = None  # a tensor can't replace another kind of value
        self._slots.append((slot, node))

    def check(self) -> None:
        """Refuse a mismatch, once everything except the live tensors is read."""
        for _, owner in self._owners:
            owner.check(self.target.values)

    def restore(self) -> None:
        """Set the values in the caller's containers and objects."""
        for slot, node in self._slots:
            slot.fill(rebuild(node, self.target.values))
        copied = {id(tensor) for tensor, _ in self.target.copies}
        for key, (slot, tensor) in self._made.items():
            if key in self.target.values or id(tensor) in copied:  # otherwise it is not in the checkpoint
                slot.fill(tensor)
        values = self.target.values
        restore_each([(name, partial(owner.restore, values)) for name, owner in self._owners], advice=_ADVICE)
