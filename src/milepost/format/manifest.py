"""``milepost.json``: the commit record of a checkpoint, and the types used by all of its readers.

The manifest lists every stored item (a shard of a tensor, or a small object) with its location and CRC-32, so that
listing, verifying, planning and converting need neither pickle nor torch. A checkpoint written by stock DCP has none;
``catalog`` then builds the same objects from ``.metadata``, with ``None`` for unknown values.
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
"""Like ``milepost.json``, for one node's part of a step in per-node folders: not a checkpoint by itself."""
SHARDS_NAME = "milepost.shards"
MAX_SHARDS_NBYTES = 16 << 30
"""Size limit of ``milepost.shards``: the locations of a billion shards."""
DIGESTS_NAME = "milepost.digests"
METADATA_NAME = ".metadata"
HF_FORMAT = "huggingface"
"""``extra["format"]`` in the manifest of a folder that holds safetensors instead of records."""
FORMAT_VERSION = 2
BLOCK_NBYTES = 4 << 20
"""Raw tensor data is digested in blocks of this size, counted from the start of each item's data."""


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One stored box of a tensor: a ``torch.save`` record in a file.

    ``record_offset``/``record_nbytes`` locate the zip record in ``file``; ``data_offset`` is the offset of the box's
    raw row-major bytes from the start of the file (None until an external record was located).
    """

    box: Box
    file: str
    record_offset: int
    record_nbytes: int
    data_offset: int | None
    data_nbytes: int
    crc32: int | None


class Overlap(NamedTuple):
    """A region that a stored shard has in common with a box of its tensor."""

    shard: int
    """Index of the shard among the tensor's shards."""
    src: Box
    """The region in the coordinates of the shard's box."""
    dst: Box
    """The region in the coordinates of the other box."""


class TiledShards(Sequence[ShardEntry]):
    """Shards in columns: operations that do not examine shards one by one."""

    @property
    @abstractmethod
    def boxes(self) -> tuple[Box, ...]:
        """The box of each shard; the same object for tensors that are cut alike."""

    @property
    @abstractmethod
    def files(self) -> Sequence[str]:
        """The files that hold the shards, sorted."""

    @abstractmethod
    def block_bounds(self, block_nbytes: int) -> Sequence[int]:
        """The index of each shard's first block of raw data, counted over all shards; one more entry than shards."""

    @abstractmethod
    def overlaps(self, box: Box) -> Sequence[Overlap]:
        """Return all regions that the shards have in common with ``box``, in the order of the shards."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A stored tensor. ``dtype`` is torch's name without the prefix (``bfloat16``); ``shards`` cover ``shape`` once."""

    dtype: str
    shape: tuple[int, ...]
    shards: Sequence[ShardEntry]


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """A stored value other than a tensor: one ``torch.save`` record. ``crc32`` covers the record."""

    file: str
    record_offset: int
    record_nbytes: int
    crc32: int | None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the checkpoint. ``crc32`` covers the file; None if not recorded (format 1)."""

    nbytes: int
    crc32: int | None = None
    content: str = ""
    """For a file that later steps may share: an identifier of its bytes, 32 hex digits; otherwise empty."""
    since: int | None = None
    """For such a file: the order (see ``Lineage``) of the save that wrote it."""


@dataclass(frozen=True, slots=True)
class BranchStart:
    """The step at which the user made a branch begin (``load_step``)."""

    step: Count
    save_id: str = ""
    """Save id of that step; empty for an external one."""
    launch: str = ""
    """Id of the job (of Slurm or torchrun), so that its restarts are recognised; empty if it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The position of a step in the history of its run. See ``milepost.run.branches``."""

    run: str
    """Id of the run: the same for all steps that descend from the same start."""
    order: Count
    """Position in the order of commits in its folder; the highest was committed last. Numbers may be skipped."""
    branch: str
    """Id of the branch: the same for consecutive steps without a return to an earlier step in between."""
    parent: str = ""
    """Save id of its parent step; empty for the first step, or if the parent has none."""
    parent_step: Count | None = None
    """Number of the parent step; None for the first step."""
    trail: tuple[tuple[str, Count], ...] = ()
    """The older branches from which it descends, each with the order of its last step that is an ancestor. Steps
    without a lineage form the branch ``""``, in which the order is the step number."""
    start: BranchStart | None = None
    """The step at which the user made the branch begin, if any."""
    seen: Annotated[int, msgspec.Meta(ge=-1, le=MAX_COUNT)] = -1
    """The highest step without a lineage in the folder at its commit; -1 if there was none."""


@dataclass(frozen=True, slots=True)
class PartTotal:
    """Totals of one part of the training state (``model``, ``optimizer``, ...) in a checkpoint."""

    part: str
    num_tensors: Count
    num_elements: Count
    nbytes: Count
    """Bytes of the tensors, without record headers."""
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
    """``full`` (can be resumed from), ``model`` (only weights) or ``state`` (a plain state dict)."""
    world_size: int
    layout: Mapping[str, int]
    """Degrees of parallelism at the save, by the trainer's names; may be empty."""
    producer: Mapping[str, str]
    """Name and version of the software that wrote it."""
    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, ObjectEntry]
    files: Mapping[str, FileEntry]
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    """Path of each key in the nested state dict, as stock DCP records it in ``planner_data``."""
    structure: bytes = b""
    """The containers of the state dict, deflated, as ``milepost.tensors.tree`` records them; empty if unknown."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Additional JSON from the saver (``CheckpointManager`` stores the data fingerprint here)."""
    lineage: Lineage | None = None
    """None for a checkpoint outside a run, or older than lineages."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of this step, by name. Values that are not finite are stored as NaN."""
    parts: tuple[PartTotal, ...] = ()
    """Totals of a checkpoint without ``tensors`` (of Hugging Face files); otherwise they follow from these."""

    def file_named(self, name: str) -> str | None:
        """Return the name of the file ``name`` in this checkpoint, with or without save id; None if absent."""
        return next((known for known in (name, tagged(name, self.save_id)) if known in self.files), None)
