"""``load``: load a checkpoint into a state dict, from any layout.

::

    catalog -> manifest -> ReadPlan (saved boxes x wanted boxes) -> ranged reads + digest check -> into the tensors
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import call
from os import PathLike, fspath
from typing import Any, cast, get_args, overload

import numpy as np

from milepost.collective.collector import collection_paused
from milepost.collective.comm import Comm, default_comm, failure_on, on_rank_0, raise_together
from milepost.collective.interrupt import interrupts_held
from milepost.collective.meeting import meeting
from milepost.collective.progress import ProgressLog, watched
from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS, ReadMode
from milepost.errors import ConfigError, MilepostError, StateMismatchError, listed
from milepost.format.digest import parse_digests
from milepost.format.manifest import Manifest
from milepost.loading.fit import compare, unexpected_error
from milepost.loading.handing import Handing
from milepost.loading.mapped import MappedFiles
from milepost.loading.measured import hands_on
from milepost.loading.names import Translation, renamed, renames
from milepost.loading.policy import LetPass, Policy
from milepost.loading.reader import ReadStats
from milepost.loading.sources import Near, Sources, read_own_part
from milepost.loading.target import Target
from milepost.loading.template import Template, Whole
from milepost.loading.unwanted import unwanted_everywhere
from milepost.loading.values import read_common, read_objects
from milepost.run import checkpoint_record
from milepost.run.node_part import NodePart
from milepost.storage import join_path, open_storage
from milepost.storage.base import Storage
from milepost.tensors.state import flatten, ordinary_tensors
from milepost.tensors.tree import Read

log = logging.getLogger("milepost")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The result of a load on this rank."""

    path: str
    step: int | None
    kind: str
    num_tensors: int
    wanted_nbytes: int
    """Bytes loaded into this rank's tensors."""
    read_nbytes: int
    """Bytes read from the storage by this rank, in complete digest blocks."""
    seconds: float
    unexpected: tuple[str, ...]
    """Keys of the checkpoint that this rank does not have; they were left out."""
    missing: tuple[str, ...]
    """Keys that the checkpoint lacks and that were allowed: left unchanged."""
    cast: tuple[str, ...]
    """Tensors whose stored dtype differs: ``key: float32 -> bfloat16``."""
    let_pass: tuple[LetPass, ...] = ()
    """The keys allowed by each pattern of ``allow_missing`` and ``allow_unexpected``."""
    resumed_step: int | None = None
    """The step of the run's own folder that a ``CheckpointManager`` resumed from; None for any other load."""
    notes: tuple[str, ...] = ()
    """Notes for the user, such as newer steps that were skipped and values not restored."""


@overload
def load(
    path: str | PathLike[str], *, mmap: bool = False, comm: Comm | None = None, read: ReadMode = "auto"
) -> dict[str, Any]: ...


@overload
def load(
    path: str | PathLike[str],
    into: MutableMapping[str, Any],
    *,
    strict: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    comm: Comm | None = None,
    read: ReadMode = "auto",
) -> LoadReport: ...


