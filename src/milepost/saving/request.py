"""The request of a save, and this rank's part of it: flattened, encoded, described."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike, fspath
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from milepost.collective.comm import Comm, ProcessGroupComm, failure_on
from milepost.errors import MilepostError, SaveError
from milepost.run.assemble import SaveInfo
from milepost.run.step_names import step_of
from milepost.saving.arguments import check_given, checked_layout, checked_step
from milepost.saving.job import Form, Keep
from milepost.saving.structure import Nesting, Structure, structure_of
from milepost.storage import open_storage
from milepost.storage.base import Storage
from milepost.tensors.aliases import find_aliases, find_permuted, memory_of
from milepost.tensors.layout import TensorLeaf, stored_as
from milepost.tensors.parts import TensorParts, num_shards, plain_tensors
from milepost.tensors.placements import PLAIN, describe_placements
from milepost.tensors.plan import LocalLayout
from milepost.tensors.snapshot import Snapshot, snapshot
from milepost.tensors.state import EXTRA_STATE, LOOP_PARTS, ByName, FlatState, flatten, unwrap_stateful
from milepost.tensors.tree import Relations, dump_parts
from milepost.tensors.value_types import ATOMS
from milepost.tensors.value_writer import encode_object

Kind = Literal["state", "full", "model"]
"""``full``: everything needed to resume a run; ``model``: only weights; ``state``: any other state dict."""


@dataclass(frozen=True, slots=True, eq=False)
class SaveRequest:
    """One requested save: the same on every rank except for the result of ``make_state``."""

    target: str
    """Path of the checkpoint in the storage."""
    make_state: Callable[[], Mapping[str, Any]]
    """Called by the saver, so that its error reaches every rank."""
    info: SaveInfo
    dtype: torch.dtype | None = None
    """Dtype in which floating-point tensors are stored; None: their own."""
    keep: Keep | None = None
    """The retention rules to apply after the commit; None prunes nothing."""
    make_form: Callable[[Mapping[str, str]], Form] | None = None
    """Creates another file format for all ranks' tensors, given keys and dtypes; called on rank 0."""
    per_rank: tuple[str, ...] = ()
    """Top-level names whose values may differ between ranks, and are then stored per rank."""
    modules: tuple[nn.Module, ...] = ()
    """Modules whose tensors are in the state. What ``forward`` may change of them is copied before a save returns."""
    full_every: int = 1
    """Rewrite frozen tensors every N saves; 0: only if they have changed."""


def request_of(
    function: str,
    path: str | PathLike[str],
    state_dict: Mapping[str, Any],
    step: int | None,
    kind: str,
    layout: Mapping[str, int] | None,
) -> tuple[Storage, SaveRequest]:
    """Return the storage and the request of a call of ``save`` or ``async_save``.

    Raises:
        ConfigError: an argument is invalid.
    """
    check_given(function, path, state_dict)
    storage, target = open_storage(fspath(path))
    step = step_of(target) if step is None else checked_step(step)
    info = SaveInfo(step=step, kind=kind, layout=checked_layout(layout))
    return storage, SaveRequest(target, lambda: state_dict, info)


@dataclass(frozen=True, eq=False)
class Prepared:
    """This rank's part of a save. An ``error`` is kept for the exchange, which raises it on every rank."""

    rank: int
    state: Mapping[str, Any]
    """The nested state from its owners."""
    modules: Sequence[nn.Module]
    """Those in the state dict itself."""
    replicated: frozenset[str]
    """Top-level names of models and optimizers in the state dict."""
    flat: FlatState
    objects: Mapping[str, bytes | Snapshot]
    """Encoded values, except large ones that concern no other rank."""
    layout: LocalLayout
    nesting: Nesting
    frozen: frozenset[str] = frozenset()
    """Keys of parameters without gradient."""
    at_will: frozenset[str] = frozenset()
    """Keys of tensors that the user's code may change at any time: see ``_changed_at_will``."""
    of_loop: frozenset[str] = frozenset()
    """Keys of tensors that ranks may come to hold differently: all but those of models and optimizers, and plain
    state of an optimizer over DTensors."""
    error: MilepostError | None = None

    @property
    def changed_early(self) -> frozenset[str]:
        """Keys of tensors that may change before ``optimizer.step()``.

        Those that ``forward`` changes, buffers and parameters without gradient (a codebook's), and the loop's own.
        """
        return self.layout.buffers | self.frozen | self.at_will

    @cached_property
    def structure(self) -> Structure:
        """The description of this rank's state for the other ranks, created once, when a new plan needs it."""
        return structure_of(self.layout, self.nesting, self.rank)


@dataclass(frozen=True, slots=True)
class Manner:
    """Options of flattening and encoding outside the request."""

    per_rank: frozenset[str] = frozenset()
    """Top-level names whose values are stored per rank."""
    by_shard: frozenset[str] = frozenset()
    """Keys of DTensors whose shards are stored one by one."""
    may_defer: bool = False
    """True if large values may be encoded later."""


