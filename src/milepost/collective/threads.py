"""Work spread over threads, even while the interpreter shuts down: a save that runs then is finished.

(A ``ThreadPoolExecutor`` takes no work from that moment on, so what a background save needs can't be one.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(work: Callable[[T], R], items: Sequence[T], num_threads: int, *, name: str) -> list[R]:
    """``[work(item) for item in items]``, done by so many threads, of which the calling one is the first.

    After an error no further item is begun; when all threads are done, that error is raised.
    """
    results: dict[int, R] = {}
    errors: list[BaseException] = []
    remaining = iter(enumerate(items))
    lock = threading.Lock()

    def run() -> None:
        while not errors:
            with lock:
                numbered = next(remaining, None)
            if numbered is None:
                return
            try:
                results[numbered[0]] = work(numbered[1])
            except BaseException as error:  # noqa: BLE001 - the top of a thread: it is raised in the calling one
                errors.append(error)

    helpers = [threading.Thread(target=run, name=f"{name}-{n}") for n in range(1, min(num_threads, len(items)))]
    started = []
    for helper in helpers:
        try:
            helper.start()
        except RuntimeError:  # no more threads are to be had: those that run do it all
            break
        started.append(helper)
    run()
    for helper in started:
        helper.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]
