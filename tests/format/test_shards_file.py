"""``milepost.shards``: columns are read back unchanged, and every number in them is checked."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import StoredBox, lay_out

from milepost.errors import FormatError, NewerFormatError
from milepost.format.box import Box, cover_faults
from milepost.format.columns import Objects, ShardTable, Tensors, Tiling, coordinates, table_of
from milepost.format.columns_check import cover_fault, table_faults
from milepost.format.digest import crc32
from milepost.format.manifest import FileEntry, Manifest
from milepost.format.shards_file import dump_shards, parse_shards

SAVE_ID = "0123456789abcdef"
GRID = [StoredBox(Box((r, c), (2, 3)), bytes(24), f"__{r}_0.distcp") for r in (0, 2) for c in (0, 3)]


@pytest.fixture
def manifest() -> Manifest:
    laid = lay_out(
        {
            "layers.0.w": ("float32", (4, 6), GRID),
            "layers.1.w": ("float32", (4, 6), GRID),
            "norm": ("bfloat16", (2,), [StoredBox(Box((0,), (2,)), b"abcd")]),
            "scalar": ("int64", (), [StoredBox(Box((), ()), bytes(8))]),
            "empty": ("float32", (0, 5), [StoredBox(Box((0, 0), (0, 5)), b"")]),
            'odd "key"\né\ud800': ("bool", (1,), [StoredBox(Box((0,), (1,)), b"\1")]),
        },
        {"train_state.step": 500, "lr": 0.1},
        paths={"lr": ("optimizer", "param_groups", 0, "lr")},
    )
    return dataclasses.replace(laid.manifest, structure=b"not a zlib stream")


@pytest.fixture
def data(manifest: Manifest) -> bytes:
    return bytes(dump_shards(table_of(manifest), SAVE_ID))


def resealed(data: bytes | bytearray) -> bytes:
    """The bytes with their own CRC-32 made right again: what an attacker would write."""
    blank = data[:12] + bytes(4) + data[16:]
    return bytes(data[:12] + struct.pack("<I", crc32(blank)) + data[16:])


def checked(data: bytes, manifest: Manifest) -> ShardTable:
    table, _ = parse_shards(data, SAVE_ID)
    faults = table_faults(table, manifest.files)
    if faults:
        raise FormatError("; ".join(fault.message for fault in faults), key=faults[0].key)
    return table


def test_what_was_written_comes_back(manifest: Manifest, data: bytes):
    table, found = parse_shards(data, SAVE_ID)
    assert found == crc32(data)
    assert Tensors(table) == manifest.tensors
    assert Objects(table) == manifest.objects
    assert table.paths == manifest.paths
    assert table.structure == manifest.structure
    assert not table_faults(table, manifest.files)
    assert dump_shards(table, SAVE_ID) == data


def test_tensors_that_are_cut_alike_share_a_tiling(manifest: Manifest):
    table = table_of(manifest)
    assert len(table.keys) == 6
    assert len(table.tilings) == 5
    assert len(table) == 12


def test_single_shards_are_made_as_they_are_asked_for(manifest: Manifest, data: bytes):
    shards = Tensors(parse_shards(data, SAVE_ID)[0])["layers.1.w"].shards
    whole = list(manifest.tensors["layers.1.w"].shards)
    assert [shards[0], shards[-1], *shards[1:3]] == [whole[0], whole[-1], *whole[1:3]]
    with pytest.raises(IndexError):
        shards[4]


def test_numpy_alone_reads_the_columns(manifest: Manifest, data: bytes):
    """As docs/format.md describes them, without a line of Milepost's."""
    magic, n, _, *counts = struct.unpack_from("<8s2I11Q", data)
    assert magic == b"MILESHD\x01"
    files, keys, paths, structure, g, dims, boxes, coords, tensors, shards, objects = counts
    position = 104

    def column(kind: str, count: int) -> np.ndarray:
        nonlocal position
        found = np.frombuffer(data, kind, count, position)
        position += -(-found.nbytes // 8) * 8
        return found

    assert column("u1", n).tobytes().decode() == SAVE_ID
    assert json.loads(column("u1", files).tobytes())["files"] == ["__0_0.distcp", "__2_0.distcp"]
    assert "layers.0.w" in json.loads(column("u1", keys).tobytes())["tensors"]
    column("u1", paths), column("u1", structure), column("u1", g), column("u1", g)
    num_boxes = column("<u4", g)
    column("<i8", dims), column("<i8", coords), column("<i8", coords)
    column("<u4", boxes), column("<i8", boxes)
    tiling = column("<u4", tensors)
    file, offset, crc = column("<u4", shards), column("<i8", shards), column("<u4", shards)
    first = [0, *np.cumsum(num_boxes[tiling]).tolist()]
    key = sorted(manifest.tensors).index("layers.1.w")
    entries = list(manifest.tensors["layers.1.w"].shards)
    rows = slice(first[key], first[key + 1])
    assert offset[rows].tolist() == [entry.record_offset for entry in entries]
    assert crc[rows].tolist() == [entry.crc32 for entry in entries]
    assert file[rows].tolist() == [0, 0, 1, 1]
    for kind in ("<u4", "<i8", "<i8", "<u4"):
        column(kind, objects)
    assert position == len(data)


# ---- what is refused ----


def test_every_flipped_bit_and_every_truncation_is_found(data: bytes):
    for position in range(len(data)):
        for changed in (data[:position], data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]):
            with pytest.raises(FormatError) as caught:
                parse_shards(changed, SAVE_ID)
            assert not isinstance(caught.value, NewerFormatError)


