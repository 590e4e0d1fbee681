"""The plan of a save: the boxes of each rank, and who writes which of them where. Pure functions of frozen values.

Independent of tensors, processes and files, so that a plan can be printed, compared and tested alone.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from milepost.errors import PlanError, listed
from milepost.format import dtype as dtypes
from milepost.format import record
from milepost.format.box import Box, cover_faults

SMALL_ALIGNMENT = 64
"""Every record, and its raw data, starts at a multiple of this."""
LARGE_ALIGNMENT = 4096
"""Large records start at a multiple of this, so that files are written in whole disk blocks."""
LARGE_RECORD_NBYTES = 64 << 10
MIN_FROZEN_NBYTES = 64 << 10
MIN_FROZEN_PART = 16
"""A rank's frozen tensors are stored in a separate file if they have this many bytes and 1/16 of all that it writes:
less would not pay for opening, syncing and linking one more file at each save."""


def align(offset: int, alignment: int) -> int:
    """The next multiple of ``alignment`` at or after ``offset``."""
    return -(-offset // alignment) * alignment


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of a device mesh in row-major order. Meshes are equal if their ``digest`` is."""

    digest: str
    shape: tuple[int, ...] = field(compare=False)
    ranks: tuple[int, ...] = field(compare=False)

    @classmethod
    def of(cls, shape: Sequence[int], ranks: Sequence[int]) -> Mesh:
        digest = hashlib.blake2b(repr((tuple(shape), tuple(ranks))).encode(), digest_size=16).hexdigest()
        return cls(digest, tuple(shape), tuple(ranks))


@dataclass(frozen=True, slots=True)
class Spread:
    """The placement of a tensor on a mesh, from which each rank computes which ranks hold the same boxes.

    ``cuts`` has for each axis the dim that it shards and the number of parts to split that into first, or None if the
    ranks along the axis are replicas.
    """

    mesh: Mesh
    cuts: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The boxes of one tensor that a rank holds. ``dtype`` is torch's name without the prefix."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    spread: Spread | None = None
    """None if the boxes of other ranks do not follow from a mesh."""


