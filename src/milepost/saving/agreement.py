"""The agreement of the ranks on a save before it begins: one gather, one scatter, and a plan that is made once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from milepost.collective.collector import collection_paused
from milepost.collective.comm import Comm, by_ranks, failure_on, merge_failures, raise_interrupt, raise_together
from milepost.collective.meeting import meeting
from milepost.collective.progress import watched
from milepost.config import NUM_IO_THREADS
from milepost.errors import MilepostError, SaveError, StorageError, listed
from milepost.run.assemble import SaveInfo, check_fits
from milepost.run.attempts import abort_attempt, begin_attempt, new_save_id
from milepost.run.step_names import ATTEMPT_PREFIX
from milepost.saving.frozen import FrozenFile, frozen_files_of_parent
from milepost.saving.job import Form, Keep, SaveJob
from milepost.saving.nodes import Nodes
from milepost.saving.replicas import (
    Depth,
    Digests,
    Group,
    differences,
    digests_of,
    groups_in_common,
    host_name,
    judge,
    summary_of,
    unlike_groups,
)
from milepost.storage.base import Storage, join, split
from milepost.tensors.layout import TensorLeaf, stored_as
from milepost.tensors.parts import plain_tensors
from milepost.tensors.plan import LocalLayout, WritePlan, plan_save
from milepost.tensors.snapshot import Snapshot, encoded, snapshot
from milepost.tensors.state import EMPTY_MAPPINGS, PER_RANK, ByName, FlatState, Path, flatten, unwrap_stateful
from milepost.tensors.tree import dump_parts, merge_parts
from milepost.tensors.values import encode_object

log = logging.getLogger("milepost")

T = TypeVar("T")
_Brought = tuple[dict[int, Digests], dict[str, str], dict[str, str], frozenset[str], str]

TIMEOUT_S = 600.0
"""Seconds that a rank waits for the others' records before it gives a save up."""


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
    """Frozen tensors are written anew when so many saves have been since they were; 0: only if they have changed."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """This rank's part of a save. An ``error`` is kept for the exchange, where every rank hears of it."""

    state: Mapping[str, Any]
    """The nested state, as the owners gave it."""
    modules: Sequence[nn.Module]
    """Those in the state dict itself."""
    flat: FlatState
    objects: Mapping[str, bytes | Snapshot]
    """Encoded, but for large values that no other rank has a say in."""
    layout: LocalLayout
    fingerprint: str
    skeleton: Mapping[str, bytes] = field(default_factory=dict)
    error: MilepostError | None = None

    @property
    def buffers(self) -> frozenset[str]:
        """Keys of tensors that share memory with a buffer of one of the request's modules."""
        return self.layout.buffers


@dataclass(frozen=True, slots=True)
class _Nesting:
    """The paths of a rank's values and empty mappings in the state dict.

    The most of what ranks would have to tell, and alike on many of them: all but the stages of a pipeline. So ranks
    tell its digest, and one of those that have it brings it.
    """

    paths: Mapping[str, Path]
    empty: Sequence[Path]
    skeleton: Mapping[str, bytes]

    @classmethod
    def of(cls, prepared: Prepared) -> _Nesting:
        return cls(prepared.flat.paths, prepared.flat.empty, prepared.skeleton)

    def digest(self) -> str:
        told = repr((list(self.paths.items()), list(self.empty))).encode()
        return hashlib.blake2b(told, digest_size=16).hexdigest() + _digest(self.skeleton)


@dataclass(frozen=True, slots=True)
class _Structure:
    """A rank's layout, and the digest of its nesting."""

    layout: LocalLayout
    nesting: str = ""


