"""The agreement of the ranks on a save before it begins.

::

        offers      gather      path, error, digests of the state (if nothing changed: of the replicated state)
        asked       broadcast   ranks whose description rank 0 lacks; or the answer at once: nothing has changed
        described   collect     from these ranks only
        sharing     broadcast   the kind of each rank, and the state common to several kinds
        placed      gather      boxes not derivable from a mesh, if any; and scatter: who writes them
        compared    gather      digests of replicated state, after planning; and broadcast: the attempt
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

from milepost.collective.collector import collection_paused
from milepost.collective.comm import Comm, by_ranks, errors_shared, failure_on, merge_failures, raise_interrupt
from milepost.collective.meeting import meeting
from milepost.collective.progress import watched
from milepost.config import NUM_IO_THREADS
from milepost.errors import MilepostError, SaveError, listed
from milepost.run.assemble import SaveInfo, check_fits
from milepost.run.attempts import abort_attempt, begin_attempt, new_save_id
from milepost.run.step_names import ATTEMPT_PREFIX
from milepost.saving.comparison import Comparison, as_save_error, summaries_of
from milepost.saving.frozen import FrozenFile, frozen_files_of_parent
from milepost.saving.job import SaveJob
from milepost.saving.last_plan import LastPlan
from milepost.saving.messages import Answer, Ask, Begun, BelongsToRanks, Given, Offer, Shared
from milepost.saving.nodes import Nodes
from milepost.saving.replicas import Depth, Summary, host_name, unlike_groups
from milepost.saving.request import Manner, Prepared, SaveRequest, prepare_state
from milepost.saving.structure import Roster, Structure
from milepost.storage.base import Storage, join, split
from milepost.tensors.plan import LocalLayout, deal, file_name
from milepost.tensors.sharing import FromRank0, Group, groups_in_common, only, plan_alone

log = logging.getLogger("milepost")

TIMEOUT_S = 600.0
"""Seconds that a rank waits for the others' records before it abandons a save."""


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """A save agreed by all ranks."""

    prepared: Prepared
    job: SaveJob
    reused_plan: bool


class SaverSettings(TypedDict, total=False):
    """The settings of a saver, of either kind."""

    timeout_s: float
    num_threads: int
    check_replicas: int
    nodes: Nodes | None


