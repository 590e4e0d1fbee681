"""Wrapped storages: they behave as what they wrap, and add exactly what they promise."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from milepost.errors import StorageError
from milepost.storage import LocalStorage
from milepost.testing.faulty import FaultyStorage
from milepost.testing.storage_suite import StorageSuite
from milepost.testing.wrap import Operation, RetryStorage, TraceStorage, WrappedStorage

T = TypeVar("T")


class TestTraceConforms(StorageSuite):
    @pytest.fixture
    def storage(self, memory_path: Path) -> TraceStorage:
        return TraceStorage(LocalStorage(memory_path))


class TestRetryAndFaultyConform(StorageSuite):
    @pytest.fixture
    def storage(self, memory_path: Path) -> RetryStorage:
        return RetryStorage(FaultyStorage(LocalStorage(memory_path)))


class Flaky(WrappedStorage):
    """Fails the first ``times`` calls of the operation ``name`` with ``number``."""

    def __init__(self, root: Path, name: str, number: int, times: int):
        super().__init__(LocalStorage(root))
        self.name, self.number, self.left = name, number, times

    def around(self, operation: Operation, act: Callable[[], T], half: Callable[[], None] | None = None) -> T:
        if operation.name == self.name and self.left:
            self.left -= 1
            raise StorageError("flaky", operation=operation.name, path=operation.path, errno=self.number)
        return act()


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


def test_transient_errors_are_retried_with_growing_pauses(memory_path: Path) -> None:
    (memory_path / "note").write_bytes(b"x")
    pauses: list[float] = []
    storage = RetryStorage(Flaky(memory_path, "read", errno.ESTALE, 3), first_wait_s=0.5, sleep=pauses.append)
    assert storage.read("note") == b"x"
    assert pauses == [0.5, 1.0, 2.0]


def test_retries_are_bounded(memory_path: Path) -> None:
    pauses: list[float] = []
    storage = RetryStorage(Flaky(memory_path, "list", errno.ETIMEDOUT, 100), num_tries=4, sleep=pauses.append)
    with pytest.raises(StorageError, match="flaky"):
        storage.list("")
    assert len(pauses) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
def test_lasting_errors_are_not_retried(memory_path: Path, number: int) -> None:
    flaky = Flaky(memory_path, "list", number, 1)
    with pytest.raises(StorageError):
        RetryStorage(flaky, sleep=lambda s: None).list("")
    assert flaky.left == 0


@pytest.mark.parametrize("name", ["sync", "sync_folder", "rename", "exchange", "write", "open_write"])
def test_what_may_not_be_done_twice_is_done_once(memory_path: Path, name: str) -> None:
    """A second fsync would succeed without the data that the first one lost; a second exchange would undo the first."""
    for folder in ("one", "two"):
        (memory_path / folder).mkdir()
    storage = RetryStorage(Flaky(memory_path, name, errno.EAGAIN, 1), sleep=lambda s: None)
    acts = {
        "sync": lambda: _synced(storage),
        "sync_folder": lambda: storage.sync_folder(""),
        "rename": lambda: storage.rename("one", "three"),
        "exchange": lambda: storage.exchange("one", "two"),
        "write": lambda: storage.write("note", b"x"),
        "open_write": lambda: storage.open_write("note", 1),
    }
    with pytest.raises(StorageError, match="flaky"):
        acts[name]()


def _synced(storage: RetryStorage) -> None:
    with storage.open_write("x", 1) as handle:
        handle.sync()


def test_a_handle_of_a_retrying_storage_retries_too(memory_path: Path) -> None:
    storage = RetryStorage(Flaky(memory_path, "write_at", errno.EAGAIN, 2), sleep=lambda s: None)
    with storage.open_write("x", 3) as handle:
        handle.write(0, [b"abc"])
        handle.sync()
    assert storage.read("x") == b"abc"


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
