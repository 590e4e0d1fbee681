"""The part of a save after its plan: write, sign off, publish, prune.

Without torch and collectives: any thread or process can run it, and the ranks agree only through records in storage.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from milepost.config import NUM_IO_THREADS, part_of
from milepost.errors import MilepostError, SaveError, StorageError, listed
from milepost.format.manifest import Manifest
from milepost.format.shares import Share
from milepost.run import catalog, commit, retention
from milepost.run.assemble import SaveInfo
from milepost.run.deletion import Deletion
from milepost.run.node_part import NodePart
from milepost.run.outcome import fail_attempt, wait_for_outcome
from milepost.run.place import Place
from milepost.run.signoff import SignOff, WrittenFile, segment_of, sign_off, wait_for_sign_offs
from milepost.saving.frozen import FrozenFile, share_unchanged
from milepost.saving.writer import BlockSource, FileImage, parts_of, write_file
from milepost.storage.base import Storage, join, split
from milepost.tensors.plan import WritePlan

log = logging.getLogger("milepost")


@dataclass(frozen=True, slots=True)
class Keep:
    """The steps of ``folder`` to keep once a save is committed."""

    folder: str
    rules: retention.Rules


class Form(Protocol):
    """A format other than DCP's records, such as Hugging Face's. Must pickle, and not need torch."""

    def write(
        self,
        storage: Storage,
        place: Place,
        plan: WritePlan,
        source: BlockSource | FileImage,
        *,
        is_first: bool,
        num_threads: int,
        on_progress: Callable[[int], None] | None,
    ) -> tuple[tuple[WrittenFile, ...], tuple[Mapping[str, Share], ...]]:
        """Write and sync this rank's data at ``place``; on the first rank also the common files.

        Returns the files of only this rank, and its shares of the digests of shared files.
        """

    def publish(
        self,
        storage: Storage,
        attempt: str,
        target: str,
        signed: Sequence[SignOff],
        info: SaveInfo,
        together: Deletion | None,
    ) -> None:
        """Check completeness and publish the checkpoint at ``target``; see ``commit.publish_files``."""


@dataclass(frozen=True, slots=True)
class SaveJob:
    """One rank's share of one save, as plain data that can be sent to a writer process."""

    target: str
    """Path of the checkpoint, relative to the storage's root."""
    attempt: str
    """The folder of this attempt, ignored by readers."""
    save_id: str
    rank: int
    world_size: int
    plan: WritePlan
    info: SaveInfo | None
    """The manifest's content besides the items; only on the publishing rank: rank 0, or the first of a node."""
    keep: Keep | None
    """On that rank only: the retention rules to apply after the commit; None prunes nothing."""
    timeout_s: float
    """Seconds to wait for the other ranks' records, and for the commit."""
    form: Form | None = None
    """None: DCP's records, Milepost's own format."""
    num_threads: int = NUM_IO_THREADS
    """Number of threads that write this rank's file."""
    order: int = 0
    """Position of the save in the order of commits, for a file of frozen tensors."""
    earlier: FrozenFile | None = None
    """The file of frozen tensors in the previous step, shared if its bytes are equal; None: always write it."""
    part: NodePart | None = None
    """The part of the step on this rank's node, with per-node folders."""
    hosts: tuple[str, ...] = ()
    """On rank 0: the host of each rank; empty for one that is not known."""

    @property
    def publishes(self) -> bool:
        """True if this rank commits."""
        return self.info is not None

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data saved by this rank."""
        return self.plan.data_nbytes


class JobMonitor:
    """Receives a job's progress, and is polled while it waits. This base class does nothing."""

    def wrote(self, nbytes: int) -> None:
        """Record that ``nbytes`` more are written. Called from any thread."""

    def signed_off(self, files: Sequence[WrittenFile]) -> None:
        """Record that ``files`` are durable and signed off."""

    def why_stop(self) -> str | None:
        """Return the reason to stop waiting for other ranks, or None.

        Raises:
            SaveError: another rank has reported its failure; the job ends with this error.
        """
        return None


