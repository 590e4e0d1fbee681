"""Checks of a committed checkpoint: its small files must agree with each other, its records hold their bytes."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from milepost.errors import FormatError, Problem, StorageError, listed
from milepost.format import dcp_metadata
from milepost.format.digest import BlockDigests, crc32, parse_digests
from milepost.format.manifest import DIGESTS_NAME, METADATA_NAME, SHARDS_NAME, Manifest, ShardEntry
from milepost.format.tags import tag_of, untagged
from milepost.run.checkpoint_record import CommitRecord
from milepost.run.hf_folder import is_hf_step
from milepost.storage.base import ReadHandle, Storage, counted, join
from milepost.verification.extent_reader import ExtentReader, Findings
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
from milepost.verification.weights import WeightsCheck

SAMPLE_NBYTES = 2 << 30
"""Size limit of a sample in bytes; it has at least one record."""


def unreadable_file(error: FormatError, path: str) -> Problem:
    """Return an error of reading the checkpoint at ``path`` as a problem, which names the file relative to ``path``."""
    file = (error.path or path).rpartition("/")[2]
    return Problem(error.message.removeprefix(f"{error.path}: "), file, error.key)


def check_checkpoint(
    storage: Storage,
    path: str,
    record: CommitRecord,
    level: Level,
    findings: Findings,
    num_threads: int,
    *,
    with_tensors: bool,
) -> None:
    """Check a committed checkpoint, whose commit record is read already, and add the problems to ``findings``.

    Without ``with_tensors`` the data of its tensors is not read.
    """
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
    _report_unlisted(record, findings)
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


def _report_unlisted(record: CommitRecord, findings: Findings) -> None:
    """Report files of data that the commit record does not list."""
    for name in sorted(record.files):
        # One with another save's id belongs to a replaced checkpoint or to a save in progress.
        is_own = tag_of(name) in ("", record.manifest.save_id)
        if name.endswith(".distcp") and name not in record.manifest.files and is_own and record.is_own:
            findings.add(Problem("it is not part of this checkpoint", name))


def _check_hf_step(
    storage: Storage, path: str, record: CommitRecord, level: Level, findings: Findings, num_threads: int
) -> None:
    broken = {fault.file for fault in record.faults}
    names = [name for name in record.manifest.files if name not in broken]
    try:
        step = read_hf_step(storage, path, [record.name, *names])
    except FormatError as error:
        findings.add(unreadable_file(error, path))
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
        findings.add(unreadable_file(error, path))
    return digests


def _check_alias(storage: Storage, path: str, name: str, content: bytes, findings: Findings) -> None:
    """Check the copy of ``.metadata`` through which stock DCP finds a checkpoint in an object store.

    It follows the commit: that it is not there yet, or still the previous save's, is no damage.
    """
    if name == METADATA_NAME:
        return
    try:
        found = storage.read(join(path, METADATA_NAME))
        if found == content:
            return
        saved = [entry.name for entry in storage.list(path) if untagged(entry.name) == METADATA_NAME]
        is_replaced = any(storage.read(join(path, other)) == found for other in saved if tag_of(other))
    except StorageError as error:
        if error.errno != errno.ENOENT:
            findings.add(Problem(error.message, METADATA_NAME))
            return
        is_replaced = True
    if is_replaced:
        findings.notes.append(
            f"other programs can't open it yet: {METADATA_NAME} is missing, or still the replaced save's. The run that "
            "saves there writes it, or if that died, its next start or `milepost prune`"
        )
    else:
        findings.add(Problem("it belongs to another save than milepost.json", METADATA_NAME))


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