def prepare_state(request: SaveRequest, comm: Comm, manner: Manner, before: Prepared | None = None) -> Prepared:
    """Flatten and encode this rank's state, reusing an earlier result if given. An error is kept for the exchange."""
    try:
        if before is not None:
            state, modules, replicated = before.state, before.modules, before.replicated
        else:
            given = request.make_state()
            state, modules = unwrap_stateful(given), [v for v in given.values() if isinstance(v, nn.Module)]
            replicated = _replicated_parts(given)
        own = {name: {f"rank{comm.rank}": state[name]} for name in manner.per_rank if name in state}
        whole = ByName({**state, **own}) if isinstance(state, ByName) else {**state, **own}
        flat = flatten(whole, manner.by_shard)
        own_shards = _own_shards(flat, own)
        if own_shards:
            flat = flatten(whole, manner.by_shard.union(own_shards))
        if (dtype := request.dtype) is not None:
            flat = replace(flat, tensors={key: stored_as(leaf, dtype) for key, leaf in flat.tensors.items()})
        objects = _encoded(flat.objects, manner)
        owners = [*request.modules, *modules]
        leaves = flat.tensors.values()
        buffers = _keys_of((buffer for owner in owners for buffer in owner.buffers()), leaves, memory_of)
        fixed = (one for owner in owners for one in owner.parameters() if not one.requires_grad)
        frozen = _keys_of(fixed, leaves, _start_of)
        layout = replace(flat.layout(), buffers=buffers, frozen=frozen if _shares(request) else frozenset())
        if not (isinstance(comm, ProcessGroupComm) and comm.has_job_ranks):  # meshes number the ranks of the job
            plain = (spec if spec.spread is None else replace(spec, spread=None) for spec in layout.tensors)
            layout = replace(layout, tensors=tuple(plain))
        versions = state.versions if isinstance(state, ByName) else {}
        beside = list(_state_of_sharded(flat))
        relations = _relations_of(flat, LOOP_PARTS if isinstance(state, ByName) else None, versions, beside)
        relations = replace(relations, sharded={**relations.sharded, **own_shards})
        nesting = Nesting(flat.paths, flat.empty, dump_parts({**flat.skeleton, **relations.skeleton()}))
        of_loop = _of_loop(flat, replicated, beside) - buffers
        at_will = _changed_at_will(flat, owners, of_run=isinstance(state, ByName))
        return Prepared(comm.rank, state, modules, replicated, flat, objects, layout, nesting, frozen, at_will, of_loop)
    except BaseException as cause:  # noqa: BLE001 - a state_dict() of the user's may raise anything
        return _nothing(comm.rank, failure_on(comm.rank, cause, SaveError))


StateOfSharded = tuple[str, torch.Tensor, torch.Tensor | None]
"""A key of an optimizer's state beside DTensors, its tensor, and the parameter if the key tells it."""


def _relations_of(
    flat: FlatState,
    loop_parts: Collection[str] | None,
    versions: Mapping[str, int],
    beside: Iterable[StateOfSharded],
) -> Relations:
    """Return the relations of tensors to record.

    Placements and parameters only of ``loop_parts``, if given: those of the other parts follow from the model.
    """
    sharded, parameters = {}, {}
    for key in flat.tensors:
        slot, path = flat.slots[key], flat.paths[key]
        if isinstance(slot.container, TensorParts):
            continue
        value = slot.container[slot.index]
        if loop_parts is None or path[0] in loop_parts:
            text = describe_placements(value) if isinstance(value, DTensor) else None
            sharded.update({key: text} if text is not None else {})
            if type(value) is nn.Parameter:
                parameters[key] = value.requires_grad
    sharded |= _unlike_parameters(beside)
    aliases = find_aliases(flat.tensors.values())
    known = {key for group in aliases.values() for key in group}
    alone = (
        leaf
        for key, leaf in flat.tensors.items()
        if key not in known and (loop_parts is None or flat.paths[key][0] in loop_parts)
    )
    return Relations({**aliases, **find_permuted(alone)}, versions, sharded, parameters)


def _own_shards(flat: FlatState, per_rank: Collection[str]) -> dict[str, str]:
    """Return the keys and placements of DTensors below the top-level names ``per_rank``.

    There each rank has its shard under a key of its own, of which no rank has the rest.
    """
    found = {}
    for key, leaf in flat.tensors.items() if per_rank else ():
        if leaf.spread is not None and flat.paths[key][0] in per_rank and not leaf.is_part:
            value = flat.slots[key].container[flat.slots[key].index]
            if isinstance(value, DTensor) and num_shards(value) > 1:
                text = describe_placements(value)
                found.update({key: text} if text is not None else {})
    return found


def _unlike_parameters(beside: Iterable[StateOfSharded]) -> dict[str, str]:
    """Return the placements of optimizers' state that do not follow from those of its parameter."""
    found: dict[str, str] = {}
    for key, value, parameter in beside:
        if not isinstance(value, DTensor):
            found.update({key: PLAIN} if value.ndim else {})
        elif parameter is not None and value.shape != parameter.shape and not _is_replicated(value):
            text = describe_placements(value)
            found.update({key: text} if text is not None else {})
    return found


