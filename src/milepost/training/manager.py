"""``CheckpointManager``: the interface to a training loop. Decides when to save, what to keep, where to resume from."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from types import TracebackType
from typing import Any, Self, SupportsIndex

from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from milepost.collective.comm import Comm, default_comm, on_every_rank, on_rank_0
from milepost.collective.interrupt import interrupts_held
from milepost.collective.meeting import meeting
from milepost.config import CheckpointConfig
from milepost.errors import ConfigError, SaveError
from milepost.loading.load_from import LoadReport
from milepost.run.beside import remote_folder_problem
from milepost.run.branches import History
from milepost.saving.arguments import checked_step
from milepost.saving.background import SaveHandle
from milepost.saving.copy_step import Spot
from milepost.storage import join_path, open_storage
from milepost.training.arguments import check_arguments_of_all_ranks, check_format_given, checked_per_rank
from milepost.training.events import SaveEvent
from milepost.training.hooks import Commit, CommitHooks
from milepost.training.pending import PendingSave
from milepost.training.random_state import rng_state, set_rng_state
from milepost.training.resume import Loader
from milepost.training.run_folder import RunFolder
from milepost.training.run_saves import BlockedTime, RunSaves
from milepost.training.save_request import Attachments
from milepost.training.signals import SignalFlags
from milepost.training.training_run import TrainingRun
from milepost.training.training_state import TrainingState
from milepost.training.weights_format import WeightsFormat


class CheckpointManager:
    """Saves and resumes a training run. All methods are collective: call them on every rank.

    Ctrl-C during a method raises KeyboardInterrupt at its end, so that no rank is left waiting for this one; a
    second Ctrl-C raises it at once.

    Example::

        with CheckpointManager("outputs/checkpoint", CheckpointConfig(enable=True, interval=100),
                               model=model, optimizer=optimizer, train_state=my_state) as manager:
            manager.load()
            for step in range(my_state.step + 1, num_steps + 1):
                ...
                manager.save(step, last_step=step == num_steps)

    The manager is closed at the end of the block (:meth:`close`). An error within the block propagates unchanged: a
    save that was staged by then is still committed, and a failure of it is logged.

    Args:
        folder: the folder of the steps, which are folders ``step-<N>`` in it.
        config: see :class:`milepost.CheckpointConfig`.
        model: a module, or this rank's pipeline stages. Required.
        optimizer: one or several optimizers over the model's parameters.
        lr_scheduler: one or several schedulers; each gets its own state back, by position.
        dataloader, train_state: anything with ``state_dict()`` and ``load_state_dict()``.
        states: further objects by name, each with ``state_dict()`` and ``load_state_dict()``: an averaged model
            (EMA), a gradient scaler, a second optimizer. They must be the same on all ranks.
        layout: degrees of parallelism by name. Recorded; random generators are restored only under the same degrees.
        per_rank: parts that may differ between ranks (of lr_scheduler, dataloader, train_state): if they
            differ they are stored per rank, and restored by rank. On another number of ranks the object's
            ``reshard(states)`` makes this rank's state from all saved ones; without that method the load is
            refused. Anything else that differs between ranks is refused by :meth:`save`.
        hf: the model (:class:`milepost.HfModel`), for ``initial_load_in_hf``, ``last_save_in_hf`` and
            ``hf_interval``.
        on_commit: called on rank 0 with each :class:`milepost.Commit`, in a separate thread, as soon as a step is
            committed; ``config.on_commit`` is a command line for the same. A failure is logged and does not fail the
            save.
        comm: communication between ranks; by default the default process group, or a single process.

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
        self._comm = comm = comm if comm is not None else default_comm()
        check_arguments_of_all_ranks(
            comm,
            folder=folder,
            config=config,
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            parts={"dataloader": dataloader, "train_state": train_state},
            layout=layout,
            states=states,
            on_commit=on_commit,
            hf=hf,
        )
        self._config = config = config if config is not None else CheckpointConfig()
        check_format_given(config, hf)
        parts_per_rank = checked_per_rank(per_rank)
        self._storage, path = open_storage(fspath(folder))
        self._storage.page_cache = config.page_cache
        state = on_every_rank(
            comm,
            lambda: TrainingState.of(
                model=model,
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dataloader=dataloader,
                train_state=train_state,
                states=states or {},
                rank=comm.rank,
            ),
        )
        run = TrainingRun(Spot(self._storage, path), config, comm, state, dict(layout or {}), hf)
        hooks = CommitHooks(on_commit, config.on_commit)
        self._folder = RunFolder(run.folder, self._open_remote(path), config, comm, hooks)
        self._is_closed = False
        self._signals = SignalFlags()
        self._rng: Mapping[str, Any] | None = None  # as restored by `load`
        self._blocked = BlockedTime()
        self._loader = Loader(run, self._folder.remote, self._folder.nodes)
        if config.enable:
            self._folder.check()
        self._saves: RunSaves | None = None
        if config.enable and not config.load_only:
            self._saves = RunSaves(run, self._folder, self._loader, self._signals, self._blocked, parts_per_rank)

    def _open_remote(self, path: str) -> Spot | None:
        if not self._config.remote_folder:
            return None
        remote = Spot(*open_storage(self._config.remote_folder))
        folder = join_path(self._storage.root, path)
        if problem := remote_folder_problem(folder, join_path(remote.storage.root, remote.path)):
            raise ConfigError(problem)
        return remote

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._leave()

    @property
    def blocked_s(self) -> float:
        """Seconds spent by the training thread in this manager's methods."""
        return self._blocked.total_s

    @property
    def folder(self) -> str:
        """The folder of the steps."""
        return self._folder.name

    @property
    @interrupts_held()
    def latest_step(self) -> int | None:
        """Return the newest step of any kind on the branch that was written last; None if there is none. Collective."""
        if not self._config.enable:
            return None
        with meeting(self._comm, "CheckpointManager.latest_step"):
            self._loader.look()
            newest = History.of(on_rank_0(self._comm, self._loader.scan)).newest
        return newest.step if newest is not None else None

    @interrupts_held()
    def finished_step(self, num_steps: int) -> int | None:
        """Return the last step, if a run of ``num_steps`` steps has nothing left to train; else None. Collective."""
        if not self._config.enable:
            return None
        num_steps = checked_step(num_steps)
        with meeting(self._comm, "CheckpointManager.finished_step"):
            self._loader.look()
            return on_rank_0(self._comm, partial(self._loader.finished_step, num_steps))

    @interrupts_held()
    def load(self, num_steps: int | None = None, *, step: int | None = None) -> LoadReport | None:
        """Resume, or start from ``initial_load_path``; returns None for a new run with nothing to load.

        Loads the newest committed step with the full state, of the branch that was written last. If its bytes are
        damaged, it is marked and all ranks load the step that it descends from. With ``load_step``
        only that step is loaded, until steps have been saved that descend from it: the run then resumes from these,
        unless ``restart_branch`` is set. Waits for a running save.

        Args:
            num_steps: the last step of the run. If it is saved already, it is loaded (only weights if it holds no
                more), and ``report.step`` is its number, so that there is nothing left to train.
            step: load this step and no other, whatever ``load_step`` says; the next save descends from it.

        Raises:
            CheckpointNotFoundError: there is no such step, or nothing at ``initial_load_path``.
            CheckpointDamagedError: the named step, or every step, is damaged.
            StateMismatchError: the checkpoint does not fit this training state; nothing was changed.
            PartlyLoadedError: an object's own ``load_state_dict()`` raised, so the state is a mix of old and new:
                :meth:`save` refuses it until a load has succeeded.
        """
        if not self._config.enable:
            return None
        with self._blocked.measured():
            if self._saves is not None:
                self._saves.wait_or_warn()  # a step being written can then be resumed from
            asked = [None if number is None else checked_step(number) for number in (num_steps, step)]
            with self._loader.marking():
                found = self._loader.load(*asked)
        report, descent = found if found is not None else (None, None)
        self._rng = rng_state()
        if self._saves is not None:
            self._saves.resumed(report, descent)
        return report

    def restore_rng(self) -> None:
        """Set this rank's random generators to their state after :meth:`load`, if it was called.

        Call it where training continues, after code that draws from them: ``iter(loader)`` draws the seed of its
        workers from torch's generator, so dropout would continue one number later.
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
        because a rank got a signal (:meth:`listen_to_signals`). Earlier steps are kept until the new one is
        committed; then ``keep_latest_k`` is applied. When this returns, it is committed (``async_mode = "disabled"``),
        or staged (``"async"``), or being staged (``"async_with_pinned_mem"``: see :meth:`maybe_wait_for_staging`).

        Args:
            step: an integer of any integral type, the same on every rank.
            last_step: whether training ends here.
            metrics: values measured at this step, by name, such as ``{"loss": 2.3}``. Those of rank 0 are recorded in
                the step: ``milepost ls`` shows them, and ``keep_best_k`` compares them.
            files: small files that belong to the step, by name: bytes, or the path of each, read now. Those of rank 0
                are stored: ``milepost inspect`` lists them, and ``milepost export`` takes a tokenizer from them.
            extra: values that describe the step, by name, such as a configuration or a revision. Those of rank 0 are
                stored; ``milepost inspect`` shows them.

        Raises:
            SaveError: this save failed, or the previous one did in the background; on every rank. Or the manager is
                closed.
        """
        step = checked_step(step)
        if self._is_closed:
            raise SaveError(f"step {step} was not saved: this CheckpointManager is closed; create a new one")
        if self._loader.mixed:
            raise SaveError(
                f"step {step} was not saved: the state may be a mix of two, since load() failed in the middle "
                f"({self._loader.mixed}). Load a step successfully, or restart the program"
            )
        saves = self._saves
        reason = saves.reason(step, is_last=last_step) if saves is not None else None
        if saves is None or saves.saver is None or reason is None:
            return False
        with self._blocked.measured() as blocked:
            saves.wait_or_warn()
            try:
                request = saves.requests.make(step, is_last=last_step, given=Attachments(metrics, files, extra))
                outcome = saves.saver.save(request)
            except SaveError as error:
                saves.failed(step, reason, error)
                return False
        saves.began(PendingSave(step, reason, request.info.kind, outcome, stall_s=blocked.seconds), request)
        return True

    def maybe_wait_for_staging(self) -> None:
        """Return once the weights may be changed again. Call it before ``optimizer.step()``.

        If staging failed, the save is lost and its error is raised, on every rank, by the next :meth:`save` or
        :meth:`close`.
        """
        if self._saves is not None:
            self._saves.wait_for_staging()

    @interrupts_held()
    def maybe_wait_for_saving(self) -> None:
        """Return once the running background save, if any, is committed. Collective.

        Raises:
            SaveError: it failed; on every rank, and only here.
        """
        if self._saves is not None:
            with self._blocked.measured():
                self._saves.wait()

    @interrupts_held()
    def close(self) -> None:
        """Wait until the last save is committed and copied (rank 0 logs progress), and release memory and processes.

        Raises:
            SaveError: on every rank, if that save failed and was not raised before; or if the newest step could not be
                copied to ``remote_folder``: it is committed in the run's folder, and the message has the command that
                copies it.
        """
        self._is_closed = True
        if self._saves is not None:
            self._saves.close()

    def _leave(self) -> None:
        """Close after an error of this rank, without collectives, since the other ranks may not close."""
        self._is_closed = True
        if self._saves is not None:
            self._saves.leave()

    def listen_to_signals(
        self, *, interrupt: bool = False, on_stop: Callable[[signal.Signals], None] | None = None
    ) -> None:
        """Save at the next :meth:`save` when any rank gets SIGUSR1; on SIGTERM and SIGHUP, save and ask to stop.

        A file ``SAVE`` or ``STOP`` in the run's folder does the same, once: it is removed when it is handled. Call it
        on the main thread of every rank. Ranks then exchange a number in every call of :meth:`save`. A second request
        to stop has the signal's previous effect; the same signal within a second counts as one.

        Args:
            interrupt: handle SIGINT (Ctrl-C) like SIGTERM.
            on_stop: called with the signal, in its handler, when the first request to stop arrives on this rank.
        """
        if self._saves is not None and not self._is_closed:
            self._signals.listen(interrupt=interrupt, on_stop=on_stop)

    @property
    def stop_requested(self) -> bool:
        """True if a rank was asked to stop, as of the last :meth:`save`; that save is then already committed."""
        return self.stop_signal is not None

    @property
    def stop_signal(self) -> signal.Signals | None:
        """The signal that asked a rank to stop, as of the last :meth:`save`; None if there was none.

        SIGTERM also stands for a file ``STOP``; see :attr:`stop_reason`.
        """
        return self._signals.stop_signal

    @property
    def stop_reason(self) -> str | None:
        """The source of the stop request, as of the last :meth:`save`: a signal's name or ``file STOP``; else None."""
        return self._signals.reason if self.stop_requested else None

    @property
    def committed_step(self) -> int | None:
        """The last step known to be committed by this manager; None before the first."""
        return self._saves.history.committed_step if self._saves is not None else None

    @property
    def pending(self) -> SaveHandle | None:
        """The last save, if it is written in the background and has not been waited for."""
        return self._saves.pending if self._saves is not None else None

    def take_events(self) -> list[SaveEvent]:
        """Return the saves committed since the last call, oldest first. On rank 0; empty elsewhere."""
        return self._saves.log.take() if self._saves is not None else []
