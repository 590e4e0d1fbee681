"""``verify``: check that a checkpoint is what was saved. Read-only, without torch, at the speed of the disk.

There are four levels, each of which includes the previous one:

==========  ==============================================================================================
metadata    commit record, ``.metadata`` and digests are whole and agree with each other
sizes       every file that is named is there and has its size
sample      up to 256 records, chosen at random, byte by byte
full        every byte of every file: data against its digest, headers and footers against what they must be,
            padding against zero
==========  ==============================================================================================

An external checkpoint has no digests except the CRC-32s of its zip records; bytes outside these (zip headers, padding)
are counted in ``unchecked_nbytes``. Weights outside a run (Hugging Face folders, safetensors and ``torch.save`` files)
are checked as far as possible, see ``weights``. Data that can't be checked is never reported verified.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from milepost.errors import CheckpointNotFoundError, ConfigError, FormatError, Problem, StorageError, listed
from milepost.format import dcp_metadata
from milepost.format.digest import BlockDigests, crc32, parse_digests
from milepost.format.manifest import DIGESTS_NAME, MANIFEST_NAME, METADATA_NAME, SHARDS_NAME, Manifest, ShardEntry
from milepost.format.tags import tag_of, untagged
from milepost.run import catalog, checkpoint_record, marks
from milepost.run.catalog import CheckpointInfo, State
from milepost.run.checkpoint_record import CommitRecord
from milepost.run.hf_folder import is_hf_folder, is_hf_step
from milepost.run.step_names import damage_mark
from milepost.storage import open_storage
from milepost.storage.base import ReadHandle, Storage, counted, join, split
from milepost.verification.extent_reader import ExtentReader, Findings, Progress
from milepost.verification.extents import (
    SAMPLE_RECORDS,
    Data,
    Extent,
    Level,
    PlacedRecord,
    external_record,
    own_record,
    records_of,
    sampled,
    unknown,
    zeros,
)
from milepost.verification.hf_step import read_hf_step
from milepost.verification.weights import WeightsCheck, may_be_weights

__all__ = [
    "LEVELS",
    "Level",
    "Problem",
    "Progress",
    "Verdict",
    "VerifyReport",
    "verify",
    "verify_beside_tensors",
    "verify_in",
    "verify_run",
]

Verdict = Literal["ok", "not_verified", "damaged"]
LEVELS: tuple[Level, ...] = get_args(Level)

SAMPLE_NBYTES = 2 << 30
"""Size limit of a sample in bytes; it has at least one record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The result of a verification. Sizes are in bytes."""

    path: str
    state: State
    """State in the catalog, before any data was read."""
    level: Level
    problems: tuple[Problem, ...]
    """The first 1000 problems, by file and offset."""
    num_problems: int
    num_items: int
    """Number of stored shards and objects."""
    nbytes: int
    """Total size of all files."""
    read_nbytes: int
    unchecked_nbytes: int
    """Bytes without digests."""
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """``damaged``: there are problems. ``not_verified``: none was found, but there are bytes without digests."""
        if self.problems:
            return "damaged"
        return "not_verified" if self.unchecked_nbytes else "ok"

    @property
    def is_sound(self) -> bool:
        """True if everything at this level could be checked, and no problem was found."""
        return self.verdict == "ok"


def verify(
    path: str | os.PathLike[str],
    level: Level = "full",
    *,
    num_threads: int = 2,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check the checkpoint, Hugging Face folder, safetensors or ``torch.save`` file at ``path``.

    Damage is reported, not raised.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint.
        ConfigError: there is no such level.
        StorageError: the storage can't be read at all.
    """
    storage, name = open_storage(path)
    return verify_in(storage, name, level, num_threads=num_threads, progress=progress)


