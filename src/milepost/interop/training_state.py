"""Convert a full training step from one program's names to another's: model, optimizer state, schedule, counters.

::

    stored --names of the source -> ours--> ours --ours -> names of the target--> the same step, for the other program

Both conversions use the tables of ``names``; an optimizer state tensor of its parameter's shape is split and assembled
like the parameter. State that only its own program can read (a data loader's, random state) is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from milepost.config import part_of
from milepost.errors import ConversionError, listed
from milepost.format.box import Box
from milepost.format.manifest import Manifest, ObjectEntry
from milepost.format.record import object_record
from milepost.format.record_reader import read_object
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.families import family_of
from milepost.interop.names.identity import ModelIdentity
from milepost.interop.names.match import difference, fault_lines, with_stored_vocabulary
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.names.rules import (
    OWN,
    Correspondence,
    Family,
    MappedBox,
    Op,
    Recipe,
    correspond,
    key_faults,
)
from milepost.interop.names.torchtitan import OPTIMIZER_NAMES
from milepost.interop.names.translate import translate
from milepost.interop.weights.boxes import Readable
from milepost.loading.names import longest_prefix
from milepost.storage.base import Storage, join
from milepost.tensors.read_plan import Origin
from milepost.verification.block_reader import BlockReader

CARRIED = ("model", "optimizer", "lr_scheduler", "train_state")
OF_LAMBDA_LR = ("torchtitan-0.2",)
"""Releases that load their schedule in the form of torch's LambdaLR."""
_STATE = "optimizer.state."
_GROUPS = "optimizer.param_groups."


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A step under the names of the target. ``objects`` are stored records."""

    ours: Readable
    content: Readable
    back: Mapping[str, Recipe]
    """Recipes of the tensors of ``ours`` from those of ``content``."""
    objects: Mapping[str, bytes]
    paths: Mapping[str, tuple[str | int, ...]]
    notes: tuple[str, ...]


def plan_training_step(
    storage: Storage, folder: str, manifest: Manifest, stored: Readable, model: ModelIdentity, names: str
) -> TrainingStep:
    """Plan the conversion of the step in ``folder`` to the ``names`` of another program. Reads small values.

    Raises:
        ConversionError: it holds no optimizer state, keys or shapes of another model, or different values for
        parameters that are one in the target.
    """
    path = f"{storage.root}/{folder}"
    if not any(key.startswith(_STATE) for key in manifest.tensors):
        raise ConversionError(f"{path} holds no optimizer state: leave out --training-state", path=path)
    found = translate(manifest, model.name, model.sizes)
    here = found.manifest if found is not None else manifest
    origins = found.origins if found is not None else {}
    carried = {key: entry for key, entry in here.tensors.items() if part_of(key) in CARRIED}
    ours = Assembled(stored, {key: _recipe(key, entry.shape, origins.get(key)) for key, entry in carried.items()})
    family = family_of(model.name, model.sizes)
    sizes = _checked_sizes(family, model, {key: info.shape for key, info in ours.tensors.items()}, path)
    of_model = correspond(family, family.scheme(names), sizes)
    values = {key: entry for key, entry in here.objects.items() if part_of(key) in CARRIED}
    of_optimizer = correspond(family, family.scheme(OPTIMIZER_NAMES.get(names, names)), sizes)
    optimizer = _Optimizer.of([*carried, *values], of_optimizer, path)
    rest = {key: _recipe(key, ours.tensors[key].shape) for key in carried if part_of(key) not in CARRIED[:2]}
    content = Assembled(ours, of_model.into_theirs() | optimizer.forward(ours) | rest)
    back = of_model.into_ours() | optimizer.backward(content) | rest
    left = sorted({part_of(key) for key in (*here.tensors, *here.objects)} - set(CARRIED))
    notes = (*(found.notes if found is not None else ()), *([f"not converted: {', '.join(left)}"] if left else []))
    objects = _objects(storage, folder, values, optimizer.into_theirs)
    if names in OF_LAMBDA_LR:
        objects |= _lambda_schedule(objects)
    paths = {key: _path_of(key, here) for key in (*content.tensors, *objects)}
    return TrainingStep(ours, content, back, objects, paths, notes)


def _checked_sizes(family: Family, model: ModelIdentity, shapes: Mapping[str, tuple[int, ...]], path: str) -> ModelArgs:
    """Return the sizes of ``model`` with the stored vocabulary. Raises ConversionError if another model is stored."""
    shapes = {key: shape for key, shape in shapes.items() if part_of(key) == "model"}
    scheme = family.scheme(OWN)
    sizes = with_stored_vocabulary(scheme, model.sizes, shapes)
    faults = fault_lines(key_faults(correspond(family, scheme, sizes), shapes))
    if faults:
        raise ConversionError(
            f"{path} does not hold the training state of {model}; check --model and --flavor:\n  "
            + "\n  ".join(listed(faults)),
            path=path,
            problems=faults,
        )
    return sizes


def _recipe(key: str, shape: tuple[int, ...], origins: Sequence[Origin] | None = None) -> Recipe:
    if origins is None:
        box = Box.whole(shape)
        return Recipe(shape, (MappedBox(box, key, box, Op.SAME),))
    pieces = (
        MappedBox(one.box, one.key, one.stored, Op.TRANSPOSED if one.is_transposed else Op.SAME) for one in origins
    )
    return Recipe(shape, tuple(pieces))


def _path_of(key: str, manifest: Manifest) -> tuple[str | int, ...]:
    part = part_of(key)
    if part == "model":
        return (key,)
    return manifest.paths.get(key, (part, key.removeprefix(f"{part}.")))


@dataclass(frozen=True, slots=True)
class _Key:
    """A parsed optimizer key."""

    kind: str
    parameter: str
    name: str
    """Name of the state or option, with a leading dot."""

    @classmethod
    def of(cls, key: str, parameters: Collection[str]) -> _Key | None:
        """Parse a key; None for another part's key, or an unknown parameter."""
        kind = next((kind for kind in (_STATE, _GROUPS) if key.startswith(kind)), None)
        rest = key.removeprefix(kind) if kind is not None else ""
        parameter = longest_prefix(rest, parameters)
        return cls(kind, parameter, rest[len(parameter) :]) if kind is not None and parameter is not None else None

    def at(self, parameter: str) -> str:
        """Return the same key for another parameter."""
        return f"{self.kind}{parameter}{self.name}"


