"""``verify``: check that a checkpoint is what was saved. Read-only, without torch, at the speed of the disk.

There are four levels, each of which includes the previous one:

==========  ==============================================================================================
metadata    commit record, ``.metadata`` and digests are complete and agree with each other
sizes       every file listed exists with its size
sample      up to 256 records, chosen at random, byte by byte
full        every byte of every file: data against its digest, headers and footers against their expected bytes,
            padding against zero
==========  ==============================================================================================

An external checkpoint has no digests except the CRC-32s of its zip records; bytes outside these (zip headers, padding)
are counted in ``unchecked_nbytes``. Weights outside a run (Hugging Face folders, safetensors and ``torch.save`` files)
are checked as far as possible, see ``weights``. Data that can't be checked is never reported verified.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from milepost.errors import CheckpointNotFoundError, ConfigError, FormatError, Problem, StorageError, listed
from milepost.format.manifest import MANIFEST_NAME
from milepost.run import catalog, checkpoint_record, marks
from milepost.run.catalog import CheckpointInfo, State
from milepost.run.checkpoint_record import CommitRecord
from milepost.run.hf_folder import is_hf_folder, model_in_cache
from milepost.run.step_names import damage_mark
from milepost.storage import join_path, open_storage
from milepost.storage.base import Storage, join, split
from milepost.verification.checkpoint import check_checkpoint, unreadable_file
from milepost.verification.extent_reader import Findings, Progress
from milepost.verification.extents import Level
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
        """``damaged``: there are problems. ``not_verified``: none was found, but bytes lack digests, or can't be read.

        ``ok``: everything was checked.
        """
        if self.problems:
            return "damaged"
        return "not_verified" if self.unchecked_nbytes or self.state in ("unreadable", "newer") else "ok"

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
    if found is not None and not found.is_folder:
        raise CheckpointNotFoundError(
            f"{join_path(storage.root, path)} is a file, neither a checkpoint nor weights", path=path
        )
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
        in_cache = model_in_cache(storage, path)
        raise CheckpointNotFoundError(
            in_cache or f"{join_path(storage.root, path)} is not a checkpoint: {reason}", path=path
        )
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
        if info.state == "newer":
            notes = (f"it can't be checked: {unreadable_file(error, path)}",)
        else:
            findings.add(unreadable_file(error, path))
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
        check_checkpoint(storage, path, record, level, findings, num_threads, with_tensors=with_tensors)
    if findings.num_problems:
        _check_still_there(storage, path, info.record_id)
    return VerifyReport(
        path=f"{storage.root}/{path}",
        state=info.state,
        level=level,
        notes=(
            *notes,
            *findings.notes,
            *_shared(storage, path, findings),
            *_consider_mark(storage, info, level, findings),
        ),
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
            findings.add(unreadable_file(error, path))
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

    A step that the storage refuses to read is reported as ``unreadable``, and does not hide the others.

    ``on_step`` is called with each step before it is read, and may return a progress callback.

    Raises:
        CheckpointNotFoundError: the folder holds no step, or none that was ever committed.
    """
    entries = catalog.scan(storage, folder, keep_going=True)
    committed = [entry for entry in entries if entry.state != "incomplete"]
    if not committed:
        what = "only steps that were never committed" if entries else "no steps"
        raise CheckpointNotFoundError(f"{storage.root}/{folder} holds {what}", path=folder)
    reports = []
    for entry in committed:
        # A live run deletes and replaces steps while we read.
        with contextlib.suppress(CheckpointNotFoundError):
            progress = on_step(entry.step)
            try:
                reports.append(verify_in(storage, entry.path, level, num_threads=num_threads, progress=progress))
            except StorageError as error:
                reports.append(_unreadable(join_path(storage.root, entry.path), level, error))
    return reports


def _unreadable(path: str, level: Level, error: StorageError) -> VerifyReport:
    return VerifyReport(
        path=path,
        state="unreadable",
        level=level,
        problems=(),
        num_problems=0,
        num_items=0,
        nbytes=0,
        read_nbytes=0,
        unchecked_nbytes=0,
        seconds=0.0,
        notes=(f"it can't be read: {error.message}",),
    )


def _notes(record: CommitRecord) -> tuple[str, ...]:
    notes = [record.note] if record.note else []
    if not record.is_own:  # other programs leave files of an older save, or of one with more ranks
        stale = [name for name in sorted(record.files) if name.endswith(".distcp")]
        stale = [name for name in stale if name not in record.manifest.files]
        if stale:
            notes.append(f"not part of this checkpoint, left by another save: {', '.join(listed(stale))}")
    return tuple(notes)


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
    if level == "full" and not findings.num_problems and info.state != "newer":
        mark = f"{storage.root}/{damage_mark(info.path)}"
        return (f"a loader found it damaged ({said}), but now every byte is verified; to use it again remove {mark}",)
    findings.add(Problem(f"a loader found it damaged: {said}", info.name))
    return ()