def verify_in(
    storage: Storage,
    path: str,
    level: Level = "full",
    *,
    num_threads: int = 2,
    progress: Progress | None = None,
) -> VerifyReport:
    """Verify ``path`` in an open storage, see :func:`verify`."""
    if level not in LEVELS:
        raise ConfigError(f"there is no verification level {level!r}; levels are {', '.join(LEVELS)}")
    found = storage.stat(path)
    if found is not None and not found.is_folder and may_be_weights(path):
        return _verify_weights(storage, path, None, level, num_threads, progress)
    record = storage.stat(join(path, MANIFEST_NAME))
    if record is not None and record.is_link:
        names = [entry.name for entry in storage.list(path) if not entry.is_folder]
        if is_hf_folder(names):  # one of our steps, downloaded from the hub
            return _verify_weights(storage, path, names, level, num_threads, progress)
    info = catalog.examine(storage, path)
    if info is None or info.state == "incomplete":
        names = [entry.name for entry in storage.list(path) if not entry.is_folder]
        if is_hf_folder(names):
            return _verify_weights(storage, path, names, level, num_threads, progress)
        reason = info.reason if info is not None else "there is no such folder"
        raise CheckpointNotFoundError(f"{storage.root}/{path} is not a checkpoint: {reason}", path=path)
    return _verify_checkpoint(storage, path, info, level, num_threads, progress)


def verify_beside_tensors(storage: Storage, path: str) -> tuple[Problem, ...]:
    """Verify the committed step at ``path`` except its tensors' data, for a caller that checks it while reading.

    Raises:
        CheckpointNotFoundError: there is no committed step.
        StorageError: the storage can't be read at all.
    """
    info = catalog.examine(storage, path)
    if info is None or not info.is_usable:
        raise CheckpointNotFoundError(f"{storage.root}/{path} is not a committed step", path=path)
    return _verify_checkpoint(storage, path, info, "full", 1, None, with_tensors=False).problems


def _verify_checkpoint(
    storage: Storage,
    path: str,
    info: CheckpointInfo,
    level: Level,
    num_threads: int,
    progress: Progress | None,
    *,
    with_tensors: bool = True,
) -> VerifyReport:
    started = time.monotonic()
    findings = Findings(progress, total_nbytes=info.nbytes if level == "full" else 0)
    num_items = 0
    notes: tuple[str, ...] = ()
    try:
        record = checkpoint_record.read_record(storage, path)
    except FormatError as error:
        findings.add(_problem_of(error, path))
    except (CheckpointNotFoundError, StorageError):
        _check_still_there(storage, path, info.record_id)
        raise
    else:
        manifest = record.manifest
        record_nbytes = sum(record.files[name].nbytes for name in record.read)
        findings.count_read(record_nbytes, unchecked_nbytes=0 if record.is_own else record_nbytes)
        notes = _notes(record)
        num_items = sum(len(tensor.shards) for tensor in manifest.tensors.values()) + len(manifest.objects)
        for fault in checkpoint_record.misnamed(manifest, path):
            findings.add(fault)
        _check(storage, path, record, level, findings, num_threads, with_tensors=with_tensors)
    if findings.num_problems:
        _check_still_there(storage, path, info.record_id)
    return VerifyReport(
        path=f"{storage.root}/{path}",
        state=info.state,
        level=level,
        notes=(*notes, *_shared(storage, path, findings), *_consider_mark(storage, info, level, findings)),
        problems=findings.merged(),
        num_problems=findings.num_problems,
        num_items=num_items,
        nbytes=info.nbytes,
        read_nbytes=findings.read_nbytes,
        unchecked_nbytes=findings.unchecked_nbytes,
        seconds=time.monotonic() - started,
    )


def _verify_weights(
    storage: Storage, path: str, names: Sequence[str] | None, level: Level, num_threads: int, progress: Progress | None
) -> VerifyReport:
    """Verify weights outside a run: a folder with the files ``names``, or one file if None."""
    started = time.monotonic()
    findings = Findings(progress)
    check = WeightsCheck(storage, findings, num_threads=num_threads, level=level)
    if names is None:
        check.file(path)
    else:
        try:
            check.hf_folder(path, names, read_hf_step(storage, path, names))
        except FormatError as error:
            findings.add(_problem_of(error, path))
    return VerifyReport(
        path=f"{storage.root}/{path}",
        state="external",
        level=level,
        notes=tuple(check.notes),
        problems=findings.merged(),
        num_problems=findings.num_problems,
        num_items=check.num_items,
        nbytes=check.nbytes,
        read_nbytes=findings.read_nbytes,
        unchecked_nbytes=findings.unchecked_nbytes,
        seconds=time.monotonic() - started,
    )


