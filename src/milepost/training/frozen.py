"""Samples of the parameters that steps of ``checkpoint.only_trainable`` leave out: one travels with each step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from milepost.collective.comm import Comm, failure_on, raise_together
from milepost.errors import SaveError, StateMismatchError, listed
from milepost.format.box import Box
from milepost.interop.weights.base_samples import NAME, Sample, differences, dump, merged_samples, parse, places
from milepost.tensors.layout import TensorLeaf, dtype_name
from milepost.tensors.state import flatten
from milepost.training.attached import PART as ATTACHED
from milepost.training.training_state import TrainingState

KEY = f"{ATTACHED}.{NAME}"


def record_of(comm: Comm, state: TrainingState) -> dict[str, bytes]:
    """Return what a step records of the parameters that are not trained, by name; on rank 0. Collective.

    Raises:
        SaveError: on every rank.
    """
    found: dict[str, Sample] = {}
    failure = None
    try:
        frozen = state.frozen_keys()
        found = local_samples((key, value) for key, value in state.state_dict(("model",)).items() if key in frozen)
    except BaseException as cause:  # noqa: BLE001 - a state_dict() of the user's may raise anything
        failure = failure_on(comm.rank, cause, SaveError)
    raise_together(comm, failure)
    brought = comm.gather(found)
    return {NAME: dump(merged_samples(brought))} if brought is not None else {}


def check_base(state: TrainingState, frozen: Collection[str], record: object, path: str) -> None:
    """Compare what this rank holds of the parameters that a step leaves out with what the step records of them.

    Raises:
        StateMismatchError: these are other weights than those that the rest was trained over.
        FormatError: the record is malformed.
    """
    recorded = parse(record, path)
    here = local_samples((key, value) for key, value in state.state_dict(("model",)).items() if key in frozen)
    lines = [*(f"{key}: not in the model then" for key in here if key not in recorded), *differences(recorded, here)]
    if lines:
        raise StateMismatchError(
            f"{path} holds what was trained over other weights than this run has: of the {len(here)} parameters that "
            f"are not trained and that this rank holds, {len(lines)} differ; nothing was changed. Load the weights "
            "that it was trained over first (checkpoint.initial_load_path), or, to begin a new run with it over "
            "these, set checkpoint.initial_load_path to it and choose another folder\n  " + "\n  ".join(listed(lines)),
            path=path,
            mismatched=lines,
        )


def local_samples(tensors: Iterable[tuple[str, Any]]) -> dict[str, Sample]:
    """Samples of the values that this rank holds of ``tensors``; of those that could not be saved, none."""
    found: dict[str, Sample] = {}
    for key, tensor in tensors:
        try:
            leaves: Mapping[str, TensorLeaf] = flatten({key: tensor}).tensors
        except SaveError:
            continue  # it is not saved, so it need not be of a kind that can be
        found.update({name: _sample(leaf) for name, leaf in leaves.items()})
    return found


def _sample(leaf: TensorLeaf) -> Sample:
    wanted = places(leaf.key, leaf.shape)
    values: list[bytes | None] = [None] * len(wanted)
    for number, piece in enumerate(leaf.pieces):
        held = [n for n, place in enumerate(wanted) if piece.box.intersect(Box(place, (1,) * len(place))) is not None]
        if not held:
            continue
        region = leaf.view(number)
        columns = zip(*(_relative(wanted[n], piece.box) for n in held), strict=True)
        index = tuple(torch.tensor(column, device=region.device) for column in columns)
        if region.dtype.itemsize == 1:
            region = region.view(torch.uint8)  # of 8-bit floats no element can be taken
        taken = (region[index] if index else region.reshape(1)).cpu().contiguous()
        raw = taken.view(torch.uint8).numpy().tobytes()
        for position, n in enumerate(held):
            values[n] = raw[position * leaf.dtype.itemsize : (position + 1) * leaf.dtype.itemsize]
    return Sample(dtype_name(leaf.dtype), leaf.shape, tuple(values))


def _relative(place: tuple[int, ...], box: Box) -> tuple[int, ...]:
    return tuple(index - offset for index, offset in zip(place, box.offsets, strict=True))