@interrupts_held()
@ordinary_tensors()
def load(
    path: str | PathLike[str],
    into: MutableMapping[str, Any] | None = None,
    *,
    strict: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    mmap: bool = False,
    comm: Comm | None = None,
    read: ReadMode = "auto",
) -> LoadReport | dict[str, Any]:
    """Load the checkpoint at ``path`` into ``into``, in place; without it, return all of it. Collective over all ranks.

    ``into`` is a state dict like the one that was saved, on any degrees of parallelism: tensors are filled in place
    (each rank reads only its shards), other values are replaced, objects with ``load_state_dict()`` get their state,
    None and empty containers are replaced by the saved values. Without ``into`` the full state dict is returned on
    every rank, with the saved containers and values, and tensors on the CPU. Every byte loaded is checked against its
    digest. No code from the checkpoint is run.

    Args:
        strict: require all keys on both sides. ``False`` allows any to be missing or left out; the report lists them.
        allow_missing: globs of keys that the checkpoint may lack: they stay unchanged. ``"head"`` and ``"head.*"``
            both match all below ``head``.
        allow_unexpected: globs of keys of the checkpoint that ``into`` may lack (on all ranks): they are left out.
        mmap: without ``into``: tensors are views of the files, loaded into memory on access; changes to them are not
            written. The step, which must be in a local folder, is verified first. Tensors stored in several pieces are
            read as usual.
        read: which rank reads data that several ranks need: each for itself (``"own"``), or one of them, which
            distributes it (``"shared"``); ``"auto"`` measures which is faster, see ``checkpoint.read``.

    Raises:
        StateMismatchError: keys or shapes do not fit, or no key of ``into`` is in the checkpoint. One report of all
            faults, before anything is changed.
        ConfigError: ``into`` is not a state dict, ``path`` not a path, ``read`` unknown, or ``mmap`` is given with
            ``into`` or for a checkpoint that is not in a local folder.
        DigestMismatchError, FormatError: stored bytes are damaged. Some tensors may have been filled already.
        CheckpointNotFoundError: there is no checkpoint at ``path``.
        PartlyLoadedError: a ``load_state_dict()`` of the caller's raised; the error lists what is loaded by then.
        MilepostError: another failure.

        All are raised on every rank if they occur on one.
    """
    _check_arguments(path, into, read)
    if mmap and into is not None:
        raise ConfigError(
            "milepost.load: mmap=True returns the whole state dict, and can't be combined with a state dict to fill"
        )
    storage, folder = open_storage(fspath(path))
    comm = comm if comm is not None else default_comm()
    policy = Policy.of(strict, allow_missing, allow_unexpected)
    template: Template | Whole | None = None

    def make_target(manifest: Manifest, read: Read) -> Target:
        nonlocal template
        mapped = MappedFiles(storage, folder) if mmap else None
        template = Whole(manifest, read, mapped) if into is None else Template(into, manifest, read)
        return template.target

    def check() -> None:
        assert template is not None
        template.check()

    report = load_from(storage, folder, make_target, check=check, policy=policy, comm=comm, read=read)
    assert template is not None
    failure = None
    try:
        template.restore()
    except BaseException as cause:  # noqa: BLE001 - a load_state_dict() of the user's may raise anything
        failure = failure_on(comm.rank, cause, MilepostError)
    raise_together(comm, failure)
    return template.state_dict if isinstance(template, Whole) else report


def _check_arguments(path: object, into: object, read: object) -> None:
    """Explain common mistakes in the arguments, which are the same on every rank."""
    if read not in get_args(ReadMode):
        raise ConfigError(f"milepost.load: expected read to be one of {', '.join(get_args(ReadMode))}, found {read!r}")
    if not isinstance(path, str | PathLike):
        swapped = "; the path comes first: load(path, into)" if isinstance(into, str | PathLike) else ""
        raise ConfigError(f"milepost.load: expected the path of a checkpoint, found a {type(path).__name__}{swapped}")
    if into is None or isinstance(into, MutableMapping):
        return
    kind = type(into).__name__
    instead = f"a dict, and load(path) returns the whole state dict: expected a dict to fill, found a {kind}"
    if hasattr(into, "load_state_dict"):
        instead = (
            f'the state dict that was saved with the object in it, such as {{"model": model}}: found the {kind} itself'
        )
    raise ConfigError(f"milepost.load(path, into): `into` is {instead}")


def _check_folder(storage: Storage, folder: str) -> None:
    found = storage.stat(folder) if folder else None
    if found is not None and not found.is_folder:
        raise ConfigError(
            f"{join_path(storage.root, folder)} is a file, and a checkpoint is a folder. A file of weights "
            "(.safetensors, .pt) can be a run's initial_load_path, or be made a checkpoint by `milepost convert`"
        )


