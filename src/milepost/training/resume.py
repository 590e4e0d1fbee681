"""Resuming a run: from which step, into what, and what happens when its bytes are damaged."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from milepost.collective.comm import Comm, failure_on, on_rank_0, raise_together
from milepost.config import CheckpointConfig, part_of
from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    StateMismatchError,
    StorageError,
)
from milepost.format.manifest import Manifest
from milepost.loading.load import LoadReport, load_from
from milepost.loading.target import Stored, Target
from milepost.run import catalog
from milepost.run.catalog import StepEntry
from milepost.saving.job import Form
from milepost.storage import open_storage
from milepost.storage.base import Storage, join
from milepost.tensors.layout import TensorLeaf
from milepost.tensors.state import flatten
from milepost.tensors.tree import Read
from milepost.training.training_state import StateLoad, TrainingState

log = logging.getLogger("milepost")


class WeightsFormat(Protocol):
    """Another format that a run may start from and end in, as a manager knows it. See ``milepost.HfModel``."""

    def form_of(self, dtypes: Mapping[str, str]) -> Form:
        """Return the form of a save of tensors of these keys and dtypes, all ranks' together. Pure.

        Raises:
            ConversionError: such tensors can't be stored in this format.
        """

    def record(self) -> Mapping[str, Any]:
        """What each step is to record of the model, in its manifest's ``extra``."""

    def check_record(self, extra: Mapping[str, Any], path: str) -> list[str]:
        """Notes on the step at ``path`` that has recorded ``extra``.

        Raises:
            StateMismatchError: it is of another model.
        """

    def load(self, path: str, leaves: Mapping[str, TensorLeaf], *, num_threads: int, logs_progress: bool) -> LoadReport:
        """Fill this rank's ``leaves`` from the weights at ``path``; empty: from where the format itself says.

        Not collective. Nothing is changed when the weights do not fit.
        """


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to load. ``step`` is None for ``initial_load_path``, which is not a step of this run."""

    path: str
    """Relative to the run's storage for a step; as configured for an initial load."""
    step: int | None
    model_only: bool
    may_fall_back: bool
    """Whether an older step may be taken when this one turns out to be damaged."""
    notes: tuple[str, ...] = field(default=())


def choose(
    entries: Sequence[StepEntry], config: CheckpointConfig, rejected: Mapping[int, str], folder: str
) -> Choice | None:
    """Choose what a run loads at its start; None for a new run, which needs a folder without any saved step.

    ``rejected`` maps steps that were tried and found damaged to what was wrong. ``folder`` is for messages.

    Raises:
        CheckpointNotFoundError: ``load_step`` is not there.
        CheckpointDamagedError: ``load_step`` is damaged, or every step is.
        StateMismatchError: only steps without optimizer and train state are there.
    """
    usable = [entry for entry in entries if entry.is_usable and entry.step not in rejected]
    if config.load_step >= 0:
        return _named_step(entries, usable, config.load_step, rejected, folder)
    full = max((e for e in usable if e.kind != "model"), key=lambda e: e.step, default=None)
    if full is not None:
        return Choice(full.path, full.step, False, True, tuple(_notes(entries, full.step, rejected)))
    seed = next((e for e in usable if e.step == 0), None)
    if seed is not None:
        return Choice(seed.path, 0, True, False, ("step 0 is a seed checkpoint: it holds the initial weights",))
    if usable:
        raise StateMismatchError(
            f"{folder} holds no step to resume from: {_steps(usable)} "
            f"{'is' if len(usable) == 1 else 'are'} model-only, without optimizer and train state. To start a new run "
            f"from those weights, set checkpoint.initial_load_path = {folder}/step-{usable[-1].step} and another "
            "job.dump_folder or checkpoint.folder",
        )
    damaged = [e for e in entries if e.state == "damaged" or e.step in rejected]
    if damaged:
        lines = "".join(f"\n  step {e.step}: {rejected.get(e.step, e.reason)}" for e in damaged)
        raise CheckpointDamagedError(
            f"every step in {folder} is damaged; refusing to start a new run over existing steps. "
            "Look at them with `milepost verify`, "
            f"restore one from a backup, or move the folder away to start anew:{lines}",
            path=folder,
        )
    if config.initial_load_path or config.initial_load_in_hf:
        return Choice(config.initial_load_path, None, config.initial_load_model_only, False)
    return None


