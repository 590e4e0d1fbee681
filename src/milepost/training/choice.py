"""Choose the step from which a run resumes: pure, given the catalog's entries."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil

from milepost.config import CheckpointConfig
from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConfigError,
    NewerFormatError,
    StateMismatchError,
)
from milepost.format.manifest import BranchStart
from milepost.run.branches import History, commit_order, have_no_run_in_common
from milepost.run.catalog import StepEntry


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to load. ``step`` is None for ``initial_load_path``, which is not a step of this run."""

    path: str
    """Path relative to the run's storage for a step; as configured for an initial load."""
    step: int | None
    model_only: bool
    may_fall_back: bool
    """Fall back to an older step if this one turns out to be damaged."""
    notes: tuple[str, ...] = field(default=())
    start: BranchStart | None = None
    """The step itself, if the user made a branch begin at it."""
    is_finished: bool = False
    """True if it is the last step of the run, so that nothing is left to train."""
    in_hf: bool = False
    """True if that step consists of Hugging Face files."""
    in_remote: bool = False
    """True if it is read from the run's remote folder."""
    save_id: str = ""
    """Save id of the step."""


def choose(
    entries: Sequence[StepEntry],
    config: CheckpointConfig,
    rejected: Mapping[int, str],
    folder: str,
    *,
    launch: str = "",
    num_steps: int | None = None,
) -> Choice | None:
    """Choose the checkpoint to load at a run's start; None for a new run, whose folder has no saved steps.

    ``rejected`` maps steps that were found damaged to the reasons. ``folder`` is for messages. ``launch``
    identifies the job (see :func:`launch_id`); ``num_steps`` is the last step of the run, if it is known.

    Raises:
        CheckpointNotFoundError: ``load_step`` does not exist.
        CheckpointDamagedError: ``load_step`` is damaged, or every step of the current branch is.
        StateMismatchError: there are only steps without optimizer and train state.
        NewerFormatError: a newer Milepost wrote the step to load, or one that may be the newest.
    """
    _refuse_newer(entries, config.load_step, folder)
    _refuse_parts(entries, folder)
    entries = [_rejected(entry, rejected.get(entry.step)) for entry in entries]
    history = History.of(entries)
    line: tuple[StepEntry, ...] = history.current
    notes: tuple[str, ...] = ()
    if config.load_step >= 0:
        if not _goes_on(entries, history, config, launch):
            return _named_step(entries, config.load_step, folder, launch)
        line = tuple(history.since_start())
        again = "checkpoint.restart_branch starts another branch there"
        if config.restart_branch:
            again = f"checkpoint.restart_branch has already taken effect in this job ({launch})"
        notes = (
            f"checkpoint.load_step = {config.load_step}: resuming from a later step that descends from it; {again}",
        )
    finished = _finished(line, num_steps)
    if finished is not None:
        return finished
    full = next((entry for entry in reversed(line) if entry.is_resumable), None)
    if config.load_step >= 0 and (full is None or full.step == config.load_step):  # all descendants are damaged
        return _named_step(entries, config.load_step, folder, launch)
    if full is not None:
        notes += tuple(_passed_over(entries, history, full))
        return Choice(full.path, full.step, _is_seed(full), True, notes)
    return _without_full_step(entries, line, history, config, folder)


def both_tiers(
    here: Sequence[StepEntry], remote: Sequence[StepEntry], remote_folder: str, bad_here: Collection[int] = ()
) -> list[tuple[StepEntry, bool]]:
    """Merge the steps of a run's two folders, with whether to read each from the remote one.

    The local folder is preferred, unless only the remote one has the step complete, or committed it later. ``bad_here``
    are steps found damaged in the local folder; ``remote_folder`` is for messages.

    Raises:
        ConfigError: they hold steps of different runs.
    """
    if have_no_run_in_common(here, remote):
        raise ConfigError(
            f"checkpoint.remote_folder {remote_folder} holds steps of another run than checkpoint.folder "
            f"({_steps(remote)} there, {_steps(here)} here): give each run a remote folder of its own"
        )
    near = {entry.step: entry for entry in here}
    far = {entry.step: entry for entry in remote}
    found = []
    for step in sorted(near.keys() | far.keys()):
        one, other = near.get(step), far.get(step)
        if one is not None and step in bad_here and one.is_usable:
            one = _rejected(one, "a loader found it damaged")
        if one is None or other is None:
            found.append((one or far[step], one is None))
            continue
        is_later = other.save_id != one.save_id and commit_order(other) > commit_order(one)
        is_remote = other.is_usable and (not one.is_usable or is_later)
        found.append((other, True) if is_remote else (one, False))
    return found


