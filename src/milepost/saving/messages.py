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
    """Token of the plan that the rank would reuse."""
    digests: tuple[str, str] = ("", "")
    own: Portion | None = None
    """Without a plan: the state unique to this rank."""
    host: str = ""
    common: Mapping[bytes, Summary] = field(default_factory=dict)
    """With a plan: a digest of the values of each of the rank's groups."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Instead of an answer: a new plan is needed, and these ranks must send their structures."""

    ranks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """Rank 0's answer to all ranks, once it knows their structures."""

    depth: Depth | None = None
    """Depth of the comparison of replicated state before the save; None: done with the offers."""
    form: Form | None = None
    begun: Begun | None = None
    info: SaveInfo | None = None
    """Content of the manifest, if several ranks write one."""
    error: MilepostError | None = None
    by_shard: frozenset[str] = frozenset()
    """Keys of DTensors whose shards must be stored one by one: nothing is agreed yet."""
    per_rank: frozenset[str] = frozenset()
    """Names whose values must be stored per rank; also nothing is agreed yet."""
    shared: Shared | None = None
    """For a new plan."""


@dataclass(frozen=True, slots=True)
class Shared:
    """The data that all ranks need for a new plan."""

    token: str
    sharing: Sharing
    gives: bool
    """True if rank 0 has further data for each rank."""
    record: Record | None
    """Set if several ranks write a manifest."""


@dataclass(frozen=True, slots=True)
class Given:
    """Rank 0's contribution to one rank's new plan."""

    placed: FromRank0 = field(default_factory=FromRank0)
    earlier: FrozenFile | None = None
    """The previous step's file of frozen tensors."""
    error: MilepostError | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """The attempt created by rank 0 for a save; with per-node folders, the one to create."""

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
    """Raised on every rank: some of the state differs between ranks, and must be stored per rank.

    ``parts`` of the state, or keys of DTensors whose shards are of different kinds.
    """

    def __init__(self, parts: frozenset[str] = frozenset(), by_shard: frozenset[str] = frozenset()):
        super().__init__(parts, by_shard)
        self.parts = parts
        self.by_shard = by_shard
