"""The directory of a small zip archive inside a larger file, read with a few ranged reads and fully validated.

Only the form written by ``torch.save`` is accepted: stored (never compressed or encrypted) entries, one disk, no
archive comment. The structures are those of PKWARE's APPNOTE 6.3, sections 4.3.7 to 4.3.16.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from milepost.errors import FormatError

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
END64_LOCATOR = struct.Struct("<4sIQI")
LOCAL_MAGIC, CENTRAL_MAGIC, END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64_MAGIC, END64_LOCATOR_MAGIC, DESCRIPTOR_MAGIC = b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"
ZIP64_EXTRA_ID = 0x0001
SATURATED = 0xFFFFFFFF
"""Marker in a 32-bit field: the actual value is in the zip64 extra field."""

_ENCRYPTED = 0x1 | 0x40 | 0x2000
_MAX_ENTRIES = 1024
_NBYTES_PER_ENTRY = 1024
_WINDOW_NBYTES = 4096
_MAX_WINDOWS = 8

ReadAt = Callable[[int, int], bytes]
"""``read_at(offset, nbytes)`` returns exactly those bytes of the archive, whose first byte is at 0."""


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One stored entry. Offsets count from the start of the archive."""

    name: str
    header_offset: int
    nbytes: int
    crc32: int


class ZipDirectory:
    """The entries of an archive of ``nbytes``, by name. Raises FormatError for anything except plain stored entries.

    More than ``max_entries`` entries are refused.
    """

    def __init__(self, read_at: ReadAt, nbytes: int, *, max_entries: int = _MAX_ENTRIES):
        self._read_at = read_at
        self._max_entries = max_entries
        self._nbytes = nbytes
        self._windows: list[tuple[int, bytes]] = []
        self.entries: dict[str, ZipEntry] = {}
        if nbytes < END.size:
            raise FormatError(f"{nbytes} bytes are too few for a torch.save record")
        self._load(max(0, nbytes - _WINDOW_NBYTES), min(nbytes, _WINDOW_NBYTES))
        count, offset, length = self._find_directory()
        self._parse(count, self.read(offset, length))

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes of the archive, from earlier reads if possible."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self._nbytes:
            raise FormatError(f"a record of {self._nbytes} bytes points to bytes {offset} to {offset + nbytes}")
        for start, window in self._windows:
            if start <= offset and offset + nbytes <= start + len(window):
                return window[offset - start : offset - start + nbytes]
        return self._load(offset, min(self._nbytes - offset, max(nbytes, _WINDOW_NBYTES)))[:nbytes]

    def data_offset(self, entry: ZipEntry) -> int:
        """Return the offset of an entry's bytes, checked against its local header and the archive's end."""
        header = LOCAL_HEADER.unpack(self.read(entry.header_offset, LOCAL_HEADER.size))
        magic, _, flags, method, *_, name_nbytes, extra_nbytes = header
        name = self.read(entry.header_offset + LOCAL_HEADER.size, name_nbytes)
        if magic != LOCAL_MAGIC or name != entry.name.encode() or method != 0 or flags & _ENCRYPTED:
            raise FormatError(f"the local header of zip entry {entry.name!r} contradicts the directory")
        offset: int = entry.header_offset + LOCAL_HEADER.size + name_nbytes + extra_nbytes
        if offset + entry.nbytes > self._nbytes:
            raise FormatError(f"zip entry {entry.name!r} of {entry.nbytes} bytes reaches beyond its record")
        return offset

    def content(self, entry: ZipEntry, limit: int) -> bytes:
        """Return the bytes of an entry of at most ``limit`` bytes."""
        if entry.nbytes > limit:
            raise FormatError(f"zip entry {entry.name!r} has {entry.nbytes} bytes, at most {limit} are read")
        return self.read(self.data_offset(entry), entry.nbytes)

    def _load(self, offset: int, nbytes: int) -> bytes:
        window = self._read_at(offset, nbytes)
        if len(window) != nbytes:
            raise FormatError(f"a record ends at {offset + len(window)} of {self._nbytes} bytes")
        self._windows[:] = [*self._windows[1 - _MAX_WINDOWS :], (offset, window)]
        return window

    def _find_directory(self) -> tuple[int, int, int]:
        """Return number of entries, offset and length of the central directory."""
        at = self._nbytes - END.size
        magic, disk, start_disk, here, count, length, offset, comment = END.unpack(self.read(at, END.size))
        if magic != END_MAGIC or comment or (disk or start_disk) not in (0, 0xFFFF):
            raise FormatError("a record does not end with a zip directory: it is truncated or not a torch.save record")
        locator_at = at - END64_LOCATOR.size
        if locator_at >= 0 and self.read(locator_at, 4) == END64_LOCATOR_MAGIC:
            _, _, end64_at, _ = END64_LOCATOR.unpack(self.read(locator_at, END64_LOCATOR.size))
            magic, _, _, _, _, _, here, count, length, offset = END64.unpack(self.read(end64_at, END64.size))
            if magic != END64_MAGIC:
                raise FormatError("a record's zip64 directory is not at its recorded offset")
        if here != count or count > self._max_entries or length > self._max_entries * _NBYTES_PER_ENTRY:
            raise FormatError(f"a record's zip directory of {count} entries and {length} bytes is not torch.save's")
        return count, offset, length

    def _parse(self, count: int, directory: bytes) -> None:
        at = 0
        for _ in range(count):
            if at + CENTRAL_HEADER.size > len(directory):
                raise FormatError("a record's zip directory is truncated")
            magic, _, _, flags, method, _, _, crc, packed, nbytes, *rest = CENTRAL_HEADER.unpack_from(directory, at)
            name_nbytes, extra_nbytes, comment_nbytes, _, _, _, header_offset = rest
            at += CENTRAL_HEADER.size
            name = directory[at : at + name_nbytes].decode("utf-8", "replace")
            extra = directory[at + name_nbytes : at + name_nbytes + extra_nbytes]
            at += name_nbytes + extra_nbytes + comment_nbytes
            if magic != CENTRAL_MAGIC or at > len(directory):
                raise FormatError("a record's zip directory is malformed")
            if method != 0 or flags & _ENCRYPTED:
                raise FormatError(f"zip entry {name!r:.100} is compressed or encrypted; torch.save never does that")
            nbytes, packed, header_offset = _resolve_zip64((nbytes, packed, header_offset), extra, name)
            if nbytes != packed or name in self.entries:
                raise FormatError(f"zip entry {name!r:.100} is listed twice or with two sizes")
            self.entries[name] = ZipEntry(name, header_offset, nbytes, crc)


def _resolve_zip64(fields: tuple[int, int, int], extra: bytes, name: str) -> tuple[int, int, int]:
    """Replace saturated 32-bit fields by values of the zip64 extra field, which holds only these, in this order."""
    if SATURATED not in fields:
        return fields
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        if kind == ZIP64_EXTRA_ID:
            body = extra[at + 4 : at + 4 + nbytes]
            values = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            resolved = [next(values, None) if field == SATURATED else field for field in fields]
            if None not in resolved:
                return resolved[0], resolved[1], resolved[2]  # type: ignore[return-value]
        at += 4 + nbytes
    raise FormatError(f"zip entry {name!r:.100} lacks its 64-bit sizes")
