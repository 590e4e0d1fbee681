"""The stages of a load: commit record, comparison with the target, reads into it.

::

    record (rank 0, for all) -> compare with the target -> ReadPlan (saved boxes x wanted boxes)
        -> ranged reads + digest check -> into the tensors
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import call
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from milepost.collective.collector import collection_paused
from milepost.collective.comm import Comm, errors_shared, on_every_rank, on_rank_0
from milepost.collective.meeting import meeting
from milepost.collective.progress import ProgressLog, watched
from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS, ReadMode
from milepost.errors import ConfigError, StateMismatchError, listed
from milepost.format.digest import BlockDigests, parse_digests
from milepost.format.manifest import Manifest
from milepost.loading.fit import Fit, compare
from milepost.loading.handing import Handing
from milepost.loading.measured import hands_on
from milepost.loading.names import Translation, renamed, renames
from milepost.loading.policy import LetPass, Policy
from milepost.loading.reader import ReadStats
from milepost.loading.sources import Near, Sources, read_own_part
from milepost.loading.target import Target
from milepost.loading.unwanted import unwanted_everywhere
from milepost.loading.values import read_common, read_objects
from milepost.run import checkpoint_record
from milepost.run.node_part import NodePart
from milepost.storage import join_path
from milepost.storage.base import Storage
from milepost.tensors.devices import devices_of, wait_for_devices
from milepost.tensors.plan import TensorSpec
from milepost.tensors.state import FlatState, flatten
from milepost.tensors.tree import Read


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


def _check_folder(storage: Storage, folder: str) -> None:
    found = storage.stat(folder) if folder else None
    if found is not None and not found.is_folder:
        raise ConfigError(
            f"{join_path(storage.root, folder)} is a file, and a checkpoint is a folder. A file of weights "
            "(.safetensors, .pt) can be a run's initial_load_path, or be made a checkpoint by `milepost convert`"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """A checkpoint to read, and its target."""

    storage: Storage
    folder: str
    make_target: Callable[[Manifest, Read], Target]
    """Returns the target for a manifest."""
    check: Callable[[], None]
    """Called after everything but the target's live tensors is read; may refuse the load while nothing is changed."""
    policy: Policy
    must_be_wanted: Callable[[str], bool] = lambda key: True
    """True for a stored key that must exist on some rank, unless the policy lets it pass."""
    num_threads: int = NUM_IO_THREADS
    wanted_keys: Collection[str] = ()
    """A model's own names of its keys, if the stored ones may have wrappers' prefixes."""
    translate: Callable[[Manifest], Translation | None] = lambda manifest: None
    """Translates another program's names; returns None if there is nothing to translate."""
    part: NodePart | None = None
    """If given, the folder holds, on each node, that node's part of the step."""
    near: Near | None = None
    """A local part of the same save, from which this rank reads as much as possible."""
    read: ReadMode = "auto"
    """Which rank reads data that several need; see ``CheckpointConfig``."""

    @property
    def path(self) -> str:
        return f"{self.storage.root}/{self.folder}"

    def read_value(self, manifest: Manifest, common: Mapping[str, bytes], key: str) -> Any:
        """Read the value of a key that is not a tensor; None if there is none."""
        if key not in manifest.objects:
            return None
        return dict(read_objects(self.storage, self.folder, manifest, [key], common))[key]

    def read_digests(self, recorded: Manifest) -> bytes | None:
        return checkpoint_record.read_digests_file(self.storage, self.folder, recorded)


