"""Gather everything that the report shows of a run or a step: read here once as values, drawn by ``page``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from milepost.errors import CheckpointNotFoundError, MilepostError
from milepost.format.manifest import Manifest
from milepost.interop.weights.open import open_step
from milepost.report.history import Forecast, Moment, Save, forecast, read_log
from milepost.report.profile import Samples, TensorProfile, profile_tensors, sample_numel
from milepost.report.statistics import nbytes_of
from milepost.run import catalog, checkpoint_record, step_names
from milepost.run.catalog import StepEntry
from milepost.run.step_names import step_of
from milepost.storage import open_storage
from milepost.storage.base import Storage, join, split
from milepost.verification.extent_reader import Progress
from milepost.verification.verify import verify_beside_tensors

MAX_STEPS = 12
"""Default maximum number of steps whose weights are read: the first, the newest, and others evenly between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """A step: its line in the catalog, and its weights if they were read."""

    entry: StepEntry
    manifest: Manifest | None = None
    profiles: Mapping[str, TensorProfile] = field(default_factory=dict)
    since: int | None = None
    """The step that the profiles' changes are relative to."""
    check: str = "not read"
    """``verified``, ``not read``, ``read, no digests to compare with``, or the problem."""

    @property
    def is_bad(self) -> bool:
        """True if something is wrong with the step, or it could not be read."""
        return self.check != "verified" and not self.check.startswith(("not read", "read,"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """The content of the page: a run, or one step of it."""

    path: str
    """The path as given by the user."""
    run_path: str
    """The path of the folder that holds the steps."""
    made_s: float
    steps: Sequence[StepView]
    saves: Sequence[Save]
    moments: Sequence[Moment]
    """Events of the run's checkpoints, oldest first."""
    forecast: Forecast

    @property
    def read(self) -> list[StepView]:
        """The steps whose weights were read, oldest first."""
        return [view for view in self.steps if view.profiles]


def gather(path: str, *, max_steps: int = MAX_STEPS, weights: bool = True, progress: Progress | None = None) -> RunView:
    """Read the run (or the one step) at ``path``, with the weights of at most ``max_steps`` steps.

    A step that can't be read is listed with the reason; the others are still read.

    Raises:
        CheckpointNotFoundError: there are no steps.
        StorageError: the storage can't be read.
    """
    storage, name = open_storage(path)
    folder, only = _run_of(storage, name, path)
    entries = [entry for entry in catalog.scan(storage, folder) if only is None or entry.step == only]
    if not entries:
        raise CheckpointNotFoundError(f"{path} holds no checkpoint", path=path)
    log = read_log(storage, folder)
    chosen = _chosen([entry.step for entry in entries if entry.is_usable], max_steps) if weights else set()
    views = list(_views(storage, entries, chosen, progress))
    return RunView(
        path=path,
        run_path=path if only is not None else join(path.rstrip("/") or "/", folder[len(name) :].strip("/")),
        made_s=time.time(),
        steps=views,
        saves=[save for save in log.saves if only is None or save.step == only],
        moments=[moment for moment in log.moments if only is None or moment.step == only],
        forecast=forecast(entries),
    )


def _run_of(storage: Storage, name: str, path: str) -> tuple[str, int | None]:
    """Return the run's folder and, if ``path`` is one of its steps, that step."""
    found = storage.stat(name)
    if found is not None and not found.is_folder:
        raise CheckpointNotFoundError(f"{path} is a file, neither a run nor a step of one", path=path)
    folder = step_names.find_run(storage, name)
    if folder is not None:
        return folder, None
    step = step_of(name)
    if step is None:
        raise CheckpointNotFoundError(f"{path} is neither a run nor a step of one (step-<N>)", path=path)
    return split(name)[0], step


def _chosen(steps: Sequence[int], limit: int) -> set[int]:
    """Choose at most ``limit`` steps: the first, the newest, and others evenly between."""
    if len(steps) <= limit:
        return set(steps)
    if limit <= 1:
        return set(steps[-1:]) if limit else set()
    return {steps[round(i * (len(steps) - 1) / (limit - 1))] for i in range(limit)}


def _views(
    storage: Storage, entries: Sequence[StepEntry], chosen: set[int], progress: Progress | None
) -> Iterator[StepView]:
    manifests = {entry.step: _manifest_of(storage, entry) for entry in entries}
    most = max((len(m.tensors) for m in manifests.values() if isinstance(m, Manifest)), default=0)
    total = sum(entry.nbytes for entry in entries if entry.step in chosen)
    counter = _Counter(total, progress)
    before: Samples = {}
    since: int | None = None
    for entry in entries:
        manifest = manifests[entry.step]
        if isinstance(manifest, str):
            yield StepView(entry=entry, check=manifest)
            continue
        if entry.step not in chosen:
            yield StepView(entry=entry, manifest=manifest)
            continue
        profiles, samples, check = _read(storage, entry, manifest, before, sample_numel(most), counter.add)
        yield StepView(entry=entry, manifest=manifest, profiles=profiles, since=since, check=check)
        if profiles:
            before, since = {**before, **samples}, entry.step


class _Counter:
    def __init__(self, total: int, progress: Progress | None):
        self._total, self._done, self._progress = total, 0, progress

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _manifest_of(storage: Storage, entry: StepEntry) -> Manifest | str:
    if not entry.is_usable:
        return entry.reason or entry.state
    try:
        return checkpoint_record.read_manifest(storage, entry.path)
    except MilepostError as error:
        return error.message


def _read(
    storage: Storage,
    entry: StepEntry,
    manifest: Manifest,
    before: Samples,
    max_numel: int,
    add: Callable[[int], None],
) -> tuple[Mapping[str, TensorProfile], Samples, str]:
    """Read a step: returns its tensors' profiles, the samples for the next step, and the result of the digest check."""
    try:
        with open_step(storage, entry.path, manifest) as source:
            profiles, samples = profile_tensors(source, before, max_numel=max_numel, progress=add)
            checked = source.check_digests()
            whole = sum(nbytes_of(source, key) for key in profiles)
    except MilepostError as error:
        return {}, {}, error.message
    if checked >= whole and len(profiles) == len(manifest.tensors):
        return profiles, samples, _what_else(storage, entry) or "verified"
    return profiles, samples, "read, no digests to compare with" if not checked else "read, digests of a part"


def _what_else(storage: Storage, entry: StepEntry) -> str:
    """Check the rest of a step whose tensors are verified; returns its problems, empty if there are none."""
    if entry.state == "external":
        return ""
    try:
        problems = verify_beside_tensors(storage, entry.path)
    except MilepostError as error:
        return error.message
    return str(problems[0]) if problems else ""


def step_path(view: RunView, step: StepView) -> str:
    """Return the path of a step, for a command line."""
    if step_of(split(view.run_path.rstrip("/"))[1]) is not None:
        return view.run_path
    return join(view.run_path.rstrip("/"), step.entry.name)
