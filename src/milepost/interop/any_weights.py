"""Load weights of any model by their own names, from any source that ``open_weights`` supports.

What is wanted of them is decided as for a checkpoint, from their keys, shapes and dtypes: a module's own hooks find the
weights that they rename, fuse and split.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from milepost.collective.comm import Comm, errors_shared
from milepost.collective.progress import ProgressLog
from milepost.collective.threads import map_in_threads
from milepost.errors import StateMismatchError, listed
from milepost.format.box import Box, Slab, cut_into_slabs
from milepost.format.dtype import itemsize
from milepost.format.manifest import Manifest, ShardEntry, TensorEntry
from milepost.interop.weights.boxes import Array, Readable, Renamed, Source, TensorInfo, array_dtype, as_bytes
from milepost.interop.weights.dequantized import METHODS, method_of, method_of_keys, plain_weights
from milepost.interop.weights.open import Weights, open_weights, refuse_one_of_several
from milepost.interop.weights.stream import SLAB_NBYTES
from milepost.loading.fit import Fit, compare
from milepost.loading.load_from import LoadReport
from milepost.loading.names import renamed, renames
from milepost.loading.policy import LetPass, Policy
from milepost.loading.target import Target
from milepost.loading.trial import names_of_wrappers
from milepost.loading.unwanted import unwanted_everywhere
from milepost.tensors.devices import devices_of, wait_for_devices
from milepost.tensors.layout import TensorLeaf, torch_dtype
from milepost.tensors.state import flatten
from milepost.tensors.tree import Relations, dump_parts, merge_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRequest:
    """Weights to read, and their target."""

    path: str
    make_target: Callable[[Manifest, str], Target]
    """Returns the target for a description of the weights and their path."""
    check: Callable[[], None]
    """Called after everything but the target's live tensors is read; may refuse the load while nothing is changed."""
    policy: Policy
    must_be_wanted: Callable[[str], bool]
    """True for a stored key that must exist on some rank, unless the policy lets it pass."""
    model_keys: frozenset[str]
    """Those of this rank's model: the stored ones may have prefixes and wrappers' names."""
    num_threads: int


