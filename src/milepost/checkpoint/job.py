"""What is left of a save once it is planned: write, sign off, commit. No torch and no collective: any thread or
process can do it, and the ranks agree through storage records alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from milepost.checkpoint import commit
from milepost.checkpoint.assemble import SaveInfo
from milepost.checkpoint.plan import WritePlan
from milepost.checkpoint.signoff import SignOff, sign_off, wait_for_sign_offs
from milepost.checkpoint.writer import BlockSource, WrittenFile, write_file
from milepost.storage.base import Storage


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
    timeout_s: float
    """How long rank 0 waits for the other ranks' records."""


@dataclass(frozen=True, slots=True)
class JobTimes:
    """Seconds spent writing (with sync) and committing, and the bytes that this rank wrote."""

    write_s: float
    commit_s: float
    nbytes: int


def run_job(storage: Storage, job: SaveJob, source: BlockSource, objects: Mapping[str, bytes]) -> JobTimes:
    """Write this rank's file and sign it off; on rank 0 also wait for all ranks and publish.

    When this returns on rank 0 the checkpoint is committed. An error is left in the rank's record, so that rank 0
    does not wait for it in vain.

    Raises:
        SaveError: this rank failed, or (on rank 0) any rank did, named.
        StorageError: an operation on the storage failed on this rank.
    """
    started = time.monotonic()
    written = write_and_sign_off(storage, job, source, objects)
    wrote = time.monotonic()
    if job.info is not None:
        signed = wait_for_sign_offs(storage, job.attempt, job.world_size, job.save_id, timeout_s=job.timeout_s)
        commit.publish(storage, job.attempt, job.target, signed, job.info, now=time.time())
    return JobTimes(wrote - started, time.monotonic() - wrote, sum(file.nbytes for file in written))


def write_and_sign_off(
    storage: Storage, job: SaveJob, source: BlockSource, objects: Mapping[str, bytes]
) -> tuple[WrittenFile, ...]:
    """Write this rank's file, if it has one, and leave its sign-off, or word of its failure.

    Raises:
        StorageError: an operation on the storage failed.
    """
    folder = commit.data_folder(job.attempt)
    try:
        written = () if job.plan.is_empty else (write_file(storage, folder, job.plan, source, objects),)
        storage.sync_folder(folder)
    except Exception as error:
        sign_off(storage, job.attempt, SignOff(job.rank, job.save_id, error=f"{type(error).__name__}: {error}"))
        raise
    sign_off(storage, job.attempt, SignOff(job.rank, job.save_id, written))
    return written
