"""Samples of the parameters left out by ``checkpoint.only_trainable``, saved with each step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from milepost.collective.comm import Comm, errors_shared
from milepost.errors import SaveError, StateMismatchError, listed
from milepost.format.box import Box
from milepost.interop.weights.base_samples import NAME, Sample, differences, dump, merged_samples, parse, places
from milepost.tensors.layout import TensorLeaf, dtype_name
from milepost.tensors.state import flatten
from milepost.training.attached import PART as ATTACHED

if TYPE_CHECKING:
    from milepost.training.training_state import TrainingState

KEY = f"{ATTACHED}.{NAME}"


def record_of(comm: Comm, state: TrainingState) -> dict[str, bytes]:
    """Return a step's record of the frozen parameters, by name; on rank 0. Collective.

    Raises:
        SaveError: on every rank.
    """
    with errors_shared(comm, SaveError):  # a state_dict() of the user's may raise anything
        frozen = state.frozen_keys()
        found = local_samples((key, value) for key, value in state.state_dict(("model",)).items() if key in frozen)
    brought = comm.gather(found)
    return {NAME: dump(merged_samples(brought))} if brought is not None else {}


def check_base(state: TrainingState, frozen: Collection[str], record: object, path: str) -> None:
    """Compare this rank's frozen parameters with the step's record of them.

    Raises:
        StateMismatchError: the weights differ from those that the step was trained on.
        FormatError: the record is malformed.
    """
    recorded = parse(record, path)
    here = local_samples((key, value) for key, value in state.state_dict(("model",)).items() if key in frozen)
    lines = [*(f"{key}: not in the saved model" for key in here if key not in recorded), *differences(recorded, here)]
    if lines:
        raise StateMismatchError(
            f"{path} was trained on other frozen weights than this run's: of the {len(here)} frozen parameters on "
            f"this rank, {len(lines)} differ; nothing was changed. First load the weights that it was trained on "
            "(checkpoint.initial_load_path) or, to start a new run with it on these weights, set "
            "checkpoint.initial_load_path to it and choose another folder\n  " + "\n  ".join(listed(lines)),
            path=path,
            mismatched=lines,
        )


def local_samples(tensors: Iterable[tuple[str, Any]]) -> dict[str, Sample]:
    """Sample this rank's values of ``tensors``; tensors that can't be saved have no sample."""
    found: dict[str, Sample] = {}
    for key, tensor in tensors:
        try:
            leaves: Mapping[str, TensorLeaf] = flatten({key: tensor}).tensors
        except SaveError:
            continue  # it is not saved, so it may be of an unsupported kind
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
            region = region.view(torch.uint8)  # elements of 8-bit floats can't be indexed
        taken = (region[index] if index else region.reshape(1)).cpu().contiguous()
        raw = taken.view(torch.uint8).numpy().tobytes()
        for position, n in enumerate(held):
            values[n] = raw[position * leaf.dtype.itemsize : (position + 1) * leaf.dtype.itemsize]
    return Sample(dtype_name(leaf.dtype), leaf.shape, tuple(values))


def _relative(place: tuple[int, ...], box: Box) -> tuple[int, ...]:
    return tuple(index - offset for index, offset in zip(place, box.offsets, strict=True))
