"""The contents of a run's folder: committed, incomplete, damaged and external steps. The only scanner.

Resume, retention, ``milepost ls`` and ``milepost prune`` all use it, so they can't disagree. Only metadata is read: a
commit record, and the sizes of the files that it names. Checking bytes is the job of ``milepost.verification``; a load
that finds damaged ones marks the step (:func:`mark_damaged`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from milepost.collective.threads import map_in_threads
from milepost.errors import FormatError, NewerFormatError, Problem, StorageError, listed
from milepost.format.manifest import MANIFEST_NAME, METADATA_NAME, PART_NAME, Lineage, Manifest
from milepost.format.manifest_json import (
    MAX_HEAD_NBYTES,
    MAX_MANIFEST_NBYTES,
    Head,
    is_intact,
    lineage_of_torn,
    listing_of,
    parse_head,
)
from milepost.format.summary import model_total, totals_by_part
from milepost.format.tags import tag_of
from milepost.run.checkpoint_record import (
    UNFIT,
    files_in,
    id_by_head,
    id_of_record,
    misnamed,
    parse_record,
    record_name,
    saved_over,
)
from milepost.run.marks import read_mark, write_damage_mark
from milepost.run.node_part import NodePart, part_of_manifest
from milepost.run.step_names import PINNED_PREFIX, damage_mark, list_run, step_name, steps_in
from milepost.storage.base import Entry, Storage, join, split

State = Literal["committed", "part", "incomplete", "damaged", "external", "newer", "unreadable"]
"""``part``: one node's part of a step, where each node has its own folder. ``newer``: apparently committed, in a newer
format than this version reads. ``unreadable``: the storage refused, so nothing is known; only listings tolerate it."""

_STATES: Mapping[str, State] = {MANIFEST_NAME: "committed", PART_NAME: "part", METADATA_NAME: "external"}
"""The state of a folder with this commit record, unless there is a fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """The state of a folder, as far as its metadata tells.

    ``reason`` says why it is not simply committed. ``kind`` and ``layout`` are the manifest's, empty when unknown;
    ``dtype`` is the one that most of the model has. ``record_id`` identifies the commit record, so that a mark of
    damage is not taken for one of a later save at the same place. ``lineage`` is also given for a step whose record is
    damaged elsewhere. ``has_training_state``: it holds optimizer state or train state. ``part`` is
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
    """Part of ``nbytes`` in files shared with other steps: deleting only this step does not free it."""
    part: NodePart | None = None

    @property
    def name(self) -> str:
        """The name of the folder itself."""
        return split(self.path)[1]

    @property
    def is_usable(self) -> bool:
        """True if it can be loaded, judging by metadata."""
        return self.state in ("committed", "external")

    @property
    def is_resumable(self) -> bool:
        """True if training can resume from it: it can be loaded, and holds more than weights."""
        return self.is_usable and (self.kind == "full" or (self.kind == "state" and self.has_training_state))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEntry(CheckpointInfo):
    """A step of a run. ``is_link``: the step is a link to a folder elsewhere, which is not the run's to delete."""

    step: int
    pinned: bool = False
    is_link: bool = False


def scan(storage: Storage, folder: str, *, keep_going: bool = False) -> list[StepEntry]:
    """List the steps in a run's folder, oldest first; empty if there is no such folder.

    ``keep_going``: list a step that the storage refuses to read as ``unreadable``, for callers that only show the list.

    Raises:
        StorageError: the storage can't be read. Malformed steps are listed as damaged.
    """
    names, inside = list_run(storage, folder)
    steps = sorted(steps_in(names).items())

    def look(numbered: tuple[int, str]) -> CheckpointInfo | None:
        path = join(folder, numbered[1])
        try:
            return examine(storage, path, marks=names, files=inside.get(numbered[1]))
        except StorageError as error:
            if not keep_going:
                raise
            return CheckpointInfo(path=path, state="unreadable", reason=error.message)

    # Concurrently where each step costs a request.
    infos = map_in_threads(look, steps, storage.num_streams if inside else 1, name="milepost-scan")
    entries = []
    for (step, name), info in zip(steps, infos, strict=True):
        if info is not None:  # not deleted meanwhile
            entries.append(
                StepEntry(
                    **{field: getattr(info, field) for field in CheckpointInfo.__slots__},
                    step=step,
                    pinned=PINNED_PREFIX + step_name(step) in names,
                    is_link=names[name].is_link,
                )
            )
    return _without_stale_lineages(entries)


