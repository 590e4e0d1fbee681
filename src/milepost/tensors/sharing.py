"""The keys that ranks hold in common, and the plan that each rank makes alone.

Ranks with equal descriptions of their states form one *kind*: all ranks under FSDP, those of one stage under pipeline
parallelism. A description has no boxes but the placement of each tensor on its mesh, so the holders of every box follow
from the descriptions and their ranks, without exchanging boxes. Tensors whose holders do not follow from a mesh (custom
shards, several meshes) are *placed*: their boxes are exchanged, and rank 0 assigns them.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from milepost.config import PER_RANK_PARTS, part_of
from milepost.errors import PlanError
from milepost.format import dtype as dtypes
from milepost.format.box import Box
from milepost.tensors.plan import Dealt, LocalLayout, Mesh, Spread, TensorSpec, WritePlan, raise_faults

Ranks = tuple[int, ...]
"""Ascending."""


def own_to_each(keys: Iterable[str]) -> str:
    """Return the advice for values under ``keys`` that differ between ranks."""
    parts = {part_of(key) for key in keys}.intersection(PER_RANK_PARTS)
    named = ", ".join(f'"{part}"' for part in sorted({"dataloader", *parts})) if parts else '"dataloader", ...'
    return (
        f"make it the same on all ranks, declare what belongs to each rank with CheckpointManager(per_rank=({named})), "
        "or give each rank a key of its own"
    )


@dataclass(frozen=True, slots=True)
class Group:
    """The keys that exactly these ranks hold."""

    ranks: Ranks
    tensors: tuple[tuple[str, Box], ...]
    objects: tuple[str, ...]

    def digest(self) -> bytes:
        """Identify the group by its content."""
        held = [(key, box.offsets, box.sizes) for key, box in self.tensors]
        return hashlib.blake2b(repr((self.ranks, held, self.objects)).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Sharing:
    """All that a rank needs of the others to plan alone. The same on every rank."""

    kind_of: tuple[int, ...]
    """The number of each rank's kind."""
    kinds: tuple[tuple[int, ...], ...]
    """Sets of kinds that hold common keys."""
    common: Mapping[str, int]
    """Keys that several kinds hold, each with the index of their set in ``kinds``; without the placed ones."""
    placed: frozenset[str]
    """Keys whose boxes every rank has to send."""
    buffers: frozenset[str]
    """Of the common keys."""
    frozen: frozenset[str]
    """Of the common keys."""
    num_shards: int
    """Upper bound of the number of boxes stored, without the placed ones."""


def description(layout: LocalLayout) -> LocalLayout:
    """Reduce a layout to what other ranks need: boxes only of tensors that are held whole, without a mesh."""
    return replace(
        layout, tensors=tuple(spec if _is_whole(spec) else replace(spec, boxes=()) for spec in layout.tensors)
    )


def only(layout: LocalLayout, keys: frozenset[str]) -> LocalLayout:
    """Restrict a layout to ``keys``, with all boxes."""
    return LocalLayout(
        tuple(replace(spec, spread=None) for spec in layout.tensors if spec.key in keys),
        tuple(key for key in layout.objects if key in keys),
        layout.buffers & keys,
        layout.frozen & keys,
    )


def _is_whole(spec: TensorSpec) -> bool:
    return spec.spread is None and spec.boxes == (Box.whole(spec.shape),)


def sort_out(kinds: Sequence[LocalLayout], kind_of: Sequence[int], own: Mapping[int, LocalLayout]) -> Sharing:
    """Combine the descriptions of all kinds and, by rank, those of keys that only some ranks have (``own``).

    Raises:
        PlanError: descriptions disagree on the dtype or shape of a tensor, or on whether a key is one.
    """
    ranks_of: list[list[int]] = [[] for _ in kinds]
    for rank, kind in enumerate(kind_of):
        ranks_of[kind].append(rank)
    held = _Descriptions(
        [*zip(map(tuple, ranks_of), kinds, strict=True), *(((rank,), own[rank]) for rank in sorted(own))]
    )
    held.check()
    common: dict[str, tuple[int, ...]] = {}
    placed: set[str] = set()
    num_shards = 0
    for key, found in held.tensors.items():
        if not held.follows(found, num_kinds=len(kinds)):
            placed.add(key)
            continue
        num_shards += _max_shards(found[0][1])
        if len(found) > 1:
            common[key] = tuple(number for number, _ in found)
    for key, numbers in held.objects.items():
        if len(numbers) > 1 and max(numbers) >= len(kinds):
            placed.add(key)
        elif len(numbers) > 1:
            common[key] = tuple(numbers)
    sets = {found: number for number, found in enumerate(dict.fromkeys(common.values()))}
    return Sharing(
        kind_of=tuple(kind_of),
        kinds=tuple(sets),
        common={key: sets[found] for key, found in common.items()},
        placed=frozenset(placed),
        buffers=frozenset[str]().union(*(layout.buffers & common.keys() for layout in kinds)),
        frozen=frozenset[str]().union(*(layout.frozen & common.keys() for layout in kinds)),
        num_shards=num_shards,
    )


