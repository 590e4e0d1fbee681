"""The safetensors file: validation of its header, and its layout from names, dtypes and shapes.

A file is ``u64 length | JSON header | data``. The header maps each name to dtype, shape and the half-open byte range of
its data, counted from the end of the header. The sorted ranges must tile the data: no gap, no overlap, no trailing
bytes. Source: the format section of https://github.com/huggingface/safetensors (the 100 MB header limit is the
reference implementation's).
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import msgspec

from milepost.errors import ConversionError, FormatError
from milepost.format import dtype as dtypes
from milepost.storage.base import ReadHandle

MAX_HEADER_NBYTES = 100_000_000
METADATA_KEY = "__metadata__"
_MAX_DIM = 1 << 62
_MAX_NDIM = 64
_NARROW = ("F4", "F6_E2M3", "F6_E3M2")
"""Dtypes of less than a byte. Source: ``Dtype`` in safetensors' ``tensor.rs``."""


class StoredTensor(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a file. ``offset`` is that of its row-major bytes from the start of the file.

    A Struct, because a header may describe a million tensors: it takes a third of a dataclass's memory and time.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of a file, in the order of the data. ``nbytes`` is the size of the file."""

    tensors: Mapping[str, StoredTensor]
    nbytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """A file to be written: its first bytes, and each tensor's offset."""

    prefix: bytes
    tensors: Mapping[str, StoredTensor]
    nbytes: int


def read_header(handle: ReadHandle) -> SafetensorsHeader:
    """Read and check the header of an open file.

    Raises:
        FormatError: the file is truncated, has bytes outside all tensors, or its header is malformed or hostile.
        ConversionError: it holds floats of less than 8 bits.
    """
    path = handle.path
    if handle.nbytes < 8:
        raise FormatError(
            f"{path} is not a safetensors file: it has {handle.nbytes} bytes, the header alone needs 8", path=path
        )
    raw_length = bytearray(8)
    handle.read_into(0, [memoryview(raw_length)])
    (length,) = struct.unpack("<Q", raw_length)
    if length > MAX_HEADER_NBYTES or length + 8 > handle.nbytes:
        raise FormatError(
            f"{path} claims a header of {length:,} bytes, but the file has {handle.nbytes:,} and a header may have at "
            f"most {MAX_HEADER_NBYTES:,}: it is truncated, or not a safetensors file",
            path=path,
        )
    return parse_header(handle.read(8, length), file_nbytes=handle.nbytes, path=path)


def parse_header(raw: bytes, *, file_nbytes: int, path: str) -> SafetensorsHeader:
    """Parse and check the JSON header ``raw`` of a file of ``file_nbytes``; ``path`` is for messages.

    Raises:
        FormatError, ConversionError: see :func:`read_header`.
    """
    base = 8 + len(raw)
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        header = json.loads(raw.decode(), object_pairs_hook=_reader_of_objects(base))
        if not isinstance(header, dict):
            raise ValueError("it describes one tensor, not tensors by name")
        metadata = _checked_metadata(header.pop(METADATA_KEY, {}))
        for name, entry in header.items():
            if not isinstance(entry, StoredTensor):
                _refuse_narrow(name, entry, path)
                raise ValueError(_entry_fault(name, entry))
        ordered, end = _checked_tiling(header, base)
    except (ValueError, RecursionError, FormatError) as error:
        raise FormatError(f"the safetensors header of {path} is malformed: {error}", path=path) from error
    if end != file_nbytes:
        kind = "truncated" if end > file_nbytes else "followed by bytes outside all tensors"
        raise FormatError(
            f"{path} is {kind}: its header describes {end:,} bytes, the file has {file_nbytes:,}", path=path
        )
    return SafetensorsHeader(ordered, end, metadata)


def plan_layout(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> SafetensorsLayout:
    """Plan a new file from name -> (dtype, shape).

    Wider dtypes come first, so that every tensor is aligned to its element size; within a dtype the given order is
    kept. The metadata is ``{"format": "pt"}``, without which transformers refuses the file.

    Raises:
        ValueError: a dtype unknown to safetensors, or a reserved name.
    """
    entries: dict[str, Any] = {METADATA_KEY: {"format": "pt"}}
    relative: dict[str, StoredTensor] = {}
    offset = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -dtypes.itemsize(item[1][0])):
        code = _code(name, dtype)
        nbytes = math.prod(shape) * dtypes.itemsize(dtype)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        relative[name] = StoredTensor(dtype, tuple(shape), offset, nbytes)
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins 8-byte aligned
    base = 8 + len(text)
    placed = {name: StoredTensor(t.dtype, t.shape, base + t.offset, t.nbytes) for name, t in relative.items()}
    return SafetensorsLayout(struct.pack("<Q", len(text)) + text, placed, base + offset)


def _code(name: str, dtype: str) -> str:
    code = dtypes.lookup(dtype).safetensors_name
    if name == METADATA_KEY:
        raise ValueError(f"a tensor can't be named {METADATA_KEY}: safetensors reserves that name")
    if code is None:
        raise ValueError(f"tensor '{name}': safetensors has no dtype {dtype}")
    return code


def _reader_of_objects(base: int) -> Callable[[list[tuple[str, Any]]], Any]:
    """Return an object hook for :mod:`json` that converts entries to tensors, and returns other objects as dicts.

    So the many small dicts and lists of a large header are released as they are parsed.
    """
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def read(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"the name '{twice:.200}' occurs twice")
        dtype, shape, span = found.get("dtype"), found.get("shape"), found.get("data_offsets")
        if type(dtype) is not str or not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
            return found
        code = dtypes.SAFETENSORS_NAMES.get(dtype)
        if code is None or span[1] - span[0] != math.prod(shape) * dtypes.itemsize(code):
            return found
        sizes = tuple(shape)
        return StoredTensor(code, shapes.setdefault(sizes, sizes), base + span[0], span[1] - span[0])

    return read


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA_KEY} is not a map of strings")
    return metadata