def test_a_later_version_asks_for_an_upgrade(data: bytes):
    with pytest.raises(NewerFormatError, match=r"written by a newer Milepost \(version 2\): upgrade"):
        parse_shards(resealed(data[:7] + b"\2" + data[8:]), SAVE_ID)


@pytest.mark.parametrize("number", range(11))
@pytest.mark.parametrize("value", [1 << 31, 1 << 40, (1 << 62) + 1, (1 << 64) - 1])
def test_a_huge_number_in_the_header_allocates_nothing(data: bytes, number: int, value: int):
    changed = bytearray(data)
    struct.pack_into("<Q", changed, 16 + 8 * number, value)
    forged = resealed(changed)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            parse_shards(forged, SAVE_ID)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_no_resealed_byte_leads_out_of_the_files(manifest: Manifest, data: bytes):
    """Each byte in turn is changed in several ways: refused, or every record is still within the files, once."""
    rng = random.Random(0)
    for position in range(104, len(data)):
        changed = bytearray(data)
        changed[position] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, changed[position] ^ 1))
        try:
            table = checked(resealed(changed), manifest)
            shards = [shard for tensor in Tensors(table).values() for shard in tensor.shards]
            list(table.paths)
        except FormatError:
            continue
        for shard in shards:
            assert 0 <= shard.record_offset <= (shard.data_offset or 0)
            assert (shard.data_offset or 0) + shard.data_nbytes <= shard.record_offset + shard.record_nbytes
            assert shard.record_offset + shard.record_nbytes <= manifest.files[shard.file].nbytes


def column(table: ShardTable, name: str, row: int, value: int) -> ShardTable:
    changed = getattr(table, name).copy()
    changed[row] = value
    return dataclasses.replace(table, **{name: changed})


