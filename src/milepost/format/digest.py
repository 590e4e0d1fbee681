"""CRC-32s of stored items, and of each block of an item's raw data.

The CRC is that of zip and zlib (polynomial 0xEDB88320), computed by ISA-L, which runs near memory speed and releases
the GIL. ``milepost.digests`` holds the blocks' CRCs; ``docs/format.md`` specifies it.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

from isal import isal_zlib

from milepost.errors import FormatError
from milepost.format.manifest import BLOCK_NBYTES, DIGESTS_NAME, HF_FORMAT, Manifest, ShardEntry, TiledShards

MAGIC = b"MILEDIG\x01"
_HEAD = struct.Struct("<8sIIQ")  # magic, bytes of the save id, block size, number of CRCs
_MAX_SAVE_ID_NBYTES = 256
MAX_ELEMENT_NBYTES = 16
"""Maximum element size of any dtype. Blocks are multiples of it, so that no element is split."""


def to_bytes(crcs: Iterable[int]) -> bytes:
    """Return CRC-32s as stored: 4 bytes each, little-endian, like all machines that Milepost supports."""
    return bytes(crcs) if isinstance(crcs, memoryview) else array("I", crcs).tobytes()


def from_bytes(data: bytes | memoryview) -> Sequence[int]:
    """Return the CRC-32s in the output of ``to_bytes``. Read-only, without an object for each."""
    return memoryview(data).toreadonly().cast("I")


crc32 = isal_zlib.crc32
"""Compute the CRC-32 of a bytes-like object, continuing from a second argument, if there is one."""


def combine(crc_a: int, crc_b: int, nbytes_b: int) -> int:
    """Combine the CRC-32s of two consecutive stretches of bytes, given the second one's length."""
    return isal_zlib.crc32_combine(crc_a, crc_b, nbytes_b)


