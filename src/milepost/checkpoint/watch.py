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


@contextmanager
def watched(what: str | Callable[[], str]) -> Iterator[None]:
    """Log a warning every ``SLOW_S`` seconds that ``what`` still goes on, as long as the block runs.

    ``what`` names the rank and the operation: ``rank 1 is writing step-5/__1_0.distcp``.
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
