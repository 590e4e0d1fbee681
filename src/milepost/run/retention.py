"""Retention: pure rules over the catalog's entries, each decision with its reason.

Only committed steps of the run that wrote last are ever deleted. The rules apply to the current branch. Steps of
abandoned branches are kept only within the rest of ``keep_latest_k``, and deleted first, but not before a newer step of
the current branch can be resumed from. Always kept are: the newest committed step of the current branch and its newest
resumable one, steps of other runs, pinned and protected steps, links, and all external, incomplete or damaged steps,
whose value is unknown.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from milepost.config import CheckpointConfig
from milepost.errors import CheckpointNotFoundError, SaveError, StorageError
from milepost.format.manifest import Lineage
from milepost.run import catalog
from milepost.run.branches import History, commit_order
from milepost.run.catalog import CheckpointInfo, StepEntry
from milepost.run.deletion import Deletion
from milepost.run.step_names import pin_mark
from milepost.run.sweep import delete_checkpoint
from milepost.storage.base import Storage, format_duration, join, split

log = logging.getLogger("milepost")

MetricMode = Literal["min", "max"]
OF_ANOTHER_RUN = "it is of another run"


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision on one step. ``name`` is its folder's, in the run's folder; ``nbytes`` is what deleting it frees."""

    step: int
    name: str
    keep: bool
    reason: str
    nbytes: int
    is_abandoned: bool = False
    """True if it belongs to an abandoned branch."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The steps to keep. Rules add up: a step is deleted only if none keeps it."""

    keep_latest_k: int
    """The N newest committed steps; 0 keeps all."""
    keep_every_n: int = 0
    """Steps that are multiples of this; 0 disables."""
    keep_within_s: float = 0.0
    """Steps of any branch that were committed in the last N seconds; 0 disables."""
    keep_hourly: int = 0
    """The newest step of each of the last N hours that have one; 0 disables."""
    keep_daily: int = 0
    """The same for days, which begin at midnight UTC."""
    keep_best_k: int = 0
    """The N steps with the best value of ``metric``; 0 disables."""
    metric: str = ""
    """Name under which the value was recorded. Steps without one are not compared."""
    mode: MetricMode = "min"
    """The best value of ``metric``: the lowest or the highest."""
    weights_alone: bool = False
    """No step is for resuming, so any newer step replaces those of abandoned branches."""
    protected: Mapping[int, str] = field(default_factory=dict)
    """Steps that the caller needs, with the reason."""

    @property
    def keeps_all(self) -> bool:
        """True if no step is ever deleted."""
        return not self.keep_latest_k

    @classmethod
    def of(cls, config: CheckpointConfig, protected: Mapping[int, str]) -> Rules:
        """The rules of a run for its own folder."""
        return cls(
            config.keep_latest_k,
            config.keep_every_n_steps,
            keep_best_k=config.keep_best_k,
            metric=config.metric,
            mode=config.mode,
            protected=protected,
        )


def plan(entries: Sequence[StepEntry], rules: Rules, *, now: float) -> list[Decision]:
    """Decide on each step of ``catalog.scan``, in order of their numbers. ``now`` is in seconds since the epoch."""
    history = History.of(entries)
    own = [entry for entry in history.current if _is_own(entry)]
    ends = history.ends()
    # Later rules take precedence.
    reasons = {entry.step: "it belongs to no run" for entry in entries if entry.step not in ends}
    reasons |= dict.fromkeys((entry.step for entry in own), "")
    reasons |= dict.fromkeys(_newest_of_each(own, 86400, rules.keep_daily), "it is the newest of its day")
    reasons |= dict.fromkeys(_newest_of_each(own, 3600, rules.keep_hourly), "it is the newest of its hour")
    reasons |= {
        entry.step: f"it was committed in the last {format_duration(rules.keep_within_s)}"
        for entry in entries
        if rules.keep_within_s and now - entry.created_s <= rules.keep_within_s
    }
    for entry in _best(own, rules):
        reasons[entry.step] = (
            f"it is one of the {rules.keep_best_k} best by {rules.metric}: {entry.metrics[rules.metric]:g}"
        )
    if rules.keep_every_n:
        reasons |= {
            e.step: f"it is a multiple of {rules.keep_every_n}" for e in own if e.step % rules.keep_every_n == 0
        }
    reasons |= dict.fromkeys((entry.step for entry in own[-rules.keep_latest_k :]), _latest(rules.keep_latest_k))
    reasons |= {e.step: "it is the newest step to resume from" for e in [e for e in own if e.is_resumable][-1:]}
    reasons |= {entry.step: "it is the newest committed step" for entry in own[-1:]}
    reasons |= _abandoned_to_keep(history, own, ends, rules)
    reasons |= {entry.step: OF_ANOTHER_RUN for entry in entries if history.is_of_another_run(entry)}
    reasons |= rules.protected
    reasons |= {entry.step: reason for entry in entries if (reason := _why_untouchable(entry))}
    return [
        Decision(
            step=entry.step,
            name=entry.name,
            keep=bool(reasons.get(entry.step)),
            reason=reasons.get(entry.step) or (_of(ends[entry.step]) if entry.step in ends else "no rule keeps it"),
            nbytes=entry.nbytes - entry.shared_nbytes,
            is_abandoned=entry.step in ends,
        )
        for entry in sorted(entries, key=lambda entry: entry.step)
    ]