def _state_of_sharded(flat: FlatState) -> Iterator[StateOfSharded]:
    """Yield optimizers' state, if anything is sharded, except that of parameters that are not."""
    if all(leaf.spread is None for leaf in flat.tensors.values()):
        return
    for key in flat.tensors:
        path, slot = flat.paths[key], flat.slots[key]
        is_state = path[0] == "optimizer" or "state" in path[:-1]
        if is_state and not isinstance(slot.container, TensorParts):
            parameter = _parameter_of(flat, key)
            if parameter is None or isinstance(parameter, DTensor):
                yield key, slot.container[slot.index], parameter


def _parameter_of(flat: FlatState, key: str) -> torch.Tensor | None:
    """Return the parameter to which state of an optimizer belongs; None if its key does not tell."""
    name = key.removeprefix("optimizer.state.").rpartition(".")[0]
    while name and name not in flat.tensors:
        name = name.rpartition(".")[0]
    return flat.slots[name].container[flat.slots[name].index] if name else None


def _is_replicated(tensor: DTensor) -> bool:
    return all(placement.is_replicate() for placement in tensor.placements)


def _nothing(rank: int, error: MilepostError) -> Prepared:
    flat, nesting = FlatState({}, {}, {}, {}), Nesting({}, (), {})
    return Prepared(rank, {}, (), frozenset(), flat, {}, LocalLayout((), ()), nesting, error=error)


def _replicated_parts(given: Mapping[str, Any]) -> frozenset[str]:
    """Return the top-level names of models and optimizers, whose state every rank computes alike."""
    if isinstance(given, ByName):
        return frozenset(given.keys() - set(LOOP_PARTS))
    return frozenset(name for name, value in given.items() if isinstance(value, nn.Module | Optimizer))


def _of_loop(flat: FlatState, replicated: frozenset[str], beside: Iterable[StateOfSharded]) -> frozenset[str]:
    plain = {key for key, leaf in flat.tensors.items() if leaf.spread is None and flat.paths[key][0] not in replicated}
    unsharded = (key for key, value, _ in beside if not isinstance(value, DTensor))
    return frozenset(plain.union(key for key in unsharded if not key.endswith(".step")))  # which all have


def _changed_at_will(flat: FlatState, owners: Sequence[nn.Module], *, of_run: bool) -> frozenset[str]:
    """Return the keys of tensors that neither ``forward`` nor an optimizer owns.

    Modules' extra state, options of optimizers (a learning rate that a schedule sets), and in a run's state what
    belongs to the loop: counters, permutations, a replay buffer. Not the averages of weights in modules of their own,
    which follow the optimizer.
    """
    found = {
        key
        for key in flat.tensors
        if ".param_groups." in key or EXTRA_STATE in key or (of_run and flat.paths[key][0] in LOOP_PARTS)
    }
    if not found:
        return frozenset()
    stepped = (one for owner in owners for one in owner.parameters() if one.requires_grad)
    return frozenset(found) - _keys_of(stepped, [flat.tensors[key] for key in found], _start_of)


def _encoded(values: Mapping[str, Any], manner: Manner) -> dict[str, bytes | Snapshot]:
    """Encode all values; one tuple of plain numbers under many keys (``betas``) only once."""
    found: dict[str, bytes | Snapshot] = {}
    tuples: dict[int, bytes] = {}  # by identity: such a tuple does not change, and ``values`` keeps it alive
    for key, value in values.items():
        if type(value) is tuple and ATOMS.issuperset(map(type, value)):
            known = tuples.get(id(value))
            found[key] = known if known is not None else tuples.setdefault(id(value), encode_object(key, value))
            continue
        copied = snapshot(value) if manner.may_defer else None
        found[key] = copied if copied is not None else encode_object(key, value)
    return found


def _shares(request: SaveRequest) -> bool:
    """Return whether steps share files: not without a history, in another format, or where all is written anew."""
    return request.full_every != 1 and request.make_form is None and request.info.lineage is not None


def _keys_of(
    tensors: Iterable[torch.Tensor],
    leaves: Iterable[TensorLeaf],
    place: Callable[[torch.Tensor], tuple[torch.device, int] | None],
) -> frozenset[str]:
    """Return the keys of leaves with the same ``place`` in memory as one of ``tensors``, whatever they are called."""
    places = {place(plain) for tensor in tensors for plain in plain_tensors(tensor)} - {None}
    return frozenset(leaf.key for leaf in leaves if place(leaf.local) in places) if places else frozenset()


def _start_of(tensor: torch.Tensor) -> tuple[torch.device, int] | None:
    """Return the start of a tensor's elements, or None without memory. Distinguishes parts of one memory (FSDP1's)."""
    memory = memory_of(tensor)
    return (tensor.device, tensor.data_ptr()) if memory is not None and tensor.numel() else None
