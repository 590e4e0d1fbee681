"""Copy a committed step to another place and commit it there by the same protocol. Torch-free.

The copy is the same checkpoint: same save id, same bytes of data, same digests. Only names differ if one place is an
object store (see ``run.place``) and the other is not. An interrupted copy continues after its complete files: its
attempt is named after the save id, so that a later copy of the same step finds it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from milepost.collective.threads import map_in_threads
from milepost.errors import ConfigError, SaveError
from milepost.format.digest import block_crcs, files_in_blocks
from milepost.format.huggingface import INDEX_NAME, parse_index, parse_object
from milepost.format.manifest import DIGESTS_NAME, Lineage, Manifest
from milepost.format.shares import FileDigests
from milepost.format.tags import untagged
from milepost.run import catalog, checkpoint_record, commit, retention
from milepost.run.attempts import abandon_attempt, adopt_attempt, begin_attempt, remove_records, resume_attempt
from milepost.run.branches import commit_order
from milepost.run.catalog import CheckpointInfo
from milepost.run.checkpoint_record import CommitRecord
from milepost.run.hf_folder import is_hf_step, read_headers
from milepost.run.owner import is_alive, owners_of, this_process
from milepost.run.place import Place
from milepost.run.step_names import ATTEMPT_PREFIX
from milepost.saving.frozen import FrozenFile, frozen_files_of, share
from milepost.storage.base import Storage, WriteHandle, join, split
from milepost.verification.hf_step import read_hf_step

PIECE_NBYTES = 8 << 20
NUM_THREADS = 2
MAX_LOOKED_AT = 8
"""Number of newest steps beside a copy that are searched for files to share."""
_PART = ".part"

CopyProgress = Callable[[int, int], None]
"""Called with bytes copied and total bytes, from several threads."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A storage and a name in it."""

    storage: Storage
    path: str

    def __str__(self) -> str:
        return f"{self.storage.root}/{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """The outcome of a copy."""

    path: str
    nbytes: int
    """Bytes sent, without those of an earlier interrupted copy."""
    seconds: float
    was_there: bool
    """True if the step was already there, and nothing was done."""


def attempt_of(target: str, save_id: str) -> str:
    """Return the folder of the attempt to copy the step of ``save_id`` to ``target``; it exists during the copy."""
    return join(split(target)[0], ATTEMPT_PREFIX + save_id)


def copy_step(src: Spot, dst: Spot, progress: CopyProgress | None = None) -> CopyReport:
    """Copy the committed step at ``src`` to ``dst``. A step with another save id there is replaced.

    Raises:
        CheckpointNotFoundError: there is no step at ``src``.
        CheckpointDamagedError: files of it are missing or have another size.
        ConfigError: it was written by another program, or the step at ``dst`` must not be replaced by it.
        SaveError: another process is copying.
        StorageError: one of the two refused. A retry does not repeat completed copies.
    """
    started = time.monotonic()
    record = checkpoint_record.read_record(src.storage, src.path)
    if not record.is_own:
        raise ConfigError(f"{src} was written by another program: copy its folder unchanged")
    record.require_undamaged(src.storage, src.path)
    manifest = record.manifest
    found = catalog.examine(dst.storage, dst.path)
    if found is not None and found.is_usable and found.save_id == manifest.save_id:
        commit.finish(dst.storage, dst.path)
        return CopyReport(path=str(dst), nbytes=0, seconds=time.monotonic() - started, was_there=True)
    if found is not None and (reason := why_not_replaced(found, manifest.lineage, manifest.created_s)):
        raise ConfigError(f"{dst} {reason}")
    attempt = begin_copy(dst, manifest.save_id)
    place = Place.of(dst.storage, attempt, dst.path, manifest.save_id)
    nbytes = _copy_files(src, dst.storage, place, _data_files(manifest), _shareable(dst, manifest), progress)
    remove_records(dst.storage, place)
    retention.set_aside(dst.storage, dst.path, manifest.lineage)
    if is_hf_step(manifest):
        written = _copy_small_files(src, dst.storage, place, record)
        commit.publish_files(dst.storage, attempt, dst.path, written, manifest)
    else:
        digests = checkpoint_record.read_own_digests(src.storage, src.path, manifest)
        commit.publish_copy(dst.storage, attempt, dst.path, _renamed(manifest, place), digests)
    return CopyReport(path=str(dst), nbytes=nbytes, seconds=time.monotonic() - started, was_there=False)


def why_not_replaced(found: CheckpointInfo, lineage: Lineage | None, created_s: float) -> str | None:
    """Return why a copy must not replace the committed step ``found``: it is a later save, or of another run.

    ``lineage`` and ``created_s`` are those of the step to copy. None if it may.
    """
    if not found.is_usable or found.state == "external":
        return None
    theirs = found.lineage
    if (theirs.run if theirs is not None else "") != (lineage.run if lineage is not None else ""):
        return "is of another run: give a folder of its own"
    if theirs is not None and lineage is not None:
        is_earlier = theirs.order < lineage.order
    else:
        is_earlier = found.created_s <= created_s
    return None if is_earlier else "is another save of this step, and not an earlier one: it is not replaced"


def begin_copy(dst: Spot, save_id: str, *, is_joint: bool = False) -> str:
    """Start the attempt to copy to ``dst``, or take over that of an interrupted copy.

    ``is_joint``: other nodes' processes take part.

    Raises:
        SaveError: another process is copying.
        ConfigError, StorageError: see ``begin_attempt``.
    """
    storage, attempt = dst.storage, attempt_of(dst.path, save_id)
    if storage.stat(attempt) is None:
        begin_attempt(storage, dst.path, save_id)
    else:
        if not is_joint:
            _refuse_company(dst, attempt)
        adopt_attempt(storage, attempt)  # before anything else: a sweep would remove it
        resume_attempt(storage, attempt, dst.path, save_id)
    if not is_joint:
        try:
            _refuse_company(dst, attempt)  # of a process that has begun at the same time
        except SaveError:
            abandon_attempt(storage, attempt)
            raise
    return attempt


def _refuse_company(dst: Spot, attempt: str) -> None:
    """Raise SaveError if another process works on the attempt."""
    now = time.time()
    me = replace(this_process(now), created_s=0.0)
    others = [owner for owner in owners_of(dst.storage, attempt) if replace(owner, created_s=0.0) != me]
    alive = [owner for owner in others if is_alive(owner, now)]
    if alive:
        raise SaveError(f"{alive[0]} is already copying to {dst}: wait for it, or stop it", path=dst.path)


def _data_files(manifest: Manifest) -> dict[str, int]:
    """Return the files that hold data, largest first. The others are small, and rewritten."""
    from milepost.format.columns import table_of  # imports numpy, which listing the options does not need

    blocks = files_in_blocks(manifest)
    names = {*blocks, *table_of(manifest).files}
    return {name: manifest.files[name].nbytes for name in sorted(names, key=lambda n: (-manifest.files[n].nbytes, n))}


def _shareable(dst: Spot, manifest: Manifest) -> dict[str, FrozenFile]:
    """Return name -> file of a step beside ``dst`` for files that the run's steps share."""
    wanted = {entry.content: name for name, entry in manifest.files.items() if entry.content}
    if not wanted or manifest.lineage is None:
        return {}
    found: dict[str, FrozenFile] = {}
    steps = sorted(catalog.scan(dst.storage, split(dst.path)[0]), key=commit_order, reverse=True)
    for step in steps[:MAX_LOOKED_AT]:
        for file in frozen_files_of(dst.storage, step, manifest.lineage.run).values():
            if file.content in wanted:
                found.setdefault(wanted[file.content], file)
    return found


