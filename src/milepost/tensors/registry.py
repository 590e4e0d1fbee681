"""The user's classes whose instances a checkpoint may hold, stored by name as plain values.

Reading a checkpoint never imports the names in it: an instance is restored only if the program has registered its
class.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from milepost.errors import ConfigError, FormatError, MilepostError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class RegisteredType:
    """A class, its stored name, and its conversion to plain values and back."""

    cls: type
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_by_type: dict[type, RegisteredType] = {}
_by_name: dict[str, RegisteredType] = {}


def register_value(
    cls: type[T],
    *,
    name: str | None = None,
    encode: Callable[[T], Any] | None = None,
    decode: Callable[[Any], T] | None = None,
) -> type[T]:
    """Let instances of ``cls`` be saved and loaded; returns ``cls``, so that it can be used as a decorator.

    Enums, dataclasses and named tuples need no more than this. For any other class ``encode`` converts an instance to
    plain values (numbers, text, containers, tensors, other registered values) and ``decode`` converts them back.
    ``name`` is stored, by default the module and name of the class: give the old one for a class that has moved. Call
    it when the program starts, on every rank, before anything is saved or loaded.

    Raises:
        ConfigError: the class needs ``encode`` and ``decode``, or another class has the name.
    """
    if not isinstance(cls, type):
        raise ConfigError(f"register_value: expected a class, found a {type(cls).__name__}")
    if name is not None and not (isinstance(name, str) and name):
        raise ConfigError(f"register_value({cls.__qualname__}): expected a name as text, found {name!r:.60}")
    if (encode is None) != (decode is None):
        raise ConfigError(f"register_value({cls.__qualname__}): give both encode and decode, or neither")
    if encode is None or decode is None:
        encode, decode = _ways_of(cls)
    stored = name if name is not None else f"{cls.__module__}.{cls.__qualname__}"
    known = _by_name.get(stored)
    if known is not None and known.cls is not cls and f"{known.cls.__module__}.{known.cls.__qualname__}" != stored:
        raise ConfigError(f"register_value({cls.__qualname__}): the name '{stored}' is taken by {known.cls}")
    entry = RegisteredType(cls, stored, encode, decode)
    _by_type[cls], _by_name[stored] = entry, entry
    return cls


def register_reader(name: str, decode: Callable[[Any], Any]) -> None:
    """Register a reader for values stored under ``name``, without a class that is written this way."""
    _by_name[name] = RegisteredType(object, name, lambda value: value, decode)


def registered(cls: type) -> RegisteredType | None:
    """Return the registration of a class; None if it is not registered."""
    return _by_type.get(cls)


def make_registered(name: object, plain: object) -> Any:
    """Restore a value from its plain form under the name of a registered class.

    Stock PyTorch also calls this when it reads such a value.

    Raises:
        ConfigError: this program has registered no class under the name.
    """
    entry = _by_name.get(name) if isinstance(name, str) else None
    if entry is None:
        raise ConfigError(
            f"the checkpoint holds a value of class {name!r:.200}, which this program has not registered: call "
            "milepost.register_value(the class) when it starts, before anything is loaded (with name=... if the class "
            "has moved)"
        )
    try:
        return entry.decode(plain)
    except MilepostError:
        raise
    except Exception as error:
        raise FormatError(
            f"a value of class {name!r:.200} can't be created: {type(error).__name__}: {error}"
        ) from error


# Stock picklers store a function's module and name, so these must not change.
make_registered.__module__ = "milepost"


def is_named_tuple(cls: type) -> bool:
    """Return whether a class was made by ``NamedTuple`` or ``namedtuple``."""
    return issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple)


def _ways_of(cls: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    if issubclass(cls, enum.Enum):
        return _enum_to_plain, lambda plain: _plain_to_enum(cls, plain)
    if dataclasses.is_dataclass(cls):
        return _fields_to_plain, lambda plain: _plain_to_dataclass(cls, plain)
    if is_named_tuple(cls):
        return tuple, lambda plain: cls(*plain)
    raise ConfigError(
        f"register_value({cls.__qualname__}): only enums, dataclasses and named tuples are known; give encode and "
        "decode for it"
    )


def _enum_to_plain(member: enum.Enum) -> Any:
    """Return an enum member's name or, for a combination of flags without a name, its value."""
    return member.name if member.name in type(member).__members__ else (member.value,)


def _plain_to_enum(cls: type[enum.Enum], plain: Any) -> enum.Enum:
    if isinstance(plain, tuple):
        return cls(plain[0])
    if plain not in cls.__members__:
        raise ConfigError(f"the checkpoint holds {cls.__qualname__}.{plain}, which the class no longer has")
    return cls[plain]


def _fields_to_plain(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _plain_to_dataclass(cls: type, plain: Mapping[str, Any]) -> Any:
    """Return an instance with the stored fields, and defaults for newer ones."""
    value: Any = object.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.name in plain:
            found = plain[field.name]
        elif field.default is not dataclasses.MISSING:
            found = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found = field.default_factory()
        else:
            raise ConfigError(
                f"the checkpoint has no value for {cls.__qualname__}.{field.name}, which has no default either"
            )
        object.__setattr__(value, field.name, found)
    return value
