"""``milepost.json`` of format 2: a head with the data needed by a listing, and the list of files.

It is JSON with one field and one file per line, so that people can also read, search and compare it. The head comes
first and is short, with its own CRC-32: a listing of steps reads no further. The file ends with the CRC-32 of
everything before. The shards are in ``milepost.shards``. ``docs/format.md`` specifies it; format 1, which had the
shards in this file, is also read.
"""

# No `from __future__ import annotations`: msgspec would have to compile the text of each annotation on first use.
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from milepost.config import PARTS
from milepost.errors import FormatError, NewerFormatError, Problem
from milepost.format.digest import crc32
from milepost.format.file_rows import FileRow, file_entries
from milepost.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_SHARDS_NBYTES,
    SHARDS_NAME,
    FileEntry,
    Lineage,
    Manifest,
    PartTotal,
)
from milepost.format.manifest_1 import manifest_of_format_1
from milepost.format.manifest_check import head_faults, manifest_faults
from milepost.format.remembered import Remembered
from milepost.format.summary import totals_by_part
from milepost.format.typed_json import MAX_COUNT, Count, Metric, Seconds, parse_json, typed

FORMAT_NAME = "milepost"
MAX_MANIFEST_NBYTES = 512 << 20
MAX_HEAD_NBYTES = 64 << 10
"""Size of the single request in which a scan reads a step. A head with the usual fields has less than 4 KiB."""

_DTYPES_NBYTES = 6 * 8 * 20
"""Upper bound on the size of the dtype names in a head."""
_SHARD_NBYTES = 96
"""Upper bound on a shard's bytes in ``milepost.shards``, if no two tensors of up to three dims are cut alike."""

_HEAD_CRC = re.compile(rb'^"head_crc32": "([0-9a-f]{8})",\n', re.MULTILINE)
_TAIL = '"crc32": "%08x"\n}\n'
_TAIL_PATTERN = re.compile(rb'"crc32": "([0-9a-f]{8})"\n}\n\Z')
_TAIL_NBYTES = len(_TAIL % 0)
_LINEAGE_PATTERN = re.compile(rb'^"lineage": (\{.*\}),$', re.MULTILINE)


class Listing(msgspec.Struct, frozen=True):
    """A summary of a step's files, to compare with a listing of its folder."""

    files: Count
    nbytes: Count
    crc32: Count
    """CRC-32 of the lines ``<name> <bytes>`` of all files, sorted by name."""


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    save_id: str
    created_s: Seconds
    kind: str
    world_size: Count
    layout: dict[str, Count]
    parts: tuple[PartTotal, ...]
    listing: Listing
    step: Count | None = None
    lineage: Lineage | None = None
    metrics: dict[str, Metric | None] = {}