def _copy_files(
    src: Spot,
    storage: Storage,
    place: Place,
    files: Mapping[str, int],
    shareable: Mapping[str, FrozenFile],
    progress: CopyProgress | None,
) -> int:
    """Copy incomplete or missing files, or share them with another step there. Returns the bytes sent."""
    present = {entry.name: entry.nbytes for entry in storage.list(place.folder) if place.holds(entry.name)}
    for name in present:
        if name.endswith(_PART):
            storage.remove(join(place.folder, name))
    missing = {name: nbytes for name, nbytes in files.items() if present.get(place.name(untagged(name))) != nbytes}
    for name in [name for name in missing if name in shareable]:
        final = place.path(untagged(name))
        storage.remove(final)  # from an interrupted copy
        if share(storage, shareable[name], final):
            del missing[name]
    done = total = sum(files.values())
    done -= sum(missing.values())

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    copy = partial(_copy_file, src, storage, place, files, count)
    map_in_threads(copy, list(missing), NUM_THREADS, name="milepost-copy")
    storage.sync_folder(place.folder)
    return sum(missing.values())


def _copy_file(
    src: Spot, storage: Storage, place: Place, files: Mapping[str, int], count: Callable[[int], None], name: str
) -> None:
    buffer = memoryview(bytearray(min(PIECE_NBYTES, files[name])))
    with (
        src.storage.open_read(join(src.path, name)) as reader,
        drafted(storage, place.path(untagged(name)), files[name]) as writer,
    ):
        reader.will_read([(0, files[name])])
        for start in range(0, files[name], PIECE_NBYTES):
            piece = buffer[: min(PIECE_NBYTES, files[name] - start)]
            reader.read_into(start, [piece])
            writer.write(start, [piece])
            count(len(piece))


