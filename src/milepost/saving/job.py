"""What is left of a save once it is planned: write, sign off, commit, prune. No torch and no collective: any thread or
process can do it, and the ranks agree through storage records alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from milepost.config import part_of
from milepost.errors import StorageError
from milepost.run import catalog, commit, retention
from milepost.run.assemble import SaveInfo
from milepost.run.signoff import SignOff, WrittenFile, sign_off, wait_for_sign_offs
from milepost.saving.writer import BlockSource, FileImage, write_file
from milepost.storage.base import Storage
from milepost.tensors.plan import WritePlan

log = logging.getLogger("milepost")


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep of a run's older steps once a save is committed; see ``retention.plan``."""

    folder: str
    latest_k: int
    every_n: int = 0
    protected: Mapping[int, str] = field(default_factory=dict)


class Form(Protocol):
    """Files of another format than DCP's records, such as Hugging Face's. Must pickle, and need no torch."""

    def write(
        self,
        storage: Storage,
        folder: str,
        plan: WritePlan,
        source: BlockSource | FileImage,
        *,
        is_first: bool,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        """Write and sync what this rank holds into ``folder``; on the first rank also what belongs to all."""

    def publish(
        self, storage: Storage, attempt: str, target: str, info: SaveInfo, *, save_id: str, world_size: int
    ) -> None:
        """Check that all is there and make it the checkpoint at ``target``."""


@dataclass(frozen=True, slots=True)
class SaveJob:
    """One rank's share of one save."""

    target: str
    """Where the checkpoint will be, relative to the storage's root."""
    attempt: str
    """The folder of this attempt, which no reader takes for a checkpoint."""
    save_id: str
    rank: int
    world_size: int
    plan: WritePlan
    info: SaveInfo | None
    """What the manifest says beside the items; on rank 0 only, which publishes."""
    keep: Keep | None
    """Rank 0 only: which steps to prune after the commit; None prunes nothing."""
    timeout_s: float
    """How long rank 0 waits for the other ranks' records, and they for its commit."""
    form: Form | None = None
    """None: DCP's records, Milepost's own format."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job did. On ranks but 0, ``commit_s`` is the wait for rank 0 (if it was waited for at all)."""

    write_s: float
    commit_s: float
    nbytes: int
    """Bytes that this rank wrote."""
    contents: Mapping[str, str]
    """On rank 0: for each part of the state, a digest of all its tensors' CRCs. Equal if nothing changed."""


def run_job(
    storage: Storage,
    job: SaveJob,
    source: BlockSource | FileImage,
    objects: Mapping[str, bytes],
    *,
    detached: bool = False,
    on_progress: Callable[[int], None] | None = None,
    give_up: Callable[[], str | None] = lambda: None,
) -> JobResult:
    """Write this rank's file and sign it off; on rank 0 also wait for all ranks, publish and prune.

    When this returns on rank 0 the checkpoint is committed. ``detached`` jobs run without a training thread that
    could exchange the outcome: other ranks then wait for it in storage, and rank 0 leaves it there when it fails.
    ``give_up`` is asked while waiting and says why to stop, or None; or raises the SaveError to end with.

    Raises:
        SaveError: this rank failed, or any rank did (on rank 0, and everywhere if detached), named.
        StorageError: an operation on the storage failed on this rank.
    """
    started = time.monotonic()
    contents: Mapping[str, str] = {}
    try:
        written = write_and_sign_off(storage, job, source, objects, on_progress=on_progress)
        wrote = time.monotonic()
        if job.info is not None:
            contents = _publish(storage, job, job.info, give_up)
    except BaseException as error:
        if detached and job.info is not None:
            with contextlib.suppress(StorageError):  # the first error is the one to tell
                tell_outcome(storage, job, error)
        raise
    if detached and job.info is None:
        commit.wait_for_outcome(storage, job.attempt, job.target, job.save_id, timeout_s=job.timeout_s, give_up=give_up)
    committed = time.monotonic()
    nbytes = sum(file.nbytes for file in written) or sum(item.data_nbytes for item in job.plan.items)
    return JobResult(wrote - started, committed - wrote, nbytes, contents)


def write_and_sign_off(
    storage: Storage,
    job: SaveJob,
    source: BlockSource | FileImage,
    objects: Mapping[str, bytes],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[WrittenFile, ...]:
    """Write this rank's file, if it has one, and leave its sign-off, or word of its failure.

    Raises:
        StorageError: an operation on the storage failed.
    """
    folder = commit.data_folder(job.attempt)
    try:
        written: tuple[WrittenFile, ...] = ()
        if job.form is not None:
            is_first = job.rank == 0
            job.form.write(storage, folder, job.plan, source, is_first=is_first, on_progress=on_progress)
        elif not job.plan.is_empty:
            written = (write_file(storage, folder, job.plan, source, objects, on_progress=on_progress),)
        storage.sync_folder(folder)
        sign_off(storage, job.attempt, SignOff(job.rank, job.save_id, written))
    except BaseException as error:
        with contextlib.suppress(StorageError):  # the first error is the one to tell
            sign_off_failure(storage, job, f"{type(error).__name__}: {error}")
        raise
    return written


def sign_off_failure(storage: Storage, job: SaveJob, message: str) -> None:
    """Tell the rank that commits that this one has failed, so that it does not wait in vain."""
    sign_off(storage, job.attempt, SignOff(job.rank, job.save_id, error=message))


def tell_outcome(storage: Storage, job: SaveJob, error: BaseException) -> None:
    """Tell the ranks that wait for the commit that there will be none, naming the rank where it went wrong."""
    rank = getattr(error, "rank", None)
    if rank is None or rank == job.rank:
        commit.fail_attempt(storage, job.attempt, f"rank {job.rank}: {error}", rank=job.rank)
    else:
        commit.fail_attempt(storage, job.attempt, str(error), rank=rank)


def _publish(storage: Storage, job: SaveJob, info: SaveInfo, give_up: Callable[[], str | None]) -> Mapping[str, str]:
    signed = wait_for_sign_offs(
        storage, job.attempt, job.world_size, job.save_id, timeout_s=job.timeout_s, give_up=give_up
    )
    if job.form is not None:
        job.form.publish(storage, job.attempt, job.target, info, save_id=job.save_id, world_size=job.world_size)
    else:
        commit.publish(storage, job.attempt, job.target, signed, info, now=time.time())
    if job.keep is not None:
        prune(storage, job.keep)
    return contents_of(signed)


def prune(storage: Storage, keep: Keep) -> None:
    """Delete the steps that no rule keeps. The save is committed, so a step that can't be deleted is only logged."""
    try:
        decisions = retention.plan(
            catalog.scan(storage, keep.folder),
            keep_latest_k=keep.latest_k,
            keep_every_n=keep.every_n,
            protected=keep.protected,
            now=time.time(),
        )
        for name in retention.apply(storage, keep.folder, decisions):
            log.info("deleted %s: keep_latest_k = %d", name, keep.latest_k)
    except StorageError as error:
        log.warning("an old step could not be deleted: %s", error)


def contents_of(signed: Sequence[SignOff]) -> dict[str, str]:
    """For each part of the state, a digest over the CRC-32s of all its tensors."""
    crcs = sorted(
        (tensor.item.key, tensor.item.box, tensor.crc32)
        for record in signed
        for file in record.files
        for tensor in file.tensors
    )
    hashes: dict[str, hashlib.blake2b] = {}
    for key, box, crc in crcs:
        digest = hashes.setdefault(part_of(key), hashlib.blake2b(digest_size=16))
        digest.update(f"{key}{box}{crc}".encode())
    return {part: digest.hexdigest() for part, digest in hashes.items()}
