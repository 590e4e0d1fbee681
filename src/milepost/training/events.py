"""The events of a run's checkpoints, for the log, for TensorBoard and for ``events.jsonl``.

A line of ``events.jsonl`` is a JSON object: a committed save or, with an ``event``, a failed save or a resume. The
latter are written with the next save's line, so that they need no separate request.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from milepost.errors import StorageError, shortened
from milepost.saving.job import SaveReport
from milepost.storage.base import Storage, join

log = logging.getLogger("milepost")

EVENTS_NAME = "events.jsonl"
_MAX_ERROR_LENGTH = 500
_MAX_WAITING = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveEvent:
    """A committed save, as observed on rank 0. Times are in seconds of wall clock."""

    step: int
    reason: str
    kind: str
    save_id: str
    finished: float
    """Time at which the commit was known, in seconds since the epoch."""
    stall_s: float
    """Time for which it stalled training, including a wait for an earlier save."""
    plan_s: float
    stage_s: float
    write_s: float
    commit_s: float
    nbytes: int
    """Bytes written by rank 0."""
    world_size: int = 1
    layout: Mapping[str, int] = field(default_factory=dict)
    """Degrees of parallelism by name."""
    deleted: tuple[str, ...] = ()
    """Names of the steps that retention deleted once this one was committed."""

    @classmethod
    def of(cls, report: SaveReport, *, step: int, reason: str, kind: str, stall_s: float, **ranks: Any) -> SaveEvent:
        return cls(
            step=step,
            reason=reason,
            kind=kind,
            save_id=report.save_id,
            finished=time.time(),
            stall_s=stall_s,
            plan_s=report.plan_s,
            stage_s=report.stage_s,
            write_s=report.write_s,
            commit_s=report.commit_s,
            nbytes=report.nbytes,
            deleted=report.deleted,
            **ranks,
        )

    def line(self) -> bytes:
        """Return the line for ``events.jsonl``."""
        return _line({k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()})

    def __str__(self) -> str:
        rate = self.nbytes / self.write_s / 1e6 if self.write_s else 0.0
        return (
            f"saved step {self.step} ({self.reason}, {self.kind}): training stalled for {self.stall_s:.3f} s; "
            f"plan {self.plan_s:.3f}, stage {self.stage_s:.3f}, write {self.write_s:.3f}, commit "
            f"{self.commit_s:.3f} s; "
            f"rank 0 wrote {self.nbytes / 1e6:.1f} MB ({rate:.0f} MB/s)"
        )


class SaveLog:
    """Records the saves of a run, for the log, ``events.jsonl`` and ``take``. On rank 0."""

    def __init__(self, storage: Storage, folder: str, world_size: int = 1, layout: Mapping[str, int] | None = None):
        self._storage = storage
        self._folder = folder
        self._ranks = {"world_size": world_size, "layout": dict(layout or {})}
        self._waiting: deque[bytes] = deque(maxlen=_MAX_WAITING)
        self._num_failed = 0
        self._events: list[SaveEvent] = []
        self._contents: Mapping[str, str] = {}  # of the previous save
        self._odd: str | None = None  # the suspicion that was logged last, while it holds

    def record(self, report: SaveReport, *, step: int, reason: str, kind: str, stall_s: float) -> None:
        """Record a committed save, and warn if training does not seem to progress. Never fails."""
        event = SaveEvent.of(report, step=step, reason=reason, kind=kind, stall_s=stall_s, **self._ranks)
        self._events.append(event)
        log.info("%s", event)
        odd = suspicion(self._contents, report.contents)
        if odd is not None and odd != self._odd:  # not again after each save of a long run
            log.warning("step %d: %s", step, odd)
        self._odd = odd
        self._contents = report.contents
        self._waiting.append(event.line())
        self._write()

    def resumed(self, step: int, path: str) -> None:
        """Record a resume from ``step`` at ``path``, to be written before the next save's line."""
        said = {"event": "resumed", "step": step, "path": path, "finished": round(time.time(), 6)}
        self._waiting.append(_line(said | self._ranks))

    def failed(self, step: int, reason: str, error: str) -> None:
        """Record a failed save, to be written before the next save's line, or at the close."""
        said = {"event": "failed", "step": step, "reason": reason, "finished": round(time.time(), 6)}
        self._waiting.append(_line(said | {"error": shortened(error, _MAX_ERROR_LENGTH)} | self._ranks))
        self._num_failed += 1

    def close(self) -> None:
        """Write pending lines. Never fails."""
        if self._num_failed:
            self._write()

    def _write(self) -> None:
        lines = b"".join(self._waiting)
        self._waiting.clear()
        self._num_failed = 0
        try:
            append_lines(self._storage, self._folder, lines)
        except StorageError as error:  # the checkpoint itself is safe
            log.warning("events could not be logged: %s", error)

    def take(self) -> list[SaveEvent]:
        """Return the saves recorded since the last call, oldest first."""
        events, self._events = self._events, []
        return events


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def append_lines(storage: Storage, folder: str, lines: bytes) -> None:
    """Append lines to the log in ``folder``. A line truncated by a crash stays a separate line.

    Raises:
        StorageError: the storage refused.
    """
    path = join(folder, EVENTS_NAME)
    end = b"\n" if _is_torn(storage, path) else b""
    storage.append(path, end + lines)


def _is_torn(storage: Storage, path: str) -> bool:
    found = storage.stat(path)
    if found is None or not found.nbytes:
        return False
    last = bytearray(1)
    with storage.open_read(path) as handle:
        handle.read_into(handle.nbytes - 1, [memoryview(last)])
    return last != b"\n"


def suspicion(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """Return the reason to doubt that training progresses, from two consecutive saves' digests, or None."""
    common = {part for part in ("model", "optimizer") if part in before and part in after}
    if "model" not in common:
        return None
    same = {part for part in common if before[part] == after[part]}
    if same == common:
        return "no tensor has changed since the previous save: is the optimizer stepping?"
    if same == {"model"}:
        return "the optimizer's state has changed since the previous save, but no weight: is the learning rate 0?"
    if same == {"optimizer"}:
        return (
            "weights have changed since the previous save, but the optimizer's state has not: is it the right "
            "optimizer?"
        )
    return None
