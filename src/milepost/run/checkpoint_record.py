"""The commit record, which makes a folder a checkpoint, and the check of its files against it.

It is ``milepost.json``, or ``.metadata`` for a checkpoint of another program. Only metadata is read.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    FormatError,
    Problem,
    StorageError,
    listed,
)
from milepost.format import dcp_metadata
from milepost.format.digest import BlockDigests, crc32, parse_digests
from milepost.format.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    MAX_SHARDS_NBYTES,
    METADATA_NAME,
    PART_NAME,
    SHARDS_NAME,
    FileEntry,
    Manifest,
)
from milepost.format.manifest_json import MAX_MANIFEST_NBYTES, Head, from_json, parse_head
from milepost.format.tags import tag_of, tagged
from milepost.run.node_part import part_of_manifest
from milepost.run.step_names import find_run, step_name, step_of, steps_in
from milepost.storage import join_path
from milepost.storage.base import Entry, Storage, join, split

UNFIT = {errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.EFBIG}
"""Errors that are about the file: gone, a link, not a regular file, too large. All others are about the storage."""


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """Makes a folder a checkpoint. ``name`` is ``milepost.json``, or ``.metadata`` for an external checkpoint."""

    name: str
    record_id: str
    manifest: Manifest
    files: Mapping[str, Entry]
    """The entries in the folder."""
    faults: tuple[Problem, ...]
    """Files that differ from the record."""
    note: str = ""
    """Notes on oddities that are not faults."""

    @property
    def read(self) -> tuple[str, ...]:
        """The files that were read and checked for it."""
        shards = self.manifest.file_named(SHARDS_NAME)
        return (self.name,) if shards is None else (self.name, shards)

    @property
    def is_own(self) -> bool:
        """True if Milepost wrote it, so that there are digests."""
        return self.name == MANIFEST_NAME

    def require_undamaged(self, storage: Storage, path: str) -> None:
        """Raise CheckpointDamagedError for the checkpoint at ``path``, with all faults, if it has any."""
        if self.faults:
            faults = "; ".join(listed(self.faults))
            raise CheckpointDamagedError(f"{storage.root}/{path} is damaged: {faults}", path=path)


def is_checkpoint(storage: Storage, path: str) -> bool:
    """Return whether the folder at ``path`` is itself a checkpoint, in any state."""
    return any(storage.stat(join(path, name)) is not None for name in (MANIFEST_NAME, METADATA_NAME))


def read_record(storage: Storage, path: str) -> CommitRecord:
    """Read the commit record of the checkpoint at ``path``, and compare the existing files with it.

    Raises:
        CheckpointNotFoundError: there is no commit record.
        FormatError: it is malformed or not a regular file, or external and lists files that are missing or too short.
    """
    files = files_in(storage, path)
    name = record_name(files)
    if name is None:
        raise _no_checkpoint(storage, path)
    return _read_record(storage, path, files, name)


def read_part(storage: Storage, path: str) -> CommitRecord:
    """Read the record of one node's part of a step, see :func:`read_record`."""
    files = files_in(storage, path)
    if PART_NAME not in files:
        raise _no_checkpoint(storage, path)
    record = _read_record(storage, path, files, PART_NAME)
    part_of_manifest(record.manifest.extra, join(path, PART_NAME))
    return record


def _read_record(storage: Storage, path: str, files: Mapping[str, Entry], name: str) -> CommitRecord:
    try:
        data = storage.read(join(path, name), MAX_MANIFEST_NBYTES)
    except StorageError as error:
        if error.errno not in UNFIT - {errno.ENOENT}:
            raise
        raise FormatError(error.message, path=join(path, name)) from error

    def read_shards(name: str, entry: FileEntry) -> bytes:
        where = join(path, name)
        faults = _file_faults({name: entry.nbytes}, files)
        if faults:
            raise FormatError(f"{where}: {faults[0].message}", path=where)
        return storage.read(where, MAX_SHARDS_NBYTES)

    manifest, faults = parse_record(data, name, path, files, read_shards)
    other = saved_over(storage, path, files, manifest, faults)
    if other is not None:
        data, manifest, note = other
        return CommitRecord(METADATA_NAME, id_of_record(data), manifest, files, (), note)
    return CommitRecord(name, id_of_record(data), manifest, files, tuple(faults))


