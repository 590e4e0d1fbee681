"""``load``: a checkpoint into a state dict, whatever layout it was saved under.

::

    catalog -> manifest -> ReadPlan (saved boxes x wanted boxes) -> ranged reads + digest check -> into the tensors
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import call
from os import PathLike, fspath
from typing import Any

from milepost.collective.comm import Comm, default_comm, failure_on, raise_together
from milepost.collective.interrupt import interrupts_held
from milepost.collective.progress import ProgressLog, watched
from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS
from milepost.errors import MAX_LISTED, MilepostError, StateMismatchError, listed, near
from milepost.format.manifest import Manifest
from milepost.loading.reader import ReadStats, TensorReads, read_objects
from milepost.loading.target import Target
from milepost.loading.template import Template
from milepost.run import catalog
from milepost.storage import open_storage
from milepost.storage.base import Storage
from milepost.tensors.layout import dtype_name
from milepost.tensors.plan import plan_load
from milepost.tensors.state import FlatState, flatten
from milepost.tensors.tree import Read

log = logging.getLogger("milepost")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did, as this rank saw it."""

    path: str
    step: int | None
    kind: str
    num_tensors: int
    wanted_nbytes: int
    """Bytes that landed in this rank's tensors."""
    read_nbytes: int
    """Bytes that this rank read from the storage, whole digest blocks included."""
    seconds: float
    unexpected: tuple[str, ...]
    """Keys that the checkpoint holds and the state dict has no place for. They were left out."""
    missing: tuple[str, ...]
    """Keys that the state dict has and the checkpoint does not. Only with ``strict = False``: left as they were."""
    cast: tuple[str, ...]
    """Tensors whose stored dtype differs: ``key: float32 -> bfloat16``."""
    resumed_step: int | None = None
    """The step of the run's own folder that a ``CheckpointManager`` resumed from; None for any other load."""
    notes: tuple[str, ...] = ()
    """What a user should know: which newer steps were passed over, what was not restored."""


@interrupts_held()
def load(
    path: str | PathLike[str],
    into: MutableMapping[str, Any],
    *,
    strict: bool = True,
    comm: Comm | None = None,
) -> LoadReport:
    """Load the checkpoint at ``path`` into ``into``, in place. Collective over all ranks.

    ``into`` is a state dict like the one that was saved, or a part of it, under any layout: tensors are filled where
    they are (each rank reads only what it holds), other values are replaced, objects with ``load_state_dict()`` get
    theirs. Every byte that lands is checked against its digest. Nothing in the checkpoint is executed.

    Raises:
        StateMismatchError: keys or shapes do not fit; one report of all of them, before anything is read.
            ``strict = False`` lets missing keys pass.
        DigestMismatchError, FormatError: stored bytes are damaged. Some tensors may have been filled already.
        CheckpointNotFoundError: there is no checkpoint at ``path``.
        MilepostError: something else went wrong, in a ``load_state_dict()`` of the caller's for instance.
        All are raised on every rank when one rank meets them.
    """
    storage, folder = open_storage(fspath(path))
    comm = comm if comm is not None else default_comm()
    template: Template | None = None

    def make_target(manifest: Manifest, read: Read) -> Target:
        nonlocal template
        template = Template(into, manifest, read)
        return template.target

    def check() -> None:
        assert template is not None
        template.check()

    report = load_from(storage, folder, make_target, check=check, strict=strict, comm=comm)
    assert template is not None
    failure = None
    try:
        template.restore()
    except BaseException as cause:  # noqa: BLE001 - a load_state_dict() of the user's may raise anything
        failure = failure_on(comm.rank, cause, MilepostError)
    raise_together(comm, failure)
    return report


def load_from(
    storage: Storage,
    folder: str,
    make_target: Callable[[Manifest, Read], Target],
    *,
    check: Callable[[], None],
    strict: bool,
    comm: Comm,
    must_be_wanted: Callable[[str], bool] = lambda key: False,
    num_threads: int = NUM_IO_THREADS,
) -> LoadReport:
    """Read a checkpoint in a folder of an open storage into what ``make_target`` returns for its manifest.

    ``check`` is called when all but the target's live tensors is read, and may refuse it: nothing has been changed
    then. Stored keys for which ``must_be_wanted`` holds must have a place on some rank: else they are refused.
    """
    started = time.monotonic()
    path, failure = f"{storage.root}/{folder}", None
    unwanted: set[str] = set()
    try:
        with watched(f"rank {comm.rank} is reading the manifest of {path}"):
            manifest = catalog.read_manifest(storage, folder)
        target = make_target(manifest, partial(_read_value, storage, folder, manifest))
        flat = flatten(target.values)
        fit = compare(manifest, flat, left=target.left, mismatched=target.mismatched)
        unwanted = {key for key in fit.unexpected if must_be_wanted(key)}
        fit.check(path, strict=strict)
        for key in fit.missing:
            target.values.pop(key, None)  # nothing is read for it
    except BaseException as cause:  # noqa: BLE001 - whatever it was, the other ranks must hear of it
        failure = failure_on(comm.rank, cause, MilepostError)
    raise_together(comm, failure)
    _check_unwanted(comm, unwanted, path)
    wanted = [leaf.spec for key, leaf in flat.tensors.items() if key not in fit.missing]
    read = ReadStats()
    for live in (False, True):  # what can be refused is read first, then what is filled in place
        try:
            with watched(f"rank {comm.rank} is reading {path}"):
                if not live:
                    digests, items = catalog.read_digests(storage, folder, manifest), plan_load(manifest, wanted)
                    progress = ProgressLog(f"loading {path}", sum(item.shard.data_nbytes for item in items))
                    objects = [key for key in flat.objects if key not in fit.missing]
                    for key, value in read_objects(storage, folder, manifest, objects):
                        flat.slots[key].fill(value)
                part = [item for item in items if (item.leaf in target.live) is live]
                on_read = progress.add if comm.rank == 0 else None
                with TensorReads(storage, folder, part, flat.tensors, digests, on_read=on_read) as reads:
                    map_in_threads(call, reads.tasks, num_threads, name="milepost-read")
                read += reads.stats
                if live:
                    target.copy_held()
                else:
                    check()
        except BaseException as cause:  # noqa: BLE001 - as above
            failure = failure_on(comm.rank, cause, MilepostError)
        raise_together(comm, failure)
    return LoadReport(
        path=path,
        step=manifest.step,
        kind=manifest.kind,
        num_tensors=len(wanted),
        wanted_nbytes=read.wanted_nbytes,
        read_nbytes=read.read_nbytes,
        seconds=time.monotonic() - started,
        unexpected=fit.unexpected,
        missing=fit.missing,
        cast=fit.cast,
    )