class _Document(_Head, frozen=True, kw_only=True):
    files: list[FileRow]
    producer: dict[str, str]
    extra: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of ``milepost.json``. ``manifest`` has no tensors, objects, files and extra."""

    manifest: Manifest
    listing: Listing
    crc32: int
    """CRC-32 of the head."""


def listing_of(sizes: Iterable[tuple[str, int]]) -> Listing:
    """Summarize files with these names and sizes in bytes."""
    pairs = sorted(sizes)
    lines = "".join(f"{name} {nbytes}\n" for name, nbytes in pairs)
    return Listing(len(pairs), sum(nbytes for _, nbytes in pairs), crc32(lines.encode("utf-8", "surrogatepass")))


# ---- writing ----


def to_json(manifest: Manifest) -> bytes:
    """Return the bytes of ``milepost.json``; the same manifest gives the same bytes.

    Tensors and objects are written by ``shards_file.dump_shards``; this file has only their totals.

    Raises ValueError for a manifest that can't be a commit record, or whose head would be too long.
    """
    faults = head_faults(manifest)
    if faults:
        raise ValueError("this manifest must not be committed: " + "; ".join(fault.message for fault in faults))
    head = head_json(manifest, totals_by_part(manifest))
    if len(head) > MAX_HEAD_NBYTES - 64:
        raise ValueError(f"the head of {MANIFEST_NAME} would have {len(head)} bytes: at most {MAX_HEAD_NBYTES}")
    rest = [
        ("files", _lines(_file_json(name, manifest.files[name]) for name in sorted(manifest.files))),
        ("producer", _dump(dict(manifest.producer))),
        ("extra", _dump(dict(manifest.extra))),
    ]
    body = head + b'"head_crc32": "%08x",\n' % crc32(head) + _fields(rest)
    return body + (_TAIL % crc32(body)).encode()


def record_faults(manifest: Manifest, num_shards: int) -> list[str]:
    """Return the faults that would make a save's record unreadable, before any data is written.

    ``manifest`` is that of a plan: without tensors, and with one file per rank. Sizes are upper bounds.
    """
    parts = [PartTotal(part, MAX_COUNT, MAX_COUNT, MAX_COUNT, MAX_COUNT, ("",) * 8, MAX_COUNT) for part in PARTS]
    rest = len(_dump(dict(manifest.producer))) + len(_dump(dict(manifest.extra)))
    paths = dict(manifest.paths)
    keys_nbytes = _last_paths_nbytes.of(paths, lambda: len(_dump(paths)))
    sizes = (
        (f"the head of {MANIFEST_NAME}", len(head_json(manifest, parts)) + _DTYPES_NBYTES, MAX_HEAD_NBYTES - 64),
        (MANIFEST_NAME, rest + 240 * len(manifest.files), MAX_MANIFEST_NBYTES),
        (SHARDS_NAME, _SHARD_NBYTES * num_shards + 3 * keys_nbytes + len(manifest.structure), MAX_SHARDS_NBYTES),
    )
    return [f"{name} would have {size} bytes: at most {most} can be read" for name, size, most in sizes if size > most]


_last_paths_nbytes = Remembered[int]()


def head_json(manifest: Manifest, parts: Iterable[PartTotal]) -> bytes:
    """Return the bytes before the head's CRC-32."""
    listing = listing_of((name, entry.nbytes) for name, entry in manifest.files.items())
    fields = [
        ("format", _dump(FORMAT_NAME)),
        ("format_version", _dump(FORMAT_VERSION)),
        ("step", _dump(manifest.step)),
        ("save_id", _dump(manifest.save_id)),
        ("created_s", _dump(manifest.created_s)),
        ("kind", _dump(manifest.kind)),
        ("world_size", _dump(manifest.world_size)),
        ("layout", _dump(dict(manifest.layout))),
        *([] if manifest.lineage is None else [("lineage", _dump(_lineage_json(manifest.lineage)))]),
        *([("metrics", _dump(_metrics_json(manifest.metrics)))] if manifest.metrics else []),
        ("parts", _lines(_row(msgspec.to_builtins(part)) for part in parts)),
        ("listing", _row(msgspec.to_builtins(listing))),
    ]
    return b"{\n" + _fields(fields)


_dump = json.JSONEncoder(allow_nan=False, sort_keys=True).encode
_row = json.JSONEncoder(allow_nan=False).encode


def _fields(fields: Iterable[tuple[str, str]]) -> bytes:
    return "".join(f'"{name}": {value},\n' for name, value in fields).encode()


def _lines(lines: Iterable[str]) -> str:
    text = ",\n".join(lines)
    return f"[\n{text}\n]" if text else "[]"


def _lineage_json(lineage: Lineage) -> dict[str, Any]:
    fields = {name: value for name, value in msgspec.to_builtins(lineage).items() if value is not None}
    return fields | {"trail": [list(place) for place in lineage.trail]}


