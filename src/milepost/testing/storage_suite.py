"""The conformance suite for storages: tests that every backend inherits.

::

    class TestMine(StorageSuite):
        @pytest.fixture
        def storage(self, tmp_path):
            return MyStorage(...)

Modelled on zarr-python's ``zarr.testing.store``: one suite, a few lines for each backend.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from milepost.errors import StorageError
from milepost.storage.base import Storage
from milepost.testing.handle_suite import HandleSuite, pattern


class StorageSuite(HandleSuite):
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
        storage.write_all({"a/one": b"first", "a/none": b"", "a/large": pattern(300_000)})
        storage.leave("a/left", b"for now")
        found = {entry.name: storage.read(f"a/{entry.name}") for entry in storage.list("a")}
        assert found == {"one": b"first", "none": b"", "large": pattern(300_000), "left": b"for now"}
        with pytest.raises(StorageError) as caught:
            storage.write_all({"a/new": b"n", "a/one": b"other"})
        assert caught.value.errno == errno.EEXIST
        assert storage.read("a/one") == b"first"

    def test_a_file_is_made_of_pieces_that_come_one_by_one(self, storage: Storage) -> None:
        storage.make_folder("a")
        whole = pattern(20 << 20)
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
        storage.write("a/data", pattern(100_000))
        assert not storage.share("a/none", "b/data")
        if not storage.share("a/data", "b/data"):
            assert storage.stat("b/data") is None
            return
        one, other = storage.stat("a/data"), storage.stat("b/data")
        assert one is not None
        assert other is not None
        assert one.link_id == other.link_id
        storage.remove_tree("a")
        assert storage.read("b/data") == pattern(100_000)
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

        def write(number: int) -> int | None:
            start.wait(30)
            try:
                storage.write("note", str(number).encode())
            except StorageError as error:
                return error.errno
            return None

        with ThreadPoolExecutor(6) as pool:
            errors = list(pool.map(write, range(6)))
        assert errors.count(None) == 1
        assert errors.count(errno.EEXIST) == 5
        assert storage.read("note") == str(errors.index(None)).encode()

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
