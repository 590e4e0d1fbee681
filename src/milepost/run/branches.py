"""Branches: the descent of steps, and the parent of the next save. Pure functions of a scan.

A run continues from its newest step, save after save: that is a branch. When it returns to an older step, by
``load_step`` or because the newest is damaged, another branch begins there, and the steps after it are abandoned. The
current branch is the one that was written last, by the order of commits, not by step numbers or a clock.

Steps without a lineage (of other programs, of ``milepost.save``, of older versions) are one branch, in the order of
their numbers. Such a step is later than all steps with a lineage if it did not exist when these were committed and its
number is the highest: another program has continued the run in this folder.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from milepost.format.manifest import BranchStart, Lineage
from milepost.run.catalog import StepEntry

UNDATED = ""
"""The branch of all steps without a lineage."""
MAX_TRAIL = 64
"""A longer trail is reduced to the branches that have steps in the folder."""
MAX_TORN_LEAD = 64
"""A damaged record whose order exceeds all others by this much is ignored."""


def new_id() -> str:
    """Return a unique id of 16 hex digits for a run or branch."""
    return uuid.uuid4().hex[:16]


def generation(entry: StepEntry, lineage: Lineage) -> int | None:
    """Count the branches from ``lineage`` back to ``entry``, its ancestor or the step itself; None if it is neither."""
    branch, order = _place(entry)
    path = ((lineage.branch, lineage.order), *lineage.trail)
    return next((index for index, (b, o) in enumerate(path) if branch == b and order <= o), None)


def _place(entry: StepEntry) -> tuple[str, int]:
    return (UNDATED, entry.step) if entry.lineage is None else (entry.lineage.branch, entry.lineage.order)


@dataclass(frozen=True, slots=True)
class History:
    """The steps of a folder by descent. Steps whose record can't be read are in neither list."""

    current: tuple[StepEntry, ...]
    """The branch that was written last, with all its ancestors, in the order of descent. Damaged steps included."""
    abandoned: tuple[StepEntry, ...]
    """Steps of abandoned branches, in the order of commits."""

    @classmethod
    def of(cls, entries: Iterable[StepEntry]) -> History:
        """The history that a scan shows."""
        entries = list(entries)
        undated = sorted((e for e in entries if e.lineage is None and e.kind), key=_step)
        last = _last_dated(entries)
        if last is None or last.lineage is None:
            return cls(tuple(undated), ())
        dated = [e for e in entries if e.lineage is not None]
        since = max(last.lineage.seen, last.step)
        newer = [e for e in undated if e.step > since]
        if any(e.is_resumable for e in newer):
            line, aside = _parted(dated, last.lineage)
            return cls((*(e for e in undated if e.step <= since), *line, *newer), tuple(aside))
        knows_undated = any(branch == UNDATED for branch, _ in last.lineage.trail)
        line, aside = _parted([*undated, *dated] if knows_undated else dated, last.lineage)
        return cls(tuple(line), tuple(aside))

    @property
    def last(self) -> StepEntry | None:
        """The end of the current branch, damaged or not."""
        return self.current[-1] if self.current else None

    @property
    def newest(self) -> StepEntry | None:
        """The newest step of the current branch that can be loaded, whatever it holds."""
        return next((entry for entry in reversed(self.current) if entry.is_usable), None)

    @property
    def newest_resumable(self) -> StepEntry | None:
        """The newest step of the current branch that training can resume from."""
        return next((entry for entry in reversed(self.current) if entry.is_resumable), None)

    @property
    def start(self) -> BranchStart | None:
        """The step at which a user began the current branch, if any."""
        return self.last.lineage.start if self.last is not None and self.last.lineage is not None else None

    def since_start(self) -> list[StepEntry]:
        """The steps of the current branch, from the step at which a user began it."""
        start = self.start
        if start is None:
            return []
        since = [e for e in self.current if e.lineage is not None and e.lineage.start == start]
        named = [e for e in self.current if (e.step, e.save_id) == (start.step, start.save_id) and e not in since]
        return [*named, *since]

    def other_runs(self) -> list[StepEntry]:
        """The abandoned steps of other runs than the current branch's: of a run before it, or copied here by hand."""
        return [entry for entry in self.abandoned if self.is_of_another_run(entry)]

    def is_of_another_run(self, entry: StepEntry) -> bool:
        """Return whether ``entry`` is of another run than the current branch, so that this run must not delete it."""
        last = self.last.lineage if self.last is not None else None
        return last is not None and entry.lineage is not None and entry.lineage.run != last.run

    def ends(self) -> dict[int, int]:
        """For each abandoned step, by number, the last existing step of its branch."""
        last = {_place(entry)[0]: entry.step for entry in self.abandoned}
        return {entry.step: last[_place(entry)[0]] for entry in self.abandoned}


def have_no_run_in_common(ours: Iterable[StepEntry], theirs: Iterable[StepEntry]) -> bool:
    """Return whether two folders hold steps of different runs only, so that they must not be merged."""
    runs = [{e.lineage.run if e.lineage is not None else UNDATED for e in some if e.kind} for some in (ours, theirs)]
    return bool(runs[0] and runs[1]) and not runs[0] & runs[1]