def verify_run(
    storage: Storage,
    folder: str,
    level: Level = "full",
    *,
    num_threads: int = 2,
    on_step: Callable[[int], Progress | None] = lambda step: None,
) -> list[VerifyReport]:
    """Check every committed step in a run's folder, oldest first.

    ``on_step`` is called with each step before it is read, and may return a progress callback.

    Raises:
        CheckpointNotFoundError: the folder holds no step, or none that was ever committed.
    """
    entries = catalog.scan(storage, folder)
    committed = [entry for entry in entries if entry.state != "incomplete"]
    if not committed:
        what = "only steps that were never committed" if entries else "no steps"
        raise CheckpointNotFoundError(f"{storage.root}/{folder} holds {what}", path=folder)
    reports = []
    for entry in committed:
        # A live run deletes and replaces steps while we read.
        with contextlib.suppress(CheckpointNotFoundError):
            progress = on_step(entry.step)
            reports.append(verify_in(storage, entry.path, level, num_threads=num_threads, progress=progress))
    return reports


def _notes(record: CommitRecord) -> tuple[str, ...]:
    notes = [record.note] if record.note else []
    if not record.is_own:  # other programs leave files of an older save, or of one with more ranks
        stale = [name for name in sorted(record.files) if name.endswith(".distcp")]
        stale = [name for name in stale if name not in record.manifest.files]
        if stale:
            notes.append(f"not part of this checkpoint, left by another save: {', '.join(listed(stale))}")
    return tuple(notes)


def _problem_of(error: FormatError, path: str) -> Problem:
    """Check a small file of the checkpoint at ``path``; the problem names it once, relative to ``path``."""
    file = (error.path or path).rpartition("/")[2]
    return Problem(error.message.removeprefix(f"{error.path}: "), file, error.key)


def _check_still_there(storage: Storage, path: str, record_id: str) -> None:
    """Raise if the step was deleted or replaced meanwhile: that would look like damage."""
    info = catalog.examine(storage, path)
    if info is None or info.record_id != record_id:
        raise CheckpointNotFoundError(
            f"{storage.root}/{path} was deleted or replaced while it was being verified", path=path
        )


def _shared(storage: Storage, path: str, findings: Findings) -> Iterator[str]:
    """Find the other steps that share a damaged file, and are damaged too."""
    for file in dict.fromkeys(problem.file for problem in findings.merged() if problem.file):
        others = [split(other)[1] for other in catalog.steps_that_share(storage, path, file)]
        if others:
            yield f"{', '.join(listed(others))} share {file} (by hard links): these steps are damaged too"


def _consider_mark(storage: Storage, info: CheckpointInfo, level: Level, findings: Findings) -> tuple[str, ...]:
    """Report a loader's damage mark, unless every byte was just verified."""
    said = marks.read_mark(storage, info.path, info.record_id)
    if said is None:
        return ()
    if level == "full" and not findings.num_problems:
        mark = f"{storage.root}/{damage_mark(info.path)}"
        return (f"a loader found it damaged ({said}), but now every byte is verified; to use it again remove {mark}",)
    findings.add(Problem(f"a loader found it damaged: {said}", info.name))
    return ()