@dataclass(frozen=True, slots=True)
class _Optimizer:
    """The optimizer keys of both sides: each key with the keys from which it is built."""

    names: Correspondence
    into_theirs: Mapping[str, Sequence[str]]
    into_ours: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, keys: Iterable[str], names: Correspondence, path: str) -> _Optimizer:
        """Build it for the keys stored under our names."""
        into_theirs: dict[str, list[str]] = {}
        into_ours: dict[str, list[str]] = {}
        theirs_of = {key: recipe.pieces[0].source_key for key, recipe in names.into_ours().items()}
        for key in keys:
            if part_of(key) != "optimizer":
                continue
            found = _Key.of(key, theirs_of)
            if found is None:
                raise ConversionError(f"{path}: '{key}' is not state of a parameter of this model", path=path)
            new = found.at(theirs_of[found.parameter])
            into_theirs.setdefault(new, []).append(key)
            into_ours[key] = [new]
        return cls(names, into_theirs, into_ours)

    def forward(self, ours: Readable) -> dict[str, Recipe]:
        """Return the recipes of the target's optimizer tensors from ours."""
        return _recipes(self.into_theirs, self.names.into_theirs(), self.names.ours, ours)

    def backward(self, content: Readable) -> dict[str, Recipe]:
        """Return the recipes of our optimizer tensors from the target's."""
        return _recipes(self.into_ours, self.names.into_ours(), self.names.theirs, content)


