"""Decode small JSON documents into typed values, checking every type and bound; errors name the place.

``msgspec`` does the checking; this module also refuses duplicate fields and ``NaN``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

import msgspec

from milepost.errors import FormatError

MAX_COUNT = 1 << 62
"""Maximum of any offset, size or number of bytes in a checkpoint's files."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Seconds = Annotated[float, msgspec.Meta(ge=-MAX_COUNT, le=MAX_COUNT)]
Metric = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A finite number."""

T = TypeVar("T")


def parse_json(data: bytes, path: str, what: str) -> Any:
    """Parse the JSON value in ``data``. ``path`` and ``what`` (``a manifest``) are for the error.

    Raises FormatError unless it is JSON without ``NaN`` and duplicate fields.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not the JSON of {what} ({error!s:.200})", path=path) from error


def typed(value: Any, kind: type[T], path: str, where: str = "", key: str | None = None) -> T:
    """Convert a parsed JSON value to ``kind``: a ``msgspec.Struct``, a dataclass or a plain type.

    ``where`` is the location of ``value`` in the file ``path``. Raises FormatError with ``key`` if it does not match.
    """
    try:
        return as_type(value, kind)
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{path}: {where or 'the document'} has a field whose name is not Unicode", path=path
        ) from error
    except msgspec.ValidationError as error:
        for field, name, part, part_kind in _entries(value, kind):  # raises for this entry
            typed(part, part_kind, path, f"{where}.{field}.{name}".lstrip("."), name if field in _BY_KEY else key)
        raise FormatError(f"{path}: {_explain(str(error), where)}", path=path, key=key) from error


def as_type(value: Any, kind: type[T]) -> T:
    """Call ``msgspec.convert``, safely from several threads. Raises ``msgspec.ValidationError``.

    msgspec compiles a kind on first use and publishes it to other threads before it is complete: a thread in that
    window dereferences a null pointer, and the process crashes (seen with 0.22.0).
    """
    if kind not in _compiled:
        with _compiling:
            msgspec.json.Decoder(kind)
            _compiled.add(kind)
    return msgspec.convert(value, kind)


_compiled: set[Any] = set()
_compiling = threading.Lock()


def _renew_lock() -> None:
    global _compiling
    _compiling = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # the thread that held it is not in the child


_BY_KEY = ("tensors", "objects")
"""Fields that map keys of the state dict."""


def _entries(value: Any, kind: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield the entries of a struct's mappings, which msgspec's errors do not distinguish: field, name, value, kind."""
    if not isinstance(value, dict) or not hasattr(kind, "__struct_fields__"):
        return
    for field in msgspec.structs.fields(kind):
        entries = value.get(field.encode_name)
        if get_origin(field.type) is dict and isinstance(entries, dict):
            for name, entry in entries.items():
                yield field.encode_name, name, entry, get_args(field.type)[1]


_EXPECTED = re.compile(r"Expected (?P<wanted>.*?)(?:, got (?P<found>.*?))?(?: - at `\$(?P<at>.*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<field>.*?)`(?: - at `\$(?P<at>.*)`)?")


def _explain(text: str, where: str) -> str:
    """Reword an error of msgspec with the place first: ``files[0].nbytes: expected int >= 0``."""
    match = _MISSING.fullmatch(text)
    if match is not None:
        place = f"{where}{match['at'] or ''}.{match['field']}".lstrip(".")
        return f"{place} is missing"
    match = _EXPECTED.fullmatch(text)
    if match is None:
        return f"{where}: {text}" if where else text
    place = f"{where}{match['at'] or ''}".lstrip(".") or "the document"
    found = f", found {match['found']}" if match["found"] else ""
    return f"{place}: expected {match['wanted']}{found}".replace("`", "").replace(str(MAX_COUNT), "2**62")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