@dataclass(frozen=True, slots=True)
class _Ask:
    """In place of an answer: these ranks have yet to bring their nesting."""

    ranks: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Offer:
    """A rank's structure, only if it is not the one that rank 0 knows already."""

    structure: _Structure | None
    error: MilepostError | None
    common: Mapping[int, bytes] = field(default_factory=dict)
    """For each group that the rank is in, a digest of its values: of a structure that is known."""
    target: str = ""
    """Where this rank saves."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer of rank 0 to a rank; with a plan, and the groups that the rank is in, only if they changed."""

    plan: WritePlan | None = None
    groups: Mapping[int, Group] | None = None
    earlier: FrozenFile | None = None
    """With a plan: what the step before has of its file of frozen tensors."""
    form: Form | None = None
    depth: Depth | None = None
    """How to compare what ranks have in common before the save begins; None: it was done with the offers."""
    begun: _Begun | None = None
    info: SaveInfo | None = None
    """For the first rank of a node: what the manifest of its part says."""
    error: MilepostError | None = None
    by_shard: frozenset[str] = frozenset()
    """Keys of DTensors whose shards are to be stored one by one: nothing is agreed on yet."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """The attempt that rank 0 has made for a save; where each node has a folder of its own, that is to be made."""

    save_id: str
    attempt: str


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The outcome of the comparison: the attempt, or the error on what differs."""

    begun: _Begun | None = None
    unlike: Sequence[int] = ()
    per_rank: frozenset[str] = frozenset()
    by_shard: frozenset[str] = frozenset()
    error: MilepostError | None = None


def _nothing(error: MilepostError) -> Prepared:
    return Prepared({}, (), FlatState({}, {}, {}, {}), {}, LocalLayout((), ()), "", error=error)


class _BelongsToRanks(Exception):
    """Raised on every rank: some of the state differs between ranks, and is to be stored for each.

    ``parts`` of the state, or keys of DTensors whose shards are of different kinds.
    """

    def __init__(self, parts: frozenset[str] = frozenset(), by_shard: frozenset[str] = frozenset()):
        super().__init__(parts, by_shard)
        self.parts = parts
        self.by_shard = by_shard


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """A save that all ranks have agreed on."""

    prepared: Prepared
    job: SaveJob
    reused_plan: bool