@contextmanager
def drafted(storage: Storage, path: str, nbytes: int) -> Iterator[WriteHandle]:
    """Write and sync the file at ``path``, in place of that of an interrupted copy.

    Where incomplete files are visible, it has another name until it is complete.
    """
    draft = path + _PART if storage.can_rename else path
    storage.remove(draft)
    with storage.open_write(draft, nbytes) as writer:
        yield writer
        writer.sync()
    if draft != path:
        storage.rename(draft, path)


def _renamed(manifest: Manifest, place: Place) -> Manifest:
    """Return the manifest with only its data files, under their names at ``place``."""
    from milepost.format.columns import table_of, with_table

    table = table_of(manifest)
    names = {name: place.name(untagged(name)) for name in table.files}
    files = {new: replace(manifest.files[old], crc32=None) for old, new in names.items()}
    return with_table(replace(manifest, files=files), replace(table, files=tuple(names.values())))


def _copy_small_files(src: Spot, storage: Storage, place: Place, record: CommitRecord) -> dict[str, FileDigests]:
    """Copy the files without tensors of a step of Hugging Face files; returns the digests of all its files."""
    step = read_hf_step(src.storage, src.path, [record.name, *record.files])
    if step is None or step.digests is None:
        raise ConfigError(f"{src} has no digests: it was saved by an older Milepost. Copy its folder unchanged")
    step.require([untagged(name) for name in record.manifest.files])
    digests = step.digests
    weights = files_in_blocks(record.manifest)
    contents = {
        untagged(name): src.storage.read(join(src.path, name))
        for name in record.manifest.files
        if name not in weights and untagged(name) != DIGESTS_NAME
    }
    if INDEX_NAME in contents or place.tag:  # it lists the files that hold the tensors
        contents[INDEX_NAME] = _index(src, contents.get(INDEX_NAME), weights, place)
    written = {
        place.name(untagged(name)): FileDigests(record.manifest.files[name].nbytes, tuple(digests.of_file(name)))
        for name in weights
    }
    for plain, data in contents.items():
        storage.remove(place.path(plain))  # from an interrupted copy
        storage.write(place.path(plain), data)
        written[place.name(plain)] = FileDigests(len(data), tuple(block_crcs(data)))
    return written


def _index(src: Spot, known: bytes | None, weights: Sequence[str], place: Place) -> bytes:
    """Return the index of the files that hold tensors, under their names at ``place``."""
    if known is not None:
        index = parse_object(known, join(src.path, INDEX_NAME))
        weight_map = parse_index(known, join(src.path, INDEX_NAME)).weight_map
    else:
        headers = read_headers(src.storage, src.path, weights)
        headers.require(str(src))
        index = {"metadata": {"total_size": sum(entry.shards[0].data_nbytes for entry in headers.tensors.values())}}
        weight_map = {key: entry.shards[0].file for key, entry in sorted(headers.tensors.items())}
    renamed = {key: place.name(untagged(name)) for key, name in weight_map.items()}
    return (json.dumps({**index, "weight_map": renamed}, indent=2, ensure_ascii=False) + "\n").encode()