def _check_unwanted(comm: Comm, unwanted: set[str], path: str) -> None:
    """Refuse stored keys that no rank has a place for: a model with fewer layers would lose the rest silently."""
    brought = comm.gather(unwanted)
    nowhere = sorted(set.intersection(*brought)) if brought is not None else []
    nowhere = comm.broadcast(nowhere)
    if nowhere:
        raise StateMismatchError(
            f"{path} does not fit what it is loaded into; nothing was changed:\n"
            + "\n".join(_listed("of the checkpoint have no place in this run", nowhere)),
            path=path,
            unexpected=nowhere,
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """How a checkpoint and a state dict go together. All keys are sorted."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    """One line each: ``key: shape [8, 4] in the checkpoint, [8, 5] here``."""
    cast: tuple[str, ...]

    def check(self, path: str, *, strict: bool) -> None:
        """Raise one StateMismatchError for all that keeps the checkpoint from being loaded."""
        missing = self.missing if strict else ()
        if not missing and not self.mismatched:
            return
        lines = [*_missing_lines(missing, self.unexpected), *_listed("do not fit", self.mismatched)]
        raise StateMismatchError(
            f"{path} does not fit what it is loaded into; nothing was changed:\n" + "\n".join(lines),
            path=path,
            missing=missing,
            unexpected=self.unexpected,
            mismatched=self.mismatched,
        )


def _read_value(storage: Storage, folder: str, manifest: Manifest, key: str) -> Any:
    """The value of one key that is not a tensor; None if there is none."""
    if key not in manifest.objects:
        return None
    return dict(read_objects(storage, folder, manifest, [key]))[key]


def compare(manifest: Manifest, flat: FlatState, *, left: Collection[str] = (), mismatched: Sequence[str] = ()) -> Fit:
    """Compare keys, shapes and dtypes of a checkpoint with those of a state dict; keys in ``left`` are not expected."""
    stored = manifest.tensors.keys() | manifest.objects.keys()
    wanted = flat.tensors.keys() | flat.objects.keys()
    unfit, cast = [*mismatched], []
    for key, leaf in flat.tensors.items():
        entry = manifest.tensors.get(key)
        if entry is None:
            if key in manifest.objects:
                unfit.append(f"{key}: not a tensor in the checkpoint, a tensor here")
            continue
        here = dtype_name(leaf.dtype)
        if entry.shape != leaf.shape:
            unfit.append(f"{key}: shape {list(entry.shape)} in the checkpoint, {list(leaf.shape)} here")
        elif entry.dtype != here and _numeric_kind(entry.dtype) != _numeric_kind(here):
            unfit.append(f"{key}: dtype {entry.dtype} in the checkpoint, {here} here")
        elif entry.dtype != here:
            cast.append(f"{key}: {entry.dtype} -> {here}")
    for key in flat.objects:
        if key in manifest.tensors:
            unfit.append(f"{key}: a tensor in the checkpoint, not a tensor here")
    return Fit(
        missing=tuple(sorted(wanted - stored)),
        unexpected=tuple(sorted(stored - wanted - set(left))),
        mismatched=tuple(sorted(unfit)),
        cast=tuple(sorted(cast)),
    )


def _numeric_kind(dtype: str) -> str:
    """Dtypes of one kind are cast on the way; between kinds meaning would be lost."""
    if dtype == "float4_e2m1fn_x2":  # two numbers to an element
        return dtype
    for kind in ("float", "complex", "int", "uint"):
        if dtype.removeprefix("b").startswith(kind):
            return kind
    return dtype


def _missing_lines(missing: Sequence[str], unexpected: Collection[str]) -> Iterator[str]:
    hints = {key: near(key, unexpected, cutoff=0.8) for key in missing[:MAX_LISTED]}
    lines = [key + (f" (did you mean '{hint}', which it has?)" if (hint := hints.get(key)) else "") for key in missing]
    yield from _listed("are not in the checkpoint", lines)


def _listed(what: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield f"  {len(lines)} {'key' if len(lines) == 1 else 'keys'} {what}:"
        yield from (f"    {line}" for line in listed(lines))
