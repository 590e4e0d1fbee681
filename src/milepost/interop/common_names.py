"""The models of several sources under common names, so that they can be compared. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from milepost.config import part_of
from milepost.errors import ConversionError
from milepost.interop.as_stored import bare_names, repeated_in
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.match import match, tied_fault
from milepost.interop.tabled import Tabled, model_as_asked, model_of
from milepost.interop.weights.boxes import Readable, Renamed, Source
from milepost.interop.weights.dequantized import METHODS, method_of, plain_weights
from milepost.interop.weights.open import Weights


@dataclass(frozen=True, slots=True)
class Named:
    """A source, and its model's tensors under common names."""

    source: Source
    tensors: Readable

    @property
    def path(self) -> str:
        """The path of the source."""
        return self.source.path


def by_our_names(
    opened: Sequence[Weights], model: str | None, flavor: str | None, assets: str | os.PathLike[str]
) -> list[Named]:
    """Return all models under Milepost's names; fp8 and MXFP4 weights are dequantized.

    Raises:
        ConfigError: there is no such model, or its sizes are recorded nowhere.
        ConversionError: a source is another model, or quantized irreversibly.
    """
    known = model_as_asked(model, flavor, assets, map(model_of, opened))
    return [_by_our_names(weights, known) for weights in opened]


def _by_our_names(weights: Weights, known: Tabled) -> Named:
    source = plain_weights(weights, None).source
    keys = {key: key for key in source.tensors if part_of(key) == "model"}
    found = match(Renamed(source, keys), known.tables, known.sizes, source.path)
    return Named(source, Assembled(found.tensors, found.found.into_ours()))


def by_names_of_hub(opened: Sequence[Weights]) -> list[Named]:
    """Return all models under their own names, without the additions of programs and wrappers, dequantized.

    Tied tensors have the names that all sources have.
    """
    plain = [plain_weights(one, None) if method_of(one.source, one.config) in METHODS else one for one in opened]
    named = [Named(one.source, Renamed(one.source, bare_names(one))) for one in plain]
    common = set[str].intersection(*(set(one.tensors.tensors) for one in named))
    return [replace(one, tensors=_without(one.tensors, repeated_in(one.tensors, common))) for one in named]


def _without(tensors: Readable, left_out: Collection[str]) -> Readable:
    return Renamed(tensors, {key: key for key in tensors.tensors if key not in left_out}) if left_out else tensors


def tied_alike(tensors: Readable, like: Readable) -> Readable:
    """Rename the tied tensors of ``tensors`` to those of ``like``; return them unchanged if that is impossible.

    Copies that ``like`` lacks are left out; copies that only it has are read from their originals.
    """
    less = _without(tensors, repeated_in(tensors, like.tensors.keys() & tensors.tensors.keys()))
    copies = repeated_in(like, like.tensors.keys() & less.tensors.keys())
    return Renamed(less, {key: key for key in less.tensors} | copies) if copies else less


def translated(tensors: Readable, like: Readable, models: Sequence[Tabled]) -> tuple[Readable, Tabled] | None:
    """Return ``tensors`` with the names and the order of rows of ``like``, by the first of ``models`` that fits."""
    for known in models:
        try:
            here = match(like, known.tables, known.sizes, "")
            there = match(tensors, known.tables, known.sizes, "")
        except ConversionError:
            continue
        if tied_fault(here) is not None or tied_fault(there) is not None:
            continue
        recipes = here.found.into_theirs()
        wanted = {key: recipe for key, recipe in recipes.items() if key in like.tensors}
        if here.args == there.args and wanted.keys() == like.tensors.keys():
            return Assembled(Assembled(there.tensors, there.found.into_ours()), wanted), known
    return None


def recorded_models(opened: Sequence[Weights]) -> Iterator[Tabled]:
    """The models that sources record; an invalid record counts as none."""
    for weights in opened:
        try:
            known = model_of(weights)
        except ConversionError:
            continue
        if known is not None:
            yield known