@collection_paused()
def load_from(
    storage: Storage,
    folder: str,
    make_target: Callable[[Manifest, Read], Target],
    *,
    check: Callable[[], None],
    policy: Policy,
    comm: Comm,
    must_be_wanted: Callable[[str], bool] = lambda key: True,
    num_threads: int = NUM_IO_THREADS,
    wanted_keys: Collection[str] = (),
    translate: Callable[[Manifest], Translation | None] = lambda manifest: None,
    part: NodePart | None = None,
    near: Near | None = None,
    read: ReadMode = "auto",
) -> LoadReport:
    """Read a checkpoint in a folder of an open storage into the target that ``make_target`` returns for its manifest.

    ``check`` is called after everything but the target's live tensors is read, and may refuse the load while nothing is
    changed yet. ``wanted_keys`` are a model's own names of its keys, if the stored ones may have wrappers' prefixes.
    ``translate`` translates another program's names; it returns None if there is nothing to translate. Stored keys for
    which ``must_be_wanted`` is true must exist on some rank, or be allowed by the policy. With ``part`` the folder
    holds, on each node, that node's part of the step. ``near`` is a local part of the same save, from which this rank
    reads as much as possible. ``read``: see ``CheckpointConfig``.
    """
    started = time.monotonic()
    path, failure = f"{storage.root}/{folder}", None
    looked = _Looked()
    with meeting(comm, f"loading {path}"):
        brought = comm.gather((path, part is not None, near is not None))
    with watched(f"rank {comm.rank} is reading the manifest of {path}"):
        shared = on_rank_0(comm, partial(_read_for_all, storage, folder, brought, read))
    try:
        with watched(f"rank {comm.rank} is reading the manifest of {path}"):
            if shared is not None:
                recorded, common = shared.manifest, shared.common
            else:
                recorded = (
                    checkpoint_record.read_manifest(storage, folder) if part is None else read_own_part(storage, folder)
                )
                common = {}
        foreign = translate(recorded)
        stored_keys = {*recorded.tensors, *recorded.objects}
        translation = foreign if foreign is not None else renamed(recorded, renames(stored_keys, wanted_keys))
        manifest = translation.manifest
        target = make_target(manifest, partial(_read_value, storage, folder, manifest, common))
        target.finish()
        flat = flatten(target.values)
        beside = target.settle_packed()
        fit = compare(manifest, flat, left=target.left, mismatched=target.mismatched)
        must = [key for key in (*fit.unexpected, *beside) if must_be_wanted(key)]
        looked = _Looked(
            unwanted=policy.refused_unexpected(must),
            fits_something=fit.num_common > 0,
            let_pass=policy.let_pass(fit.missing, must),
        )
        fit.check(path, policy)
        for key in fit.missing:
            target.values.pop(key, None)  # not read
    except BaseException as cause:  # noqa: BLE001 - any error must reach the other ranks
        failure = failure_on(comm.rank, cause, MilepostError)
    raise_together(comm, failure)
    known = stored_keys if shared is not None else ()
    _check_looked(comm, looked, path, policy, {*manifest.tensors, *manifest.objects}, part, known=known)
    wanted = [leaf.spec for key, leaf in flat.tensors.items() if key not in fit.missing]
    objects = [key for key in flat.objects if key not in fit.missing]
    read_digests = partial(checkpoint_record.read_digests_file, storage, folder, recorded)
    handed = None
    if shared is not None:  # sent from where it is, like the record's columns: it can be hundreds of megabytes
        handed = on_rank_0(comm, lambda: None if (data := read_digests()) is None else np.frombuffer(data, np.uint8))
    try:
        with watched(f"rank {comm.rank} is reading the values of {path}"):
            stored = handed if shared is not None else read_digests()
            digests = None if stored is None else parse_digests(memoryview(cast(Any, stored)), recorded, path)
            sources = Sources(
                *(storage, folder, recorded, translation, near, flat, wanted), digests=digests, common=common
            )
            progress = ProgressLog(f"loading {path}", sources.nbytes)
            sources.read_objects(objects)
    except BaseException as cause:  # noqa: BLE001 - as above
        failure = failure_on(comm.rank, cause, MilepostError)
    raise_together(comm, failure)
    on_read = progress.add if comm.rank == 0 else None
    # External checkpoints have no digests, so ranks do not share what they read of them.
    handed_on, stats = False, ReadStats()
    if shared is not None and shared.may_hand_on and digests is not None:
        handed_on = shared.read == "shared"
        if shared.read == "auto":
            with watched(f"rank {comm.rank} is measuring how to read {path}"):
                everything = sources.due(lambda leaf: True)
                handed_on, nbytes = hands_on(comm, storage, folder, recorded, digests, everything)
            stats += ReadStats(0, nbytes)
    for live in (False, True):  # values that may be refused are read before the tensors that are filled in place
        target.is_filling = live

        def is_due(leaf: str, live: bool = live) -> bool:
            return (leaf in target.live) is live

        handing = Handing.agreed(comm, recorded, digests, sources.due(is_due)) if handed_on and digests else None
        with watched(f"rank {comm.rank} is reading {path}"), ExitStack() as closing:
            try:
                for reads in sources.reads(is_due, on_read, handing.blocks if handing is not None else None):
                    if handing is not None:  # the run continues with them
                        closing.enter_context(reads)
                    with reads if handing is None else nullcontext(), sources.guard(reads):
                        map_in_threads(call, reads.tasks, num_threads, name="milepost-read")
                    stats += reads.stats
            except BaseException as cause:  # noqa: BLE001 - as above
                failure = failure_on(comm.rank, cause, MilepostError)
            if handing is not None:
                raise_together(comm, failure)
                before = reads.stats.read_nbytes
                handing.run(reads.read_block, reads.take_block, num_threads)
                stats += ReadStats(0, reads.stats.read_nbytes - before)
            try:
                if failure is None:
                    _settle(target, check, live=live)
            except BaseException as cause:  # noqa: BLE001 - as above
                failure = failure_on(comm.rank, cause, MilepostError)
            raise_together(comm, failure)
    return LoadReport(
        path=path,
        step=manifest.step,
        kind=manifest.kind,
        num_tensors=len(wanted),
        wanted_nbytes=stats.wanted_nbytes,
        read_nbytes=stats.read_nbytes,
        seconds=time.monotonic() - started,
        unexpected=fit.unexpected,
        missing=fit.missing,
        cast=tuple(sorted((*fit.cast, *target.cast))),
        let_pass=looked.let_pass,
        notes=(*translation.notes, *target.notes),
    )


