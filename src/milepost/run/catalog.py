"""The one place that says what a folder holds: which steps are committed, incomplete, damaged or external.

Resume, retention, ``milepost ls`` and ``milepost prune`` all ask here. Only metadata is read: a commit record, and the
sizes of the files that it names. Whether their bytes are those that were saved is for ``milepost.verification`` to
say; a load that finds they are not leaves a mark here.

Names in a run's folder:

======================================  ==================================================================
``step-<N>``                            a step; N in decimal without leading zeros
``.milepost-attempt-<save id>``         a save that is not committed; never a checkpoint
``.milepost-replaced-<save id>-<name>`` an old step, for the moment in which its replacement takes its name
``.milepost-deleting-<id>``             holds what is being deleted; never a checkpoint
``.pinned-step-<N>``                    an empty file: never prune that step
``.damaged-step-<N>.json``              a loader found bytes of that step changed
``.remote.json``, ``.node.json``        where steps are copied to; which of them all nodes hold, if each has a folder
``.lock``, ``.lock-<id>``               the run that writes here; see ``run/lock.py``
``SAVE``, ``STOP``                      made by a user: what is asked of the run; see ``training/signals.py``
``events.jsonl``                        one line for each save, for people and dashboards; never read back
======================================  ==================================================================
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from milepost.collective.threads import map_in_threads
from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    FormatError,
    NewerFormatError,
    Problem,
    StorageError,
    listed,
)
from milepost.format import dcp_metadata
from milepost.format.digest import BlockDigests, crc32, parse_digests
from milepost.format.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    MAX_SHARDS_NBYTES,
    METADATA_NAME,
    PART_NAME,
    SHARDS_NAME,
    FileEntry,
    Lineage,
    Manifest,
)
from milepost.format.manifest_json import (
    MAX_HEAD_NBYTES,
    MAX_MANIFEST_NBYTES,
    Head,
    from_json,
    is_intact,
    lineage_of_torn,
    listing_of,
    parse_head,
)
from milepost.format.summary import model_total, totals_by_part
from milepost.format.tags import tag_of, tagged
from milepost.format.typed_json import parse_json, typed
from milepost.run.node_part import NodePart, part_of_manifest
from milepost.storage import is_known
from milepost.storage.base import Entry, Storage, join, split

State = Literal["committed", "part", "incomplete", "damaged", "external", "newer", "unreadable"]
"""``part``: what one node holds of a step whose nodes have a folder each. ``newer``: committed, as it seems, by a
Milepost whose format this one does not know. ``unreadable``: the storage refused, so that nothing is known. Only a
listing goes on then."""

ATTEMPT_PREFIX = ".milepost-attempt-"
REPLACED_PREFIX = ".milepost-replaced-"
DELETING_PREFIX = ".milepost-deleting-"
OLD_ATTEMPT_PREFIX = ".attempt-"
OLD_PREFIXES = (OLD_ATTEMPT_PREFIX, ".replaced-", ".deleting-")
"""Of Milepost 0.1. Other programs use such names too, so they are read, and never removed."""
PINNED_PREFIX = ".pinned-"
DAMAGED_PREFIX = ".damaged-"
REMOTE_NAME = ".remote.json"

_STATES: Mapping[str, State] = {MANIFEST_NAME: "committed", PART_NAME: "part", METADATA_NAME: "external"}
"""The state of a folder with this commit record, if nothing is wrong with it."""
MAX_MARK_NBYTES = 1 << 20
MAX_LISTINGS = 8
"""A folder that changes all the time is listed at most so often."""

_UNFIT = {errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.EFBIG}  # gone, a link, no regular file, absurdly large
_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_REPLACED_NAME = re.compile(rf"(?:{re.escape(REPLACED_PREFIX)}|\.replaced-)[0-9a-f]+-(step-.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a folder is, as far as its metadata tells.

    ``reason`` says why it is not simply committed. ``kind`` and ``layout`` are the manifest's, empty when unknown;
    ``dtype`` is the one that most of the model has. ``record_id`` identifies the commit record, so that a mark of
    damage is not taken for one of a later save at the same place. ``lineage`` is also given for a step whose record is
    damaged in another place. ``has_training_state``: the optimizer's state or the train state is there. ``part`` is
    given for one node's part of a step.
    """

    path: str
    state: State
    reason: str = ""
    kind: str = ""
    nbytes: int = 0
    created_s: float = 0.0
    save_id: str = ""
    world_size: int = 0
    record_id: str = ""
    dtype: str = ""
    num_parameters: int = 0
    layout: Mapping[str, int] = field(default_factory=dict)
    lineage: Lineage | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    has_training_state: bool = False
    shared_nbytes: int = 0
    """Of ``nbytes``, those in files that other steps have too: deleting this step alone does not free them."""
    part: NodePart | None = None

    @property
    def name(self) -> str:
        """The name of the folder itself."""
        return split(self.path)[1]

    @property
    def is_usable(self) -> bool:
        """Whether it can be loaded, as far as metadata tells."""
        return self.state in ("committed", "external")

    @property
    def is_resumable(self) -> bool:
        """Whether training can go on from it: it can be loaded, and holds more than weights."""
        return self.is_usable and (self.kind == "full" or (self.kind == "state" and self.has_training_state))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEntry(CheckpointInfo):
    """A step of a run. ``is_link``: the step is a link to a folder elsewhere, which is not the run's to delete."""

    step: int
    pinned: bool = False
    is_link: bool = False


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """What makes a folder a checkpoint. ``name`` is ``milepost.json``, or ``.metadata`` for an external one."""

    name: str
    record_id: str
    manifest: Manifest
    files: Mapping[str, Entry]
    """What is in the folder."""
    faults: tuple[Problem, ...]
    """Its files that are not as the record says."""
    note: str = ""
    """What is strange, and no fault."""

    @property
    def read(self) -> tuple[str, ...]:
        """The files that were read, and checked, for it."""
        shards = self.manifest.file_named(SHARDS_NAME)
        return (self.name,) if shards is None else (self.name, shards)

    @property
    def is_own(self) -> bool:
        """Whether Milepost wrote it, so that there are digests."""
        return self.name == MANIFEST_NAME


