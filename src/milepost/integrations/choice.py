"""Choose and check the step to resume from, before the framework starts.

A framework sets up its data and counters for a given step before its model can be loaded: then it is too late to fall
back to an older step. So all bytes of the step are checked first.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

from milepost.collective.comm import Comm, on_rank_0
from milepost.config import CheckpointConfig
from milepost.run import catalog, checkpoint_record
from milepost.run.takeover import take_over
from milepost.storage import open_storage
from milepost.storage.base import Storage, join
from milepost.training.choice import choose, launch_id
from milepost.verification.verify import verify_in

log = logging.getLogger("milepost")


@dataclass(frozen=True, slots=True)
class Resumable:
    """A step with the full state, all bytes of which were compared with their digests."""

    step: int
    path: str
    world_size: int


def step_to_resume(folder: str, config: CheckpointConfig, comm: Comm) -> Resumable | None:
    """Return the step from which a run in ``folder`` resumes; None for a new run. Collective.

    Damaged steps are marked, logged and skipped, like in :meth:`milepost.CheckpointManager.load`.

    Raises:
        CheckpointDamagedError, CheckpointNotFoundError, StateMismatchError: see ``CheckpointManager.load``.
    """
    return on_rank_0(comm, partial(_choose_checked, folder, config))


def _choose_checked(folder: str, config: CheckpointConfig) -> Resumable | None:
    storage, name = open_storage(folder)
    lock = None if config.load_only else take_over(storage, name)  # a dead run's writers may be about to commit
    try:
        return _first_undamaged(storage, name, folder, config)
    finally:
        if lock is not None:
            lock.release()


def _first_undamaged(storage: Storage, name: str, folder: str, config: CheckpointConfig) -> Resumable | None:
    rejected: dict[int, str] = {}
    while True:
        choice = choose(catalog.scan(storage, name), config, rejected, folder, launch=launch_id())
        if choice is None or choice.step is None:
            return None
        for note in choice.notes:
            log.info("%s", note)
        reason = _damage(storage, choice.path, config.num_io_threads)
        if reason is None:
            manifest = checkpoint_record.read_manifest(storage, choice.path)
            return Resumable(choice.step, join(storage.root, choice.path), manifest.world_size)
        log.warning("%s/%s is damaged: %s\nFalling back to an older step.", storage.root, choice.path, reason)
        if not config.load_only:
            catalog.mark_damaged(storage, choice.path, reason, now=time.time())
        rejected[choice.step] = reason


def _damage(storage: Storage, path: str, num_threads: int) -> str | None:
    report = verify_in(storage, path, num_threads=num_threads)
    return None if not report.problems else "; ".join(problem.message for problem in report.problems[:3])