class _Descriptions:
    """The descriptions by key, each with its ranks. Numbers are indices of descriptions."""

    def __init__(self, described: Sequence[tuple[Ranks, LocalLayout]]):
        self._described = described
        self._complete: dict[tuple[Mesh, tuple[int, ...]], bool] = {}
        self.tensors: dict[str, list[tuple[int, TensorSpec]]] = defaultdict(list)
        self.objects: dict[str, list[int]] = defaultdict(list)
        for number, (_, layout) in enumerate(described):
            for spec in layout.tensors:
                self.tensors[spec.key].append((number, spec))
            for key in layout.objects:
                self.objects[key].append(number)

    def check(self) -> None:
        faults = []
        for key, found in self.tensors.items():
            first, known = min(found, key=lambda one: self._described[one[0]][0])
            faults += [
                (
                    key,
                    f"{known.dtype} {list(known.shape)} on rank {self._described[first][0][0]}, "
                    f"but {spec.dtype} {list(spec.shape)} on rank {self._described[number][0][0]}",
                )
                for number, spec in found
                if (spec.dtype, spec.shape) != (known.dtype, known.shape)
            ]
        raise_faults(faults, advice=own_to_each(key for key, _ in faults))
        clash = min(self.objects.keys() & self.tensors.keys(), default=None)
        if clash is not None:
            raise PlanError(
                f"{clash} is a tensor on one rank and another kind of value on another: {own_to_each([clash])}",
                key=clash,
            )

    def follows(self, found: Sequence[tuple[int, TensorSpec]], *, num_kinds: int) -> bool:
        """Return whether the holders of a tensor's boxes follow from its descriptions alone."""
        numbers = tuple(number for number, _ in found)
        if max(numbers) >= num_kinds and len(numbers) > 1:
            return False
        spreads = {spec.spread for _, spec in found}
        if len(spreads) > 1:
            return False
        (spread,) = spreads
        if spread is None:
            return all(_is_whole(spec) for _, spec in found)
        return self._is_complete(spread.mesh, numbers)

    def _is_complete(self, mesh: Mesh, numbers: tuple[int, ...]) -> bool:
        """Return whether all ranks of a mesh have described a tensor on it."""
        known = self._complete.get((mesh, numbers))
        if known is None:
            ranks = {rank for number in numbers for rank in self._described[number][0]}
            known = self._complete[mesh, numbers] = ranks.issuperset(mesh.ranks)
        return known


def _max_shards(spec: TensorSpec) -> int:
    """Upper bound of the number of a tensor's boxes."""
    if spec.spread is None:
        return 1
    parts = [1] * len(spec.shape)
    for size, cut in zip(spec.spread.mesh.shape, spec.spread.cuts, strict=True):
        if cut is not None:
            parts[cut[0]] *= size * cut[1]
    return math.prod(min(most, size) for most, size in zip(parts, spec.shape, strict=True))


# ---- the plan of one rank ----


@dataclass(frozen=True, slots=True)
class FromRank0:
    """A rank's part of what rank 0 assigns, and the rank's groups."""

    dealt: Dealt = field(default_factory=Dealt)
    groups: tuple[Group, ...] = ()


def plan_alone(
    rank: int,
    layout: LocalLayout,
    sharing: Sharing,
    *,
    own: Collection[str] = (),
    given: FromRank0 | None = None,
    node: Collection[int] | None = None,
) -> tuple[WritePlan, tuple[Group, ...]]:
    """Plan the part of ``rank`` and its groups, from its own layout and the common ``sharing``.

    All ranks that call this with the same ``sharing`` agree on the writer of a box: one of the ranks that hold it, and
    the lowest of them for buffers and values. ``own`` are the keys that only this rank has described. Given ``node``,
    the ranks of its node, these store everything that any of them holds.
    """
    given = given if given is not None else FromRank0()
    holders = _Holders(rank, sharing, own)
    tensors: dict[Ranks, list[tuple[TensorSpec, Box]]] = defaultdict(list)
    objects: dict[Ranks, list[str]] = defaultdict(list)
    for spec in layout.tensors:
        if spec.key not in sharing.placed:
            boxes = spec.boxes if len(spec.boxes) == 1 else dict.fromkeys(spec.boxes)
            stored = [(spec, box) for box in boxes if 0 not in box.sizes or 0 in spec.shape]
            tensors[holders.of_tensor(spec)] += stored
    for key in layout.objects:
        if key not in sharing.placed:
            objects[holders.of_value(key)].append(key)
    common = sharing.common.keys()
    buffers = (layout.buffers - common) | sharing.buffers
    marked = (layout.frozen - common) | sharing.frozen
    parts: dict[bool, list[tuple[TensorSpec, Box]]] = {False: [*given.dealt.moving], True: [*given.dealt.frozen]}
    values = {*given.dealt.objects}
    for ranks in dict.fromkeys((*tensors, *objects)):
        writers = ranks if node is None else tuple(one for one in ranks if one in node)
        for is_frozen, part in parts.items():
            held = [h for h in tensors[ranks] if (h[0].key in marked) is is_frozen] if marked else tensors[ranks]
            part += _part_of(rank, writers, held, buffers) if marked or not is_frozen else ()
        if rank == writers[0]:
            values.update(objects[ranks])
    dealt = Dealt(tuple(parts[False]), tuple(parts[True]), tuple(key for key in layout.objects if key in values))
    groups = [
        # Sorted, since the order of state dicts may differ between ranks.
        Group(
            ranks, tuple(sorted((s.key, box) for s, box in tensors[ranks] if box.numel)), tuple(sorted(objects[ranks]))
        )
        for ranks in tensors.keys() | objects.keys()
        if len(ranks) > 1
    ]
    return dealt.plan(rank), (*(group for group in groups if group.tensors or group.objects), *given.groups)


