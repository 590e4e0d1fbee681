"""A run's history from its folder: steps and events, for the report. Read-only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from milepost.parallelism.degrees import degrees_text
from milepost.run.catalog import StepEntry
from milepost.run.step_names import step_of
from milepost.storage.base import Storage, counted, join

EVENTS_NAME = "events.jsonl"
MAX_EVENTS_NBYTES = 64 << 20
"""Only the end of a longer log is read."""
MAX_EVENTS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One committed save, from its line in ``events.jsonl``. Seconds of wall clock."""

    step: int
    finished: float
    stall_s: float
    stage_s: float
    write_s: float
    commit_s: float
    nbytes: int
    reason: str
    kind: str
    ranks: str = ""
    """``2 ranks: fsdp 2``; empty if the log does not record it."""
    deleted: tuple[str, ...] = ()
    """Names of the steps that retention deleted after the save."""

    @property
    def rate(self) -> float:
        """Rank 0's write rate in bytes per second, while it was writing; 0 if unknown."""
        return self.nbytes / self.write_s if self.write_s > 0 else 0.0


EventKind = Literal["saved", "failed", "resumed", "deleted", "layout changed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """An event in the life of a run's checkpoints, for the time line."""

    when: float
    """Seconds since the epoch."""
    kind: EventKind
    step: int
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """The records of ``events.jsonl``, oldest first."""

    saves: Sequence[Save] = ()
    moments: Sequence[Moment] = ()


def read_log(storage: Storage, folder: str) -> Log:
    """Read the log in ``folder``. Torn lines and lines of other programs are skipped.

    Raises:
        StorageError: the storage can't be read.
    """
    path = join(folder, EVENTS_NAME)
    found = storage.stat(path)
    if found is None:
        return Log()
    start = max(0, found.nbytes - MAX_EVENTS_NBYTES)
    data = bytearray(found.nbytes - start)
    with storage.open_read(path) as handle:
        handle.read_into(start, [memoryview(data)])
    events = (_decoded(line) for line in bytes(data).split(b"\n")[-MAX_EVENTS:])
    saves: list[Save] = []
    moments: list[tuple[Moment, str]] = []
    for event in events:
        if event is not None:
            save = _save(event)
            saves += save
            moments += _moments(event, save[0] if save else None)
    return Log(saves=saves, moments=[*_with_layout_changes(moments)])


def _moments(event: Mapping[str, Any], save: Save | None) -> list[tuple[Moment, str]]:
    """Return the events of one log line, each with the run's number of ranks at that time."""
    ranks = _ranks_text(event)
    if save is not None:
        found = [Moment(when=save.finished, kind="saved", step=save.step, text=save.reason)]
        found += [Moment(when=save.finished, kind="deleted", step=step, text=f"by retention, after step {save.step}")
                  for name in save.deleted if (step := step_of(name)) is not None]  # fmt: skip
        return [(moment, ranks) for moment in found]
    kind, step, when = event.get("event"), event.get("step"), event.get("finished")
    if kind not in ("failed", "resumed") or not (_is_number(step) and _is_number(when)):
        return []
    text = str(event.get("error", "")) if kind == "failed" else ""
    return [(Moment(when=float(when), kind=kind, step=int(step), text=text), ranks)]


def _with_layout_changes(moments: Iterable[tuple[Moment, str]]) -> Iterator[Moment]:
    before = ""
    for moment, ranks in moments:
        if ranks and before and ranks != before:
            text = f"from {before} to {ranks}"
            yield Moment(when=moment.when, kind="layout changed", step=moment.step, text=text)
        before = ranks or before
        yield moment


def _ranks_text(event: Mapping[str, Any]) -> str:
    ranks, layout = event.get("world_size"), event.get("layout")
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 0 < ranks < 1 << 32:
        return ""
    named = isinstance(layout, dict) and all(isinstance(v, int) for v in layout.values())
    degrees = degrees_text(layout) if named and layout else ""
    return counted(ranks, "rank") + (f": {degrees}" if degrees and ranks != 1 else "")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e15


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _save(event: Mapping[str, Any]) -> list[Save]:
    numbers = ("step", "finished", "stall_s", "stage_s", "write_s", "commit_s", "nbytes")
    values = [event.get(name) for name in numbers]
    if not all(map(_is_number, values)):
        return []
    deleted = event.get("deleted")
    step, finished, stall_s, stage_s, write_s, commit_s, nbytes = (float(v) for v in values if v is not None)
    return [
        Save(
            step=int(step),
            finished=finished,
            stall_s=max(stall_s, 0.0),
            stage_s=max(stage_s, 0.0),
            write_s=max(write_s, 0.0),
            commit_s=max(commit_s, 0.0),
            nbytes=int(max(nbytes, 0)),
            reason=str(event.get("reason", "")),
            kind=str(event.get("kind", "")),
            ranks=_ranks_text(event),
            deleted=tuple(name for name in deleted if isinstance(name, str)) if isinstance(deleted, list) else (),
        )
    ]


@dataclass(frozen=True, slots=True)
class Forecast:
    """The growth of the run's folder if saves continue at the same rate. None: too few saves to estimate it."""

    nbytes_now: int
    nbytes_per_save: int
    saves_per_hour: float | None

    @property
    def nbytes_per_day(self) -> int | None:
        """Bytes written per day, before retention deletes any."""
        return None if self.saves_per_hour is None else round(self.nbytes_per_save * self.saves_per_hour * 24)


def forecast(entries: Sequence[StepEntry]) -> Forecast:
    """Estimate growth from the sizes of the existing steps and the times between them."""
    usable = [entry for entry in entries if entry.is_usable]
    times = sorted(entry.created_s for entry in usable if entry.created_s)
    per_hour = None
    if len(times) >= 2 and times[-1] > times[0]:
        per_hour = (len(times) - 1) / (times[-1] - times[0]) * 3600
    full = [entry.nbytes for entry in usable if entry.kind == "full"] or [entry.nbytes for entry in usable]
    return Forecast(sum(entry.nbytes for entry in entries), max(full, default=0), per_hour)
