"""The ``torch.save`` zip record, written and read byte for byte without torch.

An item of a ``.distcp`` file is one such record. For a tensor everything except the raw data and its CRC-32 follows
from dtype and sizes: :func:`tensor_record` returns the header before the data and :func:`record_footer` the footer
after it, so that data can be streamed while its CRC is computed. ``docs/format.md`` specifies the bytes, which match
PyTorch's ``torch/serialization.py`` and ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from milepost.errors import FormatError
from milepost.format.digest import crc32
from milepost.format.dtype import DTYPES, from_storage_class, itemsize, lookup
from milepost.format.pickle_reader import Global, read_pickle
from milepost.format.plain_pickle import PROTO_2, STOP, dump_plain, int_opcodes, load_plain, ordered_dict, str_opcodes
from milepost.format.zip_directory import (
    CENTRAL_HEADER,
    CENTRAL_MAGIC,
    DESCRIPTOR_MAGIC,
    END,
    END64,
    END64_LOCATOR,
    END64_LOCATOR_MAGIC,
    END64_MAGIC,
    END_MAGIC,
    LOCAL_HEADER,
    LOCAL_MAGIC,
    SATURATED,
    ZIP64_EXTRA_ID,
    ZipDirectory,
    ZipEntry,
)

DATA_ALIGNMENT = 64
"""Raw data begins at a multiple of this offset from the start of its record."""

MAX_DIMS = 64
MAX_NBYTES = 1 << 62
_ZIP64_FROM = SATURATED - (1 << 16)  # leaves room for header and footer: one decision for all fields
_FLAG_UTF8, _FLAG_DESCRIPTOR = 0x0800, 0x0008
_DOS_DATE = 0x0021  # 1980-01-01: records must not depend on the time
_VERSION, _VERSION_ZIP64 = 20, 45
_PADDING_EXTRA_ID = b"FB"  # the extra field that torch uses for padding
_MAX_TENSOR_PICKLE_NBYTES = 64 << 10
_MAX_OBJECT_PICKLE_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """A tensor's record without its raw data: ``header``, ``data_nbytes`` of row-major data, then the footer.

    ``footer_template`` is the footer with zeros at ``crc_positions``, where the data's CRC-32 goes.
    """

    header: bytes
    data_nbytes: int
    footer_template: bytes
    crc_positions: tuple[int, int]

    @property
    def data_offset(self) -> int:
        """Offset of the raw data from the start of the record; a multiple of ``DATA_ALIGNMENT``."""
        return len(self.header)

    @property
    def footer_nbytes(self) -> int:
        """Size of the footer after the raw data, in bytes."""
        return len(self.footer_template)

    @property
    def nbytes(self) -> int:
        """Size of the record in bytes."""
        return len(self.header) + self.data_nbytes + len(self.footer_template)


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
    def is_plain(self) -> bool:
        """True if the storage holds exactly the tensor's elements in row-major order."""
        nbytes = math.prod(self.sizes) * itemsize(self.dtype)
        return self.is_row_major and self.storage_offset == 0 and self.data_nbytes == nbytes