def num_blocks(data_nbytes: int, block_nbytes: int = BLOCK_NBYTES) -> int:
    """Return the number of blocks in raw data of ``data_nbytes``; the last may be short, empty data has none."""
    return -(-data_nbytes // block_nbytes)


def block_crcs(data: Any, block_nbytes: int = BLOCK_NBYTES) -> list[int]:
    """Compute the CRC-32 of each block of a bytes-like object that holds one item's raw data from its start."""
    view = memoryview(data).cast("B")
    return [crc32(view[start : start + block_nbytes]) for start in range(0, view.nbytes, block_nbytes)]


def combine_blocks(crcs: Sequence[int], data_nbytes: int, block_nbytes: int = BLOCK_NBYTES) -> int:
    """Compute the CRC-32 of an item from those of all its blocks, in order."""
    if len(crcs) != num_blocks(data_nbytes, block_nbytes):
        raise ValueError(f"{len(crcs)} CRCs for {num_blocks(data_nbytes, block_nbytes)} blocks")
    if not len(crcs):
        return 0
    value = reduce(lambda so_far, crc: combine(so_far, crc, block_nbytes), crcs[:-1], 0)
    return combine(value, crcs[-1], data_nbytes - (len(crcs) - 1) * block_nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class BlockDigests:
    """The parsed ``milepost.digests`` of one checkpoint.

    ``starts[key]`` is the index in ``crcs`` of a key's first CRC, and the relative indices of each shard's first, with
    one more entry at the end. There is no Python object per block, or per shard if tensors are cut alike. For a step of
    Hugging Face files, the CRCs are of entire files, by name.
    """

    save_id: str
    block_nbytes: int
    crcs: Sequence[int]
    starts: Mapping[str, tuple[int, Sequence[int]]]

    def of_shard(self, key: str, shard: int) -> Sequence[int]:
        """Return the block CRC-32s of one shard's raw data (``shard``: index into ``TensorEntry.shards``)."""
        start, bounds = self.starts[key]
        return self.crcs[start + bounds[shard] : start + bounds[shard + 1]]

    def of_file(self, name: str) -> Sequence[int]:
        """Return the block CRC-32s of a file (one of ``files_in_blocks``)."""
        return self.of_shard(name, 0)


def files_in_blocks(manifest: Manifest) -> list[str]:
    """Return the files with digests for each block of the file, in the order of the digests.

    In a step of Hugging Face files, those with tensors; otherwise none, since digests are per shard.
    """
    if manifest.extra.get("format") != HF_FORMAT:
        return []
    return sorted(name for name in manifest.files if name.endswith(".safetensors"))


def dump_digests(save_id: str, crcs: Iterable[Sequence[int]]) -> bytes:
    """Return the bytes of ``milepost.digests``.

    ``crcs`` yields the block CRCs of each shard in the manifest's order (by key, then shard), or those of each of
    ``files_in_blocks``.
    """
    return b"".join(digest_pieces(save_id, b"".join(map(to_bytes, crcs))))


def digest_pieces(save_id: str, crcs: Any) -> list[Any]:
    """:func:`dump_digests` piece by piece. ``crcs`` are all CRCs, in a buffer that is not copied."""
    name = save_id.encode()
    if len(name) > _MAX_SAVE_ID_NBYTES:
        raise ValueError(f"a save id of {len(name)} bytes: at most {_MAX_SAVE_ID_NBYTES} are allowed")
    values = memoryview(crcs).cast("B")
    head = _HEAD.pack(MAGIC, len(name), BLOCK_NBYTES, len(values) // 4) + name
    return [head, values, struct.pack("<I", crc32(values, crc32(head)))]


def parse_digests(data: bytes | memoryview, manifest: Manifest, path: str = DIGESTS_NAME) -> BlockDigests:
    """Read ``milepost.digests`` and check that it belongs to the manifest. ``data`` must not change: it is not copied.

    Raises FormatError if it is damaged, belongs to another save, or has a different number of blocks than the
    manifest's shards.
    """

    def fault(what: str) -> FormatError:
        return FormatError(f"{path}: {what}; the checkpoint is damaged, use another step", path=path)

    if len(data) < _HEAD.size + 4:
        raise fault(f"{len(data)} bytes are too few for a digests file")
    magic, name_nbytes, block_nbytes, count = _HEAD.unpack_from(data)
    if magic[:7] == MAGIC[:7] and magic != MAGIC:
        raise FormatError(f"{path} was written by a newer Milepost (version {magic[7]}): upgrade to read it", path=path)
    if magic != MAGIC:
        raise fault("it does not begin with the expected bytes")
    if name_nbytes > _MAX_SAVE_ID_NBYTES or len(data) != _HEAD.size + name_nbytes + 4 * count + 4:
        raise fault(f"it has {len(data)} bytes, which does not match its header")
    view = memoryview(data)
    if crc32(view[:-4]) != struct.unpack_from("<I", data, len(data) - 4)[0]:
        raise fault("its own CRC-32 does not match")
    if not 0 < block_nbytes <= 1 << 30 or block_nbytes % MAX_ELEMENT_NBYTES:
        raise fault(f"a block size of {block_nbytes} bytes is not allowed")
    save_id = str(view[_HEAD.size : _HEAD.size + name_nbytes], "utf-8", "replace")
    if save_id != manifest.save_id:
        raise fault(f"it belongs to save {save_id!r}, the manifest to save {manifest.save_id!r}")
    starts, total = _block_starts(manifest, block_nbytes)
    if total != count:
        raise fault(f"it holds {count} block CRCs, the manifest's shards have {total} blocks")
    return BlockDigests(save_id, block_nbytes, from_bytes(view[_HEAD.size + name_nbytes : -4]), starts)


def _block_starts(manifest: Manifest, block_nbytes: int) -> tuple[dict[str, tuple[int, Sequence[int]]], int]:
    starts: dict[str, tuple[int, Sequence[int]]] = {}
    position = 0
    bounds = {key: _block_bounds(manifest.tensors[key].shards, block_nbytes) for key in sorted(manifest.tensors)}
    files = files_in_blocks(manifest)
    if files:
        bounds = {name: [0, num_blocks(manifest.files[name].nbytes, block_nbytes)] for name in files}
    for key, found in bounds.items():
        starts[key] = position, found
        position += found[-1]
    return starts, position


def _block_bounds(shards: Sequence[ShardEntry], block_nbytes: int) -> Sequence[int]:
    if isinstance(shards, TiledShards):
        return shards.block_bounds(block_nbytes)
    return list(accumulate((num_blocks(shard.data_nbytes, block_nbytes) for shard in shards), initial=0))
