"""The commit protocol: the only code that makes a checkpoint visible, or replaces one.

::

    .milepost-attempt-<save id>/ begin_attempt        no reader takes it for a checkpoint
        owner-<id>.json          begin_attempt, adopt the processes that may still finish it
        data/                    <- each rank's files
        sign-off-<rank>          signoff.sign_off     one for each rank, when its files are durable
        failed                   fail_attempt         why there will be no commit
        committed                publish              only if the attempt can't be taken away after the commit
    step-<N>/                    publish              data/ renamed: the one atomic act

No collective and no torch: any process that sees the storage can take part. The invariant: after a crash at any
point, a scan shows the state before the save or the state after it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from milepost.errors import CheckpointNotFoundError, ConfigError, FormatError, SaveError, StorageError, listed
from milepost.format.digest import BlockDigests, crc32, dump_digests, files_in_blocks
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
from milepost.format.tags import untagged
from milepost.run import catalog, object_commit
from milepost.run.assemble import SaveInfo, assemble
from milepost.run.catalog import ATTEMPT_PREFIX, REPLACED_PREFIX
from milepost.run.hf_folder import is_hf_folder
from milepost.run.node_part import NodePart
from milepost.run.object_commit import COMMITTED_NAME, TARGET_NAME
from milepost.run.owner import OWNER_PREFIX, this_process
from milepost.run.place import Place
from milepost.run.signoff import SignOff
from milepost.run.sweep import discard_quietly, name_left, sweep_leftovers
from milepost.storage.base import Storage, join, split

_log = logging.getLogger(__name__)

VISIBILITY_S = 60.0
"""Another machine's files, and their sizes, may show only this many seconds later: NFS caches both."""

FAILED_NAME = "failed"
_CHECKPOINT_FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp|\.metadata(\.tmp)?|milepost\.((part\.)?json|shards|digests)")
_SAVE_ID = re.compile(rb'^"save_id": "([0-9a-f]+)",$', re.MULTILINE)
_HEAD_NBYTES = 4096


def new_save_id() -> str:
    """32 hex digits that no other save has."""
    return uuid.uuid4().hex


def begin_attempt(storage: Storage, target: str, save_id: str) -> str:
    """Make the fresh place for a save of ``target``, beside it, and give its name. Called by one rank.

    Stale attempts of dead processes there are removed first: callers of ``save()`` have nobody else to do it.

    Raises:
        ConfigError: ``target`` exists and is something else than a checkpoint, so it must not be replaced.
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
            storage.make_folder(attempt)
        else:
            object_commit.note_target(storage, attempt, target)
        adopt_attempt(storage, attempt)  # first of all: without its owner's record nobody may remove what is in it
        if storage.can_rename:
            place = Place.of(storage, attempt, target, save_id).folder
            storage.make_folder(place)
            if storage.stat(target) is not None:
                storage.keep_access(target, place)  # before any data is in it
    except BaseException:  # Ctrl-C too
        discard_quietly(storage, attempt)  # without its owner's record it would stay for an hour
        raise
    return attempt


def resume_attempt(storage: Storage, attempt: str, target: str, save_id: str) -> None:
    """Go on with an attempt of a dead process, which the caller has adopted: with the target as it is now.

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
    """Declare that the calling process works on the attempt too: while it lives, nobody sweeps it.

    A writer process calls this, since it finishes its job when the training process dies.
    """
    storage.write(f"{attempt}/{OWNER_PREFIX}{uuid.uuid4().hex[:8]}.json", this_process(time.time()).dump())
    storage.sync_folder(attempt)


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
        return "holds other folders, so it is no checkpoint"
    if {MANIFEST_NAME, METADATA_NAME}.isdisjoint(entry.name for entry in names):
        others = [entry.name for entry in names if not _CHECKPOINT_FILE.fullmatch(untagged(entry.name))]
        if others:
            return f"is no checkpoint (it holds {others[0]!r})"
    return ""


