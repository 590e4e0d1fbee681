"""Loading a run's state: which step, into what, and what happens when its bytes prove damaged."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from milepost.collective.comm import Comm, failure_on, on_rank_0, raise_together
from milepost.config import CheckpointConfig, part_of
from milepost.errors import CheckpointDamagedError, ConfigError, MilepostError, StorageError
from milepost.format.manifest import Manifest
from milepost.interop.hf.form import HfModel
from milepost.interop.hf.load import load_hf
from milepost.loading.load import LoadReport, load_from
from milepost.loading.target import Stored, Target
from milepost.run import catalog
from milepost.storage import open_storage
from milepost.storage.base import Storage, join
from milepost.tensors.state import flatten
from milepost.training.resume import Choice, choose
from milepost.training.training_state import StateLoad, TrainingState

log = logging.getLogger("milepost")


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
        hf: HfModel | None,
    ):
        self._storage = storage
        self._folder = folder
        self._config = config
        self._comm = comm
        self._state = state
        self._layout = layout
        self._hf = hf
        self._reading = ""  # save id of the checkpoint that is being loaded
        self._told: set[int] = set()  # steps that were warned of

    def scan(self) -> list[catalog.StepEntry]:
        """The steps of the run's folder."""
        return catalog.scan(self._storage, self._folder)

    def load(self) -> LoadReport | None:
        """See ``CheckpointManager.load``."""
        rejected: dict[int, str] = {}
        while True:
            choice = on_rank_0(self._comm, lambda: self._choose(rejected))
            if choice is None:
                return None
            try:
                return replace(self._load(choice), resumed_step=choice.step)
            except CheckpointDamagedError as error:
                if not choice.may_fall_back or choice.step is None:
                    raise
                if on_rank_0(self._comm, partial(self._mark_damaged, choice.path, error.message)):
                    rejected[choice.step] = error.message
                # Else it was replaced while it was read: look again.

    def _choose(self, rejected: dict[int, str]) -> Choice | None:
        """What to load; steps that are passed over for it are warned of, once. On rank 0."""
        entries = self.scan()
        choice = choose(entries, self._config, rejected, join(self._storage.root, self._folder))
        if choice is None or choice.step is None or not choice.may_fall_back:
            return choice
        for entry in entries:
            if entry.step > choice.step and not entry.is_usable and entry.step not in {*rejected, *self._told}:
                what = f"damaged: {entry.reason}" if entry.state == "damaged" else f"{entry.state}: {entry.reason}"
                log.warning(
                    "%s/%s is %s\nFalling back to an older step; this one is left where it is.",
                    self._storage.root,
                    entry.path,
                    what,
                )
                self._told.add(entry.step)
        return choice

    def _load(self, choice: Choice) -> LoadReport:
        if choice.step is None and self._config.initial_load_in_hf:
            return self._load_hf(choice)
        if choice.step is None:
            storage, path = open_storage(choice.path)
        else:
            storage, path = self._storage, choice.path
        wanted = ("model",) if choice.model_only else self._state.present()
        wanted = tuple(part for part in wanted if part not in self._config.exclude_from_loading)
        load: StateLoad | None = None

        def make_target(manifest: Manifest) -> Target:
            nonlocal load
            same = manifest.world_size == self._comm.world_size and dict(manifest.layout) == self._layout
            self._reading = manifest.save_id
            load = self._state.loading(wanted, Stored(manifest), same_layout=same)
            return load.prepare()

        complete = {part for part in ("model", "optimizer") if part in wanted}
        report = load_from(
            storage,
            path,
            make_target,
            check=lambda: load.check() if load is not None else None,
            strict=True,
            comm=self._comm,
            must_be_wanted=lambda key: part_of(key) in complete,
        )
        assert load is not None
        failure, notes = None, [*choice.notes]
        try:
            notes += load.restore()
        except BaseException as cause:  # noqa: BLE001 - a load_state_dict() of the user's may raise anything
            failure = failure_on(self._comm.rank, cause, MilepostError)
        raise_together(self._comm, failure)
        if self._config.exclude_from_loading:
            notes.append(f"left as freshly built: {', '.join(self._config.exclude_from_loading)}")
        return replace(report, notes=tuple(notes))

    def _load_hf(self, choice: Choice) -> LoadReport:
        """Start from Hugging Face files; each rank reads only the ranges that it holds."""
        assert self._hf is not None
        path = choice.path or self._hf.assets
        started = time.monotonic()
        found, failure = None, None
        try:
            if not path:
                raise ConfigError(
                    "checkpoint.initial_load_in_hf needs checkpoint.initial_load_path or model.hf_assets_path"
                )
            load = self._state.loading_weights()
            leaves = flatten(load.prepare().values).tensors
            found = load_hf(path, self._hf.name, self._hf.args, leaves, tell=self._comm.rank == 0)
            load.restore()
        except BaseException as cause:  # noqa: BLE001 - whatever it was, the other ranks must hear of it
            failure = failure_on(self._comm.rank, cause)
        raise_together(self._comm, failure)
        assert found is not None
        return LoadReport(
            path=found.path,
            step=None,
            kind="model",
            num_tensors=found.num_tensors,
            wanted_nbytes=found.read_nbytes,
            read_nbytes=found.read_nbytes,
            seconds=time.monotonic() - started,
            unexpected=(),
            missing=(),
            cast=found.cast,
            notes=(*choice.notes, *found.notes),
        )

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
