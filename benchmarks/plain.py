"""What the machine itself can do: the same bytes written and read by the plainest means, without format or digests."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from milepost.storage import syscalls

BLOCK_NBYTES = 8 << 20


def write(views: Sequence[memoryview], path: Path, num_threads: int, *, early: bool, direct: bool = False) -> None:
    """Write a file, reserved first, and ``fsync`` it.

    ``early``: write-back of each block is begun once it is written. ``direct``: past the page cache, from aligned
    memory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = np.cumsum([0, *(len(view) for view in views)]).tolist()
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | (os.O_DIRECT if direct else 0), 0o644)
    os.posix_fallocate(fd, 0, starts[-1])

    def share(worker: int) -> None:
        buffer = mmap.mmap(-1, BLOCK_NBYTES) if direct else None
        for index in range(worker, len(views), num_threads):
            for start in range(0, len(views[index]), BLOCK_NBYTES):
                block = views[index][start : start + BLOCK_NBYTES]
                if buffer is not None:
                    ctypes.memmove((ctypes.c_char * len(block)).from_buffer(buffer), _address(block), len(block))
                    block = memoryview(buffer)[: len(block)]
                assert os.pwrite(fd, block, starts[index] + start) == len(block)
                if early:
                    syscalls.begin_write_back(fd, starts[index] + start, len(block))

    on_threads(num_threads, share)
    os.fsync(fd)
    os.close(fd)


def _address(block: memoryview) -> int:
    found = syscalls.address_of(block)
    assert found is not None
    return found


def read(views: Sequence[memoryview], path: Path, num_threads: int) -> None:
    """Read a file into memory that is there already."""
    starts = np.cumsum([0, *(len(view) for view in views)]).tolist()
    fd = os.open(path, os.O_RDONLY)

    def share(worker: int) -> None:
        for index in range(worker, len(views), num_threads):
            for start in range(0, len(views[index]), BLOCK_NBYTES):
                block = views[index][start : start + BLOCK_NBYTES]
                assert os.preadv(fd, [block], starts[index] + start) == len(block)

    on_threads(num_threads, share)
    os.close(fd)


def read_files(folder: Path, num_threads: int) -> None:
    """Read all files of a folder into one buffer a thread, for nothing."""
    for path in sorted(folder.iterdir()):
        size, fd = path.stat().st_size, os.open(path, os.O_RDONLY)

        def share(worker: int, fd: int = fd, size: int = size) -> None:
            buffer = bytearray(BLOCK_NBYTES)
            for start in range(worker * BLOCK_NBYTES, size, num_threads * BLOCK_NBYTES):
                os.preadv(fd, [buffer], start)

        on_threads(num_threads, share)
        os.close(fd)


def forget(folder: Path) -> None:
    """Take the files of a folder, which must be synced, out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def on_threads(count: int, act: Callable[[int], None]) -> None:
    """Call ``act`` with each number below ``count``, each on a thread."""
    threads = [threading.Thread(target=act, args=(worker,)) for worker in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