@dataclass(frozen=True, slots=True)
class JobResult:
    """The outcome of a job. On ranks other than 0, ``commit_s`` is the wait for rank 0, if any."""

    write_s: float
    commit_s: float
    nbytes: int
    """Bytes written by this rank."""
    contents: Mapping[str, str]
    """On rank 0: a digest of all tensors' CRCs of each part of the state. Equal if nothing changed."""
    frozen: FrozenFile | None = None
    """This rank's file of frozen tensors, for the next save to share."""
    deleted: tuple[str, ...] = ()
    """On rank 0: names of the steps deleted by retention after this commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """The outcome of a save on this rank. Times are in seconds of wall clock."""

    path: str
    save_id: str
    nbytes: int
    """Bytes written by this rank."""
    plan_s: float
    stage_s: float = 0.0
    write_s: float
    commit_s: float
    reused_plan: bool
    """True if the plan of the previous save was reused, without exchanging layouts."""
    contents: Mapping[str, str]
    """On rank 0: a digest of each part of the state. Equal in two saves if nothing changed between them."""
    deleted: tuple[str, ...] = ()
    """On rank 0: names of the steps deleted by retention after this commit."""

    @classmethod
    def of(
        cls, path: str, job: SaveJob, result: JobResult, *, plan_s: float, stage_s: float = 0.0, reused_plan: bool
    ) -> SaveReport:
        return cls(
            path=path,
            save_id=job.save_id,
            nbytes=result.nbytes,
            plan_s=plan_s,
            stage_s=stage_s,
            write_s=result.write_s,
            commit_s=result.commit_s,
            reused_plan=reused_plan,
            contents=result.contents,
            deleted=result.deleted,
        )


def run_job(
    storage: Storage,
    job: SaveJob,
    source: BlockSource | FileImage,
    objects: Mapping[str, bytes],
    monitor: JobMonitor | None = None,
    *,
    detached: bool = False,
) -> JobResult:
    """Write this rank's file and sign it off; on rank 0 also wait for all ranks, publish and prune.

    When this returns on rank 0 the checkpoint is committed. ``detached`` jobs run without a training thread that could
    exchange the outcome: other ranks then wait for it in storage. A failure is recorded in the attempt, for the ranks
    that wait for this one.

    Raises:
        SaveError: this rank failed, or any rank did (on rank 0, and everywhere if detached), named.
        StorageError: an operation on the storage failed on this rank.
    """
    monitor = JobMonitor() if monitor is None else monitor
    place = Place.of(storage, job.attempt, job.target, job.save_id)
    started = time.monotonic()
    contents: Mapping[str, str] = {}
    deleted: tuple[str, ...] = ()
    files: tuple[WrittenFile, ...] = ()
    shares: tuple[Mapping[str, Share], ...] = ()
    try:
        if job.form is not None:
            files, shares = job.form.write(
                *(storage, place, job.plan, source),
                is_first=job.publishes,
                num_threads=job.num_threads,
                on_progress=monitor.wrote,
            )
            written_nbytes = sum(file.nbytes for file in files) or job.data_nbytes
        else:
            written_nbytes = 0
            for plan, part in parts_of(job.plan, source):
                content, file = "", None
                if plan is job.plan.frozen:
                    content, file = share_unchanged(storage, place, plan, part, job.earlier, job.num_threads)
                if file is not None:
                    monitor.wrote(plan.data_nbytes)
                else:
                    file = write_file(
                        storage, place, plan, part, objects, num_threads=job.num_threads, on_progress=monitor.wrote
                    )
                    file = replace(file, content=content, since=job.order if content else None)
                    written_nbytes += file.nbytes
                files = (*files, file)
        # The file's content is durable; the committing rank makes all names durable by syncing the folder.
        sign_off(storage, job.attempt, SignOff(job.rank, job.save_id, segment_of(files), shares=shares))
        monitor.signed_off(files)
        wrote = time.monotonic()
        if job.info is not None:
            contents, deleted = _commit(storage, job, job.info, monitor)
    except BaseException as error:
        report_failure(storage, job, error)
        raise
    if detached and job.info is None:
        wait_for_outcome(
            *(storage, job.attempt, job.target, job.save_id),
            timeout_s=job.timeout_s,
            world_size=job.world_size,
            give_up=monitor.why_stop,
        )
    committed = time.monotonic()
    return JobResult(wrote - started, committed - wrote, written_nbytes, contents, _frozen_of(job, files), deleted)


def _frozen_of(job: SaveJob, files: Sequence[WrittenFile]) -> FrozenFile | None:
    for file in files:
        if file.content and file.since is not None:
            return FrozenFile(job.target, job.save_id, file.file, file.nbytes, file.content, file.since)
    return None


def report_failure(storage: Storage, job: SaveJob, error: BaseException) -> None:
    """Record this rank's failure and its reason in the attempt, for the ranks that wait for it. Never fails itself.

    Rank 0 waits for each rank's sign-off, the others for the outcome recorded by rank 0. The first record is kept, so
    that another process may report the same failure again.
    """
    text = error.message if isinstance(error, MilepostError) else f"{type(error).__name__}: {error}"
    rank = getattr(error, "rank", None)
    if rank is None or rank == job.rank:
        rank, outcome = job.rank, f"rank {job.rank}: {text.removeprefix(f'rank {job.rank}: ')}"
    else:
        outcome = text  # it already names the rank that caused this failure
    records = [partial(sign_off, storage, job.attempt, SignOff(job.rank, job.save_id, error=text))]
    if job.publishes:
        records.append(partial(fail_attempt, storage, job.attempt, outcome, rank=rank))
    for record in records:
        try:
            record()
        except StorageError:
            pass  # already recorded, or impossible; the caller raises the first error
        except Exception:
            log.exception("rank %d failed to save %s and could not record the reason", job.rank, job.target)


def relay_failure(storage: Storage, job: SaveJob, error: SaveError) -> None:
    """Record the failure of another rank that could not do so itself, for a waiting writer process."""
    try:
        if job.publishes:
            failed = error.rank or 0
            if job.part is not None and failed not in job.part.ranks:  # the writer waits for the ranks of its node
                failed = job.part.ranks[-1]
            sign_off(storage, job.attempt, SignOff(failed, job.save_id, error=error.message))
        else:
            fail_attempt(storage, job.attempt, error.message, rank=error.rank)
    except StorageError:
        pass  # already recorded


def save_failure(rank: int, cause: BaseException) -> SaveError:
    """Convert any cause of a failure on ``rank`` to the SaveError raised on every rank."""
    if isinstance(cause, SaveError):
        failure = cause
    else:
        text = cause.message if isinstance(cause, MilepostError) else f"{type(cause).__name__}: {cause}"
        failure = SaveError(text, path=getattr(cause, "path", None), key=getattr(cause, "key", None))
        failure.__cause__ = cause
    if failure.rank is None:
        failure.rank = rank
    return failure


def _commit(
    storage: Storage, job: SaveJob, info: SaveInfo, monitor: JobMonitor
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Publish the checkpoint and prune. Returns a digest of each part of the state, and the names of deleted steps."""
    obsolete = Deletion(storage, split(job.target)[0]) if storage.can_rename else None
    contents = _publish(storage, job, info, monitor, obsolete)
    # Only now: nothing is deleted before its replacement is durable.
    deleted = prune(storage, job.keep, obsolete) if job.keep is not None else ()
    if obsolete is not None:
        obsolete.finish_quietly()
    return contents, deleted


