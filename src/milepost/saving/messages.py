"""Messages between rank 0 and the other ranks before a save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from milepost.errors import MilepostError
from milepost.run.assemble import SaveInfo
from milepost.saving.frozen import FrozenFile
from milepost.saving.job import Form
from milepost.saving.replicas import Depth, Summary
from milepost.saving.structure import Portion, Record
from milepost.tensors.sharing import FromRank0, Sharing


@dataclass(frozen=True, slots=True)
class Offer:
    """A rank's description of its state, and the path it saves to."""

    target: str = ""
    error: MilepostError | None = None
    token: str = ""
    """Of the plan that the rank would use again."""
    told: tuple[str, str] = ("", "")
    own: Portion | None = None
    """Without a plan: what no other rank has like it."""
    host: str = ""
    common: Mapping[bytes, Summary] = field(default_factory=dict)
    """With a plan: of each group that the rank is in, a digest of its values."""


@dataclass(frozen=True, slots=True)
class Ask:
    """In place of an answer: a new plan is made, and these ranks have yet to bring their structures."""

    ranks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """Rank 0's answer to all ranks, once it knows their structures."""

    depth: Depth | None = None
    """How to compare what ranks have in common before the save begins; None: it was done with the offers."""
    form: Form | None = None
    begun: Begun | None = None
    info: SaveInfo | None = None
    """Where several ranks write a manifest: what it says."""
    error: MilepostError | None = None
    by_shard: frozenset[str] = frozenset()
    """Keys of DTensors whose shards are to be stored one by one: nothing is agreed on yet."""
    per_rank: frozenset[str] = frozenset()
    """Names whose values are to be stored for each rank, as above."""
    shared: Shared | None = None
    """For a new plan."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Everything that all ranks need for a new plan."""

    token: str
    sharing: Sharing
    gives: bool
    """Whether rank 0 has something for each rank besides."""
    record: Record | None
    """Where several ranks write a manifest."""


@dataclass(frozen=True, slots=True)
class Given:
    """Rank 0's contribution to one rank's new plan."""

    placed: FromRank0 = field(default_factory=FromRank0)
    earlier: FrozenFile | None = None
    """What the step before has of its file of frozen tensors."""
    error: MilepostError | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """The attempt that rank 0 has made for a save; where each node has a folder of its own, that is to be made."""

    save_id: str
    attempt: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a comparison: the attempt, or the decision on what differs."""

    begun: Begun | None = None
    unlike: Sequence[bytes] = ()
    per_rank: frozenset[str] = frozenset()
    by_shard: frozenset[str] = frozenset()
    error: MilepostError | None = None


class BelongsToRanks(Exception):
    """Raised on every rank: some of the state differs between ranks, and is to be stored for each.

    ``parts`` of the state, or keys of DTensors whose shards are of different kinds.
    """

    def __init__(self, parts: frozenset[str] = frozenset(), by_shard: frozenset[str] = frozenset()):
        super().__init__(parts, by_shard)
        self.parts = parts
        self.by_shard = by_shard
