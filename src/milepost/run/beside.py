"""A user's own files in a checkpoint's folder: none is to be written there, and those that were are kept."""

from __future__ import annotations

import logging
import os
import pathlib
import uuid

from milepost.errors import CheckpointNotFoundError, FormatError, listed
from milepost.format.manifest import MANIFEST_NAME, METADATA_NAME
from milepost.format.tags import tag_of, untagged
from milepost.run.checkpoint_record import read_record
from milepost.run.hf_folder import holds_safetensors
from milepost.run.step_names import CHECKPOINT_FILE, step_of
from milepost.storage import is_url
from milepost.storage.base import Storage, join, split

_log = logging.getLogger(__name__)


def enclosing_checkpoint(path: str, storage: Storage) -> str | None:
    """Return the checkpoint whose folder contains ``path``; of a store only the prefix above is checked."""
    if is_url(path):
        return storage.root if storage.stat(MANIFEST_NAME) is not None else None
    parents = [str(parent) for parent in pathlib.PurePath(os.path.realpath(path)).parents]
    records = (MANIFEST_NAME, METADATA_NAME)
    return next((p for p in parents if any(os.path.isfile(os.path.join(p, name)) for name in records)), None)


def is_same_folder(a: str, b: str) -> bool:
    """Return True if both paths or URLs are one folder, also through links."""
    if is_url(a) or is_url(b):
        return a.rstrip("/") == b.rstrip("/")
    return os.path.realpath(a) == os.path.realpath(b)


def remote_folder_problem(folder: str, remote: str) -> str | None:
    """Return why a run in ``folder`` can't copy its steps to ``remote``; None if it can."""
    if is_same_folder(folder, remote):
        return (
            f"checkpoint.remote_folder {remote} and checkpoint.folder {folder} are the same folder: give another one, "
            "or none"
        )
    if is_url(folder) or is_url(remote):
        return None
    first = os.path.relpath(os.path.realpath(remote), os.path.realpath(folder)).split(os.sep)[0]
    if step_of(first) is not None:
        return f"checkpoint.remote_folder {remote} is inside {first} of checkpoint.folder {folder}: give another one"
    return None


def names_beside(storage: Storage, path: str) -> list[str]:
    """List what is in ``path`` and belongs to no checkpoint: files and folders, or in a store all files below."""
    found = [entry.name for entry in storage.list(path)] if storage.can_rename else [*storage.list_files(path)]
    names = [name for name in found if not CHECKPOINT_FILE.fullmatch(untagged(name))]
    if not storage.can_rename:
        names = [name for name in names if not tag_of(name)]  # of a save that is being replaced or removed
    if not names:
        return []
    try:
        own = {name for file in read_record(storage, path).manifest.files for name in (file, untagged(file))}
    except (CheckpointNotFoundError, FormatError):
        own = set()
    # Otherwise a checkpoint that lost its commit record would have its weights mixed with another's.
    return [name for name in names if name not in own and (own or not holds_safetensors([name]))]


def keep_beside(storage: Storage, path: str) -> str | None:
    """Move them out of a step that is about to be deleted; return the new folder beside it, or None if there are none.

    The new folder does not have the name of a step, so nothing deletes it.

    Raises:
        StorageError: they could not be moved. Those that were are in the new folder; nothing is lost.
    """
    names = names_beside(storage, path)
    if not names:
        return None
    place = f"{path}.aside-{uuid.uuid4().hex[:8]}"
    storage.make_folder(place)
    for name in names:
        _move(storage, join(path, name), join(place, name))
    storage.sync_folder(place)
    _log.warning(
        "%s/%s is being deleted; what is in it but not part of the checkpoint was moved to %s: %s",
        *(storage.root, path, split(place)[1], ", ".join(listed(names))),
    )
    return place


def _move(storage: Storage, src: str, dst: str) -> None:
    if storage.can_rename:
        storage.rename(src, dst)
        return
    if not storage.share(src, dst):
        storage.carry(src, dst)
    storage.remove(src)
