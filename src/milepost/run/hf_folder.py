"""Describe a Hugging Face folder as a manifest of the tensors in its files, from their headers only.

A step whose model was saved in this form is described likewise: its own manifest names files, not tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from milepost.errors import FormatError, MilepostError, Problem, StorageError, listed
from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.huggingface import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    INDEX_NAME,
    MAX_INDEX_NBYTES,
    SINGLE_NAME,
    parse_weight_map,
    unindexed_files,
)
from milepost.format.kinds import refuse_other_kind
from milepost.format.manifest import HF_FORMAT, FileEntry, Manifest, ShardEntry, TensorEntry
from milepost.format.safetensors import StoredTensor, read_header
from milepost.format.tags import untagged
from milepost.format.torch_file import locate_tensors
from milepost.storage.base import ReadHandle, Storage, join, split
from milepost.storage.links import open_linked, read_linked

OpenFile = Callable[[str], ReadHandle]
"""Opens a file of a folder, by its name."""


@dataclass(frozen=True, slots=True)
class HfFolder:
    """Content of the headers of a folder's safetensors files, and problems in them."""

    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]
    problems: tuple[Problem, ...]
    """Files that are missing or malformed, and keys that are not where the index says."""
    note: str = ""
    """Notes for the user on the files that were read."""

    def require(self, path: str) -> None:
        """Raise FormatError with all problems of the folder at ``path``, if there are any."""
        if self.problems:
            lines = "\n  ".join(listed(self.problems))
            raise FormatError(f"{path} is damaged:\n  {lines}", path=f"{path}/{self.problems[0].file}")


def is_hf_folder(names: Collection[str]) -> bool:
    """True if a folder with files of these names holds weights, or an adapter, for Hugging Face's programs."""
    return any(name.endswith(".safetensors") for name in names) or INDEX_NAME in names


def is_adapter(names: Collection[str]) -> bool:
    """True if the folder holds an adapter (LoRA and the like) of PEFT, not a whole model."""
    return ADAPTER_CONFIG_NAME in names or (ADAPTER_NAME in names and SINGLE_NAME not in names)


def is_hf_step(manifest: Manifest) -> bool:
    """True if a step's own manifest says that its model was saved as Hugging Face files."""
    return manifest.extra.get("format") == HF_FORMAT


def read_hf_folder(
    storage: Storage, folder: str, names: Collection[str], open_file: OpenFile | None = None
) -> HfFolder:
    """Read the headers of the weights among the files ``names`` of a folder. Faults are listed, not raised.

    ``open_file`` opens those files; by default also through links, unchecked.

    Raises:
        StorageError: the storage can't be read at all.
    """
    problems: list[Problem] = []
    weight_map: Mapping[str, str] | None = None
    note = ""
    index = plain_or_tagged(INDEX_NAME, names)
    if index is not None:
        where = join(folder, index)
        try:
            weight_map = parse_weight_map(read_linked(storage, where, MAX_INDEX_NBYTES), where)
        except MilepostError as error:
            problems.append(Problem(error.message.removeprefix(f"{where}: "), index))
    if weight_map is not None and SINGLE_NAME in names and SINGLE_NAME not in weight_map.values():
        weight_map, note = (
            None,
            f"there are {SINGLE_NAME} and an index of other files: the former was read, as transformers does",
        )
    wanted = sorted(set(weight_map.values())) if weight_map is not None else unindexed_files(names)
    missing = [name for name in wanted if name not in names]
    problems += [Problem(f"missing: one of {len(wanted)} files; download it again", name) for name in missing]
    found = read_headers(storage, folder, [name for name in wanted if name in names], open_file)
    problems += found.problems
    if weight_map is not None and not problems:
        problems += _misplaced(weight_map, found.tensors)
    return replace(found, problems=tuple(problems), note=note)


def plain_or_tagged(name: str, names: Collection[str]) -> str | None:
    """Find the file ``name`` among ``names``, which may carry a save id; None if it is missing."""
    return name if name in names else next((found for found in sorted(names) if untagged(found) == name), None)


def read_headers(storage: Storage, folder: str, names: Sequence[str], open_file: OpenFile | None = None) -> HfFolder:
    """Read the headers of the safetensors files ``names`` of a folder; see :func:`read_hf_folder`."""

    def open_by_default(name: str) -> ReadHandle:
        handle = open_linked(storage, join(folder, name), anywhere=True)
        try:
            refuse_other_kind(handle.read, handle.nbytes, handle.path, ".safetensors")
        except BaseException:
            handle.close()
            raise
        return handle

    problems: list[Problem] = []
    headers: dict[str, Mapping[str, StoredTensor]] = {}
    files: dict[str, FileEntry] = {}
    for name in names:
        try:
            with (open_file or open_by_default)(name) as handle:
                header = read_header(handle)
        except (FormatError, StorageError) as error:
            problems.append(Problem(error.message, name))
            continue
        files[name] = FileEntry(header.nbytes)
        headers[name] = header.tensors
    tensors = HeaderTensors(headers)
    if len(tensors) < sum(map(len, headers.values())):
        problems += _stored_twice(headers)
    return HfFolder(tensors, files, tuple(problems))


