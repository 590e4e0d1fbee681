"""The conformance suite for storages: tests that every backend inherits.

::

    class TestMine(StorageSuite):
        @pytest.fixture
        def storage(self, tmp_path):
            return MyStorage(...)

Modelled on zarr-python's ``zarr.testing.store``: one suite, a few lines for each backend.
"""

from __future__ import annotations

import array
import errno
import itertools
import mmap
import threading
from collections.abc import Iterator

import pytest

from milepost.errors import StorageError
from milepost.storage.base import Storage

_MIB = 1 << 20


def _pattern(nbytes: int) -> bytes:
    """Return bytes in which a wrong offset shows."""
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

    def test_several_small_files_are_made_at_once(self, storage: Storage) -> None:
        storage.make_folder("a")
        storage.write_all({"a/one": b"first", "a/none": b"", "a/large": _pattern(300_000)})
        storage.leave("a/left", b"for now")
        found = {entry.name: storage.read(f"a/{entry.name}") for entry in storage.list("a")}
        assert found == {"one": b"first", "none": b"", "large": _pattern(300_000), "left": b"for now"}
        with pytest.raises(StorageError) as caught:
            storage.write_all({"a/new": b"n", "a/one": b"other"})
        assert caught.value.errno == errno.EEXIST
        assert storage.read("a/one") == b"first"

    def test_a_file_is_made_of_pieces_that_come_one_by_one(self, storage: Storage) -> None:
        storage.make_folder("a")
        whole = _pattern(20 << 20)
        pieces = (whole[start : start + (3 << 20)] for start in range(0, len(whole), 3 << 20))
        storage.write_all({"a/made": pieces, "a/list": [b"one", b"", memoryview(whole)[:100]], "a/none": []})
        assert storage.read("a/made") == whole
        assert storage.read("a/list") == b"one" + whole[:100]
        assert storage.read("a/none") == b""

        def failing() -> Iterator[bytes]:
            yield b"begun"
            raise StorageError("broken", operation="read", path="")

        with pytest.raises(StorageError, match="broken"):
            storage.write_all({"a/broken": failing()})

    def test_a_shared_file_stays_when_the_other_goes(self, storage: Storage) -> None:
        storage.make_folder("a")
        storage.make_folder("b")
        storage.write("a/data", _pattern(100_000))
        assert not storage.share("a/none", "b/data")
        if not storage.share("a/data", "b/data"):
            assert storage.stat("b/data") is None
            return
        one, other = storage.stat("a/data"), storage.stat("b/data")
        assert one is not None
        assert other is not None
        assert one.link_id == other.link_id
        storage.remove_tree("a")
        assert storage.read("b/data") == _pattern(100_000)
        found = storage.stat("b/data")
        assert found is not None
        assert found.link_id == ""

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

    def test_all_files_below_a_folder_are_listed_by_their_relative_names(self, storage: Storage) -> None:
        storage.make_folder("run/sub/deep")
        storage.make_folder("run-2")
        for name, data in (("run/b", b"1"), ("run/sub/x", b"22"), ("run/sub/deep/y", b"333"), ("run-2/other", b"")):
            storage.write(name, data)
        found = storage.list_files("run")
        assert {name: (entry.name, entry.nbytes) for name, entry in found.items()} == {
            "b": ("b", 1),
            "sub/x": ("sub/x", 2),
            "sub/deep/y": ("sub/deep/y", 3),
        }
        assert storage.list_files("run/sub/deep").keys() == {"y"}
        assert storage.list_files("").keys() == {"run/b", "run/sub/x", "run/sub/deep/y", "run-2/other"}
        assert storage.list_files("nothing") == {}

    def test_a_folder_is_seen_when_something_is_in_it(self, storage: Storage) -> None:
        storage.make_folder("run/sub")
        storage.write("run/sub/x", b"1")
        for path in ("run", "run/sub"):
            found = storage.stat(path)
            assert found is not None
            assert (found.name, found.is_folder, found.nbytes) == (path.rpartition("/")[2], True, 0)
        assert storage.stat("ru") is None

    def test_replace_makes_or_changes_a_file(self, storage: Storage) -> None:
        storage.make_folder("run")
        for data in (b"first", b"", b"third, longer"):
            storage.replace("run/note", data)
            assert storage.read("run/note") == data
        assert [entry.name for entry in storage.list("run")] == ["note"]

    def test_a_conditional_put_succeeds_once(self, storage: Storage) -> None:
        storage.make_folder("")
        if not storage.has_conditional_put:
            with pytest.raises(StorageError):
                storage.put_if("note", b"x", None)
            return
        assert storage.read_tagged("note") is None
        storage.put_if("note", b"first", None)
        with pytest.raises(StorageError) as caught:
            storage.put_if("note", b"other", None)
        assert caught.value.errno == errno.EEXIST
        found = storage.read_tagged("note")
        assert found is not None
        assert found[0] == b"first"
        storage.put_if("note", b"second", found[1])
        with pytest.raises(StorageError) as caught:
            storage.put_if("note", b"third", found[1])
        assert caught.value.errno == errno.EEXIST
        assert storage.read("note") == b"second"

    def test_of_several_writers_one_creates_a_file(self, storage: Storage) -> None:
        storage.make_folder("")
        storage.write("warm-up", b"")
        start = threading.Barrier(6)
        won: list[int] = []
        lost: list[int] = []

        def write(number: int) -> None:
            nonlocal lost
            start.wait(30)
            try:
                storage.write("note", str(number).encode())
                won.append(number)
            except StorageError as error:
                lost += [number] if error.errno == errno.EEXIST else []

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 5)
        assert storage.read("note") == str(won[0]).encode()

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

    def test_stable_memory_is_written_with_its_content_at_the_sync(self, storage: Storage) -> None:
        """More than a part of an upload, in pieces that do not fit parts, from memory that is not copied."""
        storage.make_folder("")
        data = _pattern(17 * _MIB + 321)
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
            except Exception as error:  # noqa: BLE001 - re-raised in the asserting thread
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
        """More buffers than the system accepts in one call."""
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

    def test_announced_and_unannounced_reads_are_the_same(self, storage: Storage) -> None:
        """Neighbours, far ones, one over many requests, one inside another; read in and out of order, and again."""
        storage.make_folder("")
        data = _pattern(21 * _MIB)
        with storage.open_write("big", len(data)) as writer:
            writer.write(0, [data])
            writer.sync()
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
        data = _pattern(6 * _MIB)
        with storage.open_write("big", len(data)) as writer:
            writer.write(0, [data])
            writer.sync()
        piece = 170_001
        ranges = [(start, min(start + piece, len(data))) for start in range(0, len(data), piece)]
        result = memoryview(bytearray(len(data)))
        with storage.open_read("big") as reader:
            reader.will_read(ranges)

            def read(number: int) -> None:
                for start, stop in ranges[number::4]:
                    reader.read_into(start, [result[start:stop]])

            threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert result == data

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
        storage.make_folder("run-2")
        storage.write("run-2/z", b"1")
        storage.remove_tree("run/a")
        assert storage.stat("run/a") is None
        assert storage.list_files("run").keys() == {"y"}
        storage.remove_tree("run")
        assert storage.stat("run") is None
        assert storage.list_files("run") == {}
        assert storage.read("run-2/z") == b"1"
        storage.remove_tree("run-2/z")
        assert storage.stat("run-2/z") is None

    def test_remove_deletes_one_file(self, storage: Storage) -> None:
        storage.make_folder("")
        storage.write("a", b"1")
        storage.write("b", b"1")
        storage.remove("a")
        assert [entry.name for entry in storage.list("")] == ["b"]
        storage.sync_folder("")
