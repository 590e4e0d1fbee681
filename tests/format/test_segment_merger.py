"""Merging ranks' segments: the same table in any order of arrival, with little more memory than its size."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import numpy as np
import pytest

from milepost.errors import SaveError
from milepost.format.box import Box
from milepost.format.columns import ShardTable, coordinates, with_table
from milepost.format.columns import Tiling as Cut
from milepost.format.columns_check import table_faults
from milepost.format.manifest import FileEntry, Manifest, ObjectEntry, ShardEntry
from milepost.format.record import tensor_record
from milepost.format.segment_merger import SegmentMerger
from milepost.format.segments import Segment, dump_segment, parse_segment
from milepost.format.shards_file import dump_shards
from milepost.run.signoff import WrittenFile, WrittenObject, WrittenTensor, segment_of
from milepost.tensors.plan import WriteItem

SAVE_ID = "ab"
BLOCK = 4 << 20
SHAPES = [(8,), (7, 3), (), (3 << 20,), (0, 4), (6, 2, 2)]


def boxes_of(rng: random.Random, shape: tuple[int, ...]) -> list[Box]:
    """A cut of the first dim, empty parts among them."""
    if not shape or 0 in shape:
        return [Box.whole(shape)]
    edges = sorted([0, shape[0], *(rng.randint(0, shape[0]) for _ in range(rng.randint(0, 4)))])
    return [
        Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:])) for start, stop in itertools.pairwise(edges)
    ]


def world(rng: random.Random) -> list[Segment]:
    """Return the segments of some ranks, each box written by any of them."""
    num_ranks = rng.randint(1, 6)
    held: list[list[tuple[str, tuple[int, ...], Box]]] = [[] for _ in range(num_ranks)]
    for number in range(rng.randint(0, 10)):
        shape = rng.choice(SHAPES)
        for box in boxes_of(rng, shape):
            held[rng.randrange(num_ranks)].append((f"k{number}", shape, box))
    return [segment_of(files_of(rng, rank, mine)) for rank, mine in enumerate(held)]


def files_of(rng: random.Random, rank: int, held: list[tuple[str, tuple[int, ...], Box]]) -> list[WrittenFile]:
    ends = [0, 0]
    tensors: list[list[WrittenTensor]] = [[], []]
    for key, shape, box in held:
        file, layout = rng.randrange(2), tensor_record("float32", box.sizes)
        start = ends[file]
        data_nbytes = box.numel * 4
        item = WriteItem(key, "float32", shape, box, start, layout.nbytes, start + layout.data_offset, data_nbytes)
        crcs = tuple(rng.getrandbits(32) for _ in range(-(-data_nbytes // BLOCK)))
        tensors[file].append(WrittenTensor(item, rng.getrandbits(32), crcs))
        ends[file] += layout.nbytes
    objects = tuple(
        WrittenObject(f"rng.rank{rank}.{name}", ends[1] + 100 * n, 100, n) for n, name in enumerate("ab"[: rank % 3])
    )
    ends[1] += 100 * len(objects)
    return [
        WrittenFile(f"__{rank}_0.distcp", ends[0], tuple(tensors[0]), ()),
        WrittenFile(f"__{rank}_1.distcp", ends[1], tuple(tensors[1]), objects),
    ]


def manifest_of(table: ShardTable) -> Manifest:
    return with_table(Manifest(1, SAVE_ID, 0.0, "state", 1, {}, {}, {}, {}, {}), table)


def entries(table: ShardTable) -> dict[str, list[ShardEntry]]:
    return {key: list(entry.shards) for key, entry in manifest_of(table).tensors.items()}


def shard_order(shard: ShardEntry) -> tuple[object, ...]:
    return (shard.box.offsets, shard.box.sizes)


@pytest.mark.parametrize("seed", range(60))
def test_the_table_holds_what_the_segments_hold_in_whatever_order_they_arrive(seed: int) -> None:
    rng = random.Random(seed)
    segments = dict(enumerate(world(rng)))
    arrival = [*segments.items()]
    rng.shuffle(arrival)
    sent = [(rank, parse_segment(memoryview(dump_segment(s, SAVE_ID)), s.files, SAVE_ID, "x")) for rank, s in arrival]
    table, crcs = SegmentMerger.of(sent).merge({})
    in_order, crcs_in_order = SegmentMerger.of(segments.items()).merge({})
    assert dump_shards(table, SAVE_ID) == dump_shards(in_order, SAVE_ID)
    assert crcs.tolist() == crcs_in_order.tolist()
    stored: dict[str, list[ShardEntry]] = {}
    objects: dict[str, ObjectEntry] = {}
    blocks: dict[tuple[str, str, int], list[int]] = {}
    for segment in segments.values():
        start = 0
        for key, shards in entries(segment.table).items():
            stored.setdefault(key, []).extend(shards)
            for shard in shards:
                stop = start + -(-shard.data_nbytes // BLOCK)
                blocks[key, shard.file, shard.record_offset] = segment.block_crcs[start:stop].tolist()
                start = stop
        objects |= manifest_of(segment.table).objects
    found = entries(table)
    assert [*found] == sorted(stored)
    for key, shards in stored.items():
        assert [shard_order(shard) for shard in found[key]] == sorted(map(shard_order, shards))
        assert {*map(repr, found[key])} == {*map(repr, shards)}
    assert dict(manifest_of(table).objects) == objects
    assert [*table.objects.keys] == sorted(objects)
    expected = [blocks[key, shard.file, shard.record_offset] for key, shards in found.items() for shard in shards]
    assert crcs.tolist() == [crc for some in expected for crc in some]
    assert not table_faults(table, {name: entry for s in segments.values() for name, entry in s.files.items()})


def test_a_save_of_nothing_and_ranks_that_wrote_nothing() -> None:
    nothing = segment_of([])
    table, crcs = SegmentMerger.of([(0, nothing), (1, nothing)]).merge({})
    assert (len(table), len(crcs), table.keys) == (0, 0, ())


def test_what_two_ranks_claim_is_reported_by_rank_whoever_came_first() -> None:
    rng = random.Random(1)
    held = [("w", (8,), Box((0,), (8,)))]
    other = [("w", (9,), Box((0,), (9,)))]
    segments = [(1, segment_of(files_of(rng, 1, held))), (0, segment_of(files_of(rng, 1, other)))]
    with pytest.raises(SaveError) as caught:
        SegmentMerger.of(segments).merge({})
    text = caught.value.message
    assert "file __1_0.distcp was stored by rank 0 and by rank 1" in text
    assert "'rng.rank1.a' was stored by rank 0 and by rank 1" in text
    assert "'w' was stored as float32 [8] and as float32 [9]" in text


def test_the_memory_of_a_merge_is_that_of_the_table_and_a_column() -> None:
    """28 bytes for a shard and its block, where the table has 20; however long the keys are."""
    num_ranks, num_keys = 128, 500
    keys = tuple(f"layers.{number:04}.{'x' * 100}" for number in range(num_keys))

    def segment(rank: int) -> Segment:
        box = Box((rank, 0), (1, 64))
        layout = tensor_record("float32", box.sizes)
        columns = [np.array([one], np.int64) for one in (layout.data_offset, layout.nbytes)]
        cut = Cut("float32", (num_ranks, 64), coordinates([box.offsets], 2), coordinates([box.sizes], 2), *columns)
        few = np.zeros(num_keys, np.uint32)
        offsets = np.arange(num_keys, dtype=np.int64) * layout.nbytes
        table = ShardTable(
            (f"__{rank}_0.distcp",),
            keys,
            [cut],
            few,
            few,
            offsets,
            few + np.uint32(rank),
            segment_of([]).table.objects,
            {},
        )
        return Segment(table, {f"__{rank}_0.distcp": FileEntry(layout.nbytes * num_keys)}, few)

    num_shards = num_ranks * num_keys
    sent = [dump_segment(segment(rank), SAVE_ID) for rank in range(num_ranks)]
    tracemalloc.start()
    try:
        merger = SegmentMerger()
        for rank, data in enumerate(sent):
            files = {f"__{rank}_0.distcp": FileEntry(1 << 40)}
            merger.add(rank, parse_segment(memoryview(data), files, SAVE_ID, "x"))
        table, crcs = merger.merge({})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(table), len(crcs)) == (num_shards, num_shards)
    assert peak < 28 * num_shards + 6000 * num_ranks, f"{peak / num_shards:.1f} bytes for each shard"