def _metrics_json(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _file_json(name: str, entry: FileEntry) -> str:
    crc = {} if entry.crc32 is None else {"crc32": entry.crc32}
    shared = {"content": entry.content, "since": entry.since} if entry.content else {}
    return _row({"name": name, "nbytes": entry.nbytes} | crc | shared)


# ---- reading ----


def parse_head(data: bytes, path: str = MANIFEST_NAME) -> Head | None:
    """Parse the head of a ``milepost.json`` of format 2, from its first ``MAX_HEAD_NBYTES``.

    Returns None without a complete head (format 1, a later format, or a damaged file): ``from_json`` tells these apart.
    """
    match = _HEAD_CRC.search(data, 0, MAX_HEAD_NBYTES)
    if match is None or int(match[1], 16) != crc32(memoryview(data)[: match.start()]):
        return None
    try:
        document = parse_json(data[: match.start()].rstrip(b",\n") + b"\n}", path, "a head")
        if document.get("format") != FORMAT_NAME or document.get("format_version") != FORMAT_VERSION:
            return None
        said = typed(document, _Head, path)
    except FormatError:
        return None
    manifest = _manifest(said)
    return None if head_faults(manifest) else Head(manifest, said.listing, int(match[1], 16))


def from_json(
    data: bytes,
    path: str = MANIFEST_NAME,
    read_shards: Callable[[str, FileEntry], bytes] | None = None,
    *,
    must_cover: bool = True,
) -> Manifest:
    """Parse and check ``milepost.json`` of any format. ``path`` is for error messages.

    If it lists ``milepost.shards``, the manifest's tensors come from the result of ``read_shards`` for that file's name
    and entry. Without ``read_shards``, a manifest of format 2 has no tensors, objects and paths. Only in one node's
    part of a step the shards need not cover their tensors (``must_cover``).

    Raises:
        NewerFormatError: a later Milepost wrote it. FormatError: it is damaged (any changed byte is detected), or its
        content might mislead a reader: see ``manifest_faults``. One message holds all faults.
    """
    document = _parse(data, path)
    if document["format_version"] == 1:
        manifest = manifest_of_format_1(document, path)
        _refuse(path, manifest_faults(manifest))
        return manifest
    said = typed(document, _Document, path)
    manifest = _manifest(said)
    manifest = replace(manifest, files=file_entries(said.files, path), producer=said.producer, extra=said.extra)
    _refuse(path, head_faults(manifest))
    head = parse_head(data, path)
    if head is None or head.listing != listing_of((name, entry.nbytes) for name, entry in manifest.files.items()):
        raise FormatError(f"{path}: its head does not match the rest", path=path)
    name = manifest.file_named(SHARDS_NAME)
    if name is None or read_shards is None:
        return manifest
    entry = manifest.files[name]
    where = path[: path.rfind("/") + 1] + name
    return _with_shards(manifest, entry, read_shards(name, entry), path, where, must_cover=must_cover)


def _with_shards(
    manifest: Manifest, entry: FileEntry, data: bytes, path: str, where: str, *, must_cover: bool
) -> Manifest:
    """Add the tensors and objects of ``milepost.shards``, at ``where``, to the manifest at ``path``."""
    # Imports numpy, which a scan does not need.
    from milepost.format.columns import with_table
    from milepost.format.columns_check import table_faults
    from milepost.format.shards_file import OtherSaveError, parse_shards

    try:
        table, found = parse_shards(data, manifest.save_id, where)
    except OtherSaveError as error:
        mixed = f"it is of save {manifest.save_id!r}, {SHARDS_NAME} beside it of save {error.save_id!r}"
        raise FormatError(f"{path}: {mixed}: files of two saves were mixed up; use another step", path=path) from error
    if (len(data), found) != (entry.nbytes, entry.crc32):
        raise FormatError(f"{where}: it differs from the file that {path} records", path=where)
    _refuse(where, table_faults(table, manifest.files, must_cover=must_cover))
    return with_table(manifest, table)


def _refuse(path: str, faults: list[Problem]) -> None:
    if faults:
        key = next((fault.key for fault in faults if fault.key), None)
        raise FormatError(f"{path}: " + "; ".join(fault.message for fault in faults), path=path, key=key)


def _manifest(said: _Head) -> Manifest:
    return Manifest(
        step=said.step,
        save_id=said.save_id,
        created_s=said.created_s,
        kind=said.kind,
        world_size=said.world_size,
        layout=said.layout,
        producer={},
        tensors={},
        objects={},
        files={},
        lineage=said.lineage,
        metrics={name: math.nan if value is None else value for name, value in said.metrics.items()},
        parts=said.parts,
    )


def is_intact(data: bytes) -> bool:
    """Return whether a manifest of any format ends with its own CRC-32."""
    tail = _TAIL_PATTERN.search(data, max(0, len(data) - _TAIL_NBYTES))
    return tail is not None and int(tail[1], 16) == crc32(memoryview(data)[: tail.start()])


def _parse(data: bytes, path: str) -> dict[str, Any]:
    """Parse an undamaged manifest of a supported format."""
    if len(data) > MAX_MANIFEST_NBYTES:
        raise FormatError(
            f"{path}: {len(data)} bytes are too many for a manifest (at most {MAX_MANIFEST_NBYTES})", path=path
        )
    if not is_intact(data):
        damaged = f"{path}: damaged: it does not end with a matching CRC-32 of itself; use another step"
        raise FormatError(damaged, path=path)
    document = parse_json(data, path, "a manifest")
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        raise FormatError(f"{path}: not a Milepost manifest", path=path)
    version = document.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path}: written by a newer Milepost (format {version}; this one reads up to {FORMAT_VERSION}): "
            "upgrade Milepost",
            path=path,
        )
    if version not in (1, FORMAT_VERSION) or type(version) is not int:
        raise FormatError(f"{path}: format version {version!r:.50} does not exist", path=path)
    return document


def lineage_of_torn(data: bytes) -> Lineage | None:
    """Return the lineage in a manifest that ``from_json`` refuses, or None if its line is illegible.

    No digest covers it then: use it only to determine from which steps the damaged one may have descended.
    """
    found = _LINEAGE_PATTERN.search(data, 0, MAX_HEAD_NBYTES)
    if found is None:
        return None
    try:
        return typed(parse_json(found[1], MANIFEST_NAME, "a lineage"), Lineage, MANIFEST_NAME, "lineage")
    except FormatError:
        return None
