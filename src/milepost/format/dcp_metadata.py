"""``.metadata``, the index of a folder written by ``torch.distributed.checkpoint`` (DCP), read without running pickle.

It accepts what stock DCP of torch 2.0 and later writes: the classes of ``torch.distributed.checkpoint.metadata`` and
``.filesystem``, sizes, dtypes and paths. Any other global is refused by name. ``dcp_writer`` is the inverse.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from milepost.config import part_of
from milepost.errors import FormatError, listed
from milepost.format.box import Box
from milepost.format.dtype import DTYPES, itemsize
from milepost.format.manifest import METADATA_NAME, FileEntry, Manifest, ObjectEntry, ShardEntry, TensorEntry
from milepost.format.manifest_check import MAX_DIMS, manifest_faults
from milepost.format.pickle_dialect import Global, Instance
from milepost.format.pickle_reader import read_pickle
from milepost.format.plain_pickle import PLAIN_GLOBALS
from milepost.format.typed_json import MAX_COUNT

METADATA_MODULE = "torch.distributed.checkpoint.metadata"
FILESYSTEM_MODULE = "torch.distributed.checkpoint.filesystem"
_SHARDED_MODULE = "torch.distributed._shard.sharded_tensor.metadata"  # the place of TensorProperties up to torch 2.2
_MEMORY_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")
_MAX_TEXT = 1 << 16
_MAX_TRANSFORMS = 16
_MIN_CHUNK_NBYTES = 16
"""Minimum size of a pickled chunk; fewer bytes mean one chunk referenced repeatedly."""

PathParts = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A tensor of the state dict; its chunks are the boxes in which it was saved."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class DcpLocation:
    """Location of an item's record. ``transforms`` names stream extensions (compression, encryption), normally none."""

    path: str
    offset: int
    nbytes: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """The content of ``.metadata``.

    ``storage`` is keyed by (key, offsets of the chunk), offsets being None for an object. ``paths`` holds each key's
    path in the nested state dict; empty if the planner did not record it in the usual form.
    """

    tensors: Mapping[str, DcpTensor]
    objects: tuple[str, ...]
    storage: Mapping[tuple[str, tuple[int, ...] | None], DcpLocation]
    paths: Mapping[str, PathParts]
    save_id: str | None
    checkpoint_id: str | None
    version: str | None


# ---- the globals allowed in the pickle ----


def _size(*args: object) -> tuple[int, ...]:
    if len(args) != 1 or not isinstance(args[0], tuple | list):
        raise FormatError("torch.Size is not called with one sequence")
    return _sizes(tuple(args[0]))


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMS:
        raise FormatError("sizes or offsets are not a tuple of at most 64 numbers")
    for number in value:
        if type(number) is not int or not 0 <= number <= MAX_COUNT:
            raise FormatError("sizes or offsets are not all whole numbers from 0 to 2**62")
    return value


def _layout(*args: object) -> str:
    if args != ("torch.strided",):
        raise FormatError("a tensor's layout is not torch.strided: sparse tensors are not supported")
    return "torch.strided"


def _memory_format(*args: object) -> str:
    if len(args) != 1 or type(args[0]) is not int or not 0 <= args[0] < len(_MEMORY_FORMATS):
        raise FormatError("a memory format is unknown")
    return _MEMORY_FORMATS[args[0]]


def _getattr(*args: object) -> str:
    """Look up an enum's member, which early Python 3.11 pickled as ``getattr(class, name)``."""
    is_enum = len(args) == 2 and isinstance(args[0], Global) and args[0].call is _memory_format
    if not is_enum or args[1] not in _MEMORY_FORMATS:
        raise FormatError("getattr is not used for a memory format")
    return str(args[1])


def _path(*args: object) -> str:
    if not all(isinstance(part, str) for part in args):
        raise FormatError("a path is not text")
    if sum(len(str(part)) + 1 for part in args) > _MAX_TEXT:
        raise FormatError(f"a path has more than {_MAX_TEXT} characters")
    head, *rest = [str(part) for part in args] or ["."]
    return "/".join([head.rstrip("/"), *rest]) or "/"


def _metadata_globals() -> dict[str, Global]:
    instances = [
        f"{METADATA_MODULE}.{name}"
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
        )
    ]
    instances += [f"{_SHARDED_MODULE}.TensorProperties", f"{FILESYSTEM_MODULE}._StorageInfo"]
    table = [Global(name, new=True) for name in instances]
    table += [Global(f"torch.{name}", value=name) for name in DTYPES]
    table += [
        Global("torch.Size", call=_size),
        Global("torch.serialization._get_layout", call=_layout),
        Global(f"{METADATA_MODULE}._MEM_FORMAT_ENCODING", call=_memory_format),
        Global(f"{_SHARDED_MODULE}.MEM_FORMAT_ENCODING", call=_memory_format),
        Global("builtins.getattr", call=_getattr),
        Global("__builtin__.getattr", call=_getattr),
    ]
    for module in ("pathlib", "pathlib._local"):
        for flavour in ("Posix", "Windows", "PurePosix", "PureWindows"):
            table.append(Global(f"{module}.{flavour}Path", call=_path))
    return {entry.name: entry for entry in table} | PLAIN_GLOBALS