def _refuse_narrow(name: str, entry: Any, path: str) -> None:
    """Refuse a valid dtype of less than a byte, which is not damage. Raises ConversionError."""
    if isinstance(entry, dict) and entry.get("dtype") in _NARROW:
        raise ConversionError(
            f"{path} holds '{name:.200}' as {entry['dtype']}: floats of 4 and 6 bits are not supported. Give the "
            "model's weights before they were quantized",
            path=path,
        )


def _entry_fault(name: str, entry: Any) -> str:
    """Return the fault of an entry that does not describe a tensor."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return f"tensor '{name:.200}' lacks dtype, shape or data_offsets"
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        return f"tensor '{name:.200}' has the dtype {dtype!r:.100}"
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        return f"tensor '{name:.200}' has shape {shape!r:.200} and data_offsets {span!r:.200}"
    nbytes = math.prod(shape) * dtypes.itemsize(dtypes.from_safetensors(dtype))
    return f"tensor '{name:.200}' of shape {shape!r:.200} needs {nbytes} bytes, its data_offsets {span} span others"


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_NDIM
        and all(type(size) is int and 0 <= size < _MAX_DIM for size in value)
    )


def _checked_tiling(tensors: Mapping[str, StoredTensor], base: int) -> tuple[dict[str, StoredTensor], int]:
    """Return the tensors in the order of their data, which they must tile from ``base`` on, and its end."""
    end = base
    # An empty tensor shares its offset with its neighbour: sort it first.
    ordered = sorted(tensors, key=lambda name: (tensors[name].offset, tensors[name].nbytes))
    for name in ordered:
        tensor = tensors[name]
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise ValueError(f"tensor '{name:.200}' {kind}")
        end += tensor.nbytes
    return {name: tensors[name] for name in ordered}, end
