"""Sign-offs: each rank's record, in storage alone, that its part of a save is durable, or why it is not.

A sign-off is one small file in the attempt's folder. It appears complete (written under another name, then renamed) and
ends with a CRC-32. Rank 0 builds the manifest from them, so no collective is needed off the training thread.
"""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from milepost.collective.progress import SLOW_S
from milepost.collective.threads import map_in_threads
from milepost.errors import FormatError, SaveError, StorageError
from milepost.format.box import Box
from milepost.format.digest import crc32, from_bytes, to_bytes
from milepost.format.shares import Share
from milepost.format.typed_json import MAX_COUNT
from milepost.storage.base import Storage
from milepost.tensors.plan import WriteItem

_log = logging.getLogger(__name__)

_MAGIC = b"MILESGN\x01"
_HEAD = struct.Struct("<8sQQ")  # magic, bytes of JSON, number of block CRCs; then both, then a CRC-32 of all before
_PREFIX = "sign-off-"
_FAILED = ".failed"


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """An item that was written, with its digests. ``block_crcs`` has one CRC-32 for each 4 MiB of raw data."""

    item: WriteItem
    crc32: int
    block_crcs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WrittenObject:
    """A value that was written. ``crc32`` is of the whole record."""

    key: str
    record_offset: int
    record_nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """The file that one rank wrote. ``nbytes`` is the exact size of the file."""

    file: str
    nbytes: int
    tensors: tuple[WrittenTensor, ...]
    objects: tuple[WrittenObject, ...]


@dataclass(frozen=True, slots=True)
class SignOff:
    """One rank's record: the files it wrote and synced, or the error that kept it from that."""

    rank: int
    save_id: str
    files: tuple[WrittenFile, ...] = ()
    error: str | None = None
    shares: tuple[Mapping[str, Share], ...] = ()
    """Of the digests of files that several ranks write: by file name."""


def dump_sign_off(sign_off: SignOff) -> bytes:
    """The bytes of a sign-off. Block CRCs follow the JSON as raw numbers: there is one for each 4 MiB of the model."""
    crcs: list[int] = []
    files = []
    for file in sign_off.files:
        tensors = []
        for tensor in file.tensors:
            item = tensor.item
            crcs.extend(tensor.block_crcs)
            tensors.append(
                (
                    *(item.key, item.dtype, item.shape, item.box.offsets, item.box.sizes),
                    *(item.record_offset, item.record_nbytes, item.data_offset, item.data_nbytes),
                    *(tensor.crc32, len(tensor.block_crcs)),
                )
            )
        objects = [(o.key, o.record_offset, o.record_nbytes, o.crc32) for o in file.objects]
        files.append((file.file, file.nbytes, tensors, objects))
    shares = [{name: (one.nbytes, list(one.crcs.items())) for name, one in some.items()} for some in sign_off.shares]
    head = {"rank": sign_off.rank, "save_id": sign_off.save_id, "error": sign_off.error, "files": files}
    head["shares"] = shares
    text = json.dumps(head, separators=(",", ":")).encode()
    body = _HEAD.pack(_MAGIC, len(text), len(crcs)) + text + to_bytes(crcs)
    return body + struct.pack("<I", crc32(body))


