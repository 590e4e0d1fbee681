"""``CheckpointManager``: what a training loop talks to. When to save, what to keep, where to resume from."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from types import TracebackType
from typing import Any, Self, SupportsIndex

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from milepost.collective.comm import Comm, by_ranks, default_comm, failure_on, on_rank_0, raise_together
from milepost.collective.interrupt import interrupts_held
from milepost.config import CheckpointConfig
from milepost.errors import ConfigError, MilepostError, RunLockedError, SaveError, listed
from milepost.interop.weights.base_samples import ONLY_TRAINABLE
from milepost.loading.load import LoadReport
from milepost.run import checkpoint_record
from milepost.run.assemble import SaveInfo
from milepost.run.branches import History
from milepost.run.lock import RunLock
from milepost.run.step_names import step_name, step_of
from milepost.run.takeover import take_over
from milepost.saving.agreement import SaveRequest
from milepost.saving.arguments import checked_step
from milepost.saving.async_save import AsyncSaver
from milepost.saving.background import SaveHandle, log_wait
from milepost.saving.copy_step import Spot
from milepost.saving.job import Keep, SaveReport
from milepost.saving.nodes import Nodes, find_nodes
from milepost.saving.save import Saver
from milepost.storage import open_storage
from milepost.storage.base import join, split
from milepost.training.arguments import check_arguments
from milepost.training.attached import PART as ATTACHED
from milepost.training.attached import attached
from milepost.training.events import SaveEvent, SaveLog
from milepost.training.frozen import record_of
from milepost.training.hf_saves import HfSaves
from milepost.training.history import SaveHistory
from milepost.training.hooks import Commit, CommitHooks
from milepost.training.metrics import MetricRecorder
from milepost.training.node_tier import NodeTier
from milepost.training.peft import adapter_files
from milepost.training.random_state import rng_state, set_rng_state
from milepost.training.remote import RemoteTier
from milepost.training.resume import Loader, WeightsFormat
from milepost.training.schedule import needs_clock, reason_by_clock, reason_to_save
from milepost.training.signals import DUE, FAILED, RequestFiles, SignalFlags
from milepost.training.training_state import TrainingState

log = logging.getLogger("milepost")

MAX_FAILURES = 3
"""This many failed saves in a row stop a run even with ``on_save_error = "warn"``."""


_open_here: weakref.WeakValueDictionary[tuple[int, str, str], CheckpointManager] = weakref.WeakValueDictionary()
"""Managers that write, by process, root of the storage and folder: two would take each other's steps for theirs."""