@dataclass(frozen=True, slots=True)
class _DamageMark:
    """What a loader leaves beside a step of which it found bytes changed."""

    record_id: str
    reason: str
    created_s: float


def step_of(name: str) -> int | None:
    """The step that a folder's name stands for, or None: ``step-007`` and ``step-7_old`` are not steps."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step}"


def find_run(storage: Storage, path: str) -> str | None:
    """The folder with a run's steps: ``path``, or ``checkpoint`` in it where the trainer puts them; else None."""
    for folder in (path, join(path, "checkpoint")):
        if _steps({entry.name: entry for entry in storage.list(folder)}):
            return folder
    return None


def scan(storage: Storage, folder: str, *, keep_going: bool = False) -> list[StepEntry]:
    """The steps in a run's folder, oldest first; empty if there is no such folder.

    ``keep_going``: list a step that the storage refuses to read as ``unreadable``, for those who only show the list.

    Raises:
        StorageError: the storage can't be read. What is merely broken is listed as damaged.
    """
    names, inside = _list_run(storage, folder)
    steps = sorted(_steps(names).items())

    def look(numbered: tuple[int, str]) -> CheckpointInfo | None:
        path = join(folder, numbered[1])
        try:
            return examine(storage, path, marks=names, files=inside.get(numbered[1]))
        except StorageError as error:
            if not keep_going:
                raise
            return CheckpointInfo(path=path, state="unreadable", reason=error.message)

    # Where each look is a request, several at a time.
    infos = map_in_threads(look, steps, storage.num_streams if inside else 1, name="milepost-scan")
    entries = []
    for (step, name), info in zip(steps, infos, strict=True):
        if info is not None:  # deleted while we looked
            entries.append(
                StepEntry(
                    **{field: getattr(info, field) for field in CheckpointInfo.__slots__},
                    step=step,
                    pinned=PINNED_PREFIX + step_name(step) in names,
                    is_link=names[name].is_link,
                )
            )
    return entries


