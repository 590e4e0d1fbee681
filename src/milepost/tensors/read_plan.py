"""The plan of a load: the stored bytes that fill each wanted box. Pure functions of frozen values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from milepost.errors import PlanError
from milepost.format import dtype as dtypes
from milepost.format.box import Box, boxes_of_run, span
from milepost.format.manifest import Manifest, Overlap, ShardEntry, TiledShards
from milepost.tensors.plan import TensorSpec


@dataclass(frozen=True, slots=True)
class ReadItem:
    """The intersection of a stored shard and a wanted box.

    ``src`` is in the coordinates of the shard's box, ``dst`` in those of box number ``piece`` of the wanted tensor.
    """

    key: str
    dtype: str
    shard: ShardEntry
    shard_index: int
    src: Box
    piece: int
    dst: Box
    leaf: str
    """Key of the tensor to fill; differs from ``key`` if stored under another key, or as part of another tensor."""
    is_transposed: bool = False
    """True if the last two dims of ``dst`` are those of ``src`` swapped."""

    @property
    def run(self) -> tuple[int, int]:
        """The data bytes ``[start, stop)`` of the shard from the region's first to its last."""
        size = dtypes.itemsize(self.dtype)
        first, last = span(self.src, self.shard.box.sizes)
        return first * size, last * size

    @property
    def is_one_run(self) -> bool:
        """True if the region is contiguous in the shard's data."""
        start, stop = self.run
        return stop - start == self.src.numel * dtypes.itemsize(self.dtype)

    @property
    def is_whole(self) -> bool:
        """True if the region is all of the shard."""
        return self.src.sizes == self.shard.box.sizes

    def blocks(self, block_nbytes: int) -> Iterator[tuple[int, int]]:
        """The blocks of the shard's data that hold elements of the region, ascending, as half-open byte ranges."""
        start, stop = self.run
        size = dtypes.itemsize(self.dtype)
        is_one_run = stop - start == self.src.numel * size
        for low in range(start - start % block_nbytes, stop, block_nbytes):
            high = min(low + block_nbytes, self.shard.data_nbytes)
            if is_one_run or any(
                box.intersect(self.src) for box in boxes_of_run(low // size, high // size, self.shard.box.sizes)
            ):
                yield low, high


@dataclass(frozen=True, slots=True)
class Origin:
    """A box of a tensor, and the box of the stored one that its elements come from."""

    box: Box
    key: str
    """Key of the stored tensor."""
    stored: Box
    is_transposed: bool = False
    """True if the last two dims of ``box`` are those of ``stored`` swapped."""


def plan_load(
    manifest: Manifest, wanted: Iterable[TensorSpec], origins: Mapping[str, Sequence[Origin]] | None = None
) -> tuple[ReadItem, ...]:
    """Plan the reads that fill every wanted box exactly once, in the order of files and offsets.

    Keys and shapes of ``wanted`` must have been checked against the manifest; dtypes may differ (the items have the
    stored one). ``origins`` has the stored parts of wanted tensors that are not stored under their own key.

    Raises:
        PlanError: the stored shards do not cover a wanted box.
    """
    origins = origins or {}
    items: list[ReadItem] = []
    for spec in wanted:
        made_of = origins.get(spec.key)
        for piece, box in enumerate(spec.boxes):
            first = len(items)
            if made_of is None:
                items += _items(manifest, spec.key, spec.key, piece, box)
            else:
                for origin in made_of:
                    items += _items_of_origin(manifest, spec.key, piece, box, origin)
            found = sum(item.dst.numel for item in items[first:])
            if found != box.numel:
                raise PlanError(
                    f"{spec.key}: the checkpoint stores {found} of the {box.numel} elements of {box}", key=spec.key
                )
    return tuple(sorted(items, key=lambda item: (item.shard.file, item.shard.record_offset, item.src)))


def _items(manifest: Manifest, key: str, leaf: str, piece: int, box: Box) -> Iterator[ReadItem]:
    """The parts of the stored tensor ``key`` that intersect ``box``, for a piece that is this box."""
    entry = manifest.tensors[key]
    for overlap in overlaps(entry.shards, box):
        yield ReadItem(
            key=key,
            dtype=entry.dtype,
            shard=entry.shards[overlap.shard],
            shard_index=overlap.shard,
            src=overlap.src,
            piece=piece,
            dst=overlap.dst,
            leaf=leaf,
        )


def _items_of_origin(manifest: Manifest, leaf: str, piece: int, box: Box, origin: Origin) -> Iterator[ReadItem]:
    """The parts of the wanted ``box`` that come from an origin."""
    common = box.intersect(origin.box)
    if common is None:
        return
    within = common.relative_to(origin.box)
    stored = (swapped(within) if origin.is_transposed else within).shifted(origin.stored.offsets)
    corner = common.relative_to(box).offsets
    for item in _items(manifest, origin.key, leaf, piece, stored):
        dst = swapped(item.dst) if origin.is_transposed else item.dst
        yield replace(item, dst=dst.shifted(corner), is_transposed=origin.is_transposed)


def swapped(box: Box) -> Box:
    """The box with its last two dims swapped."""
    offsets, sizes = ((*values[:-2], values[-1], values[-2]) for values in (box.offsets, box.sizes))
    return Box(offsets, sizes)


def has_all(shards: Sequence[ShardEntry], spec: TensorSpec) -> bool:
    """Return whether the shards cover all boxes of ``spec``."""
    return all(sum(found.dst.numel for found in overlaps(shards, box)) == box.numel for box in spec.boxes)


def overlaps(shards: Sequence[ShardEntry], box: Box) -> Sequence[Overlap]:
    """Intersect ``box`` with each of the shards."""
    if isinstance(shards, TiledShards):
        return shards.overlaps(box)
    common = [(index, shard.box, box.intersect(shard.box)) for index, shard in enumerate(shards)]
    return [
        Overlap(index, region.relative_to(stored), region.relative_to(box))
        for index, stored, region in common
        if region is not None
    ]
