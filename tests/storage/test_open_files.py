"""Many files to read from, and few of them open at a time."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import milepost
from milepost.collective.threads import map_in_threads
from milepost.errors import StorageError
from milepost.storage import LocalStorage
from milepost.storage.open_files import OpenFiles
from milepost.testing.sample import save_arrays
from milepost.testing.wrap import TraceStorage

NUM_FILES = 300


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """So many more files may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1 + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_each_file_is_read_as_if_all_were_open(memory_path: Path) -> None:
    storage = TraceStorage(LocalStorage(memory_path))
    for number in range(NUM_FILES):
        storage.write(f"{number}", f"{number:08}".encode())
    before = num_open()
    with OpenFiles(storage, limit=10) as files, room_for(40):
        handles = [files.open(f"{number}") for number in range(NUM_FILES)]
        assert num_open() - before <= 10
        found = map_in_threads(lambda handle: handle.read(0, 8), handles * 2, 4, name="read")
        assert num_open() - before <= 10 + 4
    assert found == [f"{number:08}".encode() for number in range(NUM_FILES)] * 2
    assert num_open() == before
    assert handles[7].path == f"{memory_path}/7"
    assert handles[7].nbytes == 8


def test_what_was_announced_is_announced_again_to_a_file_that_is_opened_again(memory_path: Path) -> None:
    announced = []

    class Told(TraceStorage):
        def open_read(self, path):  # type: ignore[no-untyped-def]
            handle = super().open_read(path)
            handle.will_read = lambda ranges: announced.append((path, ranges))  # type: ignore[method-assign]
            return handle

    storage = Told(LocalStorage(memory_path))
    for name in "abcde":
        storage.write(name, b"12345678")
    with OpenFiles(storage, limit=4) as files:
        for name in ("c", "d", "e"):
            files.open(name)
        first, second = files.open("a"), files.open("b")
        first.will_read([(2, 4)])
        assert second.read(0, 2) == b"12"
        assert first.read(2, 2) == b"34"
    assert ("a", [(2, 4)]) in announced[1:]


def test_a_file_that_is_missing_is_reported_before_anything_is_read(memory_path: Path) -> None:
    with OpenFiles(LocalStorage(memory_path)) as files, pytest.raises(StorageError, match="gone"):
        files.open("gone")


def test_a_step_of_more_files_than_may_be_open_is_loaded(memory_path: Path) -> None:
    array = np.arange(NUM_FILES * 4, dtype="float32").reshape(NUM_FILES, 4)
    save_arrays(LocalStorage(memory_path), "step-1", {"w": array}, num_ranks=NUM_FILES)
    into = torch.zeros(NUM_FILES, 4)
    with room_for(200):
        milepost.load(memory_path / "step-1", {"w": into})
    assert into.equal(torch.from_numpy(array))
