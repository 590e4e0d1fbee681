"""The list of files in manifests and sign-offs."""

# No `from __future__ import annotations`: msgspec would have to compile the text of each annotation on first use.
import msgspec

from milepost.errors import FormatError
from milepost.format.manifest import FileEntry
from milepost.format.typed_json import Count


class FileRow(msgspec.Struct, frozen=True):
    """A file of the checkpoint."""

    name: str
    nbytes: Count
    crc32: Count | None = None
    content: str = ""
    since: Count | None = None


class ShareRow(msgspec.Struct, frozen=True, array_like=True):
    """One rank's part of a file that several ranks write."""

    nbytes: Count
    crcs: list[tuple[Count, Count]]
    """Index of a block, and the contribution of the rank's bytes to its CRC-32."""


class SignOffHead(msgspec.Struct, frozen=True):
    """The rank that signs off, with the files it wrote or its error."""

    rank: Count
    save_id: str
    files: list[FileRow]
    error: str | None = None
    shares: list[dict[str, ShareRow]] = []


def file_entries(rows: list[FileRow], path: str) -> dict[str, FileEntry]:
    """Return the files by name. Raises FormatError if one is listed twice; ``path`` is the file that lists them."""
    files: dict[str, FileEntry] = {}
    for row in rows:
        if row.name in files:
            raise FormatError(f"{path}: file {row.name!r} is listed twice", path=path)
        files[row.name] = FileEntry(row.nbytes, row.crc32, row.content, row.since)
    return files
