"""Describe a Hugging Face folder as a manifest of the tensors in its files, without reading their data.

The files are safetensors or, in older folders, those of ``torch.save``. A step whose model was saved in this form is
described likewise: its own manifest names files, not tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from milepost.errors import FormatError, MilepostError, Problem, StorageError, listed
from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.huggingface import (
    ADAPTER_CONFIG_NAME,
    INDEX_NAME,
    MAX_INDEX_NBYTES,
    SAFETENSORS,
    TORCH_FILES,
    WeightFiles,
    WeightIndex,
    parse_index,
    weight_files,
)
from milepost.format.kinds import refuse_other_kind
from milepost.format.manifest import HF_FORMAT, FileEntry, Manifest, ShardEntry, TensorEntry
from milepost.format.safetensors import StoredTensor, read_header
from milepost.format.tags import untagged
from milepost.format.torch_file import locate_tensors
from milepost.storage import join_path
from milepost.storage.base import ReadHandle, Storage, join, split
from milepost.storage.links import open_linked, read_linked

OpenFile = Callable[[str], ReadHandle]
"""Opens a file of a folder, by its name."""


@dataclass(frozen=True, slots=True)
class HfFolder:
    """Content of the headers of a folder's files of weights, and problems in them."""

    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]
    problems: tuple[Problem, ...]
    """Files that are missing or malformed, and keys that are not where the index says."""
    notes: tuple[str, ...] = ()
    """Notes for the user on the files that were read."""
    kind: WeightFiles = SAFETENSORS
    data_nbytes: int = 0
    """Bytes of all tensors."""

    def require(self, path: str) -> None:
        """Raise FormatError with all problems of the folder at ``path``, if there are any."""
        if self.problems:
            lines = "\n  ".join(listed(self.problems))
            raise FormatError(f"{path} is damaged:\n  {lines}", path=f"{path}/{self.problems[0].file}")


def is_hf_folder(names: Collection[str]) -> bool:
    """True if a folder with files of these names holds weights, or an adapter, for Hugging Face's programs."""
    return holds_safetensors(names) or weight_files(names) is TORCH_FILES


def holds_safetensors(names: Collection[str]) -> bool:
    """True if a folder with files of these names holds safetensors, the form in which Milepost saves steps."""
    return any(name.endswith(".safetensors") for name in names) or INDEX_NAME in names


def is_adapter(names: Collection[str]) -> bool:
    """True if the folder holds an adapter (LoRA and the like) of PEFT, not a whole model."""
    kind = weight_files(names)
    return ADAPTER_CONFIG_NAME in names or (kind.adapter in names and kind.single not in names)


