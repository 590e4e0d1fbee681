"""``milepost.json``: the commit record of a checkpoint, and the vocabulary of everything that reads one.

The manifest names every item that is stored (a shard of a tensor, or a small object) with its place and its CRC-32,
so that listing, verifying, planning and converting need neither pickle nor torch. A checkpoint written by stock DCP
has none; ``catalog`` then builds the same objects from ``.metadata``, with ``None`` where nothing is known.
"""

# No `from __future__ import annotations`: msgspec would have to compile the text of each annotation on first use.

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import msgspec

from milepost.format.box import Box
from milepost.format.tags import tagged
from milepost.format.typed_json import MAX_COUNT, Count

MANIFEST_NAME = "milepost.json"
PART_NAME = "milepost.part.json"
"""As ``milepost.json``, of what one node holds of a step whose nodes have a folder each: no checkpoint by itself."""
SHARDS_NAME = "milepost.shards"
MAX_SHARDS_NBYTES = 16 << 30
"""Of ``milepost.shards``: the places of a billion shards."""
DIGESTS_NAME = "milepost.digests"
METADATA_NAME = ".metadata"
HF_FORMAT = "huggingface"
"""What ``extra["format"]`` says in the manifest of a folder that holds safetensors in place of records."""
FORMAT_VERSION = 2
BLOCK_NBYTES = 4 << 20
"""Raw tensor data is digested in blocks of this size, counted from the start of each item's data."""


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One stored box of a tensor: a ``torch.save`` record in a file.

    ``record_offset``/``record_nbytes`` frame the whole zip record in ``file``; ``data_offset`` is where the raw
    row-major bytes of the box begin, counted from the start of the file (None until a foreign record was looked at).
    """

    box: Box
    file: str
    record_offset: int
    record_nbytes: int
    data_offset: int | None
    data_nbytes: int
    crc32: int | None


class Overlap(NamedTuple):
    """A region that a stored shard has in common with some box of its tensor."""

    shard: int
    """Its number among the tensor's shards."""
    src: Box
    """In the coordinates of the shard's box."""
    dst: Box
    """In the coordinates of the other box."""


class TiledShards(Sequence[ShardEntry]):
    """Shards in columns: what can be had of them without looking at them one by one."""

    @property
    @abstractmethod
    def boxes(self) -> tuple[Box, ...]:
        """The box of each shard. The same object for tensors that are cut alike."""

    @property
    @abstractmethod
    def files(self) -> Sequence[str]:
        """The files that hold any of the shards, sorted."""

    @abstractmethod
    def block_bounds(self, block_nbytes: int) -> Sequence[int]:
        """The index of each shard's first block of raw data, counted over all shards; one more entry than shards."""

    @abstractmethod
    def overlaps(self, box: Box) -> Sequence[Overlap]:
        """All regions that the shards have in common with ``box``, in the order of the shards."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A stored tensor. ``dtype`` is torch's name without the prefix (``bfloat16``); ``shards`` cover ``shape`` once."""

    dtype: str
    shape: tuple[int, ...]
    shards: Sequence[ShardEntry]


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """A stored value that is not a tensor: one ``torch.save`` record. ``crc32`` is of the whole record."""

    file: str
    record_offset: int
    record_nbytes: int
    crc32: int | None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the checkpoint. ``crc32`` is of the whole file; None where it is not recorded (format 1)."""

    nbytes: int
    crc32: int | None = None
    content: str = ""
    """Of a file that later steps may share: an identity of its bytes, 32 hex digits; else empty."""
    since: int | None = None
    """Of such a file: the order (see ``Lineage``) of the save that wrote it."""


@dataclass(frozen=True, slots=True)
class BranchStart:
    """The step that a user named (``load_step``) for a branch to begin at."""

    step: Count
    save_id: str = ""
    """Of that step; empty for an external one."""
    launch: str = ""
    """The job that named it (of Slurm, of torchrun), so that its restarts are recognised; empty if it has no id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The place of a step in the history of its run. See ``milepost.run.branches``."""

    run: str
    """Id of the run: the same for all steps that descend from one beginning."""
    order: Count
    """Place in the order of commits in its folder; the highest was committed last. Not every number is used."""
    branch: str
    """Id of the branch: the same for all steps that follow each other without a going back between them."""
    parent: str = ""
    """Save id of the step that it descends from; empty at a beginning, or if that one has no save id."""
    parent_step: Count | None = None
    """Number of that step; None at a beginning."""
    trail: tuple[tuple[str, Count], ...] = ()
    """The older branches that it descends from: each with the order of the last step on it that is an ancestor. Steps
    without a lineage are the branch ``""``, in which a step's number is its order."""
    start: BranchStart | None = None
    """What the user named for the branch to begin at, if anything."""
    seen: Annotated[int, msgspec.Meta(ge=-1, le=MAX_COUNT)] = -1
    """The highest number of a step without a lineage that was in the folder at its commit; -1 if there was none."""


@dataclass(frozen=True, slots=True)
class PartTotal:
    """All that a checkpoint holds of one part of the training state (``model``, ``optimizer``, ...)."""

    part: str
    num_tensors: Count
    num_elements: Count
    nbytes: Count
    """Of the tensors, without their records' headers."""
    num_objects: Count
    dtypes: tuple[str, ...]
    """Most bytes first."""
    num_shards: Count = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a checkpoint. See ``docs/format.md`` for the JSON form."""

    step: int | None
    save_id: str
    created_s: float
    """Seconds since the epoch when the checkpoint was committed."""
    kind: str
    """``full`` (can be resumed from), ``model`` (weights alone) or ``state`` (a plain state dict)."""
    world_size: int
    layout: Mapping[str, int]
    """Degrees of parallelism it was saved under, by the trainer's names; may be empty."""
    producer: Mapping[str, str]
    """Name and version of the software that wrote it."""
    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, ObjectEntry]
    files: Mapping[str, FileEntry]
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    """Where each key stood in the nested state dict, as stock DCP records it in ``planner_data``."""
    structure: bytes = b""
    """The containers of the state dict, deflated, as ``milepost.tensors.tree`` records them; empty if unknown."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """JSON that the saver wished to keep beside it (``CheckpointManager`` stores the data fingerprint here)."""
    lineage: Lineage | None = None
    """None for a checkpoint that belongs to no run, or is older than lineages."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values that were measured at this step, by name. NaN stands for all that is not finite."""
    parts: tuple[PartTotal, ...] = ()
    """What a checkpoint without ``tensors`` (of Hugging Face files) comes to; else it follows from these."""

    def file_named(self, name: str) -> str | None:
        """The actual name of the file ``name`` in this checkpoint, with or without the save id; None if it has none."""
        return next((known for known in (name, tagged(name, self.save_id)) if known in self.files), None)
