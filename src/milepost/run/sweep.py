"""Deletion from a run's folder: steps, attempts, and remains of dead processes.

Nothing is removed for its name alone. A leftover is Milepost's if its name has one of the prefixes of ``step_names``
and a full id, and it contains a marker: an owner's record in an attempt, the commit record in a replaced step,
``MARKER_NAME`` in a deletion. Anything that only looks like one is left alone and reported.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass

from milepost.errors import CheckpointNotFoundError, FormatError, StorageError
from milepost.format.manifest import MANIFEST_NAME, METADATA_NAME, PART_NAME
from milepost.format.tags import tag_of
from milepost.run import catalog, marks, object_commit, object_sweep
from milepost.run.beside import keep_beside
from milepost.run.deletion import MARKER_NAME, Deletion, deleting
from milepost.run.owner import (
    OWNER_PREFIX,
    OWNERLESS_LIFETIME_S,
    is_alive,
    owners_of,
    parse_owner,
)
from milepost.run.step_names import (
    ATTEMPT_PREFIX,
    DAMAGED_PREFIX,
    DELETING_PREFIX,
    OLD_PREFIXES,
    REPLACED_PREFIX,
    damage_mark,
)
from milepost.storage.base import Entry, Storage, counted, format_nbytes, join, split

_log = logging.getLogger(__name__)

EMPTY_LIFETIME_S = 60.0
"""An empty place for deletions is about to get its marker, or a process was killed just then or just before its end. If
the process is only slow, its deletion fails, and is repeated."""

_ID = r"[0-9a-f]{32}"
_ATTEMPT_NAME = re.compile(re.escape(ATTEMPT_PREFIX) + _ID)
_DELETING_NAME = re.compile(re.escape(DELETING_PREFIX) + _ID)
_DRAFT_NAME = re.compile(rf"{re.escape(DAMAGED_PREFIX)}.+\.json\.{_ID}\.part")
_REPLACED_NAME = re.compile(rf"({re.escape(REPLACED_PREFIX)}|\.replaced-)({_ID})-(.+)")
_OWNER_NAME = re.compile(re.escape(OWNER_PREFIX) + r"[0-9a-f]{8}\.json")
_PREFIXES = (ATTEMPT_PREFIX, DELETING_PREFIX, REPLACED_PREFIX, *OLD_PREFIXES)


def delete_checkpoint(
    storage: Storage, path: str, *, unless: str | None = None, together: Deletion | None = None
) -> bool:
    """Delete a checkpoint so that no reader ever sees part of it. Of a link only the link is deleted.

    Files in its folder that are not part of it are moved to a folder beside it first. With ``together`` it is only
    hidden: its bytes are removed when that deletion is finished.

    Returns False and keeps it if a file ``unless`` (a pin) exists, even one that was created during the call.

    Raises:
        CheckpointNotFoundError: there is nothing at ``path``.
        StorageError: it can't be deleted; it is either complete or visible to no reader.
    """
    found = storage.stat(path)
    if found is None:
        raise CheckpointNotFoundError(f"there is nothing to delete at {storage.root}/{path}", path=path)
    if unless is not None and storage.stat(unless) is not None:
        return False
    gone = CheckpointNotFoundError(f"another process has deleted {storage.root}/{path}", path=path)
    if storage.can_rename and not found.is_link:
        if found.is_folder:
            keep_beside(storage, path)
        with deleting(storage, split(path)[0], together) as deletion:
            hidden = deletion.hide(path)
            if hidden is None:
                raise gone
            if unless is not None and storage.stat(unless) is not None:  # it appeared between the check and the rename
                deletion.show(hidden, path)
                return False
            deletion.remove_afterwards(damage_mark(path))
        return True
    if found.is_link:
        storage.remove(path)
        storage.sync_folder(split(path)[0])
    else:
        keep_beside(storage, path)
        is_deleted = object_sweep.delete_files(storage, path, unless=unless)
        if is_deleted is None:
            raise gone
        if not is_deleted:
            return False
    storage.remove(damage_mark(path))
    return True


def discard_quietly(storage: Storage, path: str) -> bool:
    """Hide a folder from readers by one atomic rename, then remove it; return whether it is gone.

    A failure is logged, not raised: the next sweep tries again.
    """
    try:
        if storage.can_rename:
            with deleting(storage, split(path)[0]) as deletion:
                deletion.hide(path)
        else:
            object_sweep.remove_attempt(storage, path)
    except (StorageError, FormatError) as error:
        _log.warning("%s/%s could not be removed yet: %s", storage.root, path, error)
        return False
    return True


@dataclass(frozen=True, slots=True)
class Sweep:
    """The result of removing stale attempts from a folder."""

    removed: tuple[str, ...]
    """Names of stale save attempts, half deleted steps and the like that were removed."""
    left: tuple[str, ...]
    """Similar names of another program, or of an older Milepost. The user has to delete them."""


def sweep_leftovers(
    storage: Storage, folder: str, *, now: float, dead: Collection[str] = (), dry_run: bool = False
) -> Sweep:
    """Remove the remains of dead processes from a run's folder.

    An attempt whose owner may be alive is left alone with all its files, unless ``dead`` names it. An interrupted
    replacement is undone: the old checkpoint gets its name back. ``now`` is in seconds since the epoch. With
    ``dry_run`` nothing is changed, and ``removed`` lists what would be removed.
    """
    entries = {
        entry.name: entry
        for entry in storage.list(folder)
        if entry.name.startswith(_PREFIXES) or _DRAFT_NAME.fullmatch(entry.name)
    }
    if not storage.can_rename:
        removed = object_sweep.sweep(storage, folder, now=now, dead=dead, dry_run=dry_run)
        known = (name for name in entries if _ATTEMPT_NAME.fullmatch(name) or _DRAFT_NAME.fullmatch(name))
        return Sweep(tuple(removed), tuple(sorted(entries.keys() - known)))
    alive = {
        name
        for name, entry in entries.items()
        if entry.is_folder
        and _ATTEMPT_NAME.fullmatch(name)
        and name not in dead
        and _attempt_lives(storage, folder, entry, now)
    }
    removed, left = [], []
    for name, entry in entries.items():
        replaced = _REPLACED_NAME.fullmatch(name)
        if name in alive or (replaced is not None and ATTEMPT_PREFIX + replaced[2] in alive):
            continue
        if replaced is not None and _can_go_back(storage, folder, entry, replaced[3]):
            removed += [name] if dry_run or _put_back(storage, folder, name, replaced[3]) else []
        elif not is_ours(storage, folder, entry):
            left.append(name)
        elif _may_go(storage, folder, entry, now):
            removed += [name] if dry_run or _take_away(storage, folder, entry) else []
    return Sweep(tuple(removed), tuple(left))


_named: set[str] = set()


def name_left(storage: Storage, folder: str, left: Collection[str]) -> None:
    """Log the names that a sweep left alone, each once per process."""
    paths = [path for name in left if (path := join(storage.root, join(folder, name))) not in _named]
    _named.update(paths)
    if paths:
        _log.warning(
            "not removed, since not recognised as Milepost's: %s. Delete what you know is obsolete", ", ".join(paths)
        )


def is_ours(storage: Storage, folder: str, entry: Entry) -> bool:
    """Return whether a name with one of the prefixes is provably Milepost's."""
    path = join(folder, entry.name)
    if _DRAFT_NAME.fullmatch(entry.name):
        return not entry.is_folder and not entry.is_link and _is_draft(storage.read(path, marks.MAX_MARK_NBYTES))
    if not entry.is_folder or entry.is_link:
        return False
    inside = {found.name for found in storage.list(path)}
    is_attempts = any(_OWNER_NAME.fullmatch(name) for name in inside)
    is_attempts = is_attempts or (inside <= {"data"} and not storage.list(join(path, "data")))
    if _ATTEMPT_NAME.fullmatch(entry.name):
        return is_attempts
    if _DELETING_NAME.fullmatch(entry.name):
        return is_attempts or not inside.isdisjoint((MARKER_NAME, MANIFEST_NAME, PART_NAME))
    is_replaced = entry.name.startswith(REPLACED_PREFIX) and _REPLACED_NAME.fullmatch(entry.name) is not None
    return is_replaced and not inside.isdisjoint((MANIFEST_NAME, PART_NAME))


