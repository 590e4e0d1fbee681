"""Work of one process that is part of a job: its saves and loads must not wait for the other ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Thread(threading.local):
    is_alone = False


_thread = _Thread()


@contextmanager
def alone() -> Iterator[None]:
    """In the block, in this thread, make ``default_comm`` this process alone: the other ranks do not take part."""
    before, _thread.is_alone = _thread.is_alone, True
    try:
        yield
    finally:
        _thread.is_alone = before


def is_alone() -> bool:
    """Return whether the calling thread is in such a block."""
    return _thread.is_alone