METADATA_GLOBALS: Mapping[str, Global] = MappingProxyType(_metadata_globals())
"""The globals allowed in a ``.metadata`` pickle."""


# ---- from the pickle's data to DcpMetadata ----


def parse_metadata(data: bytes, path: str = METADATA_NAME) -> DcpMetadata:
    """Read the bytes of a ``.metadata`` file. ``path`` is for error messages.

    Runs no code from it and imports no module. Raises FormatError if it is malformed, names a class that DCP does not
    use, or needs disproportionate memory (more than 16 MiB + 32 times its size).
    """
    try:
        return _metadata(read_pickle(data, METADATA_GLOBALS), len(data) // _MIN_CHUNK_NBYTES)
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}", path=path, key=error.key) from None


def _fields(value: object, name: str) -> dict[str, Any]:
    """Return the attributes of an instance of the class ``name``."""
    if not isinstance(value, Instance) or not value.name.endswith(f".{name}") or not isinstance(value.state, dict):
        found = value.name if isinstance(value, Instance) else type(value).__name__
        raise FormatError(f"expected a {name}, found a {found}, or an incomplete one")
    return value.state


def _metadata(value: object, max_chunks: int) -> DcpMetadata:
    fields = _fields(value, "Metadata")
    entries, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise FormatError("the index of keys or of locations is missing")
    tensors: dict[str, DcpTensor] = {}
    objects: list[str] = []
    # Release what has been read: otherwise a large index would be in memory twice.
    for key in list(entries):
        if type(key) is not str:
            raise FormatError("a key is not text")
        entry = entries.pop(key)
        if isinstance(entry, Instance) and entry.name.endswith(".BytesStorageMetadata"):
            objects.append(key)
        else:
            tensors[key] = _tensor(key, entry, max_chunks)
            max_chunks -= len(tensors[key].chunks)
    storage = {_index(index): _location(places.pop(index)) for index in list(places)}
    meta = fields.get("storage_meta")
    identity = {} if meta is None else _fields(meta, "StorageMeta")
    return DcpMetadata(
        tensors=tensors,
        objects=tuple(objects),
        storage=storage,
        paths=_paths(fields.get("planner_data")),
        save_id=_text_or_none(identity.get("save_id"), "save_id"),
        checkpoint_id=_text_or_none(identity.get("checkpoint_id"), "checkpoint_id"),
        version=_text_or_none(fields.get("version"), "version"),
    )


def _tensor(key: str, value: object, max_chunks: int) -> DcpTensor:
    fields = _fields(value, "TensorStorageMetadata")
    properties, chunks = fields.get("properties"), fields.get("chunks")
    if not isinstance(properties, Instance) or not properties.name.endswith(".TensorProperties"):
        raise FormatError(f"tensor {key!r:.200} has no properties", key=key)
    state = properties.state
    dtype = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    if not (isinstance(dtype, Global) and isinstance(dtype.value, str)):
        raise FormatError(f"tensor {key!r:.200} has no dtype", key=key)
    if not isinstance(chunks, list):
        raise FormatError(f"tensor {key!r:.200} has no list of chunks", key=key)
    if len(chunks) > max_chunks:
        raise FormatError(f"tensor {key!r:.200} has more chunks than a file of this size describes", key=key)
    boxes = []
    for chunk in chunks:
        corner = _fields(chunk, "ChunkStorageMetadata")
        boxes.append(Box(_sizes(corner.get("offsets")), _sizes(corner.get("sizes"))))
    return DcpTensor(dtype.value, _sizes(fields.get("size")), tuple(boxes))


def _index(value: object) -> tuple[str, tuple[int, ...] | None]:
    fields = _fields(value, "MetadataIndex")
    key, offset = fields.get("fqn"), fields.get("offset")
    if type(key) is not str:
        raise FormatError("a location's index has no key")
    return key, None if offset is None else _sizes(offset)


def _location(value: object) -> DcpLocation:
    fields = _fields(value, "_StorageInfo")
    path, offset, nbytes = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    transforms = fields.get("transform_descriptors") or ()
    if type(path) is not str or len(path) > _MAX_TEXT:
        raise FormatError("a location has no relative path")
    offset, nbytes = _sizes((offset, nbytes))
    if not isinstance(transforms, list | tuple) or len(transforms) > _MAX_TRANSFORMS:
        raise FormatError("a location has no list of transforms, or a very long one")
    if not all(type(name) is str for name in transforms):
        raise FormatError("a location has transforms that are not names")
    return DcpLocation(path, offset, nbytes, tuple(transforms))