def _is_draft(data: bytes) -> bool:
    head = b'{\n "record_id"'
    return data[: len(head)] == head[: len(data)]


def _may_go(storage: Storage, folder: str, entry: Entry, now: float) -> bool:
    """Return False while another process may be about to use it: an empty place for a deletion, or a new draft."""
    if _DELETING_NAME.fullmatch(entry.name):
        place = join(folder, entry.name)
        inside = {found.name for found in storage.list(place)}
        if not inside:
            return now - entry.mtime_s >= EMPTY_LIFETIME_S
        return inside != {MARKER_NAME} or now - entry.mtime_s >= OWNERLESS_LIFETIME_S or _has_died(storage, place, now)
    replaced = _REPLACED_NAME.fullmatch(entry.name)
    if replaced is None:
        return True
    info = catalog.examine(storage, join(folder, replaced[3]))
    return info is not None and (info.is_usable or info.state == "part")


def _has_died(storage: Storage, place: str, now: float) -> bool:
    """Return whether the process that created a place for a deletion is known to be dead."""
    try:
        return not is_alive(parse_owner(storage.read(f"{place}/{MARKER_NAME}", 1 << 16), MARKER_NAME), now)
    except (StorageError, FormatError):  # gone, torn by a crash, or empty: older versions wrote no owner
        return False