def _list_run(storage: Storage, folder: str) -> tuple[dict[str, Entry], dict[str, dict[str, Entry]]]:
    """What is in a run's folder, and, where one listing tells that too, what is in each folder in it."""
    if storage.can_rename:
        return _list_steady(storage, folder), {}
    names: dict[str, Entry] = {}
    inside: dict[str, dict[str, Entry]] = {}
    for path, entry in storage.list_files(folder).items():
        first, _, rest = path.partition("/")
        names.setdefault(first, Entry(first, True, 0, 0.0) if rest else entry)
        if rest and "/" not in rest:
            inside.setdefault(first, {})[rest] = replace(entry, name=rest)
    return names, inside


def _list_steady(storage: Storage, folder: str) -> dict[str, Entry]:
    """A listing in which no step is between two names: listing a folder is not atomic, a rename meanwhile may hide."""
    names = {entry.name: entry for entry in storage.list(folder)}
    for _ in range(MAX_LISTINGS):
        if not any(name.startswith((ATTEMPT_PREFIX, REPLACED_PREFIX, *OLD_PREFIXES)) for name in names):
            break
        before, names = names, {entry.name: entry for entry in storage.list(folder)}
        if before.keys() == names.keys():
            break
    return names


def _steps(names: dict[str, Entry]) -> dict[int, str]:
    """For each step, the name under which it now stands."""
    steps = {}
    for name, entry in names.items():
        step = step_of(name)
        if step is not None and (entry.is_folder or entry.is_link):
            steps[step] = name
    for name in names:
        match = _REPLACED_NAME.fullmatch(name)
        step = step_of(match[1]) if match else None
        if step is not None:
            steps.setdefault(step, name)
    return steps


def examine(
    storage: Storage,
    path: str,
    *,
    marks: Collection[str] | None = None,
    files: Mapping[str, Entry] | None = None,
) -> CheckpointInfo | None:
    """What the folder at ``path`` is; None if there is no folder.

    ``marks`` are the names beside it, and ``files`` what is in it, if they are known already.
    """
    info = _look(storage, path, _files(storage, path) if files is None else files)
    if info is not None and info.state == "damaged":
        info = _look(
            storage, path, _files(storage, path)
        )  # it may have been replaced by a new save between two of our reads
    if info is None or not (info.is_usable or info.state == "part"):
        return info
    if marks is not None and split(damage_mark(path))[1] not in marks:
        return info
    said = read_mark(storage, path, info.record_id)
    return replace(info, state="damaged", reason=said) if said is not None else info


