"""Values that are not stored as tensors: Python objects of known types as ``torch.save`` streams, and back.

Writing is CPython's own pickler, which is told what to do with every type that is not built in, so that nothing is
written which could not be read. Equal values give equal bytes, which ranks compare: sets are sorted, and a part that
is one object with another is written twice (but in values of many parts, for their size). Reading is
:mod:`milepost.format.pickle_reader`, which runs nothing.
"""

from __future__ import annotations

import codecs
import dataclasses
import enum
import io
import math
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.utils.serialization.config  # else the first `torch.load()` of a value imports it
from torch import nn
from torch.distributed.tensor import DTensor

from milepost.errors import ConfigError, FormatError, SaveError
from milepost.format import record
from milepost.format.digest import crc32
from milepost.format.dtype import DTYPES, from_storage_class, lookup
from milepost.format.pickle_reader import Global, Instance, OverLimitError, read_pickle
from milepost.format.plain_pickle import MAX_NODES
from milepost.format.zip_directory import ZipDirectory
from milepost.tensors.layout import dtype_name
from milepost.tensors.parts import as_value, comes_apart
from milepost.tensors.registry import is_named_tuple, make_registered, registered
from milepost.tensors.value_types import DIALECT, NATIVE, REDUCERS, VALUE_GLOBALS, reduce_value

MAX_DEPTH = 100
"""Values are nested no deeper."""
MAX_VALUE_NBYTES = 64 << 30
_PROTOCOL = 2
"""What ``torch.load(weights_only=True)`` reads. It spells bytes as text, so large ones need a later one."""
_PROTOCOL_FOR_BYTES = 4
_LARGE_BYTES = 64 << 10
_REMEMBERED_FROM = 20_000
"""Parts of a value from which on the pickler refers back to those that it has written."""
_VERIFIED_NBYTES = 1 << 20
"""Values of other than built-in types are read back before they are written, up to this size."""

_ATOMS = frozenset({type(None), bool, int, float, str, complex})
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


def encode_object(key: str, value: Any) -> bytes:
    """A value as a ``torch.save`` stream, tensors in it included.

    Raises:
        SaveError: it holds what can't be kept; says where, what, and what to write instead.
    """
    if type(value) in _ATOMS:
        try:
            return record.object_record(value)
        except TypeError:  # a very long number
            pass
    traits = _traits(key, value)
    given = _with_sorted_sets(key, value) if traits.has_sets else value
    protocol = _PROTOCOL_FOR_BYTES if traits.num_bytes >= _LARGE_BYTES else _PROTOCOL
    is_fast = traits.num_parts < _REMEMBERED_FROM
    pickler = _dump(key, given, protocol, is_fast=is_fast)
    if pickler.num_bytes >= _LARGE_BYTES and protocol == _PROTOCOL:
        pickler = _dump(key, given, _PROTOCOL_FOR_BYTES, is_fast=is_fast)
    storages = pickler.storages.values() if isinstance(pickler, _TensorPickler) else ()
    stream = record.archive(pickler.out.getbuffer(), {storage.key: storage.contents() for storage in storages})
    if pickler.is_special and len(stream) <= _VERIFIED_NBYTES:
        try:
            _decode(stream)
        except (FormatError, ConfigError) as error:
            where = f"{key}{_place(value, lambda part: isinstance(part, type)) or ''}"
            raise SaveError(
                f"{where} holds a value that could not be loaded again: {error.message}", key=key
            ) from error
    return stream


def decode_object(key: str, data: bytes | bytearray | memoryview, path: str) -> Any:
    """The value in a ``torch.save`` stream. Never runs code from it.

    Raises:
        FormatError: the stream is malformed, or would run code.
        ConfigError: it holds an instance of a class that this program has not registered.
    """
    try:
        return _decode(bytes(data))
    except OverLimitError as error:
        raise FormatError(f"{path}: the value of '{key}' is not read: {error}", path=path, key=key) from error
    except FormatError:
        pass  # what others' versions of torch write that is not in the tables: torch's own restricted reader decides
    try:
        record.check_archive(data)  # torch would unpack compressed entries, whatever they unpack to
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise FormatError(
            f"{path}: the value of '{key}' can't be loaded safely: {error}", path=path, key=key
        ) from error