@dataclass(frozen=True, slots=True)
class LocalLayout:
    """One rank's part of a state: the boxes of its tensors and the keys of its other values."""

    tensors: tuple[TensorSpec, ...]
    objects: tuple[str, ...]
    buffers: frozenset[str] = frozenset()
    """Keys of tensors that may differ between the ranks that hold them: those of the lowest rank are stored."""
    frozen: frozenset[str] = frozenset()
    """Keys of tensors that training apparently does not change: they are stored in a separate file."""

    def fingerprint(self, paths: Mapping[str, tuple[str | int, ...]]) -> str:
        """Identify the layout and the ``paths`` of its keys: a cached plan is valid as long as this is equal."""
        digest = hashlib.blake2b(digest_size=16)
        for spec in self.tensors:
            boxes = [(box.offsets, box.sizes) for box in spec.boxes]
            spread = (spec.spread.mesh.digest, spec.spread.cuts) if spec.spread is not None else None
            digest.update(repr((spec.key, spec.dtype, spec.shape, boxes, spread)).encode())
        marks = (sorted(self.buffers), sorted(self.frozen))
        digest.update(repr((self.objects, marks, list(paths.items()))).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class WriteItem:
    """One box of a tensor and the place of its record in the rank's file. Offsets count from the start of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    record_offset: int
    record_nbytes: int
    data_offset: int
    data_nbytes: int


@dataclass(frozen=True, slots=True)
class WritePlan:
    """The file of a rank. Objects are appended after the tensors, since their sizes change from save to save."""

    rank: int
    file: str
    items: tuple[WriteItem, ...]
    objects: tuple[str, ...]
    objects_offset: int
    """Offset of the first object's record: a multiple of ``LARGE_ALIGNMENT``."""
    frozen: WritePlan | None = None
    """The rank's second file, only of frozen tensors, if any."""

    @property
    def is_empty(self) -> bool:
        """True if this rank writes nothing: other ranks write all of its tensors and objects."""
        return self.frozen is None and not self.has_file

    @property
    def has_file(self) -> bool:
        """True if this file has content, apart from the file of frozen tensors."""
        return bool(self.items or self.objects)

    @property
    def images(self) -> tuple[tuple[WritePlan, int], ...]:
        """The plan of each of the rank's files, with the offset of its image in the host memory of both."""
        return ((self, 0),) if self.frozen is None else ((self, 0), (self.frozen, self.objects_offset))

    @property
    def image_nbytes(self) -> int:
        """Size of the host memory for the images of the rank's files, without objects."""
        return sum(plan.objects_offset for plan, _ in self.images)

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data in all of the rank's files."""
        return sum(item.data_nbytes for plan, _ in self.images for item in plan.items)

    @property
    def num_items(self) -> int:
        """Boxes in all of the rank's files."""
        return sum(len(plan.items) for plan, _ in self.images)


@dataclass(frozen=True, slots=True)
class Dealt:
    """One rank's part of a plan: boxes of tensors, those of frozen tensors, and keys of other values."""

    moving: tuple[tuple[TensorSpec, Box], ...] = ()
    frozen: tuple[tuple[TensorSpec, Box], ...] = ()
    objects: tuple[str, ...] = ()

    def plan(self, rank: int) -> WritePlan:
        """Plan the files of ``rank``, with a separate one for frozen tensors if that pays."""
        if self.frozen and _pays(_nbytes(self.frozen), _nbytes(self.moving)):
            moving, frozen = (sorted(held, key=_by_key) for held in (self.moving, self.frozen))
            return replace(lay_out_file(rank, moving, self.objects), frozen=lay_out_file(rank, frozen, (), number=1))
        return lay_out_file(rank, sorted([*self.moving, *self.frozen], key=_by_key), self.objects)


def _by_key(held: tuple[TensorSpec, Box]) -> tuple[str, Box]:
    return held[0].key, held[1]


def plan_save(layouts: Sequence[LocalLayout], nodes: Sequence[Sequence[int]] | None = None) -> tuple[WritePlan, ...]:
    """Return a plan for each rank, so that every element of every tensor is stored exactly once.

    Raises:
        PlanError: as :func:`deal`.
    """
    return tuple(dealt.plan(rank) for rank, dealt in enumerate(deal(layouts, nodes)))


def deal(layouts: Sequence[LocalLayout], nodes: Sequence[Sequence[int]] | None = None) -> list[Dealt]:
    """Assign boxes and values to ranks, so that every element of every tensor is stored exactly once.

    A box that several ranks hold is written by the least loaded of them; buffers and values other than tensors by the
    lowest rank that has them. Frozen tensors are balanced separately. Given ``nodes``, the ranks of each node, every
    node stores everything that its ranks hold.

    Raises:
        PlanError: ranks disagree on a tensor's dtype or shape, or their boxes leave a gap or overlap. All faults at
            once, each with its key and region.
    """
    holders, specs = _holders_of_boxes(layouts)
    _check_cover(holders, specs)
    clash = sorted(key for layout in layouts for key in layout.objects if key in specs)
    if clash:
        raise PlanError(f"{clash[0]} is a tensor on one rank and another kind of value on another", key=clash[0])
    found: dict[int, Dealt] = {}
    for ranks in nodes if nodes is not None else [range(len(layouts))]:
        found |= _deal_to_node(ranks, layouts, _held_by(holders, ranks), specs)
    return [found[rank] for rank in range(len(layouts))]


def _deal_to_node(
    ranks: Sequence[int],
    layouts: Sequence[LocalLayout],
    holders: Mapping[tuple[str, Box], Sequence[int]],
    specs: Mapping[str, TensorSpec],
) -> dict[int, Dealt]:
    """Assign boxes to a node's ranks, which together store everything that any of them holds."""
    buffers = frozenset[str]().union(*(layout.buffers for layout in layouts))
    marked = frozenset[str]().union(*(layout.frozen for layout in layouts))
    moving, frozen = (
        _assign(
            {held: found for held, found in holders.items() if (held[0] in marked) is want}, specs, layouts, buffers
        )
        for want in (False, True)
    )
    object_rank: dict[str, int] = {}
    for rank in ranks:
        for key in layouts[rank].objects:
            object_rank.setdefault(key, rank)
    dealt = {}
    for rank in ranks:
        one, other = (tuple((specs[key], box) for key, box in found[rank]) for found in (moving, frozen))
        dealt[rank] = Dealt(one, other, tuple(key for key in layouts[rank].objects if object_rank[key] == rank))
    return dealt


def _held_by(
    holders: Mapping[tuple[str, Box], Sequence[int]], ranks: Sequence[int]
) -> dict[tuple[str, Box], list[int]]:
    """The boxes that any of ``ranks`` holds, and which of them do."""
    among = set(ranks)
    held = {place: [rank for rank in found if rank in among] for place, found in holders.items()}
    return {place: found for place, found in held.items() if found}


def _nbytes(boxes: Iterable[tuple[TensorSpec, Box]]) -> int:
    return sum(box.numel * dtypes.lookup(spec.dtype).itemsize for spec, box in boxes)


def _pays(frozen_nbytes: int, other_nbytes: int) -> bool:
    return frozen_nbytes >= max(MIN_FROZEN_NBYTES, (frozen_nbytes + other_nbytes) // MIN_FROZEN_PART)


def _holders_of_boxes(
    layouts: Sequence[LocalLayout],
) -> tuple[dict[tuple[str, Box], list[int]], dict[str, TensorSpec]]:
    holders: dict[tuple[str, Box], list[int]] = defaultdict(list)
    specs: dict[str, TensorSpec] = {}
    first_rank: dict[str, int] = {}
    faults: list[tuple[str, str]] = []
    for rank, layout in enumerate(layouts):
        for spec in layout.tensors:
            known = specs.setdefault(spec.key, spec)
            first_rank.setdefault(spec.key, rank)
            if (known.dtype, known.shape) != (spec.dtype, spec.shape):
                faults.append(
                    (
                        spec.key,
                        f"{known.dtype} {list(known.shape)} on rank {first_rank[spec.key]}, "
                        f"but {spec.dtype} {list(spec.shape)} on rank {rank}",
                    )
                )
                continue
            for box in spec.boxes:
                ranks = holders[spec.key, box]
                if not ranks or ranks[-1] != rank:
                    ranks.append(rank)
    raise_faults(faults)
    return holders, specs


def _check_cover(holders: Iterable[tuple[str, Box]], specs: Mapping[str, TensorSpec]) -> None:
    boxes: dict[str, list[Box]] = {key: [] for key in specs}
    for key, box in holders:
        boxes[key].append(box)
    raise_faults([(key, fault) for key, found in boxes.items() for fault in cover_faults(specs[key].shape, found)])


def raise_faults(faults: Sequence[tuple[str, str]], *, advice: str = "") -> None:
    """Raise PlanError with all ``faults`` of shards, each a key and a text; return if there are none."""
    if faults:
        lines = "\n  ".join(listed([f"{key}: {text}" for key, text in faults]))
        message = f"the ranks' shards do not cover their tensors exactly, nothing was saved:\n  {lines}"
        raise PlanError(message + (f"\nOf one key: {advice}" if advice else ""), key=faults[0][0])


def _assign(
    holders: Mapping[tuple[str, Box], Sequence[int]],
    specs: Mapping[str, TensorSpec],
    layouts: Sequence[LocalLayout],
    buffers: frozenset[str],
) -> list[list[tuple[str, Box]]]:
    load = [0] * len(layouts)
    assigned: list[list[tuple[str, Box]]] = [[] for _ in layouts]
    shared = []
    for (key, box), ranks in holders.items():
        if box.numel == 0 and math.prod(specs[key].shape) != 0:
            continue  # an empty shard of a tensor that others hold
        nbytes = box.numel * dtypes.lookup(specs[key].dtype).itemsize
        if len(ranks) == 1 or key in buffers:  # for instance running mean and variance must come from one rank
            assigned[ranks[0]].append((key, box))
            load[ranks[0]] += nbytes
        else:
            shared.append((nbytes, key, box, ranks))
    # Greedy: largest first, each to the least loaded of its holders.
    for nbytes, key, box, ranks in sorted(shared, key=lambda item: (-item[0], item[1], item[2])):
        writer = min(ranks, key=lambda rank: (load[rank], rank))
        assigned[writer].append((key, box))
        load[writer] += nbytes
    return assigned


def file_name(rank: int, number: int) -> str:
    """The name of a file of ``rank``: number 1 is that of frozen tensors."""
    return f"__{rank}_{number}.distcp"


def lay_out_file(
    rank: int, boxes: Iterable[tuple[TensorSpec, Box]], objects: Iterable[str], *, number: int = 0
) -> WritePlan:
    """Place each box's record in file ``number`` of ``rank``, in the given order; sizes follow from the specs."""
    items = []
    known: dict[tuple[str, tuple[int, ...]], tuple[int, int, int, int]] = {}  # layers repeat
    offset = 0
    for spec, box in boxes:
        kind = spec.dtype, box.sizes
        found = known.get(kind)
        if found is None:
            layout = record.tensor_record(*kind)
            alignment = LARGE_ALIGNMENT if layout.data_nbytes >= LARGE_RECORD_NBYTES else SMALL_ALIGNMENT
            found = known[kind] = layout.nbytes, layout.data_offset, layout.data_nbytes, alignment
        nbytes, header_nbytes, data_nbytes, alignment = found
        offset = align(offset, alignment)
        # By position, in the order of the fields: by name it takes half as long again.
        items.append(
            WriteItem(spec.key, spec.dtype, spec.shape, box, offset, nbytes, offset + header_nbytes, data_nbytes)
        )
        offset += nbytes
    return WritePlan(rank, file_name(rank, number), tuple(items), tuple(objects), align(offset, LARGE_ALIGNMENT))
