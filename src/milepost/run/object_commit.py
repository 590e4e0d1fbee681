"""The commit where nothing can be renamed: in an object store. Used by ``commit`` and ``sweep`` alone.

::

    <attempt>/target             note_target     the checkpoint to replace: its manifest's version, its files
    <attempt>/owner-<id>.json    adopt_attempt
    step-<N>/__0_0.<save id>.distcp, ...         <- each rank's files, and the records of the save
    <attempt>/sign-off-<rank>    sign_off
    step-<N>/milepost.json       put_manifest    the one act: put only if it still has the version noted
    step-<N>/.metadata           settle_aliases  a copy, for programs that look for it under this name
    <attempt>/committed          put_manifest    the replaced files can be removed once readers are done

File names carry the save id, so no file of the old checkpoint changes while it may be read. Before the manifest is put,
all readers see the complete old checkpoint. After it, readers of manifests see the complete new one, and readers of
``.metadata`` the complete old one, until the saver or, if it died, the next sweep replaces ``.metadata`` too.
"""

from __future__ import annotations

import errno
import json
import logging
from dataclasses import dataclass

from milepost.errors import SaveError, StorageError
from milepost.format.manifest import MANIFEST_NAME, Manifest
from milepost.format.manifest_json import MAX_MANIFEST_NBYTES, from_json
from milepost.format.tags import tag_of, untagged
from milepost.storage.base import Storage, join, split

_log = logging.getLogger(__name__)

TARGET_NAME = "target"
COMMITTED_NAME = "committed"
_MAX_NOTE_NBYTES = 64 << 20
_NO_ALIAS = (".distcp", ".safetensors", ".shards", ".digests")
"""Files that are found through the manifest, ``.metadata`` or an index, so that their names may carry a save id."""


@dataclass(frozen=True, slots=True)
class Note:
    """The state of an attempt's target when the attempt began."""

    target: str
    tag: str | None
    """The version of the manifest; None if there was none."""
    files: tuple[str, ...]
    """The files of the checkpoint there."""


def note_target(storage: Storage, attempt: str, target: str, *, again: bool = False) -> None:
    """Record in the attempt what it would replace. Written first, so that a sweep knows where to look.

    ``again``: the attempt of a dead process is continued, and has a record already.

    Raises:
        StorageError: the storage refused.
    """
    manifest = storage.stat(join(target, MANIFEST_NAME))  # a listing may lack parts of the version
    names = [entry.name for entry in storage.list(target) if not entry.is_folder and entry.name != MANIFEST_NAME]
    # Without the folder: the sweep may have another root.
    note = {"target": split(target)[1], "tag": manifest.tag if manifest is not None else None, "files": names}
    put = storage.replace if again else storage.write
    put(join(attempt, TARGET_NAME), json.dumps(note).encode())


def read_note(storage: Storage, attempt: str) -> Note | None:
    """Read the note of ``note_target``; None if there is none, or it is invalid."""
    try:
        said = json.loads(storage.read(join(attempt, TARGET_NAME), _MAX_NOTE_NBYTES))
        note = Note(join(split(attempt)[0], said["target"]), said["tag"], tuple(said["files"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return note if all(isinstance(name, str) for name in note.files) else None


def put_manifest(storage: Storage, attempt: str, target: str, manifest: Manifest, data: bytes) -> None:
    """Commit: put the manifest, if the target has not changed since the attempt began.

    Raises:
        SaveError: another process has committed a checkpoint there meanwhile, or has swept this attempt as dead.
        StorageError: the store refused; the manifest is as it was, or is the new one.
    """
    note = read_note(storage, attempt)
    if note is None:
        raise SaveError(
            f"the save of {storage.root}/{target} was removed before it was committed: another run has taken its "
            "process for dead",
            path=target,
        )
    try:
        storage.put_if(join(target, MANIFEST_NAME), data, note.tag)
    except StorageError as error:
        if error.errno != errno.EEXIST:
            raise
        raise SaveError(
            f"another process has saved {storage.root}/{target} since this save began: its checkpoint was kept, this "
            "one was abandoned. Do two runs write to the same folder?",
            path=target,
        ) from error
    # The save is committed. The rest can't fail it: the next sweep repeats it.
    try:
        settle_aliases(storage, target, manifest)
        if note.files:
            storage.write(join(attempt, COMMITTED_NAME), b"")
            for entry in storage.list(attempt):
                if entry.name not in (COMMITTED_NAME, TARGET_NAME):
                    storage.remove(join(attempt, entry.name))
        else:
            storage.remove_tree(attempt)
    except StorageError as error:
        _log.warning("%s is committed, but other programs can't read it yet: %s", target, error)


def settle_aliases(storage: Storage, target: str, manifest: Manifest | None = None) -> None:
    """Make each file that other programs look for by its plain name (``.metadata``) a copy of the committed one.

    ``manifest`` is the committed one, if it was just read or put. Several processes may do this at once: each reads the
    version of the file that it will replace before it reads the manifest, so one that was overtaken replaces nothing.
    """
    manifest = current_manifest(storage, target) if manifest is None else manifest
    while manifest is not None:
        names = aliases(manifest)
        found = {alias: storage.read_tagged(join(target, alias)) for alias in names}
        current = current_manifest(storage, target)
        is_current = current is not None and current.save_id == manifest.save_id
        if is_current and all(_settle(storage, target, alias, names[alias], found[alias]) for alias in names):
            return
        manifest = current_manifest(storage, target) if is_current else current


def _settle(storage: Storage, target: str, alias: str, name: str, found: tuple[bytes, str] | None) -> bool:
    """Return False if another process has changed the alias since it was ``found``."""
    data = storage.read(join(target, name))
    if found is not None and found[0] == data:
        return True
    try:
        storage.put_if(join(target, alias), data, found[1] if found is not None else None)
    except StorageError as error:
        if error.errno == errno.EEXIST:
            return False
        raise
    return True


def aliases(manifest: Manifest) -> dict[str, str]:
    """The plain names that other programs look for: the files that they are copies of."""
    own = [name for name in manifest.files if tag_of(name) and not name.endswith(_NO_ALIAS)]
    return {untagged(name): name for name in own}


def current_manifest(storage: Storage, target: str) -> Manifest | None:
    """The manifest that is committed at ``target``; None if there is none.

    Raises:
        FormatError: it is damaged.
        StorageError: it can't be read.
    """
    path = join(target, MANIFEST_NAME)
    found = storage.read_tagged(path, MAX_MANIFEST_NBYTES)
    return from_json(found[0], path) if found is not None else None
