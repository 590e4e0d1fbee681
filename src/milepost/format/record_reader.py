"""Read ``torch.save`` zip records without torch: plain values, and where a tensor's elements are. Runs no code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from milepost.errors import FormatError
from milepost.format.digest import crc32
from milepost.format.dtype import DTYPES, from_storage_class, itemsize
from milepost.format.pickle_dialect import Global
from milepost.format.pickle_reader import read_pickle
from milepost.format.plain_pickle import load_plain, ordered_dict
from milepost.format.record import MAX_DIMS, MAX_NBYTES, strides_of
from milepost.format.zip_directory import ZipDirectory, ZipEntry

_MAX_TENSOR_PICKLE_NBYTES = 64 << 10
_MAX_OBJECT_PICKLE_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class LocatedTensor:
    """The location of a stored tensor's elements, from its record.

    ``data_offset`` (from the start of the record) and ``data_nbytes`` locate the storage; ``strides`` and
    ``storage_offset`` are in elements within it. ``crc32`` is of the storage's bytes, None if the writer left CRCs out.
    """

    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int
    data_offset: int
    data_nbytes: int
    crc32: int | None

    @property
    def is_row_major(self) -> bool:
        """True if the tensor's elements are a contiguous run of the storage in row-major order."""
        strides = zip(self.sizes, self.strides, strides_of(self.sizes), strict=True)
        return 0 in self.sizes or all(size == 1 or stride == wanted for size, stride, wanted in strides)

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The dims in the order in which the elements are one run of the storage; None if they are not one."""
        order = sorted(range(len(self.sizes)), key=lambda dim: (self.sizes[dim] != 1, -self.strides[dim]))
        sizes, strides = [self.sizes[dim] for dim in order], [self.strides[dim] for dim in order]
        dense = zip(sizes, strides, strides_of(tuple(sizes)), strict=True)
        is_run = self.is_row_major or all(size == 1 or stride == wanted for size, stride, wanted in dense)
        return tuple(order) if is_run else None

    @property
    def is_plain(self) -> bool:
        """True if the storage holds exactly the tensor's elements in row-major order."""
        nbytes = math.prod(self.sizes) * itemsize(self.dtype)
        return self.is_row_major and self.storage_offset == 0 and self.data_nbytes == nbytes


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """A reference to ``data/<key>``. ``dtype`` is None for untyped storage."""

    key: str
    dtype: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Rebuild:
    """A pickled tensor: the relevant arguments of ``torch._utils._rebuild_tensor_v2`` or ``_v3``."""

    storage: _Storage
    storage_offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def read_object(record: bytes) -> object:
    """Return the plain value in a ``torch.save`` stream. Raises FormatError for any other content; runs no code."""
    archive = ZipDirectory(lambda offset, nbytes: record[offset : offset + nbytes], len(record))
    pickled, _ = read_pickle_entry(archive, _MAX_OBJECT_PICKLE_NBYTES)
    return load_plain(pickled)


def check_archive(record: bytes | bytearray | memoryview) -> None:
    """Raise FormatError unless a record is a zip archive of complete, uncompressed, disjoint entries."""
    archive = ZipDirectory(
        lambda offset, nbytes: bytes(record[offset : offset + nbytes]), len(record), max_entries=1 << 18
    )
    position = 0
    for entry in sorted(archive.entries.values(), key=lambda entry: entry.header_offset):
        start = archive.data_offset(entry)
        if entry.header_offset < position:
            raise FormatError(f"zip entry {entry.name!r:.100} overlaps another one")
        position = start + entry.nbytes
        # torch.serialization.set_crc32_options(False) writes zero for every CRC.
        if entry.crc32 not in (0, crc32(memoryview(record)[start:position])):
            raise FormatError(f"zip entry {entry.name!r:.100} does not match its CRC-32: the record is damaged")


def locate_tensor(read_at: Callable[[int, int], bytes], record_nbytes: int) -> LocatedTensor:
    """Find a tensor's elements in a record written by any torch since 1.6 (or by Milepost).

    ``read_at(offset, nbytes)`` returns bytes of the record, with offsets from its start; it is called two to four times
    for a few KiB each, independent of the tensor's size. Raises FormatError unless the record is one dense
    little-endian tensor whose elements are all inside it.
    """
    archive = ZipDirectory(read_at, record_nbytes)
    pickled, prefix = read_pickle_entry(archive, _MAX_TENSOR_PICKLE_NBYTES)
    tensor = read_pickle(pickled, TENSOR_GLOBALS, persistent_storage)
    if not isinstance(tensor, Rebuild):
        raise FormatError(f"a record: expected a tensor, found a {type(tensor).__name__}")
    return located(archive, prefix, tensor)


def located(archive: ZipDirectory, prefix: str, tensor: Rebuild) -> LocatedTensor:
    """Locate the elements of a tensor in an archive; ``prefix`` is the archive's name.

    Raises FormatError if its storage is missing or too small.
    """
    entry = _entry(archive, f"{prefix}/data/{tensor.storage.key}")
    offset = archive.data_offset(entry)
    _check_extent(tensor, entry)
    has_crcs = _entry(archive, f"{prefix}/data.pkl").crc32 != 0
    return LocatedTensor(
        dtype=tensor.dtype,
        sizes=tensor.sizes,
        strides=tensor.strides,
        storage_offset=tensor.storage_offset,
        data_offset=offset,
        data_nbytes=entry.nbytes,
        crc32=entry.crc32 if has_crcs else None,
    )


