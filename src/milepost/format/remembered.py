"""The last result of a pure function, kept for its next call: a save is most often like the one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """The last value that was made, and what it was made from.

    Compared by value, so it can't be stale. Used from any thread: a race only makes a value twice.
    """

    def __init__(self) -> None:
        self._last: tuple[object, T] | None = None

    def of(self, inputs: object, make: Callable[[], T]) -> T:
        """Return what ``make`` returns for ``inputs``, which determine it."""
        last = self._last
        if last is not None and last[0] == inputs:
            return last[1]
        value = make()
        self._last = inputs, value
        return value
