"""Copy one node's part of a step to the run's remote folder, where all nodes' parts form one checkpoint.

Each node's process does this for its own part; they cooperate in the attempt like the ranks of a save::

    <attempt>/part-<node>       offer      the node's content; with those of lower nodes: what it must copy
    __<rank>_0.distcp           copy       the records that no lower node has, packed, each compared with its digest
    <attempt>/sign-off-<node>   sign_off   its files are durable
    step-<N>/                   publish    by node 0, once all have signed off

Replicas on several nodes are copied once, by the lowest of them. Torch-free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from milepost.errors import CheckpointDamagedError, SaveError, StorageError
from milepost.format.box import Box
from milepost.format.columns import Objects, ShardTable, Tensors, table_of
from milepost.format.digest import BlockDigests, crc32
from milepost.format.manifest import Manifest, ObjectEntry, ShardEntry
from milepost.format.record import record_footer, tensor_record
from milepost.format.segments import Segment
from milepost.run import catalog, checkpoint_record, commit, retention
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import adopt_attempt, remove_records
from milepost.run.node_part import PART_KEY, NodePart, part_of_manifest
from milepost.run.outcome import wait_for_outcome
from milepost.run.place import Place
from milepost.run.signoff import (
    SignOff,
    WrittenFile,
    WrittenObject,
    WrittenTensor,
    dump_sign_off,
    has_signed_off,
    parse_sign_off,
    ranks_in,
    segment_of,
    sign_off,
    wait_for_sign_offs,
    withdraw_sign_off,
)
from milepost.saving.copy_step import CopyProgress, CopyReport, Spot, attempt_of, begin_copy, drafted
from milepost.saving.writer import write_stream
from milepost.storage.base import ReadHandle, Storage, join
from milepost.tensors.plan import LARGE_ALIGNMENT, LARGE_RECORD_NBYTES, SMALL_ALIGNMENT, WriteItem, align

PIECE_NBYTES = 8 << 20
POLL_S = 0.25
WAIT_S = 6 * 3600.0
"""Seconds that nodes wait for each other: the slowest link decides; the starting process may end it earlier."""
LOOK_S = 2.0
ORPHAN_S = 120.0
"""The same once the process that requested the copy is dead: the others' may be dead too."""
_OFFER_PREFIX = "part-"


@dataclass(frozen=True, slots=True)
class _Record:
    """A record on this node, and its properties."""

    key: str
    entry: ShardEntry | ObjectEntry
    shard: int = 0
    """Index among the shards of its tensor."""
    dtype: str = ""
    shape: tuple[int, ...] = ()

    @property
    def is_large(self) -> bool:
        return isinstance(self.entry, ShardEntry) and self.entry.data_nbytes >= LARGE_RECORD_NBYTES


def report_to_nodes(dst: Spot, node: int, save_id: str, reason: str) -> bool:
    """Report to the other nodes that this one has nothing to copy. False if the copy has not begun there yet.

    Raises:
        StorageError: it can't be written there.
    """
    attempt = attempt_of(dst.path, save_id)
    names = dst.storage.names(attempt)
    if names and node not in ranks_in(names):
        sign_off(dst.storage, attempt, SignOff(node, save_id, error=reason))
    return bool(names)


def copy_part(src: Spot, dst: Spot, progress: CopyProgress | None = None) -> CopyReport:
    """Copy the part of a step at ``src``, and wait for the commit at ``dst`` with the other nodes' parts.

    Raises:
        CheckpointNotFoundError: there is no part at ``src``.
        CheckpointDamagedError: its bytes differ from what was saved.
        SaveError: another node gave up, or did not arrive.
        StorageError: one of the two refused. A retry does not repeat completed copies.
    """
    started = time.monotonic()
    record = checkpoint_record.read_part(src.storage, src.path)
    manifest = record.manifest
    part = part_of_manifest(manifest.extra, src.path)
    found = catalog.examine(dst.storage, dst.path)
    if found is not None and found.is_usable and found.save_id == manifest.save_id:
        return CopyReport(path=str(dst), nbytes=0, seconds=time.monotonic() - started, was_there=True)
    waiting = _Patience()
    attempt = _enter(dst, part, manifest.save_id, waiting)
    try:  # from here on an error is recorded in the attempt, where the other nodes wait
        record.require_undamaged(src.storage, src.path)
        digests = checkpoint_record.read_own_digests(src.storage, src.path, manifest)
        offers = _offered(dst.storage, attempt, part, manifest, digests, waiting)
        nbytes = _bring(src, dst, attempt, part, manifest, digests, offers, progress)
        _finish(dst, attempt, part, manifest, offers, waiting)
    except (CheckpointDamagedError, SaveError) as error:
        with suppress(StorageError):  # already recorded, or impossible: the others give up at their time-out
            sign_off(dst.storage, attempt, SignOff(part.node, manifest.save_id, error=error.message))
        raise
    return CopyReport(path=str(dst), nbytes=nbytes, seconds=time.monotonic() - started, was_there=False)


