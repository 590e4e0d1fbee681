"""``save``: a state dict to a committed checkpoint, on one process or many.

::

    objects -state-> {key: leaf} -layout-> boxes -plan-> WritePlan -write-> files + digests -commit-> visible
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any

import torch

from milepost.catalog import step_of
from milepost.checkpoint import commit
from milepost.checkpoint.assemble import SaveInfo
from milepost.checkpoint.job import JobTimes, SaveJob, run_job
from milepost.checkpoint.layout import stored_as
from milepost.checkpoint.plan import LocalLayout, WritePlan, plan_save
from milepost.checkpoint.stage import TensorBlocks
from milepost.checkpoint.state import FlatState, Path, encode_object, flatten, unwrap_stateful
from milepost.comm import Comm, default_comm, failure_on, merge_failures, raise_together
from milepost.errors import MilepostError
from milepost.storage import open_storage
from milepost.storage.base import Storage


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did, as this rank saw it. Times are in seconds of wall clock."""

    path: str
    save_id: str
    nbytes: int
    """Bytes that this rank wrote."""
    plan_s: float
    write_s: float
    commit_s: float
    reused_plan: bool
    """Whether the plan of the previous save was taken, without exchanging layouts."""


def save(
    path: str | PathLike[str],
    state_dict: Mapping[str, Any],
    *,
    comm: Comm | None = None,
    step: int | None = None,
) -> SaveReport:
    """Save ``state_dict`` as a checkpoint at ``path``. Returns when it is committed; collective over all ranks.

    ``state_dict`` may nest mappings and lists; its values are tensors (DTensors too), plain values, or objects with
    ``state_dict()``. What was at ``path`` before stays whole until the moment the new checkpoint takes its place.
    Stock ``torch.distributed.checkpoint.load`` reads the folder.

    Raises:
        SaveError: on every rank, when any rank failed; the message names the rank. Nothing visible has changed.
    """
    storage, target = open_storage(fspath(path))
    saver = Saver(storage, comm if comm is not None else default_comm())
    return saver.save(target, lambda: state_dict, SaveInfo(step=step if step is not None else step_of(target), kind="state"))


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a rank brings to the planning: its layout only if it is not the one that rank 0 knows already."""

    layout: LocalLayout | None
    paths: Mapping[str, Path] | None
    error: MilepostError | None


@dataclass(frozen=True, slots=True)
class _Assignment:
    """What rank 0 answers: a plan only if it changed."""

    save_id: str
    attempt: str
    plan: WritePlan | None
    error: MilepostError | None


class Saver:
    """Saves state dicts of one structure again and again: the plan is made once and reused while it fits.

    From the second save of an unchanged structure on, ranks exchange a flag and a save id, no layouts.
    """

    def __init__(self, storage: Storage, comm: Comm, *, timeout_s: float = 600.0):
        self._storage = storage
        self._comm = comm
        self._timeout_s = timeout_s
        self._fingerprint = ""
        self._plan: WritePlan | None = None
        # Rank 0 only: every rank's last layout and paths.
        self._layouts: list[LocalLayout] = []
        self._paths: list[Mapping[str, Path]] = []

    def save(
        self,
        target: str,
        make_state: Callable[[], Mapping[str, Any]],
        info: SaveInfo,
        *,
        dtype: torch.dtype | None = None,
    ) -> SaveReport:
        """Save what ``make_state`` returns to ``target``, a path in the storage. See :func:`save`.

        ``make_state`` is called here so that its error, too, reaches every rank. With ``dtype``, tensors of a
        floating-point dtype are stored in that one.
        """
        started = time.monotonic()
        flat, objects, error = self._prepare(make_state, dtype)
        job, reused = self._agree(target, flat, info, error)
        planned = time.monotonic()
        times = self._write(job, flat, objects)
        return SaveReport(
            path=f"{self._storage.root}/{target}",
            save_id=job.save_id,
            nbytes=times.nbytes,
            plan_s=planned - started,
            write_s=times.write_s,
            commit_s=times.commit_s,
            reused_plan=reused,
        )

    def _prepare(
        self, make_state: Callable[[], Mapping[str, Any]], dtype: torch.dtype | None
    ) -> tuple[FlatState, dict[str, bytes], MilepostError | None]:
        """Flatten and encode. An error is kept for the exchange, where every rank hears of it."""
        try:
            flat = flatten(unwrap_stateful(make_state()))
            if dtype is not None:
                flat = replace(flat, tensors={key: stored_as(leaf, dtype) for key, leaf in flat.tensors.items()})
            return flat, {key: encode_object(key, value) for key, value in flat.objects.items()}, None
        except Exception as cause:  # noqa: BLE001 - a state_dict() of the user's may raise anything
            return FlatState({}, {}, {}, {}), {}, failure_on(self._comm.rank, cause)

    def _agree(self, target: str, flat: FlatState, info: SaveInfo, error: MilepostError | None) -> tuple[SaveJob, bool]:
        """One gather and one scatter: rank 0 plans for all, opens the attempt, and tells each rank its part."""
        layout = flat.layout()
        fingerprint = layout.fingerprint()
        known = self._plan is not None and fingerprint == self._fingerprint
        offer = _Offer(None, None, error) if known or error else _Offer(layout, flat.paths, None)
        offers = self._comm.gather(offer)
        answers = self._plan_for_all(target, offers) if offers is not None else None
        answer = self._comm.scatter(answers)
        if answer.error is not None:
            self._plan = None  # no rank may count on what rank 0 remembers
            raise answer.error
        if answer.plan is not None:
            self._plan = answer.plan
        self._fingerprint = fingerprint
        assert self._plan is not None
        job = SaveJob(
            target=target,
            attempt=answer.attempt,
            save_id=answer.save_id,
            rank=self._comm.rank,
            world_size=self._comm.world_size,
            plan=self._plan,
            info=self._with_paths(info) if self._comm.rank == 0 else None,
            timeout_s=self._timeout_s,
        )
        return job, answer.plan is None

    def _plan_for_all(self, target: str, offers: list[_Offer]) -> list[_Assignment]:
        """Rank 0: the answer to each rank's offer. Errors become answers, so that no rank is left waiting."""
        try:
            failure = merge_failures([offer.error for offer in offers])
            if failure is not None:
                raise failure
            plans: list[WritePlan | None] = [None] * len(offers)
            changed = [offer for offer in offers if offer.layout is not None]
            if changed:
                self._learn(offers)
                plans = list(plan_save(self._layouts))
            save_id = commit.new_save_id()
            attempt = commit.begin_attempt(self._storage, target, save_id)
            return [_Assignment(save_id, attempt, plan, None) for plan in plans]
        except Exception as cause:  # noqa: BLE001 - every rank must hear of it
            self._layouts, self._paths = [], []
            told = failure_on(0, cause)
            return [_Assignment("", "", None, told) for _ in offers]

    def _learn(self, offers: list[_Offer]) -> None:
        if not self._layouts:
            self._layouts = [LocalLayout((), ())] * len(offers)
            self._paths = [{}] * len(offers)
        for rank, offer in enumerate(offers):
            if offer.layout is not None and offer.paths is not None:
                self._layouts[rank] = offer.layout
                self._paths[rank] = offer.paths

    def _with_paths(self, info: SaveInfo) -> SaveInfo:
        paths: dict[str, Path] = {}
        for found in self._paths:
            paths.update(found)
        return replace(info, paths=paths, producer={"torch": torch.__version__})

    def _write(self, job: SaveJob, flat: FlatState, objects: Mapping[str, bytes]) -> JobTimes:
        failure: MilepostError | None = None
        times = JobTimes(0.0, 0.0, 0)
        try:
            times = run_job(self._storage, job, TensorBlocks(flat.tensors), objects)
        except Exception as cause:  # noqa: BLE001 - whatever it was, the other ranks must hear of it
            failure = failure_on(self._comm.rank, cause)
        try:
            raise_together(self._comm, failure)
        except MilepostError:
            if self._comm.rank == 0:
                commit.abort_attempt(self._storage, job.attempt)
            raise
        return times