def _why_untouchable(entry: StepEntry) -> str:
    if entry.state == "part":
        return f"it is {entry.reason}: the run deletes it once no node needs it"
    if entry.state != "committed":
        return f"it is {entry.state}" + (f": {entry.reason}" if entry.reason else ", written by another program")
    if entry.is_link:
        return "it is a link to another folder"
    return "it is pinned" if entry.pinned else ""


def _abandoned_to_keep(
    history: History, own: Sequence[StepEntry], ends: Mapping[int, int], rules: Rules
) -> dict[int, str]:
    """Steps of abandoned branches to keep: the newest within the limit, or all while no newer step is resumable."""
    abandoned = [e for e in history.abandoned if _is_own(e) and not history.is_of_another_run(e)]
    reached = max((commit_order(entry) for entry in own if rules.weights_alone or entry.is_resumable), default=None)
    found = {
        entry.step: f"{_of(ends[entry.step])}, but no newer step can be resumed from"
        for entry in abandoned
        if reached is None or commit_order(entry) > reached
    }
    latest_k = rules.keep_latest_k
    room = max(0, latest_k - len(own)) if latest_k else len(abandoned)
    for entry in abandoned[max(0, len(abandoned) - room) :]:
        found[entry.step] = f"{_latest(latest_k)}, {_of(ends[entry.step])}" if latest_k else _latest(0)
    return found


def _latest(keep_latest_k: int) -> str:
    return f"it is one of the {keep_latest_k} newest" if keep_latest_k else "all are kept (keep_latest_k = 0)"


def _of(end: int) -> str:
    return f"abandoned branch (ended at step {end})"


def _is_own(entry: StepEntry) -> bool:
    return entry.state == "committed" and not entry.is_link


def _best(entries: Sequence[StepEntry], rules: Rules) -> list[StepEntry]:
    """The steps with the best values; the newest of equal ones."""
    sign, metric = 1.0 if rules.mode == "max" else -1.0, rules.metric
    valued = [entry for entry in entries if math.isfinite(entry.metrics.get(metric, math.nan))]
    ranked = sorted(valued, key=lambda entry: (sign * entry.metrics[metric], commit_order(entry)))
    return ranked[max(0, len(ranked) - rules.keep_best_k) :]


def _newest_of_each(entries: Sequence[StepEntry], span_s: int, count: int) -> Iterator[int]:
    """The newest step of each of the latest ``count`` periods in which any of ``entries``, oldest first, was committed.

    Periods without a step do not count, as in the rules of restic and borg. The latest periods are those of the newest
    steps, not the latest by clock: after a clock was set back, periods in the future would displace all later steps.
    """
    newest = {int(entry.created_s // span_s): entry.step for entry in entries}
    yield from sorted(newest.values(), reverse=True)[:count]


def apply(storage: Storage, folder: str, decisions: Iterable[Decision], together: Deletion | None = None) -> list[str]:
    """Delete the steps of a run's ``folder`` that are not to be kept; return their names.

    All are hidden from readers before the first is removed: steps of abandoned branches first, then the oldest. With
    ``together`` they are removed when that deletion is finished. A step that another process deletes at the same time
    is not an error; one that was pinned meanwhile stays.

    Raises:
        StorageError: a step could not be deleted, or its bytes not be removed. The others were still tried.
    """
    deleted = []
    failure: StorageError | None = None
    own = Deletion(storage, folder) if together is None and storage.can_rename else None
    for decision in sorted(decisions, key=lambda decision: not decision.is_abandoned):
        if decision.keep:
            continue
        path = join(folder, decision.name)
        try:
            if not delete_checkpoint(storage, path, unless=pin_mark(path), together=own or together):
                continue
        except CheckpointNotFoundError:
            continue  # deleted by another process that prunes: the trainer, `milepost prune`
        except StorageError as error:
            if storage.stat(path) is not None:
                failure = failure or error
        else:
            deleted.append(decision.name)
    if own is not None:
        try:
            own.finish()
        except StorageError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return deleted


def set_aside(storage: Storage, path: str, lineage: Lineage | None) -> None:
    """Rename a pinned or external step, or one of another run, that a save of another branch is about to replace.

    Its new name is not that of a step, so nothing deletes it; its pin is removed. Other steps are replaced as usual.

    Raises:
        SaveError: the storage can't rename it.
        StorageError: it could not be renamed.
    """
    if storage.stat(path) is None:
        return
    info = catalog.examine(storage, path)
    pin = pin_mark(path)
    is_pinned = storage.stat(pin) is not None
    why = _why_irreplaceable(info, lineage, is_pinned=is_pinned) if info is not None else None
    if why is None:
        return
    if not storage.can_rename:
        raise SaveError(
            f"{storage.root}/{path} is {why}, so it is not replaced by a save of another branch. Copy it to another "
            "folder, then delete or unpin it; or give this run another checkpoint.folder",
            path=path,
        )
    place = f"{path}.aside-{uuid.uuid4().hex[:8]}"
    storage.rename(path, place)
    storage.sync_folder(split(path)[0])
    if is_pinned:
        storage.remove(pin)
    log.warning("%s/%s is %s and about to be replaced; it is kept as %s", storage.root, path, why, split(place)[1])


def _why_irreplaceable(info: CheckpointInfo, lineage: Lineage | None, *, is_pinned: bool) -> str | None:
    """Return why a save of ``lineage`` must not replace a step; None if it may."""
    theirs = info.lineage
    if theirs is not None and lineage is not None and theirs.branch == lineage.branch:
        return None
    if is_pinned:
        return "pinned"
    if info.state == "external":
        return "of another program"
    is_others = theirs is not None and (lineage is None or theirs.run != lineage.run)
    return "of another run" if is_others else None
