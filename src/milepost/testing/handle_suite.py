"""The conformance suite for the open files of a storage, which :class:`StorageSuite` includes."""

from __future__ import annotations

import array
import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest

from milepost.errors import StorageError
from milepost.storage.base import Storage

_MIB = 1 << 20


def pattern(nbytes: int) -> bytes:
    """Return bytes in which a wrong offset shows."""
    return array.array("I", range(nbytes // 4 + 1)).tobytes()[:nbytes]


def _store(storage: Storage, name: str, data: bytes) -> None:
    with storage.open_write(name, len(data)) as handle:
        handle.write(0, [data])
        handle.sync()


class HandleSuite:
    """Tests of ``open_write`` and ``open_read``, with the fixture ``storage`` of :class:`StorageSuite`."""

    def test_writes_at_any_offset_and_in_any_order(self, storage: Storage) -> None:
        storage.make_folder("")
        data = pattern(9 * _MIB + 123)
        cuts = [0, 1, 4096, 4096 * 3, _MIB + 7, 5 * _MIB, len(data)]
        with storage.open_write("big", len(data)) as handle:
            for start, stop in reversed(list(itertools.pairwise(cuts))):
                middle = (start + stop) // 2
                handle.write(start, [data[start:middle], b"", memoryview(data)[middle:stop]])
            handle.sync()
        assert storage.read("big") == data

    def test_aligned_writes_from_aligned_memory(self, storage: Storage) -> None:
        """The fast path of the engine: page-aligned memory, whole pages, and an unaligned tail."""
        storage.make_folder("")
        data = pattern(8 * _MIB + 5000)
        with mmap.mmap(-1, len(data)) as arena:
            arena[:] = data
            with memoryview(arena) as view, storage.open_write("big", len(data)) as handle:
                half = 4 * _MIB
                handle.write(half, [view[half:]])
                handle.write(0, [view[:4096], view[4096:half]])
                handle.sync()
        assert storage.read("big") == data

    def test_the_buffer_of_a_write_may_be_reused_at_once(self, storage: Storage) -> None:
        storage.make_folder("")
        buffer = bytearray(b"first")
        with storage.open_write("note", 10) as handle:
            handle.write(0, [buffer])
            buffer[:] = b"other"
            handle.write(5, [buffer])
            handle.sync()
        assert storage.read("note") == b"firstother"

    def test_a_file_ends_where_its_last_write_did(self, storage: Storage) -> None:
        """``nbytes`` of ``open_write`` is a reservation, not the length."""
        storage.make_folder("")
        with storage.open_write("short", 5 * _MIB) as handle:
            handle.write(0, [b"abc"])
            handle.sync()
        assert storage.read("short") == b"abc"

    def test_stable_memory_is_written_with_its_content_at_the_sync(self, storage: Storage) -> None:
        """More than a part of an upload, in pieces that do not fit parts, from memory that is not copied."""
        storage.make_folder("")
        data = pattern(17 * _MIB + 321)
        with mmap.mmap(-1, len(data)) as arena:
            arena[:] = data
            with memoryview(arena) as view:
                with storage.open_write("big", len(data)) as handle:
                    for start in range(0, len(data), 3 * _MIB + 5):
                        handle.write(start, [view[start : start + 3 * _MIB + 5]], stable=True)
                    handle.sync()
                del handle
        assert storage.read("big") == data

    def test_a_hole_is_zeros(self, storage: Storage) -> None:
        storage.make_folder("")
        with storage.open_write("holes", 100) as handle:
            handle.write(90, [b"end"])
            handle.write(10, [b"middle"])
            handle.sync()
        assert storage.read("holes") == bytes(10) + b"middle" + bytes(74) + b"end"

    def test_a_file_without_a_sync_is_not_complete(self, storage: Storage) -> None:
        """An abandoned file is absent, or left for the caller to remove; writing it again then works."""
        storage.make_folder("")
        for nbytes in (10, 17 * _MIB):
            with storage.open_write("given-up", nbytes) as handle:
                handle.write(0, [bytes(nbytes)])
            storage.remove("given-up")
            storage.write("given-up", b"whole")
            assert storage.read("given-up") == b"whole"
            storage.remove("given-up")

    def test_a_shared_file_takes_ranges_from_several_handles(self, storage: Storage) -> None:
        storage.make_folder("")
        if not storage.can_share:
            with pytest.raises(StorageError, match="can't be written by two processes"):
                storage.open_write("shared", 10, shared=True)
            return
        nbytes = 5 * _MIB + 3
        data = pattern(nbytes)
        cut = 2 * _MIB + 17
        with (
            storage.open_write("shared", nbytes, shared=True) as one,
            storage.open_write("shared", nbytes, shared=True) as other,
        ):
            other.write(cut, [data[cut:]])
            other.sync()
            one.write(0, [data[:cut]])
            one.sync()
        assert storage.read("shared") == data
        with storage.open_write("sparse", nbytes, shared=True) as handle:
            handle.write(0, [b"abc"])
            handle.sync()
        assert storage.read("sparse") == b"abc" + bytes(nbytes - 3)

    def test_threads_may_write_and_read_one_file(self, storage: Storage) -> None:
        storage.make_folder("")
        piece = 300_001
        data = pattern(8 * piece)
        starts = range(0, len(data), piece)
        result = memoryview(bytearray(len(data)))
        with ThreadPoolExecutor(8) as pool:
            with storage.open_write("big", len(data)) as writer:
                list(pool.map(lambda start: writer.write(start, [data[start : start + piece]]), starts))
                writer.sync()
            with storage.open_read("big") as reader:
                list(pool.map(lambda start: reader.read_into(start, [result[start : start + piece]]), starts))
        assert result == data

    def test_a_read_is_scattered_into_its_buffers(self, storage: Storage) -> None:
        storage.make_folder("")
        storage.write("note", b"0123456789")
        one, none, two = bytearray(3), bytearray(0), bytearray(4)
        with storage.open_read("note") as handle:
            assert handle.nbytes == 10
            handle.read_into(2, [memoryview(one), memoryview(none), memoryview(two)])
        assert bytes(one + two) == b"2345678"

    def test_thousands_of_small_buffers(self, storage: Storage) -> None:
        """More buffers than the system accepts in one call."""
        storage.make_folder("")
        data = pattern(1500 * 5)
        pieces = [data[i : i + 5] for i in range(0, len(data), 5)]
        with storage.open_write("many", len(data)) as writer:
            writer.write(0, pieces)
            writer.sync()
        parts = [bytearray(5) for _ in pieces]
        with storage.open_read("many") as reader:
            reader.read_into(0, [memoryview(part) for part in parts])
        assert b"".join(parts) == data

    def test_announced_and_unannounced_reads_are_the_same(self, storage: Storage) -> None:
        """Neighbours, far ones, one over many requests, one inside another; read in and out of order, and again."""
        storage.make_folder("")
        data = pattern(21 * _MIB)
        _store(storage, "big", data)
        ranges = [(start, start + 5000) for start in range(100, 3 * _MIB, 300_000)]
        ranges += [
            (4 * _MIB, 20 * _MIB + 1),
            (6 * _MIB, 6 * _MIB + 10),
            (20 * _MIB, 20 * _MIB),
            (20 * _MIB + 1, 21 * _MIB),
        ]
        for order in (ranges, ranges[::-1]):
            with storage.open_read("big") as reader:
                reader.will_read(ranges)
                for start, stop in [*order, ranges[0], (7, 99)]:
                    middle = (2 * start + stop) // 3
                    result = memoryview(bytearray(stop - start))
                    reader.read_into(start, [result[: middle - start], result[middle - start :]])
                    assert result == data[start:stop]

    def test_announced_reads_from_several_threads(self, storage: Storage) -> None:
        storage.make_folder("")
        data = pattern(6 * _MIB)
        _store(storage, "big", data)
        piece = 170_001
        ranges = [(start, min(start + piece, len(data))) for start in range(0, len(data), piece)]
        result = memoryview(bytearray(len(data)))
        with storage.open_read("big") as reader:
            reader.will_read(ranges)

            def read(number: int) -> None:
                for start, stop in ranges[number::4]:
                    reader.read_into(start, [result[start:stop]])

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(read, range(4)))
        assert result == data

    def test_a_read_beyond_the_end_is_an_error(self, storage: Storage) -> None:
        storage.make_folder("")
        storage.write("note", b"0123456789")
        with storage.open_read("note") as handle, pytest.raises(StorageError, match="10"):
            handle.read_into(8, [memoryview(bytearray(3))])
