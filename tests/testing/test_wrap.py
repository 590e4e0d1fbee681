"""Wrapped storages conform like the storage inside, and record or fail as documented."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TypeVar

import pytest

from milepost.errors import StorageError
from milepost.storage import LocalStorage
from milepost.testing.faulty import FaultyStorage
from milepost.testing.storage_suite import StorageSuite
from milepost.testing.wrap import Operation, TraceStorage

T = TypeVar("T")


class TestTraceConforms(StorageSuite):
    @pytest.fixture
    def storage(self, memory_path: Path) -> TraceStorage:
        return TraceStorage(LocalStorage(memory_path))


class TestFaultyConforms(StorageSuite):
    @pytest.fixture
    def storage(self, memory_path: Path) -> FaultyStorage:
        return FaultyStorage(LocalStorage(memory_path))


def test_a_trace_holds_every_operation_in_order_with_its_size(memory_path: Path) -> None:
    storage = TraceStorage(LocalStorage(memory_path))
    storage.make_folder("a")
    storage.write("a/note", b"hello")
    with storage.open_write("a/big", 100) as writer:
        writer.write(10, [b"12", b"345"])
        writer.sync()
    with storage.open_read("a/note") as reader:
        reader.read_into(1, [memoryview(bytearray(3))])
    storage.rename("a", "b")
    assert [str(operation) for operation in storage.operations] == [
        "make_folder a",
        "write a/note 5",
        "open_write a/big 100",
        "write_at a/big 10+5",
        "sync a/big",
        "close a/big",
        "open_read a/note",
        "read_into a/note 1+3",
        "rename a b",
    ]
    assert storage.nbytes("read_into") == 3


def test_a_fault_comes_at_its_operation_and_only_there(memory_path: Path) -> None:
    storage = FaultyStorage(LocalStorage(memory_path), fail_at=1, number=errno.ENOSPC)
    storage.write("a", b"1")
    assert storage.read("a") == b"1"  # reads are not counted
    with pytest.raises(StorageError, match="no space left on device") as caught:
        storage.write("b", b"2")
    assert caught.value.errno == errno.ENOSPC
    storage.write("c", b"3")
    assert [entry.name for entry in storage.list("")] == ["a", "c"]


def test_a_torn_write_leaves_its_first_half(memory_path: Path) -> None:
    storage = FaultyStorage(LocalStorage(memory_path), fail_at=0, tear=True)
    with pytest.raises(StorageError):
        storage.write("a", b"12345678")
    assert storage.read("a") == b"1234"
    storage = FaultyStorage(LocalStorage(memory_path), fail_at=1, tear=True)
    with storage.open_write("b", 8) as handle:
        with pytest.raises(StorageError):
            handle.write(0, [b"123", b"45678"])
        handle.sync()
    assert storage.read("b") == b"1234"


def test_a_storage_that_stays_broken_answers_nothing_more(memory_path: Path) -> None:
    storage = FaultyStorage(LocalStorage(memory_path), fail_at=1, stays_broken=True)
    storage.write("a", b"1")
    with pytest.raises(StorageError):
        storage.write("b", b"2")
    with pytest.raises(StorageError):
        storage.write("c", b"3")
    with pytest.raises(StorageError):
        storage.read("a")
    assert [entry.name for entry in LocalStorage(memory_path).list("")] == ["a"]


def test_a_hook_is_called_at_the_operation(memory_path: Path) -> None:
    seen: list[Operation] = []
    storage = FaultyStorage(LocalStorage(memory_path), fail_at=0, hook=seen.append)
    with pytest.raises(StorageError):
        storage.make_folder("a")
    assert [str(operation) for operation in seen] == ["make_folder a"]
