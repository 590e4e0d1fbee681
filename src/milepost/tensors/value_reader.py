"""Restore values other than tensors from ``torch.save`` streams.

:mod:`milepost.format.pickle_reader` reads them without running code; :mod:`milepost.tensors.value_types` lists the
supported types.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from milepost.errors import FormatError
from milepost.format import record, record_reader
from milepost.format.digest import crc32
from milepost.format.dtype import DTYPES, from_storage_class
from milepost.format.pickle_dialect import Global, Instance, OverLimitError
from milepost.format.pickle_reader import read_pickle
from milepost.format.plain_pickle import MAX_NODES
from milepost.format.zip_directory import ZipDirectory
from milepost.tensors.value_types import ATOMS, CONTAINERS, DIALECT, MAX_DEPTH, QUANTIZED, VALUE_GLOBALS, require

MAX_VALUE_NBYTES = 64 << 30


def decode_object(key: str, data: bytes | bytearray | memoryview, path: str) -> Any:
    """The value in a ``torch.save`` stream. Never runs code from it.

    Raises:
        FormatError: the stream is malformed, or would run code.
        ConfigError: it holds an instance of a class that this program has not registered.
    """
    try:
        return read_value(bytes(data))
    except OverLimitError as error:
        raise FormatError(f"{path}: the value of '{key}' can't be read: {error}", path=path, key=key) from error
    except FormatError:
        pass  # written by another version of torch and not in our tables: torch's restricted reader decides
    try:
        record_reader.check_archive(data)  # torch would decompress entries of any decompressed size
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise FormatError(
            f"{path}: the value of '{key}' can't be loaded safely: {error}", path=path, key=key
        ) from error


def read_value(raw: bytes) -> Any:
    """The value in a stream written by Milepost or stock torch.

    Raises:
        FormatError, ConfigError: as :func:`decode_object`.
    """
    archive = ZipDirectory(lambda offset, nbytes: raw[offset : offset + nbytes], len(raw), max_entries=1 << 18)
    pickled, prefix = record_reader.read_pickle_entry(archive, MAX_VALUE_NBYTES)
    storages = _StoredStorages(archive, prefix)
    value = read_pickle(
        pickled,
        VALUE_GLOBALS if len(archive.entries) <= 3 else storages.globals(),
        storages.find,
        dialect=DIALECT,
        max_nbytes=MAX_VALUE_NBYTES,
    )
    _check_read(value, len(pickled))
    return value


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Elements:
    """The elements of a storage as one tensor; None for an untyped storage."""

    dtype: torch.dtype | None
    raw: torch.Tensor


class _StoredStorages:
    """The storages of one archive."""

    def __init__(self, archive: ZipDirectory, prefix: str):
        self._archive = archive
        self._prefix = prefix
        self._found: dict[str, torch.Tensor] = {}

    def globals(self) -> Mapping[str, Global]:
        """The globals allowed in a value with tensors."""
        calls = {
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_tensor_v3": self._tensor,
            "_rebuild_parameter": _parameter,
            "_rebuild_qtensor": self._quantized,
            "_rebuild_sparse_tensor": _sparse,
        }
        return {**_STORAGES, **{f"torch._utils.{name}": Global(name, call=call) for name, call in calls.items()}}

    def find(self, pid: object) -> object:
        """Return the elements that a persistent id refers to."""
        require(isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage", "an invalid storage")
        assert isinstance(pid, tuple)
        _, class_, key, *_ = pid
        require(isinstance(class_, Global) and class_.name in _STORAGES and type(key) is str, "an invalid storage")
        if key not in self._found:
            entry = self._archive.entries.get(f"{self._prefix}/data/{key}")
            require(entry is not None, f"storage {key!r:.20} is missing")
            assert entry is not None
            content = self._archive.content(entry, MAX_VALUE_NBYTES)
            require(entry.crc32 in (0, crc32(content)), f"storage {key!r:.20} does not match its CRC-32")
            self._found[key] = torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8)[: len(content)]
        return _Elements(class_.value, self._found[key])

    def _tensor(self, *args: object) -> torch.Tensor:
        require(len(args) >= 6 and isinstance(args[0], _Elements), "a tensor with unknown arguments")
        elements, offset, sizes, strides, requires_grad, _, *rest = args
        assert isinstance(elements, _Elements)
        dtype = elements.dtype if elements.dtype is not None else next(iter(rest), None)
        require(isinstance(dtype, torch.dtype) and not any(rest[1:]), "a tensor with unknown arguments")
        assert isinstance(dtype, torch.dtype)
        tensor = _strided(elements.raw, dtype, offset, sizes, strides)
        return tensor.requires_grad_() if requires_grad is True and tensor.is_floating_point() else tensor

    def _quantized(self, *args: object) -> torch.Tensor:
        require(len(args) == 7 and isinstance(args[0], _Elements), "a quantized tensor with unknown arguments")
        elements, offset, sizes, strides, parameters, *_ = args
        assert isinstance(elements, _Elements)
        dtype = elements.dtype
        require(dtype in QUANTIZED and isinstance(parameters, tuple) and len(parameters) in (3, 4), "an invalid tensor")
        assert dtype is not None
        assert isinstance(parameters, tuple)
        integers = _strided(elements.raw, QUANTIZED[dtype][1], offset, sizes, strides)
        scheme, *rest = parameters
        if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            require(
                isinstance(rest[0], float) and isinstance(rest[1], int), "a quantized tensor with unknown arguments"
            )
            return torch._make_per_tensor_quantized_tensor(integers, rest[0], rest[1])
        require(len(rest) == 3 and all(isinstance(part, torch.Tensor) for part in rest[:2]), "an invalid tensor")
        require(isinstance(rest[2], int) and 0 <= rest[2] < integers.dim(), "a quantized tensor with an invalid axis")
        require(
            all(part.numel() == integers.shape[rest[2]] for part in rest[:2]), "a quantized tensor with invalid scales"
        )
        return torch._make_per_channel_quantized_tensor(integers, rest[0], rest[1], rest[2])


def _strided(raw: torch.Tensor, dtype: torch.dtype, offset: object, sizes: object, strides: object) -> torch.Tensor:
    """Create a tensor with a copy of the elements that the arguments refer to."""
    require(type(offset) is int and isinstance(sizes, tuple) and isinstance(strides, tuple), "an invalid tensor")
    assert isinstance(offset, int)
    assert isinstance(sizes, tuple)
    assert isinstance(strides, tuple)
    numbers = (offset, *sizes, *strides)
    require(all(type(n) is int and 0 <= n <= record.MAX_NBYTES for n in numbers), "a tensor with invalid sizes")
    require(len(sizes) == len(strides) <= record.MAX_DIMS, "a tensor with invalid sizes")
    count = math.prod(sizes)
    span = offset + 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) if count else 0
    require(span * dtype.itemsize <= raw.numel(), "a tensor extends beyond its storage")
    require(count * dtype.itemsize <= raw.numel(), "a tensor has more elements than its storage")
    elements = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype) if raw.numel() else raw.view(dtype)
    return elements.as_strided(sizes, strides, offset if count else 0).clone(memory_format=torch.contiguous_format)


def _parameter(*args: object) -> torch.Tensor:
    require(len(args) == 3 and isinstance(args[0], torch.Tensor), "a parameter with unknown arguments")
    return nn.Parameter(args[0], requires_grad=args[1] is True)  # type: ignore[arg-type]


def _sparse(*args: object) -> torch.Tensor:
    layout, parts = args if len(args) == 2 else (None, None)
    require(isinstance(layout, torch.layout) and isinstance(parts, tuple), "a sparse tensor with unknown arguments")
    assert isinstance(layout, torch.layout)
    assert isinstance(parts, tuple)
    tensors = parts[:2] if layout == torch.sparse_coo else parts[:3]
    require(
        len(parts) in (3, 4) and all(isinstance(part, torch.Tensor) for part in tensors), "an invalid sparse tensor"
    )
    try:
        if layout == torch.sparse_coo:
            is_coalesced = parts[3] if len(parts) == 4 else None
            return torch.sparse_coo_tensor(*parts[:3], device="cpu", is_coalesced=is_coalesced, check_invariants=True)
        return torch.sparse_compressed_tensor(*parts[:4], layout=layout, device="cpu", check_invariants=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"an invalid sparse tensor: {error}") from error


def _storage_table() -> dict[str, Global]:
    table = dict(VALUE_GLOBALS)
    for entry in DTYPES.values():
        if entry.storage_class is not None:
            name = f"torch.{entry.storage_class}"
            table[name] = Global(name, value=getattr(torch, str(from_storage_class(entry.storage_class))))
    for dtype, (class_name, _) in QUANTIZED.items():
        table[f"torch.{class_name}"] = Global(f"torch.{class_name}", value=dtype)
    table["torch.storage.UntypedStorage"] = Global("torch.storage.UntypedStorage")
    return table


_STORAGES: Mapping[str, Global] = _storage_table()


def _check_read(value: Any, nbytes: int) -> None:
    """Refuse a value that contains itself, is nested too deep, expands to too many parts, or is incomplete."""
    limit = MAX_NODES + nbytes
    sizes: dict[int, int] = {}  # id of a complete container -> number of its parts, fully expanded
    open_ids: set[int] = set()

    def measure(node: Any, depth: int) -> int:
        if isinstance(node, Global | Instance | _Elements):
            raise FormatError("a class or a function is not a value: store its name")
        if not isinstance(node, CONTAINERS):
            return 1
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in open_ids or depth > MAX_DEPTH:
            raise OverLimitError(f"a value contains itself or is nested deeper than {MAX_DEPTH}")
        parts = node.values() if isinstance(node, dict) else node
        total = 1 + len(node)
        if not ATOMS.issuperset(map(type, parts)):
            open_ids.add(id(node))
            total = 1 + sum(measure(part, depth + 1) for part in parts)
            open_ids.remove(id(node))
        if total > limit:
            raise OverLimitError(f"a value expands to more than {limit} parts")
        sizes[id(node)] = total
        return total

    measure(value, 0)
