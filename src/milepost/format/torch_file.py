"""A ``torch.save`` file of many tensors (``.pt``, ``.pth``), located and laid out without torch.

A file written here is what ``torch.save({key: tensor, ...})`` writes: ``torch.load(weights_only=True, mmap=True)``
reads it. Tensors that are one tensor (tied weights) share one storage. The zip structures are those of ``record``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from milepost.errors import FormatError
from milepost.format.dtype import itemsize
from milepost.format.pickle_reader import read_pickle
from milepost.format.plain_pickle import PLAIN_GLOBALS, PROTO_2, STOP, str_opcodes
from milepost.format.record import (
    DATA_ALIGNMENT,
    TENSOR_GLOBALS,
    LocatedTensor,
    Rebuild,
    directory_end,
    located,
    persistent_storage,
    read_pickle_entry,
    small_entries,
    tensor_opcodes,
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
_SMALL_COUNT = 3  # entries that `small_entries` makes
_UTF8 = 0x0800
_DOS_DATE = 0x0021  # 1980-01-01: files must not depend on the time


def locate_tensors(read_at: Callable[[int, int], bytes], nbytes: int) -> dict[str, LocatedTensor]:
    """Every tensor of a file of ``nbytes``, by its path in the nested state dict, joined by dots.

    ``read_at(offset, nbytes)`` gives bytes of the file. Values that are not tensors are left out. Nothing in the file
    is executed.

    Raises:
        FormatError: the file is no ``torch.save`` zip file, is damaged, or holds anything but plain data and tensors.
    """
    archive = ZipDirectory(read_at, nbytes, max_entries=MAX_ENTRIES)
    pickled, prefix = read_pickle_entry(archive, _MAX_PICKLE_NBYTES)
    state = read_pickle(pickled, {**PLAIN_GLOBALS, **TENSOR_GLOBALS}, persistent_storage)
    found: dict[str, LocatedTensor] = {}
    for key, tensor in _tensors_in(state):
        if key in found:
            raise FormatError(f"two tensors of the file are both called {key!r:.200}")
        found[key] = located(archive, prefix, tensor)
    _check_storages(found)
    return found


def _check_storages(found: Mapping[str, LocatedTensor]) -> None:
    """Refuse storages that share bytes without being one: torch writes none, and refuses to read them."""
    storages = sorted({(tensor.data_offset, tensor.data_nbytes): key for key, tensor in found.items()}.items())
    for ((start, nbytes), key), ((next_start, _), next_key) in pairwise(storages):
        if start + nbytes > next_start:
            raise FormatError(f"the storages of {key!r:.200} and {next_key!r:.200} overlap at byte {next_start}")


def _tensors_in(state: object) -> Iterator[tuple[str, Rebuild]]:
    """The tensors of a nested state dict with their paths, in its order."""
    pending: list[tuple[str, object, int]] = [("", state, 0)]
    num_nodes = 0
    while pending:
        path, node, depth = pending.pop()
        num_nodes += 1
        # One part may be named again and again: what it unfolds to is bounded, not only the pickle.
        if num_nodes + len(pending) > _MAX_NODES or depth > _MAX_DEPTH:
            raise FormatError(f"a state dict of more than {_MAX_NODES} parts or {_MAX_DEPTH} levels is not read")
        if isinstance(node, Rebuild):
            yield path, node
            continue
        items: list[tuple[object, object]] = []
        if isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, list | tuple):
            items = list(enumerate(node))
        for key, value in reversed(items):
            if not isinstance(value, Rebuild | dict | list | tuple):
                num_nodes += 1
                continue
            name = str(key)
            if len(path) + len(name) >= _MAX_PATH:  # one long key may be named again and again
                raise FormatError(f"a path in a state dict has more than {_MAX_PATH} characters: {name!r:.200}")
            pending.append((f"{path}.{name}" if path else name, value, depth + 1))


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    header_offset: int
    padding: int
    data_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TorchFileLayout:
    """Where everything of a new file goes. ``data_offsets`` has the stored tensors, not their other names."""

    head: bytes
    entries: Mapping[str, _Entry]
    directory_head: bytes
    nbytes: int

    @property
    def data_offsets(self) -> dict[str, int]:
        """Key: offset of the tensor's first byte."""
        return {key: entry.data_offset for key, entry in self.entries.items()}

    def frame(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """All bytes of the file but the tensors' own, as (offset, bytes); ``crcs`` are the tensors' CRC-32s."""
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
    """The layout of a file of ``tensors`` (key: dtype, shape); ``shared`` are further keys for tensors among them.

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
    """The local header of an entry, padded up to its data, and its line of the directory."""
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