class Agreement:
    """Turns each rank's state into its job, reusing the plan while the structure is unchanged."""

    def __init__(
        self,
        storage: Storage,
        comm: Comm,
        *,
        may_defer: bool = False,
        last: LastPlan | None = None,
        **settings: Unpack[SaverSettings],
    ):
        self._storage = storage
        self._comm = comm
        self._nodes = settings.get("nodes")
        self._timeout_s = settings.get("timeout_s", TIMEOUT_S)
        self._num_threads = settings.get("num_threads", NUM_IO_THREADS)
        self._check_replicas = settings.get("check_replicas", 0)
        # Ranks compare encoded state. The result, what differs between ranks, is the same on all of them.
        self._manner = Manner(may_defer=may_defer and comm.world_size == 1)
        self._num_saves = 0
        self._last = last if last is not None else LastPlan()
        self._frozen: FrozenFile | None = None  # this rank's, in the last committed step
        self._noted: frozenset[str] = frozenset()

    @collection_paused()
    def agree(self, request: SaveRequest) -> Agreed:
        """Flatten this rank's state, and agree with the others on who writes what. Collective.

        Raises:
            SaveError, PlanError, ConfigError: on every rank, if any rank had an error, or if ranks hold different data
            under one key.
        """
        prepared = prepare_state(request, self._comm, self._manner)
        while True:
            try:
                job, reused = self._settle(request, prepared)
            except BelongsToRanks as found:
                # Once a part is stored per rank, it stays so: its structure no longer changes with its values.
                self._manner = replace(
                    self._manner,
                    per_rank=self._manner.per_rank | found.parts,
                    by_shard=self._manner.by_shard | found.by_shard,
                )
                prepared = prepare_state(request, self._comm, self._manner, prepared)
            else:
                self._num_saves += 1
                return Agreed(prepared, job, reused)

    def committed(self, frozen: FrozenFile | None) -> None:
        """Record that the last save is committed, with this file of frozen tensors."""
        if frozen is not None:
            self._frozen = frozen

    def _settle(self, request: SaveRequest, prepared: Prepared) -> tuple[SaveJob, bool]:
        """Return this rank's job, and whether the previous plan was reused. Collective."""
        try:
            answer = self._answer(request, prepared)
            given = self._given(request, prepared, answer.shared) if answer.shared is not None else None
            if answer.begun is not None:
                begun = answer.begun
            else:
                begun = self._compare(request, prepared, answer, given)
            info = self._info(request, answer)
            attempt = begun.attempt if self._nodes is None else self._begin_on_nodes(request, begun.save_id, info)
        except BaseException:
            self._forget()
            raise
        assert self._last.plan is not None
        job = SaveJob(
            target=request.target,
            attempt=attempt,
            save_id=begun.save_id,
            rank=self._comm.rank,
            world_size=self._comm.world_size,
            plan=self._last.plan,
            info=info,
            keep=request.keep if info is not None else None,
            timeout_s=self._timeout_s,
            form=answer.form,
            num_threads=self._num_threads,
            order=request.info.lineage.order if request.info.lineage is not None else 0,
            earlier=self._earlier(request),
            part=self._nodes.part_of(self._comm.rank) if self._nodes is not None else None,
            hosts=self._last.hosts,
        )
        return job, answer.shared is None

    def _forget(self) -> None:
        """Drop the plan: after a failure all ranks plan again."""
        self._last.token, self._last.plan, self._last.roster = "", None, Roster()

    def _earlier(self, request: SaveRequest) -> FrozenFile | None:
        """Return the frozen file of the parent step, unless it is due to be rewritten."""
        lineage, frozen = request.info.lineage, self._frozen
        if lineage is None or frozen is None or frozen.save_id != lineage.parent:
            return None
        is_due = 0 < request.full_every <= lineage.order - frozen.since
        return None if is_due else frozen

    def _begin_on_nodes(self, request: SaveRequest, save_id: str, info: SaveInfo | None) -> str:
        """Have each node's first rank create the attempt in its own folder; returns its name. Collective."""
        attempt = None
        try:
            with errors_shared(self._comm, SaveError):
                if info is not None:
                    attempt = begin_attempt(self._storage, request.target, save_id)
        except BaseException:
            if attempt is not None:
                abort_attempt(self._storage, attempt)
            raise
        return join(split(request.target)[0], ATTEMPT_PREFIX + save_id)

    def _info(self, request: SaveRequest, answer: Answer) -> SaveInfo | None:
        """Return the content of the manifest that this rank writes; None if it writes none."""
        if self._comm.rank == 0 or (self._nodes is not None and self._nodes.is_first(self._comm.rank)):
            return self._last.record.put_into(answer.info or request.info, self._manner.per_rank)
        return None

    # ---- who writes what ----

    def _answer(self, request: SaveRequest, prepared: Prepared) -> Answer:
        """Return rank 0's answer, once it has the missing descriptions. Collective.

        Raises any rank's error, and any reason why the ranks can't save.
        """
        where = f"{self._storage.root}/{request.target}"
        # Nodes may have different folder names: the step is the same.
        target = where if self._nodes is None else split(request.target)[1]
        offer = self._offer(prepared, f"{target} ({request.info.kind})")
        with meeting(self._comm, f"saving {where}"):
            offers = self._comm.gather(offer)
            answer = self._comm.broadcast(self._ask_or_answer(request, offers) if offers is not None else None)
        if isinstance(answer, Ask):
            brought = self._comm.collect(self._described(prepared), answer.ranks)
            answer = self._comm.broadcast(self._learn(request, offers, brought) if offers is not None else None)
        raise_interrupt(offer.error)
        assert isinstance(answer, Answer)
        if answer.error is not None or answer.by_shard or answer.per_rank:
            raise answer.error or BelongsToRanks(answer.per_rank, answer.by_shard)
        return answer

    def _offer(self, prepared: Prepared, target: str) -> Offer:
        last = self._last
        if prepared.error is not None:
            return Offer(target, prepared.error)
        try:
            if last.plan is not None and last.fingerprint == self._place(prepared):
                common = summaries_of(prepared, last.groups, "values")
                return Offer(target, None, last.token, last.digests, common=common)
            structure = prepared.structure
            last.token, last.plan = "", None
            last.digests = structure.shared.digest(), structure.own.digest()
            return Offer(target, None, "", last.digests, structure.own, host_name())
        except BaseException as cause:  # noqa: BLE001 - an interrupt: rank 0 waits for the offer
            return Offer(target, failure_on(self._comm.rank, cause, SaveError))

    def _place(self, prepared: Prepared) -> str:
        """Return the key of the plan's validity on this rank."""
        nodes = self._nodes.groups if self._nodes is not None else ()
        fingerprint = self._last.fingerprint_of(prepared.layout, prepared.nesting)
        return f"{self._comm.name} {self._comm.rank} {self._comm.world_size} {nodes} {fingerprint}"

    def _described(self, prepared: Prepared) -> Structure | MilepostError:
        try:
            return prepared.structure
        except BaseException as cause:  # noqa: BLE001 - rank 0 waits for it
            return failure_on(self._comm.rank, cause, SaveError)

    def _ask_or_answer(self, request: SaveRequest, offers: Sequence[Offer]) -> Ask | Answer:
        """Return rank 0's answer to all offers. Errors become answers, so that no rank is left waiting."""
        try:
            failure = merge_failures([offer.error for offer in offers])
            if failure is not None:
                raise failure
            targets = [offer.target for offer in offers]
            if len(set(targets)) > 1:
                lines = "".join(f"\n  {line}" for line in listed(by_ranks(targets)))
                raise SaveError(f"every rank must save the same step and kind in the same folder, found{lines}")
            if self._last.token and all(offer.token == self._last.token for offer in offers):
                depth = self._depth([offer.common for offer in offers])
                return self._answer_with(request, Answer(depth, begun=self._begin(request) if depth is None else None))
            roster = self._last.roster
            roster.add_own({offer.digests[1]: offer.own for offer in offers if offer.own is not None})
            before = self._last.hosts if len(self._last.hosts) == len(offers) else ("",) * len(offers)
            self._last.hosts = tuple(offer.host or host for offer, host in zip(offers, before, strict=True))
            return Ask(roster.ask([offer.digests for offer in offers]))
        except BaseException as cause:  # noqa: BLE001 - the error must reach every rank
            return Answer(error=as_save_error(cause))

    def _learn(
        self, request: SaveRequest, offers: Sequence[Offer], brought: Sequence[Structure | MilepostError]
    ) -> Answer:
        """Return rank 0's answer to new structures: the data that all ranks need for their plans."""
        try:
            for structure in brought:
                if isinstance(structure, MilepostError):
                    raise structure
            last, roster = self._last, self._last.roster
            roster.learn([offer.digests for offer in offers], [one for one in brought if isinstance(one, Structure)])
            if apart := roster.unlike_below(set(request.per_rank) - self._manner.per_rank):
                return Answer(per_rank=apart)
            last.record, unlike = roster.record()
            if unlike and unlike <= self._manner.by_shard:
                key = min(unlike)
                text = f"ranks hold values of different kinds under the key '{key}'; rename one of them"
                raise SaveError(text, key=key)
            if unlike:
                return Answer(by_shard=unlike)
            sharing = roster.sort_out()
            last.num_shards = sharing.num_shards
            shared = Shared(
                token=new_save_id(),
                sharing=sharing,
                gives=bool(sharing.placed) or (roster.has_frozen and self._nodes is None),
                record=last.record if self._nodes is not None else None,
            )
            depth: Depth = "whole" if self._is_check_due else "sample"
            return self._answer_with(request, Answer(depth, shared=shared))
        except BaseException as cause:  # noqa: BLE001 - the error must reach every rank
            return Answer(error=as_save_error(cause))

    def _answer_with(self, request: SaveRequest, answer: Answer) -> Answer:
        """Return the answer, with the request's data for all ranks."""
        return replace(
            answer,
            form=request.make_form(self._last.roster.dtypes()) if request.make_form is not None else None,
            info=request.info if self._nodes is not None else None,
        )

    def _given(self, request: SaveRequest, prepared: Prepared, shared: Shared) -> Given:
        """Return rank 0's further data for this rank, given the boxes of placed tensors on each rank. Collective."""
        if not shared.gives:
            return Given()
        layouts = self._comm.gather(only(prepared.layout, shared.sharing.placed))
        given = self._comm.scatter(self._give(request, layouts) if layouts is not None else None)
        if given.error is not None:
            raise given.error
        return given

    def _give(self, request: SaveRequest, layouts: Sequence[LocalLayout]) -> list[Given]:
        try:
            dealt = deal(layouts, self._nodes.groups if self._nodes is not None else None)
            self._last.num_shards += sum(len(one.moving) + len(one.frozen) for one in dealt)
            groups: list[list[Group]] = [[] for _ in layouts]
            for group in groups_in_common(layouts):
                for rank in group.ranks:
                    groups[rank].append(group)
            earlier: Mapping[str, FrozenFile] = {}
            if request.info.lineage is not None and self._last.roster.has_frozen and self._nodes is None:
                # After a resume, or a change of structure.
                earlier = frozen_files_of_parent(self._storage, request.target, request.info.lineage)
            return [
                Given(FromRank0(dealt[rank], tuple(groups[rank])), earlier.get(file_name(rank, 1)))
                for rank in range(len(layouts))
            ]
        except BaseException as cause:  # noqa: BLE001 - the error must reach every rank
            return [Given(error=as_save_error(cause))] * len(layouts)

    def _plan(self, prepared: Prepared, shared: Shared, given: Given) -> None:
        """Create and store this rank's new plan."""
        rank = self._comm.rank
        plan, groups = plan_alone(
            *(rank, prepared.layout, shared.sharing),
            own=prepared.structure.own.keys,
            given=given.placed,
            node=self._nodes.part_of(rank).ranks if self._nodes is not None else None,
        )
        last = self._last
        last.plan, last.groups = plan, {group.digest(): group for group in groups}
        last.token, last.fingerprint = shared.token, self._place(prepared)
        last.record = shared.record if shared.record is not None else last.record
        self._frozen = given.earlier if plan.frozen is not None else None

    # ---- what they have in common ----

    @property
    def _is_check_due(self) -> bool:
        return bool(self._check_replicas) and self._num_saves % self._check_replicas == 0

    def _depth(self, common: Sequence[Mapping[bytes, Summary]]) -> Depth | None:
        """Return the depth of the comparison for a reused plan; None if there is nothing more to compare."""
        if not any(common):
            return None
        if self._is_check_due:
            return "whole"
        return "values" if unlike_groups(common) else None

    def _begin(self, request: SaveRequest) -> Begun:
        info = self._last.record.put_into(request.info, self._manner.per_rank)
        check_fits(info, num_shards=self._last.num_shards, world_size=self._comm.world_size)
        save_id = new_save_id()
        if self._nodes is not None:
            return Begun(save_id, "")
        with watched(f"rank 0 is making the folder for the save of {self._storage.root}/{request.target}"):
            return Begun(save_id, begin_attempt(self._storage, request.target, save_id))

    def _compare(self, request: SaveRequest, prepared: Prepared, answer: Answer, given: Given | None) -> Begun:
        """Plan, if the structure is new, compare replicated state, and return the attempt. Collective."""

        def plan() -> Mapping[bytes, Group]:
            if answer.shared is not None and given is not None:
                self._plan(prepared, answer.shared, given)
            return self._last.groups

        comparison = Comparison(
            *(self._comm, prepared, answer.depth or "values"),
            per_rank=frozenset(request.per_rank) - self._manner.per_rank,
            begin=lambda: self._begin(request),
            note_buffers=self._note_buffers,
        )
        return comparison.run(plan)

    def _note_buffers(self, keys: Sequence[str]) -> None:
        if keys and not self._noted.issuperset(keys):
            self._noted |= set(keys)
            log.info(
                "buffers differ between ranks, as under data parallelism; those of the lowest rank that holds them are "
                "stored: %s",
                ", ".join(listed(list(keys), 3)),
            )