def _publish(
    storage: Storage, job: SaveJob, info: SaveInfo, monitor: JobMonitor, together: Deletion | None
) -> Mapping[str, str]:
    from milepost.format.segment_merger import SegmentMerger  # numpy takes 100 ms, which an import should not cost

    merger = SegmentMerger() if job.form is None else None
    signed = wait_for_sign_offs(
        *(storage, job.attempt, job.world_size, job.save_id),
        timeout_s=job.timeout_s,
        ranks=job.part.ranks if job.part is not None else None,
        hosts=job.hosts,
        give_up=monitor.why_stop,
        merger=merger,
    )
    if info.lineage is not None:
        retention.set_aside(storage, job.target, info.lineage)
    if job.form is not None:
        job.form.publish(storage, job.attempt, job.target, signed, info, together)
        return {}
    manifest = commit.publish(
        *(storage, job.attempt, job.target, signed, info),
        now=time.time(),
        part=job.part,
        merger=merger,
        world_size=job.world_size,
        together=together,
    )
    return contents_of(manifest)


def prune(storage: Storage, keep: Keep, together: Deletion | None = None, *, where: str = "") -> tuple[str, ...]:
    """Delete the steps that no rule keeps, ``together`` with other folders of the run, and return their names.

    ``where`` follows their names in the log, if they are not in the run's own folder.

    The save is committed, so no error of this may make it look failed: each is only logged.
    """
    deleted: list[str] = []
    if keep.rules.keeps_all:
        return ()  # the folder may hold thousands of steps, and looking at each would take longer than the save
    try:
        decisions = retention.plan(catalog.scan(storage, keep.folder), keep.rules, now=time.time())
        _name_others(join(storage.root, keep.folder), decisions)
        reasons = {decision.name: decision.reason for decision in decisions}
        for name in retention.apply(storage, keep.folder, decisions, together):
            log.info("deleted %s%s: %s (keep_latest_k = %d)", name, where, reasons[name], keep.rules.keep_latest_k)
            deleted.append(name)
    except StorageError as error:
        log.warning("an old step could not be deleted: %s", error)
    except Exception:
        log.exception("old steps were not deleted because of an unexpected error (a bug in Milepost)")
    return tuple(deleted)


_named: set[str] = set()


def _name_others(folder: str, decisions: Sequence[retention.Decision]) -> None:
    """Log the steps that are kept because they are of another run, once per folder and process."""
    others = [decision.name for decision in decisions if decision.reason == retention.OF_ANOTHER_RUN]
    if others and folder not in _named:
        _named.add(folder)
        log.warning(
            "%s holds steps of another run, which this one never deletes: %s. Delete or move them if they are obsolete",
            *(folder, ", ".join(listed(others))),
        )


def contents_of(manifest: Manifest) -> dict[str, str]:
    """Return for each part of the state a digest over the CRC-32s of all its tensors."""
    from milepost.format.columns import table_of

    table = table_of(manifest)
    hashes: dict[str, hashlib.blake2b] = {}
    crcs, first, size = table.crc32.tobytes(), table.first.tolist(), table.crc32.itemsize
    for key, start, stop in zip(table.keys, first, first[1:], strict=False):
        part = part_of(key)
        if part not in hashes:
            hashes[part] = hashlib.blake2b(digest_size=16)
        hashes[part].update(key.encode("utf-8", "surrogatepass") + crcs[start * size : stop * size])
    return {part: digest.hexdigest() for part, digest in hashes.items()}
