"""Sign-offs: each rank's record in the storage that its part of a save is durable, or of its failure.

A sign-off is one small file in the attempt's folder. It appears complete (written under another name, then renamed) and
ends with a CRC-32. Rank 0 builds the manifest from them, so no collective is needed off the training thread.
"""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from milepost.collective.progress import SLOW_S
from milepost.collective.threads import map_in_threads
from milepost.errors import FormatError, SaveError, StorageError
from milepost.format.digest import crc32
from milepost.format.file_rows import FileRow, ShareRow, SignOffHead, file_entries
from milepost.format.manifest import FileEntry
from milepost.format.remembered import Remembered
from milepost.format.shares import Share
from milepost.format.typed_json import parse_json, typed
from milepost.run.node_part import rank_list
from milepost.storage.base import Storage
from milepost.tensors.plan import WriteItem

if TYPE_CHECKING:
    from milepost.format.columns import ShardTable, Tiling
    from milepost.format.segment_merger import SegmentMerger
    from milepost.format.segments import Segment

_log = logging.getLogger(__name__)

_MAGIC = b"MILESGN\x02"
_HEAD = struct.Struct("<8sQ")  # magic, bytes of JSON; then the JSON, the segment, and a CRC-32 of all before
_PREFIX = "sign-off-"
_FAILED = ".failed"
_THREADS = "milepost-sign-offs"
_AT_ONCE = 8
"""Number of sign-offs read before their segments are merged, per reader."""
_REMOTE_READERS = 8
"""Minimum number of readers over a network, where reading a small file is mostly waiting."""


class WrittenTensor(NamedTuple):
    """An item that was written, with its digests. ``block_crcs`` has one CRC-32 for each 4 MiB of raw data."""

    item: WriteItem
    crc32: int
    block_crcs: tuple[int, ...]


class WrittenObject(NamedTuple):
    """A value that was written. ``crc32`` is of the whole record."""

    key: str
    record_offset: int
    record_nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that one rank wrote, or shares with an earlier step: ``nbytes`` is its exact size, ``crc32`` of all bytes.

    ``content`` and ``since`` are those of ``FileEntry``.
    """

    file: str
    nbytes: int
    tensors: tuple[WrittenTensor, ...]
    objects: tuple[WrittenObject, ...]
    crc32: int | None = None
    content: str = ""
    since: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SignOff:
    """One rank's record of the data it wrote and synced, or of its error."""

    rank: int
    save_id: str
    segment: Segment | None = None
    """None if the rank failed, or wrote files in another format."""
    error: str | None = None
    shares: tuple[Mapping[str, Share], ...] = ()
    """This rank's part of the digests of files that several ranks write, by file name."""


def segment_of(files: Sequence[WrittenFile]) -> Segment:
    """Collect the records of one rank's ``files`` in columns.

    Raises SaveError if one tensor was stored with two dtypes or shapes.
    """
    import numpy as np  # takes 100 ms, which deleting old steps should not cost

    from milepost.format.columns import ObjectColumns
    from milepost.format.segments import Segment

    tensors = [tensor for file in files for tensor in file.tensors]
    places = [(file.file, tuple(tensor.item for tensor in file.tensors)) for file in files]
    is_large = len(tensors) > _MAX_KEPT_TENSORS
    order, table = _placed(places) if is_large else _last_places.of(places, lambda: _placed(places))
    tensors = [tensors[place] for place in order]
    numbered = [(o, number) for number, file in enumerate(files) for o in file.objects]
    numbered.sort()
    objects = ObjectColumns(
        tuple(o.key for o, _ in numbered),
        np.array([number for _, number in numbered], np.uint32),
        np.array([o.record_offset for o, _ in numbered], np.int64),
        np.array([o.record_nbytes for o, _ in numbered], np.int64),
        np.array([o.crc32 for o, _ in numbered], np.uint32),
    )
    own = replace(table, crc32=np.array([tensor.crc32 for tensor in tensors], np.uint32), objects=objects)
    crcs = np.fromiter(chain.from_iterable(tensor.block_crcs for tensor in tensors), np.uint32)
    return Segment(own, {f.file: FileEntry(f.nbytes, f.crc32, f.content, f.since) for f in files}, crcs)


