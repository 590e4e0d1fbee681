"""Loading a module through its own ``load_state_dict()``.

A module's ``state_dict()`` may differ from its parameters and buffers: hooks split fused projections, and modules
compute entries or keep other values. So a tensor is read in place only if it is the parameter or buffer of that name.
All others are read into new memory and passed to ``load_state_dict()``, as the module's authors intended.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from milepost.errors import StateMismatchError
from milepost.format.manifest import TensorEntry
from milepost.loading.parts import is_by_shard, want_into_wrapper, want_node, want_parts
from milepost.loading.target import Target, fresh_like, local_tensor, same_memory
from milepost.loading.trial import Trial, has_users_way, names_of_wrappers, try_loading
from milepost.tensors.layout import Placed, can_be_boxes, torch_dtype
from milepost.tensors.parts import TensorParts, comes_apart, leaves, take_apart
from milepost.tensors.state import EXTRA_STATE, LAZY
from milepost.tensors.tree import ALL_MODULES, Node, Ref, rebuild, refs

DERIVED = ("freqs_cis", "inv_freq", "position_ids")
"""Buffers that models compute from their sizes, and some versions store: a model without them does not need them."""


class ModuleOwner:
    """A module to load. ``path_of`` maps a name in its state dict to the value's path in the checkpoint."""

    def __init__(self, module: nn.Module, path_of: Callable[[str], Sequence[str]]):
        self._module = module
        self._path_of = path_of
        self._own: Mapping[str, Any] = {}
        self._keys: dict[str, str] = {}  # of tensors
        self._nodes: dict[str, Node] = {}  # of other values
        self._on_meta: dict[str, torch.Tensor] = {}
        self._all_live = True
        self._in_place = set[str]()  # names of composed tensors that are read in place
        self._copies_of: dict[str, str] = {}  # names of tied tensors -> the name under which they are read
        self._resized: list[str] = []  # names of tensors that are read in another shape than they have here
        self._alike: list[tuple[str, str]] = []  # keys of tied tensors, whose values must be equal
        self._trial: Trial | None = None  # if the module has its own way of loading
        self._metadata: Any = None
        self._made = set[str]()  # names that it fills from values stored under other names
        self.renamed: dict[str, str] = {}
        """For tensors that the module's own way of loading fills from another key: that key."""
        self.replaced: dict[torch.Tensor, torch.Tensor] = {}
        """Parameters and buffers that were on the meta device -> their replacements."""

    def prepare(self, target: Target) -> None:
        held = dict(tensors_of(self._module))
        self._own = self._module.state_dict()
        self._metadata = getattr(self._own, "_metadata", None)
        self._look_at_tied(target, held)
        buffers = {name for name, _ in self._module.named_buffers(remove_duplicate=False)}
        left_fresh = []
        self._try(target, held)
        for name, value in self._own.items():
            path = self._path_of(name)
            key = ".".join(path)
            if name in {*self._copies_of, *self._made} or target.is_excluded(key):
                continue
            if isinstance(value, LAZY) or self._resizes(target, name, value, key):
                self._all_live = False
                self._want_as_stored(target, name, value, key)
                continue
            if self._moves(target, name, key):
                self._want_moved(target, name, key, held)
                continue
            if comes_apart(value) or (isinstance(value, DTensor) and is_by_shard(target.at(path))):
                self._prepare_parts(target, name, value, held.get(name))
                continue
            if is_plain_entry(name, value):
                if isinstance(node := target.at(path), TensorParts) and (inner := _wrapped(target, node, value)):
                    key, path = inner, (inner,)
                if name in buffers and not target.has(key, path):
                    left_fresh.append(key)
                    continue
                live = same_memory(value, held.get(name)) and not any(key in pair for pair in self._alike)
                live = live and (self._trial is None or self._trial.places.get(name) == name)
                self._keys[name] = key
                self._all_live = self._all_live and live
                target.want(key, value if live else fresh_like(value), live=live)
                if value.is_meta and held.get(name) is not None:
                    self._on_meta[name] = held[name]
                continue
            node = target.at(path)
            if node is None:
                target.want_missing([key])
            else:
                want_node(target, node)
                self._nodes[name] = node

        target.note("buffers missing from the checkpoint, left as initialized", left_fresh)
        loaded = {name for name in self._on_meta if self._keys.get(name, name) in target.stored_keys}
        filled = self._trial.filled if self._trial is not None else frozenset()
        self._on_meta |= {name: held[name] for name in filled if held[name].is_meta}
        known = {*loaded, *self._nodes, *filled}
        blank = [name for name, tensor in held.items() if tensor.is_meta and name not in known]
        target.note("on the meta device and not loaded, so still without values", blank)
        not_kept = [".".join(self._path_of(name)) for name in buffers if name not in self._own]
        derived = [key for key in target.stored_keys if key.rpartition(".")[2] in DERIVED and key not in target.values]
        unused = sorted(target.stored_keys.intersection((*not_kept, *derived)))
        target.left.update(unused)
        target.note("buffers of the checkpoint that this model computes itself, ignored", unused)

    def _try(self, target: Target, held: Mapping[str, torch.Tensor]) -> None:
        """Run the module's own way of loading in a trial, and request the tensors that it moves."""
        here = {".".join(self._path_of(name)): name for name in self._own}
        root = self._path_of("")[:-1]
        is_users, stored_names = has_users_way(self._module), target.names_below(root)
        differ = {".".join((*root, name)) for name in stored_names} != here.keys()
        if not stored_names or not (is_users or (differ and has_own_way(self._module))):
            return
        wrappers = names_of_wrappers({key[len(".".join((*root, ""))) :]: name for key, name in here.items()})
        keys: dict[str, str] = {}
        given = {name: self._own[name] for name in self._copies_of}
        for stored, node in stored_names.items():
            key = ".".join((*root, stored))
            name = here.get(key) or wrappers.name_of(stored)
            if not is_extra_state(name) and not target.is_excluded(key):
                keys[name] = key
                given[name] = self._given(target, key, node)
        missing = [n for k, n in here.items() if n not in given and not is_extra_state(n)]
        given |= {name: self._own[name] for name in missing if target.is_excluded(".".join(self._path_of(name)))}
        self._metadata = self._saved_metadata(target, root)
        trial = try_loading(self._module, given, metadata=self._metadata)
        others = keys.keys() - self._own.keys()
        if trial.refusal:
            if is_users and (others or not given.keys() >= set(missing)):
                kind = type(self._module).__name__
                target.mismatched.append(f"load_state_dict() of the {kind} does not take the keys: {trial.refusal}")
            return
        self._trial = trial
        self._made.update(name for name in missing if name not in given and name not in trial.missing)
        for name in others:
            if name not in trial.unexpected:
                self._want_moved(target, name, keys[name], held)

    def _saved_metadata(self, target: Target, root: Sequence[str]) -> Any:
        """Return the metadata of the module's state dict, with the versions of its parts that were saved, if known."""
        own = self._metadata
        saved = getattr(target.at(root) if root else None, "_metadata", None)
        prefix = len(".".join((*root, "")))
        versions = target.versions if not root else {}
        if not isinstance(own, Mapping) or not (isinstance(saved, Mapping) or versions):
            return own
        found = OrderedDict[str, Any]()
        for name, entry in own.items():
            bare = ".".join(self._path_of(name))[prefix:]
            if versions:
                found[name] = {**entry, "version": versions.get(bare, versions.get(ALL_MODULES, 1))}
            else:
                there = saved.get(bare) if isinstance(saved, Mapping) else None
                found[name] = dict(there) if isinstance(there, Mapping) else entry
        return found

    def _given(self, target: Target, key: str, node: Node) -> Any:
        """A stand-in for a stored value: a meta tensor of its shape, or the value itself if it is not a tensor."""
        if isinstance(node, TensorParts):
            return torch.empty(node.form.shape, device="meta")
        entry = target.entry(key)
        if entry is not None:
            return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")
        return rebuild(node, {key: target.value_of(Ref(key)) for key in refs(node)})

    def _moves(self, target: Target, name: str, key: str) -> bool:
        """Return whether the module copies a tensor of this name elsewhere, or to its own place in another shape."""
        entry = target.entry(key)
        if self._trial is None or entry is None or not is_plain_entry(name, self._own[name]):
            return False
        return self._trial.places.get(name, name) != name or entry.shape != tuple(self._own[name].shape)

    def _want_moved(self, target: Target, name: str, key: str, held: Mapping[str, torch.Tensor]) -> None:
        """Request the value of ``name``: into the tensor that it would be copied to unchanged, else as stored."""
        assert self._trial is not None, "it found the moved tensor"
        self._all_live = False
        entry = target.entry(key)
        if entry is None:
            node = target.names_below(self._path_of("")[:-1]).get(key, target.at(self._path_of(name)))
            want_node(target, node)
            self._nodes[name] = node
            return
        self._keys[name] = key
        place = self._trial.places.get(name, "")
        there = self._own.get(place)
        if there is not None:
            self.renamed[".".join(self._path_of(place))] = key
        if there is not None and same_memory(there, held.get(place)) and not there.is_meta:
            target.want(key, there, live=True)
        else:
            target.want(key, _as_stored(entry, self._neighbour(name)), live=False)

    def _neighbour(self, name: str) -> torch.Tensor | None:
        """A tensor of the module near ``name``, as a model for the device and placement of a new one."""
        while True:
            name = name.rpartition(".")[0]
            start = f"{name}." if name else ""
            near = (value for key, value in self._own.items() if key.startswith(start) and is_plain_entry(key, value))
            found = next((value for value in near if not isinstance(value, LAZY)), None)
            if found is not None or not name:
                return found

    def _resizes(self, target: Target, name: str, value: Any, key: str) -> bool:
        """Return whether an entry has another shape in the checkpoint, and its module's own way of loading may take it.

        Observers of quantization-aware training do so; modules of ``torch.nn`` do not.
        """
        entry = target.entry(key)
        if entry is None or not is_plain_entry(name, value) or entry.shape == tuple(value.shape):
            return False
        kind = type(self._holder_of(name))
        is_own = kind._load_from_state_dict is not nn.Module._load_from_state_dict
        is_plain = not value.is_meta and not isinstance(value, DTensor)
        return is_plain and is_own and not kind.__module__.startswith("torch.nn.")

    def _holder_of(self, name: str) -> nn.Module:
        """The module of an entry's name; an empty one for a name that only a hook or an override knows."""
        try:
            return self._module.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            return nn.Module()

    def _want_as_stored(self, target: Target, name: str, value: torch.Tensor, key: str) -> None:
        entry = target.entry(key)
        if entry is None:
            target.want_missing([key])
            return
        self._keys[name] = key
        target.want(key, torch.empty(entry.shape, dtype=value.dtype, device=value.device), live=False)
        if not isinstance(value, LAZY):
            self._resized.append(name)

    def _check_resized(self, values: Mapping[str, Any]) -> list[str]:
        """Try tensors of other shapes on copies of their modules, so that a refusal changes nothing."""
        unfit = []
        for prefix in dict.fromkeys(name.rpartition(".")[0] for name in self._resized):
            trial = copy.deepcopy(self._module.get_submodule(prefix))
            names = {name.rpartition(".")[2]: name for name in self._own if name.rpartition(".")[0] == prefix}
            state = {
                short: values[self._keys[name]] if name in self._resized else self._own[name]
                for short, name in names.items()
            }
            errors: list[str] = []
            trial._load_from_state_dict(state, "", {}, True, [], [], errors)
            unfit += [f"{prefix or type(trial).__name__}: {error}" for error in errors]
        return unfit

    def _prepare_parts(self, target: Target, name: str, value: torch.Tensor, held: torch.Tensor | None) -> None:
        """Read a composed tensor of the kind that was saved."""
        path = self._path_of(name)
        key, node = ".".join(path), target.at(path)
        is_held = held is not None and _share_parts(value, held)
        if is_held and want_into_wrapper(target, key, value):
            return
        if node is None:
            target.want_missing([key])
            return
        self._nodes[name] = node
        if not isinstance(node, TensorParts):
            want_node(target, node)  # the class decides how to load a plain tensor: it may quantize it
        elif want_parts(target, node, live=value):
            self._in_place.update([name] if is_held else [])
        elif local_tensor(value).is_meta and held is not None:
            self._on_meta[name] = held
        elif node.tensor is not None and not node.form.is_by_shard:
            target.refuse(node, f"a {type(local_tensor(value)).__name__} of another form here")

    def _look_at_tied(self, target: Target, held: Mapping[str, torch.Tensor]) -> None:
        """Read a tied tensor once; data stored under its other names must be equal."""
        groups: dict[int, list[str]] = {}
        for name, value in self._own.items():
            if not isinstance(value, LAZY) and is_plain_entry(name, value) and name in held:
                groups.setdefault(id(held[name]), []).append(name)
        for names in groups.values():
            keys = {name: ".".join(self._path_of(name)) for name in names}
            stored = [name for name in names if target.has(keys[name], self._path_of(name))]
            if len(names) == 1 or not stored:
                continue
            first = stored[0]
            for name in names:
                if name == first:
                    continue
                if name not in stored:
                    target.note(f"tied to {keys[first]}, which is stored", [keys[name]])
                    self._copies_of[name] = first
                    continue
                equal = are_equal(target.entry(keys[first]), target.entry(keys[name]))
                if equal is None:
                    self._alike.append((keys[first], keys[name]))
                else:
                    target.left.add(keys[name])
                    self._copies_of[name] = first
                if equal is False:
                    target.mismatched.append(_untied(keys[first], keys[name]))

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises StateMismatchError for values that differ where this module has one tensor for them."""
        unfit = [
            _untied(one, other)
            for one, other in self._alike
            if one in values and other in values and not _same_bits(values[one], values[other])
        ]
        unfit += self._check_resized(values)
        if unfit:
            raise StateMismatchError(
                "the checkpoint does not match its target; nothing was changed:\n  " + "\n  ".join(unfit),
                mismatched=unfit,
            )

    def restore(self, values: Mapping[str, Any]) -> None:
        if self._all_live and self._nodes.keys() <= self._in_place and not has_own_way(self._module):
            return
        state: OrderedDict[str, Any] = OrderedDict()
        for name in self._own:
            if name in self._keys and self._keys[name] in values:
                state[name] = values[self._keys[name]]
            elif name in self._nodes:
                state[name] = rebuild(self._nodes[name], values)
        for name, first in self._copies_of.items():
            if first in state:
                state[name] = state[first]
        for name in {*self._keys, *self._nodes} - self._own.keys():
            if name in self._nodes:
                state[name] = rebuild(self._nodes[name], values)
            elif self._keys[name] in values:
                state[name] = values[self._keys[name]]
        if self._metadata is not None:  # versions of the modules' state, which some read
            cast("Any", state)._metadata = self._metadata
        if self._on_meta:
            filled = self._trial.filled if self._trial is not None else frozenset()
            made = {t: fresh_like(t) for name, t in self._on_meta.items() if name in filled}
            self.replaced = materialise(
                self._module, made | {t: state[name] for name, t in self._on_meta.items() if name in state}
            )
        if state.keys() | self._made >= self._own.keys():
            self._module.load_state_dict(state)
        else:
            self._module.load_state_dict(state, strict=False)


def _share_parts(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two composed tensors share all their memory."""
    if not comes_apart(other) or local_tensor(one).is_meta:
        return False
    parts, others = ({path: _memory(part) for path, part in leaves(take_apart("", tensor))} for tensor in (one, other))
    return parts == others


