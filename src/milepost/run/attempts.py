"""Save attempts: the fresh place that a save writes to, which no reader takes for a checkpoint.

Each save has its own id and attempt, beside its target (see ``commit``). An attempt carries its owner's record from the
start, so that a sweep can distinguish a save in progress from a stale attempt.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from dataclasses import replace

from milepost.errors import ConfigError, FormatError, StorageError
from milepost.format.manifest import DIGESTS_NAME, MANIFEST_NAME, METADATA_NAME, SHARDS_NAME
from milepost.format.tags import untagged
from milepost.run import object_commit
from milepost.run.owner import MAX_OWNER_NBYTES, OWNER_PREFIX, parse_owner, this_process
from milepost.run.place import Place
from milepost.run.step_names import ATTEMPT_PREFIX, CHECKPOINT_FILE
from milepost.run.sweep import discard_quietly, name_left, sweep_leftovers
from milepost.storage.base import Storage, join, split

_log = logging.getLogger(__name__)


def new_save_id() -> str:
    """Return a unique id of 32 hex digits."""
    return uuid.uuid4().hex


def begin_attempt(storage: Storage, target: str, save_id: str) -> str:
    """Create a new attempt at saving ``target``, beside it, and return its path. Called by one rank.

    Removes stale attempts of dead processes first, since for ``save()`` there is no manager to do so.

    Raises:
        ConfigError: ``target`` exists and is not a checkpoint, so it must not be replaced.
        StorageError: the folder can't be made.
    """
    fault = _why_not_replace(storage, target)
    if fault:
        raise ConfigError(f"{storage.root}/{target} {fault}: give the path of a new folder or of an older checkpoint")
    folder = split(target)[0]
    try:
        name_left(storage, folder, sweep_leftovers(storage, folder, now=time.time()).left)
    except StorageError as error:
        _log.warning("stale save attempts in %s/%s could not be removed: %s", storage.root, folder, error)
    attempt = join(folder, ATTEMPT_PREFIX + save_id)
    try:
        if storage.can_rename:
            # Not synced one by one: each would be a commit of the file system's journal, while training waits. The
            # owner's record is, before there is any data: without it no sweep may remove the attempt.
            place = Place.of(storage, attempt, target, save_id).folder
            storage.make_folder(attempt, synced=False)
            storage.make_folder(place, synced=False)
        else:
            object_commit.note_target(storage, attempt, target)
        adopt_attempt(storage, attempt)
        if storage.can_rename and storage.stat(target) is not None:
            storage.keep_access(target, place)  # durable before there is any data
    except BaseException:  # Ctrl-C too
        discard_quietly(storage, attempt)  # without its owner's record it would stay for an hour
        raise
    return attempt


def resume_attempt(storage: Storage, attempt: str, target: str, save_id: str) -> None:
    """Continue an attempt of a dead process, which the caller has adopted, with the target as it is now.

    Raises:
        ConfigError, StorageError: as :func:`begin_attempt`.
    """
    fault = _why_not_replace(storage, target)
    if fault:
        raise ConfigError(f"{storage.root}/{target} {fault}: give the path of a new folder or of an older checkpoint")
    place = Place.of(storage, attempt, target, save_id)
    if storage.can_rename:
        storage.make_folder(place.folder)
    else:
        object_commit.note_target(storage, attempt, target, again=True)


def adopt_attempt(storage: Storage, attempt: str) -> None:
    """Record that the calling process works on the attempt too: it is not swept while this process is alive.

    A writer process calls this, since it finishes its job even if the training process dies.
    """
    storage.write(f"{attempt}/{OWNER_PREFIX}{uuid.uuid4().hex[:8]}.json", this_process(time.time()).dump())
    storage.sync_folder(attempt)


def abandon_attempt(storage: Storage, attempt: str) -> None:
    """Undo :func:`adopt_attempt` of this process: others may work on the attempt."""
    now = time.time()
    me = replace(this_process(now), created_s=0.0)
    for entry in storage.list(attempt):
        if entry.name.startswith(OWNER_PREFIX):
            path = join(attempt, entry.name)
            with contextlib.suppress(FormatError):
                owner = parse_owner(storage.read(path, MAX_OWNER_NBYTES), path)
                if replace(owner, created_s=0.0) == me:
                    storage.remove(path)


def abort_attempt(storage: Storage, attempt: str) -> None:
    """Remove an attempt. Never fails: a later run removes the rest."""
    discard_quietly(storage, attempt)


def remove_records(storage: Storage, place: Place) -> None:
    """Remove the records of an attempt that is continued: they are written again."""
    for name in (MANIFEST_NAME, SHARDS_NAME, DIGESTS_NAME, METADATA_NAME):
        if name != MANIFEST_NAME or storage.can_rename:  # else that is the committed one's
            storage.remove(place.path(name))


def _why_not_replace(storage: Storage, target: str) -> str:
    found = storage.stat(target)
    if found is None:
        return ""
    if not found.is_folder:
        return "is not a folder"
    fixed = storage.why_fixed(target)
    if fixed:
        return fixed
    names = storage.list(target)
    if any(entry.is_folder for entry in names):
        return "holds other folders, so it is not a checkpoint"
    if {MANIFEST_NAME, METADATA_NAME}.isdisjoint(entry.name for entry in names):
        others = [entry.name for entry in names if not CHECKPOINT_FILE.fullmatch(untagged(entry.name))]
        if others:
            return f"is not a checkpoint (it holds {others[0]!r})"
    return ""
