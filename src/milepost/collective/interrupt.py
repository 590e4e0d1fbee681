"""Defer Ctrl-C while ranks communicate."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("milepost")


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Defer KeyboardInterrupt on Ctrl-C to the end of the block; a second Ctrl-C raises it at once.

    A rank that left between two exchanges would leave the others waiting. Only Python's default handler of SIGINT is
    replaced, on the main thread: a program's own handler is kept. Blocks nest.
    """
    default = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not default:
        yield
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, default)
        log.warning(
            "interrupted: stopping once the ranks have finished this operation; press Ctrl-C again to stop at once"
        )

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, default)
        if came:
            raise KeyboardInterrupt  # takes precedence over an error of the block, which becomes its context