class CheckpointManager:
    """Saves and resumes a training run. All methods are collective: call them on every rank.

    Ctrl-C in the middle of one raises KeyboardInterrupt at its end, so that no rank is left waiting for this one; a
    second Ctrl-C raises it at once.

    Example::

        with CheckpointManager("outputs/checkpoint", CheckpointConfig(enable=True, interval=100),
                               model=model, optimizer=optimizer, train_state=my_state) as manager:
            manager.load()
            for step in range(my_state.step + 1, num_steps + 1):
                ...
                manager.save(step, last_step=step == num_steps)

    At the end of the block the manager is closed (:meth:`close`). An error within the block is raised as it is: what
    was staged by then is committed all the same, and a failure of that save is logged.

    Args:
        folder: where the steps are kept, as ``step-<N>`` folders.
        config: see :class:`milepost.CheckpointConfig`.
        model: a module, or this rank's pipeline stages. It must be given.
        optimizer: one or several optimizers over the model's parameters.
        lr_scheduler: one or several schedulers; each is given its own state back, by position.
        dataloader, train_state: anything with ``state_dict()`` and ``load_state_dict()``.
        states: further objects by name, each with ``state_dict()`` and ``load_state_dict()``: an averaged model
            (EMA), a gradient scaler, a second optimizer. They must be alike on all ranks.
        layout: degrees of parallelism by name. Recorded; random generators are restored only under the same one.
        per_rank: parts that may belong to each rank (of lr_scheduler, dataloader, train_state): where they differ
            between ranks they are stored for each, and given back by rank. At another number of ranks the object's
            ``reshard(states)`` makes a state for this rank of all of the saved ones; without that method the load is
            refused. Anything else that differs between ranks is refused by :meth:`save`.
        hf: which model this is (:class:`milepost.HfModel`), for ``initial_load_in_hf``, ``last_save_in_hf`` and
            ``hf_interval``.
        on_commit: called on rank 0 with each :class:`milepost.Commit`, in a thread of its own, as soon as a step is
            committed; ``config.on_commit`` is a command line for the same. A failure is logged and fails no save.
        comm: how ranks exchange; by default the default process group, or one process.

    Raises (from every method, on every rank): subclasses of :class:`milepost.MilepostError`.
    """

    @interrupts_held()
    def __init__(
        self,
        folder: str | PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        lr_scheduler: Any = None,
        dataloader: Stateful | None = None,
        train_state: Stateful | None = None,
        states: Mapping[str, Any] | None = None,
        layout: Mapping[str, int] | None = None,
        per_rank: Collection[str] = ("dataloader",),
        hf: WeightsFormat | None = None,
        on_commit: Callable[[Commit], None] | None = None,
        comm: Comm | None = None,
    ):
        self._comm = comm if comm is not None else default_comm()
        self._check_given(
            folder=folder,
            config=config,
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            parts={"dataloader": dataloader, "train_state": train_state},
            layout=layout,
        )
        self._config = config if config is not None else CheckpointConfig()
        parent, name = open_storage(fspath(folder))
        parent.page_cache = self._config.page_cache
        self._storage, self._folder = parent, name
        self._layout = dict(layout or {})
        self._per_rank = _checked_per_rank(per_rank)
        self._format = hf
        if hf is None and (self._config.initial_load_in_hf or self._config.last_save_in_hf or self._config.hf_interval):
            raise ConfigError(
                "initial_load_in_hf, last_save_in_hf and hf_interval need to know the model: give CheckpointManager "
                "`hf`"
            )
        failure = None
        try:
            self._state = TrainingState.of(
                model=model,
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dataloader=dataloader,
                train_state=train_state,
                states=states or {},
                rank=self._comm.rank,
            )
        except BaseException as cause:  # noqa: BLE001 - a state_dict() of the user's may raise anything
            failure = failure_on(self._comm.rank, cause)
        raise_together(self._comm, failure)
        self._nodes = self._find_nodes()
        try:
            self._saver = self._make_saver()
        except BaseException as cause:  # noqa: BLE001 - the other ranks must hear of it
            failure = failure_on(self._comm.rank, cause)
        raise_together(self._comm, failure)
        self._is_closed = False
        self._lock: RunLock | None = None  # rank 0 holds it
        self._pending: _Pending | None = None
        self._protected: dict[int, str] = {}
        self._metrics = MetricRecorder(self._config.metric)
        self._log = SaveLog(self._storage, self._folder, self._comm.world_size, self._layout)
        self._hooks = CommitHooks(on_commit, self._config.on_commit)
        self._signals = SignalFlags()
        self._files = RequestFiles(self._storage, self._folder)
        self._rng: Mapping[str, Any] | None = None  # as `load` left it
        self._blocked_s = 0.0
        self._stall_s: float | None = None
        self._num_failures = 0  # in a row
        remote = Spot(*open_storage(self._config.remote_folder)) if self._config.remote_folder else None
        self._loader = Loader(
            *(self._storage, self._folder, self._config, self._comm, self._state, self._layout, hf, remote), self._nodes
        )
        self._remote: RemoteTier | None = None  # on rank 0
        self._tier: NodeTier | None = None  # on the first rank of each node, where nodes have a folder each
        self._history = SaveHistory(self._comm, self._loader.scan, self._loader.look)
        self._last_save = time.monotonic()
        if self._config.enable:
            self._on_first_ranks(self._check_folder)
        self._hf_saves: HfSaves | None = None
        if self._saver is not None:
            token = self._comm.broadcast(uuid.uuid4().hex)
            self._on_first_ranks(partial(self._lock_folder, remote, token))
            if self._nodes is not None:
                self._loader.look()
                on_rank_0(self._comm, self._offer_what_is_left)
            if self._config.hf_interval and hf is not None:
                self._hf_saves = self._make_hf_saves(hf)

    def _make_hf_saves(self, hf: WeightsFormat) -> HfSaves:
        try:
            return HfSaves(self._storage, self._folder, self._config, self._comm, self._state, hf, self._layout)
        except BaseException:
            self._unlock_folder()
            raise

    def _check_given(self, **given: Any) -> None:
        """Refuse wrong arguments on every rank, and another folder than the other ranks have. Collective."""
        failure = None
        try:
            check_arguments(**given)
        except ConfigError as error:
            failure = failure_on(self._comm.rank, error)
        folders = self._comm.gather(str(given["folder"]))
        config = given["config"]
        if isinstance(config, CheckpointConfig) and config.folder_per_node:
            folders = None  # nodes may call theirs as they like
        if folders is not None and failure is None and len(set(folders)) > 1:
            lines = "".join(f"\n  {shown}" for shown in listed(by_ranks(folders)))
            failure = ConfigError(f"CheckpointManager: every rank must be given the same folder, found{lines}")
        raise_together(self._comm, failure)

    def _find_nodes(self) -> Nodes | None:
        """Which ranks share the folder, where each node has its own; None where all do. Collective."""
        config = self._config
        if not (config.enable and config.folder_per_node) or self._comm.world_size == 1:
            return None
        if not self._storage.can_rename:
            raise ConfigError(
                f"checkpoint.folder_per_node: {self.folder} is a store, which all nodes see: leave it unset, or give "
                "checkpoint.folder a path on each node's own disk"
            )
        nodes = find_nodes(self._storage, self._folder, self._comm)
        return nodes if len(nodes.groups) > 1 else None

    def _on_first_ranks(self, act: Callable[[], None]) -> None:
        """Do something on rank 0, or on the first rank of each node that has a folder. Its error is all ranks'."""
        if self._nodes is None:
            on_rank_0(self._comm, act)
            return
        failure = None
        if self._nodes.is_first(self._comm.rank):
            try:
                act()
            except BaseException as cause:  # noqa: BLE001 - the other ranks wait
                failure = failure_on(self._comm.rank, cause)
        raise_together(self._comm, failure)

    def _make_saver(self) -> Saver | AsyncSaver | None:
        if not self._config.enable or self._config.load_only:
            return None
        config = self._config
        if config.async_mode == "disabled":
            return Saver(
                self._storage,
                self._comm,
                num_threads=config.num_io_threads,
                check_replicas=config.check_replicas,
                nodes=self._nodes,
            )
        return AsyncSaver(
            self._storage,
            self._comm,
            config.async_mode,
            num_threads=config.num_io_threads,
            check_replicas=config.check_replicas,
            nodes=self._nodes,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._leave()

    @property
    def blocked_s(self) -> float:
        """Seconds that the training thread has spent in this manager's methods."""
        return self._blocked_s

    @property
    def folder(self) -> str:
        """The folder of the steps."""
        return join(self._storage.root, self._folder)

    @property
    @interrupts_held()
    def latest_step(self) -> int | None:
        """The newest step of the branch that was written last, of whatever kind; None if there is none. Collective."""
        if not self._config.enable:
            return None
        self._loader.look()
        newest = History.of(on_rank_0(self._comm, self._loader.scan)).newest
        return newest.step if newest is not None else None

    @interrupts_held()
    def finished_step(self, num_steps: int) -> int | None:
        """The last step, if a run of ``num_steps`` steps has nothing left to train; else None. Collective."""
        if not self._config.enable:
            return None
        self._loader.look()
        return on_rank_0(self._comm, partial(self._loader.finished_step, num_steps))

    @interrupts_held()
    def load(self, num_steps: int | None = None, *, step: int | None = None) -> LoadReport | None:
        """Resume, or start from ``initial_load_path``; None when there is nothing to load: a new run.

        Of the branch that was written last the newest committed step with the full state is taken. If its bytes are
        damaged, it is marked so and the one that it descends from is taken, on all ranks together. With ``load_step``
        that step is taken, and never another, until steps have been saved that descend from it: then these are resumed,
        unless ``restart_branch`` is set. A save that still runs is waited for.

        Args:
            num_steps: the last step of the run. If that is saved already, it is loaded, weights alone if it holds no
                more, and ``report.step`` is its number, so that there is nothing left to train.
            step: load this step, and never another, whatever ``load_step`` says; what is saved next descends from it.

        Raises:
            CheckpointNotFoundError: there is no such step, or nothing at ``initial_load_path``.
            CheckpointDamagedError: the step that was named, or all there are, are damaged.
            StateMismatchError: the checkpoint does not fit this training state; nothing was changed.
        """
        if not self._config.enable:
            return None
        with self._blocked():
            try:
                self._wait_for_pending()  # a step that is being written is there to be resumed from
            except SaveError as error:
                self._stop_or_warn(error)
            found = self._loader.load(num_steps, step)
        report, descent = found if found is not None else (None, None)
        self._history.resumed(descent)
        self._rng = rng_state()
        if report is not None and report.resumed_step is not None:
            self._protected[report.resumed_step] = "this run resumed from it"
            self._log.resumed(report.resumed_step, report.path)
        return report

    def restore_rng(self) -> None:
        """Set this rank's random generators to where :meth:`load` left them, if it was called.

        Call it where training goes on, after what draws from them on the way there: ``iter(loader)`` takes the seed of
        its workers from torch's generator, so that dropout would go on one number later than it did.
        """
        if self._rng is not None:
            set_rng_state(self._rng)

    @interrupts_held()
    def save(
        self,
        step: SupportsIndex,
        *,
        last_step: bool = False,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, bytes | str | PathLike[str]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """Save if a checkpoint is due after ``step``; returns whether one was begun.

        It is due by ``interval``, by the clock (``interval_seconds``, ``interval = "auto"``), at the last step, or
        because a rank got a signal (:meth:`listen_to_signals`). The steps before are untouched until the new one is
        committed; then ``keep_latest_k`` is applied. When this returns, it is committed (``async_mode = "disabled"``),
        or staged (``"async"``), or being staged (``"async_with_pinned_mem"``: see :meth:`maybe_wait_for_staging`).

        Args:
            step: a whole number of any integral type, the same on every rank.
            last_step: whether training ends here.
            metrics: values measured at this step, by name, such as ``{"loss": 2.3}``. Those of rank 0 are recorded in
                the step: ``milepost ls`` shows them, and ``keep_best_k`` compares them.
            files: small files that belong to the step, by name: bytes, or the path of each, read now. Those of rank 0
                are stored: ``milepost inspect`` lists them, and ``milepost export`` takes a tokenizer from them.
            extra: values that describe the step, by name, such as a configuration or a revision. Those of rank 0 are
                stored; ``milepost inspect`` shows them.

        Raises:
            SaveError: this save failed, or the one before did in the background; on every rank. Or the manager is
                closed.
        """
        step = checked_step(step)
        if self._is_closed:
            raise SaveError(f"step {step} was not saved: this CheckpointManager is closed; make a new one")
        if self._saver is None:
            return False
        asked = self._reason_to_save_now()  # always: a request must not wait for a step at which no save is due
        due = reason_to_save(self._config, step, is_last=last_step)
        reason = asked if self.stop_requested else due or asked
        if reason is None:
            self._save_in_hf(step)
            return False
        with self._blocked() as blocked:
            try:
                self._wait_for_pending()
            except SaveError as error:
                self._stop_or_warn(error)
            try:
                request = self._request(
                    step, is_last=last_step, metrics=metrics or {}, attach=partial(self._attached, files, extra)
                )
                begun = self._saver.save(request)
            except SaveError as error:
                self._log.failed(step, reason, error.message)
                self._stop_or_warn(error)
                return False
        self._last_save = time.monotonic()
        self._pending = _Pending(step, reason, request.info.kind, begun, stall_s=blocked.seconds)
        self._tell_when_committed(begun, request)
        self._stall_s = blocked.seconds
        if isinstance(begun, SaveReport) or self.stop_requested:
            self._record_pending()
        self._save_in_hf(step)
        return True

    def _save_in_hf(self, step: int) -> None:
        """Begin the periodic save in the other format, if one is due: after the step's own, which is resumed from."""
        if self._hf_saves is None or not self._hf_saves.is_due(step) or self.stop_requested:
            return
        with self._blocked():
            try:
                self._hf_saves.save(step)
            except SaveError as error:
                self._stop_or_warn(error)

    def _tell_when_committed(self, begun: SaveReport | SaveHandle, request: SaveRequest) -> None:
        """Have the hooks run when a save is committed: now, or from the thread that commits it."""
        if (self._comm.rank != 0 and self._tier is None) or request.info.step is None:
            return
        commit = Commit(
            step=request.info.step,
            path=join(self._storage.root, request.target),
            contents=request.info.kind,
            metrics=dict(request.info.metrics),
        )
        # Not the manager: a save that runs must not keep alive one that its user has forgotten.
        hooks, remote, tier, protected = self._hooks, self._remote, self._tier, self._protected
        lineage = request.info.lineage

        def pass_on() -> None:
            if tier is not None:
                assert lineage is not None
                tier.offer(commit, begun.save_id, lineage.order, protected)
                return
            hooks.tell(commit)
            if remote is not None:
                remote.offer(commit, protected)

        if isinstance(begun, SaveReport):
            pass_on()
        else:
            begun.when_done(lambda: pass_on() if begun.failure is None else None)

    def maybe_wait_for_staging(self) -> None:
        """Return when the weights may be changed again. To be called before ``optimizer.step()``.

        If staging failed, the save is lost and its error is raised, on every rank, by the next :meth:`save` or
        :meth:`close`.
        """
        pending = self._pending
        if pending is None or isinstance(pending.outcome, SaveReport) or pending.is_staged:
            return
        with self._blocked() as blocked, contextlib.suppress(MilepostError):
            pending.outcome.staged()
        pending.is_staged = True
        pending.stall_s += blocked.seconds
        self._stall_s = pending.stall_s

    @interrupts_held()
    def maybe_wait_for_saving(self) -> None:
        """Return when the save that runs in the background, if any, is committed. Collective.

        Raises:
            SaveError: it has failed; on every rank, and only here.
        """
        with self._blocked():
            try:
                self._wait_for_pending()
            finally:
                if self._hf_saves is not None:
                    self._hf_saves.wait()

    @interrupts_held()
    def close(self) -> None:
        """Wait until the last save is committed (rank 0 logs how far it is), and let go of memory and processes.

        Raises:
            SaveError: on every rank, if that save failed and nothing raised it before.
        """
        self._is_closed = True
        if self._saver is None:
            return
        saver, self._saver = self._saver, None
        try:
            with self._blocked():
                try:
                    if isinstance(saver, AsyncSaver):
                        saver.close()
                finally:
                    if self._hf_saves is not None:
                        self._hf_saves.close()
        finally:
            # Not before: Ctrl-C while the last save is being written must not lose it.
            self._signals.restore()
            self._record_pending()
            if self._comm.rank == 0:
                self._log.close()
            for tier in (self._remote, self._tier):
                if tier is not None:
                    tier.close()
            self._hooks.close()
            self._unlock_folder()

    def _leave(self) -> None:
        """As :meth:`close` after an error of this rank: not collective, for the others may not be coming."""
        self._is_closed = True
        saver, self._saver = self._saver, None
        try:
            if isinstance(saver, AsyncSaver):
                saver.leave()
            if self._hf_saves is not None:
                self._hf_saves.leave()
        finally:
            self._signals.restore()
            self._hooks.close(timeout_s=0.0)  # what was committed is told, but an error is not held up for long
            for tier in (self._remote, self._tier):
                if tier is not None:
                    tier.leave()
            self._unlock_folder()

    def listen_to_signals(
        self, *, interrupt: bool = False, on_stop: Callable[[signal.Signals], None] | None = None
    ) -> None:
        """Save at the next :meth:`save` when any rank gets SIGUSR1; on SIGTERM, save and ask to stop.

        A file ``SAVE`` or ``STOP`` in the run's folder does the same, once: it is removed when it is acted on.
        Call it on the main thread of every rank. Ranks then exchange a number at every call of :meth:`save`. A second
        request to stop does what that signal did before; the same signal within a second counts as one.

        Args:
            interrupt: handle SIGINT (Ctrl-C) as SIGTERM is.
            on_stop: called with the signal, in its handler, when the first request to stop arrives on this rank.
        """
        if self._saver is not None:
            self._signals.listen(interrupt=interrupt, on_stop=on_stop)

    @property
    def stop_requested(self) -> bool:
        """Whether a rank was asked to stop, as of the last :meth:`save`; then that save is committed already."""
        return self.stop_signal is not None

    @property
    def stop_signal(self) -> signal.Signals | None:
        """The signal that asked a rank to stop, as of the last :meth:`save`; None if there was none.

        SIGTERM also stands for a file ``STOP``; see :attr:`stop_reason`.
        """
        return self._signals.stop_signal

    @property
    def stop_reason(self) -> str | None:
        """What asked to stop, as of the last :meth:`save`: a signal's name or ``file STOP``; None if nothing did."""
        return self._signals.reason if self.stop_requested else None

    @property
    def committed_step(self) -> int | None:
        """The last step that this manager has committed, as far as it has been waited for; None before the first."""
        return self._history.committed_step

    @property
    def pending(self) -> SaveHandle | None:
        """The save that was begun last, if it is written in the background and was not waited for since."""
        outcome = self._pending.outcome if self._pending is not None else None
        return outcome if isinstance(outcome, SaveHandle) else None

    def take_events(self) -> list[SaveEvent]:
        """The saves that were committed since the last call, oldest first. On rank 0; empty elsewhere."""
        return self._log.take()

    def _reason_to_save_now(self) -> str | None:
        """By the clock of rank 0, or a signal on any rank. Collective if any of these is in use."""
        if not self._signals.listening and not needs_clock(self._config):
            return None
        by_clock, failure = None, None
        try:
            flags = self._signals.take()
            if self._comm.rank == 0:
                flags |= self._files.take() if self._signals.listening else 0
                since = time.monotonic() - self._last_save
                by_clock = reason_by_clock(self._config, since_save_s=since, stall_s=self._stall_s)
                flags |= DUE if by_clock is not None else 0
        except BaseException as cause:  # noqa: BLE001 - the other ranks wait for the flags
            flags, failure = FAILED, failure_on(self._comm.rank, cause, SaveError)
        self._signals.agreed = agreed = self._comm.union(flags)
        if agreed & FAILED:
            raise_together(self._comm, failure)
        if self._signals.reason is not None:
            return self._signals.reason
        return (by_clock or "by the clock of rank 0") if agreed & DUE else None

    def _stop_or_warn(self, error: SaveError) -> None:
        """Raise ``error``, or with ``on_save_error = "warn"`` log it. Failures are the same on every rank."""
        self._num_failures += 1
        if self._config.on_save_error == "stop":
            raise error
        if self._num_failures >= MAX_FAILURES:
            raise SaveError(
                f"{self._num_failures} saves in a row have failed; the last: {error.message}", rank=error.rank
            ) from error
        if self._comm.rank == 0:
            log.warning("a save failed, training goes on (checkpoint.on_save_error = warn): %s", error)

    def _request(
        self, step: int, *, is_last: bool, metrics: Mapping[str, float], attach: Callable[[], dict[str, Any]]
    ) -> SaveRequest:
        config = self._config
        values, mistake = self._metrics.values(metrics) if self._comm.rank == 0 else ({}, None)  # rank 0's count
        model_only = config.create_seed_checkpoint or (is_last and config.last_save_model_only)
        is_export = model_only and not config.create_seed_checkpoint
        in_other_format = is_export and config.last_save_in_hf and self._format is not None
        parts = ("model",) if model_only else self._state.present()
        only_trainable = config.only_trainable and not in_other_format
        base = record_of(self._comm, self._state) if only_trainable else {}
        return SaveRequest(
            target=join(self._folder, step_name(step)),
            make_state=partial(
                self._make_state,
                parts,
                mistake,
                None if in_other_format else lambda: {**attach(), **base},
                only_trainable=only_trainable,
            ),
            info=SaveInfo(
                step=step,
                kind="model" if model_only else "full",
                layout=self._layout,
                extra={
                    **(self._format.record() if self._format is not None else {}),
                    **({ONLY_TRAINABLE: True} if only_trainable else {}),
                },
                lineage=self._history.next_lineage(step),
                metrics=values,
            ),
            dtype=getattr(torch, config.export_dtype) if is_export and config.export_dtype is not None else None,
            keep=None
            if self._nodes is not None  # see `NodeTier`
            else Keep(
                self._folder,
                config.keep_latest_k,
                config.keep_every_n_steps,
                self._protected | (self._remote.needed() if self._remote is not None else {}),
                config.keep_best_k,
                config.metric,
                config.mode,
            ),
            make_form=self._format.form_of if in_other_format and self._format is not None else None,
            per_rank=self._per_rank,
            modules=self._state.modules,
            full_every=config.full_every,
        )

    def _attached(
        self, files: Mapping[str, bytes | str | PathLike[str]] | None, extra: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """What belongs to the step: what the caller gives, and the configuration of the model's adapters."""
        return attached({**adapter_files(self._state.models), **(files or {})}, extra)

    def _make_state(
        self,
        parts: tuple[str, ...],
        mistake: ConfigError | None,
        attach: Callable[[], dict[str, Any]] | None,
        *,
        only_trainable: bool = False,
    ) -> dict[str, Any]:
        """What is saved. Here a mistake of this rank's caller fails the save on every rank."""
        if mistake is not None:
            raise mistake
        state = self._state.state_dict(parts, only_trainable=only_trainable)
        if attach is not None and self._comm.rank == 0 and (beside := attach()):
            state[ATTACHED] = beside
        return state

    def _wait_for_pending(self) -> None:
        """Wait for the save that runs, and log it. Its failure is raised on every rank. Collective."""
        try:
            if isinstance(self._saver, AsyncSaver):
                self._saver.wait()
        finally:
            self._record_pending()

    def _record_pending(self) -> None:
        """Wait for the pending save, and on rank 0 log what it did. Its error is the saver's to raise."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        report = pending.report(self._comm.rank)
        if report is None:
            self._log.failed(pending.step, pending.reason, pending.failure)
            return
        self._num_failures = 0
        self._history.committed(pending.step, report.save_id)
        if self._comm.rank == 0:
            self._log.record(
                report, step=pending.step, reason=pending.reason, kind=pending.kind, stall_s=pending.stall_s
            )

    def _check_folder(self) -> None:
        """Refuse a checkpoint where the folder of a run is wanted: steps would be saved inside it."""
        if checkpoint_record.is_checkpoint(self._storage, self._folder):
            parent, name = split(self._folder)
            step = step_of(name)
            run = join(self._storage.root, parent)
            resume = f", and load_step={step}" if step is not None else ""
            raise ConfigError(
                f"{self.folder} is a checkpoint, not the folder of a run. To resume from it, give the folder that "
                f"it is in, {run}{resume}; to begin a new run with its weights, give another folder and "
                f'initial_load_path="{self.folder}"'
            )

    def _lock_folder(self, remote: Spot | None, token: str) -> None:
        """Lock the folder for this run, once the writers of one that died have finished; the remote one likewise."""
        place = (os.getpid(), self._storage.root, self._folder)
        if place in _open_here:
            gc.collect()  # one that nobody has any more, but in a cycle of references
        if place in _open_here:
            raise RunLockedError(
                f"another CheckpointManager of this process writes to {self.folder}: close() it first, or use "
                "`with CheckpointManager(...) as manager:`; to only read, set load_only",
                path=self.folder,
            )
        self._lock = take_over(self._storage, self._folder)
        _open_here[place] = self
        if remote is not None:
            local = Spot(self._storage, self._folder)
            try:
                if self._nodes is not None:
                    part = self._nodes.part_of(self._comm.rank)
                    self._tier = NodeTier(local, self._config, self._hooks, self._comm, part, token, remote)
                else:
                    self._remote = RemoteTier(local, remote, self._config, self._hooks)
            except BaseException:
                self._unlock_folder()
                raise

    def _offer_what_is_left(self) -> None:
        """Have the newest step that all nodes hold copied, if a run before this one did not get that far. On rank 0."""
        assert self._tier is not None
        newest = History.of(self._loader.scan()).newest
        if newest is not None and not self._loader.is_remote(newest):
            self._tier.offer_what_is_left(newest)

    def _unlock_folder(self) -> None:
        if self._lock is not None:
            self._lock.release()
            _open_here.pop((os.getpid(), self._storage.root, self._folder), None)

    @contextmanager
    def _blocked(self) -> Iterator[_Stopwatch]:
        watch = _Stopwatch()
        started = time.monotonic()
        try:
            yield watch
        finally:
            watch.seconds = time.monotonic() - started
            self._blocked_s += watch.seconds


class _Stopwatch:
    seconds = 0.0


@dataclass(slots=True, eq=False)
class _Pending:
    """A save that was begun and not logged yet, with what came of it or will."""

    step: int
    reason: str
    kind: str
    outcome: SaveReport | SaveHandle
    stall_s: float
    is_staged: bool = False

    def report(self, rank: int) -> SaveReport | None:
        """What the save did, once it has ended; None if it failed."""
        if isinstance(self.outcome, SaveReport):
            return self.outcome
        log_wait(self.outcome, rank)
        return self.outcome.result() if self.outcome.failure is None else None

    @property
    def failure(self) -> str:
        """What made it fail; empty if it did not."""
        error = None if isinstance(self.outcome, SaveReport) else self.outcome.failure
        return getattr(error, "message", str(error)) if error is not None else ""


def _checked_per_rank(names: Collection[str]) -> tuple[str, ...]:
    """Raises ConfigError for what is not a part that may belong to each rank."""
    known = ("lr_scheduler", "dataloader", "train_state")
    if isinstance(names, str) or not set(names) <= set(known):
        raise ConfigError(
            f"CheckpointManager(per_rank={names!r}): expected a collection of {', '.join(known)}; the model and the "
            "optimizer are shared by all ranks, and random generators are kept for each anyway"
        )
    return tuple(names)
