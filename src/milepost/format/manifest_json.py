"""``milepost.json`` to and from :class:`~milepost.format.manifest.Manifest`.

The file is JSON with one line per file and per item, so that it can be read, searched and compared by people too.
It ends with the CRC-32 of all that stands before that field. ``docs/format.md`` specifies it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, NoReturn

from milepost.errors import FormatError
from milepost.format.box import Box
from milepost.format.digest import crc32
from milepost.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Lineage,
    Manifest,
    ShardEntry,
)
from milepost.format.manifest_1 import manifest_of_format_1
from milepost.format.manifest_check import manifest_faults
from milepost.format.typed_json import convert, parse_json

FORMAT_NAME = "milepost"
MAX_MANIFEST_NBYTES = 512 << 20
_TAIL = '"crc32": "%08x"\n}\n'
_TAIL_PATTERN = re.compile(rb'"crc32": "([0-9a-f]{8})"\n}\n\Z')
_TAIL_NBYTES = len(_TAIL % 0)
_LINEAGE_PATTERN = re.compile(rb'^"lineage": (\{.*\}),$', re.MULTILINE)
_MAX_HEAD_NBYTES = 64 << 10
"""The lineage stands in front of the files and tensors."""


# ---- writing ----


def to_json(manifest: Manifest) -> bytes:
    """The bytes of ``milepost.json``; the same manifest gives the same bytes.

    Raises ValueError for a manifest that is not fit to be a commit record: an item without offsets or digest, or a
    fault that ``manifest_faults`` finds.
    """
    faults = manifest_faults(manifest)
    if faults:
        raise ValueError("this manifest must not be committed: " + "; ".join(fault.message for fault in faults))
    names = sorted(manifest.files)
    number = {name: index for index, name in enumerate(names)}
    fields = [
        ("format", _dump(FORMAT_NAME)),
        ("format_version", _dump(FORMAT_VERSION)),
        ("step", _dump(manifest.step)),
        ("save_id", _dump(manifest.save_id)),
        ("created_s", _dump(manifest.created_s)),
        ("kind", _dump(manifest.kind)),
        ("world_size", _dump(manifest.world_size)),
        ("layout", _dump(dict(manifest.layout))),
        ("producer", _dump(dict(manifest.producer))),
        *([] if manifest.lineage is None else [("lineage", _dump(_lineage_json(manifest.lineage)))]),
        *([("metrics", _dump(_metrics_json(manifest.metrics)))] if manifest.metrics else []),
        ("files", _lines("[]", (_dump(_file_json(name, manifest.files[name])) for name in names))),
        ("tensors", _lines("{}", _tensor_lines(manifest, number))),
        ("objects", _lines("{}", _object_lines(manifest, number))),
        ("extra", _dump(dict(manifest.extra))),
    ]
    body = ("{\n" + "".join(f'"{name}": {value},\n' for name, value in fields)).encode()
    return body + (_TAIL % crc32(body)).encode()


_dump = json.JSONEncoder(allow_nan=False, sort_keys=True).encode


def _lineage_json(lineage: Lineage) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(lineage).items() if value is not None}
    return fields | {"trail": [list(place) for place in lineage.trail]}


def _metrics_json(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _lines(brackets: str, lines: Iterable[str]) -> str:
    text = ",\n".join(lines)
    return f"{brackets[0]}\n{text}\n{brackets[1]}" if text else brackets


def _file_json(name: str, entry: FileEntry) -> dict[str, Any]:
    crc = {} if entry.crc32 is None else {"crc32": entry.crc32}
    return {"name": name, "nbytes": entry.nbytes} | crc


def _path_json(manifest: Manifest, key: str) -> str:
    path = manifest.paths.get(key)
    return "" if path is None else f'"path": {_dump(path)}, '


def _tensor_lines(manifest: Manifest, number: Mapping[str, int]) -> Iterator[str]:
    for key in sorted(manifest.tensors):
        entry = manifest.tensors[key]
        whole = Box.whole(entry.shape)
        shards = ", ".join(_shard_json(key, shard, shard.box == whole, number) for shard in entry.shards)
        head = f'{_dump(key)}: {{"dtype": "{entry.dtype}", "shape": {list(entry.shape)}, '
        yield f'{head}{_path_json(manifest, key)}"shards": [{shards}]}}'


def _shard_json(key: str, shard: ShardEntry, is_whole: bool, number: Mapping[str, int]) -> str:
    if shard.data_offset is None or shard.crc32 is None:
        raise ValueError(f"shard {shard.box} of {key!r} has no data offset or no digest: it can't be committed")
    numbers = f"{number[shard.file]}, {shard.record_offset}, {shard.record_nbytes}, {shard.data_offset}, {shard.crc32}"
    return f"[{numbers}]" if is_whole else f"[{numbers}, {list(shard.box.offsets)}, {list(shard.box.sizes)}]"


def _object_lines(manifest: Manifest, number: Mapping[str, int]) -> Iterator[str]:
    for key in sorted(manifest.objects):
        entry = manifest.objects[key]
        if entry.crc32 is None:
            raise ValueError(f"object {key!r} has no digest: it can't be committed")
        place = f"[{number[entry.file]}, {entry.record_offset}, {entry.record_nbytes}, {entry.crc32}]"
        yield f'{_dump(key)}: {{{_path_json(manifest, key)}"record": {place}}}'


# ---- reading ----


def from_json(data: bytes, path: str = MANIFEST_NAME) -> Manifest:
    """Parse and check ``milepost.json``. ``path`` is how errors name it.

    Raises FormatError for a file that is damaged (any changed byte is found), of a newer version, or of which
    anything could lead a reader astray: see ``manifest_faults``. All such faults are in one message.
    """
    manifest = manifest_of_format_1(_parse(data, path), path)
    faults = manifest_faults(manifest)
    if faults:
        key = next((fault.key for fault in faults if fault.key), None)
        raise FormatError(f"{path}: " + "; ".join(fault.message for fault in faults), path=path, key=key)
    return manifest


def _parse(data: bytes, path: str) -> dict[str, Any]:
    """The document in a whole and undamaged manifest of a format that this code reads."""

    def fail(what: str) -> NoReturn:
        raise FormatError(f"{path}: {what}", path=path)

    if len(data) > MAX_MANIFEST_NBYTES:
        fail(f"{len(data)} bytes are too many for a manifest (at most {MAX_MANIFEST_NBYTES})")
    tail = _TAIL_PATTERN.search(data, max(0, len(data) - _TAIL_NBYTES))
    if tail is None or int(tail[1], 16) != crc32(memoryview(data)[: tail.start()]):
        fail("damaged: it does not end with a matching CRC-32 of itself; use another step")
    document = parse_json(data, path, "a manifest")
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        fail("not a Milepost manifest")
    version = document.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        fail(f"written by a newer Milepost (format {version}; this one reads {FORMAT_VERSION}): upgrade Milepost")
    if version != FORMAT_VERSION:
        fail(f"format version {version!r:.50} does not exist")
    return document


def lineage_of_torn(data: bytes) -> Lineage | None:
    """The lineage in a manifest that ``from_json`` refuses, if its line is legible; None else.

    It is not covered by any digest then: fit to say which steps the damaged one may have descended from, no more.
    """
    found = _LINEAGE_PATTERN.search(data, 0, _MAX_HEAD_NBYTES)
    if found is None:
        return None
    try:
        return convert(parse_json(found[1], MANIFEST_NAME, "a lineage"), Lineage, MANIFEST_NAME, "lineage")
    except FormatError:
        return None
