"""Load a run's state, falling back from damaged steps. ``choice`` picks the step."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from milepost.collective.comm import by_ranks, errors_shared, failure_on, on_rank_0, raise_together
from milepost.collective.meeting import meeting
from milepost.config import PARTS, part_of
from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConfigError,
    MilepostError,
    NewerFormatError,
    StateMismatchError,
    StorageError,
    listed,
)
from milepost.format.manifest import Manifest
from milepost.interop.any_weights import WeightsRequest, load_any
from milepost.loading.load_from import LoadReport, LoadRequest, load_from
from milepost.loading.module import are_equal
from milepost.loading.names import Translation
from milepost.loading.policy import Policy
from milepost.loading.sources import Near, find_near
from milepost.loading.target import Target
from milepost.run import catalog, checkpoint_record, node_steps
from milepost.run.branches import Descent, commit_order, descend
from milepost.run.catalog import StepEntry
from milepost.run.hf_folder import is_hf_step
from milepost.run.node_part import NodePart
from milepost.run.node_steps import NodeFolder
from milepost.run.step_names import step_name
from milepost.saving.copy_step import Spot
from milepost.saving.nodes import Nodes
from milepost.storage import is_folder, open_storage
from milepost.storage.base import Storage, join, split
from milepost.tensors.layout import TensorLeaf
from milepost.tensors.state import flatten, ordinary_tensors
from milepost.tensors.tree import Read
from milepost.training.choice import Choice, both_tiers, choose, launch_id
from milepost.training.parts_load import PartsLoad
from milepost.training.training_run import TrainingRun
from milepost.verification.external import locate_manifest

log = logging.getLogger("milepost")

SPELLING = "set checkpoint.{option} = {patterns}"
EXCLUDE = "exclude_from_loading"


def is_weights_file(path: str) -> bool:
    """Return whether a path names a file of weights, not a folder."""
    return path.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors")) and not is_folder(path)


class Loader:
    """Loads into a run's live objects. All methods except :meth:`scan` and :meth:`finished_step` are collective."""

    def __init__(self, run: TrainingRun, remote: Spot | None = None, nodes: Nodes | None = None):
        self._run = run
        self._storage, self._folder = run.folder.storage, run.folder.path
        self._config, self._comm, self._state = run.config, run.comm, run.state
        self._layout, self._format = run.degrees, run.weights_format
        self._remote = remote
        self._nodes = nodes
        self._node_folders: list[NodeFolder] = []  # on rank 0: the content of all nodes' folders at the last look
        self._there: list[StepEntry] | None = None  # on rank 0: the remote folder's steps at the last scan
        self._remote_steps: frozenset[int] = frozenset()  # those of the last scan to read from the remote folder
        self._bad_here: set[int] = set()  # found damaged in the local folder only
        self._reading = ""  # save id of the checkpoint being loaded
        self._warned: set[int] = set()  # of these steps
        self._is_filling = False  # anything live may have been changed by the load that is under way
        self.mixed = ""
        """The error of a load that failed after part of the live state was filled; empty once one has succeeded."""

    def look(self) -> None:
        """Gather the content of all nodes' folders, if each has its own. Call it before :meth:`scan`. Collective."""
        if self._nodes is None:
            return
        found = None
        with errors_shared(self._comm):
            if self._nodes.is_first(self._comm.rank):
                found = node_steps.look_at_node(self._storage, self._folder, self._nodes.part_of(self._comm.rank))
        brought = self._comm.gather(found)
        self._node_folders = [folder for folder in brought if folder is not None] if brought is not None else []

    def scan(self, *, needs_remote: bool = True) -> list[StepEntry]:
        """Return the run's steps, taking those missing, older or incomplete here from the remote folder.

        Without ``needs_remote`` a remote folder that can't be read now is taken as it was at the last scan: no other
        run has written there since. Training goes on while the store is away.
        """
        if self._nodes is not None:
            here = node_steps.merged(self._node_folders, self._comm.world_size, self._layout)
        else:
            here = catalog.scan(self._storage, self._folder)
        if self._remote is None:
            return here
        try:
            self._there = there = catalog.scan(self._remote.storage, self._remote.path)
        except StorageError:
            if needs_remote or self._there is None:
                raise
            there = self._there
        found = both_tiers(here, there, str(self._remote), self._bad_here)
        self._remote_steps = frozenset(entry.step for entry, is_remote in found if is_remote)
        return [entry for entry, _ in found]

    def is_remote(self, entry: StepEntry) -> bool:
        """Return whether the remote folder has the save of ``entry``. On rank 0."""
        if self._remote is None:
            return False
        found = catalog.scan(self._remote.storage, self._remote.path)
        return any(one.is_usable and one.save_id == entry.save_id for one in found)

    def finished_step(self, num_steps: int) -> int | None:
        """Return the last step, if nothing is left to train up to ``num_steps``. On rank 0."""
        choice, _ = self._choose({}, num_steps)
        return choice.step if choice is not None and choice.is_finished else None

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Record in :attr:`mixed` the outcome of the load within the block."""
        self._is_filling = False
        try:
            yield
        except BaseException as error:
            if self._is_filling:
                self.mixed = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise
        self.mixed = "" if self._is_filling else self.mixed

    @ordinary_tensors()
    def load(self, num_steps: int | None, step: int | None = None) -> tuple[LoadReport, Descent | None] | None:
        """Load, see ``CheckpointManager.load``; also returns the parent of the run's next save, if any."""
        self._check_asked(num_steps, step)
        rejected: dict[int, str] = {}
        has_base = not (self._config.only_trainable and self._config.initial_load_path)
        while True:
            self.look()
            choice, descent = on_rank_0(self._comm, partial(self._choose, rejected, num_steps, step))
            if choice is None:
                return None
            self._refuse_to_load_nothing(choice)
            if choice.step is not None and not has_base:
                self._load_base()
                has_base = True
            if choice.in_hf or (choice.step is None and self._config.initial_load_in_hf):
                return self._load_weights(choice), descent
            if choice.step is None and is_weights_file(choice.path):
                return self._load_file(choice), descent
            into = self._parts_load(choice)
            storage, path = self._place(choice)
            if into.wants_model and self._has_other_names(storage, path):
                if choice.model_only:
                    return self._load_weights(choice), descent
                raise _renamed(join(storage.root, path))
            model_notes: list[str] = []
            try:
                report = load_from(self._request(choice, storage, path, into, model_notes), self._comm)
            except CheckpointDamagedError as error:
                if not choice.may_fall_back or choice.step is None or isinstance(error, NewerFormatError):
                    raise
                self._reject(choice, choice.step, error, rejected)
                continue
            finally:
                self._is_filling |= into.is_filling
            notes = [*choice.notes, *dict.fromkeys(model_notes), *report.notes, *map(str, report.let_pass)]
            notes += [*into.left_out(), *self._left_behind(choice, report.unexpected), *self._restore(into)]
            return replace(report, resumed_step=choice.step, notes=tuple(notes)), descent

    def _refuse_to_load_nothing(self, choice: Choice) -> None:
        """Raises ConfigError if ``exclude_from_loading`` leaves no part to load."""
        if self._wanted(choice):
            return
        if choice.step is None:
            to_do = "to start from newly initialized weights, leave checkpoint.initial_load_path empty"
        else:
            to_do = "to start a new run, choose another job.dump_folder or checkpoint.folder"
        raise ConfigError(
            f"checkpoint.exclude_from_loading = {','.join(self._config.exclude_from_loading)} leaves nothing to load "
            f"from {choice.path}: {to_do}"
        )

    def _parts_load(self, choice: Choice) -> PartsLoad:
        return PartsLoad(
            *(self._state, self._wanted(choice), self._comm.world_size, self._layout, self._config),
            resumes=choice.step is not None,
        )

    def _request(
        self, choice: Choice, storage: Storage, path: str, into: PartsLoad, model_notes: list[str]
    ) -> LoadRequest:
        return LoadRequest(
            storage=storage,
            folder=path,
            make_target=partial(self._make_target, into, join(storage.root, path), model_notes),
            check=into.check,
            policy=self._policy(choice),
            must_be_wanted=into.is_complete,
            num_threads=self._config.num_io_threads,
            wanted_keys=self._state.model_keys() if "model" in into.wanted else (),
            translate=partial(self._translate, storage, path),
            part=self._part_of(choice),
            near=self._near(choice),
            read=self._config.read,
        )

    def _reject(self, choice: Choice, step: int, error: CheckpointDamagedError, rejected: dict[int, str]) -> None:
        """Mark a damaged step so that the next choice is another one. Collective."""
        if self._part_of(choice) is not None:
            self._mark_damaged_part(choice.path, step, error)
        elif on_rank_0(self._comm, partial(self._mark_damaged, self._place(choice)[0], choice.path, error)):
            if self._remote is not None and not choice.in_remote:
                self._bad_here.add(step)  # the other folder may have it undamaged
            else:
                rejected[step] = error.message
        # Otherwise it was replaced while it was being read, so the same step may be chosen again.

    def _check_asked(self, num_steps: int | None, step: int | None) -> None:
        """Raises ConfigError on every rank if ranks ask for different steps. Collective."""
        with meeting(self._comm, f"loading from {join(self._storage.root, self._folder)}"):
            asked = self._comm.gather(f"num_steps {num_steps}, step {step}")
        failure = None
        if asked is not None and len(set(asked)) > 1:
            lines = "".join(f"\n  {line}" for line in listed(by_ranks(asked)))
            failure = ConfigError(f"load: every rank must ask for the same step, found{lines}")
        raise_together(self._comm, failure)

    def _left_behind(self, choice: Choice, unexpected: Collection[str]) -> list[str]:
        """Note and log parts of a resumed step that this run does not have, and does not restore."""
        if choice.step is None or choice.model_only:
            return []
        known = {*self._state.present(), *self._config.exclude_from_loading, "rng", "attached"}
        parts = [part for part in PARTS if part not in known and part in set(map(part_of, unexpected))]
        if not parts:
            return []
        note = f"in the checkpoint but not in this run, so not restored: {', '.join(parts)}"
        if self._comm.rank == 0:
            log.warning("%s: %s", choice.path, note)
        return [note]

    def _load_base(self) -> None:
        """Load the parameters that trainable-only steps leave out, like a new run would. Collective."""
        config = replace(self._config, only_trainable=False, load_step=-1, restart_branch=False)
        nowhere = Spot(self._storage, join(self._folder, "no-step"))
        base = Loader(replace(self._run, folder=nowhere, config=config))
        try:
            with base.marking():
                base.load(None)
        finally:
            self._is_filling |= bool(base.mixed)

    def _translate(self, storage: Storage, path: str, manifest: Manifest) -> Translation | None:
        """Translate a checkpoint with another program's known names to this run's.

        Raises:
            StateMismatchError: it stores two tensors that are one in this run, and may differ.
        """
        translation = self._format.translate(manifest) if self._format is not None else None
        if translation is None or translation.tied is None:
            return translation
        pair = {key: manifest.tensors[key] for key in translation.tied}
        if any(shard.crc32 is None for entry in pair.values() for shard in entry.shards):
            pair = dict(locate_manifest(storage, path, replace(manifest, tensors=pair)).tensors)
        if not are_equal(*pair.values()):
            one, other = translation.tied
            raise StateMismatchError(
                f"{join(storage.root, path)}: {one} and {other} are one tensor in this run (tied), but their stored "
                f"values may differ. `milepost convert` compares them, and makes a checkpoint of one",
                path=path,
                mismatched=translation.tied,
            )
        return translation

    def _has_other_names(self, storage: Storage, path: str) -> bool:
        """Return whether another program wrote the checkpoint, under unknown names. Collective."""
        chosen_keys = [name for name in self._config.exclude_from_loading if name not in PARTS]
        if self._format is None or self._config.allow_missing or chosen_keys:
            return False
        lacks = False
        with contextlib.suppress(MilepostError):  # the load reports the problem
            found = catalog.examine(storage, path)
            if found is not None and found.state == "external":
                manifest = checkpoint_record.read_manifest(storage, path)
                wanted = self._state.loading_weights().prepare().values
                lacks = any(key not in manifest.tensors for key in wanted) and self._format.translate(manifest) is None
        return bool(self._comm.union(int(lacks)))

    def _place(self, choice: Choice) -> tuple[Storage, str]:
        """Return the storage and path from which a choice is read."""
        if choice.step is None:
            return open_storage(choice.path)
        if choice.in_remote and self._remote is not None:
            return self._remote.storage, choice.path
        return self._storage, choice.path

    def _part_of(self, choice: Choice) -> NodePart | None:
        """Return the part of the chosen step that this rank reads, if it is read from per-node folders."""
        if self._nodes is None or choice.step is None or choice.in_remote:
            return None
        return self._nodes.part_of(self._comm.rank)

    def _near(self, choice: Choice) -> Near | None:
        """Return this node's part of a step that is read from the remote folder."""
        if self._nodes is None or not choice.in_remote or choice.step is None or not choice.save_id:
            return None
        return find_near(self._storage, join(self._folder, step_name(choice.step)), choice.save_id)

    def _mark_damaged_part(self, path: str, step: int, error: CheckpointDamagedError) -> None:
        """Mark a step on the node that found its part damaged; no node reads it locally again in this run."""
        assert self._nodes is not None
        self._bad_here.add(step)
        part = self._nodes.part_of(self._comm.rank)
        if self._comm.rank == part.ranks[0] and error.rank in part.ranks:
            with contextlib.suppress(StorageError):  # the other ranks continue: this run skips it in any case
                self._mark_damaged(self._storage, path, error)

    def _policy(self, choice: Choice) -> Policy:
        """Return the policy for missing keys: those that a new run adds to its initial weights, as configured."""
        config = self._config
        added = ("*",) if choice.step is None else ()
        return Policy((*config.allow_missing, *added), config.allow_unexpected, SPELLING, EXCLUDE)

    def _wanted(self, choice: Choice) -> tuple[str, ...]:
        parts = ("model",) if choice.model_only else self._state.present()
        return tuple(part for part in parts if part not in self._config.exclude_from_loading)

    def _make_target(self, into: PartsLoad, path: str, notes: list[str], manifest: Manifest, read: Read) -> Target:
        self._reading = manifest.save_id
        if self._format is not None and into.wants_model:
            notes += self._format.check_record(manifest.extra, path)
        return into.prepare(manifest, read, path)

    def _restore(self, into: PartsLoad) -> list[str]:
        """Restore the live objects from the data read; returns notes. Collective."""
        self._is_filling = True
        with errors_shared(self._comm):  # a load_state_dict() of the user's may raise anything
            notes = into.restore()
        left = self._config.exclude_from_loading
        return [*notes, f"left as initialized: {', '.join(left)}"] if left else notes

    def _raise_filled(self, failure: MilepostError | None) -> None:
        """Raise on every rank if any has failed; records whether any may have filled its tensors. Collective."""
        changed_nothing = isinstance(failure, StateMismatchError | ConfigError | CheckpointNotFoundError)
        self._is_filling |= bool(self._comm.union(int(not changed_nothing)))
        raise_together(self._comm, failure)

    def _load_file(self, choice: Choice) -> LoadReport:
        """Start from a single file of weights, through the model's own hooks like from a checkpoint. Collective."""
        into = PartsLoad(self._state, ("model",), self._comm.world_size, self._layout, self._config)
        request = WeightsRequest(
            path=choice.path,
            make_target=lambda manifest, path: into.prepare(manifest, lambda key: None, path),
            check=into.check,
            policy=self._policy(choice),
            must_be_wanted=into.is_complete,
            model_keys=self._state.model_keys(),
            num_threads=self._config.num_io_threads,
        )
        try:
            report = load_any(request, self._comm)
        finally:
            self._is_filling |= into.is_filling
        return replace(report, notes=(*choice.notes, *report.notes, *self._restore(into)))

    def _load_weights(self, choice: Choice) -> LoadReport:
        """Start from weights in another format. Collective. Each rank reads only the ranges that it holds."""
        report, failure = None, None
        try:
            load = self._state.loading_weights()
            into = PartsLoad(self._state, ("model",), self._comm.world_size, self._layout, self._config)
            leaves = flatten(load.prepare().values).tensors
            leaves = {key: leaf for key, leaf in leaves.items() if not into.is_excluded(key)}
            report = self._load_in_format(choice, leaves)
            for key in (load.target.values.keys() - leaves.keys()) | {*report.missing}:
                load.target.values.pop(key, None)  # not read
            load.restore()
        except BaseException as cause:  # noqa: BLE001 - any error must reach the other ranks
            failure = failure_on(self._comm.rank, cause)
        self._raise_filled(failure)
        assert report is not None
        return replace(report, step=choice.step, resumed_step=choice.step, notes=(*choice.notes, *report.notes))

    def _load_in_format(self, choice: Choice, leaves: Mapping[str, TensorLeaf]) -> LoadReport:
        if self._format is None:
            raise ConfigError(f"{choice.path} holds Hugging Face files: give CheckpointManager `hf`")
        return self._format.load(
            choice.path if choice.step is None else join(self._place(choice)[0].root, choice.path),
            leaves,
            Policy(self._config.allow_missing, self._config.allow_unexpected, SPELLING),
            num_threads=self._config.num_io_threads,
            logs_progress=self._comm.rank == 0,
        )

    def _choose(
        self, rejected: dict[int, str], num_steps: int | None, step: int | None = None
    ) -> tuple[Choice | None, Descent | None]:
        """Choose the checkpoint to load and the next save's parent; warn once about skipped steps. On rank 0."""
        entries = self.scan()
        where = join(self._storage.root, self._folder)
        config, launch = self._config, launch_id()
        if step is not None:  # requested by the program itself: starts a branch each time
            config, launch = replace(config, load_step=step, restart_branch=True), ""
        choice = choose(entries, config, rejected, where, launch=launch, num_steps=num_steps)
        # Set it now: if the step's record can't be read, nothing else identifies the save.
        self._reading = next((e.save_id for e in entries if choice is not None and e.step == choice.step), "")
        if choice is None or choice.step is None:
            return self._with_form(choice), None
        chosen = next(entry for entry in entries if entry.step == choice.step)
        for entry in entries if choice.may_fall_back else ():
            is_newer = commit_order(entry) > commit_order(chosen) if entry.lineage else entry.step > choice.step
            if is_newer and not entry.is_usable and entry.step not in {*rejected, *self._warned}:
                log.warning(
                    "%s/%s is %s\nFalling back to an older step; this one stays in place.",
                    self._storage.root,
                    entry.path,
                    f"{entry.state}: {entry.reason}",
                )
                self._warned.add(entry.step)
        choice = replace(choice, in_remote=choice.step in self._remote_steps, save_id=chosen.save_id)
        if choice.is_finished and choice.model_only:
            choice = replace(choice, in_hf=is_hf_step(checkpoint_record.read_manifest(*self._place(choice))))
        return choice, descend(entries, chosen, start=choice.start)

    def _with_form(self, choice: Choice | None) -> Choice | None:
        """Mark an initial checkpoint that a run of Milepost saved as Hugging Face files. On rank 0."""
        if choice is None or not choice.path or self._config.initial_load_in_hf or is_weights_file(choice.path):
            return choice
        with contextlib.suppress(MilepostError):  # the load reports the problem
            return replace(choice, in_hf=is_hf_step(checkpoint_record.read_manifest(*self._place(choice))))
        return choice

    def _mark_damaged(self, storage: Storage, path: str, error: CheckpointDamagedError) -> bool:
        """Mark the step being read, and those that share the damaged file.

        Returns False if another save has replaced it meanwhile.
        """
        reason = error.message
        found = catalog.examine(storage, path)
        if found is not None and (found.is_usable or found.state == "part") and found.save_id != self._reading:
            return False
        left = "" if self._config.load_only else ", marked as damaged: it will not be tried again"
        log.warning("%s\nFalling back to an older step; the damaged one stays in place%s.", reason, left)
        if self._config.load_only:
            return True
        try:
            others = catalog.steps_that_share(storage, path, split(error.path or "")[1])
            catalog.mark_damaged(storage, path, reason, now=time.time())
            for other in others:
                log.warning("%s/%s shares the file, so it is marked as damaged too", storage.root, other)
                catalog.mark_damaged(storage, other, f"shared with {split(path)[1]}: {reason}", now=time.time())
        except StorageError as error:  # this run skips it in any case
            log.warning("could not mark the step as damaged: %s", error)
        return True


def _renamed(path: str) -> StateMismatchError:
    return StateMismatchError(
        f"{path} was written by another program, with other names than this run's: its weights can be loaded, but not "
        f"its optimizer state. To start a new run with the weights, set checkpoint.initial_load_path to it, leave "
        f"checkpoint.initial_load_model_only unchanged, and choose another job.dump_folder or checkpoint.folder; or "
        f"convert them to a checkpoint with `milepost convert`",
        path=path,
    )
