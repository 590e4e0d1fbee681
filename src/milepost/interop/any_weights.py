"""Load weights of any model by their own names, from any source that ``open_weights`` supports."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
import torch

from milepost.collective.progress import ProgressLog
from milepost.collective.threads import map_in_threads
from milepost.errors import StateMismatchError, listed
from milepost.format.box import Slab, cut_into_slabs
from milepost.format.dtype import itemsize
from milepost.interop.weights.boxes import Array, Readable, Renamed, array_dtype, as_bytes
from milepost.interop.weights.dequantized import METHODS, method_of, method_of_keys, plain_weights
from milepost.interop.weights.open import Weights, open_weights, refuse_one_of_several
from milepost.interop.weights.stream import SLAB_NBYTES
from milepost.loading.fit import check_unexpected
from milepost.loading.load_from import LoadReport
from milepost.loading.names import renames
from milepost.loading.policy import LetPass, Policy
from milepost.tensors.devices import devices_of, wait_for_devices
from milepost.tensors.layout import TensorLeaf, torch_dtype


def load_any(
    path: str,
    leaves: Mapping[str, TensorLeaf],
    model_keys: frozenset[str],
    policy: Policy,
    *,
    must_be_wanted: Callable[[str], bool],
    num_threads: int,
    logs_progress: bool,
) -> LoadReport:
    """Fill this rank's ``leaves`` from the weights at ``path``, ignoring prefixes and wrappers in names.

    ``model_keys`` are those of this rank's model: other stored keys are refused, unless ``must_be_wanted`` is false for
    them or the policy allows them. Not collective.

    Raises:
        StateMismatchError: keys or shapes do not fit; nothing was changed.
        CheckpointDamagedError: files are missing, truncated or malformed, or bytes changed.
    """
    started = time.monotonic()
    refuse_one_of_several(path)
    opened = open_weights(path)
    with opened.source:
        source = _as_the_model_has_it(opened, model_keys).source
        moved = renames(source.tensors, leaves)
        names = {key: key for key in source.tensors if key not in set(moved.values())} | moved
        view = Renamed(source, names)
        missing = sorted(key for key in leaves if key not in view.tensors)
        unexpected = sorted(key for key in view.tensors if key not in model_keys and must_be_wanted(key))
        found = {key: leaf for key, leaf in leaves.items() if key in view.tensors}
        refused = sorted(policy.refused_unexpected(unexpected))
        if not found:
            raise StateMismatchError(
                f"nothing was loaded: {source.path} has none of the model's keys", path=source.path, missing=missing
            )
        check_unexpected(source.path, refused, policy, view.tensors)
        cast = check_fit(view, {**found, **{key: leaves[key] for key in policy.refused_missing(missing)}}, source.path)
        nbytes = fill(view, found, num_threads, f"loading {source.path}" if logs_progress else None)
        source.check_digests()
    let_pass = policy.let_pass(missing, unexpected)
    return weights_report(
        *(source.path, len(found), nbytes, started),
        unexpected=unexpected,
        missing=missing,
        cast=cast,
        let_pass=let_pass,
        notes=map(str, let_pass),
    )


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
