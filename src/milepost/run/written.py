"""What a writer says of the file that it wrote: where each record stands, and the digests of its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.tensors.plan import WriteItem


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """An item that was written, with its digests. ``block_crcs`` has one CRC-32 for each 4 MiB of raw data."""

    item: WriteItem
    crc32: int
    block_crcs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WrittenObject:
    """A value that was written. ``crc32`` is of the whole record."""

    key: str
    record_offset: int
    record_nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What one rank wrote. ``nbytes`` is the exact size of the file."""

    file: str
    nbytes: int
    tensors: tuple[WrittenTensor, ...]
    objects: tuple[WrittenObject, ...]
