"""The request of a save, and this rank's part of it: flattened, encoded, described."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from milepost.collective.comm import Comm, ProcessGroupComm, failure_on
from milepost.errors import MilepostError, SaveError
from milepost.run.assemble import SaveInfo
from milepost.saving.job import Form, Keep
from milepost.saving.structure import Nesting, Structure, structure_of
from milepost.tensors.layout import TensorLeaf, stored_as
from milepost.tensors.parts import plain_tensors
from milepost.tensors.plan import LocalLayout
from milepost.tensors.snapshot import Snapshot, snapshot
from milepost.tensors.state import ByName, FlatState, flatten, unwrap_stateful
from milepost.tensors.tree import dump_parts
from milepost.tensors.value_writer import encode_object


@dataclass(frozen=True, slots=True, eq=False)
class SaveRequest:
    """One save as a saver is asked for it: the same on every rank but for what ``make_state`` returns."""

    target: str
    """Path of the checkpoint in the storage."""
    make_state: Callable[[], Mapping[str, Any]]
    """Called by the saver, so that its error too reaches every rank."""
    info: SaveInfo
    dtype: torch.dtype | None = None
    """Floating-point tensors are stored in this dtype; None: in their own."""
    keep: Keep | None = None
    """Which older steps to prune after the commit; None prunes nothing."""
    make_form: Callable[[Mapping[str, str]], Form] | None = None
    """Another file format, for tensors of these keys and dtypes, all ranks' together; called on rank 0."""
    per_rank: tuple[str, ...] = ()
    """Top-level names whose values may belong to each rank: stored for each where they differ."""
    modules: tuple[nn.Module, ...] = ()
    """Modules whose buffers are in the state. These are copied before a save returns: ``forward`` changes them."""
    full_every: int = 1
    """Frozen tensors are written again every N saves; 0: only when they have changed."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """This rank's part of a save. An ``error`` is kept for the exchange, where every rank hears of it."""

    rank: int
    state: Mapping[str, Any]
    """The nested state, as the owners gave it."""
    modules: Sequence[nn.Module]
    """Those in the state dict itself."""
    flat: FlatState
    objects: Mapping[str, bytes | Snapshot]
    """Encoded, but for large values that no other rank has a say in."""
    layout: LocalLayout
    nesting: Nesting
    fingerprint: str
    error: MilepostError | None = None

    @property
    def buffers(self) -> frozenset[str]:
        """Keys of tensors that share memory with a buffer of one of the request's modules."""
        return self.layout.buffers

    @cached_property
    def structure(self) -> Structure:
        """The description of this rank's state for the other ranks. Made when a new plan needs it, and once."""
        return structure_of(self.layout, self.nesting, self.rank)


@dataclass(frozen=True, slots=True)
class Manner:
    """Options of flattening and encoding that the request does not have."""

    per_rank: frozenset[str] = frozenset()
    """Top-level names whose values are stored for each rank."""
    by_shard: frozenset[str] = frozenset()
    """Keys of DTensors whose shards are stored one by one."""
    may_defer: bool = False
    """Whether large values may be encoded later."""


def prepare_state(request: SaveRequest, comm: Comm, manner: Manner, before: Prepared | None = None) -> Prepared:
    """Flatten and encode this rank's state, or again what was got before. An error is kept for the exchange."""
    try:
        if before is not None:
            state, modules = before.state, before.modules
        else:
            given = request.make_state()
            state, modules = unwrap_stateful(given), [v for v in given.values() if isinstance(v, nn.Module)]
        own = {name: {f"rank{comm.rank}": state[name]} for name in manner.per_rank if name in state}
        whole = ByName({**state, **own}) if isinstance(state, ByName) else {**state, **own}
        flat = flatten(whole, manner.by_shard)
        if (dtype := request.dtype) is not None:
            flat = replace(flat, tensors={key: stored_as(leaf, dtype) for key, leaf in flat.tensors.items()})
        objects = {key: _encoded(key, value, manner) for key, value in flat.objects.items()}
        buffers = _buffers_among(flat.tensors.values(), [*request.modules, *modules])
        frozen = _frozen_among(flat.tensors.values(), [*request.modules, *modules], request)
        layout = replace(flat.layout(), buffers=buffers, frozen=frozen)
        if not (isinstance(comm, ProcessGroupComm) and comm.has_job_ranks):  # meshes number the ranks of the job
            layout = replace(layout, tensors=tuple(replace(spec, spread=None) for spec in layout.tensors))
        nesting = Nesting(flat.paths, flat.empty, dump_parts(flat.skeleton))
        fingerprint = f"{layout.fingerprint(flat.paths)} {nesting.digest()}"
        return Prepared(comm.rank, state, modules, flat, objects, layout, nesting, fingerprint)
    except BaseException as cause:  # noqa: BLE001 - a state_dict() of the user's may raise anything
        return _nothing(comm.rank, failure_on(comm.rank, cause, SaveError))


def _nothing(rank: int, error: MilepostError) -> Prepared:
    return Prepared(
        rank, {}, (), FlatState({}, {}, {}, {}), {}, LocalLayout((), ()), Nesting({}, (), {}), "", error=error
    )


def _encoded(key: str, value: Any, manner: Manner) -> bytes | Snapshot:
    copied = snapshot(value) if manner.may_defer else None
    return copied if copied is not None else encode_object(key, value)


def _buffers_among(leaves: Iterable[TensorLeaf], modules: Iterable[nn.Module]) -> frozenset[str]:
    """The keys of leaves that share memory with a buffer of ``modules``, whatever they are called."""
    memory: set[tuple[torch.device, int] | None] = set()
    for module in modules:
        for buffer in module.buffers():
            memory.update(map(_memory_of, plain_tensors(buffer)))
    memory.discard(None)
    return frozenset(leaf.key for leaf in leaves if _memory_of(leaf.local) in memory) if memory else frozenset()


def _frozen_among(leaves: Iterable[TensorLeaf], modules: Iterable[nn.Module], request: SaveRequest) -> frozenset[str]:
    """The keys of leaves that are parameters of ``modules`` without gradient, whatever they are called.

    None where steps share nothing: a save without a history, in another format, or one that is always written anew.
    """
    if request.full_every == 1 or request.make_form is not None or request.info.lineage is None:
        return frozenset()
    memory: set[tuple[torch.device, int] | None] = set()
    for module in modules:
        for parameter in module.parameters():
            if not parameter.requires_grad:
                memory.update(map(_start_of, plain_tensors(parameter)))
    memory.discard(None)
    return frozenset(leaf.key for leaf in leaves if _start_of(leaf.local) in memory) if memory else frozenset()


def _start_of(tensor: torch.Tensor) -> tuple[torch.device, int] | None:
    """Where a tensor's elements begin; None where that is nowhere. Parts of one memory (FSDP1's) are told apart."""
    memory = _memory_of(tensor)
    return (tensor.device, tensor.data_ptr()) if memory is not None and tensor.numel() else None


def _memory_of(tensor: torch.Tensor) -> tuple[torch.device, int] | None:
    """The identity of a tensor's memory; None where it has none (meta tensors, wrappers)."""
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None
    return (tensor.device, pointer) if pointer else None