def _look(storage: Storage, path: str, files: Mapping[str, Entry]) -> CheckpointInfo | None:
    nbytes = sum(entry.nbytes for entry in files.values())
    name = _record_name(files) or (PART_NAME if PART_NAME in files else None)
    if name is None:
        if not files and storage.stat(path) is None:
            return None
        if files and all(map(tag_of, files)):
            return None  # of a save under way, or what is left of one, where saves have no folder of their own
        reason = f"it was never committed: neither {MANIFEST_NAME} nor {METADATA_NAME} is there"
        return CheckpointInfo(path=path, state="incomplete", reason=reason, nbytes=nbytes)
    record_id, data, note = "", b"", ""
    faults: list[Problem] = []
    try:
        head = _fitting_head(storage, path, files) if name == MANIFEST_NAME else None
        if head is not None:
            manifest, record_id = head.manifest, _record_id_of(head, files[name].nbytes)
        else:
            data = storage.read(join(path, name), MAX_MANIFEST_NBYTES)
            record_id = _record_id(data)
            manifest, faults = _parse(data, name, path, files)
            other = _saved_over(storage, path, files, manifest, faults)
            if other is not None:
                name, data, manifest, note = METADATA_NAME, *other
                record_id, faults = _record_id(data), []
    except NewerFormatError as error:
        return CheckpointInfo(
            path=path, state="newer", reason=error.message.removeprefix(f"{path}/"), nbytes=nbytes, record_id=record_id
        )
    except FormatError as error:
        reason = error.message.removeprefix(f"{path}/")  # the step is named where this is shown
        return CheckpointInfo(
            path=path,
            state="damaged",
            reason=reason,
            nbytes=nbytes,
            record_id=record_id,
            lineage=lineage_of_torn(data) if name == MANIFEST_NAME else None,
        )
    except StorageError as error:
        if error.errno not in _UNFIT:
            raise  # a server that is down, too many open files: nothing is known about the step then
        return CheckpointInfo(path=path, state="damaged", reason=error.message, nbytes=nbytes)
    faults += misnamed(manifest, path)
    nbytes = sum(entry.nbytes for file, entry in files.items() if tag_of(file) in ("", manifest.save_id))
    part = part_of_manifest(manifest.extra, path) if name == PART_NAME and not faults else None
    model = model_total(manifest)
    return CheckpointInfo(
        path=path,
        state="damaged" if faults else _STATES[name],
        reason="; ".join(listed(faults)) or (str(part) if part is not None else note),
        kind=manifest.kind,
        nbytes=nbytes,
        created_s=manifest.created_s,
        save_id=manifest.save_id,
        world_size=manifest.world_size,
        record_id=record_id,
        dtype=model.dtypes[0] if model.dtypes else "",
        num_parameters=model.num_elements,
        layout=manifest.layout,
        lineage=manifest.lineage,
        metrics=manifest.metrics,
        shared_nbytes=sum(entry.nbytes for entry in files.values() if entry.link_id),
        has_training_state=any(total.part in ("optimizer", "train_state") for total in totals_by_part(manifest)),
        part=part,
    )


def _files(storage: Storage, path: str) -> dict[str, Entry]:
    return {entry.name: entry for entry in storage.list(path) if not entry.is_folder}


def _record_name(files: Collection[str]) -> str | None:
    return next((name for name in (MANIFEST_NAME, METADATA_NAME) if name in files), None)


def _fitting_head(storage: Storage, path: str, files: Mapping[str, Entry]) -> Head | None:
    """The head of a manifest if it says just what files are there; else the rest must be read to know more.

    This is all that a scan reads of a step: one request, whatever the step holds.
    """
    where, nbytes = join(path, MANIFEST_NAME), files[MANIFEST_NAME].nbytes
    if nbytes <= MAX_HEAD_NBYTES:
        start = storage.read(where, MAX_HEAD_NBYTES)
        head = parse_head(start) if is_intact(start) else None
    else:
        with storage.open_read(where) as handle:
            beginning = bytearray(MAX_HEAD_NBYTES)
            handle.read_into(0, [memoryview(beginning)])
        head = parse_head(bytes(beginning))
    if head is None:
        return None
    # Where saves share a folder, all files of one carry its id: the others are of another save, or copies for other
    # programs. Elsewhere none does.
    others = [file for file in files.values() if file.name != MANIFEST_NAME]
    own = [file for file in others if tag_of(file.name) == head.manifest.save_id]
    found = listing_of((file.name, file.nbytes) for file in own or others if not file.is_link)
    return head if found == head.listing else None


def _record_id(data: bytes) -> str:
    head = parse_head(data)
    return f"{len(data)}-{crc32(data):08x}" if head is None else _record_id_of(head, len(data))


def _record_id_of(head: Head, nbytes: int) -> str:
    """The same as of the whole commit record of ``nbytes`` bytes."""
    return f"{nbytes}-{head.crc32:08x}"


