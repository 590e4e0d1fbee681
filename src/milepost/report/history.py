"""A run as its folder shows it: steps and events, read once, for the report. Nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milepost.run.catalog import StepEntry
from milepost.storage.base import Storage, join

EVENTS_NAME = "events.jsonl"
MAX_EVENTS_NBYTES = 64 << 20
"""Of a longer log only the end is read."""
MAX_EVENTS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One line of ``events.jsonl`` about a save that was committed. Seconds of wall clock."""

    step: int
    finished: float
    stall_s: float
    stage_s: float
    write_s: float
    commit_s: float
    nbytes: int
    reason: str
    kind: str

    @property
    def rate(self) -> float:
        """Bytes a second that rank 0 wrote while it wrote; 0 if that is unknown."""
        return self.nbytes / self.write_s if self.write_s > 0 else 0.0


def read_saves(storage: Storage, folder: str) -> list[Save]:
    """Return the saves that the log in ``folder`` records, oldest first. Torn lines and others' are left out.

    Raises:
        StorageError: the storage can't be read.
    """
    path = join(folder, EVENTS_NAME)
    found = storage.stat(path)
    if found is None:
        return []
    start = max(0, found.nbytes - MAX_EVENTS_NBYTES)
    data = bytearray(found.nbytes - start)
    with storage.open_read(path) as handle:
        handle.read_into(start, [memoryview(data)])
    events = (_decoded(line) for line in bytes(data).split(b"\n")[-MAX_EVENTS:])
    return [save for event in events if event is not None for save in _save(event)]


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _save(event: Mapping[str, Any]) -> list[Save]:
    numbers = ("step", "finished", "stall_s", "stage_s", "write_s", "commit_s", "nbytes")
    values = [event.get(name) for name in numbers]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        return []
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
        )
    ]


@dataclass(frozen=True, slots=True)
class Forecast:
    """How the run's folder grows if saves go on as they did. None where two saves are not enough to tell."""

    nbytes_now: int
    nbytes_per_save: int
    saves_per_hour: float | None

    @property
    def nbytes_per_day(self) -> int | None:
        """Before retention deletes anything."""
        return None if self.saves_per_hour is None else round(self.nbytes_per_save * self.saves_per_hour * 24)


def forecast(entries: Sequence[StepEntry]) -> Forecast:
    """From the sizes of the steps that are there, and the times between them."""
    usable = [entry for entry in entries if entry.is_usable]
    times = sorted(entry.created_s for entry in usable if entry.created_s)
    per_hour = None
    if len(times) >= 2 and times[-1] > times[0]:
        per_hour = (len(times) - 1) / (times[-1] - times[0]) * 3600
    full = [entry.nbytes for entry in usable if entry.kind == "full"] or [entry.nbytes for entry in usable]
    return Forecast(sum(entry.nbytes for entry in entries), max(full, default=0), per_hour)