def _take_away(storage: Storage, folder: str, entry: Entry) -> bool:
    path = join(folder, entry.name)
    if not entry.is_folder:
        storage.remove(path)
        return True
    if not _DELETING_NAME.fullmatch(entry.name):
        return discard_quietly(storage, path)
    try:
        storage.sync_folder(folder)  # see `Deletion.finish`
        for inside in storage.list(path):
            if inside.is_folder:
                storage.remove_tree(join(path, inside.name))
        storage.remove_tree(path)
    except StorageError as error:
        _log.warning("%s/%s could not be removed yet: %s", storage.root, path, error)
        return False
    return True


def _can_go_back(storage: Storage, folder: str, replaced: Entry, name: str) -> bool:
    """Return whether a folder is a checkpoint whose replacement was interrupted, so that it must be renamed back."""
    if not replaced.is_folder or storage.stat(join(folder, name)) is not None:
        return False
    inside = {entry.name for entry in storage.list(join(folder, replaced.name))}
    return not inside.isdisjoint((MANIFEST_NAME, METADATA_NAME, PART_NAME))


def _put_back(storage: Storage, folder: str, replaced: str, name: str) -> bool:
    """Undo an interrupted replacement; return whether it was undone."""
    try:
        storage.rename(join(folder, replaced), join(folder, name))
        storage.sync_folder(folder)
    except StorageError as error:
        _log.warning("%s/%s could not be renamed back: %s", storage.root, join(folder, name), error)
        return False
    return True


def activity(storage: Storage, folder: str, *, now: float) -> list[str]:
    """A line for each save that living processes are writing in a run's folder."""
    lines = []
    for entry in storage.list(folder):
        if not _ATTEMPT_NAME.fullmatch(entry.name) or not _attempt_lives(storage, folder, entry, now):
            continue
        with contextlib.suppress(StorageError):  # it was just committed or removed
            attempt = join(folder, entry.name)
            owners = [str(owner) for owner in owners_of(storage, attempt) if is_alive(owner, now)]
            data = files_of_attempt(storage, attempt)
            written = f"{counted(len(data), 'file')}, {format_nbytes(sum(file.nbytes for file in data))}"
            lines.append(f"being written: {entry.name} ({written} so far) by {', '.join(owners) or 'a process'}")
    return lines


def files_of_attempt(storage: Storage, attempt: str) -> list[Entry]:
    """The files that a save has written so far."""
    if storage.can_rename:
        return [file for file in storage.list(f"{attempt}/data") if not file.is_folder]
    note = object_commit.read_note(storage, attempt)
    save_id = split(attempt)[1].removeprefix(ATTEMPT_PREFIX)
    return [file for file in storage.list(note.target) if tag_of(file.name) == save_id] if note is not None else []


def _attempt_lives(storage: Storage, folder: str, attempt: Entry, now: float) -> bool:
    try:
        owners = owners_of(storage, join(folder, attempt.name))
    except StorageError:
        return True  # its owner may be removing it
    if not owners:
        return now - attempt.mtime_s < OWNERLESS_LIFETIME_S
    return any(is_alive(owner, now) for owner in owners)
