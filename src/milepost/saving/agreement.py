"""How the ranks agree on a save before it begins: one gather, one scatter, and a plan that is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from milepost.collective.comm import Comm, failure_on, merge_failures, raise_interrupt
from milepost.collective.progress import watched
from milepost.errors import MilepostError, SaveError, StorageError
from milepost.run import commit
from milepost.run.assemble import SaveInfo
from milepost.saving.job import Form, Keep, SaveJob
from milepost.storage.base import Storage
from milepost.tensors.layout import stored_as
from milepost.tensors.plan import LocalLayout, WritePlan, plan_save
from milepost.tensors.state import EMPTY_MAPPINGS, FlatState, Path, encode_object, flatten, unwrap_stateful


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What this rank brings to a save. An ``error`` is kept for the exchange, where every rank hears of it."""

    flat: FlatState
    objects: Mapping[str, bytes]
    layout: LocalLayout
    fingerprint: str
    error: MilepostError | None = None


@dataclass(frozen=True, slots=True)
class _Offer:
    """A rank's layout, only if it is not the one that rank 0 knows already."""

    layout: LocalLayout | None
    paths: Mapping[str, Path] | None
    error: MilepostError | None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What rank 0 tells a rank; a plan only if it changed."""

    save_id: str
    attempt: str
    plan: WritePlan | None
    error: MilepostError | None


def _nothing(error: MilepostError) -> Prepared:
    return Prepared(FlatState({}, {}, {}, {}), {}, LocalLayout((), ()), "", error)


class Agreement:
    """Turns what each rank brings into a job for each, reusing the plan while the structure stays the same.

    From the second save of an unchanged structure on, ranks exchange a flag and a save id, no layouts.
    """

    def __init__(self, storage: Storage, comm: Comm, *, timeout_s: float):
        self._storage = storage
        self._comm = comm
        self._timeout_s = timeout_s
        self._fingerprint = ""
        self._plan: WritePlan | None = None
        # Rank 0 only: every rank's last layout and paths.
        self._layouts: list[LocalLayout] = []
        self._paths: list[Mapping[str, Path]] = []

    def prepare(
        self,
        make_state: Callable[[], Mapping[str, Any]],
        dtype: torch.dtype | None,
        error: MilepostError | None = None,
    ) -> Prepared:
        """Flatten and encode what ``make_state`` returns, floating-point tensors as ``dtype``.

        ``error`` is one that this rank has met before (in the background); then nothing is prepared.
        """
        if error is not None:
            return _nothing(error)
        try:
            flat = flatten(unwrap_stateful(make_state()))
            if dtype is not None:
                flat = replace(flat, tensors={key: stored_as(leaf, dtype) for key, leaf in flat.tensors.items()})
            objects = {key: encode_object(key, value) for key, value in flat.objects.items()}
            layout = flat.layout()
            return Prepared(flat, objects, layout, layout.fingerprint(flat.paths))
        except BaseException as cause:  # noqa: BLE001 - a state_dict() of the user's may raise anything
            return _nothing(failure_on(self._comm.rank, cause))

    def agree(
        self, target: str, prepared: Prepared, info: SaveInfo, keep: Keep | None, form: Form | None = None
    ) -> tuple[SaveJob, bool]:
        """This rank's job, and whether the previous plan was reused. Collective.

        Rank 0 plans for all, opens the attempt, and tells each rank its part.

        Raises:
            SaveError, PlanError, ConfigError: on every rank, if any rank brought or met an error.
        """
        known = self._plan is not None and prepared.fingerprint == self._fingerprint
        if known or prepared.error is not None:
            offer = _Offer(None, None, prepared.error)
        else:
            offer = _Offer(prepared.layout, prepared.flat.paths, None)
        offers = self._comm.gather(offer)
        answer = self._comm.scatter(self._plan_for_all(target, offers) if offers is not None else None)
        if answer.error is not None:
            self._plan = None  # no rank may count on what rank 0 remembers
            raise_interrupt(prepared.error)
            raise answer.error
        if answer.plan is not None:
            self._plan = answer.plan
        self._fingerprint = prepared.fingerprint
        assert self._plan is not None
        is_first = self._comm.rank == 0
        job = SaveJob(
            target=target,
            attempt=answer.attempt,
            save_id=answer.save_id,
            rank=self._comm.rank,
            world_size=self._comm.world_size,
            plan=self._plan,
            info=self._with_structure(info, prepared.flat) if is_first else None,
            keep=keep if is_first else None,
            timeout_s=self._timeout_s,
            form=form,
        )
        return job, answer.plan is None

    def _plan_for_all(self, target: str, offers: list[_Offer]) -> list[_Answer]:
        """Rank 0: the answer to each rank's offer. Errors become answers, so that no rank is left waiting."""
        try:
            failure = merge_failures([offer.error for offer in offers])
            if failure is not None:
                raise failure
            plans: list[WritePlan | None] = [None] * len(offers)
            if any(offer.layout is not None for offer in offers):
                self._learn(offers)
                plans = list(plan_save(self._layouts))
            save_id = commit.new_save_id()
            with watched(f"rank 0 is making the folder for the save of {self._storage.root}/{target}"):
                attempt = commit.begin_attempt(self._storage, target, save_id)
            return [_Answer(save_id, attempt, plan, None) for plan in plans]
        except StorageError as cause:
            return self._refuse(offers, SaveError(cause.message, path=cause.path))
        except BaseException as cause:  # noqa: BLE001 - every rank must hear of it
            return self._refuse(offers, cause)

    def _refuse(self, offers: list[_Offer], cause: BaseException) -> list[_Answer]:
        self._layouts, self._paths = [], []
        told = failure_on(0, cause)
        return [_Answer("", "", None, told) for _ in offers]

    def _learn(self, offers: list[_Offer]) -> None:
        if not self._layouts:
            self._layouts = [LocalLayout((), ())] * len(offers)
            self._paths = [{}] * len(offers)
        for rank, offer in enumerate(offers):
            if offer.layout is not None and offer.paths is not None:
                self._layouts[rank] = offer.layout
                self._paths[rank] = offer.paths

    def _with_structure(self, info: SaveInfo, flat: FlatState) -> SaveInfo:
        paths: dict[str, Path] = {}
        for found in self._paths:
            paths.update(found)
        # `str`: a TorchVersion would make the writer process import torch to unpickle it.
        extra = {**info.extra, EMPTY_MAPPINGS: flat.empty} if flat.empty else info.extra
        return replace(info, paths=paths, extra=extra, producer={"torch": str(torch.__version__)})
