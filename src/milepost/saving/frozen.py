"""The file of frozen tensors: written once, and shared with the previous step while its bytes are unchanged.

The plan only guesses which tensors are frozen, but changes are always detected: the bytes of this save are digested,
and the new step shares the earlier file only if they are equal. Its CRC-32s are those of the bytes in memory, so that
every load detects a wrong file.

A file is shared only with the parent step, if that is committed, belongs to the same run, and is not known to be
damaged. If the parent is deleted or replaced meanwhile, it is missing or has another save id, and the file is
rewritten.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milepost.errors import FormatError, StorageError
from milepost.format.manifest import MANIFEST_NAME, Lineage
from milepost.format.manifest_json import MAX_MANIFEST_NBYTES, from_json
from milepost.format.tags import untagged
from milepost.run import catalog
from milepost.run.catalog import CheckpointInfo
from milepost.run.outcome import save_id_at
from milepost.run.place import Place
from milepost.run.signoff import WrittenFile
from milepost.run.step_names import damage_mark, step_name
from milepost.storage.base import Storage, join, split

if TYPE_CHECKING:
    from milepost.saving.writer import BlockSource, FileImage
    from milepost.tensors.plan import WritePlan

log = logging.getLogger("milepost")


@dataclass(frozen=True, slots=True)
class FrozenFile:
    """A file of frozen tensors in a committed step. ``content`` and ``since``: see ``FileEntry``."""

    step_path: str
    save_id: str
    name: str
    nbytes: int
    content: str
    since: int


def frozen_files_of_parent(storage: Storage, target: str, lineage: Lineage) -> dict[str, FrozenFile]:
    """Return the frozen files of the parent step of a save of ``target``, by plain name; empty if it is unusable."""
    if lineage.parent_step is None or not lineage.parent:
        return {}
    path = join(split(target)[0], step_name(lineage.parent_step))
    try:
        info = catalog.examine(storage, path)
        fits = info is not None and info.save_id == lineage.parent
        return frozen_files_of(storage, info, lineage.run) if info is not None and fits else {}
    except StorageError as error:
        log.warning("%s/%s can't be read, so no file is shared with it: %s", storage.root, path, error)
        return {}


def frozen_files_of(storage: Storage, info: CheckpointInfo, run: str) -> dict[str, FrozenFile]:
    """Return a step's frozen files, by plain name; none if it is damaged, or not of the run ``run``.

    Raises:
        StorageError: the storage refused.
    """
    if info.state != "committed" or info.lineage is None or info.lineage.run != run:
        return {}
    record = join(info.path, MANIFEST_NAME)
    try:
        manifest = from_json(storage.read(record, MAX_MANIFEST_NBYTES), record)
    except FormatError:
        return {}  # the step was just seen complete
    return {
        untagged(name): FrozenFile(info.path, manifest.save_id, name, entry.nbytes, entry.content, entry.since)
        for name, entry in manifest.files.items()
        if entry.content and entry.since is not None and manifest.save_id == info.save_id
    }


def share_unchanged(
    storage: Storage,
    place: Place,
    plan: WritePlan,
    source: BlockSource | FileImage,
    earlier: FrozenFile | None,
    num_threads: int,
) -> tuple[str, WrittenFile | None]:
    """Return the identifier of the frozen tensors' bytes and, if an earlier step's equal file is shared, that file.

    Raises:
        StorageError: the storage failed, other than for lack of sharing.
    """
    from milepost.saving.writer import digest_file  # imports numpy, which copying files does not need

    content, tensors = digest_file(plan, source, num_threads=num_threads)
    if earlier is None or earlier.content != content or not share(storage, earlier, place.path(plan.file)):
        return content, None
    file = WrittenFile(place.name(plan.file), earlier.nbytes, tensors, (), content=content, since=earlier.since)
    return content, file


def share(storage: Storage, earlier: FrozenFile, path: str) -> bool:
    """Share the file as ``path``; False, without effect, if its step is no longer suitable or the storage can't."""
    if storage.stat(damage_mark(earlier.step_path)) is not None:
        return False
    if not storage.share(join(earlier.step_path, earlier.name), path):
        return False
    found = storage.stat(path)
    is_whole = found is not None and not found.is_link and found.nbytes == earlier.nbytes
    # Checked last: the step existed all the time, so the file belonged to it.
    if is_whole and save_id_at(storage, earlier.step_path) == earlier.save_id:
        return True
    storage.remove(path)
    return False
