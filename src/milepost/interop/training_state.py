"""A whole training step from one program's names to another's: model, optimizer state, schedule, counters.

::

    stored --names of the source -> ours--> ours --ours -> names of the target--> the same step, for the other program

Both ways are the tables of ``names``; each tensor of the optimizer's state that has its parameter's shape is cut and
put together as that is. What only its own program can read (a data loader's state, random state) is left out.
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
from milepost.format.record import object_record, read_object
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
from milepost.tensors.plan import Origin
from milepost.verification.block_reader import BlockReader

CARRIED = ("model", "optimizer", "lr_scheduler", "train_state")
OF_LAMBDA_LR = ("torchtitan-0.2",)
"""Releases whose schedule is loaded as torch's LambdaLR has stored it."""
_STATE = "optimizer.state."
_GROUPS = "optimizer.param_groups."


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A step under the names of the target. ``objects`` are records, as they are stored."""

    ours: Readable
    content: Readable
    back: Mapping[str, Recipe]
    """Each tensor of ``ours``, put together again from those of ``content``."""
    objects: Mapping[str, bytes]
    paths: Mapping[str, tuple[str | int, ...]]
    notes: tuple[str, ...]


def plan_training_step(
    storage: Storage, folder: str, manifest: Manifest, stored: Readable, model: ModelIdentity, names: str
) -> TrainingStep:
    """Plan how the step in ``folder`` becomes one under the ``names`` of another program. Reads small values.

    Raises:
        ConversionError: it holds no optimizer state, keys or shapes of another model, or values that differ between
            parameters of which the target has one.
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
    notes = (*(found.notes if found is not None else ()), *([f"not carried over: {', '.join(left)}"] if left else []))
    objects = _objects(storage, folder, values, optimizer.into_theirs)
    if names in OF_LAMBDA_LR:
        objects |= _lambda_schedule(objects)
    paths = {key: _path_of(key, here) for key in (*content.tensors, *objects)}
    return TrainingStep(ours, content, back, objects, paths, notes)


def _checked_sizes(family: Family, model: ModelIdentity, shapes: Mapping[str, tuple[int, ...]], path: str) -> ModelArgs:
    """The sizes of ``model`` with the stored vocabulary. Raises ConversionError if it is not what is stored."""
    shapes = {key: shape for key, shape in shapes.items() if part_of(key) == "model"}
    scheme = family.scheme(OWN)
    sizes = with_stored_vocabulary(scheme, model.sizes, shapes)
    faults = fault_lines(key_faults(correspond(family, scheme, sizes), shapes))
    if faults:
        raise ConversionError(
            f"{path} does not hold the training state of {model}. Are --model and --flavor right?\n  "
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
    """A key of optimizers, taken apart."""

    kind: str
    parameter: str
    name: str
    """Of the state or the option, with a dot before it."""

    @classmethod
    def of(cls, key: str, parameters: Collection[str]) -> _Key | None:
        """None for a key of another part, or of a parameter that is none of these."""
        kind = next((kind for kind in (_STATE, _GROUPS) if key.startswith(kind)), None)
        rest = key.removeprefix(kind) if kind is not None else ""
        parameter = longest_prefix(rest, parameters)
        return cls(kind, parameter, rest[len(parameter) :]) if kind is not None and parameter is not None else None

    def at(self, parameter: str) -> str:
        """The key of the same for another parameter."""
        return f"{self.kind}{parameter}{self.name}"


@dataclass(frozen=True, slots=True)
class _Optimizer:
    """The keys of optimizers on both sides: each of the one with those of the other's that it is made of."""

    names: Correspondence
    into_theirs: Mapping[str, Sequence[str]]
    into_ours: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, keys: Iterable[str], names: Correspondence, path: str) -> _Optimizer:
        """For the keys that are stored under our names."""
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
        """The tensors of the target's optimizer, of ours."""
        return _recipes(self.into_theirs, self.names.into_theirs(), self.names.ours, ours)

    def backward(self, content: Readable) -> dict[str, Recipe]:
        """The tensors of our optimizer, of the target's."""
        return _recipes(self.into_ours, self.names.into_ours(), self.names.theirs, content)


def _recipes(
    moved: Mapping[str, Sequence[str]],
    parameters: Mapping[str, Recipe],
    shapes: Mapping[str, tuple[int, ...]],
    source: Readable,
) -> dict[str, Recipe]:
    """The recipe of each tensor: its parameter's where it has the same shape, else a plain copy.

    Raises:
        ConversionError: it is to be one tensor, and is several that differ.
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
    """The records of all values but tensors, under the target's keys.

    Raises:
        ConversionError: one is to be made of several that differ.
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
    """The state that torch's LambdaLR stores besides its count of steps, which is all that the others keep.

    For one group of parameters, whose rate is a function of the count: torchtitan 0.2's. Names are torch 2.13's.
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
    """The value of an option that all parameters have alike; None if there is none."""
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
