"""What a pickle may contain: globals that a reader knows, objects of unknown classes, and the allowed containers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from milepost.errors import FormatError

_MAX_KEY_BITS = 64


class OverLimitError(FormatError):
    """A pickle exceeds a limit: no other reader should try it."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """The meaning of a global in a pickle.

    ``call`` builds the data for a ``REDUCE`` and must raise FormatError for invalid arguments; ``new`` allows
    ``NEWOBJ`` without arguments, which creates an Instance if there is no ``call``. ``value`` is for globals that are
    only named, such as a dtype.
    """

    name: str
    call: Callable[..., object] | None = None
    new: bool = False
    value: object = None
    is_value: bool = False
    """Replace the global by ``value`` itself."""


@dataclass(slots=True, eq=False)
class Instance:
    """An object of a class that the reader does not know: its name and its pickled state.

    Hashed and compared by identity, so that it can be a dict key with any content.
    """

    name: str
    state: object = None


Persistent = Callable[[object], object]
"""Converts the id of a ``BINPERSID`` to its value."""


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """The types allowed in a pickle besides lists and dicts with keys of text and numbers."""

    check_key: Callable[[object], None]
    """Raises FormatError for a dict key that is not allowed (or takes long to hash)."""
    lists: tuple[type, ...] = (list,)
    """Types that are appended to."""
    dicts: tuple[type, ...] = (dict, OrderedDict)
    """Types whose items are set."""
    build: Callable[[object, object], bool] = lambda target, state: False
    """Sets an object's state for a ``BUILD``; returns whether it did."""


def _check_scalar_key(key: object) -> None:
    if type(key) is not int or key.bit_length() > _MAX_KEY_BITS:
        raise FormatError(
            f"a pickle has a dict key of type {type(key).__name__} (or a huge number), which is not allowed"
        )


PLAIN = Dialect(_check_scalar_key)
