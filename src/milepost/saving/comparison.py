"""Comparison of replicated state before a save. Collective.

First one digest per group of ranks is gathered, then one per key only for groups in which ranks differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from milepost.collective.comm import Comm, failure_on, merge_failures, raise_interrupt
from milepost.errors import MilepostError, SaveError, StorageError
from milepost.saving.messages import Begun, BelongsToRanks, Outcome
from milepost.saving.replicas import (
    Brought,
    Depth,
    Digests,
    Summary,
    digests_of,
    host_name,
    judge,
    keys_that_differ,
    summary_of,
    unlike_groups,
)
from milepost.saving.request import Prepared
from milepost.tensors.sharing import Group
from milepost.tensors.snapshot import encoded

T = TypeVar("T")


def held_by(prepared: Prepared, group: Group, depth: Depth) -> Digests:
    """Return this rank's digests of the state shared with the others of a group."""
    tensors, objects = prepared.flat.tensors, encoded(prepared.objects)
    return digests_of(group, tensors, objects, depth, always=prepared.of_loop)


def summaries_of(prepared: Prepared, groups: Mapping[bytes, Group], depth: Depth) -> dict[bytes, Summary]:
    """Return one digest for each of this rank's groups."""
    return {
        digest: Summary(len(group.ranks), summary_of(held_by(prepared, group, depth)))
        for digest, group in groups.items()
    }


class Comparison:
    """Compares the ranks' state, and has rank 0 ``begin`` the attempt once all replicas are equal."""

    def __init__(
        self,
        comm: Comm,
        prepared: Prepared,
        depth: Depth,
        *,
        per_rank: frozenset[str],
        begin: Callable[[], Begun],
        note_buffers: Callable[[Sequence[str]], None],
    ):
        self._comm = comm
        self._prepared = prepared
        self._depth = depth
        self._per_rank = per_rank
        self._begin = begin
        self._note_buffers = note_buffers

    def run(self, plan: Callable[[], Mapping[bytes, Group]]) -> Begun:
        """Compare and return the attempt. ``plan`` returns this rank's groups; its errors reach every rank. Collective.

        Values of the top-level names ``per_rank`` may differ: they are stored per rank.

        Raises any rank's error, BelongsToRanks, or an error if ranks hold different data under one key.
        """
        groups: Mapping[bytes, Group] = {}

        def bring() -> dict[bytes, Summary]:
            nonlocal groups
            groups = plan()
            return summaries_of(self._prepared, groups, self._depth)

        outcome = exchanged(self._comm, bring, self._first_look)
        if outcome.begun is None and outcome.error is None:
            unlike = {digest: groups[digest] for digest in outcome.unlike if digest in groups}
            outcome = exchanged(self._comm, lambda: self._bring(unlike), self._close_look)
        if outcome.error is not None:
            raise outcome.error
        if outcome.begun is None:
            raise BelongsToRanks(outcome.per_rank, outcome.by_shard)
        return outcome.begun

    def _bring(self, unlike: Mapping[bytes, Group]) -> Brought:
        prepared = self._prepared
        return Brought(
            held={digest: held_by(prepared, group, self._depth) for digest, group in unlike.items()},
            groups={digest: one for digest, one in unlike.items() if one.ranks[0] == self._comm.rank},
            roots={key: str(path[0]) for key, path in prepared.flat.paths.items()} if unlike else {},
            shards={key: leaf.shard_of for key, leaf in prepared.flat.tensors.items() if leaf.shard_of},
            buffers=prepared.layout.buffers,
            host=host_name(),
        )

    def _first_look(self, brought: Sequence[Mapping[bytes, Summary]]) -> Outcome:
        unlike = unlike_groups(brought)
        return Outcome(unlike=unlike) if unlike else Outcome(self._begin())

    def _close_look(self, brought: Sequence[Brought]) -> Outcome:
        found = keys_that_differ(brought)
        shards = {key: whole for one in brought for key, whole in one.shards.items()}
        if own := frozenset(shards[one.key] for one in found if one.key in shards):
            return Outcome(by_shard=own)
        verdict = judge(
            found,
            per_rank=self._per_rank,
            roots={key: root for one in brought for key, root in one.roots.items()},
            buffers=frozenset[str]().union(*(one.buffers for one in brought)),
            hosts=[one.host for one in brought],
        )
        if verdict.error is not None or verdict.per_rank:
            return Outcome(per_rank=verdict.per_rank, error=verdict.error)
        self._note_buffers(verdict.buffers)
        return Outcome(self._begin())


def exchanged(comm: Comm, bring: Callable[[], T], decide: Callable[[list[T]], Outcome]) -> Outcome:
    """Let rank 0 decide on all ranks' contributions; an error of any rank becomes the outcome on all. Collective."""
    mine: T | None = None
    failure = None
    try:
        mine = bring()
    except BaseException as cause:  # noqa: BLE001 - the other ranks wait
        failure = failure_on(comm.rank, cause, SaveError)
    brought = comm.gather((mine, failure))
    outcome = None
    if brought is not None:
        try:
            met = merge_failures([error for _, error in brought])
            outcome = Outcome(error=met) if met else decide([value for value, _ in brought])  # type: ignore[misc]
        except BaseException as cause:  # noqa: BLE001 - the other ranks wait
            outcome = Outcome(error=as_save_error(cause))
    found = comm.broadcast(outcome)
    raise_interrupt(failure)
    assert found is not None
    return found


def as_save_error(cause: BaseException) -> MilepostError:
    """Wrap an error of rank 0 for all ranks."""
    if isinstance(cause, StorageError):
        cause = SaveError(cause.message, path=cause.path)
    return failure_on(0, cause, SaveError)