def _no_checkpoint(storage: Storage, path: str) -> CheckpointNotFoundError:
    """Return the error for a place without a commit record; for a run's folder it names the steps."""
    where = join_path(storage.root, path)
    found = storage.stat(path)
    if found is None:
        return CheckpointNotFoundError(f"{where} holds no checkpoint: there is no such folder", path=path)
    if not found.is_folder and storage.can_rename:
        return CheckpointNotFoundError(f"{where} is a file, not the folder of a checkpoint", path=path)
    run = find_run(storage, path)
    if run is not None:
        steps = sorted(steps_in({entry.name: entry for entry in storage.list(run)}))
        shown = ", ".join(listed(steps[::-1], 5))
        return CheckpointNotFoundError(
            f"{where} is the folder of a run, not a checkpoint: give the path of one of its steps, such as "
            f"{join(storage.root, run)}/{step_name(steps[-1])} (it has steps {shown})",
            path=path,
            available=steps,
        )
    if storage.stat(join(path, PART_NAME)) is not None:
        return CheckpointNotFoundError(
            f"{where} holds one node's part of a step, not a complete checkpoint: that is in the run's "
            "checkpoint.remote_folder",
            path=path,
        )
    hint = ""
    if any(entry.name.endswith(".safetensors") for entry in storage.list(path)):
        hint = "; it holds safetensors: to start a run from them, set checkpoint.initial_load_in_hf"
    return CheckpointNotFoundError(
        f"{where} holds no checkpoint: neither {MANIFEST_NAME} nor {METADATA_NAME} is there{hint}", path=path
    )


def read_manifest(storage: Storage, path: str) -> Manifest:
    """Read the manifest of the checkpoint at ``path``; for an external one it is built from ``.metadata``.

    Raises:
        CheckpointNotFoundError: there is no commit record.
        CheckpointDamagedError: it is malformed, or files that it names are missing or have other sizes.
    """
    try:
        record = read_record(storage, path)
        if not record.faults:
            return record.manifest
    except FormatError:
        pass  # see `examine`: look once more, then raise
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise  # otherwise it was just deleted or replaced
    record = read_record(storage, path)
    record.require_undamaged(storage, path)
    return record.manifest


def read_digests(storage: Storage, folder: str, manifest: Manifest) -> BlockDigests | None:
    """The block digests of the checkpoint in ``folder``; None for an external one, which has none.

    Raises:
        FormatError: they are damaged, or of another save.
    """
    data = read_digests_file(storage, folder, manifest)
    name = join(folder, manifest.file_named(DIGESTS_NAME) or "")
    return None if data is None else parse_digests(data, manifest, name)


def read_own_digests(storage: Storage, folder: str, manifest: Manifest) -> BlockDigests:
    """The block digests of a checkpoint that Milepost wrote. Raises CheckpointDamagedError if there are none."""
    digests = read_digests(storage, folder, manifest)
    if digests is None:
        what = f"{storage.root}/{folder} is damaged: {DIGESTS_NAME} is not in its manifest"
        raise CheckpointDamagedError(what, path=folder)
    return digests


def read_digests_file(storage: Storage, folder: str, manifest: Manifest) -> bytes | None:
    """The unparsed bytes of the file of digests; None for an external checkpoint, which has none."""
    file = manifest.file_named(DIGESTS_NAME)
    return None if file is None else storage.read(join(folder, file))


def files_in(storage: Storage, path: str) -> dict[str, Entry]:
    """Return the files in a folder; none if it is a link that leads to itself, so that it hides no other step."""
    try:
        return {entry.name: entry for entry in storage.list(path) if not entry.is_folder}
    except StorageError as error:
        if error.errno == errno.ELOOP:
            return {}
        raise


def record_name(files: Collection[str]) -> str | None:
    return next((name for name in (MANIFEST_NAME, METADATA_NAME) if name in files), None)