class _Patience:
    """The time to wait for other nodes: while the process that requested this copy lives, and a little longer."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._orphan_since: float | None = None
        self._deadline = time.monotonic() + WAIT_S

    def why_stop(self) -> str | None:
        """Return the reason to stop waiting, or None."""
        now = time.monotonic()
        if os.getppid() != self._parent:
            self._orphan_since = self._orphan_since or now
        if self._orphan_since is not None and now - self._orphan_since > ORPHAN_S:
            return "before this run ended"
        return f"within {WAIT_S / 3600:.0f} hours" if now > self._deadline else None

    def wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        """Return once ``is_so``. Raises SaveError, naming the missing ``what``, when the wait is over."""
        while not is_so():
            reason = self.why_stop()
            if reason is not None:
                raise SaveError(f"{what} did not arrive {reason}")
            time.sleep(POLL_S)


def _enter(dst: Spot, part: NodePart, save_id: str, waiting: _Patience) -> str:
    """Return the attempt: created by node 0, entered by the others."""
    if part.node == 0:
        attempt = begin_copy(dst, save_id, is_joint=True)
    else:
        attempt = attempt_of(dst.path, save_id)
        waiting.wait_for(lambda: bool(dst.storage.names(attempt)), "node 0, which starts the copy,")
        adopt_attempt(dst.storage, attempt)
    if not has_signed_off(dst.storage, attempt, part.node):
        withdraw_sign_off(dst.storage, attempt, part.node)  # an earlier attempt of this node failed or was killed
    return attempt


def _offered(
    storage: Storage,
    attempt: str,
    part: NodePart,
    manifest: Manifest,
    digests: BlockDigests,
    waiting: _Patience,
) -> list[ShardTable]:
    """Publish this node's part and return all nodes' parts, in order."""
    import numpy as np

    table = table_of(manifest)
    files = {name: manifest.files[name] for name in table.files}
    segment = Segment(table, files, np.fromiter(digests.crcs, np.uint32, len(digests.crcs)))
    mine = f"{attempt}/{_OFFER_PREFIX}{part.node}"
    storage.replace(mine, dump_sign_off(SignOff(part.node, manifest.save_id, segment)))
    names = [f"{_OFFER_PREFIX}{node}" for node in range(part.num_nodes)]

    def are_there() -> bool:
        present = {*storage.names(attempt)}
        missing = {node for node, name in enumerate(names) if name not in present}
        if failed := sorted(missing & ranks_in(present).keys()):  # it has signed off, so it will offer nothing
            raise SaveError(f"node {failed[0]} could not copy its part of the step: see its log", path=attempt)
        return not missing

    waiting.wait_for(are_there, "the copies of the other nodes")
    tables = []
    for node, name in enumerate(names):
        found = table if node == part.node else _table_in(storage, f"{attempt}/{name}")
        tables.append(found)
    return tables


def _table_in(storage: Storage, path: str) -> ShardTable:
    segment = parse_sign_off(storage.read(path), path).segment
    if segment is None:
        raise SaveError(f"{path} does not list its node's content", path=path)
    return segment.table


# ---- this node's part ----


def _bring(
    src: Spot,
    dst: Spot,
    attempt: str,
    part: NodePart,
    manifest: Manifest,
    digests: BlockDigests,
    offers: Sequence[ShardTable],
    progress: CopyProgress | None,
) -> int:
    """Copy the records that no lower node holds, and sign off. Returns the bytes sent."""
    storage, save_id = dst.storage, manifest.save_id
    if has_signed_off(storage, attempt, part.node):  # an earlier process of this node has copied everything
        return 0
    place = Place.of(storage, attempt, dst.path, save_id)
    by_file = _records(offers[part.node], offers[: part.node])
    sizes = {file: _packed(records)[1] for file, records in by_file.items()}
    present = {entry.name: entry.nbytes for entry in storage.list(place.folder) if place.holds(entry.name)}
    total, done, written, sent = sum(sizes.values()), 0, [], 0
    for file, records in by_file.items():
        if present.get(place.name(file)) != sizes[file]:
            _copy_records(src, storage, place, file, records)
            sent += sizes[file]
        done += sizes[file]
        if progress is not None:
            progress(done, total)
        written.append(_written(place.name(file), records, digests))
    storage.sync_folder(place.folder)
    sign_off(storage, attempt, SignOff(part.node, save_id, segment_of(written) if written else None))
    return sent


def _records(own: ShardTable, lower: Sequence[ShardTable]) -> dict[str, list[_Record]]:
    """Return by file, in file order, the records that no lower node has."""
    taken = {key: _boxes(key, lower) for key in own.keys}
    known = {key for table in lower for key in table.objects.keys}
    by_file: dict[str, list[_Record]] = {}
    for key, tensor in Tensors(own).items():
        for number, shard in enumerate(tensor.shards):
            if shard.box not in taken[key]:
                by_file.setdefault(shard.file, []).append(_Record(key, shard, number, tensor.dtype, tensor.shape))
    for key, entry in Objects(own).items():
        if key not in known:
            by_file.setdefault(entry.file, []).append(_Record(key, entry))
    return {
        file: sorted(records, key=lambda record: record.entry.record_offset)
        for file, records in sorted(by_file.items())
    }


def _boxes(key: str, tables: Sequence[ShardTable]) -> set[Box]:
    return {
        box for table in tables if key in table.index for box in table.tilings[table.tiling[table.index[key]]].boxes
    }


def _packed(records: Sequence[_Record]) -> tuple[list[int], int]:
    """Pack the kept records without gaps, like ``plan.lay_out_file``; return their offsets and the size."""
    offsets, end, in_objects = [], 0, False
    for record in records:
        if isinstance(record.entry, ObjectEntry) and not in_objects:
            in_objects, end = True, align(end, LARGE_ALIGNMENT)
        end = align(end, LARGE_ALIGNMENT if record.is_large else SMALL_ALIGNMENT)
        offsets.append(end)
        end += record.entry.record_nbytes
    return offsets, align(end, LARGE_ALIGNMENT)


def _copy_records(src: Spot, storage: Storage, place: Place, file: str, records: Sequence[_Record]) -> None:
    offsets, nbytes = _packed(records)
    with src.storage.open_read(join(src.path, file)) as reader, drafted(storage, place.path(file), nbytes) as writer:
        reader.will_read([(r.entry.record_offset, r.entry.record_offset + r.entry.record_nbytes) for r in records])
        write_stream(writer, 0, _pieces(reader, records, offsets, nbytes), None)


def _pieces(
    reader: ReadHandle, records: Sequence[_Record], offsets: Sequence[int], nbytes: int
) -> Iterator[bytes | bytearray]:
    """Yield the bytes of the packed file. Raises CheckpointDamagedError if a record differs from what was saved."""
    position = 0
    for record, offset in zip(records, offsets, strict=True):
        yield bytes(offset - position)
        entry = record.entry
        start, stop = entry.record_offset, entry.record_offset + entry.record_nbytes
        low, high = start, stop  # the bytes covered by the digest
        if isinstance(entry, ShardEntry) and entry.data_offset is not None:
            low, high = entry.data_offset, entry.data_offset + entry.data_nbytes
        crc, frame = 0, 0
        for at in range(start, stop, PIECE_NBYTES):
            piece = bytearray(min(PIECE_NBYTES, stop - at))
            reader.read_into(at, [memoryview(piece)])
            view = memoryview(piece)
            frame = crc32(view[: max(0, low - at)], frame)
            crc = crc32(view[max(0, low - at) : max(0, high - at)], crc)
            frame = crc32(view[max(0, high - at) :], frame)
            yield piece
        if crc != entry.crc32:
            raise CheckpointDamagedError(
                f"digest mismatch in {record.key}, bytes {low} to {high} of {reader.path}: it is not copied",
                path=reader.path,
                key=record.key,
            )
        if frame != _frame_crc(record):  # without a digest: other programs read it
            raise CheckpointDamagedError(
                f"damaged header or footer of {record.key}, bytes {start} to {stop} of {reader.path}: it is not copied",
                path=reader.path,
                key=record.key,
            )
        position = offset + entry.record_nbytes
    yield bytes(nbytes - position)


def _frame_crc(record: _Record) -> int:
    """Return the CRC-32 of the expected bytes around a record's data, those of the zip archive. 0 if all is data."""
    entry = record.entry
    if not isinstance(entry, ShardEntry) or entry.data_offset is None:
        return 0
    assert entry.crc32 is not None
    layout = tensor_record(record.dtype, entry.box.sizes)
    return crc32(record_footer(layout, entry.crc32), crc32(layout.header))


