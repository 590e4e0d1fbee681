"""Write ``milepost.json`` in format 1, which Milepost still reads but no longer writes, for tests."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from milepost.format.box import Box
from milepost.format.digest import crc32
from milepost.format.manifest import FileEntry, Lineage, Manifest, ShardEntry
from milepost.format.manifest_1 import STRUCTURE
from milepost.format.manifest_check import manifest_faults
from milepost.format.manifest_json import FORMAT_NAME

_TAIL = '"crc32": "%08x"\n}\n'


def to_json_1(manifest: Manifest) -> bytes:
    """Return the bytes of ``milepost.json`` in format 1; the same manifest gives the same bytes.

    Raises ValueError for a manifest that can't be a commit record: an item without offsets or digest, or a fault found
    by ``manifest_faults``.
    """
    faults = manifest_faults(manifest)
    if faults:
        raise ValueError("this manifest must not be committed: " + "; ".join(fault.message for fault in faults))
    names = sorted(manifest.files)
    number = {name: index for index, name in enumerate(names)}
    fields = [
        ("format", _dump(FORMAT_NAME)),
        ("format_version", "1"),
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
        ("extra", _dump(_extra_json(manifest))),
    ]
    body = ("{\n" + "".join(f'"{name}": {value},\n' for name, value in fields)).encode()
    return body + (_TAIL % crc32(body)).encode()


_dump = json.JSONEncoder(allow_nan=False, sort_keys=True).encode


def _lineage_json(lineage: Lineage) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(lineage).items() if value is not None}
    return fields | {"trail": [list(place) for place in lineage.trail]}


def _metrics_json(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _extra_json(manifest: Manifest) -> dict[str, Any]:
    structure = {STRUCTURE: base64.b64encode(manifest.structure).decode()} if manifest.structure else {}
    return {**manifest.extra, **structure}


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