def load_any(request: WeightsRequest, comm: Comm) -> LoadReport:
    """Read weights into the request's target, ignoring prefixes and wrappers in names. Collective.

    Raises (on every rank):
        StateMismatchError: keys or shapes do not fit; nothing was changed.
        CheckpointDamagedError: files are missing, truncated or malformed, or bytes changed.
    """
    started = time.monotonic()
    with ExitStack() as files:
        with errors_shared(comm):
            fitted = _fit(request, files)
        nowhere, fits_something = unwanted_everywhere(
            *(comm, fitted.unwanted),
            stored=fitted.manifest.tensors,
            known=(),
            fits_something=fitted.fit.num_common > 0,
            node=0,
        )
        with errors_shared(comm):
            _check(request, fitted, nowhere, fits_something=fits_something)
        nbytes = 0
        for live in (False, True):  # values that may be refused are read before the tensors that are filled in place
            fitted.target.is_filling = live
            with errors_shared(comm):
                nbytes += _fill(request, fitted, live=live, logs_progress=comm.rank == 0)
    let_pass = request.policy.let_pass(fitted.fit.missing, fitted.unexpected)
    return weights_report(
        *(fitted.source.path, len(fitted.leaves), nbytes, started),
        unexpected=fitted.unexpected,
        missing=fitted.fit.missing,
        cast=tuple(sorted((*fitted.fit.cast, *fitted.target.cast))),
        let_pass=let_pass,
        notes=(*fitted.notes, *map(str, let_pass), *fitted.target.notes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    """Open weights, this rank's target for them, and their comparison."""

    source: Source
    view: Readable
    """Under the model's names."""
    manifest: Manifest
    """Under the model's names."""
    target: Target
    fit: Fit
    leaves: Mapping[str, TensorLeaf]
    """The tensors to read."""
    unexpected: list[str]
    unwanted: Collection[str]
    """Unexpected keys that the policy does not allow."""
    notes: tuple[str, ...]


def _fit(request: WeightsRequest, files: ExitStack) -> _Fitted:
    """Open the weights, make this rank's target, and compare the two."""
    refuse_one_of_several(request.path)
    opened = open_weights(request.path)
    files.enter_context(opened.source)
    weights = _as_the_model_has_it(opened, request.model_keys)
    source = weights.source
    moved = renames(source.tensors, request.model_keys)
    ours = {key: key for key in source.tensors} | {old: new for new, old in moved.items()}
    manifest = renamed(_described(source.tensors, _versions(opened.versions, ours)), moved).manifest
    target = request.make_target(manifest, source.path)
    target.finish()
    flat = flatten(target.values)
    fit = compare(manifest, flat, left=target.left, mismatched=target.mismatched)
    for key in fit.missing:
        target.values.pop(key, None)  # not read
    unexpected = [key for key in fit.unexpected if request.must_be_wanted(key)]
    return _Fitted(
        source=source,
        view=Renamed(source, {key: moved.get(key, key) for key in manifest.tensors}),
        manifest=manifest,
        target=target,
        fit=fit,
        leaves={key: leaf for key, leaf in flat.tensors.items() if key in manifest.tensors},
        unexpected=unexpected,
        unwanted=request.policy.refused_unexpected(unexpected),
        notes=weights.notes,
    )


def _versions(noted: Mapping[str, int], names: Mapping[str, str]) -> dict[str, int]:
    """Return the versions of modules under the model's names; ``names`` maps stored names of tensors to the model's."""
    modules = names_of_wrappers(names)
    return {modules.name_of(f"{name}._" if name else "_").rpartition(".")[0]: n for name, n in noted.items()}


def _described(tensors: Mapping[str, TensorInfo], versions: Mapping[str, int]) -> Manifest:
    """Describe weights like a checkpoint: each tensor whole, its place and digest unknown."""

    def entry(info: TensorInfo) -> TensorEntry:
        whole = Box.whole(info.shape)
        shard = ShardEntry(whole, "", 0, 0, None, whole.numel * itemsize(info.dtype), None)
        return TensorEntry(info.dtype, info.shape, (shard,))

    return Manifest(
        step=None,
        save_id="",
        created_s=0.0,
        kind="model",
        world_size=0,
        layout={},
        producer={},
        tensors={key: entry(info) for key, info in tensors.items()},
        objects={},
        files={},
        paths={key: (key,) for key in tensors},
        structure=merge_parts([dump_parts(Relations(versions=versions).skeleton())], {})[0] if versions else b"",
    )


def _check(request: WeightsRequest, fitted: _Fitted, nowhere: list[str], *, fits_something: bool) -> None:
    """Refuse what does not fit, and stored keys that no rank has."""
    path, stored = fitted.source.path, fitted.manifest.tensors
    if fits_something or fitted.fit.is_unfit(request.policy):
        fitted.fit.check(path, request.policy, nowhere, stored)
    if not fits_something:
        raise StateMismatchError(
            f"nothing was loaded: {path} has none of the model's keys", path=path, missing=fitted.fit.missing
        )


def _fill(request: WeightsRequest, fitted: _Fitted, *, live: bool, logs_progress: bool) -> int:
    """Read the ``live`` tensors, or all others, which are then checked; returns the bytes read."""
    target = fitted.target
    leaves = {key: leaf for key, leaf in fitted.leaves.items() if (key in target.live) is live}
    name = f"loading {fitted.source.path}" if logs_progress and leaves else None
    nbytes = fill(fitted.view, leaves, request.num_threads, name)
    fitted.source.check_digests()
    if live:
        target.copy_held()
    else:
        target.check()
        request.check()
    return nbytes


def weights_report(
    path: str,
    num_tensors: int,
    nbytes: int,
    started: float,
    *,
    unexpected: Iterable[str] = (),
    missing: Iterable[str] = (),
    cast: tuple[str, ...],
    let_pass: tuple[LetPass, ...] = (),
    notes: Iterable[str],
) -> LoadReport:
    """Report a load of ``nbytes`` of weights that began at ``started`` (monotonic)."""
    return LoadReport(
        path=path,
        step=None,
        kind="model",
        num_tensors=num_tensors,
        wanted_nbytes=nbytes,
        read_nbytes=nbytes,
        seconds=time.monotonic() - started,
        unexpected=tuple(unexpected),
        missing=tuple(missing),
        cast=cast,
        let_pass=let_pass,
        notes=tuple(notes),
    )


def _as_the_model_has_it(weights: Weights, model_keys: Collection[str]) -> Weights:
    """Return ``weights``, dequantized if they are fp8 or MXFP4 and the model is not."""
    method = method_of(weights.source, weights.config)
    if method not in METHODS or method_of_keys(model_keys) == method:
        return weights
    return plain_weights(weights, "float32")


def check_fit(ours: Readable, leaves: Mapping[str, TensorLeaf], path: str) -> tuple[str, ...]:
    """List the casts that ``leaves`` need. Raises StateMismatchError for missing or misshapen tensors."""
    missing = sorted(key for key in leaves if key not in ours.tensors)
    mismatched, cast = [], []
    for key, leaf in leaves.items():
        stored = ours.tensors.get(key)
        here = leaf.spec
        if stored is not None and stored.shape != here.shape:
            mismatched.append(f"{key}: shape {list(stored.shape)} in the weights, {list(here.shape)} here")
        elif stored is not None and stored.dtype != here.dtype:
            cast.append(f"{key}: {stored.dtype} -> {here.dtype}")
    if missing or mismatched:
        lines = [*(f"{key} is not in the weights" for key in missing), *sorted(mismatched)]
        raise StateMismatchError(
            f"{path} does not fit the model; nothing was changed:\n  " + "\n  ".join(listed(lines)),
            path=path,
            missing=missing,
            mismatched=sorted(mismatched),
        )
    return tuple(sorted(cast))


def fill(ours: Readable, leaves: Mapping[str, TensorLeaf], num_threads: int, log_name: str | None) -> int:
    """Read into ``leaves``, slab by slab; returns the bytes read. ``log_name`` is its name in the log."""
    local = threading.local()

    def work(task: tuple[str, int, Slab]) -> None:
        key, piece, slab = task
        leaf = leaves[key]
        stored = ours.tensors[key].dtype
        if not hasattr(local, "buffer") or len(local.buffer) < slab.nbytes:
            local.buffer = np.empty(slab.nbytes, np.uint8)
        values: Array = local.buffer[: slab.nbytes].view(array_dtype(stored)).reshape(slab.box.sizes)
        ours.read_into(key, slab.box.shifted(leaf.pieces[piece].box.offsets), values)
        raw = torch.from_numpy(as_bytes(values)).view(torch_dtype(stored)).view(slab.box.sizes)
        target = leaf.view(piece)
        target[slab.box.index()].copy_(raw)
        if progress is not None:
            progress.add(slab.nbytes)

    tasks = [
        (key, index, slab)
        for key, leaf in leaves.items()
        for index, piece in enumerate(leaf.pieces)
        for slab in cut_into_slabs(piece.box.sizes, itemsize(ours.tensors[key].dtype), SLAB_NBYTES, ours.unit_rows(key))
    ]
    nbytes = sum(slab.nbytes for _, _, slab in tasks)
    progress = ProgressLog(log_name, nbytes) if log_name is not None else None
    devices = devices_of(leaf.local for leaf in leaves.values())
    wait_for_devices(devices)
    with torch.no_grad():
        map_in_threads(work, tasks, num_threads, name="milepost-load")
    wait_for_devices(devices)
    return nbytes