def id_of_record(data: bytes) -> str:
    head = parse_head(data)
    return f"{len(data)}-{crc32(data):08x}" if head is None else id_by_head(head, len(data))


def id_by_head(head: Head, nbytes: int) -> str:
    """The same value as for the commit record of ``nbytes`` bytes as a whole."""
    return f"{nbytes}-{head.crc32:08x}"


def parse_record(
    data: bytes,
    name: str,
    path: str,
    files: Mapping[str, Entry],
    read_shards: Callable[[str, FileEntry], bytes] | None = None,
) -> tuple[Manifest, list[Problem]]:
    """The manifest, and faults for files that are missing, not regular files, or of another size than it records."""
    where = join(path, name)
    if name in (MANIFEST_NAME, PART_NAME):
        manifest = from_json(data, where, read_shards, must_cover=name == MANIFEST_NAME)
        return manifest, _file_faults({name: entry.nbytes for name, entry in manifest.files.items()}, files)
    metadata = dcp_metadata.parse_metadata(data, where)
    places = {place.path for place in metadata.storage.values()}
    # DCP writes neither shards nor digests: a folder with those of the same save is one of ours without its manifest.
    tags = {"", *map(tag_of, places)}
    records = (tagged(name, tag) for name in (SHARDS_NAME, DIGESTS_NAME) for tag in tags)
    own = next((found for found in records if found in files), None)
    if own is not None:
        lost = Problem(f"missing, but {own} is there (without it, it would be external)", MANIFEST_NAME)
        raise FormatError(str(lost), path=join(path, MANIFEST_NAME))
    faults = _file_faults(dict.fromkeys(places), files)
    if faults:
        raise FormatError("; ".join(listed(faults)), path=where)
    sizes = {name: entry.nbytes for name, entry in files.items() if not entry.is_link}
    step = step_of(split(path)[1])
    created_s = files[name].mtime_s
    return dcp_metadata.manifest_from_metadata(metadata, sizes, step=step, created_s=created_s, path=where), []


def saved_over(
    storage: Storage, path: str, files: Mapping[str, Entry], manifest: Manifest, faults: Sequence[Problem]
) -> tuple[bytes, Manifest, str] | None:
    """Detect that another program saved over a checkpoint of ours; return its ``.metadata``, the manifest and a note.

    Our manifest then still exists, with other sizes; None if it is not so. ``.metadata`` by stock DCP's writer records
    its path and a save id of its own; ours records the manifest's.
    """
    if not any(fault.file == METADATA_NAME for fault in faults) or METADATA_NAME not in files:
        return None
    try:
        data = storage.read(join(path, METADATA_NAME), MAX_MANIFEST_NBYTES)
        found = dcp_metadata.parse_metadata(data, join(path, METADATA_NAME))
        if found.checkpoint_id is None or found.save_id == manifest.save_id:
            return None
        others = {name: entry for name, entry in files.items() if not name.startswith("milepost.")}
        external, _ = parse_record(data, METADATA_NAME, path, others)
    except (FormatError, StorageError):
        return None
    note = f"{MANIFEST_NAME} is ignored: another program has saved over the older save that it describes"
    return data, external, note


def misnamed(manifest: Manifest, path: str) -> list[Problem]:
    """Yield a fault if a step's folder holds another step; not for other folders, or manifests without a step."""
    step = step_of(split(path)[1])
    if step is None or manifest.step is None or manifest.step == step:
        return []
    return [Problem(f"is of step {manifest.step}: the folder was renamed, or files were mixed up", MANIFEST_NAME)]


def _file_faults(wanted: Mapping[str, int | None], files: Mapping[str, Entry]) -> list[Problem]:
    """``wanted`` maps names to sizes, None for any."""
    faults = []
    for name, nbytes in sorted(wanted.items()):
        found = files.get(name)
        if found is None:
            faults.append(Problem("missing", name))
        elif found.is_link:
            faults.append(Problem("a link, not a file", name))
        elif nbytes is not None and found.nbytes != nbytes:
            faults.append(Problem(f"expected {nbytes} bytes, found {found.nbytes}", name))
    return faults
