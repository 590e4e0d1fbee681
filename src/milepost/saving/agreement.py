"""How the ranks agree on a save before it begins: one gather, one scatter, and a plan that is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from milepost.collective.comm import Comm, failure_on, merge_failures, raise_interrupt
from milepost.collective.progress import watched
from milepost.config import NUM_IO_THREADS
from milepost.errors import MilepostError, SaveError, StorageError
from milepost.run import commit
from milepost.run.assemble import SaveInfo
from milepost.saving.job import Form, Keep, SaveJob
from milepost.storage.base import Storage
from milepost.tensors.layout import TensorLeaf, stored_as
from milepost.tensors.plan import LocalLayout, WritePlan, plan_save
from milepost.tensors.state import EMPTY_MAPPINGS, FlatState, Path, encode_object, flatten, unwrap_stateful

TIMEOUT_S = 600.0
"""How long a rank waits for the others' records before it gives a save up."""


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
    modules: tuple[nn.Module, ...] = ()
    """Modules whose buffers are in the state. These are copied before a save returns: ``forward`` changes them."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What this rank brings to a save. An ``error`` is kept for the exchange, where every rank hears of it."""

    flat: FlatState
    objects: Mapping[str, bytes]
    layout: LocalLayout
    fingerprint: str
    buffers: frozenset[str] = frozenset()
    """Keys of tensors that share memory with a buffer of one of the request's modules."""
    error: MilepostError | None = None


@dataclass(frozen=True, slots=True)
class _Structure:
    """A rank's layout, and where its values and empty mappings stood in the state dict."""

    layout: LocalLayout
    paths: Mapping[str, Path]
    empty: Sequence[Path]