def _without_stale_lineages(entries: list[StepEntry]) -> list[StepEntry]:
    """Ignore the lineage of a record that can't be read whole, if another step has that place in the order of commits.

    A lost write can leave a sector of an earlier record in it: the damaged step would count as no newer than that one.
    """
    orders = {entry.lineage.order for entry in entries if entry.lineage is not None and entry.kind}
    return [
        replace(entry, lineage=None)
        if entry.lineage is not None and not entry.kind and entry.lineage.order in orders
        else entry
        for entry in entries
    ]


def examine(
    storage: Storage,
    path: str,
    *,
    marks: Collection[str] | None = None,
    files: Mapping[str, Entry] | None = None,
) -> CheckpointInfo | None:
    """Determine what the folder at ``path`` holds; None if there is no folder.

    ``marks`` are the names beside it, and ``files`` the entries in it, if the caller has listed them already.
    """
    info = _look(storage, path, files_in(storage, path) if files is None else files)
    if info is not None and info.state == "damaged":
        info = _look(storage, path, files_in(storage, path))  # a new save may have replaced it between two of our reads
    if info is None or not (info.is_usable or info.state == "part"):
        return info
    if marks is not None and split(damage_mark(path))[1] not in marks:
        return info
    said = read_mark(storage, path, info.record_id)
    return replace(info, state="damaged", reason=said) if said is not None else info


def mark_damaged(storage: Storage, path: str, reason: str, *, now: float) -> None:
    """Mark the checkpoint at ``path`` as damaged, beside it, so that scans list it as damaged.

    The mark applies to the present save, not to a later one at the same path. ``now`` is in seconds since the epoch.
    Does nothing if the checkpoint is gone.
    """
    info = _look(storage, path, files_in(storage, path))
    if info is None or not info.record_id:
        return
    write_damage_mark(storage, path, info.record_id, reason, now=now)


def steps_that_share(storage: Storage, path: str, file: str) -> list[str]:
    """The other steps in the folder that share the file ``file`` of the checkpoint at ``path`` by a hard link."""
    found = storage.stat(join(path, file)) if file else None
    if found is None or not found.link_id:
        return []
    folder = split(path)[0]
    steps = sorted(steps_in({entry.name: entry for entry in storage.list(folder)}).items())
    others = (join(folder, name) for _, name in steps if join(folder, name) != path)
    same = ((other, storage.stat(join(other, file))) for other in others)
    return [other for other, entry in same if entry is not None and entry.link_id == found.link_id]


def _look(storage: Storage, path: str, files: Mapping[str, Entry]) -> CheckpointInfo | None:
    name = record_name(files) or (PART_NAME if PART_NAME in files else None)
    if name is None:
        return _without_record(storage, path, files)
    found = _Record(name)
    record_id, lineage = "", None
    try:
        found.read(storage, path, files)
        return found.describe(path, files)
    except FormatError as error:
        state: State = "newer" if isinstance(error, NewerFormatError) else "damaged"
        reason = error.message.removeprefix(f"{path}/")  # the caller's message names the step
        record_id = found.record_id
        if state == "damaged" and found.name == MANIFEST_NAME:
            lineage = lineage_of_torn(found.data)
    except StorageError as error:
        if error.errno not in UNFIT:
            raise  # for instance a server that is down or too many open files: nothing is known about the step
        state, reason = "damaged", error.message
    nbytes = sum(entry.nbytes for entry in files.values())
    return CheckpointInfo(path=path, state=state, reason=reason, nbytes=nbytes, record_id=record_id, lineage=lineage)