def model_in_cache(storage: Storage, folder: str) -> str | None:
    """Return an error for a model's folder in the hub's cache, whose files are in a folder below; None for others."""
    below = join(folder, "snapshots")
    found = storage.stat(below)
    if found is None or not found.is_folder:
        return None
    revisions = [entry.name for entry in storage.list(below) if entry.is_folder]
    path = join_path(storage.root, folder)
    revision = revisions[0] if len(revisions) == 1 else "<revision>"
    return f"{path} is a model in the Hugging Face cache: give its folder {path}/snapshots/{revision}"


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
        ConversionError: a file is of another known kind.
    """
    kind = weight_files(names)
    problems: list[Problem] = []
    index: WeightIndex | None = None
    notes: list[str] = []
    index_name = plain_or_tagged(kind.index, names)
    if index_name is not None:
        where = join(folder, index_name)
        try:
            index = parse_index(read_linked(storage, where, MAX_INDEX_NBYTES), where, kind)
        except MilepostError as error:
            problems.append(Problem(error.message.removeprefix(f"{where}: "), index_name))
    if index is not None and kind.single in names and kind.single not in index.weight_map.values():
        index = None
        notes.append(f"there are {kind.single} and an index of other files: the former was read, as transformers does")
    wanted = sorted(set(index.weight_map.values())) if index is not None else kind.unindexed(names)
    missing = [name for name in wanted if name not in names]
    if index is not None:
        problems += _left_out(kind, wanted, names)
    problems += [Problem(f"missing: one of {len(wanted)} files; download it again", name) for name in missing]
    found = read_headers(storage, folder, [name for name in wanted if name in names], open_file)
    problems += found.problems
    if index is not None and not problems:
        problems += _misplaced(index.weight_map, found.tensors, kind.index)
        notes += _index_notes(index, found, kind, names)
    return replace(found, problems=tuple(problems), notes=(*notes, *found.notes), kind=kind)


def _left_out(kind: WeightFiles, wanted: Sequence[str], names: Collection[str]) -> Iterator[Problem]:
    """Yield the files of a split model that its index leaves out, by their number and count."""
    numbered = kind.numbered(names)
    counts = {kind.numbered([name]).get(name) for name in wanted} - {None}
    for name, count in numbered.items():
        if count in counts and name not in wanted:
            yield Problem(f"not named by {kind.index}, although it is one of its {count} files", name)


def _index_notes(index: WeightIndex, found: HfFolder, kind: WeightFiles, names: Collection[str]) -> Iterator[str]:
    """Yield what an index says wrongly although each tensor is where it says."""
    others = [name for name in kind.numbered(names) if name not in found.files]
    if others:
        yield f"{kind.index} does not name {', '.join(listed(others))}: not read"
    if index.total_nbytes is None:
        return
    sizes = {found.data_nbytes}
    if kind is TORCH_FILES:  # tensors that share a storage are counted once or several times
        shards = [entry.shards[0] for entry in found.tensors.values()]
        sizes.add(sum({(one.file, one.record_offset): one.data_nbytes for one in shards}.values()))
    if index.total_nbytes not in sizes:
        yield (
            f"{kind.index} gives a total_size of {index.total_nbytes:,} bytes, its tensors have "
            f"{found.data_nbytes:,}: ignored"
        )


def plain_or_tagged(name: str, names: Collection[str]) -> str | None:
    """Find the file ``name`` among ``names``, which may carry a save id; None if it is missing."""
    return name if name in names else next((found for found in sorted(names) if untagged(found) == name), None)


def read_headers(storage: Storage, folder: str, names: Sequence[str], open_file: OpenFile | None = None) -> HfFolder:
    """Read the headers of the files of weights ``names`` of a folder; see :func:`read_hf_folder`."""

    problems: list[Problem] = []
    headers: dict[str, Mapping[str, StoredTensor]] = {}
    located: dict[str, Mapping[str, TensorEntry]] = {}
    files: dict[str, FileEntry] = {}
    for name in names:
        try:
            with open_file(name) if open_file is not None else _open(storage, folder, name) as handle:
                if _is_torch(name):
                    located[name] = torch_entries(handle, name)
                else:
                    headers[name] = read_header(handle).tensors
                files[name] = FileEntry(handle.nbytes)
        except (FormatError, StorageError) as error:
            problems.append(Problem(error.message, name))
    if located:
        found: Mapping[str, TensorEntry] = {key: one for entries in located.values() for key, one in entries.items()}
        nbytes = sum(entry.shards[0].data_nbytes for entries in located.values() for entry in entries.values())
        problems += _stored_twice(located)
    else:
        found = HeaderTensors(headers)
        nbytes = sum(stored.nbytes for header in headers.values() for stored in header.values())
        problems += _stored_twice(headers) if len(found) < sum(map(len, headers.values())) else []
    return HfFolder(found, files, tuple(problems), data_nbytes=nbytes)


def _open(storage: Storage, folder: str, name: str) -> ReadHandle:
    handle = open_linked(storage, join(folder, name), anywhere=True)
    try:
        refuse_other_kind(handle.read, handle.nbytes, handle.path, name if _is_torch(name) else ".safetensors")
    except BaseException:
        handle.close()
        raise
    return handle


def _is_torch(name: str) -> bool:
    return name.endswith(TORCH_FILES.suffix)


def torch_entries(handle: ReadHandle, name: str) -> dict[str, TensorEntry]:
    """Describe the tensors of an open ``torch.save`` file called ``name``.

    Raises:
        FormatError: it is malformed, or holds more than plain data and tensors.
    """
    try:
        located = locate_tensors(handle.read, handle.nbytes, handle.path)
    except FormatError as error:
        raise FormatError(f"{handle.path}: {error.message}", path=handle.path) from error
    entries = {}
    for key, stored in located.items():
        box = Box.whole(stored.sizes)
        nbytes = box.numel * itemsize(stored.dtype)
        start = stored.data_offset + stored.storage_offset * itemsize(stored.dtype)
        place = ShardEntry(box, name, start, nbytes, start, nbytes, stored.crc32 if stored.is_plain else None)
        entries[key] = TensorEntry(stored.dtype, stored.sizes, (place,))
    return entries


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


def _stored_twice(headers: Mapping[str, Mapping[str, object]]) -> list[Problem]:
    """Keys that an earlier file holds too."""
    seen: set[str] = set()
    problems = []
    for name, header in headers.items():
        problems += [Problem("stored in another file too", name, key) for key in header if key in seen]
        seen |= header.keys()
    return problems


def _misplaced(weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry], index: str) -> list[Problem]:
    """Keys that are not in the file that the index says."""
    found = {key: entry.shards[0].file for key, entry in tensors.items()}
    if found == weight_map:
        return []
    problems = []
    for key in sorted({*weight_map, *found}):
        said, file = weight_map.get(key), found.get(key)
        if file is None:
            problems.append(Problem("in the index, but in none of its files", index, key))
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
    with open_linked(storage, path, anywhere=True) as handle:
        refuse_other_kind(handle.read, handle.nbytes, handle.path, name)
        return _manifest("model", HfFolder(torch_entries(handle, name), {name: FileEntry(handle.nbytes)}, ()), 0.0)


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