def _parse(
    data: bytes,
    name: str,
    path: str,
    files: Mapping[str, Entry],
    read_shards: Callable[[str, FileEntry], bytes] | None = None,
) -> tuple[Manifest, list[Problem]]:
    """The manifest, and which of its files are missing, no plain files, or of another size than it says."""
    where = join(path, name)
    if name in (MANIFEST_NAME, PART_NAME):
        manifest = from_json(data, where, read_shards, must_cover=name == MANIFEST_NAME)
        return manifest, _file_faults({name: entry.nbytes for name, entry in manifest.files.items()}, files)
    metadata = dcp_metadata.parse_metadata(data, where)
    places = {place.path for place in metadata.storage.values()}
    # DCP writes neither shards nor digests: with those of its save it is one of ours, which has lost its manifest.
    tags = {"", *map(tag_of, places)}
    records = (tagged(name, tag) for name in (SHARDS_NAME, DIGESTS_NAME) for tag in tags)
    own = next((found for found in records if found in files), None)
    if own is not None:
        lost = Problem(f"missing, but {own} is there (without it, it would be external)", MANIFEST_NAME)
        raise FormatError(str(lost), path=join(path, MANIFEST_NAME))
    faults = _file_faults(dict.fromkeys(places), files)
    if faults:
        raise FormatError("; ".join(listed(faults)), path=where)
    sizes = {name: entry.nbytes for name, entry in files.items() if not entry.is_link}
    step = step_of(split(path)[1])
    created_s = files[name].mtime_s
    return dcp_metadata.manifest_from_metadata(metadata, sizes, step=step, created_s=created_s, path=where), []


def _saved_over(
    storage: Storage, path: str, files: Mapping[str, Entry], manifest: Manifest, faults: Sequence[Problem]
) -> tuple[bytes, Manifest, str] | None:
    """Where another program has saved over a checkpoint of ours: its ``.metadata``, the manifest of that, and a note.

    Ours is then left behind as it was, and says other sizes. None if it is not so. Stock DCP's writer records its path
    and a save id of its own; what is ours has the manifest's.
    """
    if not any(fault.file == METADATA_NAME for fault in faults) or METADATA_NAME not in files:
        return None
    try:
        data = storage.read(join(path, METADATA_NAME), MAX_MANIFEST_NBYTES)
        found = dcp_metadata.parse_metadata(data, join(path, METADATA_NAME))
        if found.checkpoint_id is None or found.save_id == manifest.save_id:
            return None
        others = {name: entry for name, entry in files.items() if not name.startswith("milepost.")}
        external, _ = _parse(data, METADATA_NAME, path, others)
    except (FormatError, StorageError):
        return None
    note = f"{MANIFEST_NAME} is of an older save, over which another program has saved: it is not used"
    return data, external, note


def misnamed(manifest: Manifest, path: str) -> list[Problem]:
    """The fault of a step's folder that holds another step; no fault of one that is no step, or doesn't say."""
    step = step_of(split(path)[1])
    if step is None or manifest.step is None or manifest.step == step:
        return []
    return [Problem(f"is of step {manifest.step}: the folder was renamed, or files were mixed up", MANIFEST_NAME)]


def _file_faults(wanted: Mapping[str, int | None], files: Mapping[str, Entry]) -> list[Problem]:
    """``wanted`` maps names to sizes, None for any."""
    faults = []
    for name, nbytes in sorted(wanted.items()):
        found = files.get(name)
        if found is None:
            faults.append(Problem("missing", name))
        elif found.is_link:
            faults.append(Problem("a link, not a file", name))
        elif nbytes is not None and found.nbytes != nbytes:
            faults.append(Problem(f"expected {nbytes} bytes, found {found.nbytes}", name))
    return faults


def is_checkpoint(storage: Storage, path: str) -> bool:
    """Whether the folder at ``path`` is a checkpoint itself, of whatever state."""
    return any(storage.stat(join(path, name)) is not None for name in (MANIFEST_NAME, METADATA_NAME))


def read_record(storage: Storage, path: str) -> CommitRecord:
    """The commit record of the checkpoint at ``path``, and how the files that are there fit it.

    Raises:
        CheckpointNotFoundError: there is no commit record.
        FormatError: it is malformed, or no plain file; or external, and files that it names are missing or too short.
    """
    files = _files(storage, path)
    name = _record_name(files)
    if name is None:
        raise _no_checkpoint(storage, path)
    return _read_record(storage, path, files, name)


