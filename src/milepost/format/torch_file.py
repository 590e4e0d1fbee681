"""A ``torch.save`` file of many tensors (``.pt``, ``.pth``), located and laid out without torch.

A file written here is like that of ``torch.save({key: tensor, ...})``, readable by ``torch.load(weights_only=True,
mmap=True)``. Tied weights share one storage. The zip structures are those of ``record``.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from milepost.errors import ConversionError, FormatError
from milepost.format.dtype import itemsize
from milepost.format.kinds import kind_of_pickle, kind_of_zip, names_in_tail
from milepost.format.pickle_dialect import Dialect, Global
from milepost.format.pickle_reader import read_pickle
from milepost.format.plain_pickle import PLAIN_GLOBALS, PROTO_2, STOP, ordered_dict, str_opcodes
from milepost.format.record import DATA_ALIGNMENT, directory_end, small_entries, tensor_opcodes
from milepost.format.record_reader import (
    TENSOR_GLOBALS,
    LocatedTensor,
    Rebuild,
    located,
    persistent_storage,
    read_pickle_entry,
)
from milepost.format.zip_directory import (
    CENTRAL_HEADER,
    CENTRAL_MAGIC,
    LOCAL_HEADER,
    LOCAL_MAGIC,
    SATURATED,
    ZIP64_EXTRA_ID,
    ZipDirectory,
)

MAX_ENTRIES = 1 << 18
_MAX_PICKLE_NBYTES = 256 << 20
_MAX_DEPTH = 20
_MAX_PATH = 1024
_MAX_NODES = 1 << 17
_MAX_PLAIN = 1 << 14
_TAIL_NBYTES = 64 << 10
_MAX_REPEATS = 64
"""Limit on the total size of tensors relative to the file, since they may be views of one storage."""
_SMALL_COUNT = 3  # entries that `small_entries` makes
_UTF8 = 0x0800
_DOS_DATE = 0x0021  # 1980-01-01: files must not depend on the time


def locate_tensors(
    read_at: Callable[[int, int], bytes],
    nbytes: int,
    path: str = "the file",
    *,
    values: dict[str, object] | None = None,
    versions: dict[str, int] | None = None,
) -> dict[str, LocatedTensor]:
    """Locate all tensors of a file of ``nbytes``, by path in the nested state dict, joined by dots.

    ``read_at(offset, nbytes)`` returns bytes of the file, ``path`` is for error messages. Other values are put into
    ``values``, an ``Inert`` for those that are not plain; versions, which ``module.state_dict()`` notes, into
    ``versions``. No code in the file is run.

    Raises:
        FormatError: the file is not a ``torch.save`` zip file, is damaged, or holds anything except plain data and
        tensors. ConversionError: it is of another known kind.
    """
    try:
        archive = ZipDirectory(read_at, nbytes, max_entries=MAX_ENTRIES)
    except FormatError:
        tail = read_at(max(nbytes - _TAIL_NBYTES, 0), min(nbytes, _TAIL_NBYTES))
        _refuse_other_zip(names_in_tail(tail), path)  # their entries may be compressed
        raise
    _refuse_other_zip(list(archive.entries), path)
    pickled, prefix = read_pickle_entry(archive, _MAX_PICKLE_NBYTES)
    try:
        state = read_pickle(pickled, _GLOBALS, persistent_storage, dialect=_DIALECT)
    except FormatError as error:
        what = kind_of_pickle(pickled)
        if what:
            raise ConversionError(f"{path} holds {what}", path=path) from error
        raise
    found: dict[str, LocatedTensor] = {}
    noted = values if values is not None else {}, versions if versions is not None else {}
    for key, tensor in _tensors_in(state, *noted):
        if key in found:
            raise FormatError(f"two tensors of the file are both called {key!r:.200}")
        found[key] = located(archive, prefix, tensor)
    _check_storages(found)
    total = sum(math.prod(tensor.sizes) * itemsize(tensor.dtype) for tensor in found.values())
    if total > _MAX_REPEATS * nbytes:
        raise FormatError(f"its tensors come to {total} bytes, {_MAX_REPEATS} times the file: views of one storage")
    return found


def _refuse_other_zip(names: list[str], path: str) -> None:
    what = kind_of_zip(names)
    if what:
        raise ConversionError(f"{path} is {what}", path=path)


class Inert:
    """A value that is neither a tensor nor plain: a set, a numpy scalar, a namespace. It is not constructed."""

    def __init__(self, name: str, parts: list[object]):
        self.name = name
        self.parts = parts

    def extend(self, items: list[object]) -> None:
        self.parts += items

    def __setitem__(self, key: object, value: object) -> None:
        self.parts += [key, value]


def _inert(name: str) -> Global:
    return Global(name, call=lambda *args: Inert(name, list(args)), new=True)


class _OfModule(OrderedDict[object, object]):
    """The result of ``module.state_dict()``, with the versions of the module's parts by name."""

    versions: Mapping[str, int] = MappingProxyType({})