def _check(
    storage: Storage,
    path: str,
    record: CommitRecord,
    level: Level,
    findings: Findings,
    num_threads: int,
    *,
    with_tensors: bool,
) -> None:
    is_hf = is_hf_step(record.manifest)
    digests = _check_metadata(storage, path, record, findings) if record.is_own and not is_hf else None
    # Creates an object per shard, so only if needed.
    placed = records_of(record.manifest) if level in ("sample", "full") or record.faults else {}
    if level != "metadata":
        for fault in record.faults:
            findings.add(_with_lost_keys(fault, record, placed.get(fault.file, [])))
    if is_hf:
        _check_hf_step(storage, path, record, level, findings, num_threads)
        return
    if level == "metadata":
        return
    for name in sorted(record.files):
        # One with another save's id belongs to a replaced checkpoint or to a save in progress.
        is_own = tag_of(name) in ("", record.manifest.save_id)
        if name.endswith(".distcp") and name not in record.manifest.files and is_own and record.is_own:
            findings.add(Problem("it is not part of this checkpoint", name))
    if level == "sizes" or (record.is_own and digests is None):
        return  # data without digests can't be checked
    if level == "sample":
        placed = sampled(placed, random.Random(), SAMPLE_RECORDS, SAMPLE_NBYTES)
        findings.total_nbytes += sum(one.stop - one.start for records in placed.values() for one in records)
    reader = ExtentReader(findings, num_threads)
    for name, records in sorted(placed.items()):
        if name not in record.files or record.files[name].is_link:
            continue  # already reported
        is_cut = record.files[name].nbytes < record.manifest.files[name].nbytes
        records = [one for one in records if not is_cut or one.stop <= record.files[name].nbytes]
        try:
            handle = storage.open_read(join(path, name))
        except StorageError as error:
            findings.add(Problem(error.message, name))
            continue
        with handle:
            file_nbytes = record.manifest.files[name].nbytes if level == "full" and not is_cut else None
            extents = _extents(handle, name, records, file_nbytes, digests, findings)
            if with_tensors:
                whole = file_nbytes is not None
                handle.will_read([(0, file_nbytes or 0)] if whole else [(one.start, one.stop) for one in records])
            else:
                tensors = {one.key for one in records if isinstance(one.entry, ShardEntry)}
                extents = (one for one in extents if not isinstance(one, Data) or one.key not in tensors)
            reader.check(handle, name, extents)


def _check_hf_step(
    storage: Storage, path: str, record: CommitRecord, level: Level, findings: Findings, num_threads: int
) -> None:
    broken = {fault.file for fault in record.faults}
    names = [name for name in record.manifest.files if name not in broken]
    try:
        step = read_hf_step(storage, path, [record.name, *names])
    except FormatError as error:
        findings.add(_problem_of(error, path))
        return
    WeightsCheck(storage, findings, num_threads=num_threads, level=level).hf_folder(path, names, step)


def _with_lost_keys(fault: Problem, record: CommitRecord, records: Sequence[PlacedRecord]) -> Problem:
    """Report a missing or truncated file, and the records lost with it, as one problem."""
    found = record.files.get(fault.file)
    lost = [one.key for one in records if found is None or one.stop > found.nbytes]
    if not lost or (found is not None and found.is_link):
        return fault
    keys = ", ".join(listed(list(dict.fromkeys(lost)), 5))
    return replace(fault, message=f"{fault.message}; {counted(len(lost), 'record')} lost: {keys}")


def _extents(
    handle: ReadHandle,
    name: str,
    records: Sequence[PlacedRecord],
    file_nbytes: int | None,
    digests: BlockDigests | None,
    findings: Findings,
) -> Iterator[Extent]:
    """Yield the expected content of a file; also between the records if ``file_nbytes`` is given.

    A record that can't be laid out is reported as a problem.
    """
    gap = zeros if digests is not None else unknown
    position = 0
    for record in records:
        if file_nbytes is not None and record.start > position:
            yield from gap(position, record.start)
        position = record.stop
        try:
            yield from own_record(handle, record, digests) if digests is not None else external_record(handle, record)
        except (FormatError, StorageError) as error:
            findings.add(Problem(error.message, name, record.key, (record.start, record.stop)))
    if file_nbytes is not None and file_nbytes > position:
        yield from gap(position, file_nbytes)