def read_part(storage: Storage, path: str) -> CommitRecord:
    """As :func:`read_record`, of one node's part of a step."""
    files = _files(storage, path)
    if PART_NAME not in files:
        raise _no_checkpoint(storage, path)
    record = _read_record(storage, path, files, PART_NAME)
    part_of_manifest(record.manifest.extra, join(path, PART_NAME))
    return record


def _read_record(storage: Storage, path: str, files: Mapping[str, Entry], name: str) -> CommitRecord:
    try:
        data = storage.read(join(path, name), MAX_MANIFEST_NBYTES)
    except StorageError as error:
        if error.errno not in _UNFIT - {errno.ENOENT}:
            raise
        raise FormatError(error.message, path=join(path, name)) from error

    def read_shards(name: str, entry: FileEntry) -> bytes:
        where = join(path, name)
        faults = _file_faults({name: entry.nbytes}, files)
        if faults:
            raise FormatError(f"{where}: {faults[0].message}", path=where)
        return storage.read(where, MAX_SHARDS_NBYTES)

    manifest, faults = _parse(data, name, path, files, read_shards)
    other = _saved_over(storage, path, files, manifest, faults)
    if other is not None:
        data, manifest, note = other
        return CommitRecord(METADATA_NAME, _record_id(data), manifest, files, (), note)
    return CommitRecord(name, _record_id(data), manifest, files, tuple(faults))


def _no_checkpoint(storage: Storage, path: str) -> CheckpointNotFoundError:
    """The error for a place without a commit record: of a run's folder it names the steps."""
    where = f"{storage.root}/{path}"
    found = storage.stat(path)
    if found is None:
        return CheckpointNotFoundError(f"{where} holds no checkpoint: there is no such folder", path=path)
    if not found.is_folder and storage.can_rename:
        return CheckpointNotFoundError(f"{where} is a file, not the folder of a checkpoint", path=path)
    run = find_run(storage, path)
    if run is not None:
        steps = sorted(_steps({entry.name: entry for entry in storage.list(run)}))
        shown = ", ".join(listed(steps[::-1], 5))
        return CheckpointNotFoundError(
            f"{where} is the folder of a run, not a checkpoint: give the path of one of its steps, such as "
            f"{join(storage.root, run)}/{step_name(steps[-1])} (it has steps {shown})",
            path=path,
            available=steps,
        )
    if storage.stat(join(path, PART_NAME)) is not None:
        return CheckpointNotFoundError(
            f"{where} holds one node's part of a step, no whole checkpoint: that is in the run's "
            "checkpoint.remote_folder",
            path=path,
        )
    return CheckpointNotFoundError(
        f"{where} holds no checkpoint: neither {MANIFEST_NAME} nor {METADATA_NAME} is there", path=path
    )


def read_manifest(storage: Storage, path: str) -> Manifest:
    """The manifest of the checkpoint at ``path``; for an external one built from ``.metadata``.

    Raises:
        CheckpointNotFoundError: there is no commit record.
        CheckpointDamagedError: it is malformed, or files that it names are missing or have other sizes.
    """
    try:
        record = read_record(storage, path)
        if not record.faults:
            return record.manifest
    except FormatError:
        pass  # see `examine`: look once more, then say so
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise  # else it was deleted or replaced this moment
    record = read_record(storage, path)
    if record.faults:
        raise CheckpointDamagedError(f"{storage.root}/{path} is damaged: {'; '.join(listed(record.faults))}", path=path)
    return record.manifest


def read_digests(storage: Storage, folder: str, manifest: Manifest) -> BlockDigests | None:
    """The block digests of the checkpoint in ``folder``; None for one of another program, which has none.

    Raises:
        FormatError: they are damaged, or of another save.
    """
    data = read_digests_file(storage, folder, manifest)
    name = join(folder, manifest.file_named(DIGESTS_NAME) or "")
    return None if data is None else parse_digests(data, manifest, name)