def _named_step(
    entries: Sequence[StepEntry], usable: Sequence[StepEntry], step: int, rejected: Mapping[int, str], folder: str
) -> Choice:
    entry = next((e for e in entries if e.step == step), None)
    available = [e.step for e in usable]
    if entry is None or entry.state == "incomplete":
        what = "was never committed" if entry is not None else "does not exist"
        there = f"steps that do: {', '.join(map(str, available))}" if available else "there are no committed steps"
        raise CheckpointNotFoundError(
            f"checkpoint.load_step = {step}: step {step} {what} in {folder}; {there}",
            path=folder,
            available=available,
        )
    if not entry.is_usable or step in rejected:
        raise CheckpointDamagedError(
            f"checkpoint.load_step = {step}: {folder}/step-{step} is damaged: {rejected.get(step, entry.reason)}. "
            "Choose another step, or leave load_step at -1 to resume from the newest verified one",
            path=entry.path,
        )
    # Step 0 holds no optimizer state worth loading; a later model-only step is refused when its parts are missed.
    return Choice(entry.path, step, step == 0 and entry.kind == "model", False)


def _notes(entries: Sequence[StepEntry], chosen: int, rejected: Mapping[int, str]) -> list[str]:
    """Notes on newer steps that were passed over."""
    notes = []
    for entry in entries:
        if entry.step <= chosen:
            continue
        if entry.state == "damaged" or entry.step in rejected:
            notes.append(f"step {entry.step} is newer but damaged: {rejected.get(entry.step, entry.reason)}")
        elif entry.is_usable:
            notes.append(f"step {entry.step} is newer but holds only the model: resuming from step {chosen}")
        else:
            notes.append(f"step {entry.step} is newer but was never committed: {entry.reason}")
    return notes


def _steps(entries: Sequence[StepEntry]) -> str:
    numbers = ", ".join(str(e.step) for e in entries)
    return f"step {numbers}" if len(entries) == 1 else f"steps {numbers}"


