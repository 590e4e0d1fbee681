"""The ``torch.save`` zip record, written byte for byte without torch; ``record_reader`` reads it.

An item of a ``.distcp`` file is one such record. For a tensor everything except the raw data and its CRC-32 follows
from dtype and sizes: :func:`tensor_record` returns the header before the data and :func:`record_footer` the footer
after it, so that data can be streamed while its CRC is computed. ``docs/format.md`` specifies the bytes, which match
PyTorch's ``torch/serialization.py`` and ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from milepost.errors import FormatError
from milepost.format.digest import crc32
from milepost.format.dtype import itemsize, lookup
from milepost.format.plain_pickle import PROTO_2, STOP, dump_plain, int_opcodes, str_opcodes
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
    def nbytes(self) -> int:
        """Size of the record in bytes."""
        return len(self.header) + self.data_nbytes + len(self.footer_template)


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
    """Build the footer after raw data with the given CRC-32: as long as ``layout.footer_template``."""
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
