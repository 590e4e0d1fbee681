"""Say that something takes long while it does: a storage that hangs can't be stopped, but it need not do so unseen."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("milepost")

SLOW_S = 30.0
"""What takes longer than this is told of, every so often."""


def writing(rank: int, where: str, part: float) -> str:
    """What a rank that has written ``part`` (0 to 1) of its bytes of a save is busy with, for :func:`watched`."""
    if part < 1.0:
        return f"rank {rank} is writing {where} ({100 * part:.0f} % written)"
    return f"rank {rank} has written its part of {where} and waits for the disk, the other ranks or the commit"


@contextmanager
def watched(what: str | Callable[[], str]) -> Iterator[None]:
    """Log a warning every ``SLOW_S`` seconds that ``what`` still goes on, as long as the block runs.

    ``what`` names the rank and the operation: see :func:`writing`.
    """
    over = threading.Event()

    def tell() -> None:
        while not over.wait(SLOW_S):
            text = what if isinstance(what, str) else what()
            log.warning("%s: for %.0f s now; is the storage slow, or does it hang?", text, time.monotonic() - started)

    started = time.monotonic()
    thread = threading.Thread(target=tell, name="milepost-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