def _memory(part: torch.Tensor | Placed) -> int:
    return (part.local if isinstance(part, Placed) else local_tensor(part)).data_ptr()


def _wrapped(target: Target, node: TensorParts, value: torch.Tensor) -> str | None:
    """The key of the only tensor inside a stored wrapper, if ``value`` could be that tensor."""
    found = [part.key for _, part in leaves(node) if isinstance(part, Ref)]
    entry = target.entry(found[0]) if len(found) == 1 else None
    fits = entry is not None and entry.shape == tuple(value.shape) and torch_dtype(entry.dtype) == value.dtype
    return found[0] if fits else None


def are_equal(one: TensorEntry | None, other: TensorEntry | None) -> bool | None:
    """Return whether two stored tensors have the same bytes by their digests; None if that is unknown."""
    if one is None or other is None:
        return None
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = ([(shard.box, shard.crc32) for shard in entry.shards] for entry in (one, other))
    if any(crc32 is None for _, crc32 in first + second) or [box for box, _ in first] != [box for box, _ in second]:
        return None
    return first == second


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    a, b = local_tensor(one), local_tensor(other)
    return torch.equal(a, b) or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _untied(one: str, other: str) -> str:
    return f"{one} and {other}: one tensor here (tied), two of different values in the checkpoint"