def _parted(entries: Iterable[StepEntry], lineage: Lineage) -> tuple[list[StepEntry], list[StepEntry]]:
    """Split into the step of ``lineage`` with its ancestors, by descent, and the others, by commit."""
    line, aside = [], []
    for entry in sorted(entries, key=commit_order):
        back = generation(entry, lineage)
        if back is None:
            aside.append(entry)
        else:
            line.append((-back, entry))
    return [entry for _, entry in sorted(line, key=lambda pair: pair[0])], aside


def _last_dated(entries: Sequence[StepEntry]) -> StepEntry | None:
    """The step that was committed last, of those with an order; a torn record counts if its order is plausible."""
    dated = [entry for entry in entries if entry.lineage is not None]
    limit = max((commit_order(entry)[0] for entry in dated if entry.kind), default=0) + MAX_TORN_LEAD
    believed = [entry for entry in dated if entry.kind or commit_order(entry)[0] <= limit]
    return max(believed, key=commit_order, default=None)


def _step(entry: StepEntry) -> int:
    return entry.step


def commit_order(entry: StepEntry) -> tuple[int, float, int]:
    """The key that sorts steps in the order of commits: those without a lineage first, by number."""
    # Orders are equal only after folders were mixed by hand.
    return (-1, 0.0, entry.step) if entry.lineage is None else (entry.lineage.order, entry.created_s, entry.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """The step that the next save of a run descends from, and its place in the order of commits."""

    run: str
    branch: str
    order: int
    trail: tuple[tuple[str, int], ...] = ()
    start: BranchStart | None = None
    parent: str = ""
    parent_step: int | None = None
    seen: int = -1

    def lineage(self) -> Lineage:
        """Return the lineage to record in the next save."""
        return Lineage(
            run=self.run,
            order=self.order,
            branch=self.branch,
            parent=self.parent,
            parent_step=self.parent_step,
            trail=self.trail,
            start=self.start,
            seen=self.seen,
        )

    def tried(self) -> Descent:
        """Return the descent after a save was started: the next save gets another place, whatever the outcome."""
        return replace(self, order=self.order + 1)

    def committed(self, step: int, save_id: str) -> Descent:
        """Return the descent after a save was committed: the next save descends from it."""
        return replace(self, parent=save_id, parent_step=step)


def begin(entries: Sequence[StepEntry], step: int) -> Descent:
    """The descent of a run that has loaded no step of this folder and saves ``step`` first.

    If the origin of the state is unknown, a step number above the last one counts as continuing the run.
    """
    last = History.of(entries).last
    if last is not None and step > last.step:
        return descend(entries, last, start=None)
    return Descent(run=new_id(), branch=new_id(), order=_next_order(entries), seen=_highest_undated(entries))


def descend(entries: Sequence[StepEntry], parent: StepEntry, *, start: BranchStart | None) -> Descent:
    """The descent of a run that has loaded ``parent``; ``start`` if a user has named it, for a branch to begin."""
    history = History.of(entries)
    order, seen = _next_order(entries), _highest_undated(entries)
    place = {"order": order, "seen": seen, "parent": parent.save_id, "parent_step": parent.step}
    if parent.lineage is None:
        older = [(UNDATED, parent.step)]
        last = _last_dated(entries)
        if last is not None and last.lineage is not None and parent is history.last:  # by another program
            older += [(last.lineage.branch, last.lineage.order), *last.lineage.trail]
        run = last.lineage.run if last is not None and last.lineage is not None else new_id()
        trail = _cut(tuple(dict(reversed(older)).items())[::-1], entries)
        return Descent(run=run, branch=new_id(), trail=trail, start=start, **place)  # type: ignore[arg-type]
    lineage = parent.lineage
    if _is_end(parent, lineage, entries, is_named=start is not None):
        branch, trail = lineage.branch, lineage.trail
    else:
        branch, trail = new_id(), _cut(((lineage.branch, lineage.order), *lineage.trail), entries)
    start = start if start is not None else lineage.start
    return Descent(run=lineage.run, branch=branch, trail=trail, start=start, **place)  # type: ignore[arg-type]


def _is_end(parent: StepEntry, lineage: Lineage, entries: Sequence[StepEntry], *, is_named: bool) -> bool:
    """Return whether no step of its branch is abandoned by a run that resumed from ``parent``.

    A model-only last step does not count: a run cannot resume from it.
    """
    behind = []
    for entry in entries:
        if entry.lineage is None:
            if not entry.kind and entry.state in ("damaged", "newer") and entry.step > parent.step:
                return False  # it may have belonged to this branch
        elif entry.lineage.branch == lineage.branch and entry.lineage.order > lineage.order:
            behind.append(entry)
    return not any(is_named or entry.kind != "model" for entry in behind)


def _cut(trail: tuple[tuple[str, int], ...], entries: Sequence[StepEntry]) -> tuple[tuple[str, int], ...]:
    if len(trail) <= MAX_TRAIL:
        return trail
    places = [_place(entry) for entry in entries]
    return tuple((b, o) for b, o in trail if any(b == branch and order <= o for branch, order in places))


def _next_order(entries: Sequence[StepEntry]) -> int:
    """Return an order above all others in the folder, and above those that can't be read."""
    unread = sum(not entry.kind for entry in entries)
    return max((entry.lineage.order for entry in entries if entry.lineage is not None), default=0) + 1 + unread


def _highest_undated(entries: Sequence[StepEntry]) -> int:
    return max((entry.step for entry in entries if entry.lineage is None and entry.kind), default=-1)