def _paths(planner_data: object) -> dict[str, PathParts]:
    """Return the default planner's paths; empty for another planner, which may keep anything there."""
    if not isinstance(planner_data, dict):
        return {}
    return {key: path for key, path in planner_data.items() if type(key) is str and _is_path(path)}


def _is_path(value: object) -> bool:
    return isinstance(value, tuple) and 0 < len(value) <= 100 and all(type(part) in (str, int) for part in value)


def _text_or_none(value: object, name: str) -> str | None:
    if value is not None and (type(value) is not str or len(value) > _MAX_TEXT):
        raise FormatError(f"{name} is not text")
    return value


# ---- to a manifest ----


def manifest_from_metadata(
    metadata: DcpMetadata,
    file_sizes: Mapping[str, int],
    *,
    step: int | None = None,
    created_s: float = 0.0,
    path: str = METADATA_NAME,
) -> Manifest:
    """Build the manifest of a folder that has none, from its ``.metadata`` and the sizes in bytes of its files.

    Offset and digest of raw data are None: ``record_reader.locate_tensor`` finds them. ``kind`` is ``full`` if there is
    any key under ``optimizer.`` or ``train_state.``, ``model`` if all keys are the model's, else ``state``.
    ``world_size``, which is not recorded, is 1. Raises FormatError for items transformed (compressed, encrypted) by a
    DCP extension, and for all faults found by ``manifest_faults``: names that leave the folder, files that are absent
    or too short, overlaps and gaps.
    """
    problems: list[str] = []
    tensors = {key: _tensor_entry(key, tensor, metadata, problems) for key, tensor in metadata.tensors.items()}
    objects: dict[str, ObjectEntry] = {}
    for key in metadata.objects:
        place = _place(key, None, metadata, problems)
        if place is not None:
            objects[key] = ObjectEntry(place.path, place.offset, place.nbytes, None)
    keys = metadata.tensors.keys() | set(metadata.objects)
    used = {item.file for item in _items(tensors, objects)}
    manifest = Manifest(
        step=step,
        save_id=metadata.save_id or "",
        created_s=created_s,
        kind=_kind(keys),
        world_size=1,
        layout={},
        producer={"torch.distributed.checkpoint": metadata.version or "unknown"},
        tensors=tensors,
        objects=objects,
        files={name: FileEntry(nbytes) for name, nbytes in file_sizes.items() if name in used},
        paths={key: parts for key, parts in metadata.paths.items() if key in keys},
    )
    problems = problems or [fault.message for fault in manifest_faults(manifest)]
    if problems:
        raise FormatError(f"{path}: {'; '.join(listed(problems))}", path=path)
    return manifest


def _kind(keys: Collection[str]) -> str:
    """Infer the kind of state from the keys: full training state, only weights, or some other state dict."""
    parts = {part_of(key) for key in keys}
    if not parts.isdisjoint(("optimizer", "train_state")):
        return "full"
    return "model" if parts == {"model"} else "state"


def _items(
    tensors: Mapping[str, TensorEntry], objects: Mapping[str, ObjectEntry]
) -> Iterator[ShardEntry | ObjectEntry]:
    for tensor in tensors.values():
        yield from tensor.shards
    yield from objects.values()


def _tensor_entry(key: str, tensor: DcpTensor, metadata: DcpMetadata, problems: list[str]) -> TensorEntry:
    shards = []
    size = itemsize(tensor.dtype)
    for box in _distinct(tensor.chunks):
        place = _place(key, box.offsets, metadata, problems)
        if place is not None:
            shards.append(ShardEntry(box, place.path, place.offset, place.nbytes, None, box.numel * size, None))
    return TensorEntry(tensor.dtype, tensor.shape, tuple(shards))


def _distinct(chunks: tuple[Box, ...]) -> Iterator[Box]:
    """Drop empty and repeated chunks.

    DCP keeps one location per (key, offsets), so that of several ranks' empty shards at the tensor's end only one has a
    location. For a tensor without elements only the first chunk is kept.
    """
    filled = list(dict.fromkeys(box for box in chunks if box.numel > 0))
    yield from filled or chunks[:1]


def _place(key: str, offsets: tuple[int, ...] | None, metadata: DcpMetadata, problems: list[str]) -> DcpLocation | None:
    place = metadata.storage.get((key, offsets))
    if place is None:
        problem = f"no location is recorded for {key!r:.200} at {offsets}"
    elif place.transforms:
        problem = f"{key!r:.200} was transformed by {', '.join(place.transforms)!r:.100}, which can't be undone"
    else:
        return place
    problems.append(problem)
    return None