# ---- writing ----


@dataclasses.dataclass(eq=False, slots=True)
class _Storage:
    """The elements of all tensors of one dtype in a value, one after the other."""

    key: str
    class_: type
    is_typed: bool
    tensors: list[torch.Tensor] = dataclasses.field(default_factory=list)
    numel: int = 0

    def add(self, tensor: torch.Tensor) -> int:
        """Take a tensor's elements in; returns where they begin."""
        offset = self.numel
        self.tensors.append(tensor)
        self.numel += tensor.numel()
        return offset

    def contents(self) -> memoryview:
        flat = [tensor.contiguous().reshape(-1) for tensor in self.tensors if tensor.numel()]
        if not flat:
            return memoryview(b"")
        joined = torch.cat(flat) if len(flat) > 1 else flat[0]
        raw = torch.empty(0, dtype=torch.uint8, device="cpu")  # through the storage: not every dtype has other views
        raw.set_(joined.untyped_storage(), joined.storage_offset() * joined.element_size(), (joined.nbytes,))  # type: ignore[call-overload]
        return memoryview(cast("Any", raw.numpy()))


class _Refused(Exception):
    """A value for which there is no form."""

    def __init__(self, value: Any, reason: str):
        super().__init__(reason)
        self.value = value
        self.reason = reason


class _HasTensor(Exception):
    """A tensor's storage needs a hook that is called for every object, which plain values can do without."""