def publish(
    storage: Storage,
    attempt: str,
    target: str,
    signed: Sequence[SignOff],
    info: SaveInfo,
    *,
    now: float,
    visibility_s: float = VISIBILITY_S,
    world_size: int | None = None,
) -> Manifest:
    """Make the attempt the checkpoint at ``target``, in one atomic act, and durable. Called by one rank.

    ``signed`` are the sign-offs of all ranks (``wait_for_sign_offs``), ``now`` is in seconds since the epoch. What
    was at ``target`` before is complete and in place until the new checkpoint is. Files that do not show yet with
    their recorded sizes are waited for, up to ``visibility_s`` seconds. ``world_size`` is given where not each rank has
    signed by itself.

    Raises:
        PlanError: the stored boxes leave a gap or overlap.
        SaveError: sign-offs contradict each other or the storage.
        StorageError: the storage refused; ``target`` is as it was, or is the new checkpoint.
    """
    manifest, crcs = assemble(signed, info, now=now, world_size=world_size)
    place = Place.of(storage, attempt, target, manifest.save_id)
    # A store shows at once what it has taken.
    _check_sizes(storage, place, manifest, visibility_s if storage.can_rename else 0.0)
    manifest, records = _records(place, manifest, crcs.data)
    _put_in_place_and_sweep(storage, attempt, place, target, manifest, records)
    return manifest


def publish_part(
    storage: Storage,
    attempt: str,
    target: str,
    signed: Sequence[SignOff],
    info: SaveInfo,
    part: NodePart,
    *,
    now: float,
    world_size: int,
) -> Manifest:
    """As :func:`publish`, of one node's part of a step: ``signed`` are the sign-offs of its ranks.

    Raises: as :func:`publish`. Gaps in tensors are none of its faults: other nodes hold the rest.
    """
    info = replace(info, extra={**info.extra, **part.record()})
    manifest, crcs = assemble(signed, info, now=now, world_size=world_size, must_cover=False)
    place = Place.of(storage, attempt, target, manifest.save_id)
    _check_sizes(storage, place, manifest, VISIBILITY_S)
    manifest, records = _records(place, manifest, crcs.data, for_others=False)
    _put_in_place_and_sweep(storage, attempt, place, target, manifest, records, PART_NAME)
    return manifest


def publish_copy(storage: Storage, attempt: str, target: str, manifest: Manifest, digests: BlockDigests) -> Manifest:
    """As :func:`publish`, for a copy of a checkpoint that is committed elsewhere.

    ``manifest`` is that one's, with the files of data as they are called here, and no others.

    Raises:
        SaveError: a file is missing or has another size.
        StorageError: the storage refused; ``target`` is as it was, or is the copy.
    """
    place = Place.of(storage, attempt, target, manifest.save_id)
    _check_sizes(storage, place, manifest, VISIBILITY_S if storage.can_rename else 0.0)
    manifest, records = _records(place, manifest, digests.crcs)
    _put_in_place_and_sweep(storage, attempt, place, target, manifest, records)
    return manifest


def publish_files(
    storage: Storage, attempt: str, target: str, written: Mapping[str, FileDigests], record: Manifest
) -> Manifest:
    """As :func:`publish`, for an attempt whose files are of another format (Hugging Face's): it has no ``.metadata``.

    ``written`` are the files that must be there. ``record`` becomes the commit record, with all files named.

    Raises:
        SaveError: a file is missing or has another size.
        StorageError: the storage refused; ``target`` is as it was, or is the new checkpoint.
    """
    place = Place.of(storage, attempt, target, record.save_id)
    record = replace(record, files={name: FileEntry(found.nbytes, found.crc32) for name, found in written.items()})
    _check_sizes(storage, place, record, VISIBILITY_S if storage.can_rename else 0.0)
    crcs = dump_digests(record.save_id, [written[name].blocks for name in files_in_blocks(record)])
    record = replace(record, files={**record.files, place.name(DIGESTS_NAME): FileEntry(len(crcs), crc32(crcs))})
    _put_in_place_and_sweep(storage, attempt, place, target, record, {place.path(DIGESTS_NAME): crcs})
    return record