def _refuse_newer(entries: Sequence[StepEntry], load_step: int, folder: str) -> None:
    """Refuse to resume from an older step as if a newer Milepost's step were damaged."""
    newer = [entry for entry in entries if entry.state == "newer" and load_step in (-1, entry.step)]
    if newer:
        raise NewerFormatError(
            f"{folder}/{newer[-1].name} can't be read here: {newer[-1].reason}. To resume from an older step anyway, "
            f"set checkpoint.load_step",
            path=newer[-1].path,
        )


def _refuse_parts(entries: Sequence[StepEntry], folder: str) -> None:
    """Refuse to ignore one node's parts, as if the folder were empty."""
    parts = [entry for entry in entries if entry.state == "part"]
    if parts:
        raise ConfigError(
            f"{folder} holds parts of steps ({parts[-1].name}: {parts[-1].reason}), as a run with "
            "checkpoint.folder_per_node leaves them: set that, or checkpoint.folder to the checkpoint.remote_folder of "
            "that run, where its steps are complete"
        )


def launch_id(environ: Mapping[str, str] = os.environ) -> str:
    """Return an id common to all restarts of a job and unique to it; empty if unknown.

    Slurm requeues a job under its old number. torchrun restarts ranks under one run id, if given; otherwise the agent,
    their parent process, identifies the launch.
    """
    if "SLURM_JOB_ID" in environ:
        return f"slurm-{environ['SLURM_JOB_ID']}"
    run_id = environ.get("TORCHELASTIC_RUN_ID")
    if run_id == "none":
        agent = psutil.Process(os.getppid())
        return f"torchrun-{socket.gethostname()}-{agent.pid}-{agent.create_time():.2f}"
    return f"torchrun-{run_id}" if run_id else ""


def _rejected(entry: StepEntry, reason: str | None) -> StepEntry:
    return entry if reason is None else replace(entry, state="damaged", reason=reason)


def _goes_on(entries: Sequence[StepEntry], history: History, config: CheckpointConfig, launch: str) -> bool:
    """Return whether the branch that was written last was started by ``load_step``."""
    start = history.start
    if start is None or start.step != config.load_step:
        return False
    if config.restart_branch and (not launch or start.launch != launch):
        return False
    # An older or newer save with this number is another start.
    return all(entry.save_id in ("", start.save_id) for entry in entries if entry.step == start.step)


def _finished(line: Sequence[StepEntry], num_steps: int | None) -> Choice | None:
    """Return the last step of the run, if it is already saved."""
    end = next((entry for entry in reversed(line) if entry.is_usable), None)
    if num_steps is None or end is None or end.step < num_steps:
        return None
    note = f"this run is finished: it has step {end.step}, and its last step is {num_steps}"
    return Choice(end.path, end.step, end.kind == "model", True, (note,), is_finished=True)