def parse_sign_off(data: bytes, path: str) -> SignOff:
    """Read what ``dump_sign_off`` wrote. Raises FormatError if it is truncated or damaged."""
    if len(data) < _HEAD.size + 4 or crc32(memoryview(data)[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise FormatError(f"{path}: the sign-off is damaged; save again", path=path)
    magic, text_nbytes, num_crcs = _HEAD.unpack_from(data)
    if magic != _MAGIC or len(data) != _HEAD.size + text_nbytes + 4 * num_crcs + 4:
        raise FormatError(
            f"{path} is not a sign-off of this version of Milepost: do all ranks run the same?", path=path
        )
    crcs = from_bytes(data[_HEAD.size + text_nbytes : -4])
    try:
        return _sign_off(json.loads(data[_HEAD.size : _HEAD.size + text_nbytes].decode()), crcs)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{path}: invalid sign-off: {error!s:.200}", path=path) from error


def _sign_off(head: Any, crcs: Sequence[int]) -> SignOff:
    """What the JSON of a sign-off says. Raises ValueError, TypeError or KeyError where it is not of the right form."""
    files = []
    position = 0
    for name, nbytes, tensor_rows, object_rows in head["files"]:
        tensors = []
        for row in tensor_rows:
            *_, crc, num_crcs = _counts(row[5:])
            tensors.append(WrittenTensor(_item(row), crc, tuple(crcs[position : position + num_crcs])))
            position += num_crcs
        objects = tuple(WrittenObject(_text(key), *_counts(rest)) for key, *rest in object_rows)
        (nbytes,) = _counts([nbytes])
        files.append(WrittenFile(_text(name), nbytes, tuple(tensors), objects))
    error = head["error"]
    (rank,) = _counts([head["rank"]])
    shares = tuple({_text(name): _share(*row) for name, row in some.items()} for some in head["shares"])
    return SignOff(rank, _text(head["save_id"]), tuple(files), None if error is None else _text(error), shares)


def _share(nbytes: object, crcs: Sequence[Any]) -> Share:
    (count,) = _counts([nbytes])
    pairs = [_counts(pair) for pair in crcs]
    return Share(count, {pair[0]: pair[1] for pair in pairs})


def _item(row: Sequence[Any]) -> WriteItem:
    key, dtype, shape, offsets, sizes, *rest = row
    record_offset, record_nbytes, data_offset, data_nbytes, _, _ = _counts(rest)
    return WriteItem(
        key=_text(key),
        dtype=_text(dtype),
        shape=_counts(shape),
        box=Box(_counts(offsets), _counts(sizes)),
        record_offset=record_offset,
        record_nbytes=record_nbytes,
        data_offset=data_offset,
        data_nbytes=data_nbytes,
    )


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value <= MAX_COUNT for value in values):
        raise ValueError("expected a number of at least 0, found something else")
    return tuple(values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is missing")
    return value


def sign_off(storage: Storage, attempt: str, signed: SignOff) -> None:
    """Put this rank's sign-off into the attempt, complete. The last thing that a rank does there.

    Rank 0 may then publish and remove the attempt at any moment, so the folder is not synced: a sign-off need not
    outlive a power cut, after which nobody commits what it stands for. What it stands for is durable.

    A report of failure must get through even when the disk is full: if it can't be written, an empty file says at
    least which rank failed.

    Raises:
        StorageError: the sign-off could not be left.
    """
    name = f"{attempt}/{_PREFIX}{signed.rank}"
    try:
        # Renamed into place, for rank 0 reads it the moment that it shows.
        if storage.can_rename:
            storage.write(f"{name}.part", dump_sign_off(signed))
            storage.rename(f"{name}.part", name)
        else:
            storage.write(name, dump_sign_off(signed))
    except StorageError:
        if signed.error is None:
            raise
        storage.write(f"{name}{_FAILED}", b"")


def has_signed_off(storage: Storage, attempt: str, rank: int) -> bool:
    """Return whether a rank has left a sign-off that does not report a failure."""
    names = {entry.name for entry in storage.list(attempt)} & _names_of(rank)
    return bool(names) and _look(storage, attempt, names, rank).error is None


def wait_for_sign_offs(
    storage: Storage,
    attempt: str,
    world_size: int,
    save_id: str,
    *,
    timeout_s: float,
    give_up: Callable[[], str | None] = lambda: None,
    poll_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[SignOff, ...]:
    """The sign-offs of all ranks, by rank.

    Looks every ``poll_s`` at first (by default as the storage wishes), then less and less often (at least twice a
    second), and logs every ``SLOW_S`` seconds whom it waits for. ``give_up`` says why to stop, or None; or raises the
    error to end with.

    Raises:
        SaveError: a rank signed off with an error (``rank`` names it), the attempt is gone, or ranks are missing
            after ``timeout_s``.
    """
    started = logged = clock()
    deadline = started + timeout_s
    poll_s = storage.poll_s if poll_s is None else poll_s
    signed: dict[int, SignOff] = {}
    while True:
        names = {entry.name for entry in storage.list(attempt)}
        if not names:
            raise SaveError(f"the save's folder {attempt} is gone: was it deleted by another program?", path=attempt)
        arrived = [rank for rank in range(world_size) if rank not in signed and names & _names_of(rank)]
        look = partial(_look, storage, attempt, names)
        found = map_in_threads(look, arrived, storage.num_streams, name="milepost-sign-offs")
        signed |= dict(zip(arrived, found, strict=True))
        _raise_failures(signed, save_id, attempt)
        if len(signed) == world_size:
            return tuple(signed[rank] for rank in range(world_size))
        reason = give_up()
        missing = [rank for rank in range(world_size) if rank not in signed]
        if clock() - logged >= SLOW_S:
            logged = clock()
            _log.warning(
                "rank 0 has waited %.0f s for %s of %d to finish writing %s",
                logged - started,
                rank_list(missing),
                world_size,
                attempt,
            )
        if reason is not None or clock() >= deadline:
            raise SaveError(
                f"{rank_list(missing)} of {world_size} did not finish writing "
                f"{reason or f'within {timeout_s:g} s'}; nothing was "
                "committed. Look at their logs: a rank that died or a storage that hangs are the usual causes",
                path=attempt,
                rank=missing[0],
            )
        sleep(poll_s)
        poll_s = min(poll_s * 1.5, 0.5)


def _names_of(rank: int) -> set[str]:
    return {f"{_PREFIX}{rank}", f"{_PREFIX}{rank}{_FAILED}"}


def _look(storage: Storage, attempt: str, names: set[str], rank: int) -> SignOff:
    name = f"{_PREFIX}{rank}"
    if name in names:
        return parse_sign_off(storage.read(f"{attempt}/{name}"), f"{attempt}/{name}")
    return SignOff(rank, "", error="it failed and could not record the reason; see its log")


def _raise_failures(signed: dict[int, SignOff], save_id: str, attempt: str) -> None:
    faults = []
    for rank, found in sorted(signed.items()):
        if found.error is not None:
            faults.append((rank, found.error))
        elif (found.rank, found.save_id) != (rank, save_id):
            other = f"found one of rank {found.rank} in save {found.save_id}"
            faults.append((rank, f"expected its sign-off of save {save_id}, {other}"))
    if faults:
        lines = [f"rank {rank}: {text}" for rank, text in faults]
        raise SaveError("the save failed on " + "\n  ".join(lines), path=attempt, rank=faults[0][0])


def rank_list(ranks: Sequence[int]) -> str:
    """Ascending ranks for people: ``rank 3``, ``ranks 0, 4-7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)
    return ("rank " if len(ranks) == 1 else "ranks ") + text
