"""Read one stored item's data in any parts, comparing every byte with the recorded digests.

Loads, verifications and conversions all read through a ``BlockReader``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NoReturn

from milepost.errors import DigestMismatchError, FormatError
from milepost.format import digest, record
from milepost.format.digest import BlockDigests
from milepost.format.manifest import BLOCK_NBYTES, ShardEntry
from milepost.storage.base import ReadHandle


@dataclass(slots=True)
class _Parts:
    """The parts read of one digest's bytes: the CRC-32 of each, and their total size."""

    crcs: dict[tuple[int, int], int] = field(default_factory=dict)
    nbytes: int = 0


class BlockReader:
    """Reads parts of ``nbytes`` of data at ``offset`` of an open file. Safe to use from several threads.

    The digests are CRC-32s of each block (``block_crcs``), of all the data (``crc32``), or none. ``frame`` is the
    expected header and footer of the data; each is compared when the adjacent block is read completely. ``on_read`` is
    called with the size of each read.
    """

    def __init__(
        self,
        handle: ReadHandle,
        key: str,
        offset: int,
        nbytes: int,
        crc32: int | None,
        block_crcs: Sequence[int] | None = None,
        block_nbytes: int = BLOCK_NBYTES,
        *,
        frame: tuple[bytes, bytes] = (b"", b""),
        on_read: Callable[[int], None] = lambda nbytes: None,
    ):
        self.handle = handle
        self.key = key
        self.offset = offset
        self.nbytes = nbytes
        self._crc32 = crc32
        self._block_crcs = block_crcs
        self._step = block_nbytes if block_crcs is not None else BLOCK_NBYTES
        self._unit_nbytes = block_nbytes if block_crcs is not None else max(nbytes, 1)
        self._frame = frame
        self._on_read = on_read
        self._passed: dict[int, _Parts] = {}
        self._checked: set[int] = set()
        self._lock = threading.Lock()

    @property
    def has_digests(self) -> bool:
        """True if there are recorded digests."""
        return self._crc32 is not None or self._block_crcs is not None

    @property
    def checked_nbytes(self) -> int:
        """Number of bytes that were compared with their digest."""
        return sum(min(low + self._unit_nbytes, self.nbytes) - low for low in self._checked)

    def digested(self) -> Iterator[tuple[int, int]]:
        """The ranges of the data with one digest each: its blocks, or all of it."""
        if self.has_digests:
            for low in range(0, self.nbytes, self._unit_nbytes):
                yield low, min(low + self._unit_nbytes, self.nbytes)

    def file_range(self, low: int, high: int) -> tuple[int, int]:
        """Return the file range read for the blocks of ``[low, high)``, including header and footer."""
        before = len(self._frame[0]) if low == 0 else 0
        after = len(self._frame[1]) if high == self.nbytes else 0
        return self.offset + low - before, self.offset + high + after

    def read(self, start: int, into: memoryview, spare: Callable[[], memoryview] | None = None) -> None:
        """Fill ``into`` with the data, starting at byte ``start``.

        With ``spare`` (which returns this thread's buffer of one block), blocks that overlap ``into`` are read
        completely, and all data is checked on return. Otherwise, or without block digests, a digest is compared once
        all its bytes have been read; see :meth:`finish`.

        Raises:
            DigestMismatchError: the data changed after it was written.
            FormatError: header or footer is not as expected.
            StorageError: a read failed or was short.
        """
        stop = start + len(into)
        for low in range(start - start % self._step, stop, self._step):
            first, last = max(low, start), min(low + self._step, stop)
            at, views = self._place(low, first, into[first - start : last - start], spare)
            self.handle.read_into(at, views)
            self._arrived(low, first, views)

    def read_scattered(self, start: int, into: memoryview) -> None:
        """Fill ``into`` with the data from byte ``start`` on, one of very many small parts.

        Their digests are not kept: :meth:`finish` reads all the data again. Raises StorageError.
        """
        self.handle.read_into(self.offset + start, [into])
        self._on_read(len(into))
        if self.has_digests:
            stop = start + len(into)
            with self._lock:
                for low in range(start - start % self._unit_nbytes, stop, self._unit_nbytes):
                    if low not in self._checked:
                        self._passed.setdefault(low, _Parts())

    def read_through(
        self, start: int, stop: int, spare: Callable[[], memoryview], take: Callable[[int, memoryview], None]
    ) -> None:
        """Read complete blocks, the first at ``start``, and pass each to ``take`` once it is checked.

        ``take(low, data)`` receives the data from byte ``low`` on, in spare memory. Raises like :meth:`read`.
        """
        for low in range(start, stop, self._step):
            data = spare()[: min(self._step, stop - low)]
            at, views = self._place(low, low, data, spare)
            self.handle.read_into(at, views)
            self._arrived(low, low, views)
            take(low, data)

    def check_record(self, record: memoryview) -> memoryview:
        """Check a record of one block that the caller has read, including header and footer; returns its data.

        Raises like :meth:`read`.
        """
        before = len(self._frame[0])
        data = record[before : before + self.nbytes]
        self._arrived(0, 0, [record[:before], data, record[before + self.nbytes :]])
        return data

    def _place(
        self, low: int, first: int, part: memoryview, spare: Callable[[], memoryview] | None
    ) -> tuple[int, list[memoryview]]:
        """Plan the reads of ``part`` of the block at ``low``, from byte ``first`` on.

        If the block can be checked and there is ``spare`` memory, that is all of it, with header or footer.
        """
        if spare is None or self._block_crcs is None:
            return self.offset + first, [part]
        high = min(low + self._step, self.nbytes)
        before = memoryview(bytearray(len(self._frame[0]) if low == 0 else 0))
        after = memoryview(bytearray(len(self._frame[1]) if high == self.nbytes else 0))
        skipped, nbytes = first - low, high - low
        rest = spare() if len(part) < nbytes else memoryview(b"")
        views = [before, rest[:skipped], part, rest[skipped : nbytes - len(part)], after]
        return self.offset + low - len(before), views

    def _arrived(self, low: int, first: int, views: Sequence[memoryview]) -> None:
        """Check the data read: a part, or a complete block with header or footer."""
        self._on_read(sum(map(len, views)))
        if len(views) == 1:
            self.passed(first, views[0])
            return
        before, *block, after = views
        if (before and before != self._frame[0]) or (after and after != self._frame[1]):
            raise FormatError(
                f"{self.handle.path}: the record of '{self.key}' has a damaged header or footer; "
                "run `milepost verify` on the checkpoint",
                path=self.handle.path,
                key=self.key,
            )
        crc = 0
        for view in block:
            crc = digest.crc32(view, crc)
        self._compare(low, min(low + self._step, self.nbytes), crc)

    def passed(self, start: int, data: memoryview) -> None:
        """Record ``data``, read at byte ``start``, within one block.

        Raises:
            DigestMismatchError: a block, or all of the data, is now complete and differs from what was written.
        """
        if not self.has_digests:
            return
        crc, part = digest.crc32(data), (start, start + len(data))
        low = start - start % self._unit_nbytes
        high = min(low + self._unit_nbytes, self.nbytes)
        if part == (low, high):
            self._compare(low, high, crc)
            return
        with self._lock:
            parts = self._passed.setdefault(low, _Parts())
            parts.nbytes += len(data) if part not in parts.crcs else 0
            expected = parts.crcs.setdefault(part, crc)
            if parts.nbytes == high - low:
                del self._passed[low]
        if expected != crc:
            self._raise_mismatch(*part, expected, crc)
        if parts.nbytes == high - low:
            self._compare_parts(low, high, parts.crcs)

    def finish(self) -> int:
        """Check partly read digests by reading the rest of their bytes; returns ``checked_nbytes``.

        Raises:
            DigestMismatchError: the data changed after it was written.
        """
        while self._passed:
            low, parts = self._passed.popitem()
            self._compare_parts(low, min(low + self._unit_nbytes, self.nbytes), parts.crcs)
        return self.checked_nbytes

    def _compare_parts(self, low: int, high: int, parts: Mapping[tuple[int, int], int]) -> None:
        """Compare the digest of ``[low, high)`` with that of its parts, which may overlap and have gaps."""
        value, upto = 0, {low: 0}
        for start, stop in pairwise(sorted({low, high, *(edge for part in parts for edge in part)})):
            crc = parts.get((start, stop))
            value = digest.combine(value, self._read_digest(start, stop) if crc is None else crc, stop - start)
            upto[stop] = value
        self._compare(low, high, value)
        for (start, stop), crc in parts.items():  # parts read again: was the first reading the same?
            found = digest.combine(upto[start], 0, stop - start) ^ upto[stop]
            if found != crc:
                self._raise_mismatch(start, stop, found, crc)

    def _read_digest(self, start: int, stop: int) -> int:
        """Return the CRC-32 of the data bytes ``[start, stop)``, which are read only for this."""
        buffer = memoryview(bytearray(min(stop - start, BLOCK_NBYTES)))
        value = 0
        for low in range(start, stop, BLOCK_NBYTES):
            view = buffer[: min(stop - low, BLOCK_NBYTES)]
            self.handle.read_into(self.offset + low, [view])
            self._on_read(len(view))
            value = digest.crc32(view, value)
        return value

    def _compare(self, low: int, high: int, found: int) -> None:
        expected = self._block_crcs[low // self._unit_nbytes] if self._block_crcs is not None else self._crc32
        if expected is not None and expected != found:
            self._raise_mismatch(low, high, expected, found)
        self._checked.add(low)

    def _raise_mismatch(self, start: int, stop: int, expected: int, found: int) -> NoReturn:
        begin, end = self.offset + start, self.offset + stop
        named = f" in '{self.key}'" if self.key else ""
        raise DigestMismatchError(
            f"digest mismatch{named}, bytes {begin} to {end} of {self.handle.path} (CRC-32 {found:08x}, "
            f"recorded {expected:08x}): they changed after they were written; run `milepost verify` on the checkpoint",
            path=self.handle.path,
            key=self.key or None,
            byte_range=(begin, end),
            expected=expected,
            found=found,
        )


def shard_reader(
    handle: ReadHandle,
    key: str,
    dtype: str,
    shard: ShardEntry,
    number: int,
    digests: BlockDigests | None,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> BlockReader:
    """Return the reader of shard ``number`` of tensor ``key``. ``digests`` are those of a checkpoint of Milepost.

    Raises:
        FormatError: the offsets do not match dtype and sizes.
    """
    assert shard.data_offset is not None, "an external shard must be located before it is read"
    if digests is None:
        return BlockReader(handle, key, shard.data_offset, shard.data_nbytes, shard.crc32, on_read=on_read)
    layout = record.tensor_record(dtype, shard.box.sizes)
    where = (shard.record_offset + layout.data_offset, layout.data_nbytes, layout.nbytes)
    if shard.crc32 is None or (shard.data_offset, shard.data_nbytes, shard.record_nbytes) != where:
        raise FormatError(f"the manifest has invalid offsets for the record of '{key}'", path=handle.path, key=key)
    return BlockReader(
        handle,
        key,
        shard.data_offset,
        shard.data_nbytes,
        shard.crc32,
        digests.of_shard(key, number),
        digests.block_nbytes,
        frame=(layout.header, record.record_footer(layout, shard.crc32)),
        on_read=on_read,
    )