def with_tiling(table: ShardTable, number: int, **changes: object) -> ShardTable:
    tilings = list(table.tilings)
    tilings[number] = dataclasses.replace(tilings[number], **changes)
    return dataclasses.replace(table, tilings=tuple(tilings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: column(t, "record_offset", 1, 1 << 61), "is recorded in bytes"),
        (lambda t: column(t, "record_offset", 1, -1), "is recorded in bytes"),
        (lambda t: column(t, "record_offset", 2, 0), "overlap in '__0_0.distcp'"),
        (lambda t: column(t, "file", 1, 1), "overlap in '__2_0.distcp'"),
        (lambda t: with_tiling(t, 1, shape=(5, 6)), "'layers.0.w': 6 of 30 elements are in no shard"),
        (lambda t: with_tiling(t, 1, shape=(1 << 40, 1 << 40)), "invalid shape"),
        (lambda t: with_tiling(t, 1, offsets=t.tilings[1].offsets + 1), "is not inside shape"),
        (lambda t: with_tiling(t, 1, offsets=t.tilings[1].offsets * 0), "more than once"),
        (lambda t: with_tiling(t, 1, sizes=t.tilings[1].sizes * (1 << 61)), "is not inside shape"),
        (lambda t: with_tiling(t, 1, header_nbytes=t.tilings[1].header_nbytes + 4096), "inside its record"),
        (lambda t: with_tiling(t, 1, record_nbytes=t.tilings[1].record_nbytes * 0), "inside its record"),
    ],
)
def test_a_misleading_table_is_reported(manifest: Manifest, change, message: str):  # type: ignore[no-untyped-def]
    faults = table_faults(change(table_of(manifest)), manifest.files)
    assert message in faults[0].message
    assert faults[0].key is not None


def test_objects_outside_and_over_shards_are_reported(manifest: Manifest):
    table = table_of(manifest)
    for offset, message in ((1 << 50, "is recorded in bytes"), (0, "overlap")):
        objects = dataclasses.replace(table.objects, record_offset=np.array([offset, table.objects.record_offset[1]]))
        faults = table_faults(dataclasses.replace(table, objects=objects), manifest.files)
        assert message in faults[0].message


def test_records_in_files_that_are_not_data_are_reported(manifest: Manifest):
    for name in ("milepost.json", ".metadata", "__9_0.distcp"):
        table = dataclasses.replace(table_of(manifest), files=(name, "__2_0.distcp"))
        assert f"'{name}', which is not a data file" in table_faults(table, manifest.files)[0].message


def test_few_faults_of_many_are_reported(manifest: Manifest):
    files = {name: FileEntry(1) for name in manifest.files}
    assert len(table_faults(table_of(manifest), files, limit=8)) == 8


# ---- the proof that boxes cover a tensor ----


def tiling_of(shape: tuple[int, ...], boxes: list[Box]) -> Tiling:
    ones = np.ones(len(boxes), np.int64)
    offsets, sizes = ([getattr(box, name) for box in boxes] for name in ("offsets", "sizes"))
    return Tiling("uint8", shape, coordinates(offsets, len(shape)), coordinates(sizes, len(shape)), ones, ones)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A tensor cut into boxes, here and there with a box that is lost, doubled, moved or stretched."""
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 40))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.sizes[dim]))
        for start, size in ((0, cut), (cut, box.sizes[dim] - cut)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += start
            sizes[dim] = size
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(boxes) - 1))
        box = boxes[at]
        harm = draw(st.sampled_from(("lose", "double", "grow", "swap")))
        if harm == "lose":
            del boxes[at]
        elif harm == "double":
            boxes.append(box)
        elif harm == "grow":
            sizes = tuple(min(s + 1, n - o) for s, n, o in zip(box.sizes, shape, box.offsets, strict=True))
            boxes[at] = Box(box.offsets, sizes)
        else:
            boxes[at] = Box(tuple(0 for _ in shape), box.sizes)
    return shape, boxes


@settings(max_examples=150, deadline=None)
@given(tilings())
def test_the_proof_by_arrays_says_what_the_proof_by_boxes_says(case: tuple[tuple[int, ...], list[Box]]):
    shape, boxes = case
    assert bool(cover_fault(tiling_of(shape, boxes))) == bool(cover_faults(shape, boxes))


def test_a_large_grid_is_proven_at_once():
    rows, columns = 256, 64
    boxes = [Box((r * 3, c * 5), (3, 5)) for r in range(rows) for c in range(columns)]
    tiling = tiling_of((rows * 3, columns * 5), boxes)
    assert cover_fault(tiling) == ""
    assert cover_fault(tiling_of((rows * 3, columns * 5), boxes[1:])) != ""