def _of_module(*args: object) -> _OfModule:
    ordered_dict(*args)
    return _OfModule()


def _build(target: object, state: object) -> bool:
    if isinstance(target, Inert):
        target.parts.append(state)
        return True
    if isinstance(target, _OfModule) and type(state) is dict:
        noted = state.get("_metadata")
        target.versions = dict(_versions_in(noted)) if isinstance(noted, dict) else {}
        return True
    return False


def _versions_in(noted: Mapping[object, object]) -> Iterator[tuple[str, int]]:
    for name, entry in noted.items():
        version = entry.get("version") if isinstance(entry, dict) else None
        if isinstance(name, str) and type(version) is int and version.bit_length() < 32:
            yield name, version


_INERT = (
    *("builtins.set", "builtins.frozenset", "builtins.complex", "builtins.bytearray", "builtins.range"),
    *("__builtin__.set", "__builtin__.frozenset", "__builtin__.complex", "__builtin__.bytearray", "__builtin__.xrange"),
    *("collections.Counter", "collections.deque", "argparse.Namespace", "types.SimpleNamespace", "_io.BytesIO"),
    *("datetime.datetime", "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone"),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "pathlib.PosixPath", "pathlib.PurePosixPath"),
    *("pathlib._local.PosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath", "torch.Size", "torch.device"),
    *("numpy.dtype", "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.ndarray"),
    *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
    *(f"{home}.{kind}" for home in ("builtins", "__builtin__") for kind in ("int", "float", "str", "bool", "list")),
    *(f"{home}.{kind}" for home in ("builtins", "__builtin__") for kind in ("dict", "tuple", "long", "unicode")),
)
"""The globals allowed beside the tensors, none of which is constructed."""
_GLOBALS: Mapping[str, Global] = {
    **{name: _inert(name) for name in _INERT},
    "collections.defaultdict": Global("collections.defaultdict", call=lambda *args: {}),
    **PLAIN_GLOBALS,
    **TENSOR_GLOBALS,
    "collections.OrderedDict": Global("collections.OrderedDict", call=_of_module),
}
_DIALECT = Dialect(
    check_key=lambda key: _check_key(key),
    lists=(list, Inert),
    dicts=(dict, OrderedDict, _OfModule, Inert),
    build=_build,
)


def _check_key(key: object) -> None:
    if not isinstance(key, int | float | bytes | bool | None) or (isinstance(key, int) and key.bit_length() > 64):
        raise FormatError(f"a dict key is a {type(key).__name__}, which is not read")


def _check_storages(found: Mapping[str, LocatedTensor]) -> None:
    """Refuse distinct storages that share bytes: torch never writes them, and refuses to read them."""
    storages = sorted({(tensor.data_offset, tensor.data_nbytes): key for key, tensor in found.items()}.items())
    for ((start, nbytes), key), ((next_start, _), next_key) in pairwise(storages):
        if start + nbytes > next_start:
            raise FormatError(f"the storages of {key!r:.200} and {next_key!r:.200} overlap at byte {next_start}")


def inert_values(values: Mapping[str, object]) -> list[str]:
    """Describe the values from ``locate_tensors`` that are not plain, with their kind, for a note."""
    return [f"{path} ({value.name.rpartition('.')[2]})" for path, value in values.items() if isinstance(value, Inert)]


def _tensors_in(state: object, values: dict[str, object], versions: dict[str, int]) -> Iterator[tuple[str, Rebuild]]:
    """Yield the tensors of a nested state dict with their paths, in order; other values go to ``values``."""
    pending: list[tuple[str, object, int]] = [("", state, 0)]
    hidden: set[str] = set()  # paths inside omitted values
    num_nodes = 0
    while pending:
        path, node, depth = pending.pop()
        num_nodes += 1
        # One part may be referenced repeatedly: bound the expansion, not only the pickle.
        if num_nodes + len(pending) > _MAX_NODES or depth > _MAX_DEPTH:
            raise FormatError(f"a state dict of more than {_MAX_NODES} parts or {_MAX_DEPTH} levels is not read")
        if isinstance(node, Rebuild):
            if path in hidden:
                raise FormatError(f"{path!r:.200} is a tensor inside a value of a kind that tensors are not read from")
            yield path, node
            continue
        items: list[tuple[object, object]] = []
        if isinstance(node, dict):
            items = list(node.items())
            if isinstance(node, _OfModule) and len(versions) < _MAX_NODES:
                versions.update({".".join(filter(None, (path, name))): n for name, n in node.versions.items()})
        elif isinstance(node, list | tuple):
            items = list(enumerate(node))
        elif isinstance(node, Inert):
            items = list(enumerate(node.parts))
            if path not in hidden:
                values[path] = node
        is_hidden = isinstance(node, Inert) or path in hidden
        for key, value in reversed(items):
            name = str(key)
            if not isinstance(value, Rebuild | dict | list | tuple | Inert):
                num_nodes += 1
                if not is_hidden:
                    _note_plain(values, f"{path}.{name}" if path else name, value)
                continue
            if len(path) + len(name) >= _MAX_PATH:  # one long key may be referenced repeatedly
                raise FormatError(f"a path in a state dict has more than {_MAX_PATH} characters: {name!r:.200}")
            pending.append((f"{path}.{name}" if path else name, value, depth + 1))
            if is_hidden:
                hidden.add(pending[-1][0])


