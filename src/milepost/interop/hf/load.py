"""Starting a training from Hugging Face files: every rank reads only the ranges that it holds.

The only module here that knows tensors; all that decides what to read is in ``rules`` and ``source``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch

from milepost.collective.progress import ProgressLog
from milepost.collective.threads import map_in_threads
from milepost.errors import ConversionError, StateMismatchError, listed
from milepost.format.box import Slab, cut_into_slabs
from milepost.format.dtype import itemsize
from milepost.format.huggingface import CONFIG_NAME
from milepost.interop.hf.extras import check_config
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.families import family_of
from milepost.interop.names.match import match
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.weights.boxes import Array, Readable, array_dtype, as_bytes
from milepost.interop.weights.open import open_weights
from milepost.interop.weights.stream import SLAB_NBYTES
from milepost.tensors.layout import TensorLeaf


@dataclass(frozen=True, slots=True)
class HfLoadReport:
    """What a load from Hugging Face files did, as this rank saw it."""

    path: str
    num_tensors: int
    read_nbytes: int
    """Bytes of the regions that this rank asked for, in the stored dtype."""
    cast: tuple[str, ...]
    """Tensors whose stored dtype differs: ``key: bfloat16 -> float32``."""
    notes: tuple[str, ...]


def load_hf(
    path: str | PathLike[str],
    model: str,
    args: ModelArgs,
    leaves: Mapping[str, TensorLeaf],
    *,
    num_threads: int = 2,
    tell: bool = False,
) -> HfLoadReport:
    """Fill this rank's ``leaves`` (our keys) from the weights at ``path``: a Hugging Face folder, or any other source
    that ``milepost convert`` knows. Not collective. With ``tell``, the log says how far a long load is.

    Raises:
        ConversionError: the weights are of another model; nothing was changed.
        StateMismatchError: they do not have what the leaves ask for; nothing was changed.
        CheckpointDamagedError: files are missing, truncated or malformed, or bytes changed.
    """
    weights = open_weights(path)
    with weights.source as source:
        family = family_of(model, args)
        if weights.config is not None:
            check_config(weights.config, family.name, args, f"{source.path}/{CONFIG_NAME}")
        found = match(source, family, args, source.path)
        if found.args != args:
            raise ConversionError(
                f"{source.path} has a vocabulary of {found.args.vocab_size}, the model one of {args.vocab_size}",
                path=source.path,
            )
        ours = Assembled(found.tensors, found.found.into_ours())
        cast = _check_fit(ours, leaves, source.path)
        nbytes = _fill(ours, leaves, num_threads, f"loading {source.path}" if tell else None)
        source.check_digests()  # of a `.pt` file or a checkpoint: what was read in part is completed for it
    return HfLoadReport(source.path, len(leaves), nbytes, cast, found.notes)


def _check_fit(ours: Readable, leaves: Mapping[str, TensorLeaf], path: str) -> tuple[str, ...]:
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


def _fill(ours: Readable, leaves: Mapping[str, TensorLeaf], num_threads: int, told_as: str | None) -> int:
    local = threading.local()

    def work(task: tuple[str, int, Slab]) -> None:
        key, piece, slab = task
        leaf = leaves[key]
        stored = ours.tensors[key].dtype
        if not hasattr(local, "buffer") or len(local.buffer) < slab.nbytes:
            local.buffer = np.empty(slab.nbytes, np.uint8)
        values: Array = local.buffer[: slab.nbytes].view(array_dtype(stored)).reshape(slab.box.sizes)
        ours.read_into(key, slab.box.shifted(leaf.pieces[piece].box.offsets), values)
        raw = torch.from_numpy(as_bytes(values)).view(getattr(torch, stored)).view(slab.box.sizes)
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
    progress = ProgressLog(told_as, nbytes) if told_as is not None else None
    with torch.no_grad():
        map_in_threads(work, tasks, num_threads, name="milepost-load")
    return nbytes
