"""Find the scheme whose names a set of stored tensors has, and report the faults if none fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic

import numpy as np

from milepost.errors import MAX_LISTED, ConversionError, listed, near
from milepost.format.box import cut_into_slabs
from milepost.format.dtype import itemsize
from milepost.interop.names.nearest import PREFIXES, advice
from milepost.interop.names.rules import Correspondence, Family, KeyFaults, Recipe, Scheme, correspond, key_faults
from milepost.interop.names.sizes import Args, sizes_of, with_vocabulary
from milepost.interop.weights.boxes import Readable, Renamed, array_dtype
from milepost.interop.weights.stream import SLAB_NBYTES


@dataclass(frozen=True, slots=True)
class Match(Generic[Args]):
    """Stored tensors of the model ``args`` in the names of ``found.scheme``."""

    tensors: Readable
    found: Correspondence
    args: Args
    notes: tuple[str, ...] = ()


def match(stored: Readable, family: Family, args: Args, path: str, *, to_do: str = "") -> Match[Args]:
    """Recognise the names of ``stored``. If the vocabulary differs from the flavor's, the stored one is used.

    ``to_do`` is the advice of the error, for a caller other than ``milepost convert``.

    Raises:
        ConversionError: they are not such a model; lists missing, unexpected and misshapen tensors in the closest
        scheme.
    """
    nearest: tuple[int, KeyFaults, Scheme] | None = None
    for prefix, scheme in _candidates(stored, family):
        view = stored if prefix == "" else _without_prefix(stored, prefix)
        shapes = {key: info.shape for key, info in view.tensors.items()}
        fitted = with_stored_vocabulary(scheme, args, shapes)
        wanted = correspond(family, scheme, fitted)
        faults = key_faults(wanted, shapes)
        if not len(faults):
            return Match(view, wanted, fitted, _notes(args, fitted, wanted, shapes))
        if nearest is None or len(faults) < nearest[0]:
            nearest = (len(faults), faults, scheme)
    assert nearest is not None
    raise ConversionError(
        _report(path, family, nearest[2], nearest[1], stored, to_do), path=path, problems=fault_lines(nearest[1])
    )


def _without_prefix(stored: Readable, prefix: str) -> Readable:
    """Return the tensors that have a prefix, without it."""
    return Renamed(stored, {key.removeprefix(prefix): key for key in stored.tensors if key.startswith(prefix)})


def _candidates(stored: Readable, family: Family) -> Iterator[tuple[str, Scheme]]:
    """Yield (prefix, scheme) to try, likely ones first."""
    for prefix in PREFIXES:
        if prefix == "" or any(key.startswith(prefix) for key in stored.tensors):
            for scheme in family.schemes:
                yield prefix, scheme


def with_stored_vocabulary(scheme: Scheme, args: Args, shapes: Mapping[str, tuple[int, ...]]) -> Args:
    """Return ``args`` with the vocabulary size of the stored embedding."""
    key = next(row.theirs for row in scheme.rows if row.ours == "tok_embeddings.weight")
    shape = shapes.get(key)
    return with_vocabulary(args, shape[0]) if shape is not None and len(shape) == 2 else args


def _notes(args: Args, fitted: Args, wanted: Correspondence, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    notes = []
    published, stored = sizes_of(args).named["vocab"], sizes_of(fitted).named["vocab"]
    if published != stored:
        notes.append(f"the vocabulary has {stored} entries; the published model's has {published}")
    dropped = [key for key in shapes if key in wanted.constants or key.startswith(wanted.left_out)]
    if dropped:
        notes.append(f"skipped, as our models have no such tensor: {dropped[0]} and {len(dropped) - 1} like it")
    return tuple(notes)


def fault_lines(faults: KeyFaults) -> list[str]:
    """Describe missing, unexpected and misshapen tensors, one line each."""
    return [
        *(f"missing: {key}" for key in faults.missing),
        *(f"unexpected: {key}" for key in faults.unexpected),
        *faults.misshapen,
    ]


def _report(path: str, family: Family, scheme: Scheme, faults: KeyFaults, stored: Readable, to_do: str) -> str:
    hints = {key: near(key, faults.unexpected) for key in faults.missing[:MAX_LISTED]}
    missing = [f"missing: {key}" + (f" (found {hint})" if (hint := hints.get(key)) else "") for key in faults.missing]
    unexpected = [f"unexpected: {key}" for key in faults.unexpected]
    lines = [*listed(missing), *listed(unexpected), *listed(faults.misshapen)]
    lines += advice(stored.tensors, family.name, to_do=to_do)
    matching = len(stored.tensors) - len(faults.unexpected) - len(faults.misshapen)
    counts = f"{len(faults.missing)} missing, {len(faults.unexpected)} unexpected, {len(faults.misshapen)} misshapen"
    return (
        f"{path} does not hold this {family.name} model{'' if to_do else '; check --model and --flavor'}. Of its "
        f"{len(stored.tensors)} tensors, by the names of scheme '{scheme.name}': {counts}, {matching} match\n  "
        + "\n  ".join(lines)
    )


def tied_fault(match: Match[Args]) -> str | None:
    """Return the reason why the tied embedding and output projection are not one tensor; None if they are.

    Reads only a source that stores both.
    """
    tied = match.found.tied
    if tied is None or tied[1] not in match.tensors.tensors:
        return None
    found = difference(match.tensors, *tied)
    return f"{found}, but the flavor ties the two: one would be lost" if found is not None else None


def difference(tensors: Readable, one: str, other: str) -> str | None:
    """Describe how a tensor differs from another; None if they are bit-identical."""
    first, second = tensors.tensors[one], tensors.tensors[other]
    if first != second:
        return f"{other} is {second.dtype} {list(second.shape)}, {one} is {first.dtype} {list(first.shape)}"
    for slab in cut_into_slabs(first.shape, itemsize(first.dtype), SLAB_NBYTES):
        left, right = (np.empty(slab.nbytes, np.uint8) for _ in range(2))
        for key, part in ((one, left), (other, right)):
            tensors.read_into(key, slab.box, part.view(array_dtype(first.dtype)).reshape(slab.box.sizes))
        if not np.array_equal(left, right):
            return f"{other} differs from {one}"
    return None


def repeated(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """Return key -> other key for recipes that repeat another's: tensors to store once."""
    first: dict[int, str] = {}
    shared = {}
    for key, recipe in recipes.items():
        if id(recipe) in first:
            shared[key] = first[id(recipe)]
        else:
            first[id(recipe)] = key
    return shared