def _note_plain(values: dict[str, object], path: str, value: object) -> None:
    """Put a plain value into ``values``, up to some thousands, since paths may be long."""
    if len(values) < _MAX_PLAIN and len(path) < _MAX_PATH:
        values[path] = value
    else:
        values["..."] = Inert("more values", [])


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    header_offset: int
    padding: int
    data_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TorchFileLayout:
    """The plan of a new file. ``data_offsets`` has the stored tensors, not their aliases."""

    head: bytes
    entries: Mapping[str, _Entry]
    directory_head: bytes
    nbytes: int

    @property
    def data_offsets(self) -> dict[str, int]:
        """Key -> offset of the tensor's first byte."""
        return {key: entry.data_offset for key, entry in self.entries.items()}

    def frame(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """Return all bytes of the file except the tensors', as (offset, bytes); ``crcs`` are the tensors' CRC-32s."""
        yield 0, self.head
        directory = [self.directory_head]
        for key, entry in self.entries.items():
            local, central = _headers(entry, crcs[key])
            yield entry.header_offset, local
            directory.append(central)
        joined = b"".join(directory)
        start = max((e.data_offset + e.nbytes for e in self.entries.values()), default=len(self.head))
        zip64 = start >= SATURATED or len(self.entries) + _SMALL_COUNT >= 0xFFFF
        yield start, joined + directory_end(len(self.entries) + _SMALL_COUNT, start, len(joined), zip64=zip64)


def plan_torch_file(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], shared: Mapping[str, str] | None = None
) -> TorchFileLayout:
    """Plan a file of ``tensors`` (key -> dtype, shape); ``shared`` are further keys for some of them.

    Raises:
        FormatError: a dtype that torch can't store.
    """
    storages = {key: str(index) for index, key in enumerate(tensors)}
    names = {key: key for key in tensors} | dict(shared or {})
    head, directory_head = small_entries(_state_dict_pickle(tensors, names, storages))
    entries: dict[str, _Entry] = {}
    offset = len(head)
    for key, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * itemsize(dtype)
        name = b"archive/data/" + storages[key].encode()
        unpadded = offset + LOCAL_HEADER.size + len(name) + (20 if nbytes >= SATURATED else 0) + 4
        padding = -unpadded % DATA_ALIGNMENT
        entries[key] = _Entry(name, offset, padding, unpadded + padding, nbytes)
        offset = unpadded + padding + nbytes
    layout = TorchFileLayout(head, entries, directory_head, 0)
    end = max(start + len(data) for start, data in layout.frame(dict.fromkeys(tensors, 0)))
    return TorchFileLayout(head, entries, directory_head, end)


def _state_dict_pickle(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], names: Mapping[str, str], storages: Mapping[str, str]
) -> bytes:
    out = [PROTO_2, b"}("]
    for name, key in names.items():
        dtype, shape = tensors[key]
        out += [str_opcodes(name), tensor_opcodes(dtype, shape, math.prod(shape), storages[key])]
    return b"".join([*out, b"u", STOP])


def _headers(entry: _Entry, crc32: int) -> tuple[bytes, bytes]:
    """Return the local header of an entry, padded up to its data, and its directory entry."""
    wide = entry.nbytes >= SATURATED
    nbytes = SATURATED if wide else entry.nbytes
    sizes = struct.pack("<2Q", entry.nbytes, entry.nbytes) if wide else b""
    extra = struct.pack("<2H", ZIP64_EXTRA_ID, 16) + sizes if wide else b""
    padded = extra + b"FB" + struct.pack("<H", entry.padding) + b"Z" * entry.padding
    fields = (_UTF8, 0, 0, _DOS_DATE, crc32, nbytes, nbytes, len(entry.name))
    version = 45 if wide else 20
    local = LOCAL_HEADER.pack(LOCAL_MAGIC, version, *fields, len(padded)) + entry.name + padded
    offset = entry.header_offset
    if offset >= SATURATED:
        sizes += struct.pack("<Q", offset)
        offset = SATURATED
    extra = struct.pack("<2H", ZIP64_EXTRA_ID, len(sizes)) + sizes if sizes else b""
    central = CENTRAL_HEADER.pack(CENTRAL_MAGIC, 45, 45, *fields, len(extra), 0, 0, 0, 0, offset)
    return local, central + entry.name + extra
