"""Which steps to keep: pure rules over what the catalog found, each decision with its reason.

Only committed steps of Milepost's own are ever deleted. Kept in any case are: the newest committed step and the
newest that can be resumed from, pinned and protected steps, links, and all that is external, incomplete or damaged,
since nobody can say what those are worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from milepost.errors import CheckpointNotFoundError, StorageError
from milepost.run.catalog import StepEntry
from milepost.run.commit import delete_checkpoint
from milepost.storage.base import Storage, format_duration, join


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether one step stays. ``name`` is its folder's, in the run's folder; ``nbytes`` is what deleting it frees."""

    step: int
    name: str
    keep: bool
    reason: str
    nbytes: int


def plan(
    entries: Sequence[StepEntry],
    *,
    keep_latest_k: int,
    keep_every_n: int = 0,
    keep_within_s: float = 0.0,
    keep_hourly: int = 0,
    keep_daily: int = 0,
    protected: Mapping[int, str],
    now: float,
) -> list[Decision]:
    """A decision for each step, oldest first. Rules add up: a step goes only if none keeps it.

    Args:
        entries: what ``catalog.scan`` found.
        keep_latest_k: keep so many of the newest committed steps; 0 keeps all.
        keep_every_n: keep the steps that are multiples of this; 0 is no such rule.
        keep_within_s: keep what was committed in the last so many seconds before ``now``; 0 is no such rule.
        keep_hourly: keep the newest step of each of the last so many hours that have one; 0 is no such rule.
        keep_daily: the same for days, which begin at midnight UTC.
        protected: steps that the caller needs, with the reason.
        now: seconds since the epoch.
    """
    own = sorted((entry for entry in entries if entry.state == "committed" and not entry.is_link), key=_step)
    latest = {entry.step for entry in own[-keep_latest_k:]} if keep_latest_k else {entry.step for entry in own}
    newest = {entry.step: "it is the newest committed step" for entry in own[-1:]}
    resumable = [entry for entry in own if entry.kind != "model"]
    newest |= {entry.step: "it is the newest step to resume from" for entry in resumable[-1:] if entry not in own[-1:]}
    hourly = set(_newest_of_each(own, 3600, keep_hourly))
    daily = set(_newest_of_each(own, 86400, keep_daily))

    def why_keep(entry: StepEntry) -> str:
        if entry.state != "committed":
            return f"it is {entry.state}" + (f": {entry.reason}" if entry.reason else ", written by another program")
        if entry.is_link:
            return "it is a link to a folder elsewhere"
        if entry.pinned:
            return "it is pinned"
        if entry.step in protected:
            return protected[entry.step]
        if entry.step in newest:
            return newest[entry.step]
        if entry.step in latest:
            return f"it is one of the {keep_latest_k} newest" if keep_latest_k else "all are kept (keep_latest_k = 0)"
        if keep_every_n and entry.step % keep_every_n == 0:
            return f"it is a multiple of {keep_every_n}"
        if keep_within_s and now - entry.created_s <= keep_within_s:
            return f"it was committed in the last {format_duration(keep_within_s)}"
        if entry.step in hourly:
            return "it is the newest of its hour"
        if entry.step in daily:
            return "it is the newest of its day"
        return ""

    decisions = []
    for entry in sorted(entries, key=_step):
        reason = why_keep(entry)
        decisions.append(Decision(entry.step, entry.name, bool(reason), reason or "no rule keeps it", entry.nbytes))
    return decisions


def _step(entry: StepEntry) -> int:
    return entry.step


def _newest_of_each(entries: Sequence[StepEntry], span_s: int, count: int) -> Iterator[int]:
    """The newest step of each of the latest ``count`` spans of time in which any of ``entries`` was committed.

    (As restic's and borg's rules of these names count: spans without a step do not use up the count.) The latest are
    those of the newest steps: after a clock was set back, hours that never were would else go before all to come.
    """
    newest = {int(entry.created_s // span_s): entry.step for entry in sorted(entries, key=_step)}
    yield from sorted(newest.values(), reverse=True)[:count]


def apply(storage: Storage, folder: str, decisions: Iterable[Decision]) -> list[str]:
    """Delete from the run's ``folder`` what is not to be kept, oldest first; the names of what was deleted.

    A step that is gone already, or goes meanwhile by another's hand, is no error.

    Raises:
        StorageError: a step could not be deleted. The others were tried all the same.
    """
    deleted = []
    failure: StorageError | None = None
    for decision in decisions:
        if decision.keep:
            continue
        path = join(folder, decision.name)
        try:
            delete_checkpoint(storage, path)
        except CheckpointNotFoundError:
            continue  # somebody else prunes at the same time: the trainer, `milepost prune`
        except StorageError as error:
            if storage.stat(path) is not None:
                failure = failure or error
        else:
            deleted.append(decision.name)
    if failure is not None:
        raise failure
    return deleted
