"""``milepost.json`` to and from :class:`~milepost.format.manifest.Manifest`.

The file is JSON with one line per file and per item, so that it can be read, searched and compared by people too.
It ends with the CRC-32 of all that stands before that field. ``docs/format.md`` specifies it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from milepost.errors import FormatError
from milepost.format.box import Box
from milepost.format.digest import crc32
from milepost.format.dtype import DTYPES
from milepost.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    BranchStart,
    FileEntry,
    Lineage,
    Manifest,
    ObjectEntry,
    ShardEntry,
    TensorEntry,
)
from milepost.format.manifest_check import MAX_COUNT, MAX_DIMS, manifest_faults

FORMAT_NAME = "milepost"
MAX_MANIFEST_NBYTES = 512 << 20
_TAIL = '"crc32": "%08x"\n}\n'
_TAIL_PATTERN = re.compile(rb'"crc32": "([0-9a-f]{8})"\n}\n\Z')
_TAIL_NBYTES = len(_TAIL % 0)


# ---- writing ----


def to_json(manifest: Manifest) -> bytes:
    """The bytes of ``milepost.json``; the same manifest gives the same bytes.

    Raises ValueError for a manifest that is not fit to be a commit record: an item without offsets or digest, or a
    fault that ``manifest_faults`` finds.
    """
    faults = manifest_faults(manifest)
    if faults:
        raise ValueError("this manifest must not be committed: " + "; ".join(fault.text for fault in faults))
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
    reader = _Reader(path)
    document = reader.parse(data)
    manifest = reader.manifest(document)
    faults = manifest_faults(manifest)
    if faults:
        reader.fail("; ".join(fault.text for fault in faults), next((f.key for f in faults if f.key), None))
    return manifest


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns JSON into a Manifest, checking the type of everything on the way."""

    path: str

    def fail(self, what: str, key: str | None = None) -> NoReturn:
        raise FormatError(f"{self.path}: {what}", path=self.path, key=key)

    def parse(self, data: bytes) -> dict[str, Any]:
        if len(data) > MAX_MANIFEST_NBYTES:
            self.fail(f"{len(data)} bytes are too many for a manifest (at most {MAX_MANIFEST_NBYTES})")
        tail = _TAIL_PATTERN.search(data, max(0, len(data) - _TAIL_NBYTES))
        if tail is None or int(tail[1], 16) != crc32(memoryview(data)[: tail.start()]):
            self.fail("damaged: it does not end with a matching CRC-32 of itself; use another step")
        try:
            document = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            self.fail(f"not the JSON of a manifest ({error!s:.200})")
        if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
            self.fail("not a Milepost manifest")
        version = document.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            self.fail(
                f"written by a newer Milepost (format {version}; this one reads {FORMAT_VERSION}): upgrade Milepost"
            )
        if version != FORMAT_VERSION:
            self.fail(f"format version {version!r:.50} does not exist")
        return document

    def manifest(self, document: dict[str, Any]) -> Manifest:
        step = document.get("step")
        files = self.files(document)
        names = list(files)
        paths: dict[str, tuple[str | int, ...]] = {}
        return Manifest(
            step=None if step is None else self.count(step, "step"),
            save_id=self.text(document.get("save_id"), "save_id"),
            created_s=self.seconds(document.get("created_s")),
            kind=self.text(document.get("kind"), "kind"),
            world_size=self.count(document.get("world_size"), "world_size"),
            layout={k: self.count(v, f"layout.{k}") for k, v in self.mapping(document, "layout").items()},
            producer={k: self.text(v, f"producer.{k}") for k, v in self.mapping(document, "producer").items()},
            tensors={k: self.tensor(k, v, names, paths) for k, v in self.mapping(document, "tensors").items()},
            objects={k: self.object(k, v, names, paths) for k, v in self.mapping(document, "objects").items()},
            files=files,
            paths=paths,
            extra=self.mapping(document, "extra"),
            lineage=self.lineage(document.get("lineage")),
            metrics={k: self.metric(k, v) for k, v in self.optional_mapping(document, "metrics").items()},
        )

    def lineage(self, value: Any) -> Lineage | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail("'lineage' is not an object")
        parent_step, trail, start = value.get("parent_step"), value.get("trail", []), value.get("start")
        pairs = isinstance(trail, list) and all(isinstance(place, list) and len(place) == 2 for place in trail)
        if not pairs or not (start is None or isinstance(start, dict)):
            self.fail("'trail' or 'start' of the lineage is invalid")
        seen = value.get("seen", -1)
        return Lineage(
            run=self.text(value.get("run"), "lineage.run"),
            order=self.count(value.get("order"), "lineage.order"),
            branch=self.text(value.get("branch"), "lineage.branch"),
            parent=self.text(value.get("parent", ""), "lineage.parent"),
            parent_step=None if parent_step is None else self.count(parent_step, "lineage.parent_step"),
            trail=tuple((self.text(b, "lineage.trail"), self.count(order, "lineage.trail")) for b, order in trail),
            start=None if start is None else self.branch_start(start),
            seen=-1 if seen == -1 else self.count(seen, "lineage.seen"),
        )

    def branch_start(self, value: dict[str, Any]) -> BranchStart:
        return BranchStart(
            step=self.count(value.get("step"), "lineage.start.step"),
            save_id=self.text(value.get("save_id", ""), "lineage.start.save_id"),
            launch=self.text(value.get("launch", ""), "lineage.start.launch"),
        )

    def metric(self, name: str, value: Any) -> float:
        if value is None:
            return math.nan
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            self.fail(f"metric {name!r:.200} is not a finite number")
        return float(value)

    def files(self, document: dict[str, Any]) -> dict[str, FileEntry]:
        listed = document.get("files")
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            self.fail("'files' is not a list of files")
        files: dict[str, FileEntry] = {}
        for entry in listed:
            name = self.text(entry.get("name"), "files[].name")
            crc = entry.get("crc32")
            if name in files:
                self.fail(f"file {name!r} is listed twice")
            nbytes = self.count(entry.get("nbytes"), f"size of file {name!r}")
            files[name] = FileEntry(nbytes, None if crc is None else self.count(crc, f"crc32 of file {name!r}"))
        return files

    def tensor(self, key: str, value: Any, names: list[str], paths: dict[str, tuple[str | int, ...]]) -> TensorEntry:
        if not isinstance(value, dict) or not isinstance(value.get("shards"), list):
            self.fail(f"tensor {key!r} is not described as one", key)
        self.keep_path(key, value, paths)
        dtype = self.text(value.get("dtype"), f"dtype of {key!r}")
        shape = self.sizes(value.get("shape"), key)
        whole = Box.whole(shape)
        nbytes = DTYPES[dtype].itemsize if dtype in DTYPES else 0  # manifest_faults names an unknown one
        return TensorEntry(dtype, shape, tuple(self.shard(key, s, names, whole, nbytes) for s in value["shards"]))

    def shard(self, key: str, value: Any, names: list[str], whole: Box, element_nbytes: int) -> ShardEntry:
        if not isinstance(value, list) or len(value) not in (5, 7):
            self.fail(f"a shard of {key!r} is not described as one", key)
        file, record_offset, record_nbytes, data_offset, crc = self.counts(value[:5], key)
        box = whole if len(value) == 5 else Box(self.sizes(value[5], key), self.sizes(value[6], key))
        name = self.file_name(names, file, key)
        data_nbytes = box.numel * element_nbytes
        return ShardEntry(box, name, record_offset, record_nbytes, data_offset, data_nbytes, crc)

    def object(self, key: str, value: Any, names: list[str], paths: dict[str, tuple[str | int, ...]]) -> ObjectEntry:
        record = value.get("record") if isinstance(value, dict) else None
        if not isinstance(record, list) or len(record) != 4:
            self.fail(f"object {key!r} is not described as one", key)
        self.keep_path(key, value, paths)
        file, offset, nbytes, crc = self.counts(record, key)
        return ObjectEntry(self.file_name(names, file, key), offset, nbytes, crc)

    def keep_path(self, key: str, value: dict[str, Any], paths: dict[str, tuple[str | int, ...]]) -> None:
        path = value.get("path")
        if path is None:
            return
        if not isinstance(path, list) or not path or not all(type(part) in (str, int) for part in path):
            self.fail(f"the path of {key!r} is not one", key)
        paths[key] = tuple(path)

    def file_name(self, names: list[str], number: int, key: str) -> str:
        if number >= len(names):
            self.fail(f"{key!r} is said to be in file number {number} of {len(names)}", key)
        return names[number]

    def sizes(self, value: Any, key: str) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > MAX_DIMS:
            self.fail(f"a shape or an offset of {key!r} is not a list of at most {MAX_DIMS} numbers", key)
        return tuple(self.counts(value, key))

    def counts(self, values: list[Any], key: str) -> list[int]:
        for value in values:
            if type(value) is not int or not 0 <= value <= MAX_COUNT:
                self.fail(f"a number of {key!r} is {value!r:.50}: not a whole number from 0 to 2**62", key)
        return values

    def count(self, value: Any, name: str) -> int:
        if type(value) is not int or not 0 <= value <= MAX_COUNT:
            self.fail(f"{name} is {value!r:.50}: not a whole number from 0 to 2**62")
        return value

    def text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            self.fail(f"{name} is missing or not text")
        return value

    def seconds(self, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= MAX_COUNT:  # NaN is not
            self.fail("created_s is not a time in seconds")
        return float(value)

    def mapping(self, document: dict[str, Any], name: str) -> dict[str, Any]:
        value = document.get(name)
        if not isinstance(value, dict):
            self.fail(f"{name!r} is missing or not an object")
        return value

    def optional_mapping(self, document: dict[str, Any], name: str) -> dict[str, Any]:
        return self.mapping(document, name) if name in document else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