_Places = Sequence[tuple[str, tuple[WriteItem, ...]]]
"""The names of a rank's files, and what is in each."""
_last_places = Remembered[tuple[Sequence[int], "ShardTable"]]()
_MAX_KEPT_TENSORS = 16384
"""Number of tensors up to which their columns are kept for the next save, most often with the same plan."""


def _placed(places: _Places) -> tuple[Sequence[int], ShardTable]:
    """Return the order of all items by key and box, and their columns in it, but for the CRC-32s."""
    import numpy as np

    from milepost.format.columns import ShardTable, object_columns

    found = [(item, number) for number, (_, items) in enumerate(places) for item in items]
    order = sorted(range(len(found)), key=lambda place: (found[place][0].key, found[place][0].box))
    stored = [found[place] for place in order]
    tilings, tiling = _tilings([item for item, _ in stored])
    table = ShardTable(
        files=tuple(name for name, _ in places),
        keys=tuple(dict.fromkeys(item.key for item, _ in stored)),
        tilings=tilings,
        tiling=np.array(tiling, np.uint32),
        file=np.array([number for _, number in stored], np.uint32),
        record_offset=np.array([item.record_offset for item, _ in stored], np.int64),
        crc32=np.empty(0, np.uint32),
        objects=object_columns({}, {}),
        paths={},
    )
    return order, table


def _tilings(stored: Sequence[WriteItem]) -> tuple[list[Tiling], list[int]]:
    """The distinct tilings of the keys, and the index of each key's tiling."""
    import numpy as np

    from milepost.format.columns import Tiling, coordinates

    known: dict[object, int] = {}
    found: list[Tiling] = []
    tiling_of = []
    for key, group in groupby(stored, key=lambda item: item.key):
        items = list(group)
        dtype, shape = items[0].dtype, items[0].shape
        if any((item.dtype, item.shape) != (dtype, shape) for item in items):
            raise SaveError(f"'{key}' was stored by one rank with two dtypes or shapes", key=key)
        header = tuple(item.data_offset - item.record_offset for item in items)
        record = tuple(item.record_nbytes for item in items)
        number = known.setdefault((dtype, shape, tuple(item.box for item in items), header, record), len(found))
        if number == len(found):
            corners = [coordinates([getattr(i.box, name) for i in items], len(shape)) for name in ("offsets", "sizes")]
            offsets, sizes = corners
            found.append(Tiling(dtype, shape, offsets, sizes, np.array(header, np.int64), np.array(record, np.int64)))
        tiling_of.append(number)
    return found, tiling_of


def dump_sign_off(sign_off: SignOff) -> bytes:
    """Encode a sign-off: the rank, the files or the error, and the segment."""
    from milepost.format.segments import dump_segment

    segment = sign_off.segment
    files = {} if segment is None else segment.files
    rows = [FileRow(name, one.nbytes, one.crc32, one.content, one.since) for name, one in files.items()]
    shares = [
        {name: ShareRow(one.nbytes, list(one.crcs.items())) for name, one in some.items()} for some in sign_off.shares
    ]
    head = SignOffHead(sign_off.rank, sign_off.save_id, rows, sign_off.error, shares)
    text = json.dumps(msgspec.to_builtins(head)).encode()
    text += b" " * (-len(text) % 8)  # aligns the columns of the segment
    body = _HEAD.pack(_MAGIC, len(text)) + text
    if segment is not None:
        body += dump_segment(segment, sign_off.save_id)
    return body + struct.pack("<I", crc32(body))