@collection_paused()
def load_from(request: LoadRequest, comm: Comm) -> LoadReport:
    """Read a checkpoint in a folder of an open storage into the request's target. Collective.

    Each stage ends with an exchange of its outcome: an error of one rank is raised on all. All that reads is called
    from here, which keeps the way to the storage short.
    """
    started = time.monotonic()
    shared = _read_record(request, comm)
    with errors_shared(comm):
        fitted = _fit(request, shared, comm.rank)
    _check_looked(comm, fitted, request, known=fitted.stored_keys if shared is not None else ())
    handed = None
    if shared is not None:  # sent from where it is, like the record's columns: it can be hundreds of megabytes
        handed = on_rank_0(comm, partial(_digests_to_send, request, fitted))
    with errors_shared(comm), watched(f"rank {comm.rank} is reading the values of {request.path}"):
        opened = _open_sources(request, fitted, handed, is_shared=shared is not None)
        opened.sources.read_objects(fitted.wanted_objects)
    hands_on_blocks, stats = _choose_reader(request, fitted, opened, shared, comm)
    target, sources, digests = fitted.target, opened.sources, opened.digests
    devices = devices_of(leaf.local for leaf in fitted.flat.tensors.values())
    on_read = opened.progress.add if comm.rank == 0 else None
    for live in (False, True):  # values that may be refused are read before the tensors that are filled in place
        target.is_filling = live

        def is_due(leaf: str, live: bool = live) -> bool:
            return (leaf in target.live) is live

        handing = None
        if hands_on_blocks and digests is not None:
            handing = Handing.agreed(comm, fitted.recorded, digests, sources.due(is_due))
        with watched(f"rank {comm.rank} is reading {request.path}"), ExitStack() as closing:
            with errors_shared(comm):
                wait_for_devices(devices)  # kernels that are queued must not overwrite what is read
                blocks = handing.blocks if handing is not None else None
                for reads in sources.reads(is_due, on_read, blocks, is_new=not live):
                    if handing is not None:  # the exchange continues with them
                        closing.enter_context(reads)
                    with reads if handing is None else nullcontext(), sources.guard(reads):
                        map_in_threads(call, reads.tasks, request.num_threads, name="milepost-read")
                    stats += reads.stats
                if handing is None:
                    _settle(target, request.check, devices, live=live)
            if handing is not None:
                before = reads.stats.read_nbytes
                handing.run(reads.read_block, reads.take_block, request.num_threads)
                stats += ReadStats(0, reads.stats.read_nbytes - before)
                on_every_rank(comm, partial(_settle, target, request.check, devices, live=live))
    return LoadReport(
        path=request.path,
        step=fitted.manifest.step,
        kind=fitted.manifest.kind,
        num_tensors=len(fitted.wanted),
        wanted_nbytes=stats.wanted_nbytes,
        read_nbytes=stats.read_nbytes,
        seconds=time.monotonic() - started,
        unexpected=fitted.fit.unexpected,
        missing=fitted.fit.missing,
        cast=tuple(sorted((*fitted.fit.cast, *fitted.target.cast))),
        let_pass=fitted.let_pass,
        notes=(*fitted.translation.notes, *fitted.target.notes),
    )


# ---- the commit record ----


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


def _read_record(request: LoadRequest, comm: Comm) -> _ReadForAll | None:
    """Read the commit record on rank 0 and give it to all ranks; None if each has to read its own. Collective."""
    with meeting(comm, f"loading {request.path}"):
        brought = comm.gather((request.path, request.part is not None, request.near is not None))
    with watched(f"rank {comm.rank} is reading the manifest of {request.path}"):
        return on_rank_0(comm, partial(_read_for_all, request, brought))


def _read_for_all(request: LoadRequest, brought: Sequence[tuple[str, bool, bool]] | None) -> _ReadForAll | None:
    """On rank 0: read the commit record and the values that all ranks need. None if each has to read its own.

    ``brought`` has for each rank the path, whether it is a node's part of a step, and whether a local part exists.
    """
    assert brought is not None, "rank 0 has gathered it"
    if len({path for path, *_ in brought}) > 1 or any(is_part for _, is_part, _ in brought):
        return None
    storage, folder = request.storage, request.folder
    _check_folder(storage, folder)
    manifest = checkpoint_record.read_manifest(storage, folder)
    common = read_common(storage, folder, manifest) if len(brought) > 1 else {}
    may_hand_on = len(brought) > 1 and not any(has_near for *_, has_near in brought)
    return _ReadForAll(manifest, common, may_hand_on, request.read)


# ---- comparison with the target ----


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    """A checkpoint, this rank's target for it, and their comparison."""

    recorded: Manifest
    """As stored."""
    common: Mapping[str, bytes]
    translation: Translation
    target: Target
    flat: FlatState
    fit: Fit
    unwanted: Collection[str]
    """Stored keys that this rank does not have and that must not be left out."""
    let_pass: tuple[LetPass, ...]

    @property
    def manifest(self) -> Manifest:
        """Under the target's names."""
        return self.translation.manifest

    @property
    def stored_keys(self) -> set[str]:
        return {*self.recorded.tensors, *self.recorded.objects}

    @property
    def wanted(self) -> list[TensorSpec]:
        return [leaf.spec for key, leaf in self.flat.tensors.items() if key not in self.fit.missing]

    @property
    def wanted_objects(self) -> list[str]:
        return [key for key in self.flat.objects if key not in self.fit.missing]


