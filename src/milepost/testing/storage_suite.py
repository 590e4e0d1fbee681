"""The conformance suite of storages: what every backend must do, as tests that a backend inherits.

::

    class TestMine(StorageSuite):
        @pytest.fixture
        def storage(self, tmp_path):
            return MyStorage(...)

In the manner of zarr-python's ``zarr.testing.store``: one suite, a few lines for each backend.
"""

from __future__ import annotations

import array
import itertools
import mmap
import threading

import pytest

from milepost.errors import StorageError
from milepost.storage.base import Storage

_MIB = 1 << 20


def _pattern(nbytes: int) -> bytes:
    """Bytes that differ at every place where a wrong offset would be seen."""
    return array.array("I", range(nbytes // 4 + 1)).tobytes()[:nbytes]


class StorageSuite:
    """Inherit, and override ``storage`` with a fixture that gives a fresh, empty storage."""

    @pytest.fixture
    def storage(self) -> Storage:
        raise pytest.UsageError("a StorageSuite must define the fixture `storage`")

    def test_a_small_file_reads_back(self, storage: Storage) -> None:
        storage.make_folder("a/b")
        storage.write("a/b/note", b"hello")
        assert storage.read("a/b/note") == b"hello"
        found = storage.stat("a/b/note")
        assert found is not None
        assert (found.name, found.is_folder, found.nbytes, found.is_link) == ("note", False, 5, False)

    def test_an_empty_file_reads_back(self, storage: Storage) -> None:
        storage.make_folder("")
        storage.write("empty", b"")
        assert storage.read("empty") == b""

    def test_a_file_is_never_overwritten(self, storage: Storage) -> None:
        storage.make_folder("")
        storage.write("note", b"first")
        with pytest.raises(StorageError):
            storage.write("note", b"second")
        with pytest.raises(StorageError):
            storage.open_write("note", 10)
        assert storage.read("note") == b"first"

    def test_append_makes_a_file_and_adds_to_its_end(self, storage: Storage) -> None:
        storage.make_folder("")
        for line in (b"one\n", b"", b"two\n"):
            storage.append("log", line)
        assert storage.read("log") == b"one\ntwo\n"

    def test_a_read_beyond_its_limit_is_refused(self, storage: Storage) -> None:
        storage.make_folder("")
        storage.write("note", b"12345")
        assert storage.read("note", limit=5) == b"12345"
        with pytest.raises(StorageError, match="5 bytes"):
            storage.read("note", limit=4)

    def test_absent_things(self, storage: Storage) -> None:
        storage.make_folder("")
        assert storage.list("nothing") == []
        assert storage.stat("nothing") is None
        assert storage.stat("nothing/below") is None
        storage.remove("nothing")
        storage.remove_tree("nothing")
        for act in (storage.read, storage.open_read):
            with pytest.raises(StorageError) as caught:
                act("nothing")
            assert caught.value.path is not None
            assert caught.value.path.endswith("nothing")

    def test_a_listing_is_sorted_and_shallow(self, storage: Storage) -> None:
        storage.make_folder("run/sub")
        storage.write("run/b", b"1")
        storage.write("run/a", b"22")
        storage.write("run/sub/deep", b"333")
        assert [(e.name, e.is_folder, e.nbytes) for e in storage.list("run")] == [
            ("a", False, 2),
            ("b", False, 1),
            ("sub", True, 0),
        ]

    def test_make_folder_may_be_repeated(self, storage: Storage) -> None:
        storage.make_folder("run/sub")
        storage.write("run/sub/kept", b"1")
        storage.make_folder("run/sub")
        assert storage.read("run/sub/kept") == b"1"

    @pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "a//b", "./a", "a/", "nul\0"])
    def test_no_name_leaves_the_root(self, storage: Storage, name: str) -> None:
        storage.make_folder("a")
        for act in (storage.read, storage.list, storage.stat, storage.remove, storage.remove_tree, storage.make_folder):
            with pytest.raises(StorageError):
                act(name)
        with pytest.raises(StorageError):
            storage.write(name, b"x")
        with pytest.raises(StorageError):
            storage.open_write(name, 1)

    def test_writes_at_any_offset_and_in_any_order(self, storage: Storage) -> None:
        storage.make_folder("")
        data = _pattern(9 * _MIB + 123)
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
        data = _pattern(8 * _MIB + 5000)
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

    def test_a_shared_file_takes_ranges_from_several_handles(self, storage: Storage) -> None:
        storage.make_folder("")
        nbytes = 5 * _MIB + 3
        data = _pattern(nbytes)
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
        data = _pattern(8 * piece)
        faults: list[Exception] = []

        def run(work: object, *args: object) -> None:
            try:
                work(*args)  # type: ignore[operator]
            except Exception as error:  # noqa: BLE001 - handed to the asserting thread
                faults.append(error)

        def in_threads(work: object) -> None:
            threads = [threading.Thread(target=run, args=(work, index * piece)) for index in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        with storage.open_write("big", len(data)) as writer:
            in_threads(lambda start: writer.write(start, [data[start : start + piece]]))
            writer.sync()
        result = bytearray(len(data))
        with storage.open_read("big") as reader:
            in_threads(lambda start: reader.read_into(start, [memoryview(result)[start : start + piece]]))
        assert not faults
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
        """More than the system takes in one call."""
        storage.make_folder("")
        data = _pattern(1500 * 5)
        pieces = [data[i : i + 5] for i in range(0, len(data), 5)]
        with storage.open_write("many", len(data)) as writer:
            writer.write(0, pieces)
            writer.sync()
        parts = [bytearray(5) for _ in pieces]
        with storage.open_read("many") as reader:
            reader.read_into(0, [memoryview(part) for part in parts])
        assert b"".join(parts) == data

    def test_a_read_beyond_the_end_is_an_error(self, storage: Storage) -> None:
        storage.make_folder("")
        storage.write("note", b"0123456789")
        with storage.open_read("note") as handle, pytest.raises(StorageError, match="10"):
            handle.read_into(8, [memoryview(bytearray(3))])

    def test_rename_moves_folders_and_never_replaces(self, storage: Storage) -> None:
        if not storage.can_rename:
            return
        storage.make_folder("one")
        storage.write("one/x", b"1")
        storage.rename("one", "two")
        assert storage.read("two/x") == b"1"
        assert storage.stat("one") is None
        storage.make_folder("three")
        with pytest.raises(StorageError):
            storage.rename("two", "three")
        with pytest.raises(StorageError):
            storage.rename("nothing", "four")
        assert storage.read("two/x") == b"1"

    def test_exchange_swaps_or_does_nothing(self, storage: Storage) -> None:
        if not storage.can_rename:
            return
        for name in ("one", "two"):
            storage.make_folder(name)
            storage.write(f"{name}/x", name.encode())
        swapped = storage.exchange("one", "two")
        expected = (b"two", b"one") if swapped else (b"one", b"two")
        assert (storage.read("one/x"), storage.read("two/x")) == expected

    def test_remove_tree_takes_everything_below(self, storage: Storage) -> None:
        storage.make_folder("run/a/b/c")
        storage.write("run/a/b/c/x", b"1")
        storage.write("run/y", b"1")
        storage.make_folder("other")
        storage.write("other/z", b"1")
        storage.remove_tree("run")
        assert storage.list("run") == []
        assert storage.read("other/z") == b"1"

    def test_remove_deletes_one_file(self, storage: Storage) -> None:
        storage.make_folder("")
        storage.write("a", b"1")
        storage.write("b", b"1")
        storage.remove("a")
        assert [entry.name for entry in storage.list("")] == ["b"]
        storage.sync_folder("")