class HeaderTensors(Mapping[str, TensorEntry]):
    """The tensors of safetensors files by key, each described only on access: a header may list a million."""

    def __init__(self, headers: Mapping[str, Mapping[str, StoredTensor]]):
        self._headers = headers
        self._file_of = {key: name for name, header in headers.items() for key in header}

    def __getitem__(self, key: str) -> TensorEntry:
        name = self._file_of[key]
        stored = self._headers[name][key]
        place = ShardEntry(
            box=Box.whole(stored.shape),
            file=name,
            record_offset=stored.offset,
            record_nbytes=stored.nbytes,
            data_offset=stored.offset,
            data_nbytes=stored.nbytes,
            crc32=None,
        )
        return TensorEntry(stored.dtype, stored.shape, (place,))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _stored_twice(headers: Mapping[str, Mapping[str, StoredTensor]]) -> list[Problem]:
    """Keys that an earlier file holds too."""
    seen: set[str] = set()
    problems = []
    for name, header in headers.items():
        problems += [Problem("stored in another file too", name, key) for key in header if key in seen]
        seen |= header.keys()
    return problems


def _misplaced(weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> list[Problem]:
    """Keys that are not in the file that the index says."""
    found = {key: entry.shards[0].file for key, entry in tensors.items()}
    if found == weight_map:
        return []
    problems = []
    for key in sorted({*weight_map, *found}):
        said, file = weight_map.get(key), found.get(key)
        if file is None:
            problems.append(Problem("in the index, but not in any file", INDEX_NAME, key))
        elif said != file:
            problems.append(Problem(f"the index says {said or 'nothing of it'}", file, key))
    return problems


def described(storage: Storage, folder: str, manifest: Manifest) -> Manifest:
    """The manifest of a step with the tensors of its Hugging Face files, if it was saved as such; others unchanged.

    Raises:
        FormatError: files are missing or malformed.
    """
    if not is_hf_step(manifest):
        return manifest
    found = read_hf_folder(storage, folder, manifest.files.keys())
    found.require(f"{storage.root}/{folder}")
    return replace(manifest, tensors=found.tensors)


def manifest_of_file(storage: Storage, path: str) -> Manifest:
    """A manifest of a single safetensors or ``torch.save`` file.

    Raises:
        FormatError: it is malformed, or holds more than plain data and tensors.
    """
    folder, name = split(path)
    if name.endswith(".safetensors"):
        found = read_headers(storage, folder, [name])
        if found.problems:  # these errors name the file
            problems = "\n".join(listed([problem.message for problem in found.problems]))
            raise FormatError(problems, path=f"{storage.root}/{path}")
        return _manifest("model", found, 0.0)
    tensors = {}
    with open_linked(storage, path, anywhere=True) as handle:
        refuse_other_kind(handle.read, handle.nbytes, handle.path, name)

        def read_at(offset: int, nbytes: int) -> bytes:
            data = bytearray(nbytes)
            handle.read_into(offset, [memoryview(data)])
            return bytes(data)

        try:
            located = locate_tensors(read_at, handle.nbytes, handle.path)
        except FormatError as error:
            raise FormatError(f"{handle.path}: {error.message}", path=handle.path) from error
        for key, stored in located.items():
            box = Box.whole(stored.sizes)
            nbytes = box.numel * itemsize(stored.dtype)
            start = stored.data_offset + stored.storage_offset * itemsize(stored.dtype)
            place = ShardEntry(box, name, start, nbytes, start, nbytes, stored.crc32 if stored.is_plain else None)
            tensors[key] = TensorEntry(stored.dtype, stored.sizes, (place,))
        return _manifest("model", HfFolder(tensors, {name: FileEntry(handle.nbytes)}, ()), 0.0)


def manifest_of(storage: Storage, folder: str) -> Manifest:
    """A manifest of the Hugging Face folder ``folder``, which has none.

    Raises:
        FormatError: files are missing or malformed.
    """
    entries = {entry.name: entry for entry in storage.list(folder) if not entry.is_folder}
    found = read_hf_folder(storage, folder, entries.keys())
    found.require(f"{storage.root}/{folder}")
    kind = "adapter" if is_adapter(entries.keys()) else "model"
    return _manifest(kind, found, max((entries[name].mtime_s for name in found.files), default=0.0))


def _manifest(kind: str, found: HfFolder, created_s: float) -> Manifest:
    return Manifest(
        step=None,
        save_id="",
        created_s=created_s,
        kind=kind,
        world_size=1,
        layout={},
        producer={},
        tensors=found.tensors,
        objects={},
        files=found.files,
    )