def read_digests_file(storage: Storage, folder: str, manifest: Manifest) -> bytes | None:
    """The bytes of that file, as they are there; None if stock DCP wrote the checkpoint, which keeps none."""
    file = manifest.file_named(DIGESTS_NAME)
    return None if file is None else storage.read(join(folder, file))


def mark_damaged(storage: Storage, path: str, reason: str, *, now: float) -> None:
    """Leave word beside the checkpoint at ``path`` that its bytes are not sound: scans then list it as damaged.

    The mark holds for the save that is there now, not for a later one at the same place. ``now`` is in seconds since
    the epoch. Does nothing when the checkpoint is gone.
    """
    info = _look(storage, path, _files(storage, path))
    if info is None or not info.record_id:
        return
    mark = _DamageMark(info.record_id, reason, now)
    final = damage_mark(path)
    storage.replace(final, json.dumps(asdict(mark), indent=1).encode())


def steps_that_share(storage: Storage, path: str, file: str) -> list[str]:
    """The other steps beside the checkpoint at ``path`` that have its file ``file`` too, by a second name of it."""
    found = storage.stat(join(path, file)) if file else None
    if found is None or not found.link_id:
        return []
    folder = split(path)[0]
    steps = sorted(_steps({entry.name: entry for entry in storage.list(folder)}).items())
    others = (join(folder, name) for _, name in steps if join(folder, name) != path)
    same = ((other, storage.stat(join(other, file))) for other in others)
    return [other for other, entry in same if entry is not None and entry.link_id == found.link_id]


def damage_mark(path: str) -> str:
    """Where the mark of damage of the checkpoint at ``path`` is."""
    folder, name = split(path)
    return join(folder, f"{DAMAGED_PREFIX}{name}.json")


def read_mark(storage: Storage, path: str, record_id: str) -> str | None:
    """What a loader found wrong with the checkpoint whose commit record is ``record_id``; None if nothing."""
    mark = damage_mark(path)
    if storage.stat(mark) is None:
        return None
    try:
        said = typed(parse_json(storage.read(mark, MAX_MARK_NBYTES), mark, "a mark"), _DamageMark, mark)
        return said.reason if said.record_id == record_id else None
    except FormatError:
        return None  # not one of ours
    except StorageError as error:
        if error.errno not in _UNFIT:
            raise
        return None


def note_remote(storage: Storage, folder: str, remote: str) -> None:
    """Record in a run's folder where its steps are copied to, for those who list them."""
    storage.replace(join(folder, REMOTE_NAME), json.dumps({"remote_folder": remote}).encode())


def remote_of(storage: Storage, folder: str) -> str:
    """Where the steps of a run's folder are copied to; empty if nowhere, or nothing is known of it."""
    name = join(folder, REMOTE_NAME)
    if storage.stat(name) is None:
        return ""
    try:
        said = json.loads(storage.read(name, MAX_MARK_NBYTES))["remote_folder"]
    except (ValueError, KeyError, TypeError, RecursionError, StorageError):
        return ""
    return said if isinstance(said, str) and is_known(said) else ""


def pin_mark(path: str) -> str:
    """Where the pin of the step at ``path`` is."""
    folder, name = split(path)
    return join(folder, PINNED_PREFIX + name)


def pin(storage: Storage, folder: str, step: int) -> None:
    """Keep a step from ever being pruned. No error if it is pinned already.

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
    if step not in _steps(_list_run(storage, folder)[0]):
        storage.remove(pin_mark(path))
        raise CheckpointNotFoundError(f"{storage.root}/{path} was deleted before it could be pinned", path=path)


def unpin(storage: Storage, folder: str, step: int) -> None:
    """Take the pin away. No error if there is none."""
    storage.remove(pin_mark(join(folder, step_name(step))))
    storage.sync_folder(folder)