def _recipes(
    moved: Mapping[str, Sequence[str]],
    parameters: Mapping[str, Recipe],
    shapes: Mapping[str, tuple[int, ...]],
    source: Readable,
) -> dict[str, Recipe]:
    """Return the recipe of each tensor: its parameter's if it has the same shape, else a plain copy.

    Raises:
        ConversionError: several different tensors would become one.
    """
    recipes = {}
    for new, sources in moved.items():
        if sources[0] not in source.tensors:
            continue
        target, first = _Key.of(new, parameters), _Key.of(sources[0], shapes)
        assert target is not None, "moved by these tables"
        assert first is not None, "moved by these tables"
        shape = source.tensors[sources[0]].shape
        if shape == shapes[first.parameter]:
            recipe = parameters[target.parameter]
            pieces = tuple(replace(piece, source_key=first.at(piece.source_key)) for piece in recipe.pieces)
            recipes[new] = replace(recipe, pieces=pieces)
            continue
        for other in sources[1:]:
            if fault := difference(source, sources[0], other):
                raise ConversionError(f"{fault}, but {new} is one tensor")
        recipes[new] = _recipe(sources[0], shape)
    return recipes


def _objects(
    storage: Storage, folder: str, entries: Mapping[str, ObjectEntry], moved: Mapping[str, Sequence[str]]
) -> dict[str, bytes]:
    """Return the records of all values except tensors, under the target's keys.

    Raises:
        ConversionError: several different values would become one.
        DigestMismatchError: a record changed after it was written.
    """
    records = _read_records(storage, folder, entries)
    found = {key: record for key, record in records.items() if part_of(key) != "optimizer"}
    for new, sources in moved.items():
        if sources[0] not in records:
            continue
        differing = [key for key in sources[1:] if records[key] != records[sources[0]]]
        if differing:
            raise ConversionError(f"{differing[0]} differs from {sources[0]}, but {new} is one value")
        found[new] = records[sources[0]]
    return found


def _lambda_schedule(objects: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the state that torch's LambdaLR stores besides its step count, which is all that the other releases store.

    For one parameter group whose rate is a function of the count, as in torchtitan 0.2. Names are torch 2.13's.
    """
    count = _value(objects.get("lr_scheduler.last_epoch"))
    rates = {name: _of_all(objects, f".{name}") for name in ("initial_lr", "lr")}
    if not isinstance(count, int) or None in rates.values():
        return {}
    state = {
        "base_lrs": [rates["initial_lr"]],
        "_last_lr": [rates["lr"]],
        "_step_count": count + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "lr_lambdas": [{}],
    }
    made = {f"lr_scheduler.{name}": object_record(value) for name, value in state.items()}
    return {key: record for key, record in made.items() if key not in objects}


def _of_all(objects: Mapping[str, bytes], option: str) -> float | None:
    """Return an option's value if it is the same for all parameters; None if there is none."""
    found = {record for key, record in objects.items() if key.startswith(_GROUPS) and key.endswith(option)}
    value = _value(found.pop()) if len(found) == 1 else None
    return value if isinstance(value, float) else None


def _value(record: bytes | None) -> Any:
    return None if record is None else read_object(record)


def _read_records(storage: Storage, folder: str, entries: Mapping[str, ObjectEntry]) -> dict[str, bytes]:
    records = {}
    by_file = sorted(entries.items(), key=lambda item: (item[1].file, item[1].record_offset))
    for file, group in itertools.groupby(by_file, key=lambda item: item[1].file):
        with storage.open_read(join(folder, file)) as handle:
            for key, entry in group:
                record = handle.read(entry.record_offset, entry.record_nbytes)
                reader = BlockReader(handle, key, entry.record_offset, entry.record_nbytes, entry.crc32)
                reader.passed(0, memoryview(record))
                records[key] = bytes(record)
    return records
