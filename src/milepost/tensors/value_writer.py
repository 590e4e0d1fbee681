"""Values that are not stored as tensors: Python objects of known types as ``torch.save`` streams.

They are written by CPython's pickler, with a rule for every type that is not built in, so that everything
written can be read. Equal values give equal bytes, which ranks compare: sets are sorted, and an object that
occurs twice is written twice (except in values of many parts, for their size).
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
import torch.utils.serialization.config  # else the first `torch.load()` of a value imports it
from torch import nn
from torch.distributed.tensor import DTensor

from milepost.errors import ConfigError, FormatError, SaveError
from milepost.format import record
from milepost.format.dtype import DTYPES, lookup
from milepost.tensors.layout import dtype_name, problem_of
from milepost.tensors.parts import as_value, comes_apart
from milepost.tensors.registry import make_registered, registered
from milepost.tensors.value_reader import read_value
from milepost.tensors.value_traits import Refused, place, refusal, traits_of
from milepost.tensors.value_types import ATOMS, MAX_DEPTH, NATIVE, QUANTIZED, REDUCERS, reduce_value

_PROTOCOL = 2
"""The protocol of ``torch.load(weights_only=True)``. It writes bytes as text, so large ones need a later protocol."""
_PROTOCOL_FOR_BYTES = 4
_LARGE_BYTES = 64 << 10
_KNOWN_TEXT = 256
"""Characters up to which the record of a text is kept for the next one."""
_REMEMBERED_FROM = 20_000
"""Minimum number of parts of a value for which the pickler uses memo references."""
_VERIFIED_NBYTES = 1 << 20
"""Values of types that are not built in are read back before they are written, up to this size."""


def encode_object(key: str, value: Any) -> bytes:
    """A value as a ``torch.save`` stream, tensors in it included.

    Raises:
        SaveError: a part can't be stored; the message has its path, its type and an alternative.
    """
    kind = type(value)
    if kind in ATOMS:
        try:
            if kind is float:
                return _known_record(value, math.copysign(1.0, value))
            return _known_record(value) if kind is not str or len(value) <= _KNOWN_TEXT else record.object_record(value)
        except TypeError:  # from a very long integer, or a complex number
            pass
    traits = traits_of(key, value)
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
            read_value(stream)
        except (FormatError, ConfigError) as error:
            where = f"{key}{place(value, lambda part: isinstance(part, type)) or ''}"
            raise SaveError(
                f"{where} holds a value that could not be loaded again: {error.message}", key=key
            ) from error
    return stream


@lru_cache(maxsize=4096, typed=True)
def _known_record(value: object, sign: float = 1.0) -> bytes:
    """Return an atom's record, kept: an optimizer has the same options for each parameter, and at each save.

    Numbers of other types are other values, and so is -0.0, by its ``sign``.
    """
    return record.object_record(value)


@dataclasses.dataclass(eq=False, slots=True)
class _Storage:
    """The elements of all tensors of one dtype in a value, one after the other."""

    key: str
    class_: type
    is_typed: bool
    tensors: list[torch.Tensor] = dataclasses.field(default_factory=list)
    numel: int = 0

    def add(self, tensor: torch.Tensor) -> int:
        """Append a tensor's elements; return their offset."""
        offset = self.numel
        self.tensors.append(tensor)
        self.numel += tensor.numel()
        return offset

    def contents(self) -> memoryview:
        flat = [tensor.contiguous().reshape(-1) for tensor in self.tensors if tensor.numel()]
        if not flat:
            return memoryview(b"")
        joined = torch.cat(flat) if len(flat) > 1 else flat[0]
        raw = torch.empty(
            0, dtype=torch.uint8, device="cpu"
        )  # by the storage, since some dtypes can't be viewed as bytes
        raw.set_(joined.untyped_storage(), joined.storage_offset() * joined.element_size(), (joined.nbytes,))  # type: ignore[call-overload]
        return memoryview(cast("Any", raw.numpy()))


class _HasTensor(Exception):
    """The storages of tensors need a hook that is called for every object, so plain values use a faster pickler."""


class _Pickler(pickle.Pickler):
    """Writes values of built-in types, and of those in the tables."""

    def __init__(self, protocol: int, *, is_fast: bool):
        self.out = io.BytesIO()
        super().__init__(self.out, protocol)
        self.fast = is_fast
        self.is_special = False
        """True once a value other than a plain container, number, text or tensor was written."""
        self.no_hooks: OrderedDict[Any, Any] = OrderedDict()
        self.num_bytes = 0
        """Total size of arrays, whose elements are stored in the pickle."""

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
        self.num_bytes += value.nbytes if isinstance(value, np.ndarray | np.generic) else 0
        entry = registered(type(value))
        if entry is not None:
            return make_registered, (entry.name, entry.encode(value))
        try:
            return reduce_value(value)
        except TypeError as error:
            raise Refused(value, str(error)) from None

    def reduce_tensor(self, tensor: torch.Tensor) -> Any:
        raise _HasTensor


class _TensorPickler(_Pickler):
    """Writes tensors too. Their storages are filled during pickling, so their sizes must be computed before."""

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
                raise Refused(tensor, str(error)) from None
        problem = problem_of(tensor)
        if type(tensor) is not torch.Tensor or problem:
            raise Refused(tensor, "", what=problem)
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
        """Number of elements of each storage; of an untyped one, its bytes."""
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
    except Refused as refused:
        raise refusal(key, value, refused) from None
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


_CLASSES = {*NATIVE, *REDUCERS, set, frozenset}
_VALUE_CLASSES = frozenset(map(id, _CLASSES))
"""Classes whose instances a value may contain, but not the classes themselves."""
_BUILDERS = {id(function): function for function in _functions()}


@dataclasses.dataclass(eq=False, slots=True)
class _SortedSet:
    """A set whose members are written in an order independent of hashes."""

    kind: type
    members: list[Any]


def _with_sorted_sets(key: str, value: Any) -> Any:
    """Replace the sets in all plain containers of a value."""
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
