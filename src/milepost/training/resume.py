"""Where a run goes on from: a pure choice out of what the catalog found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from milepost.config import CheckpointConfig
from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, StateMismatchError
from milepost.run.catalog import StepEntry


@dataclass(frozen=True, slots=True)
class Choice:
    """What to load. ``step`` is None for ``initial_load_path``, which is not a step of this run."""

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
    """What a run loads at its start; None for a fresh start, which needs a folder without any saved step.

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
            f"every step in {folder} is damaged; not starting afresh over them. Look at them with `milepost verify`, "
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
            "Choose another step, or leave load_step at -1 to resume from the newest sound one",
            path=entry.path,
        )
    # Step 0 holds no optimizer state worth loading; a later model-only step is refused when its parts are missed.
    return Choice(entry.path, step, step == 0 and entry.kind == "model", False)


def _notes(entries: Sequence[StepEntry], chosen: int, rejected: Mapping[int, str]) -> list[str]:
    """What a user should know of newer steps that were passed over."""
    notes = []
    for entry in entries:
        if entry.step <= chosen:
            continue
        if entry.state == "damaged" or entry.step in rejected:
            notes.append(f"step {entry.step} is newer but damaged: {rejected.get(entry.step, entry.reason)}")
        elif entry.is_usable:
            notes.append(f"step {entry.step} is newer but holds only the model: going on from step {chosen}")
        else:
            notes.append(f"step {entry.step} is newer but was never committed: {entry.reason}")
    return notes


def _steps(entries: Sequence[StepEntry]) -> str:
    numbers = ", ".join(str(e.step) for e in entries)
    return f"step {numbers}" if len(entries) == 1 else f"steps {numbers}"