def _put_in_place_and_sweep(
    storage: Storage,
    attempt: str,
    place: Place,
    target: str,
    manifest: Manifest,
    records: Mapping[str, bytes | bytearray],
    name: str = MANIFEST_NAME,
) -> None:
    """Write the records, the manifest among them, and let the save take its place."""
    if not storage.can_rename:
        storage.write_all(records)
        object_commit.put_manifest(storage, attempt, target, manifest, to_json(manifest))
        return
    # Synced before the rename, which must not outrun them.
    storage.write_all({**records, place.path(name): to_json(manifest)})
    _carry_over(storage, target, place, manifest)
    storage.sync_folder(place.folder)
    aside = _put_in_place(storage, place.folder, target, manifest.save_id)
    # The save is committed. What can't be removed now is removed by a later sweep, so it can't fail the save.
    if not discard_quietly(storage, attempt):
        with contextlib.suppress(StorageError):  # else those who wait see the attempt stay, and must wait in vain
            storage.write(f"{attempt}/{COMMITTED_NAME}", b"")
    if aside is not None:
        discard_quietly(storage, aside)


def _carry_over(storage: Storage, target: str, place: Place, manifest: Manifest) -> None:
    """Take along what the user has laid beside the checkpoint that is to be replaced, for it goes with its folder.

    Raises:
        SaveError: it has the name of a file of the new checkpoint.
    """
    names = _names_beside(storage, target)
    taken = [name for name in names if name in {MANIFEST_NAME, *manifest.files}]
    if taken:
        raise SaveError(
            f"nothing was committed: {', '.join(listed(taken))} in {storage.root}/{target} is no file of the "
            "checkpoint there, and would be lost to a file of this save of the same name; move it elsewhere",
            path=target,
        )
    for name in names:
        storage.carry(join(target, name), place.path(name))


def _names_beside(storage: Storage, target: str) -> list[str]:
    """The files in the folder ``target`` that belong to no checkpoint."""
    names = [entry.name for entry in storage.list(target) if not _CHECKPOINT_FILE.fullmatch(untagged(entry.name))]
    if not names:
        return []
    try:
        own = {*catalog.read_record(storage, target).manifest.files}
    except (CheckpointNotFoundError, FormatError):
        own = set()
    # Weights of a checkpoint of which the record is lost are not mixed with those of another.
    return [name for name in names if name not in own and (own or not is_hf_folder([name]))]


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
    place: Place, manifest: Manifest, crcs: Sequence[int], *, for_others: bool = True
) -> tuple[Manifest, dict[str, bytes | bytearray]]:
    """The manifest with the files that are recorded beside it, and those: the places of all shards, their digests and,
    ``for_others``, ``.metadata``.
    """
    from milepost.format.columns import table_of  # with numpy, 100 ms that deleting old steps can do without
    from milepost.format.dcp_writer import dump_metadata
    from milepost.format.shards_file import dump_shards

    files = dict(manifest.files)
    contents: dict[str, bytes | bytearray] = {
        SHARDS_NAME: dump_shards(table_of(manifest), manifest.save_id),
        DIGESTS_NAME: dump_digests(manifest.save_id, [crcs]),
    }
    if for_others:
        contents[METADATA_NAME] = dump_metadata(manifest)
    files |= {place.name(name): FileEntry(len(content), crc32(content)) for name, content in contents.items()}
    return replace(manifest, files=files), {place.path(name): content for name, content in contents.items()}


def finish(storage: Storage, target: str) -> None:
    """Do what a process that died right after the commit of ``target`` may have left undone."""
    if not storage.can_rename:
        object_commit.settle_aliases(storage, target)


def remove_records(storage: Storage, place: Place) -> None:
    """Take away the records that an attempt that goes on has left: they are written anew."""
    for name in (MANIFEST_NAME, SHARDS_NAME, DIGESTS_NAME, METADATA_NAME):
        if name != MANIFEST_NAME or storage.can_rename:  # else that is the committed one's
            storage.remove(place.path(name))


def _put_in_place(storage: Storage, data: str, target: str, save_id: str) -> str | None:
    """Give the folder ``data`` the name ``target``. What had that name goes to ``data``, or to the name returned."""
    folder, name = split(target)
    aside = None
    # The rename is the commit. A crash before it leaves an attempt, which is removed; after it, the checkpoint.
    if storage.stat(target) is None:
        storage.rename(data, target)
    elif not storage.exchange(data, target):
        # Two renames. Between them the catalog knows the old one by its other name.
        aside = join(folder, f"{REPLACED_PREFIX}{save_id}-{name}")
        storage.rename(target, aside)
        storage.sync_folder(folder)
        try:
            storage.rename(data, target)
        except StorageError:
            storage.rename(aside, target)
            raise
    storage.sync_folder(folder)  # until then a power cut may undo the rename, so nobody is told of the commit
    storage.sync_folder(split(data)[0])  # the old name must not come back after the new one is durable
    return aside