def _check_metadata(storage: Storage, path: str, record: CommitRecord, findings: Findings) -> BlockDigests | None:
    """Check the small files of our own commit; returns the digests if they are valid."""
    contents: dict[str, bytes] = {}
    for name, entry in record.manifest.files.items():
        is_record = untagged(name) in (METADATA_NAME, DIGESTS_NAME)
        is_small = is_record or record.manifest.file_named(SHARDS_NAME) is None
        if not is_small or entry.crc32 is None or any(fault.file == name for fault in record.faults):
            continue
        try:
            content = storage.read(join(path, name))
        except StorageError as error:
            findings.add(Problem(error.message, name))
            continue
        findings.count_read(len(content))
        if crc32(content) == entry.crc32:
            contents[name] = content
        else:
            findings.add(Problem("it changed after it was written", name, byte_range=(0, entry.nbytes)))
    metadata, block_digests = (record.manifest.file_named(name) for name in (METADATA_NAME, DIGESTS_NAME))
    for name, found in ((METADATA_NAME, metadata), (DIGESTS_NAME, block_digests)):
        if found is None:
            findings.add(Problem("the manifest does not list it", name))
    digests = None
    try:
        if metadata in contents:
            _check_agreement(contents[metadata], record.manifest, findings)
            _check_alias(storage, path, metadata, contents[metadata], findings)
        if block_digests in contents:
            digests = parse_digests(contents[block_digests], record.manifest)
            _check_item_digests(record.manifest, digests, findings)
    except FormatError as error:
        findings.add(_problem_of(error, path))
    return digests


def _check_alias(storage: Storage, path: str, name: str, content: bytes, findings: Findings) -> None:
    """Check the copy of ``.metadata`` through which stock DCP finds a checkpoint in an object store."""
    if name == METADATA_NAME:
        return
    try:
        if storage.read(join(path, METADATA_NAME)) != content:
            findings.add(Problem("it belongs to another save than milepost.json", METADATA_NAME))
    except StorageError as error:
        findings.add(Problem(error.message, METADATA_NAME))


def _check_agreement(data: bytes, manifest: Manifest, findings: Findings) -> None:
    """Check that ``.metadata``, read by stock DCP, and the manifest point to the same bytes."""
    from milepost.format.dcp_writer import is_metadata_of  # imports numpy, which listing the options does not need

    if is_metadata_of(data, manifest):
        return
    sizes = {name: entry.nbytes for name, entry in manifest.files.items()}
    other = dcp_metadata.manifest_from_metadata(dcp_metadata.parse_metadata(data), sizes)
    for key in sorted(manifest.tensors.keys() | other.tensors.keys() | manifest.objects.keys() | other.objects.keys()):
        if _places(manifest, key) != _places(other, key):
            findings.add(Problem("its entry of the key differs from milepost.json", METADATA_NAME, key))


def _places(manifest: Manifest, key: str) -> object:
    """Return dtype, shape and locations of all data stored under a key."""
    tensor, entry = manifest.tensors.get(key), manifest.objects.get(key)
    shards = {
        (shard.box, shard.file, shard.record_offset, shard.record_nbytes)
        for shard in (tensor.shards if tensor is not None else ())
        if shard.data_nbytes
    }
    return (
        tensor and (tensor.dtype, tensor.shape),
        shards,
        entry and (entry.file, entry.record_offset, entry.record_nbytes),
    )


def _check_item_digests(manifest: Manifest, digests: BlockDigests, findings: Findings) -> None:
    """Check that the digest of each shard is the combination of its blocks' digests."""
    import numpy as np

    from milepost.format.columns import table_of
    from milepost.format.shard_crcs import shard_crcs

    table = table_of(manifest)
    unlike = np.flatnonzero(shard_crcs(table, digests.crcs, digests.block_nbytes) != table.crc32)
    for row in unlike.tolist():
        tensor = int(np.searchsorted(table.first, row, side="right")) - 1
        box = table.tilings[table.tiling[tensor]].boxes[row - int(table.first[tensor])]
        findings.add(
            Problem(f"its digests of shard {box} differ from the manifest's", DIGESTS_NAME, table.keys[tensor])
        )
