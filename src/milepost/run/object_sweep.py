"""Removal of orphaned objects in an object store: of dead saves, of checkpoints replaced or half deleted.

Nothing here needs to be renamed. A file whose name carries a save id belongs to that save alone, so it can be deleted
when that save is neither committed nor in progress.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Collection

from milepost.errors import FormatError, StorageError
from milepost.format.manifest import MANIFEST_NAME, Manifest
from milepost.format.tags import tag_of, untagged
from milepost.run.object_commit import (
    COMMITTED_NAME,
    TARGET_NAME,
    aliases,
    current_manifest,
    read_note,
    settle_aliases,
)
from milepost.run.owner import OWNER_PREFIX, OWNERLESS_LIFETIME_S, is_alive, owners_of
from milepost.run.step_names import ATTEMPT_PREFIX
from milepost.storage.base import Entry, Storage, join, split

_log = logging.getLogger(__name__)

READERS_S = 600.0
"""Seconds for which replaced files are kept, for readers that have begun."""

_ATTEMPT_NAME = re.compile(re.escape(ATTEMPT_PREFIX) + r"[0-9a-f]{32}")
_PLAIN = re.compile(r"__[0-9]+_[0-9]+\.distcp|milepost\.(shards|digests)")
"""Files of a checkpoint that was copied here, or saved by stock DCP."""


def sweep(storage: Storage, folder: str, *, now: float, dead: Collection[str] = (), dry_run: bool = False) -> list[str]:
    """Remove the stale attempts in a folder with their files, and the files that finished attempts have replaced.

    Returns the names of the removed attempts. ``now`` is in seconds since the epoch; ``dead`` names attempts that
    are known to be dead. Folders that are not attempts by name and content are left alone. With ``dry_run`` nothing is
    removed, and finished attempts are not examined.
    """
    removed = []
    for entry in storage.list(folder):
        attempt = join(folder, entry.name)
        if not _ATTEMPT_NAME.fullmatch(entry.name):
            continue
        try:
            files = {found.name: found for found in storage.list(attempt)}
            if COMMITTED_NAME in files:
                gone = not dry_run and _remove_replaced(storage, attempt, files[COMMITTED_NAME], now)
            else:
                is_ours = TARGET_NAME in files or any(name.startswith(OWNER_PREFIX) for name in files)
                gone = is_ours and (entry.name in dead or not _lives(storage, attempt, files, now))
                if gone and not dry_run:
                    remove_attempt(storage, attempt)
        except (StorageError, FormatError) as error:
            _log.warning("%s/%s could not be removed yet: %s", storage.root, attempt, error)
        else:
            removed += [entry.name] if gone else []
    return removed


def _lives(storage: Storage, attempt: str, files: dict[str, Entry], now: float) -> bool:
    owners = owners_of(storage, attempt)
    if owners:
        return any(is_alive(owner, now) for owner in owners)
    return now - max(entry.mtime_s for entry in files.values()) < OWNERLESS_LIFETIME_S


def remove_attempt(storage: Storage, attempt: str) -> None:
    """Remove a stale attempt, with its files at the target unless they are committed.

    Raises:
        FormatError: the manifest at the target is damaged, so that the files' save is unknown.
        StorageError: the store refused.
    """
    save_id = split(attempt)[1].removeprefix(ATTEMPT_PREFIX)
    note = read_note(storage, attempt)
    if note is not None:
        names = sorted(entry.name for entry in storage.list(note.target) if tag_of(entry.name) == save_id)
        # Read after the listing, so that a commit before the listing is seen.
        manifest = current_manifest(storage, note.target)
        if manifest is not None:
            settle_aliases(storage, note.target)
        if manifest is None or manifest.save_id != save_id:
            storage.remove_files(note.target, names)
            storage.abort_uploads(note.target, lambda name: tag_of(name) == save_id)
    storage.remove_tree(attempt)


def _remove_replaced(storage: Storage, attempt: str, committed: Entry, now: float) -> bool:
    """Remove the files that a committed attempt has replaced, and the attempt. Returns False if it is too early."""
    note = read_note(storage, attempt)
    if note is None or now - committed.mtime_s < READERS_S:
        return False
    settle_aliases(storage, note.target)
    manifest = current_manifest(storage, note.target)
    wanted = _wanted(manifest)
    copies = {untagged(name) for name in note.files if tag_of(name)}
    # Without a manifest of ours, a file without a save id may be another program's by now.
    plain = [name for name in note.files if manifest is not None and (_PLAIN.fullmatch(name) or name in copies)]
    gone = {name for name in (*plain, *filter(tag_of, note.files)) if name not in wanted}
    storage.remove_files(note.target, sorted(gone))
    storage.remove_tree(attempt)
    return True


def _wanted(manifest: Manifest | None) -> set[str]:
    return set(manifest.files) | aliases(manifest).keys() if manifest is not None else set()


def delete_files(storage: Storage, target: str, *, unless: str | None = None) -> bool | None:
    """Delete the checkpoint at ``target``: the removal of its manifest is the one act. None if there is none.

    The files by which other programs find it are removed before, so that none of them sees a checkpoint that Milepost
    does not. Files of a save in progress stay. Returns False and keeps it if a file ``unless`` (a pin) exists, even one
    that was created during the call.
    """
    names = {entry.name for entry in storage.list(target) if not entry.is_folder}
    if not names:
        return None
    attempts = _attempts(storage, split(target)[0])
    names = {name for name in names if tag_of(name) not in attempts}
    has_plain_data = any(_PLAIN.fullmatch(name) for name in names)
    found_by = {name for name in names - {MANIFEST_NAME} if not tag_of(name) and not _PLAIN.fullmatch(name)}
    # A copied folder would be damaged without its .metadata.
    first = [MANIFEST_NAME] if has_plain_data else [*sorted(found_by), MANIFEST_NAME]
    record = storage.read_tagged(join(target, MANIFEST_NAME)) if unless is not None else None
    storage.remove_files(target, first)
    if unless is not None and storage.stat(unless) is not None:
        _put_back(storage, target, record)
        return False
    storage.remove_files(target, sorted(names.difference(first)))
    return True


def _put_back(storage: Storage, target: str, record: tuple[bytes, str] | None) -> None:
    """Undo the removal of a manifest, unless another save has been committed there."""
    if record is None:
        return
    try:
        storage.put_if(join(target, MANIFEST_NAME), record[0], None)
    except StorageError as error:
        if error.errno != errno.EEXIST:
            raise
    settle_aliases(storage, target)


def remove_orphans(storage: Storage, folder: str) -> list[str]:
    """Remove from a run's folder files and unfinished uploads of saves that are neither committed nor in progress.

    Returns the names of the removed files. It lists the whole folder, so it is called once per run, not for every save.
    """
    by_target: dict[str, list[str]] = {}
    for path in storage.list_files(folder):
        target, name = split(path)
        if tag_of(name) and "/" not in target:
            by_target.setdefault(target, []).append(name)
    removed = []
    # Listed after the files, so that an attempt that began since is among them.
    attempts = _attempts(storage, folder)
    for target, names in sorted(by_target.items()):
        place = join(folder, target)
        orphans = [name for name in names if tag_of(name) not in attempts]
        if not orphans:
            continue
        try:
            manifest = current_manifest(storage, place)
        except FormatError:
            continue  # it is damaged, so that the files' save is unknown
        orphans = [name for name in orphans if manifest is None or tag_of(name) != manifest.save_id]
        storage.remove_files(place, orphans)
        removed += [join(target, name) for name in orphans]

    def is_dead(path: str) -> bool:
        target, name = split(path)
        tag = tag_of(name)
        # Those further below are another run's. An attempt may have begun since the listing.
        return bool(tag) and "/" not in target and tag not in attempts and not _is_begun(storage, folder, tag)

    storage.abort_uploads(folder, is_dead)
    return removed


def _attempts(storage: Storage, folder: str) -> set[str]:
    """The save ids of the attempts in a folder."""
    names = (entry.name for entry in storage.list(folder) if entry.name.startswith(ATTEMPT_PREFIX))
    found = {name.removeprefix(ATTEMPT_PREFIX) for name in names}
    return {save_id for save_id in found if _is_begun(storage, folder, save_id)}


def _is_begun(storage: Storage, folder: str, save_id: str) -> bool:
    return storage.stat(join(folder, f"{ATTEMPT_PREFIX}{save_id}/{TARGET_NAME}")) is not None
