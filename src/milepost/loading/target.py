"""The target of a load: a tensor, or a slot for a value, for each requested key.

Live tensors, those of the caller's objects, are filled last, once everything else is read and checked, so that a
refused load has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from milepost.config import part_of
from milepost.errors import StateMismatchError, listed
from milepost.format.manifest import Manifest, TensorEntry
from milepost.tensors.aliases import join_aliases
from milepost.tensors.layout import Placed, can_be_boxes, detached_local, dtype_name, torch_dtype
from milepost.tensors.parts import TensorParts
from milepost.tensors.placements import PLAIN, make_sharded
from milepost.tensors.state import EXTRA_STATE, PACKED, ByName
from milepost.tensors.tree import Held, Node, Read, Ref, Relations, Tree, refs


class Stored:
    """The content of a checkpoint: its manifest and the tree of its values."""

    def __init__(self, manifest: Manifest, read: Read | None = None, is_excluded: Callable[[str], bool] | None = None):
        self.keys = frozenset((*manifest.tensors, *manifest.objects))
        """All stored tensors, including those excluded from the load."""
        self.is_excluded = is_excluded if is_excluded is not None else lambda key: False
        self.excluded: Mapping[str, TensorEntry] = {}
        if is_excluded is not None:
            self.excluded = {key: entry for key, entry in manifest.tensors.items() if is_excluded(key)}
            tensors = {key: entry for key, entry in manifest.tensors.items() if not is_excluded(key)}
            objects = {key: entry for key, entry in manifest.objects.items() if not is_excluded(key)}
            manifest = replace(manifest, tensors=tensors, objects=objects)
        self.manifest = manifest
        self.tree = Tree.of(manifest, read)


class Target:
    """Collects the keys to read. ``values`` holds the results by key once the load is done."""

    def __init__(self, stored: Stored | None):
        self._stored = stored
        self.is_excluded: Callable[[str], bool] = stored.is_excluded if stored is not None else lambda key: False
        """Returns True if a key is excluded from loading; the stored tree has none of these."""
        self.notes: list[str] = []
        """Notes for the user, for instance on values that are not restored."""
        self.keeps_parts = False
        """Return tensors that can't be assembled here as dicts of their parts."""
        self._stored_keys = frozenset[str]()
        if stored is not None:
            self._stored_keys = frozenset((*stored.manifest.tensors, *stored.manifest.objects))
        self.values: dict[str, Any] = ByName()
        self.live: set[str] = set()
        """Keys whose tensors belong to the caller's objects: filled in place, last."""
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._narrowed: dict[str, torch.dtype] = {}
        self._spread: dict[str, torch.Tensor] = {}
        self.cast: list[str] = []
        """One line for each tensor whose stored dtype differs from the target's."""
        self.mismatched: list[str] = []
        """One line for each value that is known not to fit."""
        self._relations = stored.tree.relations if stored is not None else Relations()
        self.meshes: Sequence[DeviceMesh] = ()
        """Meshes of this run, on which DTensors that no object here has are made as they were."""
        self.apart = set[str]()
        """Keys of new tensors that are known elsewhere already."""
        self._unplaced: list[str] = []
        self.is_filling = False
        """True once any object of the caller may have been changed."""
        self.left: set[str] = set()
        """Keys of the checkpoint that are not used here."""
        self._taken: set[str] = set()  # top-level names of a checkpoint that is stored as one value

    def want(self, key: str, tensor: torch.Tensor | Placed, *, live: bool, path: Sequence[Any] = ()) -> None:
        """Request ``key`` into ``tensor``; ``path`` locates it if its container is stored as one value."""
        if self.is_excluded(key):
            return
        node = self.at(path or (key,)) if key not in self._stored_keys else None
        if isinstance(node, TensorParts):
            self.refuse(node, "a plain tensor here")
            return
        if isinstance(node, Held) and isinstance(tensor, torch.Tensor):
            self._want_held(key, tensor, node.value)
            return
        entry = self.entry(key)
        stored = torch_dtype(entry.dtype) if entry is not None else tensor.dtype
        if isinstance(tensor, torch.Tensor) and is_narrower(tensor.dtype, stored):
            self._want_narrowed(key, tensor, stored)
            return
        if isinstance(tensor, torch.Tensor) and _is_expanded(tensor):
            self._want_spread(key, tensor)
            return
        self.values[key] = tensor
        if live:
            self.live.add(key)

    def new_tensor(self, key: str, entry: TensorEntry) -> torch.Tensor:
        """A new tensor for a stored one: placed as it was, else on the CPU and whole."""
        dtype = torch_dtype(entry.dtype)
        text = self.placement_of(key)
        if text is not None and text != PLAIN and self.meshes:
            made = make_sharded(text, self.meshes, entry.shape, dtype)
            if made is not None:
                return made
            self._unplaced.append(key)
        return torch.empty(entry.shape, dtype=dtype, device="cpu")

    def placement_of(self, key: str) -> str | None:
        """Return the recorded placements of a DTensor, or PLAIN; None if they are not recorded."""
        return self._relations.sharded.get(key)

    @property
    def versions(self) -> Mapping[str, int]:
        """Versions of the model's modules in the checkpoint, by FQN; empty where they are not recorded."""
        return self._relations.versions

    def finish(self) -> None:
        """Let new tensors share memory as they did; called once all is wanted."""
        for group in self._relations.aliases.values():
            join_aliases(group, self.values, {*self.live, *self.apart, *self._narrowed, *self._spread})
        self._make_parameters()
        self.note("sharded over a mesh that this run does not have, so restored whole on each rank", self._unplaced)

    def _make_parameters(self) -> None:
        made: dict[int, nn.Parameter] = {}
        for key, needs_grad in self._relations.parameters.items():
            value = self.values.get(key)
            if key in self.live or key in self.apart or not isinstance(value, torch.Tensor):
                continue
            if value.is_floating_point() or value.is_complex() or not needs_grad:
                self.values[key] = made.setdefault(id(value), nn.Parameter(value, needs_grad))

    def at(self, path: Sequence[Any]) -> Node | None:
        """The node of the checkpoint's tree at ``path``."""
        node = None if self._stored is None else self._stored.tree.at(path)
        if node is not None:
            self._taken.add(str(path[0]))
        return node

    def names_below(self, path: Sequence[Any]) -> dict[str, Node]:
        """Return the nodes below ``path`` by name, as in a module's state dict; at the top only the model's."""
        root = self._stored.tree.root if self._stored is not None else None
        found = root if not path else self.at(path)
        named: dict[str, Node] = {}
        for name, node in found.items() if isinstance(found, Mapping) else ():
            if path or part_of(str(name)) == "model":
                named.update(_named(str(name), node))
        return named

    def take_all(self) -> None:
        """Record that everything stored is used."""
        if self._stored is not None:
            self._taken.update(map(str, self._stored.tree.root))

    def settle_packed(self) -> list[str]:
        """Count a checkpoint that is stored as one value as used if anything in it is.

        Returns its top-level names that are not used.
        """
        if self._stored is None or not self._stored.tree.is_packed or not self._taken:
            return []
        self.left.add(PACKED)
        return sorted({str(name) for name in self._stored.tree.root} - self._taken)

    @property
    def stored_keys(self) -> frozenset[str]:
        """All keys of the checkpoint."""
        return self._stored_keys

    @property
    def has_order(self) -> bool:
        """True if the checkpoint records the order of values in containers."""
        return self._stored is not None and bool(self._stored.manifest.structure)

    @property
    def excluded_keys(self) -> frozenset[str]:
        """Keys of the checkpoint that are excluded from loading: their values here stay unchanged."""
        return self._stored.keys - self._stored_keys if self._stored is not None else frozenset()

    def has(self, key: str, path: Sequence[Any]) -> bool:
        """Return whether the checkpoint has a value for a key, possibly in a container that is stored as one value."""
        return self._stored is None or key in self._stored_keys or self.at(path) is not None

    def value_of(self, node: Node) -> Any:
        """The value of a node that is not a container; None for a tensor."""
        if isinstance(node, Held):
            return node.value
        return self._stored.tree.read(node.key) if self._stored is not None and isinstance(node, Ref) else None

    def entry(self, key: str) -> TensorEntry | None:
        """The stored tensor of a key; None if there is none, or another kind of value."""
        return None if self._stored is None else self._stored.manifest.tensors.get(key)

    def stored_shape(self, key: str) -> tuple[int, ...] | None:
        """Return the shape of a stored tensor, also of one that is excluded from the load; None if there is none."""
        entry = self.entry(key)
        if entry is None and self._stored is not None:
            entry = self._stored.excluded.get(key)
        return entry.shape if entry is not None else None

    def _want_held(self, key: str, tensor: torch.Tensor, value: Any) -> None:
        """Add a tensor from a container that was read already: it is copied with the live tensors."""
        if not isinstance(value, torch.Tensor):
            self.mismatched.append(f"{key}: not a tensor in the checkpoint, a tensor here")
        elif value.shape != tensor.shape:
            self.mismatched.append(f"{key}: shape {list(value.shape)} in the checkpoint, {list(tensor.shape)} here")
        else:
            self.copies.append((tensor, value))

    def _want_narrowed(self, key: str, tensor: torch.Tensor, stored: torch.dtype) -> None:
        """Request integers of a wider dtype: read as stored, checked, and copied with the live tensors."""
        self.values[key] = wide = fresh_like(tensor, dtype=stored)
        self._narrowed[key] = tensor.dtype
        self.cast.append(f"{key}: {dtype_name(stored)} -> {dtype_name(tensor.dtype)}")
        self.copies.append((tensor, wide))

    def _want_spread(self, key: str, tensor: torch.Tensor) -> None:
        """Request a tensor with overlapping elements: read completely, checked, copied once with the live tensors."""
        self.values[key] = whole = fresh_like(tensor)
        self._spread[key] = tensor
        self.copies.append((_once(tensor, tensor), _once(whole, tensor)))

    def check(self) -> None:
        """Refuse values that their target can't hold, once everything except the live tensors is read."""
        unfit = [
            f"{key}: different values in the checkpoint for elements that are one here (expanded)"
            for key, tensor in self._spread.items()
            if key in self.values and not _is_uniform(self.values[key], tensor)
        ]
        for key, dtype in self._narrowed.items():
            found = self.values.get(key)
            if found is None:
                continue
            values, range_ = local_tensor(found), torch.iinfo(dtype)
            if values.numel() and not (range_.min <= int(values.min()) and int(values.max()) <= range_.max):
                unfit.append(f"{key}: {int(values.min())} to {int(values.max())} in the checkpoint, {dtype} here")
        if unfit:
            raise StateMismatchError(
                "values of the checkpoint do not fit their target; nothing was changed:\n  "
                + "\n  ".join(listed(unfit)),
                mismatched=unfit,
            )

    def copy_held(self) -> None:
        """Fill the tensors whose values were read already."""
        with torch.no_grad():
            for tensor, value in self.copies:
                tensor.copy_(value)

    def refuse(self, node: TensorParts, here: str) -> None:
        """Record that a composed tensor does not fit the target."""
        self.mismatched.append(f"{node.key}: a {node.form.kind} in the checkpoint, {here}")
        self.leave(node)

    def leave(self, node: Node) -> None:
        """Record values that are not needed here: they count neither as requested nor as unexpected."""
        self.left.update(refs(node))

    def note(self, what: str, keys: Sequence[str]) -> None:
        """Add a note on the treatment of ``keys``, if there are any."""
        if keys:
            self.notes.append(f"{what}: {', '.join(listed(keys, 5))}")

    def want_missing(self, keys: Iterable[str]) -> None:
        """Record keys that an object needs and the checkpoint lacks: they are reported, and refused if strict."""
        self.values.update(dict.fromkeys(keys))