def _entry(archive: ZipDirectory, name: str) -> ZipEntry:
    entry = archive.entries.get(name)
    if entry is None:
        raise FormatError(f"a record lacks its zip entry {name!r:.100}")
    return entry


def read_pickle_entry(archive: ZipDirectory, limit: int) -> tuple[bytes, str]:
    """Read ``data.pkl`` and the archive's name, checking byte order and CRCs."""
    names = [name for name in archive.entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise FormatError("a record has no data.pkl (or several): it is not a torch.save record")
    prefix = names[0].removesuffix("/data.pkl")
    pickled = _checked_content(archive, archive.entries[names[0]], limit)
    order = archive.entries.get(f"{prefix}/byteorder")  # torch before 2.1 wrote no byteorder, and was little-endian
    if order is not None and _checked_content(archive, order, 16) != b"little":
        raise FormatError("a record was written on a big-endian machine, which is not supported: re-save it with torch")
    return pickled, prefix


def _checked_content(archive: ZipDirectory, entry: ZipEntry, limit: int) -> bytes:
    content = archive.content(entry, limit)
    # torch.serialization.set_crc32_options(False) writes zero for every CRC.
    if entry.crc32 not in (0, crc32(content)):
        raise FormatError(f"zip entry {entry.name!r} does not match its CRC-32: the record is damaged")
    return content


def _check_extent(tensor: Rebuild, entry: ZipEntry) -> None:
    size = itemsize(tensor.dtype)
    span = 0
    if math.prod(tensor.sizes):
        span = tensor.storage_offset + 1 + sum((n - 1) * s for n, s in zip(tensor.sizes, tensor.strides, strict=True))
    if span * size > entry.nbytes:
        raise FormatError(f"a tensor of {span} {tensor.dtype} elements does not fit its {entry.nbytes} stored bytes")


def persistent_storage(pid: object) -> _Storage:
    if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and isinstance(pid[1], Global)):
        raise FormatError("a record refers to an object that is not a storage")
    _, cls, key, *_ = pid
    if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20):
        raise FormatError("a record refers to a storage by an invalid name")
    if cls.value is not None and not isinstance(cls.value, _StorageClass):
        raise FormatError(f"a record's storage is of class {cls.name!r}")
    return _Storage(key, cls.value.dtype if cls.value else None)


@dataclass(frozen=True, slots=True, eq=False)
class _StorageClass:
    dtype: str | None


def _ints(value: object) -> tuple[int, ...]:
    if not (isinstance(value, tuple) and len(value) <= MAX_DIMS and all(type(v) is int for v in value)):
        raise FormatError("a tensor's sizes or strides are not whole numbers")
    if any(not 0 <= v <= MAX_NBYTES for v in value):
        raise FormatError(f"a tensor's sizes or strides {value!r:.200} are invalid")
    return value


def _rebuild(args: tuple[object, ...], dtype: str | None) -> Rebuild:
    storage, offset, sizes, strides = args[0], args[1], _ints(args[2]), _ints(args[3])
    if not isinstance(storage, _Storage):
        raise FormatError("a tensor is not rebuilt from a storage")
    (storage_offset,) = _ints((offset,))
    if len(sizes) != len(strides) or math.prod(sizes) > MAX_NBYTES:
        raise FormatError(f"a tensor's sizes {list(sizes)!r:.200} do not fit its strides, or are invalid")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise FormatError("a tensor's dtype is missing")
    return Rebuild(storage, storage_offset, sizes, strides, dtype)


def _refuse_math_bits(metadata: object) -> None:
    if metadata:
        raise FormatError(
            "a tensor is stored lazily conjugated or negated; re-save it after resolve_conj()/resolve_neg()"
        )


def _rebuild_v2(*args: object) -> Rebuild:
    if len(args) not in (6, 7):
        raise FormatError(f"_rebuild_tensor_v2 with {len(args)} arguments")
    _refuse_math_bits(args[6] if len(args) == 7 else None)
    return _rebuild(args, None)


def _rebuild_v3(*args: object) -> Rebuild:
    if len(args) not in (7, 8) or not (isinstance(args[6], Global) and isinstance(args[6].value, str)):
        raise FormatError("_rebuild_tensor_v3 with unknown arguments")
    _refuse_math_bits(args[7] if len(args) == 8 else None)
    return _rebuild(args, args[6].value)


def _rebuild_parameter(*args: object) -> Rebuild:
    if len(args) != 3 or not isinstance(args[0], Rebuild):
        raise FormatError("_rebuild_parameter with unknown arguments")
    return args[0]


def _tensor_globals() -> dict[str, Global]:
    table = [
        Global("torch._utils._rebuild_tensor_v2", call=_rebuild_v2),
        Global("torch._utils._rebuild_tensor_v3", call=_rebuild_v3),
        Global("torch._utils._rebuild_parameter", call=_rebuild_parameter),
        Global("collections.OrderedDict", call=ordered_dict),
        Global("torch.storage.UntypedStorage", value=_StorageClass(None)),
    ]
    for entry in DTYPES.values():
        table.append(Global(f"torch.{entry.name}", value=entry.name))
        if entry.storage_class is not None:
            dtype = from_storage_class(entry.storage_class)
            table.append(Global(f"torch.{entry.storage_class}", value=_StorageClass(dtype)))
    return {entry.name: entry for entry in table}


TENSOR_GLOBALS: Mapping[str, Global] = MappingProxyType(_tensor_globals())
"""The globals allowed in the pickle of a tensor's record."""
