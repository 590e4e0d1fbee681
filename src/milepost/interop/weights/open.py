"""Open the weights at a path: a Hugging Face folder, a DCP checkpoint, a ``.pt`` or a safetensors file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from milepost.config import PARTS
from milepost.errors import CheckpointNotFoundError, ConversionError, FormatError, listed
from milepost.format.box import Box
from milepost.format.digest import BlockDigests
from milepost.format.dtype import itemsize
from milepost.format.huggingface import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_NBYTES,
    SINGLE_NAME,
    TORCH_FILES,
    parse_object,
)
from milepost.format.kinds import refuse_other_kind
from milepost.format.manifest import DIGESTS_NAME, MANIFEST_NAME, METADATA_NAME, Manifest, TensorEntry
from milepost.format.safetensors import read_header
from milepost.format.summary import files_of
from milepost.format.torch_file import inert_values, locate_tensors
from milepost.interop.weights.boxes import Source, Stretch, TensorInfo, TensorStretches
from milepost.run import catalog, checkpoint_record
from milepost.run.branches import History
from milepost.run.hf_folder import HeaderTensors, is_adapter, is_hf_folder, model_in_cache, read_hf_folder
from milepost.run.step_names import find_run
from milepost.storage import join_path, open_storage
from milepost.storage.base import ReadHandle, Storage, join
from milepost.storage.links import open_linked, read_linked
from milepost.storage.open_files import OpenFiles
from milepost.verification.block_reader import BlockReader, shard_reader
from milepost.verification.external import locate_manifest
from milepost.verification.hf_step import CheckedFile, HfStep, read_hf_step

_ONE_OF = re.compile(r"-\d{5}-of-(\d{5})\.(?:safetensors|bin|pt|pth)$")
_SAVE_ANEW = "load it and save its state_dict() as one file"
_OTHER_PARTS = tuple(f"{part}." for part in PARTS if part != "model")
"""Key prefixes of a training checkpoint's parts other than the model."""

_MODEL_ENTRIES = ("model.", "state_dict.", "model_state_dict.", "module.")
_BESIDE_MODEL = re.compile(
    r"(optim(izer)?s?|(optim(izer)?|(lr_)?scheduler|scaler)_(states?|state_dicts?)|(lr_)?schedulers?|(grad_)?scaler"
    r"|(\w+_)?rng(_states?)?|callbacks|loops|dataloader|train_state)(\.|$)"
)
"""Keys of a training's state in torch files, by the entries that trainers use."""


@dataclass(frozen=True, slots=True)
class Weights:
    """An open source of weights, with its folder's information about the model."""

    source: Source
    config: Mapping[str, Any] | None = None
    """``config.json`` of a Hugging Face folder."""
    manifest: Manifest | None = None
    """The manifest of a DCP checkpoint."""
    notes: tuple[str, ...] = ()
    values: Mapping[str, object] = field(default_factory=dict)
    """Other values in a ``.pt`` file by path, from ``locate_tensors``."""
    versions: Mapping[str, int] = field(default_factory=dict)
    """Versions of modules noted in a ``.pt`` file, by path."""
    is_adapter: bool = False
    """True for a folder that holds an adapter, not a model."""


def open_weights(path: str | os.PathLike[str], *, whole: bool = False) -> Weights:
    """Open the weights at ``path`` in any format. The caller closes ``source``.

    With ``whole``, includes the tensors of all parts of a training checkpoint.

    Raises:
        CheckpointNotFoundError: there is nothing, or nothing in a known format.
        CheckpointDamagedError: files are missing, truncated or malformed.
    """
    storage, name = open_storage(path)
    full = join_path(storage.root, name) if name else storage.root
    found = storage.stat(name)
    if found is None:
        raise CheckpointNotFoundError(f"{full} does not exist", path=full)
    if not found.is_folder:
        # For a link into the hub's cache, only the link's name shows the format.
        return _open_file(storage, name, is_safetensors=os.fspath(path).endswith(".safetensors"), whole=whole)
    names = {entry.name for entry in storage.list(name)}
    has_model = INDEX_NAME in names or SINGLE_NAME in names
    # A last save in Hugging Face's format also has our commit record, which holds the format.
    step = read_hf_step(storage, name, names)
    if step is None and (MANIFEST_NAME in names or (METADATA_NAME in names and not has_model)):
        return _open_dcp(storage, name, whole=whole)
    if is_hf_folder(names):
        return _open_hf(storage, name, names, step)
    raise CheckpointNotFoundError(_not_weights(storage, name, full, names), path=full)