def _named(name: str, node: Node) -> Iterator[tuple[str, Node]]:
    """Yield a node by its name, or those below it if the name was split at its dots."""
    is_value = not isinstance(node, Mapping) or isinstance(node, TensorParts) or EXTRA_STATE in name
    if is_value or not node:
        yield name, node
        return
    for rest, inner in node.items():
        yield from _named(f"{name}.{rest}", inner)


def _is_expanded(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, DTensor) or tensor.layout != torch.strided:
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _once(tensor: torch.Tensor, expanded: torch.Tensor) -> torch.Tensor:
    """A view of an expanded tensor that has each of its elements once."""
    return tensor.detach()[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in expanded.stride())]


def _is_uniform(whole: torch.Tensor, expanded: torch.Tensor) -> bool:
    spread = _once(whole, expanded).expand_as(whole).contiguous()
    return torch.equal(whole.contiguous().view(torch.uint8), spread.view(torch.uint8))


def is_narrower(dtype: torch.dtype, stored: torch.dtype) -> bool:
    """Return whether integers of dtype ``stored`` may be too large for ``dtype``."""
    if dtype.is_floating_point or stored.is_floating_point or torch.bool in (dtype, stored):
        return False
    if dtype.is_complex or stored.is_complex:
        return False
    return dtype.itemsize < stored.itemsize and dtype.is_signed == stored.is_signed


