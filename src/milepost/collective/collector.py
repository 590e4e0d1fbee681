"""Pause Python's cyclic garbage collector while plans are made.

A plan is many small objects without cycles. While they are created, the collector repeatedly scans all objects of the
process and finds nothing, which took a third of the time of a save of 20,000 tensors. (torchtitan disables it during
training, and collects every N steps.)
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Disable cyclic collection within the block. If the program has disabled it already, it stays so.

    For the training thread while training waits, since cycles allocated by other threads are not freed meanwhile.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