def _without_full_step(
    entries: Sequence[StepEntry],
    line: Sequence[StepEntry],
    history: History,
    config: CheckpointConfig,
    folder: str,
) -> Choice | None:
    """Handle a current branch without any step to resume from."""
    usable = [entry for entry in line if entry.is_usable]
    damaged = [entry for entry in entries if entry.state == "damaged"]
    if [entry.step for entry in usable] == [0] and not damaged:
        note = "step 0 is a seed checkpoint: it holds the initial weights"
        return Choice(usable[0].path, 0, True, False, (note,))
    others = [entry for entry in history.abandoned if entry.is_resumable]
    instead = f"; or resume {_steps(others)}, of an abandoned branch, with checkpoint.load_step" if others else ""
    if usable:
        raise StateMismatchError(
            f"{folder} holds no step to resume from: {_steps(usable)} "
            f"{'is' if len(usable) == 1 else 'are'} model-only, without optimizer and train state. To start a new run "
            f"from those weights, set checkpoint.initial_load_path = {folder}/step-{usable[-1].step} and another "
            f"job.dump_folder or checkpoint.folder{instead}",
        )
    if damaged or others:
        lines = "".join(f"\n  step {entry.step}: {entry.reason}" for entry in damaged)
        of = " of the branch that was written last" if others else ""
        raise CheckpointDamagedError(
            f"every step{of} in {folder} is damaged; refusing to start a new run over existing steps. "
            "Check them with `milepost verify`, restore one from a backup, or move the folder away to start a new run"
            f"{instead}:{lines}",
            path=folder,
        )
    if config.initial_load_path or config.initial_load_in_hf:
        return Choice(config.initial_load_path, None, config.initial_load_model_only, False)
    return None


def _named_step(entries: Sequence[StepEntry], step: int, folder: str, launch: str) -> Choice:
    entry = next((e for e in entries if e.step == step), None)
    available = [e.step for e in entries if e.is_usable]
    if entry is None or entry.state == "incomplete":
        what = "was never committed" if entry is not None else "does not exist"
        there = f"steps that do: {', '.join(map(str, available))}" if available else "there are no committed steps"
        raise CheckpointNotFoundError(
            f"checkpoint.load_step = {step}: step {step} {what} in {folder}; {there}",
            path=folder,
            available=available,
        )
    if not entry.is_usable:
        raise CheckpointDamagedError(
            f"checkpoint.load_step = {step}: {folder}/step-{step} is damaged: {entry.reason}. "
            "Choose another step, or leave load_step at -1 to resume from the newest verified one",
            path=entry.path,
        )
    # Step 0 holds no useful optimizer state; a later model-only step is refused because parts are missing.
    start = BranchStart(step, entry.save_id, launch)
    return Choice(entry.path, step, _is_seed(entry), False, start=start)


def _is_seed(entry: StepEntry) -> bool:
    """Return whether a step is a seed checkpoint; from an external step 0, too, only the weights are loaded."""
    return entry.step == 0 and (entry.kind == "model" or entry.state == "external")


def _passed_over(entries: Sequence[StepEntry], history: History, chosen: StepEntry) -> list[str]:
    """Describe newer steps that were skipped, for the user."""
    ends = history.ends()
    notes = []
    for entry in entries:
        if entry.step <= chosen.step or entry.step in ends:
            continue
        if entry.state == "damaged":
            notes.append(f"step {entry.step} is newer but damaged: {entry.reason}")
        elif entry.is_resumable:
            continue  # saved before the chosen step, by a run that has counted its steps anew
        elif entry.is_usable:
            notes.append(f"step {entry.step} is newer but holds only the model: resuming from step {chosen.step}")
        else:
            notes.append(f"step {entry.step} is newer but {entry.state}: {entry.reason}")
    others = history.other_runs()
    if others:
        notes.append(
            f"{_steps(others)} {'is' if len(others) == 1 else 'are'} of another run than step {chosen.step}, which was "
            "written last: if this is not the run to resume, move its steps to a folder of their own"
        )
    other_steps = {entry.step for entry in others}
    higher = [e for e in entries if e.step in ends and e.step > chosen.step and e.step not in other_steps]
    if higher:
        notes.append(
            f"{_steps(higher)} {'is' if len(higher) == 1 else 'are'} of an abandoned branch: "
            "resumed only if checkpoint.load_step names one"
        )
    return notes


def _steps(entries: Sequence[StepEntry]) -> str:
    numbers = ", ".join(str(entry.step) for entry in entries)
    return f"step {numbers}" if len(entries) == 1 else f"steps {numbers}"