def fail_attempt(storage: Storage, attempt: str, message: str, *, rank: int | None = None) -> None:
    """Record for the ranks in ``wait_for_outcome`` that there will be no commit, why, and because of which rank.

    The attempt stays, so that all can learn of it; ``abort_attempt`` takes it away. On a full disk an empty file must
    do.

    Raises:
        StorageError: not even that could be left.
    """
    name = f"{attempt}/{FAILED_NAME}"
    content = json.dumps({"rank": rank, "message": message}).encode()
    if not storage.can_rename:
        storage.write(name, content)
        return
    try:
        storage.write(f"{name}.part", content)
        storage.rename(f"{name}.part", name)
    except StorageError:
        storage.write(name, b"")


def recorded_failure(storage: Storage, attempt: str) -> tuple[str, int | None]:
    """The reason for which the save failed, and the rank, as rank 0 has recorded them in the attempt.

    Raises:
        StorageError: it has not recorded any.
    """
    said = storage.read(f"{attempt}/{FAILED_NAME}", 1 << 20)
    if not said:
        return "rank 0 failed to commit and could not record the reason; see its log", None
    told = json.loads(said)
    return told["message"], told["rank"]


def wait_for_outcome(
    storage: Storage,
    attempt: str,
    target: str,
    save_id: str,
    *,
    timeout_s: float,
    give_up: Callable[[], str | None] = lambda: None,
    poll_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once the save is committed; for the ranks that do not publish themselves.

    ``give_up`` says why to stop, or None; or raises the error to end with.

    Raises:
        SaveError: the save failed, or there was no outcome within ``timeout_s``.
    """
    deadline = clock() + timeout_s
    poll_s = storage.poll_s if poll_s is None else poll_s
    gone_until: float | None = None
    while True:
        # Rank 0 removes the attempt after the commit, and after a failure that all ranks know of. So an attempt that
        # is gone means neither: only the save id at the target tells.
        names = _marks_in(storage, attempt)
        if FAILED_NAME in names:
            message, rank = recorded_failure(storage, attempt)
            raise SaveError(message, path=target, rank=rank)
        if COMMITTED_NAME in names:
            return
        if not names:
            if save_id_at(storage, target) == save_id:
                return
            # The attempt is gone at once, but the checkpoint that it has become may show later.
            if gone_until is None:
                gone_until = min(deadline, clock() + VISIBILITY_S)
            if clock() >= gone_until:
                raise SaveError(f"the save of {storage.root}/{target} was aborted before it was committed", path=target)
        reason = give_up()
        if reason is not None or clock() >= deadline:
            raise SaveError(
                f"rank 0 did not commit {storage.root}/{target} {reason or f'within {timeout_s:g} s'}: see its log",
                path=target,
                rank=0,
            )
        sleep(poll_s)
        poll_s = min(poll_s * 1.5, 0.5)


def _marks_in(storage: Storage, attempt: str) -> set[str]:
    """What there is of the marks that tell an attempt's outcome, and of the attempt itself.

    It is not listed: there is a sign-off of every rank in it, and every rank looks, again and again.
    """
    itself = attempt if storage.can_rename else f"{attempt}/{TARGET_NAME}"
    places = {name: f"{attempt}/{name}" for name in (FAILED_NAME, COMMITTED_NAME)} | {TARGET_NAME: itself}
    return {name for name, place in places.items() if storage.stat(place) is not None}


def save_id_at(storage: Storage, target: str) -> str:
    """The save id at ``target``, or empty. From the head of the manifest alone, since a thousand ranks may ask."""
    paths = (join(target, name) for name in (MANIFEST_NAME, PART_NAME))
    path = next((path for path in paths if storage.stat(path) is not None), None)
    if path is None:
        return ""
    with storage.open_read(path) as handle:
        head = bytearray(min(handle.nbytes, _HEAD_NBYTES))
        handle.read_into(0, [memoryview(head)])
    found = _SAVE_ID.search(head)
    return found[1].decode() if found else ""


def abort_attempt(storage: Storage, attempt: str) -> None:
    """Remove an attempt. Never fails: what can't be removed now is removed by a later run."""
    discard_quietly(storage, attempt)