def _not_weights(storage: Storage, folder: str, full: str, names: Iterable[str]) -> str:
    """Return the error for a folder that is not a source, with the alternative."""
    run = find_run(storage, folder)
    if run is not None:
        entries = catalog.scan(storage, run, keep_going=True)
        newest = History.of(entries).newest or entries[-1]
        at = join_path(storage.root, newest.path)
        return f"{full} is a run, not a checkpoint: give one of its steps, such as {at}"
    torch_files = sorted(name for name in names if name.endswith((".pt", ".pth", ".bin")))
    if torch_files and _ONE_OF.search(torch_files[0]):
        return f"{full} holds a model split into torch files of unknown names: {_SAVE_ANEW}"
    if torch_files:
        return f"{full} is a folder of torch files: give one of them, such as {full}/{torch_files[0]}"
    in_cache = model_in_cache(storage, folder)
    if in_cache is not None:
        return in_cache
    return f"{full} holds no weights: neither a checkpoint ({MANIFEST_NAME}, {METADATA_NAME}) nor safetensors files"


def refuse_one_of_several(path: str | os.PathLike[str]) -> None:
    """Refuse a file that is one part of a model, by its name. Raises ConversionError."""
    name = os.path.basename(os.fspath(path))
    match = _ONE_OF.search(name)
    if match is not None and int(match[1]) > 1:
        is_known = name.endswith(".safetensors") or TORCH_FILES.shard.fullmatch(name) is not None
        do = "give the folder that holds them all" if is_known else _SAVE_ANEW
        raise ConversionError(f"{path} is one of a model's {int(match[1])} files: {do}")


def _open_file(storage: Storage, name: str, *, is_safetensors: bool, whole: bool) -> Weights:
    handle = open_linked(storage, name, anywhere=True)
    values: dict[str, object] = {}
    versions: dict[str, int] = {}
    with ExitStack() as stack:
        stack.callback(handle.close)
        refuse_other_kind(handle.read, handle.nbytes, handle.path, ".safetensors" if is_safetensors else name)
        stored: Mapping[str, TensorStretches]
        if is_safetensors:
            stored = _SafetensorsFiles(HeaderTensors({name: read_header(handle).tensors}), {name: handle})
        else:
            stored = _torch_file_tensors(handle, values, versions)
        stack.pop_all()
    kind = "hf" if is_safetensors else "pt"
    notes = _skipped(values)
    if not is_safetensors and not whole:
        model = _model_in(stored)
        others = sorted({key.partition(".")[0] for key in stored.keys() - model.keys()})
        notes += (f"left out, as they are not the model's: {', '.join(listed(others))}",) if others else ()
        stored = model
    source = Source(join_path(storage.root, name), kind, [handle], stored)
    return Weights(source, notes=notes, values=values, versions=versions)


def _model_in(stored: Mapping[str, TensorStretches]) -> Mapping[str, TensorStretches]:
    """Return the tensors of the model in a torch file, which may hold a training's optimizer and the like beside it."""
    model = {key: tensor for key, tensor in stored.items() if not _BESIDE_MODEL.match(key)}
    is_entry = model and any(all(key.startswith(entry) for key in model) for entry in _MODEL_ENTRIES)
    return model if is_entry else stored


def _skipped(values: Mapping[str, object]) -> tuple[str, ...]:
    """Return a note on the values of a torch file that are not plain, if there are any."""
    inert = inert_values(values)
    return (f"values that are not tensors were skipped: {', '.join(listed(inert))}",) if inert else ()


# ---- Hugging Face ----


def _open_hf(storage: Storage, folder: str, names: set[str], step: HfStep | None) -> Weights:
    path = join_path(storage.root, folder) if folder else storage.root
    if step is not None:
        names = names & step.manifest.files.keys()  # a store may also hold files of other saves
        step.require({CONFIG_NAME, INDEX_NAME, DIGESTS_NAME})

    def open_file(name: str) -> ReadHandle:
        return step.open_file(name) if step is not None else open_linked(storage, join(folder, name), anywhere=True)

    found = read_hf_folder(storage, folder, names, step.open_file if step is not None else None)
    found.require(path)
    values: dict[str, object] = {}
    versions: dict[str, int] = {}
    with ExitStack() as stack:
        handles = {name: stack.enter_context(open_file(name)) for name in found.files}
        stored: Mapping[str, TensorStretches]
        if found.kind is TORCH_FILES:
            located = [_torch_file_tensors(handle, values, versions) for handle in handles.values()]
            stored = {key: tensor for one in located for key, tensor in one.items()}
        else:
            stored = _SafetensorsFiles(found.tensors, handles)
        config = read_config(path)
        stack.pop_all()
    return Weights(
        Source(path, "hf", tuple(handles.values()), stored),
        config=config,
        notes=(*found.notes, *_skipped(values)),
        values=values,
        versions=versions,
        is_adapter=is_adapter(names),
    )


def open_all(path: str | os.PathLike[str]) -> Source:
    """Open all tensors of a step (not only the model's), a Hugging Face folder, a ``.pt`` or safetensors file.

    Raises like :func:`open_weights`.
    """
    storage, name = open_storage(path)
    found = storage.stat(name)
    info = catalog.examine(storage, name) if found is not None and found.is_folder else None
    if info is not None and info.is_usable:
        return open_step(storage, name, checkpoint_record.read_manifest(storage, name))
    return open_weights(path, whole=True).source


