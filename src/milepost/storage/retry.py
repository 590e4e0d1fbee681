"""Bounded retries of requests after transient failures: throttling, a reset, a time-out."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

log = logging.getLogger("milepost")

T = TypeVar("T")

_jitter = random.Random()
"""A separate generator: the global one belongs to training; its state is saved and must not depend on a network."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Number and duration of a request's retries.

    Waits double from ``first_wait_s`` to ``max_wait_s``, and each is reduced by up to half at random, so that a
    thousand ranks that were throttled together do not retry together ("Exponential Backoff And Jitter", AWS
    Architecture Blog, 2015).
    """

    num_tries: int = 8
    deadline_s: float = 180.0
    """No attempt begins later than this after the first one."""
    first_wait_s: float = 0.2
    max_wait_s: float = 15.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def call(self, doing: str, act: Callable[[], T], why_again: Callable[[Exception], str | None]) -> T:
        """Return the result of ``act``, with retries while ``why_again`` names a transient cause of the error.

        Every failure that leads to a retry is logged, with ``doing`` ("reading s3://...").
        """
        deadline = self.clock() + self.deadline_s
        wait_s = self.first_wait_s
        for number in range(2, self.num_tries + 1):
            try:
                return act()
            except Exception as error:
                cause = why_again(error)
                pause_s = wait_s * _jitter.uniform(0.5, 1.0)
                if cause is None or self.clock() + pause_s > deadline:
                    raise
                log.warning("%s failed (%s): try %d of %d in %.1f s", doing, cause, number, self.num_tries, pause_s)
            self.sleep(pause_s)
            wait_s = min(2 * wait_s, self.max_wait_s)
        return act()