class Agreement:
    """Turns what each rank brings into a job for each, reusing the plan while the structure stays the same.

    From the second save of an unchanged structure on, ranks exchange a flag and a save id, no layouts.
    """

    def __init__(
        self,
        storage: Storage,
        comm: Comm,
        *,
        timeout_s: float,
        num_threads: int = NUM_IO_THREADS,
        check_replicas: int = 0,
        nodes: Nodes | None = None,
        may_defer: bool = False,
    ):
        self._storage = storage
        self._nodes = nodes
        self._comm = comm
        self._timeout_s = timeout_s
        self._num_threads = num_threads
        self._check_replicas = check_replicas
        self._may_defer = may_defer and comm.world_size == 1  # ranks compare what they have encoded
        self._num_saves = 0
        self._fingerprint = ""
        self._plan: WritePlan | None = None
        self._groups: Mapping[int, Group] = {}  # those that this rank is in
        self._frozen: FrozenFile | None = None  # this rank's, in the last committed step
        self._per_rank: frozenset[str] = frozenset()  # names found to differ between ranks: the same on all of them
        self._by_shard: frozenset[str] = frozenset()  # keys of tensors of different kinds on the ranks, as above
        self._structures: list[_Structure] = []  # every rank's last one; on rank 0 only
        self._nestings: dict[str, _Nesting] = {}  # by digest, those of all ranks; on rank 0 only
        self._all_groups: list[Group] = []  # on rank 0 only
        self._num_shards = 0  # on rank 0 only
        self._noted: frozenset[str] = frozenset()
        self._recorded = b""  # of all ranks' structures; on rank 0 only

    @collection_paused()
    def agree(self, request: SaveRequest) -> Agreed:
        """Flatten this rank's state, and agree with the others on who writes what. Collective.

        Raises:
            SaveError, PlanError, ConfigError: on every rank, if any rank brought or met an error, or if ranks hold
                different things under one key.
        """
        prepared = self._prepare(request, None)
        while True:
            try:
                job, reused = self._settle(request, prepared)
            except _BelongsToRanks as found:
                # Once a part is stored for each rank, it stays so: its structure no longer changes with its values.
                self._per_rank |= found.parts
                self._by_shard |= found.by_shard
                prepared = self._prepare(request, prepared)
            else:
                self._num_saves += 1
                return Agreed(prepared, job, reused)

    def committed(self, frozen: FrozenFile | None) -> None:
        """Take note that the last save is committed, with this file of frozen tensors."""
        if frozen is not None:
            self._frozen = frozen

    def _prepare(self, request: SaveRequest, before: Prepared | None) -> Prepared:
        """Flatten and encode this rank's state, or again what was got before. An error is kept for the exchange."""
        try:
            if before is not None:
                state, modules = before.state, before.modules
            else:
                given = request.make_state()
                state, modules = unwrap_stateful(given), [v for v in given.values() if isinstance(v, nn.Module)]
            own = {name: {f"rank{self._comm.rank}": state[name]} for name in self._per_rank if name in state}
            whole = ByName({**state, **own}) if isinstance(state, ByName) else {**state, **own}
            flat = flatten(whole, self._by_shard)
            if (dtype := request.dtype) is not None:
                flat = replace(flat, tensors={key: stored_as(leaf, dtype) for key, leaf in flat.tensors.items()})
            objects = {key: self._encoded(key, value) for key, value in flat.objects.items()}
            buffers = _buffers_among(flat.tensors.values(), [*request.modules, *modules])
            frozen = _frozen_among(flat.tensors.values(), [*request.modules, *modules], request)
            layout = replace(flat.layout(), buffers=buffers, frozen=frozen)
            skeleton = dump_parts(flat.skeleton)
            fingerprint = f"{layout.fingerprint(flat.paths)} {_digest(skeleton)}"
            return Prepared(state, modules, flat, objects, layout, fingerprint, skeleton)
        except BaseException as cause:  # noqa: BLE001 - a state_dict() of the user's may raise anything
            return _nothing(failure_on(self._comm.rank, cause, SaveError))

    def _encoded(self, key: str, value: Any) -> bytes | Snapshot:
        copied = snapshot(value) if self._may_defer else None
        return copied if copied is not None else encode_object(key, value)

    def _settle(self, request: SaveRequest, prepared: Prepared) -> tuple[SaveJob, bool]:
        """This rank's job, and whether the previous plan was reused. Collective.

        Rank 0 plans for all, begins the attempt, and gives each rank its part.
        """
        where = f"{self._storage.root}/{request.target}"
        # Nodes may call their own folders as they like: the step is the same.
        offer = replace(self._offer(prepared), target=where if self._nodes is None else split(request.target)[1])
        with meeting(self._comm, f"saving {where}"):
            offers = self._comm.gather(offer)
            answer = self._answer(request, prepared, offers)
        if answer.error is not None or answer.by_shard:
            self._forget(prepared)
            raise answer.error or _BelongsToRanks(by_shard=answer.by_shard)
        if answer.plan is not None:
            self._plan, self._groups, self._frozen = answer.plan, answer.groups or {}, answer.earlier
        self._fingerprint = prepared.fingerprint
        begun = answer.begun or self._compare(request, prepared, answer.depth or "values")
        assert self._plan is not None
        info = self._with_structure(request.info) if self._comm.rank == 0 else answer.info
        attempt = begun.attempt if self._nodes is None else self._begin_on_nodes(request, prepared, begun.save_id, info)
        job = SaveJob(
            target=request.target,
            attempt=attempt,
            save_id=begun.save_id,
            rank=self._comm.rank,
            world_size=self._comm.world_size,
            plan=self._plan,
            info=info,
            keep=request.keep if info is not None else None,
            timeout_s=self._timeout_s,
            form=answer.form,
            num_threads=self._num_threads,
            order=request.info.lineage.order if request.info.lineage is not None else 0,
            earlier=self._earlier(request),
            part=self._nodes.part_of(self._comm.rank) if self._nodes is not None else None,
        )
        return job, answer.plan is None

    def _answer(self, request: SaveRequest, prepared: Prepared, offers: list[_Offer] | None) -> _Answer:
        """Send rank 0 what it asks for until it knows all of this rank, and return its answer. Collective."""
        answers: Sequence[_Answer | _Ask] | None = None
        if offers is not None:
            answers = self._ask(offers) or self._plan_for_all(request, offers)
        answer = self._comm.scatter(answers)
        if not isinstance(answer, _Ask):
            return answer
        brought = self._comm.collect(_Nesting.of(prepared), answer.ranks)
        self._nestings |= {nesting.digest(): nesting for nesting in brought}
        return self._comm.scatter(self._plan_for_all(request, offers) if offers is not None else None)

    def _ask(self, offers: list[_Offer]) -> list[_Ask]:
        """Ask the lowest rank of each nesting that is not known; nobody, if all are or the save fails anyhow."""
        if any(offer.error is not None for offer in offers):
            return []
        told = [offer.structure.nesting if offer.structure is not None else "" for offer in offers]
        unknown = set(told) - self._nestings.keys() - {""}
        return [_Ask(sorted(told.index(nesting) for nesting in unknown))] * len(offers) if unknown else []

    def _earlier(self, request: SaveRequest) -> FrozenFile | None:
        """The file of the step that this save descends from, unless it is time to write it anew."""
        lineage, frozen = request.info.lineage, self._frozen
        if lineage is None or frozen is None or frozen.save_id != lineage.parent:
            return None
        is_due = 0 < request.full_every <= lineage.order - frozen.since
        return None if is_due else frozen

    def _begin_on_nodes(self, request: SaveRequest, prepared: Prepared, save_id: str, info: SaveInfo | None) -> str:
        """Have each node's first rank make the attempt in its own folder; its name. Collective."""
        attempt, failure = None, None
        if info is not None:
            try:
                attempt = begin_attempt(self._storage, request.target, save_id)
            except BaseException as cause:  # noqa: BLE001 - the other ranks wait
                failure = failure_on(self._comm.rank, cause, SaveError)
        try:
            raise_together(self._comm, failure)
        except BaseException:
            self._forget(prepared)
            if attempt is not None:
                abort_attempt(self._storage, attempt)
            raise
        return join(split(request.target)[0], ATTEMPT_PREFIX + save_id)

    def _forget(self, prepared: Prepared) -> None:
        """After a failure no rank may count on what rank 0 remembers."""
        self._plan = None
        self._structures, self._all_groups = [], []
        raise_interrupt(prepared.error)

    def _offer(self, prepared: Prepared) -> _Offer:
        if prepared.error is not None:
            return _Offer(None, prepared.error)
        if self._plan is None or prepared.fingerprint != self._fingerprint:
            return _Offer(_Structure(prepared.layout, _Nesting.of(prepared).digest()), None)
        try:
            return _Offer(None, None, self._summaries(prepared, "values"))
        except BaseException as cause:  # noqa: BLE001 - an interrupt: rank 0 waits for the offer
            return _Offer(None, failure_on(self._comm.rank, cause, SaveError))

    def _held(self, prepared: Prepared, index: int, depth: Depth) -> Digests:
        return digests_of(self._groups[index], prepared.flat.tensors, encoded(prepared.objects), depth)

    def _summaries(self, prepared: Prepared, depth: Depth) -> dict[int, bytes]:
        return {index: summary_of(self._held(prepared, index, depth)) for index in self._groups}

    def _plan_for_all(self, request: SaveRequest, offers: list[_Offer]) -> list[_Answer]:
        """The answer of rank 0 to each rank's offer. Errors become answers, so that no rank is left waiting."""
        try:
            failure = merge_failures([offer.error for offer in offers])
            if failure is not None:
                raise failure
            targets = [offer.target for offer in offers]
            if len(set(targets)) > 1:
                lines = "".join(f"\n  {line}" for line in listed(by_ranks(targets)))
                raise SaveError(f"every rank must save the same step in the same folder, found{lines}")
            is_new = any(offer.structure is not None for offer in offers)
            plans: list[WritePlan | None] = [None] * len(offers)
            groups: list[Mapping[int, Group] | None] = [None] * len(offers)
            if is_new and (unlike := self._learn(offers)):
                if unlike <= self._by_shard:
                    key = min(unlike)
                    raise SaveError(
                        f"ranks hold values of different kinds under the key '{key}'; rename one of them", key=key
                    )
                return [_Answer(by_shard=unlike)] * len(offers)
            if is_new:
                nodes = self._nodes.groups if self._nodes is not None else None
                plans = list(plan_save([found.layout for found in self._structures], nodes))
                self._num_shards = sum(plan.num_items for plan in plans if plan is not None)
                self._all_groups = groups_in_common([found.layout for found in self._structures])
                groups = [
                    {n: group for n, group in enumerate(self._all_groups) if rank in group.ranks}
                    for rank in range(len(offers))
                ]
            depth = self._depth(offers, is_new=is_new)
            form = request.make_form(self._dtypes()) if request.make_form is not None else None
            begun = self._begin(request) if depth is None else None
            earlier = self._files_of_parent(request, plans) if self._nodes is None else {}
            infos = self._infos(request, len(offers))
            return [
                _Answer(
                    plan,
                    held,
                    earlier.get(plan.frozen.file) if plan and plan.frozen else None,
                    form,
                    depth,
                    begun,
                    info,
                )
                for plan, held, info in zip(plans, groups, infos, strict=True)
            ]
        except BaseException as cause:  # noqa: BLE001 - every rank must hear of it
            return self._refuse(offers, cause)

    def _files_of_parent(self, request: SaveRequest, plans: Sequence[WritePlan | None]) -> Mapping[str, FrozenFile]:
        """Files of the step before that new plans may share, where a run was resumed or its structure has changed."""
        if request.info.lineage is None or all(plan is None or plan.frozen is None for plan in plans):
            return {}
        return frozen_files_of_parent(self._storage, request.target, request.info.lineage)

    def _depth(self, offers: list[_Offer], *, is_new: bool) -> Depth | None:
        """The depth at which to compare what ranks have in common; None if there is nothing more to compare."""
        if not self._all_groups:
            return None
        if self._check_replicas and self._num_saves % self._check_replicas == 0:
            return "whole"
        if is_new:
            return "sample"
        return "values" if unlike_groups(self._all_groups, [offer.common for offer in offers]) else None

    def _begin(self, request: SaveRequest) -> _Begun:
        info = self._with_structure(request.info)
        check_fits(info, num_shards=self._num_shards, world_size=self._comm.world_size)
        save_id = new_save_id()
        if self._nodes is not None:
            return _Begun(save_id, "")
        with watched(f"rank 0 is making the folder for the save of {self._storage.root}/{request.target}"):
            return _Begun(save_id, begin_attempt(self._storage, request.target, save_id))

    def _infos(self, request: SaveRequest, num_ranks: int) -> list[SaveInfo | None]:
        """Scatter what each rank needs to know of the manifest that it writes; None if it writes none, or is rank 0."""
        if self._nodes is None:
            return [None] * num_ranks
        writers = {ranks[0] for ranks in self._nodes.groups} - {0}
        info = self._with_structure(request.info)
        return [info if rank in writers else None for rank in range(num_ranks)]

    def _compare(self, request: SaveRequest, prepared: Prepared, depth: Depth) -> _Begun:
        """Compare what ranks have in common; the attempt, once nothing differs that must not. Collective.

        First one digest a group is gathered; only of groups that differ one for each key.
        """
        outcome = self._exchanged(
            lambda: self._summaries(prepared, depth), lambda brought: self._first_look(request, brought)
        )
        if outcome.begun is None and outcome.error is None:
            unlike = [index for index in outcome.unlike if index in self._groups]
            outcome = self._exchanged(
                lambda: (
                    {index: self._held(prepared, index, depth) for index in unlike},
                    {key: str(path[0]) for key, path in prepared.flat.paths.items()} if unlike else {},
                    {key: leaf.shard_of for key, leaf in prepared.flat.tensors.items() if leaf.shard_of},
                    prepared.buffers,
                    host_name(),
                ),
                lambda brought: self._close_look(request, outcome.unlike, brought),
            )
        if outcome.begun is None:
            self._forget(prepared)
        if outcome.error is not None:
            raise outcome.error
        if outcome.begun is None:
            raise _BelongsToRanks(outcome.per_rank, outcome.by_shard)
        return outcome.begun

    def _exchanged(self, bring: Callable[[], T], decide: Callable[[list[T]], _Outcome]) -> _Outcome:
        """Rank 0 decides on what every rank brings; an error of any rank becomes the outcome on all. Collective."""
        mine: T | None = None
        failure = None
        try:
            mine = bring()
        except BaseException as cause:  # noqa: BLE001 - the other ranks wait
            failure = failure_on(self._comm.rank, cause, SaveError)
        brought = self._comm.gather((mine, failure))
        outcome = None
        if brought is not None:
            try:
                met = merge_failures([error for _, error in brought])
                outcome = _Outcome(error=met) if met else decide([value for value, _ in brought])  # type: ignore[misc]
            except BaseException as cause:  # noqa: BLE001 - the other ranks wait
                outcome = _Outcome(error=_as_save_error(cause))
        found = self._comm.broadcast(outcome)
        raise_interrupt(failure)
        assert found is not None
        return found

    def _first_look(self, request: SaveRequest, brought: list[dict[int, bytes]]) -> _Outcome:
        unlike = unlike_groups(self._all_groups, brought)
        return _Outcome(unlike=unlike) if unlike else _Outcome(self._begin(request))

    def _close_look(self, request: SaveRequest, unlike: Sequence[int], brought: list[_Brought]) -> _Outcome:
        roots = {key: root for _, found, *_ in brought for key, root in found.items()}
        shards = {key: whole for _, _, found, *_ in brought for key, whole in found.items()}
        found = differences(self._all_groups, unlike, [held for held, *_ in brought])
        if own := frozenset(shards[one.key] for one in found if one.key in shards):
            return _Outcome(by_shard=own)
        verdict = judge(
            found,
            per_rank=set(request.per_rank) - self._per_rank,
            roots=roots,
            buffers=frozenset[str]().union(*(buffers for *_, buffers, _ in brought)),
            hosts=[host for *_, host in brought],
        )
        if verdict.error is not None or verdict.per_rank:
            return _Outcome(per_rank=verdict.per_rank, error=verdict.error)
        self._note_buffers(verdict.buffers)
        return _Outcome(self._begin(request))

    def _note_buffers(self, keys: Sequence[str]) -> None:
        if keys and not self._noted.issuperset(keys):
            self._noted |= set(keys)
            log.info(
                "buffers differ between ranks, as under data parallelism; those of the lowest rank that holds them are "
                "stored: %s",
                ", ".join(listed(list(keys), 3)),
            )

    def _refuse(self, offers: list[_Offer], cause: BaseException) -> list[_Answer]:
        self._structures = []
        return [_Answer(error=_as_save_error(cause)) for _ in offers]

    def _learn(self, offers: list[_Offer]) -> frozenset[str]:
        """Take note of new structures; the keys of tensors that are of different kinds on the ranks."""
        if not self._structures:
            self._structures = [_Structure(LocalLayout((), ()))] * len(offers)
        for rank, offer in enumerate(offers):
            if offer.structure is not None:
                self._structures[rank] = offer.structure
        in_use = dict.fromkeys(found.nesting for found in self._structures if found.nesting)
        self._nestings = {nesting: self._nestings[nesting] for nesting in in_use}
        self._recorded, unlike = merge_parts([nesting.skeleton for nesting in self._nestings.values()])
        return unlike

    def _dtypes(self) -> dict[str, str]:
        """The dtype in which each tensor is stored, of all ranks' tensors."""
        return {spec.key: spec.dtype for found in self._structures for spec in found.layout.tensors}

    def _with_structure(self, info: SaveInfo) -> SaveInfo:
        paths = {key: path for nesting in self._nestings.values() for key, path in nesting.paths.items()}
        empty = list(dict.fromkeys(path for nesting in self._nestings.values() for path in nesting.empty))
        # `str`: a TorchVersion would make the writer process import torch to unpickle it.
        extra = dict(info.extra)
        if empty:
            extra[EMPTY_MAPPINGS] = empty
        if self._per_rank:
            extra[PER_RANK] = sorted(self._per_rank)
        return replace(
            info, paths=paths, structure=self._recorded, extra=extra, producer={"torch": str(torch.__version__)}
        )


def _digest(skeleton: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, part in skeleton.items():
        digest.update(f"{name} {len(part)} ".encode() + part)
    return digest.hexdigest()


def _as_save_error(cause: BaseException) -> MilepostError:
    """An error that rank 0 met on behalf of all ranks."""
    if isinstance(cause, StorageError):
        cause = SaveError(cause.message, path=cause.path)
    return failure_on(0, cause, SaveError)


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
    """The address of a tensor's elements; None if it has none. Parts of one memory (FSDP1's) are told apart."""
    memory = _memory_of(tensor)
    return (tensor.device, tensor.data_ptr()) if memory is not None and tensor.numel() else None


def _memory_of(tensor: torch.Tensor) -> tuple[torch.device, int] | None:
    """The identity of a tensor's memory; None where it has none (meta tensors, wrappers)."""
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None
    return (tensor.device, pointer) if pointer else None