def parse_sign_off(data: bytes, path: str) -> SignOff:
    """Parse the output of ``dump_sign_off``. Raises FormatError if it is truncated or damaged."""
    if len(data) < _HEAD.size + 4 or crc32(memoryview(data)[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise FormatError(f"{path}: the sign-off is damaged; save again", path=path)
    magic, text_nbytes = _HEAD.unpack_from(data)
    end = _HEAD.size + text_nbytes
    if magic != _MAGIC or end > len(data) - 4:
        raise FormatError(
            f"{path} is not a sign-off of this version of Milepost: do all ranks run the same version?", path=path
        )
    head = typed(parse_json(data[_HEAD.size : end], path, "a sign-off"), SignOffHead, path)
    shares = tuple({name: Share(row.nbytes, dict(row.crcs)) for name, row in some.items()} for some in head.shares)
    if end == len(data) - 4:
        return SignOff(head.rank, head.save_id, None, head.error, shares)
    from milepost.format.segments import parse_segment

    segment = parse_segment(memoryview(data)[end:-4], file_entries(head.files, path), head.save_id, path)
    return SignOff(head.rank, head.save_id, segment, head.error, shares)


def sign_off(storage: Storage, attempt: str, signed: SignOff) -> None:
    """Write this rank's sign-off into the attempt, atomically, as the rank's last action there.

    Rank 0 may then publish and remove the attempt at any moment. Neither the file nor the folder is synced: the data is
    durable already, and after a power cut nobody commits this attempt. A failure must be reported even when the disk is
    full: if it can't be written, an empty file at least names the rank.

    Raises:
        StorageError: the sign-off could not be written.
    """
    name = f"{attempt}/{_PREFIX}{signed.rank}"
    try:
        # Renamed into place, since rank 0 reads it as soon as it appears.
        if storage.can_rename:
            storage.leave(f"{name}.part", dump_sign_off(signed))
            storage.rename(f"{name}.part", name)
        else:
            storage.write(name, dump_sign_off(signed))
    except StorageError:
        if signed.error is None:
            raise
        storage.write(f"{name}{_FAILED}", b"")


def has_signed_off(storage: Storage, attempt: str, rank: int) -> bool:
    """Return whether a rank has signed off without a failure."""
    names = {name for name in _names_of(rank) if storage.stat(f"{attempt}/{name}") is not None}
    return bool(names) and _look(storage, attempt, names, rank).error is None


def withdraw_sign_off(storage: Storage, attempt: str, rank: int) -> None:
    """Remove an earlier process's sign-off of this rank, so that it can sign off again."""
    for name in (*_names_of(rank), f"{_PREFIX}{rank}.part"):
        storage.remove(f"{attempt}/{name}")


def ranks_in(names: Iterable[str]) -> dict[int, bool]:
    """The ranks whose sign-off is among the files ``names`` of an attempt; False for an empty one of a failed rank."""
    found = {}
    for name in names:
        rank = name.removeprefix(_PREFIX).removesuffix(_FAILED)
        if name.startswith(_PREFIX) and rank.isdecimal() and len(rank) < 10:
            found[int(rank)] = not name.endswith(_FAILED)
    return found


def wait_for_sign_offs(
    storage: Storage,
    attempt: str,
    world_size: int,
    save_id: str,
    *,
    timeout_s: float,
    ranks: Sequence[int] | None = None,
    hosts: Sequence[str] = (),
    give_up: Callable[[], str | None] = lambda: None,
    poll_s: float | None = None,
    member: str = "rank",
    merger: SegmentMerger | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[SignOff, ...]:
    """The sign-offs of all ranks, or of ``ranks`` alone, by rank. ``hosts`` has the host of each rank, for messages.

    If there is a ``merger``, segments are moved into it as they arrive, so that only a few of them are in memory.
    Polls every ``poll_s`` at first (by default the storage's interval), then at growing intervals up to half a second,
    and logs every ``SLOW_S`` seconds for which ranks it waits. ``give_up`` returns a reason to stop, or None, or raises
    the final error. ``member`` is the word for a rank in messages.

    Raises:
        SaveError: a rank signed off with an error (``rank`` names it), the attempt is gone, or ranks are missing
            after ``timeout_s``.
    """
    started = logged = clock()
    deadline = started + timeout_s
    poll_s = storage.poll_s if poll_s is None else poll_s
    signed: dict[int, SignOff] = {}
    wanted = range(world_size) if ranks is None else ranks
    while True:
        names = {*storage.names(attempt)}
        if not names:
            raise SaveError(f"the save's folder {attempt} is gone: was it deleted by another program?", path=attempt)
        arrived = [rank for rank in wanted if rank not in signed and names & _names_of(rank)]
        signed |= _read_arrived(storage, attempt, save_id, names, arrived, member, merger)
        if len(signed) == len(wanted):
            return tuple(signed[rank] for rank in wanted)
        reason = give_up()
        missing = [rank for rank in wanted if rank not in signed]
        late = f"{rank_list(missing, hosts, member)} of {world_size}"
        if clock() - logged >= SLOW_S:
            logged = clock()
            waited = f"{member} {wanted[0]} has waited {logged - started:.0f} s"
            _log.warning("%s for %s to finish writing %s", waited, late, attempt)
        if reason is not None or clock() >= deadline:
            raise SaveError(
                f"{late} did not finish writing {reason or f'within {timeout_s:g} s'}; nothing was committed. Check "
                f"their logs: the usual causes are a dead {member} or storage that hangs",
                path=attempt,
                rank=missing[0],
            )
        sleep(poll_s)
        poll_s = min(poll_s * 1.5, 0.5)


def _read_arrived(
    storage: Storage,
    attempt: str,
    save_id: str,
    names: set[str],
    arrived: Sequence[int],
    member: str,
    merger: SegmentMerger | None,
) -> dict[int, SignOff]:
    """Read the sign-offs of some ranks, and move their segments into the ``merger``.

    Raises:
        SaveError: some prevent the commit; with all of these.
    """
    num_readers = max(storage.num_streams, _REMOTE_READERS if storage.is_remote else 1)
    look = partial(_look, storage, attempt, names)
    signed: dict[int, SignOff] = {}
    faults: dict[int, str] = {}
    for some in _batches(arrived, _AT_ONCE * num_readers):
        for rank, found in zip(some, map_in_threads(look, some, num_readers, name=_THREADS), strict=True):
            fault = _fault(found, rank, save_id, member)
            if fault:
                faults[rank] = fault
            elif merger is not None and found.segment is not None:
                merger.add(rank, found.segment)
                found = replace(found, segment=None)
            signed[rank] = found
    if faults:
        lines = [f"{member} {rank}: {fault}" for rank, fault in faults.items()]
        raise SaveError("the save failed on " + "\n  ".join(lines), path=attempt, rank=next(iter(faults)))
    return signed


def _names_of(rank: int) -> set[str]:
    return {f"{_PREFIX}{rank}", f"{_PREFIX}{rank}{_FAILED}"}


def _look(storage: Storage, attempt: str, names: set[str], rank: int) -> SignOff:
    name = f"{_PREFIX}{rank}"
    if name in names:
        return parse_sign_off(storage.read(f"{attempt}/{name}"), f"{attempt}/{name}")
    return SignOff(rank, "", error="it failed and could not record the reason; see its log")


def _fault(found: SignOff, rank: int, save_id: str, member: str) -> str:
    """Return the reason why a sign-off prevents the commit; empty if it does not."""
    if found.error is not None:
        return found.error
    if (found.rank, found.save_id) != (rank, save_id):
        other = f"found one of {member} {found.rank} in save {found.save_id}"
        return f"expected its sign-off of save {save_id}, {other}"
    return ""


def _batches(ranks: Sequence[int], count: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(ranks), count):
        yield ranks[start : start + count]