class Restorer(Protocol):
    """Loads one of the caller's objects through its own ``load_state_dict()``."""

    def prepare(self, target: Target) -> None:
        """Add the object's keys to ``target``. The object is not changed."""

    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse values that don't fit. Everything but the live tensors is read; nothing has been changed yet."""

    def restore(self, values: Mapping[str, Any]) -> None:
        """Pass the values to the object."""


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A view of this rank's part of a DTensor, or of any other tensor."""
    return detached_local(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def same_memory(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Return whether two tensors are the same view of the same memory."""
    if other is None or type(one.detach()) is not type(other.detach()) or one.shape != other.shape:
        return False
    if isinstance(one, DTensor) and isinstance(other, DTensor) and one._spec != other._spec:
        return False
    a, b = local_tensor(one), local_tensor(other)
    if a.layout != torch.strided or b.layout != torch.strided or a.is_meta or b.is_meta:
        return False
    return (a.data_ptr(), a.device, a.dtype, a.shape, a.stride()) == (
        b.data_ptr(),
        b.device,
        b.dtype,
        b.shape,
        b.stride(),
    )


def fresh_like(tensor: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A new tensor with the shape, placements and device of ``tensor`` (the CPU for one on the meta device)."""
    tensor = tensor.detach()
    dtype = dtype if dtype is not None else tensor.dtype
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        device = tensor.device_mesh.device_type if local.is_meta else local.device
        return DTensor.from_local(
            torch.empty_like(local, dtype=dtype, device=device),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    return torch.empty_like(tensor, dtype=dtype, device="cpu" if tensor.is_meta else tensor.device)


def item(container: Any, name: Any) -> Any:
    """``container[name]``, or None."""
    try:
        return container[name]
    except (KeyError, IndexError, TypeError):
        return None


def is_place_for(tensor: Any, entry: TensorEntry) -> bool:
    """Return whether a value is a tensor that can be read into."""
    if not isinstance(tensor, torch.Tensor) or not can_be_boxes(tensor):
        return False
    return not local_tensor(tensor).is_meta and tuple(tensor.shape) == entry.shape