def strides_of(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides in elements of a row-major tensor, like torch (a dim of size 0 counts as 1)."""
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(sizes[dim + 1], 1)
    return tuple(strides)


# ---- writing ----


@lru_cache(maxsize=16384)
def tensor_record(dtype: str, sizes: tuple[int, ...]) -> RecordLayout:
    """Build the record of a contiguous tensor. Raises FormatError for an unknown dtype or impossible sizes."""
    numel = math.prod(sizes)
    data_nbytes = numel * itemsize(dtype)
    if len(sizes) > MAX_DIMS or any(size < 0 for size in sizes) or data_nbytes > MAX_NBYTES:
        raise FormatError(f"sizes {list(sizes)!r:.200} of {dtype} cannot be stored")
    small, directory = small_entries(_tensor_pickle(dtype, sizes, numel))
    local, central, descriptor = _data_entry(len(small), data_nbytes)
    header = small + local
    start = len(header) + data_nbytes + len(descriptor)
    end = directory_end(4, start, len(directory) + len(central), zip64=data_nbytes >= _ZIP64_FROM)
    footer = descriptor + directory + central + end
    return RecordLayout(header, data_nbytes, footer, (4, len(descriptor) + len(directory) + 16))


def record_footer(layout: RecordLayout, crc32: int) -> bytes:
    """Build the footer after raw data with the given CRC-32: exactly ``layout.footer_nbytes`` bytes."""
    template, crc = layout.footer_template, struct.pack("<I", crc32)
    first, second = layout.crc_positions
    return b"".join((template[:first], crc, template[first + 4 : second], crc, template[second + 4 :]))


def object_record(value: object) -> bytes:
    """Build a ``torch.save`` stream of a plain value, readable by ``torch.load(weights_only=True)``.

    Plain values are None, bool, int, float, str, bytes, list, tuple, dict (keys str or int) and OrderedDict, nested.
    Raises TypeError for any other value; use ``torch.save`` for these.
    """
    return _small_archive(dump_plain(value))


_COPIED_NBYTES = 64 << 10
"""Pickles up to this size are assembled by copying, like other small entries."""


def archive(pickled: bytes | memoryview, storages: Mapping[str, memoryview]) -> bytes:
    """Build a ``torch.save`` stream from a pickle and the storages to which it refers by name."""
    if not storages and len(pickled) < _COPIED_NBYTES:
        return _small_archive(bytes(pickled))
    contents: list[tuple[bytes, bytes | memoryview]] = [(b"archive/data.pkl", pickled)]
    contents += [(b"archive/byteorder", b"little"), (b"archive/version", b"3\n")]
    contents += [(b"archive/data/" + key.encode(), content) for key, content in storages.items()]
    out: list[bytes | memoryview] = []
    listed, position = [], 0
    for name, content in contents:
        local, central = _known_entry(name, content, position)
        out += [local, content]
        listed.append(central)
        position += len(local) + len(content)
    directory = b"".join(listed)
    end = directory_end(len(contents), position, len(directory), zip64=position >= _ZIP64_FROM)
    return b"".join([*out, directory, end])


def _small_archive(pickled: bytes) -> bytes:
    return _frequent_archive(pickled) if len(pickled) <= _FREQUENT_NBYTES else _put_together(pickled)


def _put_together(pickled: bytes) -> bytes:
    small, directory = small_entries(pickled)
    return b"".join((small, directory, directory_end(3, len(small), len(directory), zip64=False)))


_FREQUENT_NBYTES = 256
_frequent_archive = lru_cache(maxsize=4096)(_put_together)
"""An optimizer has the same few options for each of thousands of parameters."""


def _known_entry(name: bytes, content: bytes | memoryview, header_offset: int) -> tuple[bytes, bytes]:
    """Return the local header, padded to align the content, and the directory entry of existing content."""
    nbytes, crc = len(content), crc32(content)
    wide = nbytes >= _ZIP64_FROM or header_offset >= _ZIP64_FROM
    version = _VERSION_ZIP64 if wide else _VERSION
    extra = struct.pack("<2H2Q", ZIP64_EXTRA_ID, 16, nbytes, nbytes) if wide else b""
    padding = -(header_offset + LOCAL_HEADER.size + len(name) + len(extra) + 4) % DATA_ALIGNMENT
    padded = extra + _PADDING_EXTRA_ID + struct.pack("<H", padding) + b"Z" * padding
    shown = SATURATED if wide else nbytes
    common = (_FLAG_UTF8, 0, 0, _DOS_DATE, crc, shown, shown, len(name))
    local = LOCAL_HEADER.pack(LOCAL_MAGIC, version, *common, len(padded)) + name + padded
    place = SATURATED if wide else header_offset
    known = struct.pack("<2H3Q", ZIP64_EXTRA_ID, 24, nbytes, nbytes, header_offset) if wide else b""
    central = CENTRAL_HEADER.pack(CENTRAL_MAGIC, version, version, *common, len(known), 0, 0, 0, 0, place)
    return local, central + name + known


def _tensor_pickle(dtype: str, sizes: tuple[int, ...], numel: int) -> bytes:
    """Return ``data.pkl`` of a contiguous tensor, byte for byte as ``torch.save`` writes it."""
    return PROTO_2 + tensor_opcodes(dtype, sizes, numel) + STOP


def tensor_opcodes(dtype: str, sizes: tuple[int, ...], numel: int, storage: str = "0") -> bytes:
    """Return the opcodes that push a contiguous tensor whose bytes are in the entry ``data/<storage>``."""
    entry = lookup(dtype)
    typed = entry.storage_class is not None
    count = numel if typed else numel * entry.itemsize
    out = [_storage_opcodes(entry.storage_class, storage), int_opcodes(count), b"tq\x05QK\x00"]
    memo = 6
    for values in (sizes, strides_of(sizes)):
        out.append(_tuple_opcodes(values))
        if values:  # the empty tuple is a single opcode, never memoized
            out.append(b"q%c" % memo)
            memo += 1
    out.append(b"\x89ccollections\nOrderedDict\nq%c)Rq%c" % (memo, memo + 1))
    memo += 2
    if not typed:
        out.append(b"ctorch\n%b\nq%c" % (dtype.encode(), memo))
        memo += 1
    out.append(b"tq%cRq%c" % (memo, memo + 1))
    return b"".join(out)


@lru_cache(maxsize=256)
def _storage_opcodes(storage_class: str | None, storage: str) -> bytes:
    """Return the beginning of ``tensor_opcodes``, up to the storage's number of elements."""
    version, named = (2, f"torch\n{storage_class}") if storage_class else (3, "torch.storage\nUntypedStorage")
    out = [b"ctorch._utils\n_rebuild_tensor_v%d\nq\x00((" % version, str_opcodes("storage"), b"q\x01c", named.encode()]
    return b"".join([*out, b"\nq\x02", str_opcodes(storage), b"q\x03", str_opcodes("cpu"), b"q\x04"])


def _tuple_opcodes(values: tuple[int, ...]) -> bytes:
    items = b"".join(map(int_opcodes, values))
    if len(values) > 3:
        return b"(" + items + b"t"
    return items + (b")", b"\x85", b"\x86", b"\x87")[len(values)]


def _small_entry(name: bytes, content: bytes) -> tuple[bytes, bytes, bytes]:
    """Return an entry's local header and content, its directory entry up to the final offset, and its name."""
    crc, size = crc32(content), len(content)
    if size >= SATURATED:
        raise TypeError(f"a value of {size} bytes is too large to store as a plain value")
    fields = (_FLAG_UTF8, 0, 0, _DOS_DATE, crc, size, size, len(name), 0)
    local = LOCAL_HEADER.pack(LOCAL_MAGIC, _VERSION, *fields) + name + content
    central = CENTRAL_HEADER.pack(CENTRAL_MAGIC, _VERSION, _VERSION, *fields, 0, 0, 0, 0, 0)
    return local, central[:-4], name


_FIXED_ENTRIES = (_small_entry(b"archive/byteorder", b"little"), _small_entry(b"archive/version", b"3\n"))


def small_entries(pickled: bytes) -> tuple[bytes, bytes]:
    """Return the three entries at the start of every record, and their part of the directory."""
    local, central = b"", b""
    for entry, listed, name in (_small_entry(b"archive/data.pkl", pickled), *_FIXED_ENTRIES):
        central += listed + len(local).to_bytes(4, "little") + name
        local += entry
    return local, central


def _data_entry(header_offset: int, nbytes: int) -> tuple[bytes, bytes, bytes]:
    """Return local header (padded to align data), directory entry and descriptor of ``archive/data/0``, with CRC zero.

    The CRC is not known when the header is written, so bit 3 defers CRC and sizes to a descriptor after the data.
    """
    name = b"archive/data/0"
    zip64 = nbytes >= _ZIP64_FROM
    version = _VERSION_ZIP64 if zip64 else _VERSION
    extra = struct.pack("<2H2Q", ZIP64_EXTRA_ID, 16, nbytes, nbytes) if zip64 else b""
    unpadded = header_offset + LOCAL_HEADER.size + len(name) + len(extra) + 4
    padding = -unpadded % DATA_ALIGNMENT
    padded = extra + _PADDING_EXTRA_ID + struct.pack("<H", padding) + b"Z" * padding
    common = (_FLAG_UTF8 | _FLAG_DESCRIPTOR, 0, 0, _DOS_DATE, 0)
    deferred = SATURATED if zip64 else 0
    local = LOCAL_HEADER.pack(LOCAL_MAGIC, version, *common, deferred, deferred, len(name), len(padded)) + name + padded
    known = SATURATED if zip64 else nbytes
    central = CENTRAL_HEADER.pack(
        CENTRAL_MAGIC, version, version, *common, known, known, len(name), len(extra), 0, 0, 0, 0, header_offset
    )
    descriptor = DESCRIPTOR_MAGIC + struct.pack("<I2Q" if zip64 else "<3I", 0, nbytes, nbytes)
    return local, central + name + extra, descriptor


def directory_end(count: int, offset: int, nbytes: int, *, zip64: bool) -> bytes:
    """Build the end records of a directory of ``count`` entries and ``nbytes`` at ``offset``."""
    if not zip64:
        return END.pack(END_MAGIC, 0, 0, count, count, nbytes, offset, 0)
    short = min(count, 0xFFFF)
    end64 = END64.pack(END64_MAGIC, END64.size - 12, _VERSION_ZIP64, _VERSION_ZIP64, 0, 0, count, count, nbytes, offset)
    locator = END64_LOCATOR.pack(END64_LOCATOR_MAGIC, 0, offset + nbytes, 1)
    return end64 + locator + END.pack(END_MAGIC, 0, 0, short, short, nbytes, SATURATED, 0)


# ---- reading ----


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
