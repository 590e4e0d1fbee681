"""The sources of a merge under the names of the first: the same keys and shapes in all, or a report of all faults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from milepost.errors import ConversionError, listed
from milepost.format.dtype import numpy_dtype
from milepost.interop.as_stored import bare_names
from milepost.interop.common_names import recorded_models, tied_alike, translated
from milepost.interop.merging.merged import is_floating
from milepost.interop.names.adapter_keys import first_of_adapter
from milepost.interop.weights.boxes import Readable, Renamed, TensorInfo
from milepost.interop.weights.dequantized import method_of, plain_weights
from milepost.interop.weights.open import Weights, open_weights, refuse_one_of_several


@dataclass(frozen=True, slots=True)
class Input:
    """An open source, its model's tensors by the names of the first source, and notes on their translation."""

    weights: Weights
    tensors: Readable
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The path of the input."""
        return self.weights.source.path


def open_inputs(paths: Sequence[str], stack: ExitStack, dtype: str | None) -> list[Input]:
    """Open all ``paths``, to be closed with ``stack``, and check that they hold the same model.

    Wrappers in names are ignored. A source that records its model may have another program's names. Weights in fp8 and
    MXFP4 are dequantized, to ``dtype``, or bfloat16.

    Raises:
        ConversionError: they do not hold the same tensors, or some can't be merged; with all faults of all sources.
        CheckpointNotFoundError, CheckpointDamagedError: one can't be opened.
    """
    opened, faults = [], []
    for path in paths:
        refuse_one_of_several(path)
        weights = open_weights(path)
        stack.callback(weights.source.close)
        try:
            opened.append(weights if weights.is_adapter else plain_weights(weights, dtype))
        except ConversionError as error:
            faults.append(error.message)
            opened.append(weights)
    first = Input(opened[0], Renamed(opened[0].source, bare_names(opened[0])))
    found = [first, *(_by_names_of(first, weights) for weights in opened[1:])]
    faults += [f"{one.path}: {fault}" for one in found for fault in _own_faults(one)]
    for other in found[1:]:
        faults += [f"{other.path}: {line}" for line in listed(list(_differences(first.tensors, other.tensors)))]
    if faults:
        raise ConversionError(
            f"these sources can't be merged, nothing was written. They must hold the same tensors as {first.path}:\n  "
            + "\n  ".join(faults),
            path=first.path,
            problems=faults,
        )
    return found


def _by_names_of(first: Input, weights: Weights) -> Input:
    """Return a source by the names of the first, its own or translated by a table; faults are found later."""
    stored = Renamed(weights.source, bare_names(weights))
    bare = tied_alike(stored, first.tensors)
    if bare.tensors.keys() == first.tensors.tensors.keys():
        changed = sorted(bare.tensors.keys() ^ stored.tensors.keys())
        return Input(weights, bare, tuple(f"{key} is tied in {weights.source.path}" for key in changed))
    found = translated(stored, first.tensors, list(recorded_models((first.weights, weights))))
    if found is None:
        return Input(weights, stored)
    tensors, known = found
    note = f"{weights.source.path} has other names than {first.path}: both are {known}, and were matched"
    return Input(weights, tensors, (note,))


def _own_faults(one: Input) -> Iterator[str]:
    """Return the reasons why a source can't be merged at all."""
    if one.weights.is_adapter:
        yield "a PEFT adapter, not a model: merge it into its base model first (merge_and_unload() of PEFT)"
    elif one.weights.source.kind != "hf" and (key := first_of_adapter(one.weights.source.tensors)) is not None:
        yield f"a PEFT adapter in it ({key}): its matrices have no mean; `milepost export --merge-adapter` each first"
    elif method_of(one.weights.source, one.weights.config) is not None:
        return  # said when they could not be dequantized
    elif not one.tensors.tensors:
        yield "no model tensors"
    else:
        kinds = sorted({info.dtype for info in one.tensors.tensors.values() if not _can_be_merged(info)})
        if kinds:
            yield f"tensors of dtype {', '.join(kinds)}, which can't be merged"


def _can_be_merged(info: TensorInfo) -> bool:
    dtype = numpy_dtype(info.dtype)
    return is_floating(info) or (dtype is not None and dtype.kind in "iub")


def _differences(first: Readable, other: Readable) -> Iterator[str]:
    for key, info in first.tensors.items():
        found = other.tensors.get(key)
        if found is None:
            yield f"missing: {key}"
        elif found.shape != info.shape:
            yield f"{key}: shape {list(found.shape)} instead of {list(info.shape)}"
        elif is_floating(found) != is_floating(info) or (not is_floating(info) and found.dtype != info.dtype):
            yield f"{key}: {found.dtype} instead of {info.dtype}"
    yield from (f"unexpected: {key}" for key in other.tensors if key not in first.tensors)
