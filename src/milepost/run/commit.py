"""The commit protocol: the only code that makes a checkpoint visible, or replaces one.

::

    .milepost-attempt-<save id>/ attempts.begin_attempt  no reader takes it for a checkpoint
        owner-<id>.json          attempts.adopt_attempt  the processes that may still finish it
        data/                    <- each rank's files
        sign-off-<rank>          signoff.sign_off        one per rank, once its files are durable
        failed                   outcome.fail_attempt    why there will be no commit
        committed                publish                 only if the attempt can't be removed after the commit
    step-<N>/                    publish                 data/ renamed: the one atomic act

Uses no collective and no torch: any process with access to the storage can take part. The invariant: after a crash at
any point, a scan shows the state before the save or the state after it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from milepost.errors import SaveError, StorageError, listed
from milepost.format.digest import BlockDigests, crc32, digest_pieces, dump_digests, files_in_blocks
from milepost.format.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    METADATA_NAME,
    PART_NAME,
    SHARDS_NAME,
    FileEntry,
    Manifest,
)
from milepost.format.manifest_json import to_json
from milepost.format.shares import FileDigests
from milepost.run import object_commit
from milepost.run.assemble import SaveInfo, assemble
from milepost.run.beside import names_beside
from milepost.run.deletion import Deletion
from milepost.run.node_part import NodePart
from milepost.run.object_commit import COMMITTED_NAME
from milepost.run.place import VISIBILITY_S, Place
from milepost.run.signoff import SignOff
from milepost.run.step_names import REPLACED_PREFIX
from milepost.storage.base import Bytes, Content, Storage, join, split

if TYPE_CHECKING:
    from milepost.format.segment_merger import SegmentMerger

log = logging.getLogger("milepost")

SMALL_NBYTES = 32 << 20
"""A ``.metadata`` up to this size is written together with the other records, which costs one wait for the device."""


def publish(
    storage: Storage,
    attempt: str,
    target: str,
    signed: Sequence[SignOff],
    info: SaveInfo,
    *,
    now: float,
    part: NodePart | None = None,
    merger: SegmentMerger | None = None,
    visibility_s: float = VISIBILITY_S,
    world_size: int | None = None,
    together: Deletion | None = None,
) -> Manifest:
    """Publish the attempt as the checkpoint at ``target``, atomically and durably. Called by one rank.

    ``signed`` are the sign-offs of all ranks (``wait_for_sign_offs``); ``merger`` has their segments if they were
    moved there; ``now`` is in seconds since the epoch. A previous checkpoint at ``target`` stays complete and in place
    until the new one replaces it. Files that are not yet visible with their recorded sizes are waited for, up to
    ``visibility_s`` seconds. ``world_size`` is given if sign-offs are fewer than ranks. With ``part`` the checkpoint is
    one node's part of a step, and ``signed`` are the sign-offs of its ranks: other nodes hold the rest of the tensors.
    Files no longer needed are removed, or hidden if the caller removes them ``together`` with its next deletions.

    Raises:
        PlanError: the stored boxes leave a gap or overlap.
        SaveError: sign-offs contradict each other or the storage.
        StorageError: the storage refused; ``target`` is unchanged, or is the new checkpoint.
    """
    if part is not None:
        info = replace(info, extra={**info.extra, **part.record()})
    is_whole = part is None
    manifest, crcs = assemble(signed, info, now=now, merger=merger, world_size=world_size, must_cover=is_whole)
    place = Place.of(storage, attempt, target, manifest.save_id)
    # An object store is consistent: an accepted object is visible at once.
    _check_sizes(storage, place, manifest, visibility_s if storage.can_rename else 0.0)
    manifest, records = _records(storage, place, manifest, crcs.data, for_others=is_whole)
    name = MANIFEST_NAME if is_whole else PART_NAME
    _put_in_place_and_sweep(storage, attempt, place, target, manifest, records, name, together)
    return manifest


def publish_copy(storage: Storage, attempt: str, target: str, manifest: Manifest, digests: BlockDigests) -> Manifest:
    """Publish a copy of a checkpoint that is committed elsewhere, see :func:`publish`.

    ``manifest`` is that one's, with only the data files, under their names here.

    Raises:
        SaveError: a file is missing or has another size.
        StorageError: the storage refused; ``target`` is unchanged, or is the copy.
    """
    place = Place.of(storage, attempt, target, manifest.save_id)
    _check_sizes(storage, place, manifest, VISIBILITY_S if storage.can_rename else 0.0)
    manifest, records = _records(storage, place, manifest, digests.crcs)
    _put_in_place_and_sweep(storage, attempt, place, target, manifest, records)
    return manifest


def publish_files(
    storage: Storage,
    attempt: str,
    target: str,
    written: Mapping[str, FileDigests],
    record: Manifest,
    *,
    together: Deletion | None = None,
) -> Manifest:
    """Publish an attempt with files of another format (Hugging Face's), without ``.metadata``; see :func:`publish`.

    ``written`` are the required files. ``record`` becomes the commit record, listing all files.

    Raises:
        SaveError: a file is missing or has another size.
        StorageError: the storage refused; ``target`` is unchanged, or is the new checkpoint.
    """
    place = Place.of(storage, attempt, target, record.save_id)
    record = replace(record, files={name: FileEntry(found.nbytes, found.crc32) for name, found in written.items()})
    _check_sizes(storage, place, record, VISIBILITY_S if storage.can_rename else 0.0)
    crcs = dump_digests(record.save_id, [written[name].blocks for name in files_in_blocks(record)])
    record = replace(record, files={**record.files, place.name(DIGESTS_NAME): FileEntry(len(crcs), crc32(crcs))})
    records = {place.path(DIGESTS_NAME): crcs}
    _put_in_place_and_sweep(storage, attempt, place, target, record, records, together=together)
    return record


def _put_in_place_and_sweep(
    storage: Storage,
    attempt: str,
    place: Place,
    target: str,
    manifest: Manifest,
    records: Mapping[str, Content],
    name: str = MANIFEST_NAME,
    together: Deletion | None = None,
) -> None:
    """Write the records and the manifest, then move the save to its place."""
    if not storage.can_rename:
        storage.write_all(records)
        object_commit.put_manifest(storage, attempt, target, manifest, to_json(manifest))
        return
    # Synced before the rename: a power cut must not find the rename on disk without the records.
    storage.write_all({**records, place.path(name): to_json(manifest)})
    _carry_over(storage, target, place, manifest)
    storage.sync_folder(place.folder)
    aside = _put_in_place(storage, place.folder, target, manifest.save_id)
    # The save is committed. A failure to clean up must not fail it: a later sweep removes the rest.
    deletion = Deletion(storage, split(attempt)[0]) if together is None else together
    try:
        deletion.begin_with(attempt)
    except StorageError as error:
        log.warning("%s/%s could not be removed yet: %s", storage.root, attempt, error)
        with contextlib.suppress(StorageError):  # else the waiting ranks would see the attempt persist, and time out
            storage.write(f"{attempt}/{COMMITTED_NAME}", b"")
    if aside is not None:
        try:
            deletion.hide(aside)
        except StorageError as error:
            log.warning("%s/%s could not be removed yet: %s", storage.root, aside, error)
    if together is None:
        deletion.finish_quietly()


def _carry_over(storage: Storage, target: str, place: Place, manifest: Manifest) -> None:
    """Carry over the user's own files beside the checkpoint that is replaced: they would be deleted with its folder.

    Raises:
        SaveError: one has the name of a file of the new checkpoint.
    """
    names = names_beside(storage, target)
    taken = [name for name in names if name in {MANIFEST_NAME, *manifest.files}]
    if taken:
        raise SaveError(
            f"nothing was committed: {', '.join(listed(taken))} in {storage.root}/{target} is no file of the "
            "checkpoint there, and would be lost to a file of this save of the same name; move it elsewhere",
            path=target,
        )
    for name in names:
        storage.carry(join(target, name), place.path(name))


def _check_sizes(storage: Storage, place: Place, manifest: Manifest, visibility_s: float) -> None:
    """Check that the storage holds what the ranks recorded: no file missing, none too short, none unexpected."""
    deadline = time.monotonic() + visibility_s
    wait_s = 0.01
    while True:
        found = {entry.name: entry.nbytes for entry in storage.list(place.folder) if place.holds(entry.name)}
        faults = [
            f"{name}: expected {entry.nbytes} bytes, as its rank recorded, found {found.get(name, 'no file')}"
            for name, entry in sorted(manifest.files.items())
            if found.get(name) != entry.nbytes
        ]
        if not faults or time.monotonic() >= deadline:
            break
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 1.0)
    faults += [f"unexpected file {name} (in no rank's record)" for name in sorted(found.keys() - manifest.files.keys())]
    if faults:
        raise SaveError(
            f"the save is incomplete, nothing was committed: {'; '.join(listed(faults))}", path=place.folder
        )


def _records(
    storage: Storage, place: Place, manifest: Manifest, crcs: Sequence[int], *, for_others: bool = True
) -> tuple[Manifest, dict[str, Content]]:
    """The manifest with the files recorded in it, and those still to be written.

    These are the table of shards, its digests and, ``for_others``, ``.metadata``. None is in memory as a whole: the
    first two are views of columns; ``.metadata`` is written while it is built if it is large, since its CRC-32 is known
    only at the end.
    """
    from milepost.format.columns import table_of  # numpy takes 100 ms, which deletions should not cost
    from milepost.format.dcp_writer import metadata_pieces
    from milepost.format.shards_file import shards_pieces

    contents: dict[str, Sequence[Bytes]] = {
        SHARDS_NAME: shards_pieces(table_of(manifest), manifest.save_id),
        DIGESTS_NAME: digest_pieces(manifest.save_id, crcs),
    }
    files = {name: _entry_of(pieces) for name, pieces in contents.items()}
    if for_others:
        made = metadata_pieces(manifest)
        pieces = _take(made, SMALL_NBYTES)
        following = next(made, None)
        if following is None:
            contents[METADATA_NAME], files[METADATA_NAME] = pieces, _entry_of(pieces)
        else:
            counted = _Counted(chain(pieces, [following], made))
            storage.write_all({place.path(METADATA_NAME): counted})
            files[METADATA_NAME] = counted.entry
    files = {place.name(name): entry for name, entry in files.items()}
    records: dict[str, Content] = {place.path(name): pieces for name, pieces in contents.items()}
    return replace(manifest, files={**manifest.files, **files}), records


class _Counted:
    """Counts and digests the pieces of a file as they pass, for its entry in the manifest."""

    def __init__(self, pieces: Iterable[Bytes]) -> None:
        self._pieces = pieces
        self.entry = FileEntry(0, 0)

    def __iter__(self) -> Iterator[Bytes]:
        for piece in self._pieces:
            self.entry = FileEntry(self.entry.nbytes + len(piece), crc32(piece, self.entry.crc32 or 0))
            yield piece


def _entry_of(pieces: Iterable[Bytes]) -> FileEntry:
    counted = _Counted(pieces)
    for _ in counted:
        pass
    return counted.entry


def _take(pieces: Iterator[Bytes], nbytes: int) -> list[Bytes]:
    """The first pieces, up to ``nbytes`` and the one that exceeds them."""
    taken: list[Bytes] = []
    while sum(map(len, taken)) < nbytes and (piece := next(pieces, None)) is not None:
        taken.append(piece)
    return taken


def finish(storage: Storage, target: str) -> None:
    """Finish the cleanup after the commit of ``target``, for a process that may have died right after it."""
    if not storage.can_rename:
        object_commit.settle_aliases(storage, target)


def _put_in_place(storage: Storage, data: str, target: str, save_id: str) -> str | None:
    """Rename the folder ``data`` to ``target``. A previous ``target`` becomes ``data``, or the returned name."""
    folder, name = split(target)
    aside = None
    # The rename is the commit. A crash before it leaves a stale attempt, which is swept; after it, the checkpoint.
    if storage.stat(target) is None:
        storage.rename(data, target)
    elif not storage.exchange(data, target):
        # No atomic exchange here, so two renames. Between them the catalog finds the old one by its other name.
        aside = join(folder, f"{REPLACED_PREFIX}{save_id}-{name}")
        storage.rename(target, aside)
        storage.sync_folder(folder)
        try:
            storage.rename(data, target)
        except StorageError:
            storage.rename(aside, target)
            raise
    storage.sync_folder(folder)  # until then a power cut may undo the rename, so the commit is reported only after it
    return aside  # that the old name does not come back, `Deletion.finish` sees to before it removes anything