def open_step(storage: Storage, folder: str, manifest: Manifest) -> Source:
    """Open all tensors of a committed step (of all parts), in any form of a save."""
    if not manifest.tensors:
        return open_weights(join_path(storage.root, folder)).source
    digests = checkpoint_record.read_digests(storage, folder, manifest)
    if any(shard.data_offset is None for entry in manifest.tensors.values() for shard in entry.shards):
        manifest = locate_manifest(storage, folder, manifest)
    return manifest_source(storage, folder, manifest, digests)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the ``config.json`` of a Hugging Face folder; None if there is none. Raises FormatError."""
    storage, inside = open_storage(folder)
    name = join(inside, CONFIG_NAME)
    if storage.stat(name) is None:
        return None
    return parse_object(read_linked(storage, name, MAX_CONFIG_NBYTES), join_path(storage.root, name))


class _SafetensorsFiles(Mapping[str, TensorStretches]):
    """Tensors of open files; readers are created on access, because a header may describe a million."""

    def __init__(self, entries: Mapping[str, TensorEntry], handles: Mapping[str, ReadHandle]):
        self._entries = entries
        self._handles = handles

    def __getitem__(self, key: str) -> TensorStretches:
        entry = self._entries[key]
        (shard,) = entry.shards
        handle = self._handles[shard.file]
        if isinstance(handle, CheckedFile):
            stretch = Stretch(shard.box, handle.reader, shard.record_offset)
        else:
            stretch = Stretch(shard.box, BlockReader(handle, key, shard.record_offset, shard.data_nbytes, None))
        return TensorStretches(TensorInfo(entry.dtype, entry.shape), (stretch,))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


# ---- DCP ----


def _open_dcp(storage: Storage, folder: str, *, whole: bool) -> Weights:
    manifest = checkpoint_record.read_manifest(storage, folder)
    model = {key: entry for key, entry in manifest.tensors.items() if whole or not key.startswith(_OTHER_PARTS)}
    digests = checkpoint_record.read_digests(storage, folder, manifest)
    if digests is None:
        model = dict(locate_manifest(storage, folder, replace(manifest, tensors=model)).tensors)
    source = manifest_source(storage, folder, replace(manifest, tensors=model), digests)
    return Weights(source, manifest=manifest)


def manifest_source(storage: Storage, folder: str, manifest: Manifest, digests: BlockDigests | None) -> Source:
    """Open the tensors of a manifest from the files in ``folder``."""
    stored = {}
    with ExitStack() as stack:
        files = stack.enter_context(OpenFiles(storage))
        names = sorted({name for entry in manifest.tensors.values() for name in files_of(entry)})
        handles = {name: files.open(join(folder, name)) for name in names}
        for key, entry in manifest.tensors.items():
            strided = next((shard.file for shard in entry.shards if shard.data_offset is None), None)
            if strided is not None:
                raise ConversionError(
                    f"'{key}' is stored strided in {strided}: load the checkpoint with torch and save it again",
                    path=f"{storage.root}/{folder}",
                )
            stretches = (
                Stretch(shard.box, shard_reader(handles[shard.file], key, entry.dtype, shard, number, digests))
                for number, shard in enumerate(entry.shards)
            )
            stored[key] = TensorStretches(TensorInfo(entry.dtype, entry.shape), tuple(stretches))
        stack.pop_all()
    return Source(f"{storage.root}/{folder}", "dcp", [files], stored)


# ---- .pt ----


def _torch_file_tensors(
    handle: ReadHandle, values: dict[str, object], versions: dict[str, int]
) -> dict[str, TensorStretches]:
    try:
        found = locate_tensors(handle.read, handle.nbytes, handle.path, values=values, versions=versions)
    except FormatError as error:
        raise FormatError(f"{handle.path}: {error.message}", path=handle.path) from error
    # A storage is read and checked against its CRC once, regardless of the number of tensors that are views of it.
    storages: dict[int, BlockReader] = {}
    stored = {}
    for key, tensor in found.items():
        if tensor.axes is None:
            raise ConversionError(
                f"{handle.path}: '{key}' is stored with strides {list(tensor.strides)}: save it again after "
                ".contiguous()",
                path=handle.path,
            )
        reader = storages.get(tensor.data_offset)
        if reader is None:
            reader = BlockReader(handle, key, tensor.data_offset, tensor.data_nbytes, tensor.crc32)
            storages[tensor.data_offset] = reader
        start = tensor.storage_offset * itemsize(tensor.dtype)
        stretch = Stretch(Box.whole(tensor.sizes), reader, start, () if tensor.is_row_major else tensor.axes)
        stored[key] = TensorStretches(TensorInfo(tensor.dtype, tensor.sizes), (stretch,))
    return stored