@dataclass(frozen=True, slots=True)
class _Offer:
    """A rank's structure, only if it is not the one that rank 0 knows already."""

    structure: _Structure | None
    error: MilepostError | None


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer of rank 0 to a rank; with a plan only if it changed."""

    save_id: str
    attempt: str
    plan: WritePlan | None
    form: Form | None
    error: MilepostError | None


def _nothing(error: MilepostError) -> Prepared:
    return Prepared(FlatState({}, {}, {}, {}), {}, LocalLayout((), ()), "", error=error)


class Agreement:
    """Turns what each rank brings into a job for each, reusing the plan while the structure stays the same.

    From the second save of an unchanged structure on, ranks exchange a flag and a save id, no layouts.
    """

    def __init__(self, storage: Storage, comm: Comm, *, timeout_s: float, num_threads: int = NUM_IO_THREADS):
        self._storage = storage
        self._comm = comm
        self._timeout_s = timeout_s
        self._num_threads = num_threads
        self._fingerprint = ""
        self._plan: WritePlan | None = None
        self._structures: list[_Structure] = []  # every rank's last one; on rank 0 only

    def prepare(self, request: SaveRequest) -> Prepared:
        """Flatten and encode this rank's state. An error is kept for the exchange."""
        try:
            state = request.make_state()
            flat = flatten(unwrap_stateful(state))
            if (dtype := request.dtype) is not None:
                flat = replace(flat, tensors={key: stored_as(leaf, dtype) for key, leaf in flat.tensors.items()})
            objects = {key: encode_object(key, value) for key, value in flat.objects.items()}
            layout = flat.layout()
            modules = [*request.modules, *(value for value in state.values() if isinstance(value, nn.Module))]
            return Prepared(
                flat,
                objects,
                layout,
                fingerprint=f"{layout.fingerprint(flat.paths)} {flat.empty}",
                buffers=_buffers_among(flat.tensors.values(), modules),
            )
        except BaseException as cause:  # noqa: BLE001 - a state_dict() of the user's may raise anything
            return _nothing(failure_on(self._comm.rank, cause, SaveError))

    def agree(self, request: SaveRequest, prepared: Prepared) -> tuple[SaveJob, bool]:
        """This rank's job, and whether the previous plan was reused. Collective.

        Rank 0 plans for all, begins the attempt, and gives each rank its part.

        Raises:
            SaveError, PlanError, ConfigError: on every rank, if any rank brought or met an error.
        """
        known = self._plan is not None and prepared.fingerprint == self._fingerprint
        if known or prepared.error is not None:
            offer = _Offer(None, prepared.error)
        else:
            offer = _Offer(_Structure(prepared.layout, prepared.flat.paths, prepared.flat.empty), None)
        offers = self._comm.gather(offer)
        answer = self._comm.scatter(self._plan_for_all(request, offers) if offers is not None else None)
        if answer.error is not None:
            self._plan = None  # no rank may count on what rank 0 remembers
            raise_interrupt(prepared.error)
            raise answer.error
        if answer.plan is not None:
            self._plan = answer.plan
        self._fingerprint = prepared.fingerprint
        assert self._plan is not None
        is_first = self._comm.rank == 0
        job = SaveJob(
            target=request.target,
            attempt=answer.attempt,
            save_id=answer.save_id,
            rank=self._comm.rank,
            world_size=self._comm.world_size,
            plan=self._plan,
            info=self._with_structure(request.info) if is_first else None,
            keep=request.keep if is_first else None,
            timeout_s=self._timeout_s,
            form=answer.form,
            num_threads=self._num_threads,
        )
        return job, answer.plan is None

    def _plan_for_all(self, request: SaveRequest, offers: list[_Offer]) -> list[_Answer]:
        """The answer of rank 0 to each rank's offer. Errors become answers, so that no rank is left waiting."""
        try:
            failure = merge_failures([offer.error for offer in offers])
            if failure is not None:
                raise failure
            plans: list[WritePlan | None] = [None] * len(offers)
            if any(offer.structure is not None for offer in offers):
                self._learn(offers)
                plans = list(plan_save([found.layout for found in self._structures]))
            form = request.make_form(self._dtypes()) if request.make_form is not None else None
            save_id = commit.new_save_id()
            with watched(f"rank 0 is making the folder for the save of {self._storage.root}/{request.target}"):
                attempt = commit.begin_attempt(self._storage, request.target, save_id)
            return [_Answer(save_id, attempt, plan, form, None) for plan in plans]
        except StorageError as cause:
            return self._refuse(offers, SaveError(cause.message, path=cause.path))
        except BaseException as cause:  # noqa: BLE001 - every rank must hear of it
            return self._refuse(offers, cause)

    def _refuse(self, offers: list[_Offer], cause: BaseException) -> list[_Answer]:
        self._structures = []
        failure = failure_on(0, cause, SaveError)
        return [_Answer("", "", None, None, failure) for _ in offers]

    def _learn(self, offers: list[_Offer]) -> None:
        if not self._structures:
            self._structures = [_Structure(LocalLayout((), ()), {}, ())] * len(offers)
        for rank, offer in enumerate(offers):
            if offer.structure is not None:
                self._structures[rank] = offer.structure

    def _dtypes(self) -> dict[str, str]:
        """The dtype in which each tensor is stored, of all ranks' tensors."""
        return {spec.key: spec.dtype for found in self._structures for spec in found.layout.tensors}

    def _with_structure(self, info: SaveInfo) -> SaveInfo:
        paths = {key: path for found in self._structures for key, path in found.paths.items()}
        empty = list(dict.fromkeys(path for found in self._structures for path in found.empty))
        # `str`: a TorchVersion would make the writer process import torch to unpickle it.
        extra = {**info.extra, EMPTY_MAPPINGS: empty} if empty else info.extra
        return replace(info, paths=paths, extra=extra, producer={"torch": str(torch.__version__)})


def _buffers_among(leaves: Iterable[TensorLeaf], modules: Iterable[nn.Module]) -> frozenset[str]:
    """The keys of leaves that share memory with a buffer of ``modules``, whatever they are called."""
    memory = set()
    for module in modules:
        for buffer in module.buffers():
            local = buffer.to_local() if isinstance(buffer, DTensor) else buffer
            memory.add(_memory_of(local))
    memory.discard(None)
    return frozenset(leaf.key for leaf in leaves if _memory_of(leaf.local) in memory) if memory else frozenset()


def _memory_of(tensor: torch.Tensor) -> tuple[torch.device, int] | None:
    """The identity of a tensor's memory; None where it has none (meta tensors, wrappers)."""
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None
    return (tensor.device, pointer) if pointer else None
