"""Small runs of two ranks for the crash tests: they resume, save and end; and checks of the folder they leave."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # else every forked rank imports it, when it makes its optimizer: a second each
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.collective.comm import Comm, SingleProcess
from milepost.run import catalog, takeover
from milepost.run.lock import RunLock
from milepost.run.owner import OWNERLESS_LIFETIME_S
from milepost.run.sweep import is_ours, sweep_leftovers
from milepost.saving import writer
from milepost.saving.async_save import AsyncSaver
from milepost.saving.save import Saver
from milepost.storage import LocalStorage, Storage
from milepost.tensors import plan
from milepost.training import manager as manager_module
from milepost.training import run_saves
from milepost.verification.verify import verify_in

MODES = ("disabled", "async", "async_with_pinned_mem")

WIDTH = 3000
"""Numbers in each tensor: three disk blocks, so that there is something to tear."""

FROZEN = 0.125
"""The value of two tensors that are frozen, so that their file is shared from step to step."""

RUN = "outputs/run"
"""The run's folder. Neither it nor its parent is there before the first save."""

Shown = dict[int, float]
"""The steps that a scan shows, with the one value that all weights of each have."""


class Progress:
    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Model(nn.Module):
    """All weights have one value, so that a mixture of two saves shows; but for two that never change."""

    def __init__(self, value: float):
        super().__init__()
        frozen = (torch.full((WIDTH,), FROZEN) for _ in range(2))
        self.frozen = nn.ParameterList(nn.Parameter(values, requires_grad=False) for values in frozen)
        self.layers = nn.ParameterList(nn.Parameter(torch.full((WIDTH,), value)) for _ in range(4))

    def fill(self, value: float) -> None:
        for parameter in self.layers:
            nn.init.constant_(parameter, value)

    @property
    def value(self) -> float:
        values = {float(v) for p in self.layers for v in (p.detach().min(), p.detach().max())}
        assert len(values) == 1, values
        assert all(bool((p == FROZEN).all()) for p in self.frozen)
        return values.pop()


@dataclass(frozen=True)
class Save:
    """A save that a run makes, and the steps that are deleted after it, in this order."""

    step: int
    value: float
    deletes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """The steps before a run, and the saves that it makes.

    ``ends``: the last save is still in progress when the run ends. ``damaged``: steps with a changed byte.
    """

    before: Shown
    saves: tuple[Save, ...]
    keep: int = 0
    ends: bool = False
    damaged: frozenset[int] = frozenset()

    def stages(self) -> list[tuple[int, Shown]]:
        """Return every state that a scan may show, in order, with the number of saves committed by then."""
        shown = dict(self.before)
        found = [(0, dict(shown))]
        for number, save in enumerate(self.saves, 1):
            shown[save.step] = save.value
            found.append((number, dict(shown)))
            for step in save.deletes:
                del shown[step]
                found.append((number, dict(shown)))
        return found

    @property
    def everything(self) -> Shown:
        """The steps that a scan would show if none were ever deleted."""
        return {**self.before, **{save.step: save.value for save in self.saves}}

    @property
    def after(self) -> Shown:
        return self.stages()[-1][1]


CASES = {
    "first save": Case({}, (Save(2, 7.0),)),
    "later saves": Case({1: 0.5, 2: 1.0}, (Save(4, 7.0), Save(6, 8.0))),
    "the same step again": Case({2: 1.0, 4: 3.0}, (Save(4, 7.0),)),
    # A run keeps the step that it resumed from.
    "deleting old steps": Case({1: 0.5, 2: 0.75, 3: 1.0}, (Save(5, 7.0, (1, 2)), Save(6, 8.0, (5,))), keep=1),
    "save on exit": Case({2: 1.0}, (Save(4, 7.0),), ends=True),
}


DAMAGED = -1.0
"""What is shown of a damaged step."""

AFTER_DAMAGE = Case({1: 0.5, 2: DAMAGED}, (Save(4, 7.0),), damaged=frozenset({2}))
"""The run falls back to step 1, and marks step 2."""


@contextmanager
def impatient(*, timeout_s: float = 20.0, lease_s: float = 0.0) -> Iterator[None]:
    """Each large record is written by itself, and waits are shorter than in production."""
    with (
        mock.patch.object(writer, "GROUP_NBYTES", 1),
        mock.patch.object(plan, "MIN_FROZEN_NBYTES", 1),
        mock.patch.object(takeover, "RunLock", partial(RunLock, lease_s=lease_s)),
        mock.patch.object(run_saves, "Saver", partial(Saver, timeout_s=timeout_s)),
        mock.patch.object(run_saves, "AsyncSaver", ImpatientSaver),
        mock.patch.object(ImpatientSaver, "timeout_s", timeout_s),
    ):
        yield


class ImpatientSaver(AsyncSaver):
    timeout_s = 0.0

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, timeout_s=self.timeout_s, **options)


