"""Removal of orphaned objects in an object store: of dead saves, of checkpoints replaced or half deleted.

Nothing here needs to be renamed. A file that carries a save id is of that save alone, so it can go when that save is
neither committed nor under way.
"""

from __future__ import annotations

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
"""Seconds that replaced files are kept, for readers that have begun."""

_ATTEMPT_NAME = re.compile(re.escape(ATTEMPT_PREFIX) + r"[0-9a-f]{32}")
_PLAIN = re.compile(r"__[0-9]+_[0-9]+\.distcp|milepost\.(shards|digests)")
"""Files of a checkpoint that was not saved here, but copied here or saved by stock DCP."""


def sweep(storage: Storage, folder: str, *, now: float, dead: Collection[str] = (), dry_run: bool = False) -> list[str]:
    """Remove the attempts in a folder that nobody works on, with their files, and what attempts have replaced.

    The names of the attempts that were removed. ``now`` is in seconds since the epoch; ``dead`` names attempts that
    are known to be dead. What was not made by ``commit``, as its name and what is in it show, is left alone. With
    ``dry_run`` nothing is removed, nor is what a finished attempt has replaced looked at.
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
    """Take away an attempt that nobody works on, with its files at the target unless they are committed.

    Raises:
        FormatError: the manifest at the target is damaged: whose the files are can't be said.
        StorageError: the store refused.
    """
    save_id = split(attempt)[1].removeprefix(ATTEMPT_PREFIX)
    note = read_note(storage, attempt)
    if note is not None:
        names = sorted(entry.name for entry in storage.list(note.target) if tag_of(entry.name) == save_id)
        # Read after the listing: a commit before it is seen.
        manifest = current_manifest(storage, note.target)
        if manifest is not None:
            settle_aliases(storage, note.target)
        if manifest is None or manifest.save_id != save_id:
            storage.remove_files(note.target, names)
            storage.abort_uploads(note.target, lambda name: tag_of(name) == save_id)
    storage.remove_tree(attempt)


def _remove_replaced(storage: Storage, attempt: str, committed: Entry, now: float) -> bool:
    """Take away what a committed attempt has replaced, and what is left of the attempt. False: not yet."""
    note = read_note(storage, attempt)
    if note is None or now - committed.mtime_s < READERS_S:
        return False
    settle_aliases(storage, note.target)
    manifest = current_manifest(storage, note.target)
    wanted = _wanted(manifest)
    copies = {untagged(name) for name in note.files if tag_of(name)}
    # Without a manifest of ours a plain name may be another program's by now.
    plain = [name for name in note.files if manifest is not None and (_PLAIN.fullmatch(name) or name in copies)]
    gone = {name for name in (*plain, *filter(tag_of, note.files)) if name not in wanted}
    storage.remove_files(note.target, sorted(gone))
    storage.remove_tree(attempt)
    return True


def _wanted(manifest: Manifest | None) -> set[str]:
    return set(manifest.files) | aliases(manifest).keys() if manifest is not None else set()


def delete_files(storage: Storage, target: str) -> bool:
    """Delete the checkpoint at ``target``: the removal of its manifest is the one act. False if there is none.

    Before it goes what other programs find the checkpoint by, so that none of them sees what Milepost no longer does.
    Files of a save that is under way stay.
    """
    names = {entry.name for entry in storage.list(target) if not entry.is_folder}
    if not names:
        return False
    attempts = _attempts(storage, split(target)[0])
    names = {name for name in names if tag_of(name) not in attempts}
    has_plain_data = any(_PLAIN.fullmatch(name) for name in names)
    found_by = {name for name in names - {MANIFEST_NAME} if not tag_of(name) and not _PLAIN.fullmatch(name)}
    if has_plain_data:  # a copy of a folder from elsewhere, which is damaged without its .metadata
        storage.remove_files(target, [MANIFEST_NAME, *sorted(names - {MANIFEST_NAME})])
    else:
        storage.remove_files(target, [*sorted(found_by), MANIFEST_NAME, *sorted(names - found_by - {MANIFEST_NAME})])
    return True


def remove_orphans(storage: Storage, folder: str) -> list[str]:
    """Remove from a run's folder the files of saves of which nothing else is left, and their unfinished uploads.

    The names of the files that were removed. A whole listing: for the beginning of a run, not for every save.
    """
    by_target: dict[str, list[str]] = {}
    for path in storage.list_files(folder):
        target, name = split(path)
        if tag_of(name) and "/" not in target:
            by_target.setdefault(target, []).append(name)
    removed = []
    # Asked for after the listing: an attempt that began since is among them.
    attempts = _attempts(storage, folder)
    for target, names in sorted(by_target.items()):
        place = join(folder, target)
        orphans = [name for name in names if tag_of(name) not in attempts]
        if not orphans:
            continue
        try:
            manifest = current_manifest(storage, place)
        except FormatError:
            continue  # it is damaged: whose the files are can't be said
        orphans = [name for name in orphans if manifest is None or tag_of(name) != manifest.save_id]
        storage.remove_files(place, orphans)
        removed += [join(target, name) for name in orphans]
    storage.abort_uploads(folder, lambda path: tag_of(split(path)[1]) not in attempts | {""})
    return removed


def _attempts(storage: Storage, folder: str) -> set[str]:
    """The save ids of the attempts in a folder."""
    names = (entry.name for entry in storage.list(folder) if entry.name.startswith(ATTEMPT_PREFIX))
    found = {name.removeprefix(ATTEMPT_PREFIX) for name in names}
    return {save_id for save_id in found if storage.stat(join(folder, f"{ATTEMPT_PREFIX}{save_id}/{TARGET_NAME}"))}
