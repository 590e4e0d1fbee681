"""Large plain values in background saves: copied while training waits, pickled while training continues.

Copying containers of numbers and text takes a fraction of the time of pickling them. The pickle is made in small steps,
since a call of CPython's pickler holds the GIL until it returns.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from milepost.format import record
from milepost.tensors.value_types import MAX_DEPTH
from milepost.tensors.value_writer import encode_object

FROM_PARTS = 20_000
"""Minimum number of parts of a value for which a copy pays."""
_AT_ONCE = 5_000
"""Number of parts of the outermost container per call of the pickler."""
_ATOMS = frozenset({type(None), bool, int, float, str})
_PROTOCOL = 2
_START: dict[type, bytes] = {list: b"\x80\x02]", dict: b"\x80\x02}"}
"""Start of the pickle of a list or dict: the protocol, and an empty container for the items."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A copy of a value, in new containers."""

    value: Any
    has_tensors: bool

    def encode(self, key: str) -> bytes:
        """The record of the value, equal to that of :func:`encode_object`."""
        if self.has_tensors or type(self.value) not in _START:
            return encode_object(key, self.value)
        out = io.BytesIO()
        pickler = pickle.Pickler(out, _PROTOCOL)
        start = _START[type(self.value)]
        joined = io.BytesIO()
        joined.write(start)
        for part in _in_pieces(self.value):
            out.seek(0)
            out.truncate()
            pickler.dump(part)  # one pickler for all steps, so that memo references work
            joined.write(out.getbuffer()[len(start) : -1])
            part.clear()  # the pickler's memo keeps the container itself alive
        joined.write(pickle.STOP)
        return record.archive(joined.getbuffer(), {})


def snapshot(value: Any) -> Snapshot | None:
    """Copy a value of many parts; None if it has few, or any that is not plain."""
    if type(value) not in (list, dict) or _num_parts(value) < FROM_PARTS:
        return None
    has_tensors: list[bool] = []
    try:
        return Snapshot(_copied(value, has_tensors, 0), bool(has_tensors))
    except TypeError:
        return None


def encoded(objects: Mapping[str, bytes | Snapshot]) -> dict[str, bytes]:
    """The records of all values."""
    return {key: value.encode(key) if isinstance(value, Snapshot) else value for key, value in objects.items()}


def _num_parts(value: Any) -> int:
    """Estimate the number of parts of a container: its own, and those of the containers in it."""
    parts = value.values() if isinstance(value, dict) else value
    return len(value) + sum(len(part) for part in islice(parts, FROM_PARTS) if type(part) in (list, dict, tuple))


def _copied(value: Any, has_tensors: list[bool], depth: int) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is torch.Tensor and value.device.type == "cpu" and value.layout == torch.strided:
        if value.is_quantized or value.requires_grad:
            raise TypeError
        if not has_tensors:
            has_tensors.append(True)
        return value.clone()
    if depth >= MAX_DEPTH or kind not in (list, dict, tuple):
        raise TypeError
    parts = value.values() if kind is dict else value
    if kind is dict and not _ATOMS.issuperset(map(type, value)):
        raise TypeError
    if _ATOMS.issuperset(map(type, parts)):
        return value if kind is tuple else value.copy()
    if kind is dict:
        return {
            name: part if type(part) in _ATOMS else _copied(part, has_tensors, depth + 1)
            for name, part in value.items()
        }
    return kind([part if _is_fixed(part) else _copied(part, has_tensors, depth + 1) for part in value])


def _is_fixed(part: Any) -> bool:
    """Return whether a part can't change: a number, text, or a tuple of these. A value has mostly such parts."""
    return type(part) in _ATOMS or (type(part) is tuple and _ATOMS.issuperset(map(type, part)))


def _in_pieces(value: list[Any] | dict[Any, Any]) -> Iterator[Any]:
    if isinstance(value, list):
        for start in range(0, len(value), _AT_ONCE):
            yield value[start : start + _AT_ONCE]
        return
    items = iter(value.items())
    while piece := dict(islice(items, _AT_ONCE)):
        yield piece
