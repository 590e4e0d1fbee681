"""Marks beside a run's steps: pinned, damaged; and where the steps are copied to."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass

from milepost.errors import CheckpointNotFoundError, FormatError, StorageError
from milepost.format.typed_json import parse_json, typed
from milepost.run.checkpoint_record import UNFIT, is_checkpoint
from milepost.run.step_names import REMOTE_NAME, damage_mark, list_run, pin_mark, step_name, steps_in
from milepost.storage import is_known
from milepost.storage.base import Storage, join

MAX_MARK_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _DamageMark:
    """The content of the file beside a step in which a load found damaged bytes."""

    record_id: str
    reason: str
    created_s: float


def write_damage_mark(storage: Storage, path: str, record_id: str, reason: str, *, now: float) -> None:
    """Mark the checkpoint at ``path`` as damaged, as long as its commit record is ``record_id``."""
    mark = _DamageMark(record_id, reason, now)
    storage.replace(damage_mark(path), json.dumps(asdict(mark), indent=1).encode())


def read_mark(storage: Storage, path: str, record_id: str) -> str | None:
    """The damage that a load found in the checkpoint whose commit record is ``record_id``; None if none."""
    mark = damage_mark(path)
    if storage.stat(mark) is None:
        return None
    try:
        said = typed(parse_json(storage.read(mark, MAX_MARK_NBYTES), mark, "a mark"), _DamageMark, mark)
        return said.reason if said.record_id == record_id else None
    except FormatError:
        return None  # not one of ours
    except StorageError as error:
        if error.errno not in UNFIT:
            raise
        return None


def pin(storage: Storage, folder: str, step: int) -> None:
    """Protect a step from being pruned. No error if it is pinned already.

    Raises:
        CheckpointNotFoundError: it was deleted before the pin was there.
    """
    path = join(folder, step_name(step))
    try:
        if storage.stat(pin_mark(path)) is None:
            storage.write(pin_mark(path), b"")
    except StorageError as error:
        if error.errno != errno.EEXIST:  # another process has pinned it this moment
            raise
    storage.sync_folder(folder)
    # In a store the removal of its record deletes a step; its other files may be there for a moment.
    is_there = step in steps_in(list_run(storage, folder)[0])
    if not is_there or not (storage.can_rename or is_checkpoint(storage, path)):
        storage.remove(pin_mark(path))
        raise CheckpointNotFoundError(f"{storage.root}/{path} was deleted before it could be pinned", path=path)


def unpin(storage: Storage, folder: str, step: int) -> None:
    """Remove the pin of a step. No error if there is none."""
    storage.remove(pin_mark(join(folder, step_name(step))))
    storage.sync_folder(folder)


def note_remote(storage: Storage, folder: str, remote: str) -> None:
    """Record in a run's folder where its steps are copied to, for those who list them."""
    storage.replace(join(folder, REMOTE_NAME), json.dumps({"remote_folder": remote}).encode())


def remote_of(storage: Storage, folder: str) -> str:
    """The remote folder that a run's steps are copied to; empty if there is none, or it is not recorded."""
    name = join(folder, REMOTE_NAME)
    if storage.stat(name) is None:
        return ""
    try:
        said = json.loads(storage.read(name, MAX_MARK_NBYTES))["remote_folder"]
    except (ValueError, KeyError, TypeError, RecursionError, StorageError):
        return ""
    return said if isinstance(said, str) and is_known(said) else ""
