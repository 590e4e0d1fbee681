"""Saves in progress, observed from outside through a run's folder: the growth of each rank's file.

A ``Watch`` compares successive listings, to compute rates and the time since each file last grew.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from milepost.errors import StorageError
from milepost.format.tags import untagged
from milepost.run.outcome import FAILED_NAME, recorded_failure
from milepost.run.owner import is_alive, owners_of
from milepost.run.signoff import ranks_in
from milepost.run.step_names import ATTEMPT_PREFIX, step_of
from milepost.run.sweep import files_of_attempt
from milepost.storage.base import Entry, Storage, join

STUCK_S = 10.0
"""Seconds without growth after which an incomplete file is reported stuck."""
_RANK = re.compile(r"__(\d{1,9})_\d+\.distcp")
_RATE_SPAN_S = 3.0
"""Rates are averaged over about this many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A snapshot of one save attempt."""

    name: str
    sizes: Mapping[str, int]
    """Present size of each data file."""
    signed: frozenset[int]
    """Ranks that have signed off: their files are complete and durable."""
    owners: tuple[str, ...]
    """Living processes that work on it."""
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """The step that was written last."""

    step: int
    mtime_s: float


def look(storage: Storage, folder: str, *, now: float) -> tuple[list[Look], Newest | None]:
    """Return the attempts in a run's folder, and its newest step. Those that disappear meanwhile are left out.

    Raises:
        StorageError: the folder can't be read.
    """
    entries = storage.list(folder)
    steps = [(entry.mtime_s, step) for entry in entries if (step := step_of(entry.name)) is not None]
    newest = Newest(step=max(steps)[1], mtime_s=max(steps)[0]) if steps else None
    looks = []
    for entry in entries:
        if entry.name.startswith(ATTEMPT_PREFIX):
            try:
                looks.append(_look(storage, join(folder, entry.name), entry, now))
            except (StorageError, FileNotFoundError):
                continue  # just committed or removed
    return looks, newest


def _look(storage: Storage, attempt: str, entry: Entry, now: float) -> Look:
    names = {file.name for file in storage.list(attempt)}
    signed = ranks_in(names)
    failed = [rank for rank, is_complete in signed.items() if not is_complete]
    failure = f"rank {min(failed)} failed; see its log" if failed else ""
    if FAILED_NAME in names:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # being written
            failure, _ = recorded_failure(storage, attempt)
    return Look(
        name=entry.name,
        sizes={
            # Space is reserved before data is written, so the size of a local file is not its progress.
            file.name: storage.written_nbytes(f"{attempt}/data/{file.name}") if storage.can_rename else file.nbytes
            for file in files_of_attempt(storage, attempt)
        },
        signed=frozenset(rank for rank, is_complete in signed.items() if is_complete),
        owners=tuple(str(owner) for owner in owners_of(storage, attempt) if is_alive(owner, now)),
        failure=failure,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """The progress of one file of a save. ``rate`` is in bytes per second."""

    name: str
    rank: int | None
    nbytes: int
    rate: float
    still_s: float
    """Seconds since it last grew."""
    is_signed: bool

    @property
    def is_stuck(self) -> bool:
        return not self.is_signed and self.still_s >= STUCK_S


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveState:
    """The progress of a save: its files, those that need attention first."""

    look: Look
    files: Sequence[FileState]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def rate(self) -> float:
        return sum(file.rate for file in self.files)

    @property
    def text(self) -> str:
        """The state in a few words."""
        stuck = [file for file in self.files if file.is_stuck]
        if self.look.failure:
            return f"failed: {self.look.failure}"
        if not self.look.owners:
            return "stale: its run died"
        if stuck:
            return f"stuck: {', '.join(file.name for file in stuck[:3])}{' ...' if len(stuck) > 3 else ''}"
        if self.files and all(file.is_signed for file in self.files):
            return "written, to be committed"
        return "writing"


class Watch:
    """Progress over successive listings of a folder."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], list[tuple[float, int]]] = {}  # (time, size) at each change

    def update(self, looks: Iterable[Look], now: float) -> list[SaveState]:
        """Return the state of each save, with rates since earlier calls. ``now`` is monotonic."""
        states = []
        present: set[tuple[str, str]] = set()
        for one in looks:
            files = []
            for name, nbytes in one.sizes.items():
                present.add((one.name, name))
                files.append(self._file(one, name, nbytes, now))
            files.sort(key=lambda file: (not file.is_stuck, file.is_signed, file.rank or 0, file.name))
            states.append(SaveState(look=one, files=files))
        self._seen = {key: seen for key, seen in self._seen.items() if key in present}
        return states

    def _file(self, one: Look, name: str, nbytes: int, now: float) -> FileState:
        seen = self._seen.setdefault((one.name, name), [(now, nbytes)])
        if nbytes != seen[-1][1]:
            seen.append((now, nbytes))
        while len(seen) > 2 and now - seen[1][0] > _RATE_SPAN_S:
            del seen[0]
        since, before = seen[0]
        found = _RANK.fullmatch(untagged(name))  # in an object store names carry the save id
        rank = int(found[1]) if found is not None else None
        return FileState(
            name=name,
            rank=rank,
            nbytes=nbytes,
            rate=max(0.0, (nbytes - before) / (now - since)) if now > since else 0.0,
            still_s=now - seen[-1][0],
            is_signed=rank in one.signed,
        )