class Loader:
    """Loads into the live objects of a run. All methods are collective but :meth:`scan`."""

    def __init__(
        self,
        storage: Storage,
        folder: str,
        config: CheckpointConfig,
        comm: Comm,
        state: TrainingState,
        layout: Mapping[str, int],
        weights_format: WeightsFormat | None,
    ):
        self._storage = storage
        self._folder = folder
        self._config = config
        self._comm = comm
        self._state = state
        self._layout = layout
        self._format = weights_format
        self._reading = ""  # save id of the checkpoint that is being loaded
        self._warned: set[int] = set()  # of these steps

    def scan(self) -> list[StepEntry]:
        """The steps of the run's folder."""
        return catalog.scan(self._storage, self._folder)

    def load(self) -> LoadReport | None:
        """See ``CheckpointManager.load``."""
        rejected: dict[int, str] = {}
        while True:
            choice = on_rank_0(self._comm, partial(self._choose, rejected))
            if choice is None:
                return None
            if choice.step is None and self._config.initial_load_in_hf:
                return self._load_weights(choice)
            into = _Into(self._state, self._wanted(choice), self._comm.world_size, self._layout)
            storage, path = (self._storage, choice.path) if choice.step is not None else open_storage(choice.path)
            model_notes: list[str] = []
            try:
                report = load_from(
                    storage,
                    path,
                    partial(self._make_target, into, join(storage.root, path), model_notes),
                    check=into.check,
                    strict=True,
                    comm=self._comm,
                    must_be_wanted=into.is_complete,
                    num_threads=self._config.num_io_threads,
                )
            except CheckpointDamagedError as error:
                if not choice.may_fall_back or choice.step is None:
                    raise
                if on_rank_0(self._comm, partial(self._mark_damaged, choice.path, error.message)):
                    rejected[choice.step] = error.message
                # Else it was replaced while it was read: look again.
                continue
            notes = [*choice.notes, *dict.fromkeys(model_notes), *self._restore(into)]
            return replace(report, resumed_step=choice.step, notes=tuple(notes))

    def _wanted(self, choice: Choice) -> tuple[str, ...]:
        parts = ("model",) if choice.model_only else self._state.present()
        return tuple(part for part in parts if part not in self._config.exclude_from_loading)

    def _make_target(self, into: _Into, path: str, notes: list[str], manifest: Manifest, read: Read) -> Target:
        self._reading = manifest.save_id
        if self._format is not None and into.wants_model:
            notes += self._format.check_record(manifest.extra, path)
        return into.prepare(manifest, read)

    def _restore(self, into: _Into) -> list[str]:
        """Hand what was read to the live objects; what there is to note. Collective."""
        failure, notes = None, []
        try:
            notes = into.restore()
        except BaseException as cause:  # noqa: BLE001 - a load_state_dict() of the user's may raise anything
            failure = failure_on(self._comm.rank, cause)
        raise_together(self._comm, failure)
        left = self._config.exclude_from_loading
        return [*notes, f"left as freshly built: {', '.join(left)}"] if left else notes

    def _load_weights(self, choice: Choice) -> LoadReport:
        """Start from weights in another format; each rank reads only the ranges that it holds."""
        assert self._format is not None, "the manager has checked it"
        report, failure = None, None
        try:
            load = self._state.loading_weights()
            report = self._format.load(
                choice.path,
                flatten(load.prepare().values).tensors,
                num_threads=self._config.num_io_threads,
                logs_progress=self._comm.rank == 0,
            )
            load.restore()
        except BaseException as cause:  # noqa: BLE001 - whatever it was, the other ranks must hear of it
            failure = failure_on(self._comm.rank, cause)
        raise_together(self._comm, failure)
        assert report is not None
        return replace(report, notes=(*choice.notes, *report.notes))

    def _choose(self, rejected: dict[int, str]) -> Choice | None:
        """What to load; steps that are passed over for it are warned of, once. On rank 0."""
        entries = self.scan()
        choice = choose(entries, self._config, rejected, join(self._storage.root, self._folder))
        if choice is None or choice.step is None or not choice.may_fall_back:
            return choice
        for entry in entries:
            if entry.step > choice.step and not entry.is_usable and entry.step not in {*rejected, *self._warned}:
                what = f"damaged: {entry.reason}" if entry.state == "damaged" else f"{entry.state}: {entry.reason}"
                log.warning(
                    "%s/%s is %s\nFalling back to an older step; this one is left where it is.",
                    self._storage.root,
                    entry.path,
                    what,
                )
                self._warned.add(entry.step)
        return choice

    def _mark_damaged(self, path: str, reason: str) -> bool:
        """Mark the step that was being read; False if another save has taken its place meanwhile."""
        found = catalog.examine(self._storage, path)
        if found is not None and found.is_usable and found.save_id != self._reading:
            return False
        left = "" if self._config.load_only else ", marked: it is not tried again"
        log.warning("%s\nFalling back to an older step; the damaged one is left where it is%s.", reason, left)
        if self._config.load_only:
            return True
        try:
            catalog.mark_damaged(self._storage, path, reason, now=time.time())
        except StorageError as error:  # it is passed over in this run all the same
            log.warning("the mark could not be left: %s", error)
        return True


class _Into:
    """The parts of a training state that are wanted, and their load once the checkpoint's manifest is known."""

    def __init__(self, state: TrainingState, wanted: tuple[str, ...], world_size: int, layout: Mapping[str, int]):
        self._state = state
        self._wanted = wanted
        self._world_size = world_size
        self._layout = layout
        self._load: StateLoad | None = None

    @property
    def wants_model(self) -> bool:
        return "model" in self._wanted

    def prepare(self, manifest: Manifest, read: Read) -> Target:
        """What to read into; the live objects are not changed."""
        same_layout = manifest.world_size == self._world_size and dict(manifest.layout) == self._layout
        self._load = self._state.loading(self._wanted, Stored(manifest, read), same_layout=same_layout)
        return self._load.prepare()

    def check(self) -> None:
        """Refuse what does not fit, once all but the live tensors is read."""
        if self._load is not None:
            self._load.check()

    def is_complete(self, key: str) -> bool:
        """Whether a stored key must have a place: weights and optimizer state are never left out silently."""
        return part_of(key) in self._wanted and part_of(key) in ("model", "optimizer")

    def restore(self) -> list[str]:
        """Hand what was read to the live objects. Returns remarks for the log."""
        assert self._load is not None, "restored after it was read"
        return self._load.restore()