def train(
    comm: Comm,
    storage: Storage,
    case: Case,
    mode: str = "disabled",
    reported: Callable[[int], None] = lambda _: None,
) -> None:
    """Run: lock the folder, sweep, resume, save, continue training, release.

    ``reported`` is called with the number of saves that the user of this rank knows to be committed.
    """
    model, progress = Model(0.0), Progress()
    with mock.patch.object(manager_module, "open_storage", return_value=(storage, RUN)):
        manager = CheckpointManager(
            "",
            CheckpointConfig(
                enable=True,
                interval=1,
                keep_latest_k=case.keep,
                last_save_model_only=False,
                async_mode=mode,  # type: ignore[arg-type]
            ),
            model=model,
            optimizer=torch.optim.SGD(model.parameters()),
            train_state=progress,
            comm=comm,
        )
    manager.load()
    for number, save in enumerate(case.saves):
        model.fill(save.value)
        progress.step = save.step
        is_last = case.ends and save is case.saves[-1]
        manager.save(save.step, last_step=is_last)
        report_when_committed(manager, partial(reported, number + 1))
        if not is_last:
            manager.maybe_wait_for_staging()
            model.fill(-1.0)
    manager.close()
    reported(len(case.saves))


def report_when_committed(manager: CheckpointManager, reported: Callable[[], None]) -> None:
    """At once if the save was written in the foreground; else as soon as this rank's handle says so."""
    save = manager.pending
    if save is None:
        reported()
    else:
        save.when_done(lambda: None if save.failure else reported())


def prepare(folder: Path, case: Case) -> LocalStorage:
    """A storage that holds what is there before the run."""
    storage = LocalStorage(folder)
    for step, value in case.before.items():
        train(SingleProcess(), storage, Case({}, (Save(step, value),)))
    folder.mkdir(exist_ok=True)
    for step in case.damaged:
        with open(folder / RUN / f"step-{step}" / "__0_0.distcp", "r+b") as file:
            file.seek(2 * WIDTH)
            file.write(b"damage")
    return storage


Known = dict[tuple[tuple[str, bytes], ...], float]
"""The contents of step folders that were verified and loaded already, with the value that they hold."""


def shown(storage: LocalStorage, known: Known | None = None, damaged: frozenset[int] = frozenset()) -> Shown:
    """Return the steps of a scan, each of them verified and loaded, unless its bytes are ``known``.

    Steps that are ``damaged`` may be listed as such or as committed: the damage may not have been found yet.
    """
    known = {} if known is None else known
    found = {}
    for entry in catalog.scan(storage, RUN):
        if entry.step in damaged:
            found[entry.step] = DAMAGED
            continue
        assert entry.state == "committed", entry
        names = [item.name for item in storage.list(entry.path)]
        content = tuple((name, storage.read(f"{entry.path}/{name}")) for name in names)
        if content not in known:
            known[content] = value_of(storage, entry.path, entry.step)
        found[entry.step] = known[content]
    return found


def value_of(storage: LocalStorage, path: str, step: int) -> float:
    report = verify_in(storage, path, num_threads=1)
    assert report.is_sound, report.problems
    model = Model(0.0)
    for parameter in model.frozen:
        nn.init.zeros_(parameter)
    into: dict[str, Any] = {**model.state_dict(), "train_state": {"step": None}}
    milepost.load(f"{storage.root}/{path}", into, allow_unexpected=["optimizer", "rng"])
    assert into["train_state"] == {"step": step}
    return model.value


def check_the_sweep(storage: LocalStorage, found: Shown) -> None:
    """The sweep at the start of a run removes all leftovers with our marker, and no step.

    A power cut before a sync may keep a folder but lose the owner's record in it, or keep a draft but lose its bytes.
    Such a leftover can't be distinguished from another program's, so it stays, and is reported.
    """
    RunLock(storage, RUN, lease_s=0.0).release()
    # An attempt that was just begun has no owner yet; one without an owner is swept only when it is old.
    sweep_leftovers(storage, RUN, now=time.time() + 2 * OWNERLESS_LIFETIME_S)
    listed = storage.list(RUN)
    unsure = [entry for entry in listed if entry.name.startswith(".milepost-") or entry.name.endswith(".part")]
    left = [entry for entry in unsure if not is_ours(storage, RUN, entry)]
    names = {entry.name for entry in listed} - {"events.jsonl"} - {entry.name for entry in left}
    names -= {f".damaged-step-{step}.json" for step in found if found[step] == DAMAGED}
    assert names == {f"step-{step}" for step in found}


NEXT = Save(9, 9.0)


def check_the_next_run(storage: LocalStorage, found: Shown, damaged: frozenset[int] = frozenset()) -> None:
    """Check that it resumes from the newest undamaged step, saves, prunes, and removes the remains of the dead run."""
    resumed: list[int] = []
    next_run = Case(found, (NEXT,), keep=0 if damaged else 1)
    with mock.patch.object(Progress, "load_state_dict", lambda _, state: resumed.append(state["step"])):
        train(SingleProcess(), storage, next_run)
    newest = max(found.keys() - damaged, default=None)
    assert resumed == ([] if newest is None else [newest])
    kept = {step: value for step, value in found.items() if step == newest or damaged} | {NEXT.step: NEXT.value}
    assert shown(storage, damaged=damaged) == kept
    check_the_sweep(storage, kept)
    last_line = storage.read(f"{RUN}/events.jsonl").splitlines()[-1]
    assert json.loads(last_line)["step"] == NEXT.step, last_line


def quiet() -> None:
    """Thousands of runs would log thousands of warnings."""
    logging.getLogger("milepost").setLevel(logging.CRITICAL)
