"""Work spread over threads, also during the interpreter's shutdown, when a running save is finished.

(A ``ThreadPoolExecutor`` accepts no work from then on, so background saves can't use one.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sized
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(work: Callable[[T], R], items: Iterable[T], num_threads: int, *, name: str) -> list[R]:
    """``[work(item) for item in items]``, by ``num_threads`` threads, of which the calling one is the first.

    Items are taken one by one as threads become free, so ``items`` may be generated lazily. After an error (also one of
    ``items``, or an interrupt) no further item is started; the error is raised when all threads are done.
    """
    results: dict[int, R] = {}
    errors: list[BaseException] = []
    remaining = enumerate(items)
    lock = threading.Lock()

    def run() -> None:
        try:
            while not errors:
                with lock:
                    numbered = next(remaining, None)
                if numbered is None:
                    return
                results[numbered[0]] = work(numbered[1])
        except BaseException as error:  # noqa: BLE001 - the top of a thread: it is raised in the calling one
            errors.append(error)

    most = len(items) if isinstance(items, Sized) else num_threads
    started = []
    for number in range(1, min(num_threads, most)):
        helper = threading.Thread(target=run, name=f"{name}-{number}")
        try:
            helper.start()
        except RuntimeError:  # no more threads are available: the running ones do all the work
            break
        started.append(helper)
    run()
    try:
        for helper in started:
            helper.join()
    except BaseException as error:  # noqa: BLE001 - an interrupt reaches only this thread: let the others end first
        errors.append(error)
        for helper in started:
            helper.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(results))]