def is_extra_state(name: str) -> bool:
    """Return whether a name in a state dict is that of a module's extra state."""
    return name == EXTRA_STATE or name.endswith(f".{EXTRA_STATE}")


def is_plain_entry(name: str, value: object) -> bool:
    """Return whether an entry of a state dict is a tensor of a fixed shape, unlike a module's extra state."""
    return isinstance(value, torch.Tensor) and not is_extra_state(name) and can_be_boxes(value)


def _as_stored(entry: TensorEntry, like: torch.Tensor | None) -> torch.Tensor:
    """Create a tensor for a complete stored one, on the mesh or device of ``like``."""
    dtype = torch_dtype(entry.dtype)
    local = local_tensor(like) if like is not None else None
    made = torch.empty(entry.shape, dtype=dtype, device="cpu" if local is None or local.is_meta else local.device)
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        return DTensor.from_local(made, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return made


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers that a module holds, under all their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def has_own_way(module: nn.Module) -> bool:
    """Return whether loading a module does more than copy: hooks, overrides, extra state."""
    return any(_has_own_way(part) for part in module.modules())


def _has_own_way(module: nn.Module) -> bool:
    kind = type(module)
    return bool(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or kind.load_state_dict is not nn.Module.load_state_dict
        or kind._load_from_state_dict is not nn.Module._load_from_state_dict
        or not {"load_state_dict", "_load_from_state_dict"}.isdisjoint(module.__dict__)
    )


def materialise(module: nn.Module, values: Mapping[torch.Tensor, torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    """Replace parameters and buffers on the meta device; returns the replacements."""
    replaced: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old in values:
                if old not in replaced:
                    replaced[old] = nn.Parameter(values[old], requires_grad=old.requires_grad)
                part._parameters[name] = cast("nn.Parameter", replaced[old])
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer in values:
                part._buffers[name] = replaced.setdefault(buffer, values[buffer])
    return replaced