class _Pickler(pickle.Pickler):
    """Writes values of built-in types, and of those that the tables know."""

    def __init__(self, protocol: int, *, is_fast: bool):
        self.out = io.BytesIO()
        super().__init__(self.out, protocol)
        self.fast = is_fast
        self.is_special = False
        """Whether it met anything that is not a plain container, number, text or tensor."""
        self.no_hooks: OrderedDict[Any, Any] = OrderedDict()
        self.num_bytes = 0
        """Bytes of arrays, which are bytes in the pickle."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.reduce_tensor(value)
        if id(value) in _BUILDERS:
            self.is_special = self.is_special or id(value) in _VALUE_CLASSES
            return NotImplemented
        if value is self.no_hooks:
            return OrderedDict, ()
        if type(value) is _SortedSet:
            self.is_special = True
            return value.kind, (value.members,)
        self.is_special = True
        self.num_bytes += getattr(value, "nbytes", 0)
        entry = registered(type(value))
        if entry is not None:
            return make_registered, (entry.name, entry.encode(value))
        try:
            return reduce_value(value)
        except TypeError as error:
            raise _Refused(value, str(error)) from None

    def reduce_tensor(self, tensor: torch.Tensor) -> Any:
        raise _HasTensor


class _TensorPickler(_Pickler):
    """Writes tensors too. Their storages are filled on the way; how long they get must be known before."""

    def __init__(self, protocol: int, numels: Mapping[str, int], *, is_fast: bool):
        super().__init__(protocol, is_fast=is_fast)
        self.storages: dict[str, _Storage] = {}
        self._numels = numels
        self._ids: dict[str, tuple[Any, ...]] = {}

    def persistent_id(self, value: Any) -> Any:
        return self._ids[value.key] if type(value) is _Storage else None

    def reduce_tensor(self, tensor: torch.Tensor) -> Any:
        if type(tensor) is nn.Parameter:
            return torch._utils._rebuild_parameter, (tensor.detach(), tensor.requires_grad, self.no_hooks)
        if comes_apart(tensor) and not isinstance(tensor, DTensor):
            self.is_special = True
            try:
                return make_registered, as_value(tensor)
            except (TypeError, SaveError) as error:
                raise _Refused(tensor, str(error)) from None
        if type(tensor) is not torch.Tensor or tensor.is_meta:
            raise _Refused(tensor, "it has no data" if tensor.is_meta else "")
        if tensor.is_quantized:
            return self._reduce_quantized(tensor)
        if tensor.layout != torch.strided:
            return tensor.detach().cpu().__reduce_ex__(2)
        data = tensor.detach().resolve_conj().resolve_neg().cpu()
        class_name = lookup(dtype_name(tensor.dtype)).storage_class
        storage = self._storage(dtype_name(tensor.dtype), class_name)
        shape = tuple(data.shape)
        args = (storage, storage.add(data), shape, record.strides_of(shape), tensor.requires_grad, self.no_hooks)
        if class_name is None:
            return torch._utils._rebuild_tensor_v3, (*args, tensor.dtype)
        return torch._utils._rebuild_tensor_v2, args

    def _reduce_quantized(self, tensor: torch.Tensor) -> Any:
        scheme = tensor.qscheme()
        if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            parameters: tuple[Any, ...] = (scheme, tensor.q_scale(), tensor.q_zero_point())
        else:
            scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
            parameters = (scheme, scales, zero_points, tensor.q_per_channel_axis())
        data = tensor.detach().cpu().int_repr()
        storage = self._storage(dtype_name(tensor.dtype), QUANTIZED[tensor.dtype][0])
        shape = tuple(data.shape)
        args = (storage, storage.add(data), shape, record.strides_of(shape), parameters, False, self.no_hooks)
        return torch._utils._rebuild_qtensor, args

    def _storage(self, name: str, class_name: str | None) -> _Storage:
        found = self.storages.get(name)
        if found is None:
            class_ = getattr(torch, class_name) if class_name is not None else torch.storage.UntypedStorage
            found = self.storages[name] = _Storage(str(len(self.storages)), class_, class_name is not None)
            self._ids[found.key] = ("storage", class_, found.key, "cpu", self._numels.get(name, 0))
        return found

    def counts(self) -> dict[str, int]:
        """Elements of each storage; bytes of one that has no dtype of its own."""
        return {
            name: storage.numel if storage.is_typed else storage.numel * lookup(name).itemsize
            for name, storage in self.storages.items()
        }


def _dump(key: str, value: Any, protocol: int, *, is_fast: bool) -> _Pickler:
    pickler = _Pickler(protocol, is_fast=is_fast)
    try:
        try:
            pickler.dump(value)
        except _HasTensor:
            counting = _TensorPickler(protocol, {}, is_fast=is_fast)
            counting.dump(value)
            pickler = _TensorPickler(protocol, counting.counts(), is_fast=is_fast)
            pickler.dump(value)
    except _Refused as refused:
        raise _refusal(key, value, refused) from None
    except RecursionError:
        raise SaveError(f"{key} is nested deeper than {MAX_DEPTH} levels", key=key) from None
    except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
        raise SaveError(f"{key} can't be stored: {error}", key=key) from error
    return pickler


def _functions() -> list[Any]:
    """The callables and names by which a pickle builds values of the known types."""
    names = ("_rebuild_parameter", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
    found = {getattr(torch._utils, name) for name in (*names, "_rebuild_sparse_tensor")}
    found |= {make_registered, torch.serialization._get_layout, np.ndarray, np.dtype, torch.storage.UntypedStorage}
    found |= {np.empty(0).__reduce__()[0], np.float32(0).__reduce__()[0], codecs.encode}
    found |= {getattr(torch, entry.storage_class) for entry in DTYPES.values() if entry.storage_class is not None}
    found |= {getattr(torch, name) for name, _ in QUANTIZED.values()}
    return [*found, *_CLASSES]


QUANTIZED = {
    torch.qint8: ("QInt8Storage", torch.int8),
    torch.quint8: ("QUInt8Storage", torch.uint8),
    torch.qint32: ("QInt32Storage", torch.int32),
}
"""dtype of quantized tensors: the storage that picklers name, and the dtype of its elements."""
_CLASSES = {*NATIVE, *REDUCERS, set, frozenset}
_VALUE_CLASSES = frozenset(map(id, _CLASSES))
"""Classes that a value might hold itself, where it may only hold instances of them."""
_BUILDERS = {id(function): function for function in _functions()}


@dataclasses.dataclass(slots=True)
class _Traits:
    num_parts: int = 0
    num_bytes: int = 0
    """Of all ``bytes`` in it."""
    has_sets: bool = False


def _traits(key: str, value: Any) -> _Traits:
    """Look a value over. Raises SaveError for one that holds itself or is nested too deep."""
    found = _Traits()
    open_ids: set[int] = set()

    def visit(node: Any, depth: int) -> None:
        if type(node) is bytes or type(node) is bytearray:
            found.num_bytes += len(node)
        if not isinstance(node, _CONTAINERS):
            return
        if depth > MAX_DEPTH or id(node) in open_ids:
            raise SaveError(f"{key} contains itself, or is nested deeper than {MAX_DEPTH} levels", key=key)
        found.num_parts += len(node)
        found.has_sets = found.has_sets or isinstance(node, set | frozenset)
        parts = node.values() if isinstance(node, dict) else node
        if _ATOMS.issuperset(map(type, parts)):
            return
        open_ids.add(id(node))
        for part in parts:
            kind = type(part)
            if kind in _ATOMS:
                continue
            if kind is dict and depth < MAX_DEPTH and _ATOMS.issuperset(map(type, part.values())):
                found.num_parts += len(part)
            else:
                visit(part, depth + 1)
        open_ids.remove(id(node))

    visit(value, 0)
    return found


@dataclasses.dataclass(eq=False, slots=True)
class _SortedSet:
    """A set whose members are written in an order that no hash decides."""

    kind: type
    members: list[Any]


def _with_sorted_sets(key: str, value: Any) -> Any:
    """The value, its sets replaced in all plain containers."""
    kind = type(value)
    if kind is set or kind is frozenset:
        members = [_with_sorted_sets(key, member) for member in value]
        members.sort(key=lambda member: _dump(key, member, _PROTOCOL, is_fast=True).out.getvalue())
        return _SortedSet(kind, members)
    if kind is list or kind is tuple:
        return kind(_with_sorted_sets(key, part) for part in value)
    if kind is dict:
        return {name: _with_sorted_sets(key, part) for name, part in value.items()}
    return value


def _refusal(key: str, value: Any, refused: _Refused) -> SaveError:
    kind = type(refused.value)
    where = f"{key}{_place(value, lambda part: part is refused.value) or ''}"
    what = f"{where} holds a {kind.__module__}.{kind.__qualname__}, which can't be loaded without running code"
    return SaveError(f"{what}: {refused.reason or _advice(refused.value)}", key=key)


def _advice(value: Any) -> str:
    kind = type(value)
    if isinstance(value, enum.Enum) or dataclasses.is_dataclass(kind) or is_named_tuple(kind):
        return f"call milepost.register_value({kind.__qualname__}) when the program starts to make it loadable"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return "store its name, and look it up when it is loaded"
    if hasattr(value, "state_dict"):
        return "store its state_dict()"
    for method in ("get_state", "getstate"):
        if hasattr(value, method):
            return f"store what its {method}() returns"
    if isinstance(value, Mapping):
        return "store dict(...) of it"
    return "store plain values or tensors, or milepost.register_value() its class with encode and decode"


def _place(root: Any, is_it: Callable[[Any], bool]) -> str | None:
    """The path in a nested value of the first part that satisfies a predicate, written as in Python."""
    if is_it(root):
        return ""
    if not isinstance(root, _CONTAINERS):
        return None
    for index, part in root.items() if isinstance(root, dict) else enumerate(root):
        if is_it(index):
            return f", as a key: {index!r:.60}"
        found = _place(part, is_it)
        if found is not None:
            return f"[{index!r:.60}]{found}"
    return None


# ---- reading ----


def _decode(raw: bytes) -> Any:
    archive = ZipDirectory(lambda offset, nbytes: raw[offset : offset + nbytes], len(raw), max_entries=1 << 18)
    pickled, prefix = record.read_pickle_entry(archive, MAX_VALUE_NBYTES)
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
    """The elements of a stored storage, as one tensor; None for a storage of bytes."""

    dtype: torch.dtype | None
    raw: torch.Tensor


class _StoredStorages:
    """The storages of one archive."""

    def __init__(self, archive: ZipDirectory, prefix: str):
        self._archive = archive
        self._prefix = prefix
        self._found: dict[str, torch.Tensor] = {}

    def globals(self) -> Mapping[str, Global]:
        """All that a value with tensors may name."""
        calls = {
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_tensor_v3": self._tensor,
            "_rebuild_parameter": _parameter,
            "_rebuild_qtensor": self._quantized,
            "_rebuild_sparse_tensor": _sparse,
        }
        return {**_STORAGES, **{f"torch._utils.{name}": Global(name, call=call) for name, call in calls.items()}}

    def find(self, pid: object) -> object:
        """The elements that a persistent id refers to."""
        _require(isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage", "a strange storage")
        assert isinstance(pid, tuple)
        _, class_, key, *_ = pid
        _require(isinstance(class_, Global) and class_.name in _STORAGES and type(key) is str, "a strange storage")
        if key not in self._found:
            entry = self._archive.entries.get(f"{self._prefix}/data/{key}")
            _require(entry is not None, f"storage {key!r:.20} is missing")
            assert entry is not None
            content = self._archive.content(entry, MAX_VALUE_NBYTES)
            _require(entry.crc32 in (0, crc32(content)), f"storage {key!r:.20} does not match its CRC-32")
            self._found[key] = torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8)[: len(content)]
        return _Elements(class_.value, self._found[key])

    def _tensor(self, *args: object) -> torch.Tensor:
        _require(len(args) >= 6 and isinstance(args[0], _Elements), "a tensor with unknown arguments")
        elements, offset, sizes, strides, requires_grad, _, *rest = args
        assert isinstance(elements, _Elements)
        dtype = elements.dtype if elements.dtype is not None else next(iter(rest), None)
        _require(isinstance(dtype, torch.dtype) and not any(rest[1:]), "a tensor with unknown arguments")
        assert isinstance(dtype, torch.dtype)
        tensor = _strided(elements.raw, dtype, offset, sizes, strides)
        return tensor.requires_grad_() if requires_grad is True and tensor.is_floating_point() else tensor

    def _quantized(self, *args: object) -> torch.Tensor:
        _require(len(args) == 7 and isinstance(args[0], _Elements), "a quantized tensor with unknown arguments")
        elements, offset, sizes, strides, parameters, *_ = args
        assert isinstance(elements, _Elements)
        dtype = elements.dtype
        _require(dtype in QUANTIZED and isinstance(parameters, tuple) and len(parameters) in (3, 4), "a strange tensor")
        assert dtype is not None
        assert isinstance(parameters, tuple)
        integers = _strided(elements.raw, QUANTIZED[dtype][1], offset, sizes, strides)
        scheme, *rest = parameters
        if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            _require(
                isinstance(rest[0], float) and isinstance(rest[1], int), "a quantized tensor with unknown arguments"
            )
            return torch._make_per_tensor_quantized_tensor(integers, rest[0], rest[1])
        _require(len(rest) == 3 and all(isinstance(part, torch.Tensor) for part in rest[:2]), "a strange tensor")
        _require(isinstance(rest[2], int) and 0 <= rest[2] < integers.dim(), "a quantized tensor with an invalid axis")
        _require(
            all(part.numel() == integers.shape[rest[2]] for part in rest[:2]), "a quantized tensor with invalid scales"
        )
        return torch._make_per_channel_quantized_tensor(integers, rest[0], rest[1], rest[2])


def _strided(raw: torch.Tensor, dtype: torch.dtype, offset: object, sizes: object, strides: object) -> torch.Tensor:
    """A tensor of its own with the elements that the arguments point to."""
    _require(type(offset) is int and isinstance(sizes, tuple) and isinstance(strides, tuple), "a strange tensor")
    assert isinstance(offset, int)
    assert isinstance(sizes, tuple)
    assert isinstance(strides, tuple)
    numbers = (offset, *sizes, *strides)
    _require(all(type(n) is int and 0 <= n <= record.MAX_NBYTES for n in numbers), "a tensor with invalid sizes")
    _require(len(sizes) == len(strides) <= record.MAX_DIMS, "a tensor with invalid sizes")
    count = math.prod(sizes)
    span = offset + 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) if count else 0
    _require(span * dtype.itemsize <= raw.numel(), "a tensor extends beyond its storage")
    _require(count * dtype.itemsize <= raw.numel(), "a tensor has more elements than its storage")
    elements = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype) if raw.numel() else raw.view(dtype)
    return elements.as_strided(sizes, strides, offset if count else 0).clone(memory_format=torch.contiguous_format)


def _parameter(*args: object) -> torch.Tensor:
    _require(len(args) == 3 and isinstance(args[0], torch.Tensor), "a parameter with unknown arguments")
    return nn.Parameter(args[0], requires_grad=args[1] is True)  # type: ignore[arg-type]


def _sparse(*args: object) -> torch.Tensor:
    layout, parts = args if len(args) == 2 else (None, None)
    _require(isinstance(layout, torch.layout) and isinstance(parts, tuple), "a sparse tensor with unknown arguments")
    assert isinstance(layout, torch.layout)
    assert isinstance(parts, tuple)
    tensors = parts[:2] if layout == torch.sparse_coo else parts[:3]
    _require(
        len(parts) in (3, 4) and all(isinstance(part, torch.Tensor) for part in tensors), "an invalid sparse tensor"
    )
    try:
        if layout == torch.sparse_coo:
            is_coalesced = parts[3] if len(parts) == 4 else None
            return torch.sparse_coo_tensor(*parts[:3], is_coalesced=is_coalesced, check_invariants=True)
        return torch.sparse_compressed_tensor(*parts[:4], layout=layout, check_invariants=True)
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


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise FormatError(problem)


def _check_read(value: Any, nbytes: int) -> None:
    """Refuse what holds itself, is nested too deep, unfolds to too much, or is not finished."""
    limit = MAX_NODES + nbytes
    sizes: dict[int, int] = {}  # id of a finished container -> number of its parts, all unfolded
    open_ids: set[int] = set()

    def measure(node: Any, depth: int) -> int:
        if isinstance(node, Global | Instance | _Elements):
            raise FormatError("a class or a function is not a value: store its name")
        if not isinstance(node, _CONTAINERS):
            return 1
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in open_ids or depth > MAX_DEPTH:
            raise OverLimitError(f"a value contains itself or is nested deeper than {MAX_DEPTH}")
        parts = node.values() if isinstance(node, dict) else node
        total = 1 + len(node)
        if not _ATOMS.issuperset(map(type, parts)):
            open_ids.add(id(node))
            total = 1 + sum(measure(part, depth + 1) for part in parts)
            open_ids.remove(id(node))
        if total > limit:
            raise OverLimitError(f"a value expands to more than {limit} parts")
        sizes[id(node)] = total
        return total

    measure(value, 0)
