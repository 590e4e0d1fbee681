"""CRC-32s of items and blocks, and the file that holds them."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
from manifests import Layout, StoredBox, lay_out

from milepost.errors import FormatError
from milepost.format.box import Box
from milepost.format.digest import (
    BLOCK_NBYTES,
    block_crcs,
    combine,
    combine_blocks,
    crc32,
    dump_digests,
    num_blocks,
    parse_digests,
)

RAW = os.urandom(3 * BLOCK_NBYTES // 2)


@pytest.fixture(scope="module")
def layout() -> Layout:
    """Keys out of order, a tensor in two shards, one without elements."""
    half = len(RAW) // 2
    return lay_out(
        {
            "b": (
                "uint8",
                (len(RAW),),
                [StoredBox(Box((0,), (half,)), RAW[:half]), StoredBox(Box((half,), (half,)), RAW[half:])],
            ),
            "a": ("uint8", (len(RAW),), [StoredBox(Box((0,), (len(RAW),)), RAW)]),
            "c": ("float32", (0,), [StoredBox(Box((0,), (0,)), b"")]),
        }
    )


def test_the_crc_is_that_of_zlib_and_continues_from_a_value():
    assert crc32(RAW) == zlib.crc32(RAW)
    assert crc32(memoryview(RAW)[100:], crc32(RAW[:100])) == crc32(RAW)


def test_two_crcs_combine_without_their_bytes():
    assert combine(crc32(RAW[:1000]), crc32(RAW[1000:]), len(RAW) - 1000) == crc32(RAW)
    assert combine(crc32(RAW), crc32(b""), 0) == crc32(RAW)


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1000, 1001, 2000, 3500])
def test_the_crcs_of_blocks_add_up_to_that_of_the_item(nbytes: int):
    crcs = block_crcs(RAW[:nbytes], 1000)
    assert len(crcs) == num_blocks(nbytes, 1000)
    assert combine_blocks(crcs, nbytes, 1000) == crc32(RAW[:nbytes])


def test_blocks_of_a_multi_dimensional_buffer_are_of_its_bytes():
    array = np.arange(24, dtype=np.int16).reshape(4, 6)
    assert list(block_crcs(array, 20)) == [crc32(array.tobytes()[i : i + 20]) for i in range(0, 48, 20)]


def test_a_wrong_number_of_block_crcs_is_not_combined():
    with pytest.raises(ValueError, match="1 CRCs for 2 blocks"):
        combine_blocks([1], 1001, 1000)


def test_each_shard_finds_its_blocks(layout: Layout):
    digests = parse_digests(dump_digests("0123456789abcdef", layout.crcs), layout.manifest)
    half = len(RAW) // 2
    assert digests.block_nbytes == BLOCK_NBYTES
    assert list(digests.of_shard("a", 0)) == [crc32(RAW[:BLOCK_NBYTES]), crc32(RAW[BLOCK_NBYTES:])]
    assert list(digests.of_shard("b", 0)) == [crc32(RAW[:half])]
    assert list(digests.of_shard("b", 1)) == [crc32(RAW[half:])]
    assert len(digests.of_shard("c", 0)) == 0


def test_any_changed_or_missing_byte_is_found(layout: Layout):
    data = dump_digests("0123456789abcdef", layout.crcs)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x40
        with pytest.raises(FormatError):
            parse_digests(bytes(damaged), layout.manifest)
        with pytest.raises(FormatError):
            parse_digests(data[:position], layout.manifest)
    with pytest.raises(FormatError):
        parse_digests(data + b"\0", layout.manifest)


def test_digests_of_another_save_are_refused(layout: Layout):
    with pytest.raises(FormatError, match="belongs to save 'other'"):
        parse_digests(dump_digests("other", layout.crcs), layout.manifest)


def test_digests_for_other_shards_are_refused(layout: Layout):
    with pytest.raises(FormatError, match="holds 3 block CRCs, the manifest's shards have 4"):
        parse_digests(dump_digests("0123456789abcdef", layout.crcs[:-2]), layout.manifest)


def test_digests_of_a_newer_version_ask_for_an_upgrade(layout: Layout):
    data = bytearray(dump_digests("0123456789abcdef", layout.crcs))
    data[7] = 2
    with pytest.raises(FormatError, match="newer Milepost"):
        parse_digests(bytes(data), layout.manifest)


def test_a_checkpoint_without_tensors_has_empty_digests():
    empty = lay_out({}, {"step": 1})
    assert len(parse_digests(dump_digests("0123456789abcdef", empty.crcs), empty.manifest).crcs) == 0