def _written(name: str, records: Sequence[_Record], digests: BlockDigests) -> WrittenFile:
    """Describe the packed file, as its writer would have recorded it."""
    offsets, nbytes = _packed(records)
    tensors, objects = [], []
    for record, offset in zip(records, offsets, strict=True):
        entry = record.entry
        if isinstance(entry, ObjectEntry):
            assert entry.crc32 is not None
            objects.append(WrittenObject(record.key, offset, entry.record_nbytes, entry.crc32))
            continue
        assert entry.crc32 is not None
        assert entry.data_offset is not None
        item = WriteItem(
            key=record.key,
            dtype=record.dtype,
            shape=record.shape,
            box=entry.box,
            record_offset=offset,
            record_nbytes=entry.record_nbytes,
            data_offset=offset + entry.data_offset - entry.record_offset,
            data_nbytes=entry.data_nbytes,
        )
        crcs = tuple(digests.of_shard(record.key, record.shard))
        tensors.append(WrittenTensor(item, entry.crc32, crcs))
    return WrittenFile(name, nbytes, tuple(tensors), tuple(objects))


# ---- the commit ----


def _finish(
    dst: Spot, attempt: str, part: NodePart, manifest: Manifest, offers: Sequence[ShardTable], waiting: _Patience
) -> None:
    """Commit the step on node 0; the others wait for that."""
    storage, save_id = dst.storage, manifest.save_id
    if part.node != 0:
        wait_for_outcome(
            storage,
            attempt,
            dst.path,
            save_id,
            timeout_s=WAIT_S,
            give_up=_until_node_0_fails(storage, attempt, waiting),
            member="node",
        )
        return
    signed = wait_for_sign_offs(
        *(storage, attempt, part.num_nodes, save_id),
        timeout_s=WAIT_S,
        give_up=waiting.why_stop,
        poll_s=POLL_S,
        member="node",
    )
    if manifest.lineage is not None:
        retention.set_aside(storage, dst.path, manifest.lineage)
    remove_records(storage, Place.of(storage, attempt, dst.path, save_id))
    commit.publish(
        *(storage, attempt, dst.path, signed, _info(manifest, offers)),
        now=manifest.created_s,
        world_size=manifest.world_size,
    )


def _until_node_0_fails(storage: Storage, attempt: str, waiting: _Patience) -> Callable[[], str | None]:
    """Return the reason to stop waiting for the commit, such as node 0's recorded failure. Polls now and then."""
    looked_s = 0.0

    def why_stop() -> str | None:
        nonlocal looked_s
        if time.monotonic() - looked_s > LOOK_S:
            looked_s = time.monotonic()
            if 0 in ranks_in(storage.names(attempt)) and not has_signed_off(storage, attempt, 0):
                return "as it has failed"
        return waiting.why_stop()

    return why_stop


def _info(manifest: Manifest, offers: Sequence[ShardTable]) -> SaveInfo:
    return SaveInfo(
        step=manifest.step,
        kind=manifest.kind,
        layout=manifest.layout,
        producer=manifest.producer,
        paths={key: path for table in reversed(offers) for key, path in table.paths.items()},
        structure=manifest.structure,
        extra={name: value for name, value in manifest.extra.items() if name != PART_KEY},
        lineage=manifest.lineage,
        metrics=manifest.metrics,
    )