def _without_record(storage: Storage, path: str, files: Mapping[str, Entry]) -> CheckpointInfo | None:
    """Describe a folder without a commit record; None if there is no folder, or only a save in progress in it."""
    if not files and storage.stat(path) is None:
        return None
    if files and all(map(tag_of, files)):
        return None  # of a save in progress or a stale one, on a storage where attempts have no folder of their own
    reason = f"it was never committed: neither {MANIFEST_NAME} nor {METADATA_NAME} is there"
    nbytes = sum(entry.nbytes for entry in files.values())
    return CheckpointInfo(path=path, state="incomplete", reason=reason, nbytes=nbytes)


class _Record:
    """The commit record of a folder: after an error of :meth:`read`, as far as it was read."""

    def __init__(self, name: str):
        self.name = name
        self.record_id = ""
        self.data = b""
        """The record's bytes; empty if its head was enough."""
        self._manifest: Manifest | None = None
        self._faults: list[Problem] = []
        self._note = ""

    def read(self, storage: Storage, path: str, files: Mapping[str, Entry]) -> None:
        """Read the record, and compare the existing files with it.

        Raises:
            FormatError: it is malformed or incomplete, or was written by a newer version (``NewerFormatError``).
        """
        head = _fitting_head(storage, path, files) if self.name == MANIFEST_NAME else None
        if head is not None:
            self._manifest, self.record_id = head.manifest, id_by_head(head, files[self.name].nbytes)
            return
        self.data = storage.read(join(path, self.name), MAX_MANIFEST_NBYTES)
        self.record_id = id_of_record(self.data)
        self._manifest, self._faults = parse_record(self.data, self.name, path, files)
        other = saved_over(storage, path, files, self._manifest, self._faults)
        if other is not None:
            self.name, self._faults = METADATA_NAME, []
            self.data, self._manifest, self._note = other
            self.record_id = id_of_record(self.data)

    def describe(self, path: str, files: Mapping[str, Entry]) -> CheckpointInfo:
        """Describe the folder by the record. Raises FormatError if it is an invalid one of a node's part."""
        manifest = self._manifest
        assert manifest is not None
        faults = [*self._faults, *misnamed(manifest, path)]
        part = part_of_manifest(manifest.extra, path) if self.name == PART_NAME and not faults else None
        model = model_total(manifest)
        return CheckpointInfo(
            path=path,
            state="damaged" if faults else _STATES[self.name],
            reason="; ".join(listed(faults)) or (str(part) if part is not None else self._note),
            kind=manifest.kind,
            nbytes=sum(entry.nbytes for file, entry in files.items() if tag_of(file) in ("", manifest.save_id)),
            created_s=manifest.created_s,
            save_id=manifest.save_id,
            world_size=manifest.world_size,
            record_id=self.record_id,
            dtype=model.dtypes[0] if model.dtypes else "",
            num_parameters=model.num_elements,
            layout=manifest.layout,
            lineage=manifest.lineage,
            metrics=manifest.metrics,
            shared_nbytes=sum(entry.nbytes for entry in files.values() if entry.link_id),
            has_training_state=any(total.part in ("optimizer", "train_state") for total in totals_by_part(manifest)),
            part=part,
        )


def _fitting_head(storage: Storage, path: str, files: Mapping[str, Entry]) -> Head | None:
    """The head of a manifest, if the existing files are exactly those it lists; otherwise the caller reads the rest.

    This is all that a scan reads of a step: one request, whatever the step's size.
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
    # Where saves share a folder, the names of a save's files carry its id; other files belong to another save or are
    # copies for other programs. Elsewhere no name carries one.
    others = [file for file in files.values() if file.name != MANIFEST_NAME]
    own = [file for file in others if tag_of(file.name) == head.manifest.save_id]
    found = listing_of((file.name, file.nbytes) for file in own or others if not file.is_link)
    return head if found == head.listing else None