class _Holders:
    """The ranks that hold what this rank holds."""

    def __init__(self, rank: int, sharing: Sharing, own: Collection[str]):
        self._rank = rank
        self._sharing = sharing
        self._own = {*own}
        self._kind = (sharing.kind_of[rank],)
        self._by_spread: dict[Spread, Ranks] = {}
        self._last: tuple[Spread | None, Ranks] = (None, ())
        self._by_kinds: dict[tuple[int, ...], Ranks] = {}

    def of_tensor(self, spec: TensorSpec) -> Ranks:
        if spec.spread is None:
            return self.of_value(spec.key)
        last, ranks = self._last
        if spec.spread is last:  # mostly it is one object, of which the hash need not be computed again
            return ranks
        found = self._by_spread.get(spec.spread)
        if found is None:
            found = self._by_spread[spec.spread] = replicas_of(self._rank, spec.spread) or (self._rank,)
        self._last = spec.spread, found
        return found

    def of_value(self, key: str) -> Ranks:
        if key in self._own:
            return (self._rank,)
        number = self._sharing.common.get(key)
        kinds = self._kind if number is None else self._sharing.kinds[number]
        found = self._by_kinds.get(kinds)
        if found is None:
            among = {*kinds}
            found = tuple(rank for rank, kind in enumerate(self._sharing.kind_of) if kind in among)
            self._by_kinds[kinds] = found
        return found


def replicas_of(rank: int, spread: Spread) -> Ranks:
    """The ranks that hold the same boxes of a tensor as ``rank``; none if it is not in the mesh."""
    ranks = np.asarray(spread.mesh.ranks).reshape(spread.mesh.shape)
    at = np.argwhere(ranks == rank)
    if not len(at):
        return ()
    index = tuple(slice(None) if cut is None else here for cut, here in zip(spread.cuts, at[0].tolist(), strict=True))
    return tuple(sorted(np.ravel(ranks[index]).tolist()))


def _part_of(
    rank: int, writers: Ranks, boxes: Sequence[tuple[TensorSpec, Box]], buffers: Collection[str]
) -> list[tuple[TensorSpec, Box]]:
    """Return the boxes that ``rank`` writes of those held by all ``writers``: largest first, each to the least loaded.

    Running mean and variance must come from one rank, so all buffers are written by the first. The order of the ranks
    for other boxes depends on their content, so that a rank in several groups is not always first.
    """
    if len(writers) == 1:
        return [*boxes]
    mine = [held for held in boxes if held[0].key in buffers and rank == writers[0]]
    order = sorted(
        (held for held in boxes if held[0].key not in buffers), key=lambda held: (-_nbytes(*held), held[0].key, held[1])
    )
    if not order:
        return mine
    seed = hashlib.blake2b(repr((order[0][0].key, order[0][1].offsets)).encode(), digest_size=8).digest()
    first = int.from_bytes(seed, "little") % len(writers)
    turn = (writers[first:] + writers[:first])[: len(order)]
    loads = [(0, number) for number in range(len(turn))]
    for spec, box in order:
        load, number = loads[0]
        heapq.heapreplace(loads, (load + _nbytes(spec, box), number))
        if turn[number] == rank:
            mine.append((spec, box))
    return mine


def _nbytes(spec: TensorSpec, box: Box) -> int:
    return box.numel * dtypes.lookup(spec.dtype).itemsize


# ---- what is placed: for rank 0 ----


def groups_in_common(layouts: Sequence[LocalLayout]) -> list[Group]:
    """The groups of two or more ranks that hold common keys. A rank may be in several."""
    holders: dict[tuple[str, Box | None], list[int]] = defaultdict(list)
    for rank, layout in enumerate(layouts):
        for spec in layout.tensors:
            for box in dict.fromkeys(spec.boxes):
                if box.numel:
                    holders[spec.key, box].append(rank)
        for key in layout.objects:
            holders[key, None].append(rank)
    by_ranks: dict[Ranks, list[tuple[str, Box | None]]] = defaultdict(list)
    for held, ranks in holders.items():
        if len(ranks) > 1:
            by_ranks[tuple(ranks)].append(held)
    return [
        Group(
            ranks,
            tuple((key, box) for key, box in held if box is not None),
            tuple(key for key, box in held if box is None),
        )
        for ranks, held in by_ranks.items()
    ]