def _fit(request: LoadRequest, shared: _ReadForAll | None, rank: int) -> _Fitted:
    """Make this rank's target, and compare the checkpoint with it.

    Raises:
        StateMismatchError: an object here refuses the checkpoint.
        MilepostError: the commit record can't be read.
    """
    storage, folder = request.storage, request.folder
    with watched(f"rank {rank} is reading the manifest of {request.path}"):
        if shared is not None:
            recorded, common = shared.manifest, shared.common
        elif request.part is None:
            recorded, common = checkpoint_record.read_manifest(storage, folder), {}
        else:
            recorded, common = read_own_part(storage, folder), {}
    translation = request.translate(recorded)
    if translation is None:
        stored_keys = {*recorded.tensors, *recorded.objects}
        translation = renamed(recorded, renames(stored_keys, request.wanted_keys))
    manifest = translation.manifest
    target = request.make_target(manifest, partial(request.read_value, manifest, common))
    target.finish()
    flat = flatten(target.values)
    beside = target.settle_packed()
    fit = compare(manifest, flat, left=target.left, mismatched=target.mismatched)
    must = [key for key in (*fit.unexpected, *beside) if request.must_be_wanted(key)]
    unwanted, let_pass = request.policy.refused_unexpected(must), request.policy.let_pass(fit.missing, must)
    for key in fit.missing:
        target.values.pop(key, None)  # not read
    return _Fitted(
        recorded=recorded,
        common=common,
        translation=translation,
        target=target,
        flat=flat,
        fit=fit,
        unwanted=unwanted,
        let_pass=let_pass,
    )


def _check_looked(comm: Comm, fitted: _Fitted, request: LoadRequest, *, known: Collection[str]) -> None:
    """Refuse what does not fit, and stored keys that no rank has, all at once. Collective.

    A model with fewer layers would otherwise lose the rest silently. For a node's part of a step: keys that no rank of
    this node has.
    """
    stored = {*fitted.manifest.tensors, *fitted.manifest.objects}
    node = request.part.node if request.part is not None else 0
    nowhere, fits_something = unwanted_everywhere(
        comm, fitted.unwanted, stored=stored, known=known, fits_something=fitted.fit.num_common > 0, node=node
    )
    with errors_shared(comm):
        if fits_something or fitted.fit.is_unfit(request.policy):
            fitted.fit.check(request.path, request.policy, nowhere, stored)
    if not fits_something:
        raise StateMismatchError(
            f"nothing was loaded: what {request.path} is loaded into is empty, or has none of its {len(stored)} keys "
            f"({', '.join(listed(sorted(stored), 3))}). milepost.load(path) without a state dict to load into "
            "returns all of it",
            path=request.path,
            unexpected=nowhere,
        )


# ---- reading ----


@dataclass(frozen=True, slots=True)
class _Opened:
    """The sources of this rank, and the digests of their blocks; None for an external checkpoint, which has none."""

    sources: Sources
    digests: BlockDigests | None
    progress: ProgressLog


def _digests_to_send(request: LoadRequest, fitted: _Fitted) -> npt.NDArray[np.uint8] | None:
    data = request.read_digests(fitted.recorded)
    return None if data is None else np.frombuffer(data, np.uint8)


def _open_sources(
    request: LoadRequest, fitted: _Fitted, handed: npt.NDArray[np.uint8] | None, *, is_shared: bool
) -> _Opened:
    """Plan this rank's reads. ``handed``: the digests read by rank 0."""
    stored = handed if is_shared else request.read_digests(fitted.recorded)
    data = None if stored is None else memoryview(cast(Any, stored))
    digests = None if data is None else parse_digests(data, fitted.recorded, request.path)
    sources = Sources(
        *(request.storage, request.folder, fitted.recorded, fitted.translation),
        *(request.near, fitted.flat, fitted.wanted),
        digests=digests,
        common=fitted.common,
    )
    return _Opened(sources, digests, ProgressLog(f"loading {request.path}", sources.nbytes))


def _choose_reader(
    request: LoadRequest, fitted: _Fitted, opened: _Opened, shared: _ReadForAll | None, comm: Comm
) -> tuple[bool, ReadStats]:
    """Decide whether one rank reads what several need and hands it on. Also returns what was read to measure that.

    External checkpoints have no digests, so ranks do not share what they read of them. Collective.
    """
    if shared is None or not shared.may_hand_on or opened.digests is None or shared.read == "own":
        return False, ReadStats()
    if shared.read == "shared":
        return True, ReadStats()
    with watched(f"rank {comm.rank} is measuring how to read {request.path}"):
        everything = opened.sources.due(lambda leaf: True)
        hands_on_blocks, nbytes = hands_on(
            comm, request.storage, request.folder, fitted.recorded, opened.digests, everything
        )
    return hands_on_blocks, ReadStats(0, nbytes)


def _settle(target: Target, check: Callable[[], None], devices: Collection[torch.device], *, live: bool) -> None:
    """Finish the reads of live tensors, or of all others, which are complete on ``devices`` from here on."""
    wait_for_devices(devices)
    if live:
        target.copy_held()
    else:
        target.check()
        check()
