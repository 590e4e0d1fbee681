"""Sweeping up after runs that died: attempts, half-done replacements, half-done deletions. Never fatal."""

from __future__ import annotations

import logging
import re

from milepost import catalog
from milepost.catalog import ATTEMPT_PREFIX, DELETING_PREFIX, REPLACED_PREFIX
from milepost.checkpoint.commit import OWNER_PREFIX, discard_quietly
from milepost.checkpoint.owner import is_alive, parse_owner
from milepost.errors import FormatError, StorageError
from milepost.storage.base import Entry, Storage, join

_log = logging.getLogger(__name__)

OWNERLESS_LIFETIME_S = 3600.0
"""An attempt without an owner's record was cut short while being made, or is being made right now."""

_REPLACED_NAME = re.compile(re.escape(REPLACED_PREFIX) + r"([0-9a-f]+)-(.+)")


def sweep_leftovers(storage: Storage, folder: str, *, now: float) -> list[str]:
    """Remove from a run's folder what dead processes left there; the names of what was dealt with.

    An attempt whose owner may still live is left alone, with all that belongs to it. A replacement that was cut short
    is undone: the old checkpoint gets its name back. ``now`` is in seconds since the epoch.
    """
    entries = {entry.name: entry for entry in storage.list(folder)}
    alive = {
        name
        for name, entry in entries.items()
        if name.startswith(ATTEMPT_PREFIX) and _attempt_lives(storage, folder, entry, now)
    }
    swept = []
    for name in entries:
        replaced = _REPLACED_NAME.fullmatch(name)
        if replaced is not None:
            if ATTEMPT_PREFIX + replaced[1] not in alive and _settle(storage, folder, name, replaced[2]):
                swept.append(name)
        elif name not in alive and name.startswith((ATTEMPT_PREFIX, DELETING_PREFIX)):
            swept += [name] if discard_quietly(storage, join(folder, name)) else []
    return swept


def _attempt_lives(storage: Storage, folder: str, attempt: Entry, now: float) -> bool:
    path = join(folder, attempt.name)
    owners = []
    for entry in storage.list(path):
        if entry.name.startswith(OWNER_PREFIX):
            try:
                owners.append(parse_owner(storage.read(join(path, entry.name), 1 << 16), entry.name))
            except FormatError:
                continue  # torn by a crash
            except StorageError:
                return True  # in doubt: the owner may be removing it this moment
    if not owners:
        return now - attempt.mtime_s < OWNERLESS_LIFETIME_S
    return any(is_alive(owner, now) for owner in owners)


def _settle(storage: Storage, folder: str, replaced: str, name: str) -> bool:
    """Whether a replacement that stopped half-way is now undone, or its remains removed."""
    old, target = join(folder, replaced), join(folder, name)
    if storage.stat(target) is None:
        try:
            storage.rename(old, target)
            storage.sync_folder(folder)
        except StorageError as error:
            _log.warning("%s could not get its name back: %s", target, error)
            return False
        return True
    info = catalog.examine(storage, target)
    return info is not None and info.is_usable and discard_quietly(storage, old)