@dataclass(frozen=True, slots=True)
class _Looked:
    """The comparison of a checkpoint with a rank's state."""

    unwanted: frozenset[str] | set[str] = frozenset()
    """Stored keys that the rank does not have and that must not be left out."""
    fits_something: bool = False
    """True if the rank has any stored key, or the checkpoint has no keys."""
    let_pass: tuple[LetPass, ...] = ()


def _check_looked(
    comm: Comm,
    looked: _Looked,
    path: str,
    policy: Policy,
    stored: Collection[str],
    part: NodePart | None,
    *,
    known: Collection[str],
) -> None:
    """Refuse stored keys that no rank has: a model with fewer layers would otherwise lose the rest silently.

    For a node's part of a step: keys that no rank of this node has.
    """
    node = part.node if part is not None else 0
    nowhere, fits_something = unwanted_everywhere(
        comm, looked.unwanted, stored=stored, known=known, fits_something=looked.fits_something, node=node
    )
    if not fits_something:
        raise StateMismatchError(
            f"nothing was loaded: what {path} is loaded into is empty, or has none of its {len(stored)} keys "
            f"({', '.join(listed(sorted(stored), 3))}). milepost.load(path) without a state dict to load into "
            "returns all of it",
            path=path,
            unexpected=nowhere,
        )
    if nowhere:
        raise unexpected_error(path, nowhere, policy, set(stored) - set(nowhere))


@dataclass(frozen=True, slots=True)
class _ReadForAll:
    """The metadata of a checkpoint, read by rank 0 for all ranks."""

    manifest: Manifest
    common: Mapping[str, bytes]
    """Records of values that all ranks need; see ``values.read_common``."""
    may_hand_on: bool
    """True if there are several ranks, and each reads the checkpoint itself, not a nearby part."""
    read: ReadMode
    """The read mode of rank 0."""


def _read_for_all(
    storage: Storage, folder: str, brought: Sequence[tuple[str, bool, bool]] | None, read: ReadMode
) -> _ReadForAll | None:
    """On rank 0: read the commit record and the values that all ranks need. None if each has to read its own.

    ``brought`` has for each rank the path, whether it is a node's part of a step, and whether a local part exists.
    """
    assert brought is not None, "rank 0 has gathered it"
    if len({path for path, *_ in brought}) > 1 or any(is_part for _, is_part, _ in brought):
        return None
    _check_folder(storage, folder)
    manifest = checkpoint_record.read_manifest(storage, folder)
    common = read_common(storage, folder, manifest) if len(brought) > 1 else {}
    may_hand_on = len(brought) > 1 and not any(has_near for *_, has_near in brought)
    return _ReadForAll(manifest, common, may_hand_on, read)


def _settle(target: Target, check: Callable[[], None], *, live: bool) -> None:
    """Finish the reads of live tensors, or of all others."""
    if live:
        target.copy_held()
    else:
        target.check()
        check()


def _read_value(storage: Storage, folder: str, manifest: Manifest, common: Mapping[str, bytes], key: str) -> Any:
    """Read the value of a key that is not a tensor; None if there is none."""
    if key not in manifest.objects:
        return None
    return dict(read_objects(storage, folder, manifest, [key], common))[key]
